"""Which prompts are asked next and how long their completions may be, decided by the completions so far.

Sources: MiniMax-M1 (arXiv 2506.13585): samples filtered by pass rate, section 4.1; output lengths from 40K to 80K
tokens, each left when the perplexity of what is generated has converged and the 99th percentile of its lengths comes
near the limit, section 5.

Shapes: P prompts, G completions of each.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from lightning_jax.errors import UserError
from lightning_jax.input_pipeline import Mixture
from lightning_jax.input_pipeline.packing import Batch
from lightning_jax.input_pipeline.prompts import Prompt, Prompts
from lightning_jax.input_pipeline.shuffle import fold_key, shuffled
from lightning_jax.reinforcement.config import LengthsConfig, RolloutConfig

RATES = "pass_rates/"  # in the arrays of a position, before the name of a corpus


@dataclass(frozen=True)
class Position:
    """All that the next generation depends on besides the policy.

    Attributes:
        prompts: how many were asked.
        skipped: how many were not, by corpus, because of their pass rates.
        length_stage: which of the output lengths is the limit.
        history: of the generations at this limit, (perplexity, 99th percentile of completion tokens).
        pass_rates: by corpus, of each prompt as it was last asked, float32; nan where it never was.
    """

    prompts: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    length_stage: int = 0
    history: tuple[tuple[float, float], ...] = ()
    pass_rates: Mapping[str, np.ndarray] = field(default_factory=dict)

    def arrays(self) -> Batch:
        """As a file keeps it."""
        facts = {name: value for name, value in vars(self).items() if name != "pass_rates"}
        rates = {f"{RATES}{name}": rates for name, rates in self.pass_rates.items()}
        return {"position": np.array(json.dumps(facts)), **rates}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `arrays`; others may stand among them."""
        facts = json.loads(str(arrays["position"]))
        facts["history"] = tuple(map(tuple, facts["history"]))
        rates = {name.removeprefix(RATES): array for name, array in arrays.items() if name.startswith(RATES)}
        return cls(**facts, pass_rates=rates)

    @classmethod
    def taken_from(cls, arrays: Mapping[str, np.ndarray]) -> tuple[Self, Batch]:
        """The position in a file's arrays, and those that stand beside it."""
        position = cls.of_arrays(arrays)
        own = position.arrays()
        return position, {name: array for name, array in arrays.items() if name not in own}


class PromptPlace(NamedTuple):
    """Where a prompt is found."""

    corpus: str
    index: int


