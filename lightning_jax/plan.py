"""What a config is about to do: its schedules, and whether, how and at what cost it trains on a slice.

python -m lightning_jax.plan --config=configs/minimax_text_01.py:456b --schedule --out=schedule.png
python -m lightning_jax.plan --config=configs/minimax_m1.py:456b --devices=v5p:8x8x8 --out=plan.png
python -m lightning_jax.plan --config=configs/minimax_m1.py:456b --devices=2xv5p:8x8x8 --mesh=auto
python -m lightning_jax.plan --config=configs/minimax_m1.py:456b --generation --out=flops.png
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lightning_jax.command_line import run_command, say, show
from lightning_jax.config import ConfigError, RunConfig, nearest_name
from lightning_jax.errors import UserError
from lightning_jax.mesh_problems import problems_on
from lightning_jax.metrics.formatting import count, scientific
from lightning_jax.optimizers import learning_rate
from lightning_jax.planning.compiled import compile_step, described_devices
from lightning_jax.planning.estimate import estimate
from lightning_jax.planning.generation_flops import (
    DEEPSEEK_R1,
    GenerationCost,
    generation_table,
    plot_generation_flops,
)
from lightning_jax.planning.hardware import PRICES, Price, Slice, parse_slice
from lightning_jax.planning.meshes import CHOICES, MESH_HELP, larger_slice, with_mesh
from lightning_jax.planning.report import Assumptions, compiled_lines, plan_lines, plot_plan, total_line
from lightning_jax.planning.traffic import divides_slices
from lightning_jax.run_setup import open_run
from lightning_jax.stages import Stage, plan_stages

POINTS_PER_STAGE = 500


def schedule_table(stages: Sequence[Stage]) -> str:
    """One line for each stage: its length, context, batch sizes, and the learning rates it goes through."""
    rows = [("stage", "tokens", "steps", "context", "batch", "learning rate")]
    for stage in stages:
        sizes, schedule = stage.batch_sizes, stage.config.schedule
        turns = (0, max(0, schedule.warmup_steps - schedule.first_step), sizes.num_steps)
        rates = np.asarray(learning_rate(schedule, sizes.num_steps)(np.array(turns)))
        rows.append(
            (
                stage.name,
                count(sizes.tokens_before(sizes.num_steps)),
                f"{sizes.num_steps:,}",
                f"{stage.config.context_length:,}",
                " > ".join(count(tokens) for tokens in stage.config.batch_size.tokens),
                " > ".join(dict.fromkeys(scientific(float(rate)) for rate in rates)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plot_schedule(stages: Sequence[Stage], title: str, path: pathlib.Path) -> None:
    """Learning rate, batch size and context length over the tokens of the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    for stage in stages:
        sizes = stage.batch_sizes
        steps = np.unique(np.linspace(0, sizes.num_steps, POINTS_PER_STAGE, dtype=np.int64))
        tokens = [stage.first_token + sizes.tokens_before(int(step)) for step in steps]
        curves = (
            learning_rate(stage.config.schedule, sizes.num_steps)(steps),
            [sizes.rows(int(step)) * stage.config.context_length for step in steps],
            np.full(steps.shape, stage.config.context_length),
        )
        for axes, curve in zip(panels, curves, strict=True):
            axes.plot(tokens, curve, label=stage.name)
    for axes, label in zip(panels, ("learning rate", "tokens per batch", "context length"), strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].yaxis.set_major_formatter(lambda rate, _: scientific(rate))
    panels[1].set_ylim(bottom=0)
    panels[1].yaxis.set_major_formatter(lambda tokens, _: count(tokens))
    panels[2].set_yscale("log", base=2)
    panels[2].yaxis.set_major_formatter(lambda length, _: f"{length:,.0f}")
    panels[2].xaxis.set_major_formatter(lambda tokens, _: count(tokens))
    panels[2].set_xlabel("tokens")
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)


