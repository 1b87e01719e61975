"""The TPU kernels compile for every generation, within VMEM, on a machine without a TPU."""

import functools
import importlib.util
import itertools

import jax
import jax.export
import jax.numpy as jnp
import pytest

from pallas_kernels import lightning_attention, lightning_attention_step
from pallas_kernels.tpu.attention import lightning_attention_in_blocks
from pallas_kernels.tpu.block_sizes import HEAD_DIMS, choose_block_sizes
from pallas_kernels.tpu.deviceless import TOPOLOGIES, compile_for, vmem_of_kernels

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs: pip install -e .[tpu-compile]"
)
# The cache of compiled programs cannot be read without a device to load them on.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


def arrays(length, heads, dim, dtype, documents):
    """Shapes of q, k, v, log decays, segment ids and initial state of two rows."""
    x = jax.ShapeDtypeStruct((2, length, heads, dim), dtype)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32) if documents else None
    state = jax.ShapeDtypeStruct((2, heads, dim, dim), jnp.float32)
    return x, x, x, jax.ShapeDtypeStruct((heads,), jnp.float32), ids, state


@functools.cache
def compile_gradients(generation, length, heads, dim, dtype="bfloat16", documents=True):
    """Of all inputs from both outputs: the forward that saves its states, and the backward."""
    sizes = choose_block_sizes(generation, length, heads, dim, dim, dtype)

    def gradients(q, k, v, log_decay, ids, state):
        def attention(q, k, v, state):
            return lightning_attention_in_blocks(q, k, v, log_decay, ids, state, sizes)

        outputs, pull_back = jax.vjp(attention, q, k, v, state)
        return pull_back(outputs)

    return compile_for(generation, jax.jit(gradients), *arrays(length, heads, dim, dtype, documents))


def few_of(cases, *, fast):
    """All cases, those marked slow that are not among the fast ones."""
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in cases]


EVERYWHERE = list(itertools.product(TOPOLOGIES, HEAD_DIMS))
USUAL = [("v5e", 64), ("v5e", 128), ("v6e", 128)]


@needs_libtpu
@pytest.mark.parametrize(("generation", "dim"), few_of(EVERYWHERE, fast=USUAL))
def test_bf16_with_documents_and_a_tail_compiles(generation, dim):
    compiled = compile_gradients(generation, 1000, 16, dim)
    assert compiled.as_text().count("tpu_custom_call") >= 2


@needs_libtpu
@pytest.mark.parametrize(("generation", "dim"), few_of(EVERYWHERE, fast=()))
def test_fp32_with_documents_and_a_tail_compiles(generation, dim):
    compile_gradients(generation, 1000, 16, dim, "float32")


@needs_libtpu
@pytest.mark.parametrize(("generation", "dim"), few_of([("v5e", 64), ("v5e", 128), ("v6e", 128)], fast=()))
def test_bf16_of_whole_rows_compiles(generation, dim):
    compile_gradients(generation, 1024, 16, dim, documents=False)


@needs_libtpu
def test_what_each_kernel_takes_of_vmem_is_read():
    """At least its blocks, twice, since the next ones are fetched meanwhile, and its scratch; v5e has 16 MiB."""
    sizes = choose_block_sizes("v5e", 1000, 16, 128, 128, "bfloat16")
    taken = vmem_of_kernels(compile_gradients("v5e", 1000, 16, 128))
    for tensors, heads, vmem in zip((4, 7), sizes[1:], taken, strict=True):
        block, scratch = 2 * sizes.chunk * heads * 128, 4 * heads * (128**2 + sizes.chunk**2)
        assert 2 * tensors * block + scratch <= vmem <= 16 * 2**20


@needs_libtpu
@pytest.mark.parametrize("length", [1, 5, pytest.param(100, marks=pytest.mark.slow), 200])
def test_every_length_compiles(length):
    compile_gradients("v5e", length, 4, 128)


@needs_libtpu
@pytest.mark.parametrize(
    ("heads", "dim"),
    few_of([(1, 64), (7, 64), (1, 96), (6, 96), (13, 128), (3, 256)], fast=[(6, 96)]),
)
def test_every_number_of_heads_compiles(heads, dim):
    compile_gradients("v5e", 300, heads, dim)


@needs_libtpu
def test_neither_direction_transposes_or_pads_in_memory():
    """Around the kernels nothing is as large as a tensor of the inputs but the outputs."""
    text = compile_gradients("v5e", 1000, 16, 128).as_text()
    entry = text[text.index("ENTRY") :]
    for operation in (" transpose(", " pad(", " copy("):
        for line in entry.splitlines():
            assert not (operation in line and "bf16[2,1000" in line), line


@needs_libtpu
@pytest.mark.parametrize("decays", [pytest.param((4,), marks=pytest.mark.slow), (3, 4)])
def test_vmap_compiles(decays):
    """Over batches, and over decays as well."""
    x = jax.ShapeDtypeStruct((3, 2, 300, 4, 128), jnp.bfloat16)
    ids, log_decay = jax.ShapeDtypeStruct((3, 2, 300), jnp.int32), jax.ShapeDtypeStruct(decays, jnp.float32)

    def loss(q, k, v, log_decay, ids):
        return lightning_attention(q, k, v, log_decay, segment_ids=ids, implementation="pallas_tpu").sum()

    in_axes = (0, 0, 0, None if len(decays) == 1 else 0, 0)
    gradients = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes))
    compile_for("v5e", gradients, x, x, x, log_decay, ids)


@needs_libtpu
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_a_decode_step_reads_and_writes_the_state_once_and_in_place(generation):
    rows, heads, dim = 32, 16, 128
    x = jax.ShapeDtypeStruct((rows, heads, dim), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((rows, heads, dim, dim), jnp.float32)
    step = jax.jit(lightning_attention_step, donate_argnames="state")
    compiled = compile_for(generation, step, x, x, x, jax.ShapeDtypeStruct((heads,), jnp.float32), state)
    state_bytes = 4 * rows * heads * dim * dim
    assert compiled.cost_analysis()["bytes accessed"] < 2.1 * state_bytes
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * state_bytes


def test_the_forward_is_exported_for_tpus():
    """The program holds the kernel; it is written on a machine that could not run it."""
    q, k, v, log_decay, ids, _ = arrays(300, 4, 128, "bfloat16", documents=True)

    def forward(q, k, v, log_decay, ids):
        return lightning_attention(q, k, v, log_decay, segment_ids=ids, implementation="pallas_tpu")

    exported = jax.export.export(jax.jit(forward), platforms=["tpu"])(q, k, v, log_decay, ids)
    assert "tpu_custom_call" in exported.mlir_module()
    assert exported.out_avals[0].shape == q.shape
