"""The batches of a stage of reinforcement learning: rollouts are made when the last ones are used up.

Shapes: N rows of a generation, R of an update, T tokens of a row.
"""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import nnx

from lightning_jax.checkpoints.checkpoints import SAVING
from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline.packing import Batch
from lightning_jax.input_pipeline.prompts import Prompts
from lightning_jax.input_pipeline.tokenizers import Tokenizer
from lightning_jax.programs import Programs
from lightning_jax.reinforcement.collecting import Collected, Collector
from lightning_jax.reinforcement.experience import delete_others, digest, path_of, read_rows, write_rows
from lightning_jax.reinforcement.grading import open_rewards
from lightning_jax.reinforcement.reference_policy import reference_policy
from lightning_jax.stages import Stage

EXACT_ROUNDING = "--xla_allow_excess_precision=false"

# What a checkpoint keeps of the stage: how many prompts were used, and the digest of the rollouts in use.
Position = dict[str, Any]


class Record(Protocol):
    """Takes a generation that was made before the run's step `step`."""

    def __call__(self, step: int, collected: Collected) -> None: ...


class RolloutData:
    """Rollouts as batches, and the position in them.

    Args:
        params: as the run goes on, which are those at the stage's beginning where `position` is None.
        position: of the checkpoint from which the run goes on in the middle of the stage.
        record: is told of each generation.

    Attributes:
        position: to be saved with every checkpoint.

    Raises:
        UserError: a reward that there is not, an environment that the mode cannot do with.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        prompts: Mapping[str, Prompts],
        tokenizer: Tokenizer,
        programs: Programs,
        folder: pathlib.Path,
        *,
        params: nnx.State,
        position: Position | None,
        record: Record,
        say: Callable[[str], None],
        environment: Mapping[str, str],
    ):
        self._stage, self._programs, self._folder, self._record = stage, programs, folder, record
        self._rollouts = stage.config.reinforcement.rollouts
        _check_mode(stage, config, environment)
        self._stack = contextlib.ExitStack()
        reward = open_rewards(stage.config.reinforcement.rewards, self._stack)
        self.collector = Collector(config, stage, prompts, tokenizer, programs, reward)
        self._reference = None
        if stage.config.reinforcement.policy_gradient.kl_coefficient:
            begins = position is None
            self._reference = reference_policy(folder, stage.name, params, begins=begins, say=say)
        self.position = position or {"prompts": 0, "rollouts": ""}
        self._rows: Batch | None = None
        sizes = ", ".join(f"{name} {len(each.train):,}" for name, each in prompts.items())
        self.description = (
            f"{self.collector.num_prompts:,} prompts x {self._rollouts.samples} completions for every "
            f"{self._rollouts.updates} updates; prompts: {sizes}"
        )

    def needs_params(self, step: int) -> bool:
        return step % self._rollouts.updates == 0

    def batch(self, step: int, params: nnx.State) -> Batch:
        generation = step // self._rollouts.updates
        if self.needs_params(step):
            self._rows = self._make(generation, step, params)
        elif self._rows is None:
            self._rows = read_rows(path_of(self._folder, self._stage.name, generation), self.position["rollouts"])
        return self.again(step)

    def again(self, step: int) -> Batch:
        size, host = self._stage.batch_sizes.rows(step), self._programs.host
        share = size // host.count
        first = (step % self._rollouts.updates) * size + host.index * share
        return {name: rows[first : first + share] for name, rows in self._rows.items()}

    def close(self) -> None:
        self._stack.close()

    def _make(self, generation: int, step: int, params: nnx.State) -> Batch:
        collected = self.collector.collect(generation, self.position["prompts"], params, self._reference)
        self.position = {"prompts": collected.next_prompt, "rollouts": digest(collected.rows)}
        if jax.process_index() == 0:
            write_rows(path_of(self._folder, self._stage.name, generation), collected.rows)
            delete_others(self._folder, self._stage.name, {generation, *self._needed_by_checkpoints()})
        self._record(self._stage.first_step + step + 1, collected)
        return collected.rows

    def _needed_by_checkpoints(self) -> set[int]:
        """The generations in the middle of which a checkpoint was saved, or is being saved."""
        names = [path.name.removesuffix(SAVING) for path in (self._folder / "checkpoints").glob("*")]
        steps = [int(name) - self._stage.first_step for name in names if name.isdecimal()]
        return {step // self._rollouts.updates for step in steps if step > 0 and not self.needs_params(step)}


def _check_mode(stage: Stage, config: RunConfig, environment: Mapping[str, str]) -> None:
    if stage.config.reinforcement.rollouts.mode != "aligned":
        return
    field, problems = f"stages.{stage.name}.reinforcement.rollouts.mode", []
    if config.model.logits_dtype != "float32":
        problems.append(f"{field}: 'aligned' needs an fp32 head; model.logits_dtype=float32")
    if EXACT_ROUNDING not in environment.get("XLA_FLAGS", ""):
        problems.append(f"{field}: 'aligned' needs XLA_FLAGS={EXACT_ROUNDING} in the environment of the command")
    if problems:
        raise UserError("\n".join(problems))
