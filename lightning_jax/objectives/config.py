"""The numbers of the objectives."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PreferenceConfig:
    """Preference tuning; rewards are log-ratios to the reference, which is the model as the stage began."""

    # dpo (arXiv 2305.18290): of summed log-probabilities. dpo_norm (Tulu 3, arXiv 2411.15124 section 5.1.2) and ipo
    # (arXiv 2310.12036, equation 17): of their means over the tokens of each answer.
    loss: Literal["dpo", "dpo_norm", "ipo"]
    beta: float
    # cached: the reference's log-probabilities of all pairs are computed before the first step and kept in the run's
    # folder. live: its weights stay in memory and score each batch, which costs a forward pass more.
    reference: Literal["cached", "live"]

    def problems(self) -> list[str]:
        return [] if self.beta > 0 else [f"beta: {self.beta} is not positive"]


@dataclass(frozen=True)
class RewardModelConfig:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin) + centring (chosen + rejected)^2, of the scores."""

    use_margin: bool  # of the data (Llama 2, arXiv 2307.09288 section 3.2.2)
    centring: float  # arXiv 2312.09244; 0 for none

    def problems(self) -> list[str]:
        return [] if self.centring >= 0 else [f"centring: {self.centring} is negative; 0 for none"]


@dataclass(frozen=True)
class PolicyGradientConfig:
    """The one policy-gradient objective of which PPO, GRPO, DAPO, GSPO, CISPO and the others are presets.

    r is the ratio of a token's probabilities under the policy and as the rollouts began. The bounds of a weight are
    absolute, those of a mask are distances from 1, the epsilons of the papers.
    """

    ratio: Literal["token", "sequence"]  # sequence: exp of the mean log-ratio of the completion (GSPO)
    is_weight_min: float  # the importance weight is r clipped to [min, max]
    is_weight_max: float | None  # None for none; CISPO's only clip, and 1 + epsilon_high^IS in its paper's terms
    mask_low: float | None  # with a negative advantage, tokens of r < 1 - mask_low get no gradient; None for all do
    mask_high: float | None  # with a positive advantage, tokens of r > 1 + mask_high
    dual_clip: float | None  # with a negative advantage, tokens of r > dual_clip (arXiv 1912.09729)
    # What makes up for rollouts that another program computed: c, the ratio of the trainer's probability to the
    # recorded one. truncate: weights by min(c, max). mask: weights by c in [min, max], leaves out other tokens.
    rollout_correction: Literal["none", "truncate", "mask"]
    rollout_correction_min: float
    rollout_correction_max: float
    kl_estimator: Literal["k1", "k2", "k3", "probability_gap"]
    kl_coefficient: float  # of the divergence from the model as the stage began; 0 for none
    kl_in: Literal["loss", "reward"]
    reduction: Literal["token_mean", "sequence_mean", "constant"]  # over the optimizer step's batch
    constant_length: int  # tokens that each completion counts for, with the reduction "constant"; else 0

    def problems(self) -> list[str]:
        found = []
        if self.is_weight_min < 0:
            found.append(f"is_weight_min: {self.is_weight_min} is negative; 0 for no lower bound")
        if self.is_weight_max is not None and self.is_weight_max < max(self.is_weight_min, 1):
            found.append(
                f"is_weight_max: {self.is_weight_max} is an absolute cap and must be at least 1; epsilon_high^IS of "
                f"{self.is_weight_max} is is_weight_max={1 + self.is_weight_max}"
            )
        if self.is_weight_min > 1:
            found.append(f"is_weight_min: {self.is_weight_min} is above 1, the weight of a token on policy")
        for name in ("mask_low", "mask_high"):
            if (bound := getattr(self, name)) is not None and bound <= 0:
                found.append(f"{name}: {bound} is not positive; none for no mask")
        if self.dual_clip is not None and self.dual_clip <= 1:
            found.append(f"dual_clip: {self.dual_clip} is not above 1; 3 is common, none for none")
        if self.rollout_correction != "none" and not self.rollout_correction_min < 1 < self.rollout_correction_max:
            found.append("rollout_correction_min: with rollout_correction_max it must enclose 1")
        if self.kl_coefficient < 0:
            found.append(f"kl_coefficient: {self.kl_coefficient} is negative; 0 for none")
        if self.kl_in == "reward" and self.kl_estimator == "probability_gap":
            found.append('kl_estimator: "probability_gap" has a meaning in the loss only; kl_in="loss"')
        if (self.constant_length > 0) != (self.reduction == "constant"):
            found.append('constant_length: positive with reduction="constant", else 0')
        return found


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages."""

    # group: reward minus the mean of the prompt's completions (GRPO); leave_one_out: minus the mean of the others
    # (RLOO, arXiv 2402.14740); value: what a value model expects, token by token (PPO).
    baseline: Literal["group", "leave_one_out", "value"]
    # What the difference is divided by, plus std_epsilon: the standard deviation of the group or of all groups.
    std: Literal["none", "group", "batch"]
    std_ddof: int  # 0: of the samples themselves; 1: Bessel's correction, torch's default
    std_epsilon: float
    std_floor: float  # a smaller deviation counts as none: such a group's advantages are 0

    def problems(self) -> list[str]:
        found = [] if self.std_ddof in (0, 1) else [f"std_ddof: {self.std_ddof} is neither 0 nor 1"]
        for name in ("std_epsilon", "std_floor"):
            if getattr(self, name) < 0:
                found.append(f"{name}: {getattr(self, name)} is negative")
        if self.std == "none" and (self.std_ddof or self.std_epsilon):
            found.append('std: "none" divides by nothing; make std_ddof and std_epsilon 0')
        if self.baseline == "value" and self.std != "none":
            found.append('std: advantages by a value model are divided where value.whiten_advantages says so; "none"')
        return found
