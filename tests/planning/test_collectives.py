"""Collectives of programs whose traffic is known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lightning_jax.parallel import MeshConfig, make_mesh
from lightning_jax.planning.collectives import sent_by_axes

MESH = {"data": 2, "fsdp": 1, "expert": 1, "sequence": 2, "tensor": 2}


def sent(function, turns=1):
    """Of a function of this device's x, fp32 [16, 8], run in a loop."""
    mesh = make_mesh(MeshConfig.of(data=2, sequence=2, tensor=2))

    def on_device(x):
        return lax.scan(lambda carry, _: (carry + jnp.sum(function(x * carry)), None), jnp.float32(1), length=turns)[0][
            None
        ]

    program = jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("data"), check_vma=False)
    )
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    return sent_by_axes(program.lower(x).compile().as_text(), MESH)


SIZE = 16 * 8 * 4


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: lax.psum(x, "tensor") ** 2, {("tensor",): SIZE}),
        (lambda x: lax.psum(x, ("data", "sequence")) ** 2, {("data", "sequence"): 2 * SIZE * 3 / 4}),
        (lambda x: lax.all_gather(x, "data") ** 2, {("data",): SIZE}),
        (lambda x: lax.all_gather(x, ("data", "tensor")) ** 2, {("data", "tensor"): 3 * SIZE}),
        (lambda x: lax.psum_scatter(x, "sequence", tiled=True) ** 2, {("sequence",): SIZE / 2}),
        (lambda x: lax.all_to_all(x, "sequence", 0, 1, tiled=True) ** 3, {("sequence",): SIZE / 2}),
        (lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]) ** 2, {("tensor",): SIZE}),
    ],
)
def test_each_kind_of_collective_goes_along_its_axes(function, expected):
    assert sent(function) == expected


def test_a_loop_counts_as_often_as_it_turns():
    assert sent(lambda x: lax.psum(x, "tensor") ** 2, turns=7) == {("tensor",): 7 * SIZE}


def test_results_of_started_operations_and_groups_in_any_notation():
    program = """
ENTRY %main (x: f32[4]) -> f32[8] {
  %a = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %b = f32[4]{0} all-reduce-start(%x), replica_groups=[4,2]<=[2,2,2]T(0,2,1), to_apply=%add
  %d = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, to_apply=%add
  %e = f32[8]{0} all-reduce(%x), replica_groups=mesh['data'=2,'fsdp'=1,'sequence'=2,'tensor'=2] {'tensor'}
  %c = (f32[4]{0}, f32[2]{0}) all-reduce(%x, %y), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""
    assert sent_by_axes(program, MESH) == {
        ("tensor",): 8 + 32,
        ("sequence",): 16,
        ("data",): 24,
        ("data", "sequence"): 48,
    }
