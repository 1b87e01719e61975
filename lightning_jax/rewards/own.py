"""A reward of the user's own: a Python function that a config names by `module:function`."""

import importlib
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from lightning_jax.errors import UserError
from lightning_jax.rewards.reward import Completion, Reward


@dataclass(frozen=True)
class OwnReward:
    """What the function gives to a batch of completions: for each a number or a `Reward`.

    Whatever it raises is told as a mistake in it, with the line; a verifier that may fail through nobody's fault
    returns `Reward.infra` instead.

    Attributes:
        name: `module:function`.
    """

    name: str
    function: Callable[[Sequence[Completion]], Sequence[Any]]

    @classmethod
    def of(cls, name: str) -> Self:
        """Imports it, from where Python finds modules: the folder that the command is given in, too.

        Raises:
            UserError: there is no such module or function, or importing it fails.
        """
        module, _, function = name.partition(":")
        try:
            return cls(name, getattr(importlib.import_module(module), function))
        except Exception as error:
            raise UserError(f"rewards.weights.{name}: {_line(error)}") from error

    def __call__(self, completions: Sequence[Completion], /) -> list[Reward]:
        try:
            given = self.function(completions)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"rewards.weights.{self.name}: {_line(error)}") from error
        try:
            rewards = [_reward(each) for each in given]
        except (TypeError, ValueError) as error:
            raise UserError(f"rewards.weights.{self.name}: {error}; a number or a Reward for each completion") from None
        if len(rewards) != len(completions):
            raise UserError(f"rewards.weights.{self.name}: {len(rewards)} rewards for {len(completions)} completions")
        return rewards


def _reward(given: Any) -> Reward:
    if isinstance(given, Reward):
        return given
    if not isinstance(given, numbers.Real):
        raise TypeError(f"{given!r} is neither")
    return Reward(float(given), "")


def _line(error: Exception) -> str:
    """What happened, and where in the user's files, if it was there."""
    ours = (__file__, importlib.__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {error}{place}"
