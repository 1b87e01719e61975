"""Rewards made of rewards: a weighted sum of named ones, the one that a record asks for, another scale."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_jax.errors import UserError
from lightning_jax.rewards.reward import Completion, Reward, RewardFunction


@dataclass(frozen=True)
class WeightedSum:
    """The sum of weight x score over named rewards; without a score where one of them has none after all attempts.

    Attributes:
        rewards: by name, the weight and the reward. A weight of zero only watches: its score is in `parts`, and its
            failure takes no score away.
        attempts: how often completions are given to a reward that fails with `infra_error`, the first time included.
        pause: seconds before the second attempt; twice as many before each further one.
    """

    rewards: Mapping[str, tuple[float, RewardFunction]]
    attempts: int = 3
    pause: float = 1.0

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        parts = {name: self._persistent(name, completions) for name in self.rewards}
        return [self._sum({name: part[i] for name, part in parts.items()}) for i in range(len(completions))]

    def _persistent(self, name: str, completions: Sequence[Completion]) -> list[Reward]:
        """The rewards of one name; what fails is tried again, alone."""
        function = self.rewards[name][1]
        rewards = function(completions)
        for attempt in range(1, self.attempts):
            failed = [i for i, reward in enumerate(rewards) if reward.infra_error]
            if not failed:
                break
            time.sleep(self.pause * 2 ** (attempt - 1))
            for i, reward in zip(failed, function([completions[i] for i in failed]), strict=True):
                rewards[i] = reward
        return rewards

    def _sum(self, parts: Mapping[str, Reward]) -> Reward:
        weights = {name: weight for name, (weight, _) in self.rewards.items()}
        failed = [name for name, part in parts.items() if part.infra_error and weights[name]]
        if failed:
            reasons = "; ".join(f"{name}: {parts[name].reason}" for name in failed)
            return Reward(None, reasons, infra_error=True, parts=parts)
        score = sum(weights[name] * part.score for name, part in parts.items() if part.score is not None)
        reasons = "; ".join(f"{name} {_number(part.score)}: {part.reason}" for name, part in parts.items())
        return Reward(score, reasons, parts=parts)


@dataclass(frozen=True)
class ByDataset:
    """The reward that each record's `dataset` names, as in mixtures of verifiable tasks (Tulu 3, section 6).

    Raises:
        UserError: a record without `dataset`, or with one that has no reward.
    """

    rewards: Mapping[str, RewardFunction]

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        members: dict[Any, list[int]] = {}
        for i, completion in enumerate(completions):
            name = completion.record.get("dataset")
            if name not in self.rewards:
                known = ", ".join(self.rewards)
                raise UserError(f"record {i}: dataset={name!r} has no reward; there are rewards for {known}")
            members.setdefault(name, []).append(i)
        scored: dict[int, Reward] = {}
        for name, indices in members.items():
            rewards = self.rewards[name]([completions[i] for i in indices])
            scored.update(zip(indices, rewards, strict=True))
        return [scored[i] for i in range(len(completions))]


@dataclass(frozen=True)
class Rescaled:
    """(score - shift) / scale, between `low` and `high`; the score as it was is in `parts`."""

    reward: RewardFunction
    shift: float
    scale: float
    low: float
    high: float

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        return [self._rescaled(reward) for reward in self.reward(completions)]

    def _rescaled(self, reward: Reward) -> Reward:
        if reward.score is None:
            return reward
        score = min(max((reward.score - self.shift) / self.scale, self.low), self.high)
        return Reward(score, f"{reward.reason} (from {reward.score:g})", parts={"unscaled": reward})


def _number(score: float | None) -> str:
    return "none" if score is None else f"{score:g}"
