"""The numbers of a stage of reinforcement learning."""

from dataclasses import dataclass
from typing import Literal

from lightning_jax.objectives.config import AdvantageConfig, PolicyGradientConfig


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are made. Every token can be drawn: a truncated distribution would not be the policy's."""

    # fast: as the model generates. aligned: also with an fp32 head and without excess precision, for which
    # XLA_FLAGS must say --xla_allow_excess_precision=false; then bf16 is rounded alike in generation and training.
    # exact: the training forward draws, and the model's generation only proposes (lightning_jax/generation/exact.py).
    mode: Literal["fast", "aligned", "exact"]
    samples: int  # completions of each prompt
    updates: int  # optimizer steps on the rollouts of one policy: MiniMax-M1's 16 rounds
    max_new_tokens: int  # prompts that leave less than that of the context are left out
    temperature: float
    # A completion ends after so many tokens in a row that were each more probable than that (MiniMax-M1 section 3.2).
    repetition_tokens: int  # 0 for never
    repetition_probability: float
    slots: int  # completions that are decoded together
    prefill_tokens: int  # of a prompt's largest pieces
    decode_steps: int  # between two looks of the host
    # DAPO's dynamic sampling: prompts whose completions all have the same reward are replaced by further ones, up to
    # so many times; then the batch has fewer of them, and the run says so.
    dynamic_sampling: bool
    max_refills: int
    correlation_alarm: float  # says where the correlation of probabilities in rollout and trainer is below it
    logged_prompts: int  # of each generation, with all their completions, in samples.jsonl

    def problems(self) -> list[str]:
        least = {"samples": 1, "updates": 1, "max_new_tokens": 1, "slots": 1, "decode_steps": 1}
        least |= {"max_refills": 0, "repetition_tokens": 0, "logged_prompts": 0}
        found = [
            f"{name}: {getattr(self, name)} is too small; at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]
        if self.prefill_tokens < 16 or self.prefill_tokens % 16:
            found.append(f"prefill_tokens: {self.prefill_tokens} is no positive multiple of 16")
        if self.temperature <= 0:
            found.append(f"temperature: {self.temperature} is not positive; a policy that never explores cannot learn")
        if not 0 < self.repetition_probability < 1:
            found.append(f"repetition_probability: {self.repetition_probability} must lie between 0 and 1")
        if self.samples == 1 and self.dynamic_sampling:
            found.append("samples: with dynamic_sampling at least 2, of which one may be better than the other")
        return found


@dataclass(frozen=True)
class RewardConfig:
    """What a completion is worth: the weighted sum of rewards, changed by how it ended."""

    weights: dict[str, float]  # by the names of lightning_jax/reinforcement/grading.py
    # Of a completion that was cut or repeats itself. replace: is the reward (Tulu 3); subtract: is taken off it (TRL).
    unfinished: Literal["keep", "replace", "subtract"]
    unfinished_score: float
    # DAPO's overlong penalty: from 0 to -1 over the last so many tokens before max_new_tokens; 0 for none.
    overlong_buffer: int

    def problems(self) -> list[str]:
        found = [] if self.weights else ["weights: no reward; name one"]
        if self.overlong_buffer < 0:
            found.append(f"overlong_buffer: {self.overlong_buffer} is negative; 0 for none")
        if self.unfinished == "keep" and self.unfinished_score:
            found.append('unfinished_score: "keep" has no use for it; make it 0')
        if self.unfinished == "subtract" and self.unfinished_score < 0:
            found.append(f"unfinished_score: {self.unfinished_score} is taken off the reward; it cannot be negative")
        return found


@dataclass(frozen=True)
class ReinforcementConfig:
    """Reinforcement learning from verifiable rewards."""

    policy_gradient: PolicyGradientConfig
    advantages: AdvantageConfig
    rollouts: RolloutConfig
    rewards: RewardConfig

    def problems(self) -> list[str]:
        found = []
        if self.rewards.overlong_buffer >= self.rollouts.max_new_tokens:
            found.append(
                f"rewards.overlong_buffer: {self.rewards.overlong_buffer} is not less than "
                f"rollouts.max_new_tokens={self.rollouts.max_new_tokens}"
            )
        return found