class SamplingPolicy:
    """The choices of a stage, each a function of a position.

    Args:
        prompts: of the stage's corpora.
        num_generations: of the stage, over which the curriculum moves.

    Raises:
        UserError: no prompt of a corpus passes the sample filter.
    """

    def __init__(
        self,
        config: RolloutConfig,
        prompts: Mapping[str, Prompts],
        mixture: Mixture,
        num_generations: int,
        keys: tuple[int | str, ...],
    ):
        self._config, self._mixture, self._num_generations, self._keys = config, mixture, num_generations, keys
        self._train = {name: _filtered(name, each.train, config.sample_filter) for name, each in prompts.items()}
        self._known = {
            name: np.array([prompt.record.get("pass_rate", np.nan) for prompt in train], np.float32)
            for name, train in self._train.items()
        }

    @property
    def sizes(self) -> dict[str, int]:
        """How many prompts of each corpus there are to train on."""
        return {name: len(train) for name, train in self._train.items()}

    def limit(self, position: Position) -> int:
        """The most tokens of a completion."""
        lengths = self._config.lengths
        return lengths.limits[position.length_stage] if lengths else self._config.max_new_tokens

    def draw(self, position: Position, generation: int, count: int) -> tuple[list[PromptPlace], Position, int]:
        """The next `count` prompts, the position behind them, and how many of them nothing but their turn speaks for.

        With a curriculum prompts are passed over whose pass rate lies outside of the generation's range. Such a prompt
        is asked again a pass later, unless its record says the rate: the policy has changed by then.
        """
        places, skipped, exceptions = [], dict(position.skipped), 0
        rates = {name: each.copy() for name, each in position.pass_rates.items()}
        corpus_P, row_P = self._mixture.rows(position.prompts, count)
        for corpus, row in zip(corpus_P, row_P, strict=True):
            name = self._mixture.names[corpus]
            first = int(row) + skipped.get(name, 0)
            for passed_over in range(len(self._train[name])):
                index = self._index(name, first + passed_over)
                if self._wanted(name, index, rates, generation):
                    break
                if name in rates:
                    rates[name][index] = np.nan
            else:
                passed_over, index, exceptions = 0, self._index(name, first), exceptions + 1
            if passed_over:
                skipped[name] = skipped.get(name, 0) + passed_over
            places.append(PromptPlace(name, index))
        after = dataclasses.replace(position, prompts=position.prompts + count, skipped=skipped, pass_rates=rates)
        return places, after, exceptions

    def prompt(self, place: PromptPlace) -> Prompt:
        return self._train[place.corpus][place.index]

    def seen(self, position: Position, places: Sequence[PromptPlace], reward_PG: np.ndarray) -> Position:
        """The position that knows how often the completions of these prompts were right."""
        curriculum = self._config.curriculum
        if not curriculum:
            return position
        rates = {
            name: position.pass_rates.get(name, np.full(len(train), np.nan, np.float32)).copy()
            for name, train in self._train.items()
        }
        for place, reward_G in zip(places, reward_PG, strict=True):
            known_G = reward_G[~np.isnan(reward_G)]
            if len(known_G):
                rates[place.corpus][place.index] = np.mean(known_G >= curriculum.passing_reward)
        return dataclasses.replace(position, pass_rates=rates)

    def measured(self, position: Position, perplexity: float, longest: float) -> Position:
        """The position behind a generation, at the next output length where that of the last ones says so.

        Args:
            longest: 99th percentile of completion tokens.
        """
        lengths = self._config.lengths
        if not lengths or position.length_stage + 1 == len(lengths.limits):
            return position
        history = (*position.history, (perplexity, longest))[-2 * lengths.window :]
        if ready(lengths, history, self.limit(position)):
            return dataclasses.replace(position, length_stage=position.length_stage + 1, history=())
        return dataclasses.replace(position, history=history)

    def _index(self, name: str, row: int) -> int:
        return int(shuffled(np.array([row]), len(self._train[name]), fold_key("prompts", *self._keys, name))[0])

    def _wanted(self, name: str, index: int, rates: Mapping[str, np.ndarray], generation: int) -> bool:
        curriculum = self._config.curriculum
        if not curriculum:
            return True
        rate = rates[name][index] if name in rates else np.nan
        rate = self._known[name][index] if np.isnan(rate) else rate
        moved = min(generation / max(self._num_generations - 1, 1), 1)
        least, most = ((1 - moved) * a + moved * b for a, b in zip(curriculum.start, curriculum.end, strict=True))
        return bool(np.isnan(rate) or least <= rate <= most)


def ready(config: LengthsConfig, history: Sequence[tuple[float, float]], limit: int) -> bool:
    """Whether the perplexity no longer changes and the longest completions come near the limit."""
    if len(history) < 2 * config.window:
        return False
    perplexity, longest = np.array(history)[-2 * config.window :].T
    before, now = perplexity[: config.window].mean(), perplexity[config.window :].mean()
    return bool(
        abs(now - before) <= config.perplexity_change * before
        and longest[config.window :].mean() >= config.length_share * limit
    )


def _filtered(name: str, prompts: Sequence[Prompt], wanted: Mapping[str, tuple[float, ...]]) -> tuple[Prompt, ...]:
    """The prompts whose records' numbers lie strictly between their bounds; a field that a record lacks is no bound."""

    def inside(record: Mapping[str, Any]) -> bool:
        return all(low < record[name] < high for name, (low, high) in wanted.items() if name in record)

    kept = tuple(prompt for prompt in prompts if inside(prompt.record))
    if not kept:
        bounds = ", ".join(f"{field} between {low:g} and {high:g}" for field, (low, high) in wanted.items())
        raise UserError(f"data.corpora.{name}: none of its {len(prompts):,} prompts has {bounds}; widen sample_filter")
    return kept
