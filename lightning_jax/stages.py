"""The stages of a run, placed one after the other on the run's count of steps and tokens."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from lightning_jax.config import RunConfig, StageConfig
from lightning_jax.optimizers import BatchSizes


@dataclass(frozen=True, eq=False)
class Stage:
    """A stage and its place in the run: it makes the run's steps from `first_step` up to `last_step`, not included."""

    name: str
    config: StageConfig
    batch_sizes: BatchSizes
    first_step: int
    first_token: int

    @property
    def last_step(self) -> int:
        return self.first_step + self.batch_sizes.num_steps

    @property
    def most_rows(self) -> int:
        """Rows of its largest batch."""
        return max(self.config.batch_size.tokens) // self.config.context_length

    def tokens_before(self, step: int) -> int:
        """Tokens that the run has consumed before its step `step`, a step of this stage or the one after its last."""
        return self.first_token + self.batch_sizes.tokens_before(step - self.first_step)


def plan_stages(config: RunConfig) -> list[Stage]:
    """The stages to run, in order."""
    stages: list[Stage] = []
    step = token = 0
    for name in config.run_stages:
        stage = config.stages[name]
        sizes = BatchSizes(stage.batch_size, stage.context_length, stage.tokens)
        stages.append(Stage(name, stage, sizes, step, token))
        step, token = step + sizes.num_steps, token + sizes.tokens_before(sizes.num_steps)
    return stages


def with_lengths(config: RunConfig, rows_of_a_pass: Callable[[StageConfig], int]) -> RunConfig:
    """The config in which stages with a length in passes have their tokens, warm-up and fall.

    Args:
      rows_of_a_pass: over all corpora of a stage.
    """
    stages = {
        name: _with_length(stage, rows_of_a_pass(stage)) if stage.passes and name in config.run_stages else stage
        for name, stage in config.stages.items()
    }
    return dataclasses.replace(config, stages=stages)


def _with_length(stage: StageConfig, rows: int) -> StageConfig:
    tokens = math.ceil(stage.passes.count * rows) * stage.context_length
    steps = BatchSizes(stage.batch_size, stage.context_length, tokens).num_steps
    warmup = math.ceil(stage.passes.warmup_share * steps)
    end = min(math.ceil(stage.passes.decay_share * steps), steps - warmup)
    decay = {"wsd": end, "cosine": max(steps, warmup + 1), "constant": 0}[stage.schedule.kind]
    schedule = dataclasses.replace(stage.schedule, warmup_steps=warmup, decay_steps=decay)
    return dataclasses.replace(stage, tokens=tokens, schedule=schedule)


def num_micro_batches(config: StageConfig, rows: int, shards: int) -> int:
    """Into how many parts a batch of `rows` is cut: the fewest that are small enough and spread over all shards.

    Args:
      shards: into how many parts the mesh splits the rows of each micro-batch; divides `rows`.
    """
    most = config.batch_size.micro_batch_tokens or rows * config.context_length
    return next(
        parts
        for parts in range(1, rows // shards + 1)
        if rows % (parts * shards) == 0 and rows // parts // shards * config.context_length <= most
    )
