"""Credit by a value model: where the score of a completion stands, and the advantage of each of its tokens.

A row's place t has the value of what stands up to input t and the reward of choosing target t. With the score behind
the end token, the value of the whole completion is asked too: what the end token did is then told by two predictions.

Sources: GAE (arXiv 1506.02438); the score behind the end, the divergence by the token and whitening, Tulu 3
(arXiv 2411.15124) section 6 as its trainer computed them.

Shapes: N rows, T tokens of a row.
"""

import numpy as np

from lightning_jax.input_pipeline.packing import Batch
from lightning_jax.objectives.advantages import generalized_advantages, whitened
from lightning_jax.objectives.policy_gradient import ADVANTAGES
from lightning_jax.objectives.value import RETURNS, VALUE_MASK, VALUES
from lightning_jax.reinforcement.config import ValueConfig


def with_value_mask(rows: Batch, finished_N: np.ndarray, config: ValueConfig) -> Batch:
    """The rows with the places whose values are asked; those behind an end token have it as their input.

    Args:
        finished_N: whether the completion ended by itself; a cut one goes on, so there is nothing behind it.
    """
    mask_NT = rows["loss_mask"].copy()
    if config.reward_position == "eos":
        return rows | {VALUE_MASK: mask_NT}
    last_N, length = _last_places(mask_NT), mask_NT.shape[1]
    ended_M = np.flatnonzero(finished_N & (last_N + 1 < length))
    behind = ended_M, last_N[ended_M] + 1
    inputs_NT, segment_ids_NT = rows["inputs"].copy(), rows["segment_ids"].copy()
    inputs_NT[behind] = rows["targets"][ended_M, last_N[ended_M]]
    segment_ids_NT[behind] = segment_ids_NT[ended_M, last_N[ended_M]]
    mask_NT[behind] = True
    return rows | {"inputs": inputs_NT, "segment_ids": segment_ids_NT, VALUE_MASK: mask_NT}


def with_credit(rows: Batch, score_N: np.ndarray, penalty_NT: np.ndarray | float, config: ValueConfig) -> Batch:
    """The rows with advantages and returns, from `VALUES`; a completion without a score counts nowhere.

    Args:
        score_N: of each completion; nan for none.
        penalty_NT: what is taken off each token's reward, a divergence.
    """
    counts_N = ~np.isnan(score_N)
    mask_NT, value_mask_NT = (rows[name] & counts_N[:, None] for name in ("loss_mask", VALUE_MASK))
    reward_NT = np.where(mask_NT, -np.asarray(penalty_NT, np.float64), 0.0)
    reward_NT[np.arange(len(score_N)), _last_places(rows[VALUE_MASK])] += np.where(counts_N, score_N, 0)
    if config.whiten_rewards:
        reward_NT = whitened(reward_NT, value_mask_NT, keep_mean=True)
    advantages_NT, returns_NT = generalized_advantages(
        reward_NT, rows[VALUES], value_mask_NT, discount=config.discount, trace=config.trace
    )
    advantages_NT = np.where(mask_NT, advantages_NT, 0)
    if config.whiten_advantages:
        advantages_NT = whitened(advantages_NT, mask_NT)
    return rows | {
        "loss_mask": mask_NT,
        VALUE_MASK: value_mask_NT,
        ADVANTAGES: advantages_NT.astype(np.float32),
        RETURNS: returns_NT.astype(np.float32),
    }


def _last_places(mask_NT: np.ndarray) -> np.ndarray:
    return mask_NT.shape[1] - 1 - np.argmax(mask_NT[:, ::-1], axis=1)