def _plan_on_devices(
    options: argparse.Namespace, config: RunConfig, stages: Sequence[Stage], title: str
) -> Callable[[pathlib.Path], None]:
    """Prints the plan of each stage that was asked for; returns what plots them."""
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu={options.mfu}: not a share between 0 and 1")
    target = parse_slice(options.devices)
    names = [stage.name for stage in stages]
    if options.stage and options.stage not in names:
        raise UserError(f"--stage={options.stage}: no such stage; {nearest_name(options.stage, names)}")
    chosen = [stage for stage in stages if options.stage in (None, stage.name)]
    config = dataclasses.replace(config, run_stages=tuple(stage.name for stage in chosen))
    devices = described_devices(target) if options.compile else ()  # first, since it may say what is not installed
    if options.mesh:
        config, why = with_mesh(config, options.mesh, chosen, target)
        show(why, end="\n\n")
    if problems := problems_on(config, target.num_devices):
        raise ConfigError(problems)
    if not divides_slices(config.resolved_mesh(target.num_devices), target):
        raise UserError(f"config.mesh: {target.num_slices} slices do not divide its axes; use data={target.num_slices}")
    plans = [estimate(config, stage, target) for stage in chosen]
    assumed = Assumptions(options.mfu, _price(options.dollars_per_chip_hour, target))
    for stage, plan in zip(chosen, plans, strict=True):
        lines = plan_lines(config, stage, plan, assumed)
        if not plan.fits and (larger := larger_slice(config, [stage], target)):
            lines.append(f"change: --devices={larger[0].name} holds it, as mesh {larger[1]}")
        show("\n".join(lines), end="\n\n")
        if options.compile:
            say(f"compiling {stage.name} for {target.name}; minutes for large models, Ctrl-C stops it")
            show("\n".join(compiled_lines(plan, compile_step(config, stage, devices))), end="\n\n")
    total = total_line(chosen, plans, assumed)
    if len(plans) > 1:
        show(total)
    title = f"{title}, {count(config.model.num_parameters())} parameters, on {target.name}\n{total}"
    return functools.partial(plot_plan, plans, [stage.name for stage in chosen], title)


def _price(dollars: float | None, target: Slice) -> Price | None:
    if dollars is None:
        return PRICES.get(target.chip.name)
    if not dollars > 0:
        raise UserError(f"--dollars_per_chip_hour={dollars:g}: not a price")
    return Price(dollars, "--dollars_per_chip_hour")


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C ends the process: a compiler would let Python hear of it only when it is done."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m lightning_jax.plan", description="Shows what a config will do.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--schedule", action="store_true", help="the stages and their schedules")
    what.add_argument(
        "--devices", metavar="CHIP:SHAPE", help="what a step takes there: v5p:8x8x8, 2xv6e:16x16, h100:64"
    )
    what.add_argument(
        "--generation", action="store_true", help="the FLOPs of generating up to 128K tokens, beside DeepSeek-R1's"
    )
    parser.add_argument("--stage", help="--devices: of this stage only")
    parser.add_argument("--mesh", choices=CHOICES, help=f"--devices: {MESH_HELP}")
    parser.add_argument(
        "--compile", action="store_true", help="--devices: ask the compiler too; minutes for large models"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="--devices: model FLOPs utilisation to reckon with")
    parser.add_argument(
        "--dollars_per_chip_hour", type=float, help="--devices: what you pay, for the cost; else a list price"
    )
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.png", help="plot it as well; .svg and .pdf work too")

    def command(options: argparse.Namespace, config: RunConfig) -> int:
        if any(config.stages[name].passes for name in config.run_stages):
            config, _ = open_run(config, say=print)  # so long as their data are
        stages = plan_stages(config)
        title = f"{config.name} ({config.size_reason})"
        if options.schedule:
            print(schedule_table(stages))
            draw = functools.partial(plot_schedule, stages, title)
        elif options.generation:
            costs = [GenerationCost.of(config.name, config.model), DEEPSEEK_R1]
            print(generation_table(costs))
            draw = functools.partial(plot_generation_flops, costs)
        else:
            draw = _plan_on_devices(options, config, stages, title)
        if options.out:
            try:
                draw(options.out)
            except (OSError, ValueError) as error:
                raise UserError(f"--out={options.out}: {str(error).splitlines()[0]}") from error
        return 0

    with _ended_by_ctrl_c():
        return run_command(parser, command, arguments)


if __name__ == "__main__":
    sys.exit(main())
