"""A plan as a person reads it: what a step takes, what binds, how long and how much, and what to change."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_jax.config import RunConfig
from lightning_jax.metrics.formatting import count, duration, size
from lightning_jax.planning.compiled import Compiled
from lightning_jax.planning.estimate import RESERVE, Estimate
from lightning_jax.planning.hardware import Price
from lightning_jax.stages import Stage

KINDS = {
    "weights": "weights",
    "moments": "optimizer moments",
    "gradients": "gradients",
    "batch": "batch",
    "activations": "activations kept",
    "temporaries": "layer or loss at work",
}


@dataclass(frozen=True)
class Assumptions:
    """What time and cost are reckoned with."""

    mfu: float
    price: Price | None  # of a chip and hour; None where nobody has named one


def plan_lines(config: RunConfig, stage: Stage, plan: Estimate, assumed: Assumptions) -> list[str]:
    """The plan of a stage, a line each."""
    target, memory, mfu = plan.target, plan.memory, assumed.mfu
    devices = f"{target.num_devices} devices of {size(target.chip.memory_bytes)}"
    if plan.rollouts and plan.rollouts.alone:
        devices += f", {plan.rollouts.num_devices} of which make rollouts alone"
    rows = [
        ("stage", f"{stage.name}: context {stage.config.context_length:,}, {count(plan.tokens)} tokens a step"),
        ("slice", f"{target.name}: {devices}; {mesh_text(plan.mesh)}"),
        ("model", f"{count(config.model.num_parameters())} parameters; {plan.micro_batches} micro-batches a step"),
        ("memory of a device", f"{size(memory.total)}, estimated: {verdict(memory.total, plan)}"),
        *((f"  {name}", size(getattr(memory, kind))) for kind, name in KINDS.items()),
    ]
    if memory.companions:
        rows.append(("  beside it", f"{size(memory.companions)} of reference, value model, policy of rollouts"))
    if memory.on_host:
        rows.append(("  on the host", f"{size(memory.on_host)} of moments and activations"))
    if plan.rollouts:
        rows.append(("rollouts", _rollouts_text(plan)))
    resource, seconds = plan.bound
    rows += [
        ("work of a device", f"{count(plan.flops)} FLOP a step, {count(plan.model_flops)} without recomputation"),
        ("memory traffic", f"{size(plan.memory_traffic)} a step"),
        *(
            (
                f"sent over {' x '.join(axes)}",
                f"{size(sent.total)} a step" + (f", {size(sent.network)} over the network" if sent.network else ""),
            )
            for axes, sent in plan.sent.items()
        ),
        *((f"least time, {name}", f"{each:.3g} s") for name, each in plan.seconds.items()),
        ("bound", f"{count(plan.tokens / seconds)} tokens/s; {resource} binds"),
        (
            f"at {mfu:.0%} MFU",
            f"{count(plan.tokens / plan.seconds_at(mfu))} tokens/s, {plan.seconds_at(mfu):.3g} s a step",
        ),
        ("whole stage", f"{count(stage.config.tokens)} tokens in {duration(run_seconds(stage, plan, mfu))}"),
        ("cost", cost_text(run_seconds(stage, plan, mfu), plan, assumed.price)),
    ]
    lines = _aligned(rows)
    if mfu * seconds > plan.seconds_at(1.0):
        lines.append(f"{mfu:.0%} MFU is out of reach: the roofline allows {plan.seconds_at(1.0) / seconds:.0%}")
    return lines + [f"change: {advice}" for advice in what_to_change(config, stage, plan)]


def _rollouts_text(plan: Estimate) -> str:
    made = plan.rollouts
    alone = f"{made.num_devices} devices of their own, {mesh_text(made.mesh)}"
    return (
        f"on {alone if made.alone else 'the devices that train'}: {size(made.states)} of states, {size(made.total)} "
        f"with weights and all that is kept: {verdict(made.total, plan)}; a token of all sequences takes "
        f"{made.token_seconds * 1e3:.3g} ms at least"
    )


def compiled_lines(plan: Estimate, compiled: Compiled) -> list[str]:
    """What the compiler says of a plan, beside the estimate."""
    off = plan.memory.total / compiled.total - 1
    rows = [
        ("compiled", f"in {duration(compiled.compile_seconds)}"),
        ("memory of a device", f"{size(compiled.total)}: {verdict(compiled.total, plan)}; the estimate is {off:+.0%}"),
        ("  between steps", f"{size(compiled.arguments)}: weights, moments, batch"),
        ("  within", f"{size(compiled.temporaries)}: gradients, activations, the layer or loss at work"),
    ]
    if compiled.on_host:
        rows.append(("  on the host", size(compiled.on_host)))
    if compiled.sent is None:
        rows.append(("sent", "not known: the compiler does not show the program for these devices"))
    else:
        rows += [(f"sent over {' x '.join(axes)}", f"{size(sent)} a step") for axes, sent in compiled.sent.items()]
    return _aligned(rows)


def total_line(stages: Sequence[Stage], plans: Sequence[Estimate], assumed: Assumptions) -> str:
    """Time and cost of several stages, one after the other."""
    seconds = sum(run_seconds(stage, plan, assumed.mfu) for stage, plan in zip(stages, plans, strict=True))
    tokens = sum(stage.config.tokens for stage in stages)
    return (
        f"{len(stages)} stage{'s'[: len(stages) > 1]} at {assumed.mfu:.0%} MFU: {count(tokens)} tokens "
        f"in {duration(seconds)}; "
        f"{cost_text(seconds, plans[0], assumed.price)}"
    )


def run_seconds(stage: Stage, plan: Estimate, mfu: float) -> float:
    """The time of all steps of a stage at this MFU, each as long as the largest batch's for each of its tokens."""
    steps = stage.batch_sizes.tokens_before(stage.batch_sizes.num_steps) / plan.tokens
    return steps * plan.seconds_at(mfu)


