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
