"""Slices that are not here, as their compiler describes them."""

import importlib.util
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from planned_runs import planned

from lightning_jax.errors import UserError
from lightning_jax.models.layer_stack import LAYER_INPUT, rematerialised
from lightning_jax.parallel import MeshConfig, make_mesh, rows_of_host
from lightning_jax.parallel.config import AXES
from lightning_jax.planning.compiled import compile_step, described_devices
from lightning_jax.planning.estimate import estimate
from lightning_jax.planning.hardware import parse_slice

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs: pip install -e .[tpu-compile]"
)
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs the compiler for GPUs: pip install -e .[gpu-compile]",
)


@needs_libtpu
def test_a_mesh_whose_axes_are_no_axes_of_the_torus_is_laid_out_on_it():
    devices = described_devices(parse_slice("v5p:8x8x8"))
    mesh = make_mesh(MeshConfig.of(fsdp=2, expert=32, tensor=8), devices)
    assert mesh.devices.shape == (1, 2, 32, 1, 1, 8)
    neighbours = [device.coords for device in mesh.devices[0, 0, 0, 0, 0]]
    assert len({axis for axis in range(3) if len({place[axis] for place in neighbours}) > 1}) == 1


@needs_libtpu
@pytest.mark.parametrize("name", ["v5p:4x4x4", "v6e:4x8", "tpu7x:2x2x2"])
def test_every_mesh_is_laid_out_on_a_slice_and_each_host_reads_rows_of_its_own_or_those_of_others(name):
    devices = described_devices(parse_slice(name))
    hosts = {device.process_index for device in devices}
    sizes = [size for size in range(1, len(devices) + 1) if len(devices) % size == 0]
    for each in itertools.product(sizes, repeat=len(AXES) - 1):
        if len(devices) % math.prod(each) == 0:
            mesh = make_mesh(MeshConfig.of(**dict(zip(AXES, (-1, *each), strict=True))), devices)
            parts = [rows_of_host(mesh, host) for host in hosts]
            assert {part.index for part in parts} == set(range(parts[0].count))


@needs_libtpu
def test_the_first_axis_lies_across_slices():
    devices = described_devices(parse_slice("2xv5p:2x2x2"))
    mesh = make_mesh(MeshConfig.of(data=2, fsdp=8), devices)
    slices = [{device.slice_index for device in copy.flat} for copy in mesh.devices]
    assert slices == [{0}, {1}]


@needs_libtpu
def test_a_shape_that_no_slice_has_is_told_in_a_line():
    with pytest.raises(UserError, match=r"--compile: libtpu has no v5p:512, .*; give one of the shapes in docs"):
        described_devices(parse_slice("v5p:512"))


@pytest.mark.slow
@needs_libtpu
def test_the_step_of_a_small_model_on_a_slice_takes_what_is_estimated():
    slice_ = parse_slice("v5p:2x2x2")
    sizes = (
        "hidden_size=512 num_heads=4 num_kv_heads=4 head_dim=128 rotary_dim=128 intermediate_size=1408 num_layers=16"
    )
    dtypes = "compute_dtype=bfloat16 logits_dtype=bfloat16"
    batch = [f"stages.pretraining.batch_size.{each}" for each in ("tokens=4096", "micro_batch_tokens=256")]
    model = [f"model.{each}" for each in f"{sizes} {dtypes}".split()]
    config, stage = planned("dense", *model, *batch, "mesh.moments=host")
    compiled = compile_step(config, stage, described_devices(slice_))
    memory = estimate(config, stage, slice_).memory
    assert compiled.arguments == pytest.approx(memory.arguments, rel=0.01)  # in tiles of the hardware's
    assert compiled.on_host == pytest.approx(memory.on_host, rel=0.01)
    assert compiled.total == pytest.approx(memory.total, rel=0.15)
    if jax.__version_info__ >= (0, 11):  # older ones do not show a described device's program
        assert compiled.sent["fsdp",] > 0


@pytest.mark.slow
@needs_libtpu
def test_offloaded_layer_inputs_wait_in_the_hosts_memory():
    mesh = make_mesh(MeshConfig.of(fsdp=4), described_devices(parse_slice("v5p:2x2x1")))
    layers, tokens, width = 16, 65536, 512

    def layer(x, weight):
        x = jax.ad_checkpoint.checkpoint_name(x, LAYER_INPUT)
        return jnp.tanh(x @ weight) @ weight.T, None

    def memory(remat):
        def loss(weights, x):
            return jnp.sum(jax.lax.scan(rematerialised(layer, remat), x, weights)[0] ** 2)

        weights = jax.ShapeDtypeStruct(
            (layers, width, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
        )
        x = jax.ShapeDtypeStruct((4 * tokens, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
        return jax.jit(jax.grad(loss)).lower(weights, x).compile().memory_analysis()

    kept, offloaded = memory("full"), memory("offload")
    inputs = 4 * layers * tokens * width
    assert kept.host_temp_size_in_bytes == 0
    assert offloaded.host_temp_size_in_bytes == inputs
    assert kept.temp_size_in_bytes - offloaded.temp_size_in_bytes > inputs / 3


@pytest.mark.slow
@needs_plugin
def test_gpus_in_nodes_are_compiled_for():
    target = parse_slice("h100:2x8")
    devices = described_devices(target)
    assert len(devices) == 16
    assert {device.process_index for device in devices} == {0, 1}
    mesh = make_mesh(MeshConfig.of(data=2, fsdp=8), devices)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    assert "all-reduce" in jax.jit(jnp.sum).lower(x).compile().as_text()
