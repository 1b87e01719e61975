"""Advantages from rewards: relative to the prompt's other completions, or from a value model (GAE).

On the host and in float64: rewards are a few numbers, and what is divided by is often nearly zero.

Sources: GRPO (arXiv 2402.03300) section 4.1.2, Dr. GRPO (arXiv 2503.20783) without the division, RLOO (arXiv
2402.14740), GAE (arXiv 1506.02438) equation 16.

Shapes: P prompts, G completions of each, B rows, T tokens.
"""

import numpy as np

from lightning_jax.objectives.config import AdvantageConfig


def group_advantages(scores_PG: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """An advantage [P, G] for every completion, float64; 0 for all of a group whose rewards are equal.

    Args:
        scores_PG: rewards; NaN for a completion that has none, whose advantage is 0 and which no other one sees.
    """
    known_PG = ~np.isnan(scores_PG)
    count_P1 = known_PG.sum(1, keepdims=True)
    centred_PG = _centred(scores_PG, known_PG, axis=1)
    advantages_PG = centred_PG
    if config.baseline == "leave_one_out":
        # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        advantages_PG = centred_PG * count_P1 / np.maximum(count_P1 - 1, 1)
    if config.std != "none":
        if config.std == "group":
            deviation = _deviation(centred_PG, count_P1, config.std_ddof, axis=1)
        else:
            everything_PG = _centred(scores_PG, known_PG, axis=None)
            deviation = _deviation(everything_PG, known_PG.sum(keepdims=True), config.std_ddof, axis=None)
        advantages_PG = advantages_PG / np.where(deviation > 0, deviation + config.std_epsilon, 1)
    return np.where(informative_groups(scores_PG, config)[:, None], advantages_PG, 0)


def informative_groups(scores_PG: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """Whether the completions of each prompt have different rewards, bool [P]: only then they teach anything.

    What is left of equal rewards is rounding, which a small divisor would make large.
    """
    known_PG = ~np.isnan(scores_PG)
    centred_PG = _centred(scores_PG, known_PG, axis=1)
    return _deviation(centred_PG, known_PG.sum(1, keepdims=True), 0, axis=1)[:, 0] > config.std_floor


def generalized_advantages(
    rewards_BT: np.ndarray, values_BT: np.ndarray, mask_BT: np.ndarray, *, discount: float, trace: float
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns) [B, T] of generalized advantage estimation, float64.

    Args:
        rewards_BT: of each token.
        values_BT: predicted before each token; behind the last one the value is 0.
        mask_BT: bool; tokens outside (a tool's output, padding) are passed over, and so are their rewards.
        discount: gamma.
        trace: lambda.
    """
    rewards_BT, values_BT = np.asarray(rewards_BT, np.float64), np.asarray(values_BT, np.float64)
    advantages_BT = np.zeros_like(values_BT)
    advantage_B, value_B = np.zeros(len(values_BT)), np.zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        error_B = rewards_BT[:, t] + discount * value_B - values_BT[:, t]
        advantage_B = np.where(mask_BT[:, t], error_B + discount * trace * advantage_B, advantage_B)
        value_B = np.where(mask_BT[:, t], values_BT[:, t], value_B)
        advantages_BT[:, t] = advantage_B
    advantages_BT = np.where(mask_BT, advantages_BT, 0)
    return advantages_BT, np.where(mask_BT, advantages_BT + values_BT, 0)


def whitened(
    values_BT: np.ndarray, mask_BT: np.ndarray, *, keep_mean: bool = False, epsilon: float = 1e-8
) -> np.ndarray:
    """With mean 0, unless it is kept, and variance 1 (Bessel's) over the mask, and 0 outside of it, as PPO has it."""
    inside = np.asarray(values_BT, np.float64)[mask_BT]
    white_BT = np.zeros(values_BT.shape)
    if inside.size > 1:
        mean = inside.mean()
        white_BT[mask_BT] = (inside - mean) / np.sqrt(inside.var(ddof=1) + epsilon) + mean * keep_mean
    return white_BT


def _centred(scores_PG: np.ndarray, known_PG: np.ndarray, axis: int | None) -> np.ndarray:
    scores_PG = np.where(known_PG, scores_PG, 0).astype(np.float64)
    mean = np.sum(scores_PG, axis=axis, keepdims=True) / np.maximum(np.sum(known_PG, axis=axis, keepdims=True), 1)
    return np.where(known_PG, scores_PG - mean, 0)


def _deviation(centred_PG: np.ndarray, count: np.ndarray, ddof: int, axis: int | None) -> np.ndarray:
    return np.sqrt(np.sum(centred_PG**2, axis=axis, keepdims=True) / np.maximum(count - ddof, 1))
