"""What a config is about to do: its stages with their schedules, as a table and a plot.

python -m lightning_jax.plan --config=configs/minimax_text_01.py:456b --schedule --out=schedule.png
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from lightning_jax.command_line import run_command
from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.metrics.formatting import count, scientific
from lightning_jax.optimizers import learning_rate
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
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={path}: {str(error).splitlines()[0]}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m lightning_jax.plan", description="Shows what a config will do.")
    parser.add_argument("--schedule", action="store_true", required=True, help="the stages and their schedules")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE.png", help="plot them as well; .svg and .pdf work too"
    )

    def command(options: argparse.Namespace, config: RunConfig) -> int:
        if any(config.stages[name].passes for name in config.run_stages):
            config, _ = open_run(config, say=print)  # so long as their data are
        stages = plan_stages(config)
        print(schedule_table(stages))
        if options.out:
            plot_schedule(stages, f"{config.name} ({config.size_reason})", options.out)
        return 0

    return run_command(parser, command, arguments)


if __name__ == "__main__":
    sys.exit(main())
