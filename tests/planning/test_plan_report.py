"""The plan command on devices: its lines, its plot, and one line for a mistake."""

import pathlib

import pytest

from lightning_jax.plan import main

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
M1 = f"--config={CONFIGS}/minimax_m1.py:456b"


def lines(capsys, *arguments):
    assert main([M1, "--stage=context_32k", *arguments]) == 0
    text = capsys.readouterr().out
    return dict(line.split("  ", 1) for line in text.splitlines() if "  " in line.strip()), text


def test_456b_fits_512_chips_of_v5p_and_the_plan_says_what_binds_how_long_and_how_much(capsys, tmp_path):
    plot = tmp_path / "plan.png"
    rows, text = lines(capsys, "--devices=v5p:8x8x8", "--mfu=0.5", "--dollars_per_chip_hour=2", f"--out={plot}")
    assert ": fits, " in rows["memory of a device"]
    assert "compute binds" in rows["bound"]
    assert rows["cost"].strip().endswith("dollars at 2 a chip and hour")
    assert "change:" not in text
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_told_with_what_to_change(capsys):
    _, text = lines(capsys, "--devices=v5e:16x16", "--config.mesh.expert=32", "--config.mesh.fsdp=1")
    assert "does not fit" in text
    assert "change: weights, moments and gradients alone would fill" in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--devices=v5q:8"], "--devices=v5q:8: no chip 'v5q'; did you mean 'v5p'?"),
        (["--devices=v5p"], "--devices=v5p: not of the form v5p:8x8x8 or v5p:512"),
        (["--devices=v5p:8", "--mfu=40"], "--mfu=40.0: not a share between 0 and 1"),
        (
            ["--devices=v5p:8x8x8", "--stage=context_23k"],
            "--stage=context_23k: no such stage; did you mean 'context_32k'?",
        ),
        (["--devices=v5p:4x4"], "config.mesh: data=1 x fsdp=-1 x expert=32 x sequence=1 x tensor=8 needs"),
        (["--devices=a100:512", "--compile"], "--compile: the compiler has no description of a100"),
    ],
)
def test_a_mistake_is_one_line(arguments, error, capsys):
    assert main([M1, *arguments]) == 2
    captured = capsys.readouterr()
    assert error in captured.err
    assert "Traceback" not in captured.err
