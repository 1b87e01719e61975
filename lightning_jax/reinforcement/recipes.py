"""The vocabulary in which configs/*.py describe reinforcement learning; every function names what it leaves open."""

import dataclasses
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from lightning_jax.objectives.config import AdvantageConfig, PolicyGradientConfig


def reinforcement(
    policy_gradient: PolicyGradientConfig,
    *,
    advantages: AdvantageConfig,
    value: ConfigDict | None = None,
    rollouts: Mapping[str, object],
    rewards: Mapping[str, object],
) -> ConfigDict:
    """The section of a stage."""
    return ConfigDict(
        {
            "policy_gradient": dataclasses.asdict(policy_gradient),
            "advantages": dataclasses.asdict(advantages),
            "value": value,
            "rollouts": dict(rollouts),
            "rewards": dict(rewards),
        }
    )


def group_relative(*, std: str = "group", std_ddof: int = 1, std_epsilon: float = 1e-6) -> AdvantageConfig:
    """GRPO's advantages; deviations below a thousandth are rounding."""
    divides = std != "none"
    return AdvantageConfig(
        baseline="group",
        std=std,
        std_ddof=std_ddof if divides else 0,
        std_epsilon=std_epsilon if divides else 0.0,
        std_floor=1e-3,
    )


LEAVE_ONE_OUT = dataclasses.replace(group_relative(std="none"), baseline="leave_one_out")
OF_VALUE_MODEL = dataclasses.replace(LEAVE_ONE_OUT, baseline="value")


def value_model(
    *,
    reward_model: str = "",
    optimizer: ConfigDict,
    schedule: ConfigDict,
    warmup_steps: int = 0,
) -> ConfigDict:
    """Tulu 3's (arXiv 2411.15124, section 6): generalized advantages with lambda 0.95, the score behind the end."""
    return ConfigDict(
        {
            "reward_model": reward_model,
            "model": None,
            "discount": 1.0,
            "trace": 0.95,
            "reward_position": "after_eos",
            "whiten_rewards": False,
            "whiten_advantages": True,
            "clip": 0.2,
            "coefficient": 0.1,
            "warmup_steps": warmup_steps,
            "optimizer": optimizer,
            "schedule": schedule,
        }
    )


def rollouts(
    *,
    samples: int,
    updates: int,
    epochs: int = 1,
    staleness: int = 0,
    devices: Mapping[str, int] | None = None,
    max_new_tokens: int,
    slots: int,
    dynamic_sampling: bool,
    max_refills: int = 10,
    mode: str = "fast",
    repetition_tokens: int = 0,
    decode_steps: int = 32,
    prefill_tokens: int = 256,
    lengths: Mapping[str, object] | None = None,
    sample_filter: Mapping[str, Sequence[float]] | None = None,
    curriculum: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Rollouts at temperature 1; ten refills are those of DAPO's published script."""
    return {
        "mode": mode,
        "samples": samples,
        "updates": updates,
        "epochs": epochs,
        "staleness": staleness,
        "devices": devices or {},
        "max_new_tokens": max_new_tokens,
        "lengths": lengths,
        "sample_filter": sample_filter or {},
        "curriculum": curriculum,
        "temperature": 1.0,
        "repetition_tokens": repetition_tokens,
        "repetition_probability": 0.99,
        "slots": slots,
        "prefill_tokens": prefill_tokens,
        "decode_steps": decode_steps,
        "dynamic_sampling": dynamic_sampling,
        "max_refills": max_refills if dynamic_sampling else 0,
        "correlation_alarm": 0.99,
        "logged_prompts": 1,
    }


def rewards(
    *,
    unfinished: str = "keep",
    unfinished_score: float = 0.0,
    overlong_buffer: int = 0,
    model: Mapping[str, str | float] | None = None,
    judge: Mapping[str, str | float | int] | None = None,
    code_workers: int = 2,
    **weights: float,
) -> dict[str, object]:
    """The weighted sum of rewards by their names; `model` and `judge` are what "reward_model" and judges need."""
    return {
        "weights": weights,
        "reward_model": model,
        "judge": judge,
        "code_workers": code_workers,
        "unsafe_code": False,
        "length_alarm": 0.3,  # ours
        "unfinished": unfinished,
        "unfinished_score": unfinished_score,
        "overlong_buffer": overlong_buffer,
    }
