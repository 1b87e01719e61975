"""The device mesh: six named axes over which a run is laid out."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lightning_jax.errors import UserError
from lightning_jax.parallel.config import AXES, MeshConfig


class MeshError(UserError):
    """A mesh that does not fit the devices."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with the axes of `parallel.config.AXES` over `devices` (all devices where None).

    Neighbouring devices share the last axes, which communicate most.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve(config, len(devices))
    # Auto: the compiler places what the sharding rules leave open.
    return Mesh(arrange(sizes, devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def arrange(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array with an axis for each of `sizes`.

    The first axes lie across slices that only a data center's network joins, as many of them as there are slices: with
    data=2 and fsdp over the rest, two slices hold a copy of the parameters each, split inside (TinyLlama v1.1's way).

    Raises:
        MeshError: the slices do not divide the axes, or the devices are no box of a slice.
    """
    slices = left = len({getattr(device, "slice_index", 0) for device in devices})
    across = []
    for size in sizes.values():
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        raise MeshError(f"mesh: {slices} slices do not divide the axes; use data={slices}, a copy in each")
    chips = {tuple(device.coords) for device in devices if device.platform == "tpu"}
    if chips and math.prod(len(set(axis)) for axis in zip(*chips, strict=True)) != len(chips):
        raise MeshError(
            f"mesh: {len(chips)} chips of a larger slice are no box of it; use a half of them, where rollouts.devices "
            "take the others"
        )
    # A torus of 8 x 8 x 8 chips has no axis of 32: that takes one of its axes and half of another.
    inside = [size // parts for size, parts in zip(sizes.values(), across, strict=True)]
    if slices == 1:
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def without_sequence(mesh: Mesh) -> Mesh:
    """The same devices with those along "sequence" joined to "fsdp": for generation, which goes on token by token.

    Parameters, which both split, stay where they are.
    """
    axis = mesh.axis_names.index("sequence")
    devices = np.moveaxis(mesh.devices, axis, 2)
    data, fsdp, sequence, *others = devices.shape
    devices = np.expand_dims(devices.reshape(data, fsdp * sequence, *others), axis)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def resolve(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of each axis, with -1 replaced by the number of devices left over.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    if problems := config.problems():
        raise MeshError("; ".join(f"mesh.{problem}" for problem in problems))
    sizes = config.sizes()
    given = math.prod(size for size in sizes.values() if size != -1)
    open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
    if open_axis and num_devices % given == 0:
        return sizes | {open_axis: num_devices // given}
    if num_devices == given:
        return sizes
    described = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1 on every axis"
    needed = f"a multiple of {given} devices" if open_axis else f"{given} device{'s' if given > 1 else ''}"
    advice = _advice(sizes, open_axis, num_devices)
    raise MeshError(f"mesh: {described} needs {needed}, {num_devices} were found; use {advice}")


def _advice(sizes: dict[str, int], open_axis: str | None, num_devices: int) -> str:
    """One axis to change so that every device is used, or, where none will do, all of them."""
    for axis in ("fsdp", "data", *AXES[2:]):
        others = math.prod(size for other, size in sizes.items() if other != axis and size != -1)
        if axis != open_axis and num_devices % others == 0:
            return f"{axis}=1" if open_axis else f"{axis}=-1"
    return "fsdp=-1 and 1 for the others"