def cost_text(seconds: float, plan: Estimate, price: Price | None) -> str:
    """Dollars for all chips of a slice, and the price that is assumed."""
    if price is None:
        return "not known: name the price of a chip and hour, --dollars_per_chip_hour=DOLLARS"
    dollars = seconds / 3600 * plan.target.num_chips * price.dollars
    return f"{count(dollars)} dollars at {price.dollars:g} a chip and hour: {price.source}"


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


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
        advice.append(f"weights, moments and gradients alone would fill {needed:.0f} such devices")
        if config.model.param_dtype == "float32":
            advice.append("config.model.param_dtype=bfloat16 and moment_dtype=bfloat16 halve them")
    if memory.moments > memory.total / 4 and chip.platform != "cpu":
        advice.append(f"config.mesh.moments=host keeps {size(memory.moments)} of moments on the host")
    if memory.activations + memory.temporaries > memory.total / 3:
        if config.model.remat in ("none", "dots"):
            advice.append("config.model.remat=full keeps only each layer's input, offload on the host")
        elif config.model.remat == "full" and chip.platform != "cpu":
            held = size(memory.activations)
            advice.append(f"config.model.remat=offload keeps up to {held} on the host; --compile says how much")
        rows_tokens = stage.config.context_length
        if (stage.config.batch_size.micro_batch_tokens or plan.tokens) > rows_tokens:
            advice.append(f"batch_size.micro_batch_tokens={rows_tokens}: one row of each device at a time")
        else:
            advice.append(f"mesh.sequence={2 * plan.mesh['sequence']}: each device takes less of a row")
    return advice


def plot_plan(plans: Sequence[Estimate], names: Sequence[str], title: str, path: pathlib.Path) -> None:
    """Of some stages: memory of a device by kind against what it has, the least time of each resource, and what a
    device sends over each mesh axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3 + 0.5 * len(plans)), layout="constrained")
    memory, seconds, sent = figure.subplots(1, 3)
    left = [0.0] * len(plans)
    for kind, label in KINDS.items():
        widths = [getattr(plan.memory, kind) / 2**30 for plan in plans]
        memory.barh(names, widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    memory.axvline(plans[0].target.chip.memory_bytes / 2**30, color="black", linestyle="--", label="of the chip")
    memory.set_xlabel("GiB on a device")
    _grouped_bars(seconds, [plan.seconds for plan in plans])
    seconds.set_xlabel("seconds of a step, at least")
    _grouped_bars(sent, [{" x ".join(axes): each.total / 2**30 for axes, each in plan.sent.items()} for plan in plans])
    sent.set_xlabel("GiB that a device sends in a step")
    for axes in (memory, seconds, sent):
        axes.invert_yaxis()
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _grouped_bars(axes: Any, groups: Sequence[Mapping[str, float]]) -> None:
    """A bar for each name, those of a group beside each other."""
    names = list(dict.fromkeys(name for group in groups for name in group))
    height = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        heights = [index + (place - (len(names) - 1) / 2) * height for index in range(len(groups))]
        axes.barh(heights, [group.get(name, 0.0) for group in groups], height=height, label=name)
    axes.set_yticks([])


def verdict(used: float, plan: Estimate) -> str:
    """Whether so many bytes fit a device of the plan, and how much of it they are."""
    memory = plan.target.chip.memory_bytes
    return f"{'fits' if used <= (1 - RESERVE) * memory else 'does not fit'}, {used / memory:.0%} of the device"
