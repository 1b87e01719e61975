"""What a run says while it goes on, and what it keeps of that: numbers, events, samples, batches that were skipped."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lightning_jax.config import RunConfig
from lightning_jax.input_pipeline import Batch
from lightning_jax.metrics import Console, MetricsWriter, read_metrics, write_report
from lightning_jax.metrics.writer import EventKind
from lightning_jax.reinforcement.scoring import Collected
from lightning_jax.run_setup import describe
from lightning_jax.stages import Stage
from lightning_jax.validation import Measures, describe_measures


class NonFiniteError(RuntimeError):
    """Loss or gradients were not finite for too many steps in a row; the message says where their batches are."""


class RunRecord:
    """The record of a run in its folder, and the console that shows it.

    What is said before it is opened waits until then: the console needs the history that a restore leaves.

    Attributes:
      step: the one at work.
    """

    def __init__(self, folder: Path):
        self.folder, self.step = folder, 0
        self._early: list[str] = []
        self._early_of_checkpoints: list[str] = []
        self._console: Console | None = None

    def open(
        self,
        stack: contextlib.ExitStack,
        config: RunConfig,
        stages: list[Stage],
        *,
        step: int,
        resumes: bool,
    ) -> None:
        """Opens the files and the console, which the stack closes, and shows the header and what was said before.

        Args:
          step: the last one that is done; of a run that resumes, what was recorded of later ones is cut off.
        """
        self.step, self._config = step, config
        self._writer = stack.enter_context(
            MetricsWriter(self.folder, resume_step=step if resumes else None, tensorboard=config.metrics.tensorboard)
        )
        last = stages[-1]
        self._console = Console(
            total_steps=last.last_step,
            total_tokens=last.tokens_before(last.last_step),
            flops_convention=config.metrics.flops_convention,
            history=read_metrics(self.folder),
        )
        stack.callback(self._console.close)
        stack.enter_context(_announced(self._console))
        self._console.header(f"lightning_jax: {config.name}", describe(config, stages, self.folder))
        for line in self._early:
            self.say(line)
        for line in self._early_of_checkpoints:
            self.event("checkpoint", line, step=step)

    def say(self, line: str) -> None:
        if self._console:
            self._console.say(line)
        else:
            self._early.append(line)

    def say_of_checkpoints(self, line: str) -> None:
        """Says what happened to a checkpoint, and keeps it."""
        self.say(line)
        if self._console:
            self.event("checkpoint", line, step=self.step)
        else:
            self._early_of_checkpoints.append(line)

    def event(self, kind: EventKind, line: str, *, step: int) -> None:
        self._writer.event(kind, line, step=step)

    def progress(self, stage: Stage, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """The numbers of a step."""
        place = {
            "stage": stage.name,
            "tokens": stage.tokens_before(step),
            "batch_tokens": stage.batch_sizes.rows(step - 1 - stage.first_step) * stage.config.context_length,
            "context_length": stage.config.context_length,
        }
        if step % self._config.metrics.evaluate_every_steps:  # a large table in a large model
            metrics = {name: value for name, value in metrics.items() if not name.endswith("expert_load")}
        self._console.progress(self._writer.write(step, {**metrics, **place}, timing))

    def measures(self, stage: Stage, step: int, measures: Measures) -> None:
        """What a state is on held-out data."""
        if measures:
            self._writer.write(step, measures | {"stage": stage.name})
            self.say(f"step {step:,}: {describe_measures(measures)}")

    def rollouts(self, stage: Stage, step: int, collected: Collected) -> None:
        """A generation, with the first step that trains on it."""
        self._writer.write(step, collected.metrics | {"stage": stage.name}, collected.timing)
        self.say(f"step {step:,}: {collected.summary}")
        for sample in collected.samples:
            self._writer.sample(step, stage=stage.name, **sample)
        for warning in collected.warnings:
            self.say(warning)
            self.event("rollouts", warning, step=step)

    def sample(self, stage: Stage, step: int, prompt: str, text: str) -> None:
        """What the model writes behind a prompt."""
        self._writer.sample(step, stage=stage.name, prompt=prompt, text=text)
        self.say(f"sample: {prompt!r} -> {text!r}")

    def skipped(self, step: int, batch: Batch, in_a_row: int) -> None:
        """Keeps the batch of a step that was skipped. Raises NonFiniteError after too many in a row."""
        path = self.folder / "nonfinite" / f"step_{step}_process_{jax.process_index()}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez_compressed(path, **batch)
        line = f"step {step}: loss or gradients are not finite; the update was skipped, its batch is in {path}"
        self.say(line)
        self.event("skipped_step", line, step=step)
        if in_a_row >= self._config.max_nonfinite_steps:
            raise NonFiniteError(
                f"stopped at step {step}: {in_a_row} steps in a row were not finite; lower the learning rate or look "
                f"at the data: their batches are in {path.parent}"
            )

    def report(self) -> None:
        """Writes the report of all that is on record."""
        if jax.process_index() == 0:
            self.say(f"report: {write_report(self.folder)}")


@contextlib.contextmanager
def _announced(console: Console) -> Iterator[None]:
    """Inside, log messages of this package and its libraries are announcements of the console."""
    handler = console.log_handler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
