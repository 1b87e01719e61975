"""One generation of rollouts: prompts, completions, rewards, further prompts for those that teach nothing, advantages.

What is collected is a function of the policy, the number of the generation and the number of its first prompt.

Sources: dynamic sampling, DAPO (arXiv 2503.14476) section 3.2; the correlation of probabilities, MiniMax-M1 (arXiv
2506.13585) figure 3.

Shapes: P prompts of a generation, G completions of each, N = P * G rows, T tokens of a row.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from lightning_jax.config import RunConfig
from lightning_jax.generation import Completion, GenerationSettings, Generator, Sampling, log_prob_gap
from lightning_jax.generation.exact import Draw, exact_completions
from lightning_jax.input_pipeline import Mixture
from lightning_jax.input_pipeline.packing import Batch
from lightning_jax.input_pipeline.prompts import Prompt, Prompts
from lightning_jax.input_pipeline.shuffle import fold_key, shuffled
from lightning_jax.input_pipeline.tokenizers import Tokenizer
from lightning_jax.objectives.advantages import group_advantages, informative_groups
from lightning_jax.objectives.policy_gradient import OLD, RECORDED, REFERENCE, kl_estimate
from lightning_jax.programs import Programs
from lightning_jax.reinforcement.experience import as_rows, with_advantages
from lightning_jax.reinforcement.grading import Grades, grade
from lightning_jax.rewards.reward import RewardFunction
from lightning_jax.stages import Stage


@dataclass
class Groups:
    """Prompts with their completions and what these are worth."""

    prompts: list[Prompt]
    completions: list[list[Completion]]
    grades: Grades

    def take(self, chosen: Sequence[int]) -> "Groups":
        reasons = [self.grades.reasons[place] for place in chosen]
        grades = Grades(self.grades.reward_PG[chosen], self.grades.score_PG[chosen], reasons)
        return Groups([self.prompts[p] for p in chosen], [self.completions[p] for p in chosen], grades)

    def and_also(self, other: "Groups") -> "Groups":
        arrays = [np.concatenate(pair) for pair in zip(self.grades[:2], other.grades[:2], strict=True)]
        grades = Grades(*arrays, self.grades.reasons + other.grades.reasons)
        return Groups(self.prompts + other.prompts, self.completions + other.completions, grades)


@dataclass(frozen=True)
class Collected:
    """A generation.

    Attributes:
        rows: to train on [N, T].
        next_prompt: the number of the first prompt that was not used.
        metrics: of the generation, a function of the run.
        timing: of this machine.
        samples: some of the completions, as the record of a run keeps them.
        warnings: what somebody should know.
    """

    rows: Batch
    next_prompt: int
    metrics: dict[str, float]
    timing: dict[str, float]
    samples: list[dict[str, Any]]
    warnings: list[str]

    @property
    def summary(self) -> str:
        """The generation in a line."""
        metrics, timing = self.metrics, self.timing
        return (
            f"reward {metrics['reward']:.3f}, {metrics['completion_tokens']:.1f} tokens, "
            f"{metrics['equal_reward_groups']:.0%} of prompts with equal rewards, {metrics['refills']} refills; "
            f"{timing['generation_seconds']:.1f} s generation, {timing['reward_seconds']:.1f} s reward, "
            f"{timing['scoring_seconds']:.1f} s scoring"
        )


class Collector:
    """Collects the generations of a stage.

    Args:
        prompts: of the stage's corpora.
        reward: grades completions.
        progress: takes what is being done, again whenever it gets on.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        prompts: Mapping[str, Prompts],
        tokenizer: Tokenizer,
        programs: Programs,
        reward: RewardFunction,
        progress: Callable[[str], None],
    ):
        self.stage, self.settings = stage, stage.config.reinforcement
        self._seed, self._prompts, self._programs, self._reward = config.seed, prompts, programs, reward
        self._tokenizer, self._progress = tokenizer, progress
        rows = stage.batch_sizes.rows(0)
        self.num_prompts = self.settings.rollouts.updates * rows // self.settings.rollouts.samples
        num_generations = -(-stage.batch_sizes.num_steps // self.settings.rollouts.updates)
        self._mixture = Mixture(
            stage.config.mixture, prompts.keys(), num_generations * self.num_prompts, fold_key(stage.name, config.seed)
        )
        self._model = dataclasses.replace(config.model, rope_theta=stage.config.rope_theta)
        self._generator: Generator | None = None
        self._log_probs = programs.policy_log_prob_step(stage)
        self._draws = programs.draw_step(stage) if self.settings.rollouts.mode == "exact" else None

    def collect(
        self, generation: int, first_prompt: int, params: nnx.State, reference: nnx.State | None = None
    ) -> Collected:
        """The generation of the policy `params`.

        Args:
            first_prompt: how many prompts of the stage were used before.
            reference: the model as the stage began, where the objective asks for it.
        """
        rollouts, seconds = self.settings.rollouts, {"generation": 0.0, "reward": 0.0}
        first = groups = self._groups(params, generation, 0, first_prompt, self.num_prompts, seconds)
        next_prompt, refills = first_prompt + self.num_prompts, 0
        informative_P = self._informative(groups)
        while rollouts.dynamic_sampling and refills < rollouts.max_refills and not informative_P.all():
            refills += 1
            missing = int(np.sum(~informative_P))
            further = self._groups(params, generation, refills, next_prompt, missing, seconds)
            next_prompt += missing
            order = np.argsort(~informative_P, kind="stable")
            groups = groups.take(order[: len(order) - missing].tolist()).and_also(further)
            informative_P = self._informative(groups)
        warnings = []
        used_P = informative_P if rollouts.dynamic_sampling else np.ones(self.num_prompts, bool)
        if not used_P.all():
            warnings.append(
                f"generation {generation + 1}: after {refills} refills {int(np.sum(~used_P))} of {len(used_P)} prompts "
                "still have completions of equal reward, and are left out; the prompts are too easy or too hard"
            )
        begin = time.perf_counter()
        rows = self._scored(as_rows(groups.prompts, groups.completions, self._length), params, reference)
        metrics = self._metrics(first, rows) | {"refills": refills, "prompts": next_prompt}
        advantages_PG = group_advantages(groups.grades.score_PG - self._divergence(rows), self.settings.advantages)
        rows = with_advantages(rows, advantages_PG, used_P)
        seconds["scoring"] = time.perf_counter() - begin
        if metrics["probability_correlation"] < rollouts.correlation_alarm:
            warnings.append(
                f"generation {generation + 1}: probabilities of rollouts and trainer correlate by "
                f"{metrics['probability_correlation']:.4f}, below {rollouts.correlation_alarm}; see "
                "lightning_jax/generation/README.md for modes in which they are nearer"
            )
        if rollouts.mode == "exact" and metrics["log_prob_gap_max"]:
            warnings.append(
                f"generation {generation + 1}: log-probabilities of exact rollouts are up to "
                f"{metrics['log_prob_gap_max']:.1e} nats from the trainer's; here its forward depends on what shares "
                "a batch"
            )
        tokens = sum(len(each.ids) for group in first.completions for each in group)
        timing = {f"{name}_seconds": value for name, value in seconds.items()}
        rates = {"generation": "generated", "reward": "rewarded", "scoring": "scored"}
        timing |= {f"{done}_tokens_per_second": tokens / max(seconds[part], 1e-9) for part, done in rates.items()}
        samples = self._samples(groups, advantages_PG)
        return Collected(rows, next_prompt, metrics, timing, samples, warnings)

    def validation_rewards(self, params: nnx.State, most: int) -> dict[str, float]:
        """The mean reward of the likeliest completions of held-out prompts, by corpus; of `most` prompts at most."""
        rewards = {}
        for name, prompts in self._prompts.items():
            if held_out := list(prompts.validation[:most]):
                completions = self._completions(params, held_out, dataclasses.replace(self._sampling, temperature=0.0))
                grades = self._grades(held_out, completions)
                rewards[name] = float(np.nanmean(grades.reward_PG))
        return rewards

    @property
    def _length(self) -> int:
        return self.stage.config.context_length

    @property
    def _sampling(self) -> Sampling:
        rollouts = self.settings.rollouts
        return Sampling(
            max_new_tokens=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            stop_ids=tuple({prompts.end_of_turn for prompts in self._prompts.values()}),
            repetition_tokens=rollouts.repetition_tokens,
            repetition_probability=rollouts.repetition_probability,
        )

    def _groups(
        self, params: nnx.State, generation: int, refill: int, first: int, count: int, seconds: dict[str, float]
    ) -> Groups:
        """The completions of prompts `first`, ..., with their grades."""
        prompts = self._draw(first, count)
        begin = time.perf_counter()
        sampling = dataclasses.replace(
            self._sampling,
            samples=self.settings.rollouts.samples,
            seed=fold_key("rollouts", self._seed, self.stage.name, generation, refill) % 2**31,
        )
        completions = self._completions(params, prompts, sampling)
        middle = time.perf_counter()
        grades = self._grades(prompts, completions)
        seconds["generation"] += middle - begin
        seconds["reward"] += time.perf_counter() - middle
        return Groups(prompts, completions, grades)

    def _draw(self, first: int, count: int) -> list[Prompt]:
        corpus_P, row_P = self._mixture.rows(first, count)
        drawn = []
        for corpus, row in zip(corpus_P, row_P, strict=True):
            name = self._mixture.names[corpus]
            train = self._prompts[name].train
            place = shuffled(np.array([row]), len(train), fold_key("prompts", self._seed, self.stage.name, name))
            drawn.append(train[int(place[0])])
        return drawn

    def _completions(self, params: nnx.State, prompts: list[Prompt], sampling: Sampling) -> list[list[Completion]]:
        generator = self._generator_of(params)
        groups: list[list[Completion]] = [[] for _ in prompts]
        self._progress("making rollouts")
        ids = [prompt.ids for prompt in prompts]
        if self._draws and sampling.temperature:
            completions = exact_completions(generator, self._drawn(params), ids, sampling, self._length)
        else:
            completions = generator.generate(ids, sampling)
        for completion in completions:
            groups[completion.prompt].append(completion)
            self._progress("making rollouts")
        return [sorted(group, key=lambda completion: completion.sample) for group in groups]

    def _drawn(self, params: nnx.State) -> Draw:
        def draw(rows: Batch) -> tuple[np.ndarray, np.ndarray]:
            self._progress("drawing rollouts by the training forward")
            return self._programs.by_rows(self.stage, self._draws, params, rows)

        return draw

    def _generator_of(self, params: nnx.State) -> Generator:
        mesh, weights = self._programs.to_generate(params)
        if self._generator is None:
            rollouts = self.settings.rollouts
            settings = GenerationSettings(
                slots=rollouts.slots,
                capacity=self._length + 1,
                prefill_tokens=rollouts.prefill_tokens,
                decode_steps=rollouts.decode_steps,
            )
            self._generator = Generator(self._model, weights, settings, mesh=mesh, tokenizer=self._tokenizer)
        self._generator.params = weights
        return self._generator

    def _grades(self, prompts: list[Prompt], completions: list[list[Completion]]) -> Grades:
        most = self.settings.rollouts.max_new_tokens
        return grade(self._reward, self.settings.rewards, prompts, completions, max_new_tokens=most)

    def _informative(self, groups: Groups) -> np.ndarray:
        return informative_groups(groups.grades.score_PG, self.settings.advantages)

    def _scored(self, rows: Batch, params: nnx.State, reference: nnx.State | None) -> Batch:
        """The rows with the log-probabilities of the trainer as it is, and of the reference."""
        rows = rows | {OLD: self._programs.by_rows(self.stage, self._log_probs, params, rows)}
        if reference is not None:
            rows[REFERENCE] = self._programs.by_rows(self.stage, self._log_probs, reference, rows)
        return rows

    def _divergence(self, rows: Batch) -> np.ndarray | float:
        """What is taken off each completion's score [P, G]."""
        settings = self.settings.policy_gradient
        if not settings.kl_coefficient or settings.kl_in != "reward":
            return 0.0
        each_NT = kl_estimate(settings.kl_estimator, rows[OLD], rows[REFERENCE])
        total_N = np.sum(np.asarray(each_NT), axis=1, where=rows["loss_mask"])
        return settings.kl_coefficient * total_N.reshape(self.num_prompts, -1)

    def _metrics(self, first: Groups, rows: Batch) -> dict[str, float]:
        """Of the first prompts, before any were replaced, so that no selection flatters the reward."""
        completions = [completion for group in first.completions for completion in group]
        tokens = np.array([len(completion.ids) for completion in completions])
        gap = log_prob_gap(rows[RECORDED], rows[OLD], rows["loss_mask"])
        return {
            "reward": float(np.nanmean(first.grades.reward_PG)),
            "score": float(np.nanmean(first.grades.score_PG)),
            "best_reward": float(np.mean(np.nanmax(first.grades.reward_PG, axis=1))),
            "ungraded": int(np.sum(np.isnan(first.grades.reward_PG))),
            "equal_reward_groups": float(np.mean(~self._informative(first))),
            "completion_tokens": float(tokens.mean()),
            "completion_tokens_99": float(np.quantile(tokens, 0.99)),
            **{
                f"{reason}_share": float(np.mean([each.finish_reason == reason for each in completions]))
                for reason in ("stop", "length", "repetition")
            },
            **{name: float(value) for name, value in gap.items()},
        }

    def _samples(self, groups: Groups, advantages_PG: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "prompt": self._tokenizer.decode(list(groups.prompts[p].ids)),
                "text": completion.text,
                "reward": float(groups.grades.reward_PG[p, g]),
                "reason": groups.grades.reasons[p][g],
                "score": float(groups.grades.score_PG[p, g]),
                "advantage": float(advantages_PG[p, g]),
                "finish_reason": completion.finish_reason,
            }
            for p in range(min(self.settings.rollouts.logged_prompts, len(groups.prompts)))
            for g, completion in enumerate(groups.completions[p])
        ]
