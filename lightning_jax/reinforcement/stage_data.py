"""The batches of a stage of reinforcement learning: rollouts are made when the last ones are used up.

Shapes: N rows of a generation, R of an update, T tokens of a row.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx

from lightning_jax.checkpoints.checkpoints import SAVING
from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline import Batch as HostBatch
from lightning_jax.input_pipeline.prompts import Prompts
from lightning_jax.input_pipeline.tokenizers import Tokenizer
from lightning_jax.model_folders import CHECKPOINTS
from lightning_jax.references.live import kept_params
from lightning_jax.references.running_stage import Key, RunningStage
from lightning_jax.reinforcement.collecting import Collected, Collector
from lightning_jax.reinforcement.experience import delete_others, digest, packed, path_of, read_rows, write_rows
from lightning_jax.reinforcement.grading import open_rewards
from lightning_jax.train_step import Batch

EXACT_ROUNDING = "--xla_allow_excess_precision=false"

# What a checkpoint keeps of the stage: how many prompts were used, and the digest of the rollouts in use.
Position = dict[str, Any]


def check(config: RunConfig) -> None:
    """What would stop a stage of reinforcement learning, said before the stages in front of it are trained.

    Raises:
        UserError: a reward that there is not or that needs what is not here, or a mode that the environment forbids.
    """
    for name in config.run_stages:
        if (settings := config.stages[name].reinforcement) is None:
            continue
        with contextlib.ExitStack() as stack:
            open_rewards(settings.rewards, stack)
        field, problems = f"config.stages.{name}.reinforcement.rollouts.mode", []
        if settings.rollouts.mode == "aligned" and config.model.logits_dtype != "float32":
            problems.append(f"{field}: 'aligned' needs an fp32 head; model.logits_dtype=float32")
        if settings.rollouts.mode == "aligned" and EXACT_ROUNDING not in os.environ.get("XLA_FLAGS", ""):
            problems.append(f"{field}: 'aligned' needs XLA_FLAGS={EXACT_ROUNDING} in the environment of the command")
        if problems:
            raise UserError("\n".join(problems))


class Record(Protocol):
    """Takes a generation, and the first step of the run that trains on it."""

    def __call__(self, step: int, collected: Collected) -> None: ...


class RolloutData:
    """Rollouts as batches (a `StageData`), and the position in them.

    Args:
        params: what is trained, as the run goes on; the reference where the stage begins.
        position: of the checkpoint from which the run goes on in the middle of the stage; None where it begins.
        record: is told of each generation.

    Attributes:
        reference_key: of the model as the stage began, where the objective asks for it.

    Raises:
        UserError: a reference that is gone.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Mapping[str, Prompts],
        tokenizer: Tokenizer,
        params: nnx.State,
        position: Position | None,
        place: RunningStage,
        record: Record,
    ):
        self._place, self._stage, self._record = place, place.stage, record
        self._settings = place.stage.config.reinforcement
        self._stack = contextlib.ExitStack()
        reward = open_rewards(self._settings.rewards, self._stack)
        self.collector = Collector(config, place.stage, prompts, tokenizer, place.programs, reward, place.progress)
        self._reference: nnx.State | None = None
        self.reference_key: Key | None = None
        if self._settings.policy_gradient.kl_coefficient:
            self._reference, self.reference_key = kept_params(params, place)
        self.position: Position = position or {"prompts": 0, "rollouts": ""}
        self._rows: HostBatch | None = None
        sizes = ", ".join(f"{name} {len(each.train):,}" for name, each in prompts.items())
        rollouts = self._settings.rollouts
        self._updates = rollouts.updates
        self.description = (
            f"{self.collector.num_prompts:,} prompts x {rollouts.samples} completions for every "
            f"{self._updates} updates; prompts: {sizes}"
        )

    def needs_params(self, step: int) -> bool:
        return step % self._updates == 0

    def batch(self, step: int, params: nnx.State) -> Batch:
        generation = step // self._updates
        if self.needs_params(step):
            self._rows = self._make(generation, step, params)
        elif self._rows is None:
            self._rows = read_rows(self._path(generation), self.position["rollouts"])
        return self._place.programs.on_devices(self.again(step))

    def again(self, step: int) -> HostBatch:
        size, programs = self._stage.batch_sizes.rows(step), self._place.programs
        first = step % self._updates * size
        batch = {name: rows[first : first + size] for name, rows in self._rows.items()}
        if self._stage.config.mixture.packing == "best_fit":
            # Eight numbers of rows at most, for each of which a step is compiled.
            batch = packed(batch, multiple=-(-size // (8 * programs.shards)) * programs.shards)
        share = len(batch["inputs"]) // programs.host.count
        own = slice(programs.host.index * share, (programs.host.index + 1) * share)
        return {name: rows[own] for name, rows in batch.items()}

    def close(self) -> None:
        self._stack.close()

    def _make(self, generation: int, step: int, params: nnx.State) -> HostBatch:
        collected = self.collector.collect(generation, self.position["prompts"], params, self._reference)
        self.position = {"prompts": collected.next_prompt, "rollouts": digest(collected.rows)}
        if jax.process_index() == 0:
            write_rows(self._path(generation), collected.rows)
            delete_others(self._place.run, self._stage.name, {generation, *self._needed_by_checkpoints()})
        self._record(self._stage.first_step + step + 1, collected)
        return collected.rows

    def _path(self, generation: int) -> Path:
        return path_of(self._place.run, self._stage.name, generation)

    def _needed_by_checkpoints(self) -> set[int]:
        """The generations in the middle of which a checkpoint was saved, or is being saved."""
        names = [path.name.removesuffix(SAVING) for path in (self._place.run / CHECKPOINTS).glob("*")]
        steps = [int(name) - self._stage.first_step for name in names if name.isdecimal()]
        return {step // self._updates for step in steps if step > 0 and not self.needs_params(step)}
