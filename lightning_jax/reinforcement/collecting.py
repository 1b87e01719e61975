"""One generation of rollouts: prompts, completions, rewards, further prompts for those that teach nothing, advantages.

`begin` makes completions, `verify` asks what they are worth, `complete` grades them and replaces prompts, `finish` has
the trainer score what there is and gives advantages. Each is a function of a policy, the generation's number and a
position; the policy that scores may have been trained since the completions were made, and verifiers work meanwhile.

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
from lightning_jax.input_pipeline.shuffle import fold_key
from lightning_jax.input_pipeline.tokenizers import Tokenizer
from lightning_jax.objectives.advantages import group_advantages, informative_groups
from lightning_jax.objectives.policy_gradient import ADVANTAGES, OLD, RECORDED, REFERENCE, kl_estimate
from lightning_jax.objectives.value import VALUES
from lightning_jax.programs import Programs
from lightning_jax.reinforcement.credit import with_credit, with_value_mask
from lightning_jax.reinforcement.experience import as_rows, with_advantages
from lightning_jax.reinforcement.generated import Begun, Generated, Groups
from lightning_jax.reinforcement.grading import Verdicts, grade, ungraded, verify
from lightning_jax.reinforcement.measures import measures, samples
from lightning_jax.reinforcement.sampling_policy import Place, Position, SamplingPolicy
from lightning_jax.rewards.reward import RewardFunction
from lightning_jax.stages import Stage


@dataclass(frozen=True)
class Collected:
    """A generation.

    Attributes:
        rows: to train on [N, T].
        metrics: of the generation, a function of the run.
        timing: of this machine.
        samples: some of the completions, as the record of a run keeps them.
        warnings: what somebody should know.
    """

    rows: Batch
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
        self._prompts, self._programs, self._reward = prompts, programs, reward
        self._tokenizer, self._progress = tokenizer, progress
        rows = stage.batch_sizes.rows(0)
        batches = self.settings.rollouts.updates // self.settings.rollouts.epochs
        self.num_prompts = batches * rows // self.settings.rollouts.samples
        self.num_generations = -(-stage.batch_sizes.num_steps // self.settings.rollouts.updates)
        mixture = Mixture(
            stage.config.mixture,
            prompts.keys(),
            self.num_generations * self.num_prompts,
            fold_key(stage.name, config.seed),
        )
        self._keys = (config.seed, stage.name)
        self.sampling_policy = SamplingPolicy(
            self.settings.rollouts, prompts, mixture, self.num_generations, self._keys
        )
        self._model = dataclasses.replace(config.model, rope_theta=stage.config.rope_theta)
        self._generator: Generator | None = None
        self._log_probs = programs.policy_log_prob_step(stage)
        self._values = programs.value.step(stage) if self.settings.value else None
        self._draws = programs.draw_step(stage) if self.settings.rollouts.mode == "exact" else None

    def generate(self, generation: int, position: Position, params: nnx.State) -> Generated:
        """Completions by the policy `params`, and their grades."""
        begun = self.begin(generation, position, params)
        return self.complete(begun, self.verify(begun), params)

    def begin(
        self, generation: int, position: Position, params: nnx.State, *, refill: int = 0, count: int | None = None
    ) -> Begun:
        """Completions of the next prompts by the policy `params`."""
        count = self.num_prompts if count is None else count
        limit, warnings = self.sampling_policy.limit(position), []
        places, position, exceptions = self.sampling_policy.draw(position, generation, count)
        if exceptions:
            warnings.append(
                f"generation {generation + 1}: no pass rate of a whole corpus is in the curriculum's range, so "
                f"{exceptions} of {count} prompts were asked in their turn"
            )
        start = time.perf_counter()
        sampling = dataclasses.replace(
            self._sampling,
            max_new_tokens=limit,
            samples=self.settings.rollouts.samples,
            seed=fold_key("rollouts", *self._keys, generation, refill) % 2**31,
        )
        completions = self._completions(params, self._asked(places), sampling)
        seconds = time.perf_counter() - start
        return Begun(generation, refill, position, places, completions, limit, seconds, warnings)

    def verify(self, begun: Begun) -> tuple[Verdicts, float]:
        """What the verifiers say, and the seconds that it took them."""
        start = time.perf_counter()
        verdicts = verify(self._reward, self._asked(begun.places), begun.completions)
        return verdicts, time.perf_counter() - start

    def complete(self, begun: Begun, verified: tuple[Verdicts, float], params: nnx.State) -> Generated:
        """The generation, with further prompts in place of those that teach nothing, if it is to have them.

        Args:
            params: those that made the completions.
        """
        rollouts, generation, limit, warnings = self.settings.rollouts, begun.generation, begun.limit, []
        position, seconds = begun.position, {"generation": 0.0, "reward": 0.0}

        def graded(begun: Begun, verified: tuple[Verdicts, float]) -> Groups:
            nonlocal position
            verdicts, seconds_of_reward = verified
            grades = grade(verdicts, self.settings.rewards, begun.completions, max_new_tokens=limit)
            position = self.sampling_policy.seen(begun.position, begun.places, grades.reward_PG)
            seconds["generation"] += begun.seconds
            seconds["reward"] += seconds_of_reward
            warnings.extend(begun.warnings)
            return Groups(begun.places, begun.completions, grades)

        first = groups = graded(begun, verified)
        if line := ungraded(first.grades):
            warnings.append(f"generation {generation + 1}: {line}")
        refills, informative_P = 0, self._informative(groups)
        while rollouts.dynamic_sampling and refills < rollouts.max_refills and not informative_P.all():
            refills += 1
            missing = int(np.sum(~informative_P))
            more = self.begin(generation, position, params, refill=refills, count=missing)
            further = graded(more, self.verify(more))
            order = np.argsort(~informative_P, kind="stable")
            groups = groups.take(order[: len(order) - missing].tolist()).and_also(further)
            informative_P = self._informative(groups)
        used_P = informative_P if rollouts.dynamic_sampling else np.ones(self.num_prompts, bool)
        if not used_P.all():
            warnings.append(
                f"generation {generation + 1}: after {refills} refills {int(np.sum(~used_P))} of {len(used_P)} prompts "
                "still have completions of equal reward, and are left out; the prompts are too easy or too hard"
            )
        metrics = measures(first, self._informative(first)) | {"refills": refills, "prompts": position.prompts}
        if metrics.get("length_correlation", 0) > self.settings.rewards.length_alarm:
            warnings.append(
                f"generation {generation + 1}: the reward likes length: among a prompt's completions they correlate by "
                f"{metrics['length_correlation']:.2f}, above {self.settings.rewards.length_alarm:g}; look at samples"
            )
        if rollouts.lengths:
            metrics["max_new_tokens"] = limit
        position = self.sampling_policy.measured(position, metrics["perplexity"], metrics["completion_tokens_99"])
        if self.sampling_policy.limit(position) != limit:
            warnings.append(
                f"generation {generation + 1}: completions converged near the limit of {limit:,} tokens, which now is "
                f"{self.sampling_policy.limit(position):,}"
            )
        tokens = sum(len(each.ids) for group in first.completions for each in group)
        timing = {f"{name}_seconds": value for name, value in seconds.items()}
        rates = {"generation": "generated", "reward": "rewarded"}
        timing |= {f"{done}_tokens_per_second": tokens / max(seconds[part], 1e-9) for part, done in rates.items()}
        asked = self._asked(groups.places)
        return Generated(
            rows=as_rows(asked, groups.completions, self._length),
            score_PG=groups.grades.score_PG,
            used_P=used_P,
            finished_N=np.array([each.finish_reason == "stop" for group in groups.completions for each in group]),
            position=position,
            metrics=metrics,
            timing=timing,
            samples=samples(groups, asked[: rollouts.logged_prompts], self._tokenizer),
            warnings=warnings,
        )

    def finish(
        self,
        generation: int,
        generated: Generated,
        params: nnx.State,
        reference: nnx.State | None = None,
        value: nnx.State | None = None,
    ) -> Collected:
        """What was generated, scored by the trainer as it is now.

        Args:
            params: of the policy, which may have been trained since.
            reference: the model as the stage began, where the objective asks for it.
            value: of the value model, where there is one.
        """
        begin = time.perf_counter()
        settings, rows, score_PG = self.settings, generated.rows, generated.score_PG
        if settings.value:
            rows = with_value_mask(rows, generated.finished_N, settings.value)
        rows = self._scored(rows, params, reference, value)
        gap = log_prob_gap(rows[RECORDED], rows[OLD], rows["loss_mask"])
        metrics = generated.metrics | {name: float(each) for name, each in gap.items()}
        metrics["padding_share"] = float(np.mean(rows["segment_ids"] == 0))
        divergence_NT = self._divergence(rows)
        if settings.value:
            used_PG = np.where(generated.used_P[:, None], score_PG, np.nan)
            rows = with_credit(rows, used_PG.reshape(-1), divergence_NT, settings.value)
        else:
            total_PG = np.sum(divergence_NT, axis=1).reshape(self.num_prompts, -1)
            advantages_PG = group_advantages(score_PG - total_PG, settings.advantages)
            rows = with_advantages(rows, advantages_PG, generated.used_P)
        seconds = time.perf_counter() - begin
        rate = int(np.sum(generated.rows["loss_mask"])) / max(seconds, 1e-9)
        timing = generated.timing | {"scoring_seconds": seconds, "scored_tokens_per_second": rate}
        warnings = list(generated.warnings)
        if metrics["probability_correlation"] < settings.rollouts.correlation_alarm:
            warnings.append(
                f"generation {generation + 1}: probabilities of rollouts and trainer correlate by "
                f"{metrics['probability_correlation']:.4f}, below {settings.rollouts.correlation_alarm}; see "
                "lightning_jax/generation/README.md for modes in which they are nearer"
            )
        if settings.rollouts.mode == "exact" and not settings.rollouts.staleness and metrics["log_prob_gap_max"]:
            warnings.append(
                f"generation {generation + 1}: log-probabilities of exact rollouts are up to "
                f"{metrics['log_prob_gap_max']:.1e} nats from the trainer's; here its forward depends on what shares "
                "a batch"
            )
        advantage_N = np.sum(rows[ADVANTAGES], axis=1) / np.maximum(np.sum(rows["loss_mask"], axis=1), 1)
        logged = [
            sample | {"advantage": float(advantage)}
            for sample, advantage in zip(generated.samples, advantage_N[: len(generated.samples)], strict=True)
        ]
        return Collected(rows, metrics, timing, logged, warnings)

    def validation_rewards(self, params: nnx.State, most: int) -> dict[str, float]:
        """The mean reward of the likeliest completions of held-out prompts, by corpus; of `most` prompts at most."""
        rewards = {}
        for name, prompts in self._prompts.items():
            if held_out := list(prompts.validation[:most]):
                completions = self._completions(params, held_out, dataclasses.replace(self._sampling, temperature=0.0))
                verdicts = verify(self._reward, held_out, completions)
                grades = grade(
                    verdicts, self.settings.rewards, completions, max_new_tokens=self._sampling.max_new_tokens
                )
                ungraded(grades)
                rewards[name] = float(np.nanmean(grades.reward_PG))
        return rewards

    @property
    def _length(self) -> int:
        return self.stage.config.context_length

    @property
    def _sampling(self) -> Sampling:
        """Of one completion of the longest that there may be."""
        rollouts = self.settings.rollouts
        return Sampling(
            max_new_tokens=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            stop_ids=tuple({prompts.end_of_turn for prompts in self._prompts.values()}),
            repetition_tokens=rollouts.repetition_tokens,
            repetition_probability=rollouts.repetition_probability,
        )

    def _asked(self, places: Sequence[Place]) -> list[Prompt]:
        return [self.sampling_policy.prompt(place) for place in places]

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
            return self._programs.by_rows(self.stage, self._draws, self._programs.weights(params), rows)

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

    def _informative(self, groups: Groups) -> np.ndarray:
        return informative_groups(groups.grades.score_PG, self.settings.advantages)

    def _scored(self, rows: Batch, params: nnx.State, reference: nnx.State | None, value: nnx.State | None) -> Batch:
        """The rows with the log-probabilities of the trainer as it is, and of the reference, and with values."""
        programs = self._programs
        rows = rows | {OLD: programs.by_rows(self.stage, self._log_probs, programs.weights(params), rows)}
        if reference is not None:
            weights = programs.weights(reference)
            rows[REFERENCE] = programs.by_rows(self.stage, self._log_probs, weights, rows)
        if self._values:
            rows[VALUES] = programs.by_rows(self.stage, self._values, value, rows)
        return rows

    def _divergence(self, rows: Batch) -> np.ndarray:
        """What is taken off the reward of each token [N, T]."""
        settings, mask_NT = self.settings.policy_gradient, rows["loss_mask"]
        if not settings.kl_coefficient or settings.kl_in != "reward":
            return np.zeros(mask_NT.shape)
        each_NT = np.asarray(kl_estimate(settings.kl_estimator, rows[OLD], rows[REFERENCE]))
        return settings.kl_coefficient * np.where(mask_NT, each_NT, 0)
