"""Slices that are not here, as their compiler describes them."""

import importlib.util

import pytest

from lightning_jax.parallel import MeshConfig, make_mesh
from lightning_jax.planning.compiled import described_devices
from lightning_jax.planning.hardware import parse_slice


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler: pip install libtpu")
def test_a_mesh_whose_axes_are_no_axes_of_the_torus_is_laid_out_on_it():
    devices = described_devices(parse_slice("v5p:8x8x8"))
    mesh = make_mesh(MeshConfig.of(fsdp=2, expert=32, tensor=8), devices)
    assert mesh.devices.shape == (1, 2, 32, 1, 8)
    neighbours = [device.coords for device in mesh.devices[0, 0, 0, 0]]
    assert len({axis for axis in range(3) if len({place[axis] for place in neighbours}) > 1}) == 1
