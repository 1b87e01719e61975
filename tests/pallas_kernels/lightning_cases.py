"""Inputs for lightning attention, and what it must return for them by loops over tokens in numpy: the oracle's oracle.

Shapes: B batch, T sequence, H heads, K key dim, V value dim.
"""

import inspect
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import lightning_attention

DECAYS = (0.0, 0.004, 0.1, 0.92)  # slopes from "never forgets" to the steepest head of 64


class Case(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    initial_state: np.ndarray
    log_decay: np.ndarray
    segment_ids: np.ndarray | None
    do: np.ndarray
    d_final_state: np.ndarray


class Results(NamedTuple):
    o: np.ndarray
    final_state: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    d_initial_state: np.ndarray


def random_case(length, *, batch=2, key_dim=8, value_dim=5, slopes=DECAYS, borders=None, seed=0) -> Case:
    """Normal inputs in fp64; `borders`: expected documents per row, or None for rows of one document."""
    rng = np.random.default_rng(seed)
    heads = len(slopes)
    q, k = rng.standard_normal((2, batch, length, heads, key_dim))
    v, do = rng.standard_normal((2, batch, length, heads, value_dim))
    initial_state, d_final_state = rng.standard_normal((2, batch, heads, key_dim, value_dim))
    segment_ids = None
    if borders is not None:
        # Modulo 3: ids come back, and step down as well as up.
        segment_ids = (np.cumsum(rng.random((batch, length)) < borders / length, axis=1) % 3).astype(np.int32)
    return Case(q, k, v, initial_state, -np.array(slopes), segment_ids, do, d_final_state)


def by_loops(case: Case) -> Results:
    """The recurrence and its derivative, token by token in fp64."""
    q, k, v, state, log_decay, segment_ids, do, d_state = (
        None if x is None else np.asarray(x, np.int64 if x.dtype.kind == "i" else np.float64) for x in case
    )
    length = q.shape[1]
    decay = np.exp(log_decay)[None, :, None, None]
    ids = np.zeros(q.shape[:2]) if segment_ids is None else segment_ids
    keep = [np.ones((len(ids), 1, 1, 1))] + [
        (ids[:, t] == ids[:, t - 1])[:, None, None, None] for t in range(1, length)
    ]
    states, o = [], np.zeros(v.shape)
    for t in range(length):
        state = decay * keep[t] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        states.append(state)
        o[:, t] = (state * q[:, t, :, :, None]).sum(-2)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for t in reversed(range(length)):
        d_state = d_state + q[:, t, :, :, None] * do[:, t, :, None, :]
        dq[:, t] = (states[t] * do[:, t, :, None, :]).sum(-1)
        dk[:, t] = (d_state * v[:, t, :, None, :]).sum(-1)
        dv[:, t] = (d_state * k[:, t, :, :, None]).sum(-2)
        d_state = decay * keep[t] * d_state
    return Results(o, state, dq, dk, dv, d_state)


@partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def _run(q, k, v, initial_state, log_decay, segment_ids, do, d_final_state, implementation, chunk_size):
    def attention(q, k, v, initial_state):
        return lightning_attention(
            q,
            k,
            v,
            log_decay,
            segment_ids=segment_ids,
            initial_state=initial_state,
            return_final_state=True,
            implementation=implementation,
            chunk_size=chunk_size,
        )

    outputs, pull_back = jax.vjp(attention, q, k, v, initial_state)
    return *outputs, *pull_back((do, d_final_state))


def by_jax(case: Case, dtype, *, implementation="xla", chunk_size=None) -> Results:
    """lightning_attention and its derivative on the case rounded to `dtype`."""
    state_dtype = jnp.promote_types(dtype, jnp.float32)
    dtypes = Case(dtype, dtype, dtype, state_dtype, state_dtype, jnp.int32, dtype, state_dtype)
    arrays = [None if x is None else jnp.asarray(x, to) for x, to in zip(case, dtypes, strict=True)]
    return Results(*_run(*arrays, implementation=implementation, chunk_size=chunk_size))


def of_magnitudes(case: Case) -> Results:
    """The results of the inputs without their signs: how large what adds up to each result is, where it cancels too."""
    signed = {"log_decay": case.log_decay, "segment_ids": case.segment_ids}
    return by_loops(Case(**{name: np.abs(x) for name, x in case._asdict().items() if name not in signed}, **signed))


def assert_close(actual: Results, expected: Results, tolerance: float, scale: Results | None = None):
    """Every difference is at most `tolerance` times the largest magnitude of its array in `scale`: in `expected`, or
    with `of_magnitudes` where an array may have a single element, whose terms may cancel."""
    for name, x, y, large in zip(Results._fields, actual, expected, scale or expected, strict=True):
        difference = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max() / np.abs(large).max()
        assert difference <= tolerance, f"{name} differs by {difference:.1e}"


def race_options(interpreter_params: type) -> dict[str, object]:
    """Of an interpreter that watches for races and goes on where it finds one, so that it can be asked afterwards.

    Newer versions raise there, unless told not to, and then leave their state as it was.
    """
    on_race = {"on_race": "warn"} if "on_race" in inspect.signature(interpreter_params).parameters else {}
    return {"detect_races": True} | on_race


def assert_bf16_costs_only_rounding(case: Case, **options):
    """With bf16 inputs no error is more than twice that of rounding the exact result to bf16."""
    inputs = ("q", "k", "v", "do")
    rounded = case._replace(
        **{name: np.asarray(jnp.asarray(getattr(case, name), jnp.bfloat16), np.float64) for name in inputs}
    )
    results = by_jax(rounded, jnp.bfloat16, **options)
    assert results.o.dtype == results.dq.dtype == results.dk.dtype == results.dv.dtype == jnp.bfloat16
    assert results.final_state.dtype == results.d_initial_state.dtype == jnp.float32
    for name, actual, exact in zip(Results._fields, results, by_loops(rounded), strict=True):
        rounding = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64) - exact
        error = np.asarray(actual, np.float64) - exact
        assert np.linalg.norm(error) <= 2 * np.linalg.norm(rounding), name
