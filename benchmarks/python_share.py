"""How much of a training step the Python of the main loop takes, at the laptop size.

    python benchmarks/python_share.py

Runs the main job for some steps and compares the processor time of the main thread (the loop, dispatch, logging) with
the wall time of the steps. Reading ahead and what the devices compute are on other threads. Writes python_share.md and
.json to benchmarks/results/; takes about a minute.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Any

import recording

from lightning_jax.config_reader import load_config
from lightning_jax.train import Trainer

WARM_UP = 20  # steps


class TimedTrainer(Trainer):
    """A trainer that notes the time after each step's numbers are in."""

    def _report(self, *step: Any) -> None:
        super()._report(*step)
        self.times.append((time.perf_counter(), time.thread_time()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--config", default="configs/minimax_m1.py:laptop")
    arguments = parser.parse_args()
    stage = load_config(arguments.config).run_stages[0]
    batch_tokens = load_config(arguments.config).stages[stage].batch_size.tokens[0]
    overrides = [
        f"run_stages={stage}",
        f"stages.{stage}.tokens={arguments.steps * batch_tokens}",
        f"stages.{stage}.schedule.warmup_steps=0",
        f"stages.{stage}.schedule.decay_steps={arguments.steps}",
        f"metrics.evaluate_every_steps={arguments.steps}",
        "checkpoints.every_steps=0",
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(load_config(arguments.config, overrides), pathlib.Path(folder))
        trainer.times = []
        trainer.train()
    (wall_before, python_before), (wall_after, python_after) = trainer.times[WARM_UP], trainer.times[-2]
    steps = len(trainer.times) - 2 - WARM_UP
    wall, python = (wall_after - wall_before) / steps, (python_after - python_before) / steps
    lines = [
        "# Python's share of a training step",
        "",
        "| steps | wall time of a step | main thread's processor time | share |",
        "|---|---|---|---|",
        f"| {steps} | {1e3 * wall:.1f} ms | {1e3 * python:.2f} ms | {python / wall:.2%} |",
    ]
    recording.write("python_share", lines, {"steps": steps, "wall_seconds": wall, "python_seconds": python})
    return 0


if __name__ == "__main__":
    sys.exit(main())
