"""What a reward is: a batch of completions in, for each a score with its reason.

A verifier that could not do its work (a process that died, an endpoint that was away) has no opinion of the completion.
It says so with `infra_error`, and the completion is tried again or left out; it never counts as wrong.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from lightning_jax.errors import UserError


@dataclass(frozen=True)
class Completion:
    """What a model said to a prompt, and what is known about the prompt.

    Attributes:
        prompt: the chat that was completed, as `{"role": ..., "content": ...}`.
        text: of the completion, without special tokens.
        tokens: how many were sampled, with the one that ended it.
        finished: whether it ended by itself, by a stop token, and was not cut.
        record: the data record of the prompt, with what its verifier reads: `ground_truth`, say.
    """

    prompt: Sequence[Mapping[str, Any]]
    text: str
    tokens: int
    finished: bool
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Reward:
    """What a completion is worth and why.

    Attributes:
        score: None exactly where `infra_error` is set.
        reason: one line, for whoever reads samples.
        infra_error: the verifier failed, not the completion.
        parts: the rewards this one was made of, by name.
    """

    score: float | None
    reason: str
    infra_error: bool = False
    parts: Mapping[str, "Reward"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.score is None) != self.infra_error:
            raise ValueError(
                f"a reward has either a score or infra_error, not score={self.score} and {self.infra_error}"
            )
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"a reward's score has to be a finite number, not {self.score}: {self.reason}")

    @classmethod
    def infra(cls, reason: str) -> Self:
        """No score, because the verifier failed."""
        return cls(None, reason, infra_error=True)


class RewardFunction(Protocol):
    """Scores a batch, in its order. A mistake of the user (a record without `ground_truth`) raises UserError."""

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]: ...


def required(completion: Completion, name: str) -> Any:
    """A field of a completion's record.

    Raises:
        UserError: it has none of that name.
    """
    if name not in completion.record:
        raise UserError(f"a record without {name}, which its reward reads; it has {', '.join(completion.record)}")
    return completion.record[name]
