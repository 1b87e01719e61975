"""The batches of a stage of reinforcement learning: rollouts are made when the last ones are used up.

Shapes: N rows of a generation, R of an update, T tokens of a row.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lightning_jax.checkpoints.checkpoints import SAVING
from lightning_jax.config import RunConfig
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline import Batch as HostBatch
from lightning_jax.input_pipeline.prompts import Prompts
from lightning_jax.input_pipeline.shuffle import fold_key, shuffled
from lightning_jax.input_pipeline.tokenizers import Tokenizer
from lightning_jax.model_folders import CHECKPOINTS
from lightning_jax.references.live import kept_params
from lightning_jax.references.running_stage import Key, RunningStage
from lightning_jax.reinforcement.collecting import Collector
from lightning_jax.reinforcement.experience import delete_others, digest, packed, path_of, read_rows, write_rows
from lightning_jax.reinforcement.generated import Generated
from lightning_jax.reinforcement.grading import open_rewards
from lightning_jax.reinforcement.rollout_generator import RolloutGenerator
from lightning_jax.reinforcement.sampling_policy import Position
from lightning_jax.reinforcement.scoring import Collected, Scorer
from lightning_jax.train_step import Batch, TrainState

EXACT_ROUNDING = "--xla_allow_excess_precision=false"

# What a checkpoint keeps of the stage: digests of the last generation's rollouts and, where they are made ahead, of the
# next one's. The position in the prompts is in these files.
Saved = dict[str, Any]


def check(config: RunConfig, say: Callable[[str], None]) -> None:
    """What would stop a stage of reinforcement learning, said before the stages in front of it are trained.

    Raises:
        UserError: a reward that there is not or that needs what is not here, or a mode that the environment forbids.
    """
    for name in config.run_stages:
        if (settings := config.stages[name].reinforcement) is None:
            continue
        with contextlib.ExitStack() as stack:
            open_rewards(settings.rewards, stack, say)
        field, rollouts, problems = f"config.stages.{name}.reinforcement.rollouts", settings.rollouts, []
        if rollouts.mode == "aligned" and config.model.logits_dtype != "float32":
            problems.append(f"{field}.mode: 'aligned' needs an fp32 head; model.logits_dtype=float32")
        if rollouts.mode == "aligned" and EXACT_ROUNDING not in os.environ.get("XLA_FLAGS", ""):
            problems.append(
                f"{field}.mode: 'aligned' needs XLA_FLAGS={EXACT_ROUNDING} in the environment of the command"
            )
        if rollouts.devices and jax.process_count() > 1:
            problems.append(
                f"{field}.devices: {rollouts.devices} make rollouts while others train, which a run of one process "
                f"can do, and this is one of {jax.process_count()}; {{}} for all devices in turns"
            )
        if problems:
            raise UserError("\n".join(problems))


class Record(Protocol):
    """Takes a generation, and the first step of the run that trains on it."""

    def __call__(self, step: int, collected: Collected) -> None: ...


class RolloutData:
    """Rollouts as batches (a `StageData`), and what a run needs to go on with them.

    With a staleness of 1 the next generation is by the policy before the first update on the present one. Where some
    devices make rollouts and nothing else, all of it is made by a thread while the updates go on. Where the devices
    serve both, its completions are made first, and the thread only verifies them: it starts no program of several
    devices, which must all be started in one order on each.

    Args:
        state: to go on from; the policy is the reference where the stage begins.
        saved: of the checkpoint from which the run goes on in the middle of the stage; None where it begins.
        record: is told of each generation.

    Attributes:
        reference_key: of the model as the stage began, where the objective asks for it.

    Raises:
        UserError: a reference or rollouts that are gone.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: Mapping[str, Prompts],
        tokenizer: Tokenizer,
        state: TrainState,
        saved: Saved | None,
        place: RunningStage,
        record: Record,
    ):
        self._place, self._stage, self._record = place, place.stage, record
        self._settings = place.stage.config.reinforcement
        self._seed = config.seed
        self._stack = contextlib.ExitStack()
        reward = open_rewards(self._settings.rewards, self._stack, place.say)
        ends = {each.end_of_turn for each in prompts.values()}
        self._generator = RolloutGenerator(config, place.stage, tokenizer, ends, place.programs, self._progress)
        self._collector = Collector(config, place.stage, prompts, tokenizer, self._generator, reward)
        self._scorer = Scorer(place.stage, place.programs)
        self._reference: nnx.State | None = None
        self.reference_key: Key | None = None
        if self._settings.policy_gradient.kl_coefficient:
            self._reference, self.reference_key = kept_params(state.params, place)
        self._updates = self._settings.rollouts.updates
        self._saved: Saved = saved or {}
        self._rows: HostBatch | None = None
        self._made = Position()
        self._ahead: Generated | None = None
        self._waited = 0.0  # seconds for it
        self._closed = False
        self._begun: tuple[int, Callable[[], Generated]] | None = None  # a generation, and what waits for it
        self._thread = ThreadPoolExecutor(1) if self._settings.rollouts.staleness else None
        if saved:
            self._restore((int(state.step) - place.stage.first_step - 1) // self._updates)
        sizes = ", ".join(f"{name} {size:,}" for name, size in self._collector.sampling_policy.sizes.items())
        self.description = (
            f"{self._collector.num_prompts:,} prompts x {self._settings.rollouts.samples} completions for every "
            f"{self._updates} updates; prompts: {sizes}"
        )

    @property
    def position(self) -> Saved:
        """What a checkpoint keeps; waits for rollouts that are made ahead."""
        self._settle()
        return self._saved

    def needs_params(self, step: int) -> bool:
        return step % self._updates == 0

    def batch(self, step: int, state: TrainState) -> Batch:
        if self.needs_params(step):
            self._rows = self._make(step // self._updates, step, state)
        return self._place.programs.on_devices(self.again(step))

    def again(self, step: int) -> HostBatch:
        """Each pass over a generation's rows takes them in an order of its own."""
        size, programs = self._stage.batch_sizes.rows(step), self._place.programs
        row_B = np.arange(size) + step % self._updates * size
        if self._settings.rollouts.epochs > 1:
            key = fold_key("epochs", self._seed, self._stage.name, step // self._updates)
            row_B = shuffled(row_B, len(self._rows["inputs"]), key)
        batch = {name: rows[row_B] for name, rows in self._rows.items()}
        if self._stage.config.mixture.packing == "best_fit":
            # Eight numbers of rows at most, for each of which a step is compiled.
            batch = packed(batch, multiple=-(-size // (8 * programs.shards)) * programs.shards)
        share = len(batch["inputs"]) // programs.host.count
        own = slice(programs.host.index * share, (programs.host.index + 1) * share)
        return {name: rows[own] for name, rows in batch.items()}

    def validation_rewards(self, params: nnx.State, most: int) -> dict[str, float]:
        """The mean reward of the likeliest completions of held-out prompts, by corpus; of `most` prompts at most."""
        self._settle()  # generators and verifiers do one thing at a time
        self._generator.load(params)
        rewards = self._collector.validation_rewards(most)
        self._generator.release()
        return rewards

    def close(self) -> None:
        self._closed = True
        if self._thread:
            self._thread.shutdown()
        self._stack.close()

    def _progress(self, doing: str) -> None:
        """Takes what generators do; where nobody will have their rollouts any more, a thread's ends."""
        if self._closed:
            raise CancelledError
        self._place.progress(doing)

    def _make(self, generation: int, step: int, state: TrainState) -> HostBatch:
        self._settle()
        if (generated := self._ahead) is None:
            self._generator.load(state.params)
            generated = self._collector.generate(generation, self._made)
            self._generator.release()
        value = state.value and state.value.params
        collected = self._scorer.collected(generation, generated, state.params, self._reference, value)
        collected.timing["waiting_seconds"], self._waited = self._waited, 0.0
        self._made, self._ahead = generated.position, None
        arrays = collected.rows | self._made.arrays()
        self._saved = {"rollouts": digest(arrays)}
        if jax.process_index() == 0:
            write_rows(self._path(generation), arrays)
            delete_others(self._place.run, self._stage.name, {generation, *self._needed_by_checkpoints()})
        if self._thread and generation + 1 < self._collector.num_generations:
            self._begun = generation + 1, self._begin(generation + 1, state.params)
        self._record(self._stage.first_step + step + 1, collected)
        return collected.rows

    def _begin(self, generation: int, params: nnx.State) -> Callable[[], Generated]:
        """Begins a generation by the policy as it is; what waits for it is to be called before the next begins."""
        collector, shared = self._collector, not self._settings.rollouts.devices
        if shared and self._settings.rollouts.dynamic_sampling:
            # The next step uses these parameters up, and further prompts will be asked of them.
            params = jax.tree.map(jnp.copy, params)
        self._generator.load(params)
        if not shared:
            return self._thread.submit(collector.generate, generation, self._made).result
        begun = collector.begin(generation, self._made)
        verified = self._thread.submit(collector.verify, begun)
        return lambda: collector.complete(begun, verified.result())

    def _settle(self) -> None:
        """Completes the generation that is made ahead, if one is."""
        if self._begun is None:
            return
        generation, completed = self._begun
        self._place.progress("waiting for rollouts")
        begin = time.perf_counter()
        self._ahead, self._begun = completed(), None
        self._generator.release()
        self._waited += time.perf_counter() - begin
        arrays = self._ahead.arrays()
        self._saved |= {"ahead": digest(arrays)}
        if jax.process_index() == 0:
            write_rows(self._path(generation, ahead=True), arrays)

    def _restore(self, generation: int) -> None:
        """Goes on behind or in the middle of a generation."""
        self._made, self._rows = Position.taken_from(read_rows(self._path(generation), self._saved["rollouts"]))
        if "ahead" in self._saved:
            ahead = read_rows(self._path(generation + 1, ahead=True), self._saved["ahead"])
            self._ahead = Generated.of_arrays(ahead)

    def _path(self, generation: int, *, ahead: bool = False) -> Path:
        return path_of(self._place.run, self._stage.name, generation, ahead=ahead)

    def _needed_by_checkpoints(self) -> set[int]:
        """The generations in the middle of which, or behind which, a checkpoint was saved, or is being saved."""
        names = [path.name.removesuffix(SAVING) for path in (self._place.run / CHECKPOINTS).glob("*")]
        steps = [int(name) - self._stage.first_step for name in names if name.isdecimal()]
        return {(step - 1) // self._updates for step in steps if step > 0}
