"""Writes the resolved config of every named size and recipe to tests/configs/goldens.

python tests/configs/make_goldens.py
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from test_configs import GOLDENS, NAMES, golden_path, load  # noqa: E402

GOLDENS.mkdir(exist_ok=True)
for stale in GOLDENS.glob("*.json"):
    stale.unlink()
for name in NAMES:
    golden_path(name).write_text(load(name).to_json() + "\n")
