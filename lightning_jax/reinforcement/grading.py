"""Completions to scores: the rewards that a config names, and what the end of a completion costs.

Sources: the overlong penalty, DAPO (arXiv 2503.14476) equation 13; a reward in place of an unfinished completion's,
Tulu 3 (arXiv 2411.15124) section 6.

Shapes: P prompts, G completions of each.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lightning_jax.config import nearest_name
from lightning_jax.errors import UserError
from lightning_jax.generation import Completion as Sampled
from lightning_jax.input_pipeline.prompts import Prompt
from lightning_jax.reinforcement.config import RewardConfig
from lightning_jax.rewards import (
    ByDataset,
    CodeReward,
    Completion,
    Endpoint,
    FormatReward,
    IFEvalReward,
    Judge,
    MathReward,
    OwnReward,
    Rescaled,
    RewardFunction,
    RewardModelReward,
    Sandbox,
    Tulu3IFEvalReward,
    WeightedSum,
    compared,
    graded,
    gsm8k_reward,
    puzzle_reward,
)
from lightning_jax.trained_reward_model import load_reward_model


@dataclass(frozen=True)
class Opening:
    """What rewards are opened with: their numbers, what ends the processes that they need, and who is told."""

    config: RewardConfig
    stack: contextlib.ExitStack
    say: Callable[[str], None]

    def math(self) -> RewardFunction:
        return self.stack.enter_context(MathReward())

    def code(self) -> RewardFunction:
        sandbox = Sandbox(self.config.code_workers, unsafe=self.config.unsafe_code)
        return CodeReward(self.stack.enter_context(sandbox))

    def tulu3(self) -> RewardFunction:
        """By the data sets of RLVR-GSM-MATH-IF-Mixed."""
        return ByDataset({"gsm8k": gsm8k_reward, "MATH": self.math(), "ifeval": Tulu3IFEvalReward()})

    def minimax_m1(self) -> RewardFunction:
        """By the kinds of task of MiniMax-M1's sections 4.1 and 4.2."""
        verified = {"math": self.math(), "logic": puzzle_reward, "code": self.code()}
        return ByDataset(verified | {"general_graded": self.graded_judge(), "general": self.pairwise_judge()})

    def graded_judge(self) -> RewardFunction:
        return Judge(self._endpoint(), graded, self.config.judge.threads)

    def pairwise_judge(self) -> RewardFunction:
        return Judge(self._endpoint(), compared, self.config.judge.threads)

    def reward_model(self) -> RewardFunction:
        use = self.config.reward_model
        reward = RewardModelReward(load_reward_model(use.folder, say=self.say))
        return Rescaled(reward, use.shift, use.scale, use.low, use.high)

    def _endpoint(self) -> Endpoint:
        judge = self.config.judge
        key = os.environ.get(judge.api_key_variable) if judge.api_key_variable else None
        if judge.api_key_variable and not key:
            raise UserError(f"rewards.judge.api_key_variable: {judge.api_key_variable} is not set in the environment")
        options = {"temperature": judge.temperature, "max_tokens": judge.max_tokens}
        return Endpoint(judge.url, judge.model, key, options, judge.seconds)


REWARDS: dict[str, Callable[[Opening], RewardFunction]] = {
    "gsm8k": lambda opening: gsm8k_reward,
    "math": Opening.math,
    "ifeval": lambda opening: IFEvalReward(),
    "code": Opening.code,
    "puzzle": lambda opening: puzzle_reward,
    "tulu3": Opening.tulu3,
    "reward_model": Opening.reward_model,
    "minimax_m1": Opening.minimax_m1,
    "form": lambda opening: FormatReward(think_is_open=False, answer_tags=False),
    "graded_judge": Opening.graded_judge,
    "pairwise_judge": Opening.pairwise_judge,
}


