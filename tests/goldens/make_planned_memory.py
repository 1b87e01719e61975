"""Writes what XLA's CPU compiler says of the memory of the runs in tests/planning/planned_runs.py.

PYTHONPATH=. python tests/goldens/make_planned_memory.py
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "planning"))

from planned_runs import EIGHT, GOLDEN, RUNS, planned

from lightning_jax.planning.compiled import compile_step, described_devices

devices = described_devices(EIGHT)
compiled = {name: compile_step(*planned(name), devices) for name in RUNS}
sizes = {name: {"arguments": each.arguments, "temporaries": each.temporaries} for name, each in compiled.items()}
GOLDEN.write_text(json.dumps(sizes, indent=1) + "\n")
