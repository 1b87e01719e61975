"""MiniMax-M1 generates with less than half of DeepSeek-R1's FLOPs at 64K tokens, and about a quarter at 100K."""

import pathlib

import pytest

from lightning_jax.config_reader import load_config
from lightning_jax.plan import main
from lightning_jax.planning.generation_flops import DEEPSEEK_R1, GenerationCost

CONFIG = pathlib.Path(__file__).parents[2] / "configs/minimax_m1.py:456b"
M1 = GenerationCost.of("MiniMax-M1", load_config(str(CONFIG)).model)


@pytest.mark.parametrize(("tokens", "ratio"), [(65_536, 0.346), (100_000, 0.261), (131_072, 0.218)])
def test_ratio_to_deepseek_r1(tokens, ratio):
    assert M1.flops(tokens) / DEEPSEEK_R1.flops(tokens) == pytest.approx(ratio, abs=0.003)


def test_both_are_the_parabolas_of_their_sizes():
    assert M1.per_pair == 4 * 10 * 64 * 128
    assert M1.per_token == pytest.approx(2 * 47.17e9, rel=5e-3)
    assert DEEPSEEK_R1.per_pair / 2 == pytest.approx(3.4982e6, rel=1e-4)


def test_command_prints_and_plots_them(tmp_path, capsys):
    plot = tmp_path / "flops.png"
    assert main([f"--config={CONFIG}", "--generation", f"--out={plot}"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-3:]] == ["0.346", "0.261", "0.217"]
    assert plot.read_bytes().startswith(b"\x89PNG")
