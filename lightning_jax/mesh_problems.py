"""Whether a run's devices can share its model and its batches: sizes that its meshes do not divide."""

import math
from collections.abc import Mapping

from lightning_jax.config import RunConfig
from lightning_jax.models import ModelConfig
from lightning_jax.parallel.mesh import MeshError
from lightning_jax.parallel.sharding import RULES

Split = tuple[str, int, str, int]  # field, size, axes of the mesh that split it, and into how many parts


def problems_on(config: RunConfig, num_devices: int) -> list[str]:
    """What keeps a config from running on so many devices, a line each."""
    if 0 < num_devices <= config.num_rollout_devices:
        return [
            f"config.stages.{config.run_stages[0]}.reinforcement.rollouts.devices: {config.num_rollout_devices} of "
            f"{num_devices} devices leave none to train on"
        ]
    try:
        mesh = config.resolved_mesh(num_devices)
    except MeshError as error:
        return [f"config.{error}"]
    model, splits = config.model, _of_model(config.model, mesh)
    for name in config.run_stages:
        stage = config.stages[name]
        for tokens in stage.batch_size.tokens:
            field = f"stages.{name}.batch_size.tokens / context_length"
            splits.append((field, tokens // stage.context_length, *_over("batch", mesh)))
        if mesh["sequence"] > 1:
            # Softmax layers give each device two pieces of a row, so that all have the same work.
            field, pieces = f"stages.{name}.context_length", 2 * mesh["sequence"]
            splits.append((field, stage.context_length, "2 x sequence", pieces))
            if model.num_experts and model.expert_dispatch == "capacity":
                # Each device counts the places of whole groups.
                pieces = model.capacity_group * mesh["sequence"]
                splits.append((field, stage.context_length, "sequence x model.capacity_group", pieces))
        if stage.reinforcement and config.rollout_mesh:
            share, rollouts = config.rollout_mesh.sizes(), f"stages.{name}.reinforcement.rollouts"
            slots = (f"{rollouts}.slots", stage.reinforcement.rollouts.slots, *_over("batch", share))
            splits += [
                (field, size, f"{rollouts}.devices.{axis}", parts)
                for field, size, axis, parts in [*_of_model(model, share), slots]
            ]
    return [
        f"config.{field}: {size} does not divide over mesh {axis}={parts}; "
        f"make it a multiple of {parts}, or {axis} a divisor of {size}"
        for field, size, axis, parts in splits
        if size % parts
    ]


def _of_model(model: ModelConfig, mesh: Mapping[str, int]) -> list[Split]:
    feed_forward = "expert_mlp" if model.num_experts else "mlp"
    splits = [
        ("model.num_heads", model.num_heads, *_over("heads", mesh)),
        ("model.intermediate_size", model.intermediate_size, *_over(feed_forward, mesh)),
        ("model.vocab_size", model.vocab_size, *_over("vocab", mesh)),
        ("model.hidden_size", model.hidden_size, *_over("embed", mesh)),
    ]
    if "softmax" in model.layer_pattern:
        splits.append(("model.num_kv_heads", model.num_kv_heads, *_over("kv_heads", mesh)))
    if model.num_experts:
        splits.append(("model.num_experts", model.num_experts, *_over("experts", mesh)))
    return splits


def _over(logical_axis: str, mesh: Mapping[str, int]) -> tuple[str, int]:
    axes = RULES.mesh_axes(logical_axis)
    return " x ".join(axes), math.prod(mesh[axis] for axis in axes)
