"""Whether a reward likes length: watched while it trains, and asked with padding.

Source: MiniMax-M1 (arXiv 2506.13585), section 4.2.2, where a judge that likes length is detected in the run and
recalibrated.
"""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lightning_jax.rewards.reward import Completion, Reward, RewardFunction

FEWEST = 32  # completions before a correlation says anything


class LengthBias:
    """A reward, watched: `correlation` is that of score and length among completions of one prompt.

    Scores and log lengths are taken relative to their mean over the completions of their prompt in the batch. So what
    is found is no property of prompts, of which the hard ones have long answers and low scores.

    Args:
        reward: what is watched; its rewards pass unchanged.
        window: so many of the last completions count.
        alarm: `say` is called once each time the correlation goes above it.
        say: takes one line.
    """

    def __init__(self, reward: RewardFunction, *, window: int, alarm: float, say: Callable[[str], None]):
        self._reward, self._alarm, self._say = reward, alarm, say
        self._seen: deque[tuple[float, float]] = deque(maxlen=window)
        self._alarmed = False

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        rewards = self._reward(completions)
        groups: dict[str, list[tuple[int, float]]] = {}
        for completion, reward in zip(completions, rewards, strict=True):
            if reward.score is not None:
                key = json.dumps(completion.prompt, default=str)
                groups.setdefault(key, []).append((completion.tokens, reward.score))
        for group in groups.values():
            self._seen.extend(map(tuple, relative(group)))
        above = self.correlation is not None and self.correlation > self._alarm
        if above and not self._alarmed:
            self._say(
                f"the reward likes length: correlation {self.correlation:.2f} over the last {len(self._seen)} "
                f"completions is above {self._alarm:g}; look at samples, and calibrate the judge"
            )
        self._alarmed = above
        return rewards

    @property
    def correlation(self) -> float | None:
        """None while there are too few completions, or no differences among them."""
        return correlation(self._seen) if len(self._seen) >= FEWEST else None


def relative(group: Sequence[tuple[int, float]]) -> np.ndarray:
    """(log length, score) of the completions of one prompt, less their mean; none of a completion alone."""
    if len(group) < 2:
        return np.zeros((0, 2))
    pairs = np.array([(np.log1p(tokens), score) for tokens, score in group])
    return pairs - pairs.mean(axis=0)


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Of the two numbers of each pair, whose means are 0; None where one of them never differs."""
    lengths, scores = np.array(pairs).reshape(-1, 2).T
    spread = lengths.std() * scores.std() if len(lengths) else 0.0
    return float((lengths * scores).mean() / spread) if spread > 1e-12 else None


def padding_gain(reward: RewardFunction, completions: Sequence[Completion], padding: str) -> float:
    """How much a reward gives for padding, text that says nothing: the mean difference of scores. Zero is right.

    Completions without a score, with the padding or without, are left out; nan where all are.
    """
    padded = [replace(each, text=f"{each.text}\n\n{padding}") for each in completions]
    pairs = zip(reward(completions), reward(padded), strict=True)
    gains = [b.score - a.score for a, b in pairs if a.score is not None and b.score is not None]
    return float(np.mean(gains)) if gains else float("nan")
