"""The plan command: a table of the stages, a plot, and one line for a mistake."""

import pathlib

import pytest

from lightning_jax.config_reader import load_config
from lightning_jax.plan import main, schedule_table
from lightning_jax.stages import plan_stages

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def test_table_has_every_stage_with_its_lengths_and_the_turns_of_its_learning_rate():
    lines = schedule_table(plan_stages(load_config(f"{CONFIGS}/minimax_text_01.py:456b"))).splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert cells[0] == ["stage", "tokens", "steps", "context", "batch", "learning rate"]
    assert cells[1] == ["constant", "7.20T", "102,492", "8,192", "16.8M > 33.6M > 67.1M > 134M", "0 > 2.00e-4"]
    assert cells[3] == ["fast_decay", "1.00T", "7,451", "8,192", "134M", "1.30e-4 > 3.00e-5"]
    assert [row[0] for row in cells[4::2]] == ["context_128k", "context_512k", "context_1024k"]


def test_command_prints_the_table_and_plots(tmp_path, capsys):
    plot = tmp_path / "schedule.png"
    assert main([f"--config={CONFIGS}/smollm2.py:1.7b", "--schedule", f"--out={plot}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("context_8k")
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--out=/no/such/folder/schedule.png"], "--out=/no/such/folder/schedule.png: [Errno 2]"),
        (["--out=schedule.nothing"], "--out=schedule.nothing: Format 'nothing' is not supported"),
        (
            ["--config.stages.pretraining.tokens=100_000"],
            "schedule.decay_steps: 350 after warmup_steps=50 do not fit into 49 steps",
        ),
        (["--config.stages.pretraining.schedule.kind=cosin"], "did you mean 'cosine'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, error, capsys):
    assert main([f"--config={CONFIGS}/minimax_m1.py:laptop", "--schedule", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert error in line
