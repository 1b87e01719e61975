"""Errors of lightning attention on this device against the recurrence in fp64 on the CPU.

The inputs are normal, with an initial state and with gradients of the outputs and of the final state; the heads' decays
reach from none to the steepest of a model with 64 heads. Rows of `case.documents` documents have borders anywhere.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_roofline import Case

from pallas_kernels import lightning_attention

NAMES = ("o", "final state", "dq", "dk", "dv", "d initial state")
SLOPES = (0.0, 0.004, 0.1, 0.92)
LIMITS = {"float32": 1e-5, "bfloat16": 2.0}
LONGEST_BY_TOKENS = 2048  # beyond it the oracle is the chunked form in fp64, which equals the recurrence to 1e-12


def errors(implementation: str, case: Case, dtype: str) -> dict[str, float]:
    """Of each result: in float32 the largest error over the largest magnitude, at most 1e-5; in bfloat16 the error's
    norm over that of rounding the exact result to bfloat16, at most 2."""
    arrays = draw(case, dtype)
    results = attend(*arrays, implementation=implementation)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        oracle = "reference" if case.length <= LONGEST_BY_TOKENS else "xla"
        exact = attend(*(jnp.asarray(np.asarray(x), _widest(x)) for x in arrays), implementation=oracle)
        exact = [np.asarray(x) for x in exact]
    pairs = zip(NAMES, (np.asarray(x, np.float64) for x in results), exact, strict=True)
    return {name: _relative(x, y) if dtype == "float32" else _over_rounding(x, y) for name, x, y in pairs}


def draw(case: Case, dtype: str) -> list[jax.Array]:
    """q, k, v, initial state, log decays, segment ids, do and the gradient of the final state."""
    rng = np.random.default_rng(0)
    B, H, K, T = case[:4]
    q, k, v, do = (jnp.asarray(rng.standard_normal((B, T, H, K), np.float32), dtype) for _ in range(4))
    state, d_state = (jnp.asarray(rng.standard_normal((B, H, K, K), np.float32)) for _ in range(2))
    ids = np.cumsum(rng.random((B, T)) < (case.documents - 1) / T, axis=1, dtype=np.int32)
    log_decay = -jnp.asarray(np.resize(SLOPES, H), jnp.float32)
    return [q, k, v, state, log_decay, jnp.asarray(ids), do, d_state]


@partial(jax.jit, static_argnames="implementation")
def attend(q, k, v, state, log_decay, ids, do, d_state, *, implementation):
    def attention(q, k, v, state):
        return lightning_attention(
            q,
            k,
            v,
            log_decay,
            segment_ids=ids,
            initial_state=state,
            return_final_state=True,
            implementation=implementation,
        )

    outputs, pull_back = jax.vjp(attention, q, k, v, state)
    return *outputs, *pull_back((do, d_state))


def _widest(x: jax.Array) -> Any:
    return np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else np.float64


def _relative(x: np.ndarray, exact: np.ndarray) -> float:
    return float(np.abs(x - exact).max() / np.abs(exact).max())


def _over_rounding(x: np.ndarray, exact: np.ndarray) -> float:
    rounding = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact
    return float(np.linalg.norm(x - exact) / np.linalg.norm(rounding))
