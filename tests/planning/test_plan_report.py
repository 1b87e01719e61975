"""The plan command on devices: its lines, its plot, and one line for a mistake."""

import importlib.util
import pathlib
import re
import signal
import subprocess
import sys

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
    assert rows["cost"].strip().endswith("dollars at 2 a chip and hour: --dollars_per_chip_hour")
    assert "change:" not in text
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_price_is_an_assumption_that_says_whose_it_is(capsys):
    rows, _ = lines(capsys, "--devices=v5p:8x8x8")
    assert "dollars at 4.2 a chip and hour: Google Cloud's list price on demand, as quoted in 2026" in rows["cost"]
    rows, _ = lines(capsys, "--devices=h100:64x8", "--mesh=auto")
    assert rows["cost"].strip() == "not known: name the price of a chip and hour, --dollars_per_chip_hour=DOLLARS"


def test_stages_add_up_to_the_run(capsys):
    config = f"--config={CONFIGS}/tinyllama.py:1.1b,v1.1_math_code"
    assert main([config, "--devices=v5e:4x4", "--mesh=auto", "--dollars_per_chip_hour=1"]) == 0
    *_, total = capsys.readouterr().out.strip().splitlines()
    assert total.startswith("4 stages at 40% MFU: 2.00T tokens in ")


def test_several_slices_have_a_network_between_them(capsys):
    rows, _ = lines(capsys, "--devices=2xv5p:8x8x8", "--mesh=auto")
    assert any(name.startswith("sent over") and text.endswith(" over the network") for name, text in rows.items())
    assert float(rows["least time, network"].removesuffix(" s")) > 0


def test_what_does_not_fit_is_told_with_what_to_change(capsys):
    mesh = ("--config.mesh.expert=32", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
    _, text = lines(capsys, "--devices=v5p:4x4x4", *mesh)
    assert "does not fit" in text
    assert "change: weights, moments and gradients alone would fill" in text
    assert re.search(r"change: config.mesh.moments=host keeps \S+ GiB of moments on the host", text)
    assert re.search(r"change: --devices=v5p:\d+ holds it, as mesh \w+", text)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--devices=v5q:8"], "--devices=v5q:8: no chip 'v5q'; did you mean 'v5p'?"),
        (["--devices=v5p"], "--devices=v5p: not of the form v5p:8x8x8 or v5p:512"),
        (["--devices=v5p:8x8x8", "--dollars_per_chip_hour=-1"], "--dollars_per_chip_hour=-1: not a price"),
        (["--devices=v5p:8", "--mfu=40"], "--mfu=40.0: not a share between 0 and 1"),
        (
            ["--devices=v5p:8x8x8", "--stage=context_23k"],
            "--stage=context_23k: no such stage; did you mean 'context_32k'?",
        ),
        (["--devices=v5p:4x4"], "config.mesh: fsdp=-1 x expert=32 x tensor=8 needs"),
        (["--devices=a100:512", "--compile"], "--compile: the compiler has no description of a100"),
    ],
)
def test_a_mistake_is_one_line(arguments, error, capsys):
    assert main([M1, *arguments]) == 2
    captured = capsys.readouterr()
    assert error in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("devices", "error"),
    [
        ("v5p:8x8x8", "--compile: for v5p it needs: pip install libtpu; leave --compile away, or use cpu:N"),
        ("h100:8x8", "--compile: for h100 it needs: pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt; leave"),
    ],
)
def test_a_compiler_that_is_not_installed_is_told_with_what_to_install(devices, error, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([M1, f"--devices={devices}", "--mesh=auto", "--compile"]) == 2
    captured = capsys.readouterr()
    assert error in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_ctrl_c_stops_the_compiler_at_once_and_leaves_the_estimate():
    command = [sys.executable, "-m", "lightning_jax.plan", f"--config={CONFIGS}/minimax_m1.py:laptop"]
    options = ["--devices=cpu:8", "--stage=pretraining", "--compile", "--config.mesh.fsdp=8", "--config.mesh.data=1"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CONFIGS.parent
    )
    assert process.stderr.readline().startswith("compiling pretraining for cpu:8; minutes for large models, Ctrl-C")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "memory of a device" in out
    assert "Traceback" not in err
