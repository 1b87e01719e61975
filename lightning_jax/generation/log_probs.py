"""Log-probabilities as the trainer computes them, beside those that generation recorded.

Reinforcement learning weights a token by the ratio of its probabilities under two policies. Where the same weights give
another probability in training than in generation, that ratio is wrong before any learning: the gap is a metric.

Source: MiniMax-M1 (arXiv 2506.13585) section 3.2 and figure 3.

Shapes: B batch, T sequence, C chunk, N chunks, D model dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax.models import HybridLM


def token_log_probs(
    model: HybridLM,
    batch: dict[str, jax.Array],
    *,
    temperature: float | jax.Array = 1.0,
    rope_theta: float | jax.Array | None = None,
) -> jax.Array:
    """The log-probability [B, T] of every target by the training forward, at least fp32, in nats.

    Args:
        batch: `inputs`, `targets`, `segment_ids` and `positions` [B, T], as for training; packed or not.
        temperature: divides the logits, as in sampling; 0 stands for 1, as in the log-probabilities of greedy samples.
    """
    hidden_BTD, _ = model(
        batch["inputs"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"], rope_theta=rope_theta
    )
    temperature = jnp.where(temperature == 0, 1, temperature)
    return map_logits(
        model, hidden_BTD, batch["targets"], lambda logits, targets: target_log_probs(logits / temperature, targets)
    )


def map_logits(
    model: HybridLM, hidden_BTD: jax.Array, targets_BT: jax.Array, function: Callable[[jax.Array, jax.Array], Any]
) -> Any:
    """function(logits [B, C, V], targets [B, C]) of every chunk of tokens, each of its results joined to [B, T].

    Chunks are as long as those of the training loss, so that logits [B, T, V] never exist.
    """
    B, T, _ = hidden_BTD.shape
    chunk = min(model.config.loss_chunk, T)

    def chunks(x_BTX: jax.Array) -> jax.Array:
        x_BTX = jnp.pad(x_BTX, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x_BTX.ndim - 2))
        return jnp.moveaxis(x_BTX.reshape(B, -1, chunk, *x_BTX.shape[2:]), 1, 0)

    results_NBC = jax.lax.map(
        lambda inputs: function(model.logits(inputs[0]), inputs[1]), (chunks(hidden_BTD), chunks(targets_BT))
    )
    return jax.tree.map(lambda x_NBC: jnp.moveaxis(x_NBC, 0, 1).reshape(B, -1)[:, :T], results_NBC)


def target_log_probs(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    """log softmax(logits)[target], in nats."""
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)


def completion_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], length: int
) -> dict[str, np.ndarray]:
    """A row for each prompt with its completion, as training takes it: `loss_mask` is where targets are completion.

    Args:
        length: of the rows; no prompt and completion together have more than one token more.
    """
    batch = {name: np.zeros((len(prompts), length), np.int32) for name in ("inputs", "targets", "segment_ids")}
    batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (len(prompts), 1))
    batch["loss_mask"] = np.zeros((len(prompts), length), bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = [*prompt, *completion]
        size = len(ids) - 1
        batch["inputs"][row, :size], batch["targets"][row, :size] = ids[:-1], ids[1:]
        batch["segment_ids"][row, :size] = 1
        batch["loss_mask"][row, len(prompt) - 1 : size] = True
    return batch


def log_prob_gap(generated: jax.Array, trained: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """How far the log-probabilities of generation are from the trainer's, over tokens where `mask`.

    Returns:
        `log_prob_gap_max` and `log_prob_gap_mean` of the absolute differences in nats, and `probability_correlation`,
        Pearson's, of the probabilities, which MiniMax-M1 watches.
    """
    count = jnp.maximum(jnp.sum(mask), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x, where=mask) / count

    gap = jnp.where(mask, jnp.abs(generated - trained), 0)
    p, q = (jnp.exp(log_probs) for log_probs in (generated, trained))
    p, q = p - mean(p), q - mean(q)
    return {
        "log_prob_gap_max": jnp.max(gap),
        "log_prob_gap_mean": mean(gap),
        "probability_correlation": mean(p * q) / jnp.sqrt(mean(p * p) * mean(q * q)),
    }
