"""A trained reward model as a reward: its score of the prompt with the completion as its last message."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_jax.rewards.reward import Completion, Reward


class ScoresChats(Protocol):
    """What `lightning_jax.trained_reward_model.load_reward_model` returns, or anything that does the same."""

    def scores(self, chats: Sequence[Sequence[Mapping[str, Any]]], /) -> Iterable[float]: ...


@dataclass(frozen=True)
class RewardModelReward:
    """The model's score, of no particular scale: `Rescaled` brings it to that of other rewards."""

    model: ScoresChats

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        if not completions:
            return []
        chats = [[*each.prompt, {"role": "assistant", "content": each.text}] for each in completions]
        return [Reward(float(score), "reward model") for score in self.model.scores(chats)]
