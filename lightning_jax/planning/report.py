"""A plan as a person reads it: what a step takes, what binds, how long and how much, and what to change."""

import pathlib
from collections.abc import Mapping, Sequence

from lightning_jax.config import RunConfig
from lightning_jax.metrics.formatting import count, duration, size
from lightning_jax.planning.compiled import Compiled
from lightning_jax.planning.estimate import RESERVE, Estimate
from lightning_jax.stages import Stage

KINDS = {
    "weights": "weights",
    "moments": "optimizer moments",
    "gradients": "gradients",
    "batch": "batch",
    "activations": "activations kept",
    "temporaries": "layer or loss at work",
}


def plan_lines(
    config: RunConfig,
    stage: Stage,
    plan: Estimate,
    *,
    mfu: float,
    dollars_per_chip_hour: float | None,
    compiled: Compiled | None = None,
) -> list[str]:
    """The plan of a stage, a line each."""
    target, memory = plan.target, plan.memory
    devices = f"{target.num_devices} devices of {size(target.chip.memory_bytes)}"
    rows = [
        ("stage", f"{stage.name}: context {stage.config.context_length:,}, {count(plan.tokens)} tokens a step"),
        ("slice", f"{target.topology}: {devices}; {mesh_text(plan.mesh)}"),
        ("model", f"{count(config.model.num_parameters())} parameters; {plan.micro_batches} micro-batches a step"),
        ("memory of a device", f"{size(memory.total)}, estimated: {_verdict(plan)}"),
        *((f"  {name}", size(getattr(memory, kind))) for kind, name in KINDS.items()),
    ]
    if memory.companions:
        rows.append(("  beside it", f"{size(memory.companions)} of reference, value model, policy of rollouts"))
    if memory.on_host:
        rows.append(("  on the host", f"{size(memory.on_host)} of activations"))
    if compiled:
        rows += [
            ("  compiled", f"{size(compiled.total)}: {size(compiled.arguments)} between steps, "
             f"{size(compiled.temporaries)} within; in {duration(compiled.compile_seconds)}"),
        ]  # fmt: skip
    resource, seconds = plan.bound
    stage_steps = stage.batch_sizes.num_steps
    rows += [
        ("work of a device", f"{count(plan.flops)} FLOP a step, {count(plan.model_flops)} without recomputation"),
        ("memory traffic", f"{size(plan.memory_traffic)} a step"),
        *((f"sent over {' x '.join(axes)}", f"{size(sent)} a step") for axes, sent in plan.sent.items()),
        *_compiled_traffic(compiled),
        *((f"least time, {name}", f"{each:.3g} s") for name, each in plan.seconds.items()),
        ("bound", f"{count(plan.tokens / seconds)} tokens/s; {resource} binds"),
        (
            f"at {mfu:.0%} MFU",
            f"{count(plan.tokens / plan.seconds_at(mfu))} tokens/s, {plan.seconds_at(mfu):.3g} s a step",
        ),
    ]
    run_seconds = stage_steps * plan.seconds_at(mfu)
    rows.append(("whole stage", f"{count(stage.config.tokens)} tokens in {duration(run_seconds)}"))
    if dollars_per_chip_hour:
        dollars = run_seconds / 3600 * target.num_chips * dollars_per_chip_hour
        rows.append(("cost", f"{count(dollars)} dollars at {dollars_per_chip_hour:g} a chip and hour"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    if mfu * seconds > plan.seconds_at(1.0):
        lines.append(f"{mfu:.0%} MFU is out of reach: the roofline allows {plan.seconds_at(1.0) / seconds:.0%}")
    return lines + [f"change: {advice}" for advice in what_to_change(config, stage, plan)]


def _compiled_traffic(compiled: Compiled | None) -> list[tuple[str, str]]:
    if compiled is None:
        return []
    if compiled.sent is None:
        return [("  compiled", "not known: the compiler does not show the program for these devices")]
    return [(f"  compiled, {' x '.join(axes)}", f"{size(sent)} a step") for axes, sent in compiled.sent.items()]


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The axes along which there is more than one device."""
    return " x ".join(f"{axis} {devices}" for axis, devices in sizes.items() if devices > 1) or "one device"


def what_to_change(config: RunConfig, stage: Stage, plan: Estimate) -> list[str]:
    """What would make a plan fit that does not, by what takes most of its memory."""
    memory, chip = plan.memory, plan.target.chip
    if plan.fits:
        return []
    advice = []
    state = memory.weights + memory.moments + memory.gradients
    if state > (1 - RESERVE) * chip.memory_bytes:
        needed = state * plan.target.num_devices / ((1 - RESERVE) * chip.memory_bytes)
        if plan.mesh["data"] > 1:
            advice.append(f"split the weights over more devices: mesh.data={plan.mesh['data']} replicates them")
        advice.append(f"weights, moments and gradients alone would fill {needed:.0f} such chips")
        if config.model.param_dtype == "float32":
            advice.append("config.model.param_dtype=bfloat16 and moment_dtype=bfloat16 halve them")
    if memory.activations + memory.temporaries > memory.total / 3:
        if config.model.remat in ("none", "dots"):
            advice.append("config.model.remat=full keeps only each layer's input, offload on the host")
        rows_tokens = stage.config.context_length
        if (stage.config.batch_size.micro_batch_tokens or plan.tokens) > rows_tokens:
            advice.append(f"batch_size.micro_batch_tokens={rows_tokens}: one row of each device at a time")
        else:
            advice.append(f"mesh.sequence={2 * plan.mesh['sequence']}: each device takes less of a row")
    return advice


def plot_plan(plans: Sequence[Estimate], names: Sequence[str], title: str, path: pathlib.Path) -> None:
    """Memory of a device by kind against what it has, and the least time of each resource, for some stages."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.5 + 0.5 * len(plans)), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    left = [0.0] * len(plans)
    for kind, label in KINDS.items():
        widths = [getattr(plan.memory, kind) / 2**30 for plan in plans]
        memory.barh(names, widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    memory.axvline(plans[0].target.chip.memory_bytes / 2**30, color="black", linestyle="--", label="of the chip")
    memory.set_xlabel("GiB on a device")
    resources = list(plans[0].seconds)
    height = 0.8 / len(resources)
    for place, resource in enumerate(resources):
        heights = [index + (place - 1) * height for index in range(len(plans))]
        seconds.barh(heights, [plan.seconds[resource] for plan in plans], height=height, label=resource)
    seconds.set_yticks([])
    seconds.set_xlabel("seconds of a step, at least")
    for axes in (memory, seconds):
        axes.invert_yaxis()
        axes.legend(fontsize="x-small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _verdict(plan: Estimate) -> str:
    share = plan.memory.total / plan.target.chip.memory_bytes
    if plan.fits:
        return f"fits, {share:.0%} of the chip"
    return f"does not fit, {share:.0%} of the chip"
