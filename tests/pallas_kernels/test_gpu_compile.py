"""The GPU kernels are lowered in every transformation, and compile for an H200, on a machine without a GPU."""

import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import lightning_attention, sequence_parallel_lightning_attention
from pallas_kernels.gpu.plans import HEAD_DIMS, OLDEST_JAX, choose_plans

if jax.__version_info__[:2] < OLDEST_JAX:
    pytest.skip("the GPU kernels need jax 0.11 or newer", allow_module_level=True)

from pallas_kernels.gpu.attention import lightning_attention_by_plans
from pallas_kernels.gpu.deviceless import missing, resources

needs_compiler = pytest.mark.skipif(
    missing() is not None, reason="needs the compiler for GPUs: pip install -e .[gpu-compile]"
)

# The cache of compiled programs cannot be read without a device to load them on.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

# Bytes per thread that the compiler keeps in memory for want of registers, at most, by head dim, end of the kernel's
# name and whether there are documents; none where nothing is said. The README has the table.
SPILLS = {(96, "dk_dv", True): 24, (128, "dk_dv", True): 52, (128, "sweep", True): 8, (256, "sweep", True): 8}


def arrays(batch, length, heads, dim, documents):
    """Shapes of q, k, v, log decays, segment ids and initial state."""
    x = jax.ShapeDtypeStruct((batch, length, heads, dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32) if documents else None
    return (
        x,
        x,
        x,
        jax.ShapeDtypeStruct((heads,), jnp.float32),
        ids,
        jax.ShapeDtypeStruct((batch, heads, dim, dim), jnp.float32),
    )


def gradients_by(plans):
    """Of all inputs from both outputs."""

    def gradients(q, k, v, log_decay, ids, state):
        def attention(q, k, v, state):
            return lightning_attention_by_plans(q, k, v, log_decay, ids, state, plans)

        outputs, pull_back = jax.vjp(attention, q, k, v, state)
        return pull_back(outputs)

    return gradients


# Without documents a kernel is part of the one with them; few heads add the kernels that sum up pieces.
CASES = [*itertools.product(HEAD_DIMS, (4, 160), (True,)), *itertools.product(HEAD_DIMS, (160,), (False,))]


@needs_compiler
@pytest.mark.parametrize(
    ("dim", "heads", "documents"),
    [pytest.param(*case, marks=() if case == (128, 4, True) else pytest.mark.slow) for case in CASES],
)
def test_every_plan_compiles_without_spills_but_those_stated(dim, heads, documents):
    """Few heads: pieces of the sequence, and columns shared out; many heads: neither."""
    length = 1096
    plans = choose_plans(1, length, heads, dim)
    assert all((plan.pieces > 1) == (heads == 4) for plan in plans if plan)
    kernels = resources(gradients_by(plans), *arrays(1, length, heads, dim, documents))
    names = {"sweep", "dk_dv" if plans.reverse else "reverse_sweep"}
    names |= {"states", "reverse_states"} if heads == 4 else set()
    assert {kernel.name for kernel in kernels} == {f"lightning_attention_{name}" for name in names}
    for kernel in kernels:
        spills = max(SPILLS.get((dim, end, documents), 0) for end in names if kernel.name.endswith(end))
        assert max(kernel.spill_stores, kernel.spill_loads) <= spills, kernel
        assert kernel.registers <= 255, kernel  # what each of 256 threads can have
        assert kernel.shared_memory <= 232448 - 1024, kernel


@needs_compiler
@pytest.mark.parametrize("length", [1, 8, 63, 1001])
def test_every_length_compiles(length):
    def forward(q, k, v, log_decay, ids, state):
        return lightning_attention(q, k, v, log_decay, segment_ids=ids, implementation="pallas_gpu")

    kernels = resources(forward, *arrays(2, length, 8, 64, documents=True))
    assert "lightning_attention_sweep" in {kernel.name for kernel in kernels}


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def forward(q, k, v, log_decay, ids):
    return lightning_attention(q, k, v, log_decay, segment_ids=ids, implementation="pallas_gpu")


def loss(*arguments):
    return forward(*arguments).astype(jnp.float32).sum()


def test_the_forward_is_exported_for_gpus():
    """The program holds the kernel; it is written on a machine that could not run it."""
    q, k, v, log_decay, ids, _ = arrays(2, 300, 4, 128, documents=True)
    exported = jax.export.export(jax.jit(forward), platforms=["cuda"])(q, k, v, log_decay, ids)
    assert "mosaic_gpu" in exported.mlir_module()
    assert exported.out_avals[0].shape == q.shape


def test_shard_map_checks_what_varies_over_the_mesh():
    q, k, v, log_decay, ids, _ = arrays(2, 300, 8, 64, documents=True)
    by_head = PartitionSpec("data", None, "tensor")
    sharded = jax.shard_map(
        forward,
        mesh=Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor")),
        in_specs=(by_head, by_head, by_head, PartitionSpec("tensor"), PartitionSpec("data")),
        out_specs=by_head,
    )
    gradients = jax.grad(lambda *x: sharded(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert "mosaic_gpu" in lower(gradients, q, k, v, log_decay, ids)


def test_a_sequence_over_devices_is_lowered():
    q, k, v, log_decay, ids, _ = arrays(2, 8 * 100, 4, 64, documents=True)
    pieces = PartitionSpec(None, "sequence")
    sharded = jax.shard_map(
        lambda q, k, v, log_decay, ids: sequence_parallel_lightning_attention(
            q, k, v, log_decay, axis_name="sequence", segment_ids=ids, implementation="pallas_gpu"
        ),
        mesh=Mesh(np.array(jax.devices()), ("sequence",)),
        in_specs=(pieces, pieces, pieces, PartitionSpec(), pieces),
        out_specs=pieces,
    )
    gradients = jax.grad(lambda *x: sharded(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert "mosaic_gpu" in lower(gradients, q, k, v, log_decay, ids)


@pytest.mark.parametrize("decays", [(4,), (3, 4)])
def test_vmap_of_gradients_is_lowered(decays):
    """Over batches, and over decays as well."""
    x = jax.ShapeDtypeStruct((3, 2, 300, 4, 64), jnp.bfloat16)
    ids, log_decay = jax.ShapeDtypeStruct((3, 2, 300), jnp.int32), jax.ShapeDtypeStruct(decays, jnp.float32)
    in_axes = (0, 0, 0, None if len(decays) == 1 else 0, 0)
    assert "mosaic_gpu" in lower(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes), x, x, x, log_decay, ids)


def test_layers_scanned_under_remat_are_lowered():
    x, _, _, log_decay, ids, _ = arrays(2, 300, 4, 64, documents=True)

    def layers(x, log_decay, ids):
        def layer(x, _):
            return jnp.tanh(forward(x, x, x, log_decay, ids)), None

        return jax.lax.scan(jax.checkpoint(layer), x, None, length=3)[0].astype(jnp.float32).sum()

    assert "mosaic_gpu" in lower(jax.grad(layers), x, log_decay, ids)


def test_whole_tiles_of_tokens_are_neither_padded_nor_transposed_in_memory():
    """Around the kernels nothing is as large as a tensor of the inputs but the outputs."""
    q, k, v, log_decay, ids, _ = arrays(2, 304, 4, 128, documents=True)
    text = lower(jax.grad(loss, argnums=(0, 1, 2)), q, k, v, log_decay, ids)
    for operation in ("stablehlo.transpose", "stablehlo.pad", "stablehlo.slice"):
        for line in text.splitlines():
            assert not (operation in line and "2x304x4x128xbf16" in line), line