def open_rewards(config: RewardConfig, stack: contextlib.ExitStack, say: Callable[[str], None]) -> RewardFunction:
    """The weighted sum that the config names; what it needs (processes) ends with the stack.

    Raises:
        UserError: a name that is no reward, or what it needs is not here.
    """
    unknown = [name for name in config.weights if name not in REWARDS and ":" not in name]
    if unknown:
        lines = [f"rewards.weights.{name}: no such reward; {nearest_name(name, REWARDS)}" for name in unknown]
        raise UserError("\n".join(lines))
    opening = Opening(config, stack, say)

    def opened(name: str) -> RewardFunction:
        return REWARDS[name](opening) if name in REWARDS else OwnReward.of(name)

    return WeightedSum({name: (weight, opened(name)) for name, weight in config.weights.items()})


class Verdicts(NamedTuple):
    """What verifiers say of completions [N], on process 0; nothing on the others."""

    reward_N: np.ndarray  # float64; NaN where they could not
    reasons: list[str]


class Grades(NamedTuple):
    """What completions are worth."""

    reward_PG: np.ndarray  # as the verifiers say, float64; NaN where they could not
    score_PG: np.ndarray  # with what the end costs
    reasons: list[list[str]]  # on process 0; "" on the others


def verify(function: RewardFunction, prompts: Sequence[Prompt], groups: Sequence[Sequence[Sampled]]) -> Verdicts:
    """Asks the verifiers about the completions of each prompt, on process 0: clocks may tell processes apart.

    It uses no devices but those of the rewards, and so may run beside a training step.
    """
    completions = [
        Completion(
            prompt=prompt.chat,
            text=sampled.text or "",
            tokens=len(sampled.ids),
            finished=sampled.finish_reason == "stop",
            record=prompt.record,
        )
        for prompt, group in zip(prompts, groups, strict=True)
        for sampled in group
    ]
    if jax.process_index():
        return Verdicts(np.full(len(completions), np.nan), [""] * len(completions))
    rewards = function(completions)
    values = [np.nan if reward.score is None else reward.score for reward in rewards]
    return Verdicts(np.array(values), [reward.reason for reward in rewards])


def grade(
    verdicts: Verdicts, config: RewardConfig, groups: Sequence[Sequence[Sampled]], *, max_new_tokens: int
) -> Grades:
    """Scores by the verdicts, the same on all processes."""
    reward_N = verdicts.reward_N
    if jax.process_count() > 1:
        reward_N = np.asarray(multihost_utils.broadcast_one_to_all(reward_N))
    sampled = [each for group in groups for each in group]
    scores = [
        shaped(
            reward,
            config,
            len(each.ids),
            finished=each.finish_reason == "stop",
            max_new_tokens=max_new_tokens,
        )
        for reward, each in zip(reward_N, sampled, strict=True)
    ]
    shape = (len(groups), -1)
    reasons = np.array(verdicts.reasons, object).reshape(shape).tolist()
    return Grades(reward_N.reshape(shape), np.array(scores).reshape(shape), reasons)


def ungraded(grades: Grades) -> str | None:
    """What to say of completions that no verifier could grade, one of them with its reason; None where all have grades.

    Raises:
        UserError: these are all of them: what verifiers need is away, and there is nothing to learn from.
    """
    missing_PG = np.isnan(grades.reward_PG)
    if not missing_PG.any():
        return None
    p, g = np.unravel_index(np.argmax(missing_PG), missing_PG.shape)
    if missing_PG.all():
        raise UserError(f"no verifier could grade any of {missing_PG.size:,} completions: {grades.reasons[p][g]}")
    return f"{missing_PG.sum():,} of {missing_PG.size:,} completions have no reward: {grades.reasons[p][g]}"


def shaped(reward: float, config: RewardConfig, tokens: int, *, finished: bool, max_new_tokens: int) -> float:
    """The score of a completion of so many tokens."""
    score = reward
    if not finished:
        match config.unfinished:
            case "replace":
                score = config.unfinished_score
            case "subtract":
                score = reward - config.unfinished_score
    if config.overlong_buffer:
        over = tokens - (max_new_tokens - config.overlong_buffer)
        score -= min(max(over / config.overlong_buffer, 0.0), 1.0)
    return score
