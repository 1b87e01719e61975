"""The public function: checks its arguments, fills in what was left out, and hands over to an implementation.

Source: MiniMax-01 (arXiv 2501.08313) section 2.2.
Shapes: B batch, T sequence, H heads, K key dim, V value dim.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.chunked import chunked_lightning_attention
from pallas_kernels.gpu import plans as gpu
from pallas_kernels.reference import recurrent_lightning_attention
from pallas_kernels.tpu import attention as tpu
from pallas_kernels.varying import vary_alike

Implementation = Literal["auto", "xla", "pallas_tpu", "pallas_gpu", "reference"]

DTYPES = ("bfloat16", "float32", "float64")


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = False,
    implementation: Implementation = "auto",
    chunk_size: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal linear attention with a decay per head: S_t = λ S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, λ = exp(log_decay).

    There is no scale, no softmax and no denominator, and token t sees itself with weight 1. State, decays and sums are
    fp32 (fp64 for fp64 inputs); bf16 inputs are multiplied as bf16.

    Args:
      q, k: [B, T, H, K], any T ≥ 1.
      v: [B, T, H, V], of the dtype of q and k: bfloat16, float32 or float64.
      log_decay: [H], ≤ 0. A constant of the architecture: gradients do not flow into it.
      segment_ids: [B, T] integers. The state restarts from zero wherever the id changes from one token to the next;
        equal ids further apart are different documents. None: each row is one document.
      initial_state: [B, H, K, V] in float32 (float64 for fp64 inputs), of the first token's document. None: zeros.
      return_final_state: whether to return the state behind the last token as well, of the last token's document.
        It continues the sequence as the `initial_state` of a further call.
      implementation: "xla" works chunk by chunk on any platform; "pallas_tpu" is the kernel for TPUs, "pallas_gpu" the
        one for Hopper GPUs; "reference" works token by token, to compare with; "auto" takes what
        `choose_implementation` says.
      chunk_size: tokens per chunk. It changes speed and rounding only. None: chosen for the platform.

    Returns:
      o [B, T, H, V] in v's dtype, or (o, final_state [B, H, K, V]). Differentiable in q, k, v and initial_state.

    Raises:
      ValueError: on shapes, dtypes or values other than these.
    """
    state_dtype = _check(q, k, v, log_decay, segment_ids, initial_state, implementation, chunk_size)
    log_decay = lax.stop_gradient(jnp.asarray(log_decay, state_dtype))
    batch, _, heads, key_dim = q.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), state_dtype)
    operands = vary_alike(q, k, v, log_decay, segment_ids, initial_state)
    if implementation == "auto":
        implementation = choose_implementation(key_dim, v.shape[-1], q.dtype).name
    o, final_state = RUN[implementation](*operands, chunk_size)
    return (o, final_state) if return_final_state else o


class Choice(NamedTuple):
    """What "auto" stands for: the name of an implementation, and in a few words why."""

    name: Implementation
    why: str


def choose_implementation(key_dim: int, value_dim: int, dtype: jnp.dtype) -> Choice:
    """What `implementation="auto"` takes on this process's default device, for heads and inputs like these."""
    platform = jax.default_backend()
    if platform == "tpu":
        obstacle = tpu.obstacle(key_dim, value_dim, dtype)
        if obstacle:
            return Choice("xla", obstacle)
        return Choice("pallas_tpu", f"the kernel for TPU {tpu.generation().removeprefix('tpu')}")
    if platform == "gpu":
        obstacle = gpu.obstacle(key_dim, value_dim, dtype)
        return Choice("xla", obstacle) if obstacle else Choice("pallas_gpu", "the kernel for Hopper GPUs")
    return Choice("xla", f"no kernel for {platform}; the portable form runs everywhere")


def _run_reference(q, k, v, log_decay, segment_ids, initial_state, chunk_size):
    return recurrent_lightning_attention(q, k, v, log_decay, segment_ids, initial_state)


def _run_xla(q, k, v, log_decay, segment_ids, initial_state, chunk_size):
    size = min(chunk_size or _default_chunk_size(), q.shape[1])
    return chunked_lightning_attention(q, k, v, log_decay, segment_ids, initial_state, size)


def _run_pallas_gpu(*arguments):
    # Mosaic GPU takes a second to import, and older versions of JAX lack parts of it.
    from pallas_kernels.gpu.attention import lightning_attention

    return lightning_attention(*arguments)


RUN: dict[Implementation, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "reference": _run_reference,
    "xla": _run_xla,
    "pallas_tpu": tpu.lightning_attention,
    "pallas_gpu": _run_pallas_gpu,
}


def _default_chunk_size() -> int:
    # Work per token grows with the chunk (C within, K across), the number of sequential steps falls. A CPU is fastest
    # at 64 for K = 64 and 128; a matrix unit is 128 wide, and smaller chunks would leave rows of it empty.
    return 64 if jax.default_backend() == "cpu" else 128


def _check(q, k, v, log_decay, segment_ids, initial_state, implementation, chunk_size) -> jnp.dtype:
    """Raises ValueError on the first argument that is wrong; returns the dtype of the state."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"lightning_attention: q has shape {q.shape}; it must be [B, T, H, K], none of them 0")
    if k.shape != q.shape:
        raise ValueError(f"lightning_attention: k has shape {k.shape}; it must be q's, {q.shape}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"lightning_attention: v has shape {v.shape}; it must be {(*q.shape[:3], 'V')} to match q")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise ValueError(
            f"lightning_attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; "
            f"they must share one of {', '.join(DTYPES)}"
        )
    batch, length, heads, key_dim = q.shape
    if jnp.shape(log_decay) != (heads,):
        raise ValueError(
            f"lightning_attention: log_decay has shape {jnp.shape(log_decay)}; it must be [H] = ({heads},)"
        )
    if not isinstance(log_decay, jax.core.Tracer) and not (np.asarray(log_decay) <= 0).all():
        raise ValueError("lightning_attention: log_decay must be ≤ 0 for every head; pass -slope, not slope")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(
            f"lightning_attention: segment_ids has shape {segment_ids.shape}; it must be [B, T] = {(batch, length)}"
        )
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"lightning_attention: segment_ids has dtype {segment_ids.dtype}; it must be integers")
    state_dtype = jnp.promote_types(q.dtype, jnp.float32)
    state_shape = (batch, heads, key_dim, v.shape[-1])
    if initial_state is not None and (initial_state.shape != state_shape or initial_state.dtype != state_dtype):
        raise ValueError(
            f"lightning_attention: initial_state is {initial_state.dtype}{list(initial_state.shape)}; "
            f"it must be {state_dtype}{list(state_shape)}, [B, H, K, V]"
        )
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"lightning_attention: implementation is {implementation!r}; it must be one of {get_args(Implementation)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"lightning_attention: chunk_size is {chunk_size}; it must be at least 1")
    return state_dtype
