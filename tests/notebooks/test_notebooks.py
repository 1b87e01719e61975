"""The notebooks run from top to bottom, in small, in a process of their own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALLER = {
    "lightning_attention": {"LENGTHS = (256, 512, 1024, 2048)": "LENGTHS = (16, 32)"},
    "first_model": {"STEPS = 200": "STEPS = 2", "max_new_tokens=80": "max_new_tokens=8"},
}


def program(name: str) -> str:
    """The notebook's code, but for the cell that installs the package."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = "\n".join(cell for cell in code if "%pip" not in cell)
    for large, small in SMALLER[name].items():
        assert large in text
        text = text.replace(large, small)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLER)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = os.environ | {"MPLBACKEND": "Agg", "XLA_FLAGS": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", program(name)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_every_notebook_is_run_here():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(SMALLER)
