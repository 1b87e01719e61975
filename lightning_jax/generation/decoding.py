"""What runs on the devices: prompts into states, states into slots, and slots token by token.

Each function is compiled once for each combination of shapes, and everything that tells rows apart is an array; so
prompts may come and go without compiling. The rows of slots are split over devices as a batch is, and so are the rows
of prefilled prompts, one of each part: a prompt moves to a slot of the same device.

Shapes: L layers of a run, B slots, X parts that the rows are split into, P tokens of a piece, N steps of a call,
V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lightning_jax.generation.log_probs import map_logits, target_log_probs
from lightning_jax.generation.sampling import Needs, RowSettings, choose
from lightning_jax.models import HybridLM
from lightning_jax.models.hybrid import State
from lightning_jax.parallel.sharding import RULES

KEY_KIND = "threefry2x32"  # whatever jax is configured for: a sample is what it is

# Why a row is not running. A free slot is one that has stopped.
RUNNING, STOPPED, FULL, REPETITIVE = range(4)


class Rows(NamedTuple):
    """The sequences in the slots, everything but their state."""

    token_B: jax.Array  # the last token, which is not in the state yet
    position_B: jax.Array  # its place in the sequence
    reason_B: jax.Array  # RUNNING, or why not
    generated_B: jax.Array  # tokens so far
    certain_B: jax.Array  # how many of the last tokens in a row were nearly certain
    key_B2: jax.Array  # of the sequence, as raw data
    settings: RowSettings
    seen_BV: jax.Array | None  # tokens in the prompt or so far, where a row is penalised for repetition


class Output(NamedTuple):
    """The tokens of one call, those of a row at the first places of its axis; -1 behind them."""

    tokens_BN: jax.Array
    log_probs_BN: jax.Array
    reason_B: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def initial_state(graphdef: nnx.GraphDef, params: nnx.State, batch: int, capacity: int) -> State:
    """The state of sequences that have not begun."""
    return nnx.merge(graphdef, params).initial_state(batch, capacity)


@functools.partial(jax.jit, static_argnums=0)
def split_rows(graphdef: nnx.GraphDef, params: nnx.State, rows: Rows) -> Rows:
    """Rows from the host, laid out over the devices."""
    return _by_row(nnx.merge(graphdef, params), rows)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    graphdef: nnx.GraphDef, params: nnx.State, state: State, tokens_XP: jax.Array, positions_XP: jax.Array
) -> State:
    """The state after one more piece of each prompt; no logits are computed."""
    return nnx.merge(graphdef, params).advance(tokens_XP, positions_XP, state)[1]


@functools.partial(jax.jit, static_argnums=0)
def continuation_log_probs(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: State,
    tokens_XP: jax.Array,
    positions_XP: jax.Array,
    targets_XP: jax.Array,
) -> jax.Array:
    """The log-probability [X, P] of each target behind its token and the state, which stays as it is, in nats.

    Of a target of -1 it means nothing.
    """
    model = nnx.merge(graphdef, params)
    hidden_XPD, _ = model.advance(tokens_XP, positions_XP, state)
    log_probs_XP = map_logits(model, hidden_XPD, targets_XP, target_log_probs)
    return model.operators.constrain(log_probs_XP, (None, None))  # whole on every device, for every process


@jax.jit
def select_rows(take_X: jax.Array, new: State, old: State) -> State:
    """The rows of two states: the new one's where `take_X`."""

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(take_X.reshape(1, -1, *[1] * (new.ndim - 2)), new, old)

    return jax.tree.map(select, new, old)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def insert(
    mesh: Mesh, state: State, rows: Rows, prefilled: State, new_rows: Rows, slot_X: jax.Array
) -> tuple[State, Rows]:
    """Puts prefilled prompts into slots.

    Args:
        new_rows: of the prompts [X, ...].
        slot_X: for each part of the rows, which of its slots takes its prompt; -1 for none.
    """

    def on_device(state, rows, prefilled, new_rows, slot_X):
        def put(axis: int, old: jax.Array, new: jax.Array) -> jax.Array:
            kept = jax.lax.dynamic_slice_in_dim(old, jnp.maximum(slot_X[0], 0), 1, axis)
            new = jnp.where(slot_X[0] < 0, kept, new.astype(old.dtype))
            return jax.lax.dynamic_update_slice_in_dim(old, new, jnp.maximum(slot_X[0], 0), axis)

        return (
            jax.tree.map(functools.partial(put, 1), state, prefilled),
            jax.tree.map(functools.partial(put, 0), rows, new_rows),
        )

    if mesh.size == 1:
        return on_device(state, rows, prefilled, new_rows, slot_X)
    by_row = PartitionSpec(RULES.mesh_axes("batch"))
    state_specs = jax.tree.map(lambda array: PartitionSpec(None, *by_row), state)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(state_specs, by_row, state_specs, by_row, by_row),
        out_specs=(state_specs, by_row),
        axis_names=set(RULES.mesh_axes("batch")),  # heads stay split as they are
        check_vma=False,
    )(state, rows, prefilled, new_rows, slot_X)


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=(2, 3))
def decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: State,
    rows: Rows,
    num_steps: int,
    needs: Needs,
    wanted_B: jax.Array,
    prompts_wait: jax.Array,
) -> tuple[State, Rows, Output]:
    """Up to `num_steps` tokens for every row that is running and wanted.

    Args:
        wanted_B: False stops a row, for a stop text was found in it.
        prompts_wait: whether to return early, when an eighth of the rows have ended.
    """
    rows = rows._replace(reason_B=jnp.where(wanted_B, rows.reason_B, STOPPED))
    model = nnx.merge(graphdef, params)
    # On a CPU a scan copies each layer's weights before it multiplies by them, which takes longer than the product.
    separate_layers = model.separate_layers() if jax.default_backend() == "cpu" else None

    def running(rows: Rows) -> jax.Array:
        return jnp.sum(rows.reason_B == RUNNING)

    num_running = running(rows)

    def goes_on(carry: tuple[jax.Array, State, Rows, jax.Array, jax.Array]) -> jax.Array:
        step, _, rows, _, _ = carry
        left = running(rows)
        return (step < num_steps) & (left > 0) & ~(prompts_wait & (8 * left <= 7 * num_running))

    def one_step(carry: tuple[jax.Array, State, Rows, jax.Array, jax.Array]):
        step, state, rows, tokens_BN, log_probs_BN = carry
        was_running_B = rows.reason_B == RUNNING
        positions_B1 = jnp.where(was_running_B, rows.position_B, -1)[:, None]
        hidden_B1D, state = model.advance(rows.token_B[:, None], positions_B1, state, separate_layers=separate_layers)
        rows, token_B, log_prob_B = append(rows, model.logits(hidden_B1D[:, 0]), needs)
        tokens_BN = tokens_BN.at[:, step].set(jnp.where(was_running_B, token_B, -1))
        log_probs_BN = log_probs_BN.at[:, step].set(jnp.where(was_running_B, log_prob_B, 0))
        return step + 1, state, *_by_row(model, (rows, tokens_BN, log_probs_BN))

    tokens_BN = jnp.full((rows.token_B.size, num_steps), -1, jnp.int32)
    carry = (jnp.int32(0), state, rows, tokens_BN, jnp.zeros(tokens_BN.shape, jnp.float32))
    _, state, rows, *output = jax.lax.while_loop(goes_on, one_step, carry)
    # Whole on every device, so that every process can read it.
    output = [model.operators.constrain(x, (None,) * x.ndim) for x in (*output, rows.reason_B)]
    return state, _by_row(model, rows), Output(*output)


