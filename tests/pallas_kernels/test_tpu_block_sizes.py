"""The table of block sizes is whole, and what is taken from it suits the TPU's registers."""

import itertools
from typing import get_args

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.tpu.block_size_table import BLOCK_SIZES
from pallas_kernels.tpu.block_sizes import HEAD_DIMS, Generation, choose_block_sizes, generation


def test_every_generation_head_dim_and_dtype_has_its_sizes():
    expected = itertools.product(get_args(Generation), HEAD_DIMS, ("bfloat16", "float32"))
    assert set(BLOCK_SIZES) == set(expected)


@pytest.mark.parametrize("num_heads", [1, 2, 5, 7, 8, 12, 40, 64])
def test_blocks_are_whole_registers_or_all_heads(num_heads):
    for chip, dim, dtype in BLOCK_SIZES:
        sizes = choose_block_sizes(chip, 8192, num_heads, dim, dim, dtype)
        assert sizes.chunk % 128 == 0
        for heads in sizes[1:]:
            assert heads == num_heads or (heads < num_heads and heads * dim % 128 == 0)


@pytest.mark.parametrize("num_heads", [12, 40, 64])
def test_few_heads_are_computed_in_vain(num_heads):
    for chip, dim, dtype in BLOCK_SIZES:
        for heads in choose_block_sizes(chip, 8192, num_heads, dim, dim, dtype)[1:]:
            assert -num_heads % heads <= num_heads / 8 or heads * dim % 128 or dim == 96


@pytest.mark.parametrize("chip", ["v4", "v5p"])
def test_both_cores_of_a_device_have_heads_of_a_single_row(chip):
    for num_heads in (2, 8, 13):
        sizes = choose_block_sizes(chip, 8192, num_heads, 128, 128, "bfloat16")
        assert max(sizes.forward_heads, sizes.backward_heads) < num_heads


def test_a_short_sequence_is_one_chunk():
    assert choose_block_sizes("v5e", 77, 8, 128, 128, "bfloat16").chunk == 77


def test_a_chunk_that_is_asked_for_is_taken():
    assert choose_block_sizes("v5e", 1000, 8, 128, 128, "bfloat16", 384).chunk == 384


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("TPU v3", None),
        ("NVIDIA H200", None),
    ],
)
def test_the_generation_is_read_from_the_device(kind, expected):
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(kind, 1, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert generation() == expected


def test_a_cpu_is_no_generation_of_tpus():
    assert generation() is None
