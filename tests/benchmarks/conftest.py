"""The programs in benchmarks/ import each other by name, as scripts do."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
