"""Stated meshes fit the chips they are stated for, and "auto" takes the one with the least communication."""

import dataclasses
import itertools
import pathlib

import pytest

from lightning_jax.config_reader import load_config
from lightning_jax.errors import UserError
from lightning_jax.mesh_problems import problems_on
from lightning_jax.parallel import MeshConfig
from lightning_jax.plan import main
from lightning_jax.planning.estimate import estimate
from lightning_jax.planning.hardware import parse_slice
from lightning_jax.planning.meshes import PRESETS, best_mesh, with_mesh
from lightning_jax.stages import plan_stages

ROOT = pathlib.Path(__file__).parents[2]
BF16 = ("model.param_dtype=bfloat16", "stages.{stage}.optimizer.moment_dtype=bfloat16")
SLICES = {
    "v5p": "v5p:8x8x8",
    "tpu7x": "tpu7x:4x8x8",
    "v6e": "v6e:16x16",
    "h800": "h800:1024",
    "a100_40g": "a100_40g:16",
}


FILES = {
    "tinyllama_1.1b_v1.0": "tinyllama.py:1.1b,v1.0",
    "tinyllama_1.1b_v1.1": "tinyllama.py:1.1b,v1.1",
    "minimax_m1_456b": "minimax_m1.py:456b",
    "minimax_text_01_456b": "minimax_text_01.py:456b",
}


def first_stage(name, *overrides):
    """The config of this name with its first stage alone."""
    file = f"{ROOT}/configs/{FILES[name]}"
    stage = load_config(file).run_stages[0]
    config = load_config(file, [f"run_stages={stage}", *(each.format(stage=stage) for each in overrides)])
    return config, plan_stages(config)


@pytest.mark.parametrize(("name", "chip"), [(name, chip) for name in FILES for chip in PRESETS[name]])
def test_a_stated_mesh_fits_and_divides_everything(name, chip):
    config, stages = first_stage(name, *(BF16 if chip == "v6e" else ()))
    assert config.name == name
    target = parse_slice(SLICES[chip])
    config, why = with_mesh(config, "preset", stages, target)
    assert why.endswith(f"the one stated for {name} on {chip}")
    assert not problems_on(config, target.num_devices)
    assert estimate(config, stages[0], target).fits


def test_tinyllama_is_sharded_within_a_node_and_replicated_across():
    config, stages = first_stage("tinyllama_1.1b_v1.1")
    config, _ = with_mesh(config, "preset", stages, parse_slice("a100_40g:16"))
    assert config.resolved_mesh(16) == MeshConfig.of(data=4, fsdp=4).sizes()


def test_auto_is_the_least_time_on_links_of_all_that_fit():
    config, stages = first_stage("minimax_m1_456b")
    target = parse_slice("v5p:8x8x8")
    chosen, why = with_mesh(config, "auto", stages, target)
    best = estimate(chosen, stages[0], target)
    assert best.fits
    assert f"{best.communication_seconds:.3g} s a step" in why
    for fsdp, tensor in itertools.product((2, 4), (1, 4)):
        other, _ = first_stage("minimax_m1_456b", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}", "mesh.data=-1")
        plan = estimate(other, stages[0], target)
        assert plan.communication_seconds >= best.communication_seconds or plan.memory.total * 1.15 > 0.92 * 95 * 2**30


def test_auto_splits_a_row_of_a_million_tokens():
    config = load_config(f"{ROOT}/configs/minimax_m1.py:456b", ["run_stages=context_1024k"])
    mesh, _ = best_mesh(config, plan_stages(config), parse_slice("v5p:8x8x8"))
    assert mesh.sequence > 1


def test_few_large_experts_are_split_inside():
    few = ("model.num_experts=8", "model.experts_per_token=2", "model.intermediate_size=36864")
    config, stages = first_stage("minimax_m1_456b", *few)
    target = parse_slice("h800:1024")
    mesh, _ = best_mesh(config, stages, target)
    assert (mesh.expert, mesh.expert_tensor) == (8, 2)
    sizes = mesh.sizes() | {"expert_tensor": 1, "fsdp": 2 * mesh.fsdp}
    gathered = dataclasses.replace(config, mesh=MeshConfig.of(**sizes))
    split = dataclasses.replace(config, mesh=mesh)
    seconds = [estimate(each, stages[0], target).communication_seconds for each in (split, gathered)]
    assert seconds[0] < 0.8 * seconds[1]


def test_a_small_model_is_replicated():
    config, stages = first_stage("tinyllama_1.1b_v1.0")
    mesh, _ = best_mesh(config, stages, parse_slice("h100:8"))
    assert mesh.sizes() == MeshConfig.of(data=8).sizes()


def test_where_nothing_fits_the_line_says_what_needs_least():
    config, stages = first_stage("minimax_m1_456b")
    with pytest.raises(UserError, match=r"nothing fits v5e:16x16: .* needs least, .* of 16.0 GiB$"):
        best_mesh(config, stages, parse_slice("v5e:16x16"))
    with pytest.raises(
        UserError, match=r"no mesh is stated for minimax_m1_456b on v4, only on: v5p, .*; use --mesh=auto"
    ):
        with_mesh(config, "preset", stages, parse_slice("v4:8x8x8"))


def test_the_plan_begins_with_why(capsys):
    arguments = [f"--config={ROOT}/configs/tinyllama.py:1.1b", "--devices=h100:8", "--mesh=auto"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("mesh data 8: fits with ")
