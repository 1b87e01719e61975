"""What a run is: the schema of its config, of frozen dataclasses, and what must hold between its sections.

`lightning_jax.config_reader` reads one from a file.
"""

import dataclasses
import difflib
import fnmatch
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_jax.checkpoints.config import CheckpointConfig
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline.config import DataConfig, MixtureConfig
from lightning_jax.metrics.config import MetricsConfig
from lightning_jax.models.config import LoraConfig, ModelConfig
from lightning_jax.objectives.config import PreferenceConfig, RewardModelConfig
from lightning_jax.optimizers import BatchSizeConfig, BatchSizes, OptimizerConfig, ScheduleConfig
from lightning_jax.parallel.config import MeshConfig
from lightning_jax.parallel.mesh import resolve
from lightning_jax.reinforcement.config import ReinforcementConfig, ValueConfig


class ConfigError(UserError):
    """Everything that is wrong with a config, one line each in `problems`."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class PassesConfig:
    """The length of a stage in passes over its corpora: its tokens and its schedule's steps follow from the data."""

    count: float
    warmup_share: float  # of the steps
    decay_share: float  # of the steps, the last of them: where "wsd" falls; 1 for all that are not warm-up

    def problems(self) -> list[str]:
        found = [] if self.count > 0 else [f"count: {self.count} is not positive"]
        if not 0 <= self.warmup_share < 1:
            found.append(f"warmup_share: {self.warmup_share} is not in [0, 1)")
        if not 0 < self.decay_share <= 1:
            found.append(f"decay_share: {self.decay_share} is not in (0, 1]")
        return found


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training: what is minimised, on which data, for how long."""

    objective: Literal["next_token", "preference", "reward_model", "policy_gradient"]
    reduction: Literal["token_mean", "conversation_sum"]  # of "next_token" over its targets
    preference: PreferenceConfig | None
    reward_model: RewardModelConfig | None
    reinforcement: ReinforcementConfig | None  # of "policy_gradient"
    tokens: int  # length of the stage, targets and padding alike; with `passes` it follows from the data
    passes: PassesConfig | None
    context_length: int
    rope_theta: float
    mixture: MixtureConfig
    batch_size: BatchSizeConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig

    @property
    def documents_per_example(self) -> int:
        """Chats that belong together."""
        return 2 if self.objective in ("preference", "reward_model") else 1

    @property
    def value(self) -> ValueConfig | None:
        """Of its value model, if it has one."""
        return self.reinforcement and self.reinforcement.value

    def problems(self) -> list[str]:
        found = []
        sections = {"preference": "preference", "reward_model": "reward_model", "reinforcement": "policy_gradient"}
        for name, objective in sections.items():
            if (getattr(self, name) is not None) != (self.objective == objective):
                found.append(f'{name}: belongs to objective="{objective}", and this is "{self.objective}"')
        found += self._problems_of_reinforcement()
        if self.documents_per_example == 2 and self.mixture.packing == "split":
            found.append('mixture.packing: "split" would cut pairs; "best_fit" or "one_per_row"')
        if self.context_length < 1:
            found.append(f"context_length: {self.context_length} is not positive")
        elif not self.passes and self.tokens < max(self.batch_size.tokens, default=0):
            found.append(f"tokens: {self.tokens} is less than one batch of {max(self.batch_size.tokens)}")
        for batch_tokens in self.batch_size.tokens:
            if self.context_length > 0 and batch_tokens % self.context_length:
                nearest = max(1, round(batch_tokens / self.context_length)) * self.context_length
                found.append(
                    f"batch_size.tokens: {batch_tokens} is no multiple of context_length={self.context_length}; "
                    f"{nearest} would be"
                )
        if 0 < self.batch_size.micro_batch_tokens < self.context_length:
            found.append(
                f"batch_size.micro_batch_tokens: {self.batch_size.micro_batch_tokens} is less than a row of "
                f"context_length={self.context_length}; make it at least that, or 0 for no micro-batches"
            )
        if not (found or self.passes or self.batch_size.problems() or self.schedule.problems()):
            steps = BatchSizes(self.batch_size, self.context_length, self.tokens).num_steps
            found.extend(f"schedule.{problem}" for problem in self.schedule.problems_in(steps))
            if self.value:
                problems = self.value.schedule.problems_in(steps)
                found.extend(f"reinforcement.value.schedule.{problem}" for problem in problems)
        return found

    def _problems_of_reinforcement(self) -> list[str]:
        if self.reinforcement is None or self.context_length < 1:
            return []
        found, rollouts = [], self.reinforcement.rollouts
        if self.mixture.packing == "split":
            found.append('mixture.packing: "split" would cut completions; "best_fit" or "one_per_row"')
        if self.mixture.packing == "best_fit" and rollouts.mode == "exact":
            found.append(
                'mixture.packing: with reinforcement.rollouts.mode "exact" each completion is trained on in a row of '
                'its own, as it was drawn; "one_per_row"'
            )
        if self.passes:
            found.append("passes: how many prompts a stage needs is not known before; give it tokens")
        if len(self.batch_size.tokens) > 1:
            found.append("batch_size.tokens: all updates on rollouts are of one size; give one")
        if rollouts.max_new_tokens >= self.context_length:
            found.append(
                f"reinforcement.rollouts.max_new_tokens: {rollouts.max_new_tokens} leaves no room for a prompt in "
                f"context_length={self.context_length}"
            )
        batches = rollouts.updates // max(rollouts.epochs, 1)
        rows = batches * (max(self.batch_size.tokens, default=0) // self.context_length)
        if rollouts.samples > 0 and rows % rollouts.samples:
            found.append(
                f"reinforcement.rollouts.samples: {rollouts.samples} do not divide the {rows} completions of a "
                f"generation, {batches} batches of {rows // batches} rows"
            )
        return found


@dataclass(frozen=True)
class RunConfig:
    """A run: one model, its data, and the stages it goes through in order."""

    name: str
    size_reason: str  # why this size: said at the start of the run
    seed: int
    model: ModelConfig
    lora: LoraConfig | None  # what is trained in place of the model's weights
    data: DataConfig
    mesh: MeshConfig
    stages: dict[str, StageConfig]
    run_stages: tuple[str, ...]  # which of the stages to run, in this order
    checkpoints: CheckpointConfig
    metrics: MetricsConfig
    max_nonfinite_steps: int  # so many skipped steps in a row stop the run
    hang_minutes: float  # a run that does nothing for so long ends with code 75; 0 for never

    def problems(self) -> list[str]:
        found = []
        for stage in self.run_stages:
            if stage not in self.stages:
                found.append(f"run_stages: no stage {stage!r}; {nearest_name(stage, self.stages)}")
        if len(set(self.run_stages)) < len(self.run_stages):
            found.append("run_stages: a stage is named twice; name each once")
        for name, stage in self.stages.items():
            for corpus in {**stage.mixture.start, **stage.mixture.end}:
                if corpus not in self.data.corpora:
                    found.append(
                        f"stages.{name}.mixture: no corpus {corpus!r} in data.corpora; "
                        f"{nearest_name(corpus, self.data.corpora)}"
                    )
            found += [f"stages.{name}.{problem}" for problem in self._problems_of_content(stage)]
        if "reward_model" in {self.stages[name].objective for name in self.run_stages if name in self.stages} and (
            len(self.run_stages) > 1
        ):
            found.append(
                "run_stages: a reward model has parameters of its own; run its stage alone, with --init_from=FOLDER "
                "of the run before it"
            )
        chosen = [self.stages[name] for name in self.run_stages if name in self.stages]
        for field, optimizers in (
            ("optimizer", [stage.optimizer for stage in chosen]),
            ("reinforcement.value.optimizer", [stage.value.optimizer for stage in chosen if stage.value]),
        ):
            if len({optimizer.moment_dtype for optimizer in optimizers}) > 1:
                found.append(
                    f"stages: {field}.moment_dtype differs between stages; one state serves all, choose one dtype"
                )
        if len({json.dumps(dataclasses.asdict(each)) for each in self.value_models.values()}) > 1:
            found.append("stages: reinforcement.value.model differs between stages; one state serves all")
        for name, value_model in self.value_models.items():
            if value_model.vocab_size != self.model.vocab_size:
                found.append(
                    f"stages.{name}.reinforcement.value.model.vocab_size: {value_model.vocab_size} is not the policy's "
                    f"{self.model.vocab_size}; both read the same tokens"
                )
        shares = [stage.reinforcement.rollouts.devices if stage.reinforcement else {} for stage in chosen]
        if any(share != shares[0] for share in shares):
            found.append(
                "run_stages: reinforcement.rollouts.devices differs between stages, whose mesh is of all other "
                "devices; run the stage that has them alone, with --init_from=FOLDER of the run before it"
            )
        if not self.run_stages:
            found.append(f"run_stages: no stage; {nearest_name('', self.stages)}")
        if self.lora:
            found += [f"lora.{problem}" for problem in self.lora.problems_with(self.model)]
        if self.hang_minutes < 0:
            found.append(f"hang_minutes: {self.hang_minutes} is negative; 0 for a run that may hang for ever")
        if self.data.tokenizer.vocab_size > self.model.vocab_size:
            found.append(
                f"data.tokenizer.vocab_size: {self.data.tokenizer.vocab_size} exceeds "
                f"model.vocab_size={self.model.vocab_size}; make it at most that"
            )
        return found

    @property
    def value_models(self) -> dict[str, ModelConfig]:
        """Of the stages to run that have one."""
        chosen = {name: self.stages[name].value for name in self.run_stages if name in self.stages}
        return {name: value.model or self.model for name, value in chosen.items() if value}

    def _problems_of_content(self, stage: StageConfig) -> list[str]:
        """What of a stage's corpora its objective and packing have no use for."""
        wanted = {"next_token": ("text", "conversations"), "policy_gradient": ("conversations",)}.get(
            stage.objective, ("preferences",)
        )
        found = []
        for name in stage.mixture.start:
            content = self.data.corpora[name].content if name in self.data.corpora else wanted[0]
            if content not in wanted:
                found.append(f'mixture: {name} is {content}; "{stage.objective}" trains on {" or ".join(wanted)}')
            elif (content, stage.mixture.packing) in (("text", "one_per_row"), ("conversations", "split")):
                found.append(f'mixture.packing: "{stage.mixture.packing}" is not for {content}, and {name} is that')
        return found

    def resolved_mesh(self, num_devices: int) -> dict[str, int]:
        """The size of each axis of the mesh that trains. Raises MeshError where it does not fit the devices."""
        return resolve(self.mesh, num_devices - self.num_rollout_devices)

    @property
    def rollout_mesh(self) -> MeshConfig | None:
        """Of the devices that make rollouts and nothing else; None where there are none."""
        learning = self.stages[self.run_stages[0]].reinforcement  # they are the same in all stages
        return MeshConfig.of(**learning.rollouts.devices) if learning and learning.rollouts.devices else None

    @property
    def num_rollout_devices(self) -> int:
        """Of `rollout_mesh`."""
        return math.prod(self.rollout_mesh.sizes().values()) if self.rollout_mesh else 0

    def to_json(self) -> str:
        """The resolved config, as it is written beside every run and into every checkpoint."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def nearest_name(name: str, valid: Iterable[str]) -> str:
    """The end of an error line about an unknown name: what might have been meant, and what there is."""
    names = [str(each) for each in valid]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there is {', '.join(names)}" if names else "there is none"


def differences(before: Any, after: Any, *, ignore: Sequence[str] = (), path: str = "") -> list[str]:
    """Where two configs, as JSON holds them, differ: a line for each field, but for paths that match `ignore`."""
    if before == after or any(fnmatch.fnmatch(path, pattern) for pattern in ignore):
        return []
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [f"config.{path} is {json.dumps(after)}, but was {json.dumps(before)} when the run was started"]
    return [
        line
        for name in sorted(before.keys() | after.keys())
        for line in differences(
            before.get(name), after.get(name), ignore=ignore, path=f"{path}.{name}" if path else name
        )
    ]
