"""Which mesh a run takes on a slice: the one stated for its recipe and chip, or the best that the estimate knows.

Of all products of axes that divide the model, its batches and the devices, "auto" takes those that fit, with room for
the estimate's error, and of them the one whose collectives take the least time over all steps; on equal terms the one
that splits least. "expert_tensor" it considers where "expert" has given each expert devices of its own.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.mesh_problems import problems_on
from lightning_jax.metrics.formatting import size
from lightning_jax.parallel.config import AXES, MeshConfig
from lightning_jax.parallel.mesh import resolve
from lightning_jax.planning.estimate import RESERVE, Estimate, estimate
from lightning_jax.planning.hardware import Slice
from lightning_jax.planning.report import mesh_text
from lightning_jax.planning.traffic import divides_slices
from lightning_jax.stages import Stage

ERROR = 1.15  # the compiler may need so many times the estimate

CHOICES = ("auto", "preset")
MESH_HELP = "instead of the config's mesh the one with the least communication of those that fit, or the recipe's own"

# By the config's name and the chip; one axis of each takes the devices that are left over.
_SHARDED_IN_A_NODE_OF_4 = {"a100_40g": MeshConfig.of(data=-1, fsdp=4)}  # arXiv 2401.02385, of v1.1
_ROWS_OF_8K = {  # for the stages of 8K; ours, since the paper does not say how many GPUs share what
    "v5p": MeshConfig.of(fsdp=-1, expert=32),
    "tpu7x": MeshConfig.of(fsdp=-1, expert=32),
    "v6e": MeshConfig.of(fsdp=-1, expert=32, tensor=8),  # two slices, or weights and moments in bfloat16
    "h800": MeshConfig.of(data=-1, fsdp=8, expert=32),
}
PRESETS = {
    "tinyllama_1.1b_v1.0": {"a100_40g": MeshConfig.of(fsdp=-1)},  # section 2 of the same: fully sharded
    **{f"tinyllama_1.1b_v1.1{suffix}": _SHARDED_IN_A_NODE_OF_4 for suffix in ("", "_math_code", "_chinese")},
    "minimax_m1_456b": _ROWS_OF_8K,
    "minimax_text_01_456b": _ROWS_OF_8K,
}


def with_mesh(config: RunConfig, choice: str, stages: Sequence[Stage], target: Slice) -> tuple[RunConfig, str]:
    """The config with the mesh that `choice`, "auto" or "preset", stands for, and why it is this one in a line.

    Raises:
        UserError: there is none.
    """
    mesh, why = best_mesh(config, stages, target) if choice == "auto" else preset(config, target)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh.sizes())), why


def preset(config: RunConfig, target: Slice) -> tuple[MeshConfig, str]:
    """The mesh stated for this config on this chip, and a line that says so.

    Raises:
        UserError: there is none.
    """
    chips = PRESETS.get(config.name, {})
    if target.chip.name not in chips:
        there_are = ", ".join(chips) or "none"
        raise UserError(
            f"--mesh=preset: no mesh is stated for {config.name} on {target.chip.name}, only on: {there_are}; "
            f"use --mesh=auto"
        )
    mesh = chips[target.chip.name]
    sizes = resolve(mesh, target.num_devices - config.num_rollout_devices)
    return mesh, f"mesh {mesh_text(sizes)}: the one stated for {config.name} on {target.chip.name}"


def best_mesh(config: RunConfig, stages: Sequence[Stage], target: Slice) -> tuple[MeshConfig, str]:
    """The mesh that suits these stages best on a slice, and why in a line.

    Raises:
        UserError: none fits; the line says how much the nearest needs.
    """
    chosen = dataclasses.replace(config, run_stages=tuple(stage.name for stage in stages))
    plans: list[tuple[MeshConfig, list[Estimate]]] = []
    for sizes in _products(target.num_devices - config.num_rollout_devices, len(AXES)):
        mesh = dataclasses.replace(config.mesh, **dict(zip(AXES, sizes, strict=True)))
        if mesh.expert_tensor > 1 and mesh.expert != config.model.num_experts:
            continue
        candidate = dataclasses.replace(chosen, mesh=mesh)
        if not problems_on(candidate, target.num_devices) and divides_slices(mesh.sizes(), target):
            plans.append((mesh, [estimate(candidate, stage, target) for stage in stages]))
    if not plans:
        raise UserError(
            f"--mesh=auto: no product of axes of {target.num_devices} devices divides the model and its batches"
        )

    def needed(of_stages: list[Estimate]) -> float:
        return max(plan.memory.total for plan in of_stages)

    room = (1 - RESERVE) * target.chip.memory_bytes / ERROR
    fitting = [(mesh, of_stages) for mesh, of_stages in plans if needed(of_stages) <= room]
    if not fitting:
        mesh, of_stages = min(plans, key=lambda each: needed(each[1]))
        least = f"{mesh_text(mesh.sizes())} needs least, {size(needed(of_stages))} of {size(target.chip.memory_bytes)}"
        if not all(plan.fits for plan in of_stages):
            raise UserError(f"--mesh=auto: nothing fits {target.name}: {least}")
        return mesh, f"mesh {least}: nothing fits with room for the estimate's error"

    def seconds(of_stages: list[Estimate]) -> float:
        steps = [stage.batch_sizes.num_steps or 1 for stage in stages]  # 0 where its data will tell
        return sum(n * plan.communication_seconds for n, plan in zip(steps, of_stages, strict=True)) / sum(steps)

    def rank(each: tuple[MeshConfig, list[Estimate]]) -> tuple[float, int]:
        return seconds(each[1]), sum(devices > 1 for devices in each[0].sizes().values())

    (mesh, of_stages), *others = sorted(fitting, key=rank)
    why = (
        f"mesh {mesh_text(mesh.sizes())}: fits with {size(needed(of_stages))} of {size(target.chip.memory_bytes)}, "
        f"and its collectives take the least time of {len(fitting)} that fit, {seconds(of_stages):.3g} s a step"
    )
    if others:
        why += f" (next {mesh_text(others[0][0].sizes())}, {seconds(others[0][1]):.3g} s)"
    return mesh, why


def larger_slice(config: RunConfig, stages: Sequence[Stage], target: Slice) -> tuple[Slice, str] | None:
    """The least multiple of a slice that holds these stages on some mesh, and that mesh; None if it is over 16."""
    for factor in (2, 4, 8, 16):
        larger = target.times(factor)
        try:
            mesh, _ = best_mesh(config, stages, larger)
        except UserError:
            continue
        return larger, mesh_text(mesh.sizes())
    return None


def _products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """All ordered ways to write a number as a product of so many factors."""
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _products(number // first, factors - 1):
                yield (first, *rest)