def append(rows: Rows, logits_BV: jax.Array, needs: Needs) -> tuple[Rows, jax.Array, jax.Array]:
    """The rows with one more token, the tokens and their log-probabilities; rows that do not run stay as they are."""
    settings, was_running_B = rows.settings, rows.reason_B == RUNNING
    token_B, log_prob_B = choose(logits_BV, token_keys(rows.key_B2, rows.generated_B), settings, rows.seen_BV, needs)

    is_certain_B = jnp.exp(log_prob_B) > settings.repetition_probability_B
    certain_B = jnp.where(is_certain_B, rows.certain_B + 1, 0)
    generated_B = rows.generated_B + 1
    reason_B = jnp.full_like(rows.reason_B, RUNNING)
    reason_B = jnp.where(generated_B >= settings.max_new_tokens_B, FULL, reason_B)
    repeats_B = (settings.repetition_tokens_B > 0) & (certain_B >= settings.repetition_tokens_B)
    reason_B = jnp.where(repeats_B, REPETITIVE, reason_B)
    reason_B = jnp.where(jnp.any(token_B[:, None] == settings.stop_ids_BI, axis=1), STOPPED, reason_B)

    def where_running(new_B: jax.Array, old_B: jax.Array) -> jax.Array:
        return jnp.where(was_running_B, new_B, old_B)

    after = rows._replace(
        token_B=where_running(token_B, rows.token_B),
        position_B=where_running(rows.position_B + 1, rows.position_B),
        reason_B=where_running(reason_B, rows.reason_B),
        generated_B=where_running(generated_B, rows.generated_B),
        certain_B=where_running(certain_B, rows.certain_B),
    )
    if rows.seen_BV is not None:
        after = after._replace(seen_BV=rows.seen_BV.at[jnp.arange(token_B.size), token_B].set(True))
    return after, token_B, log_prob_B


def token_keys(key_B2: jax.Array, number_B: jax.Array) -> jax.Array:
    """The keys of tokens by their sequences' keys and their numbers in them: no slot and no loop decides a sample."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2, impl=KEY_KIND), number_B)


def _by_row(model: HybridLM, tree: Any) -> Any:
    """Arrays [B, ...], split as a batch is."""
    return jax.tree.map(lambda x: model.operators.constrain(x, ("batch", *[None] * (x.ndim - 1))), tree)


def compilations() -> int:
    """How many programs have been compiled so far in this process."""
    functions: tuple[Any, ...] = (initial_state, split_rows, prefill, select_rows, insert, decode)
    return sum(function._cache_size() for function in functions)
