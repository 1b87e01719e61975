"""One generation of rollouts: prompts, completions, rewards, further prompts for those that teach nothing.

`begin` makes completions, `verify` asks what they are worth, and may do so while others are made or trained on,
`complete` grades them and replaces prompts. All are functions of a policy, the generation's number and a position.

Source: dynamic sampling, DAPO (arXiv 2503.14476) section 3.2.

Shapes: P prompts of a generation, G completions of each, N = P * G rows, T tokens of a row.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_jax.config import RunConfig
from lightning_jax.input_pipeline import Mixture
from lightning_jax.input_pipeline.prompts import Prompt, Prompts
from lightning_jax.input_pipeline.shuffle import fold_key
from lightning_jax.input_pipeline.tokenizers import Tokenizer
from lightning_jax.objectives.advantages import informative_groups
from lightning_jax.reinforcement.experience import as_rows
from lightning_jax.reinforcement.generated import Begun, Generated, Groups
from lightning_jax.reinforcement.grading import Verdicts, grade, ungraded, verify
from lightning_jax.reinforcement.measures import measures, samples
from lightning_jax.reinforcement.rollout_generator import RolloutGenerator
from lightning_jax.reinforcement.sampling_policy import Position, PromptPlace, SamplingPolicy
from lightning_jax.rewards.reward import RewardFunction
from lightning_jax.stages import Stage


class Collector:
    """Collects the generations of a stage.

    Args:
        prompts: of the stage's corpora.
        generator: makes completions by the policy that it has loaded.
        reward: grades completions.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        prompts: Mapping[str, Prompts],
        tokenizer: Tokenizer,
        generator: RolloutGenerator,
        reward: RewardFunction,
    ):
        self._settings, self._length = stage.config.reinforcement, stage.config.context_length
        self._prompts, self._tokenizer, self._generator, self._reward = prompts, tokenizer, generator, reward
        rollouts = self._settings.rollouts
        rows = stage.batch_sizes.rows(0)
        self.num_prompts = rollouts.updates // rollouts.epochs * rows // rollouts.samples
        self.num_generations = -(-stage.batch_sizes.num_steps // rollouts.updates)
        mixture = Mixture(
            stage.config.mixture,
            prompts.keys(),
            self.num_generations * self.num_prompts,
            fold_key(stage.name, config.seed),
        )
        self._keys = (config.seed, stage.name)
        self.sampling_policy = SamplingPolicy(rollouts, prompts, mixture, self.num_generations, self._keys)

    def generate(self, generation: int, position: Position) -> Generated:
        """Completions of the next prompts, and their grades."""
        begun = self.begin(generation, position)
        return self.complete(begun, self.verify(begun))

    def begin(self, generation: int, position: Position, *, refill: int = 0, count: int | None = None) -> Begun:
        """Completions of the next prompts."""
        count = self.num_prompts if count is None else count
        limit, warnings = self.sampling_policy.limit(position), []
        places, position, exceptions = self.sampling_policy.draw(position, generation, count)
        if exceptions:
            warnings.append(
                f"generation {generation + 1}: no pass rate of a whole corpus is in the curriculum's range, so "
                f"{exceptions} of {count} prompts were asked in their turn"
            )
        seed = fold_key("rollouts", *self._keys, generation, refill) % 2**31
        start = time.perf_counter()
        completions = self._generator.completions(self._asked(places), limit=limit, seed=seed)
        seconds = time.perf_counter() - start
        return Begun(generation, refill, position, places, completions, limit, seconds, warnings)

    def verify(self, begun: Begun) -> tuple[Verdicts, float]:
        """What the verifiers say, and the seconds that it took them."""
        start = time.perf_counter()
        verdicts = verify(self._reward, self._asked(begun.places), begun.completions)
        return verdicts, time.perf_counter() - start

    def complete(self, begun: Begun, verified: tuple[Verdicts, float]) -> Generated:
        """The generation, with further prompts in place of those that teach nothing, if it is to have them.

        They are asked of the policy that is loaded: the one that `begun` is by.
        """
        rollouts, generation, limit, warnings = self._settings.rollouts, begun.generation, begun.limit, []
        position, made = begun.position, []

        def graded(begun: Begun, verified: tuple[Verdicts, float]) -> Groups:
            nonlocal position
            verdicts, seconds_of_reward = verified
            grades = grade(verdicts, self._settings.rewards, begun.completions, max_new_tokens=limit)
            position = self.sampling_policy.seen(begun.position, begun.places, grades.reward_PG)
            made.append((begun, seconds_of_reward))
            warnings.extend(begun.warnings)
            return Groups(begun.places, begun.completions, grades)

        first = groups = graded(begun, verified)
        if line := ungraded(first.grades):
            warnings.append(f"generation {generation + 1}: {line}")
        refills, informative_P = 0, self._informative(groups)
        while rollouts.dynamic_sampling and refills < rollouts.max_refills and not informative_P.all():
            refills += 1
            missing = int(np.sum(~informative_P))
            more = self.begin(generation, position, refill=refills, count=missing)
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
        if metrics.get("length_correlation", 0) > self._settings.rewards.length_alarm:
            warnings.append(
                f"generation {generation + 1}: the reward likes length: among a prompt's completions they correlate by "
                f"{metrics['length_correlation']:.2f}, above {self._settings.rewards.length_alarm:g}; look at samples"
            )
        if rollouts.lengths:
            metrics["max_new_tokens"] = limit
        position = self.sampling_policy.measured(position, metrics["perplexity"], metrics["completion_tokens_99"])
        if self.sampling_policy.limit(position) != limit:
            warnings.append(
                f"generation {generation + 1}: completions converged near the limit of {limit:,} tokens, which now is "
                f"{self.sampling_policy.limit(position):,}"
            )
        asked = self._asked(groups.places)
        return Generated(
            rows=as_rows(asked, groups.completions, self._length),
            score_PG=groups.grades.score_PG,
            used_P=used_P,
            finished_N=np.array([each.finish_reason == "stop" for group in groups.completions for each in group]),
            position=position,
            metrics=metrics,
            timing=_timing(made),
            samples=samples(groups, asked[: rollouts.logged_prompts], self._tokenizer),
            warnings=warnings,
        )

    def validation_rewards(self, most: int) -> dict[str, float]:
        """The mean reward of the likeliest completions of held-out prompts, by corpus; of `most` prompts at most."""
        rewards = {}
        for name, prompts in self._prompts.items():
            if held_out := list(prompts.validation[:most]):
                completions = self._generator.likeliest(held_out)
                verdicts = verify(self._reward, held_out, completions)
                limit = self._settings.rollouts.max_new_tokens
                grades = grade(verdicts, self._settings.rewards, completions, max_new_tokens=limit)
                ungraded(grades)
                rewards[name] = float(np.nanmean(grades.reward_PG))
        return rewards

    def _asked(self, places: Sequence[PromptPlace]) -> list[Prompt]:
        return [self.sampling_policy.prompt(place) for place in places]

    def _informative(self, groups: Groups) -> np.ndarray:
        return informative_groups(groups.grades.score_PG, self._settings.advantages)


def _timing(made: Sequence[tuple[Begun, float]]) -> dict[str, float]:
    """Of all completions, those of further prompts too, each with the seconds of its verifiers."""
    tokens = sum(len(each.ids) for begun, _ in made for group in begun.completions for each in group)
    generation = sum(begun.seconds for begun, _ in made)
    reward = sum(seconds for _, seconds in made)
    return {
        "generation_seconds": generation,
        "generated_tokens_per_second": tokens / max(generation, 1e-9),
        "reward_seconds": reward,
        "rewarded_tokens_per_second": tokens / max(reward, 1e-9),
    }
