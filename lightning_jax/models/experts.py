"""The experts of a mixture: each token's k SwiGLU experts, computed together and combined by the router's weights.

Three dispatches with one result, unless tokens are dropped: "ragged" and "blocks" never drop; "capacity" gives every
expert a fixed number of places in each group of neighbouring tokens and drops the tokens that come after they are full.

Sources: MiniMax-01 (arXiv 2501.08313) section 2.1; GShard (arXiv 2006.16668) section 2.2, capacity and groups;
MegaBlocks (arXiv 2211.15841), dropless dispatch by sorting.

Shapes: B batch, T sequence, D model dim, E experts, F feed-forward dim, k experts per token, N tokens, M assignments of
tokens to experts sorted by expert, P = M rows and a block behind them, R rows of a block, C places per expert and
group.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

Dispatch = Literal["auto", "ragged", "blocks", "capacity"]

BLOCK_ROWS = 128  # "blocks": rows of one matmul


class ExpertWeights(NamedTuple):
    """Every expert's matrices, y = (silu(x gate) * (x up)) down."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array

    def astype(self, dtype: jax.typing.DTypeLike) -> Self:
        return type(self)(*(weight.astype(dtype) for weight in self))


def experts(
    x_BTD: jax.Array,
    expert_BTk: jax.Array,
    weight_BTk: jax.Array,
    weights: ExpertWeights,
    *,
    mask_BT: jax.Array,
    dispatch: Dispatch,
    capacity_factor: float,
    capacity_group: int,
) -> tuple[jax.Array, jax.Array]:
    """Sum over a token's k experts of the router's weight times the expert's output.

    Args:
        x_BTD: tokens, in the dtype of the computation.
        expert_BTk: int32, the experts each token was routed to, without repeats.
        weight_BTk: their weights, float32 or wider; the sum is taken in this dtype.
        weights: in any dtype.
        mask_BT: False for padding, whose output is 0 and which takes no place of an expert.
        dispatch: "auto" chooses between the dropless ones by platform.
        capacity_factor, capacity_group: "capacity" only, as `experts_by_capacity`.

    Returns:
        y_BTD in the dtype of x, and the number of assignments dropped (float32, always 0 where dropless).
    """
    weight_BTk, weights = jnp.where(mask_BT[..., None], weight_BTk, 0), weights.astype(x_BTD.dtype)
    platform, num_experts = jax.default_backend(), weights.gate_EDF.shape[0]
    if dispatch == "auto" and platform == "cpu" and num_experts <= expert_BTk.size <= BLOCK_ROWS:
        # A decoding step: some token needs most experts, whose blocks would have as many rows.
        y_BTD = every_expert(x_BTD, expert_BTk, weight_BTk, weights)
        return y_BTD.astype(x_BTD.dtype), jnp.zeros((), jnp.float32)
    dispatch = for_platform(dispatch, platform)
    if dispatch == "capacity":
        return experts_by_capacity(
            x_BTD,
            expert_BTk,
            weight_BTk,
            lambda x_BECD: batched_swiglu(x_BECD, weights),
            mask_BT=mask_BT,
            num_experts=weights.gate_EDF.shape[0],
            capacity_factor=capacity_factor,
            capacity_group=capacity_group,
        )
    y_BTD = dropless_experts(x_BTD, expert_BTk, weight_BTk, weights, first_expert=0, dispatch=dispatch)
    return y_BTD.astype(x_BTD.dtype), jnp.zeros((), jnp.float32)


def every_expert(x_BTD: jax.Array, expert_BTk: jax.Array, weight_BTk: jax.Array, weights: ExpertWeights) -> jax.Array:
    """The sum with every expert's output of every token, most of them weighted with 0; in the dtype of weight_BTk."""
    num_experts, size = weights.gate_EDF.shape[0], x_BTD.shape[-1]
    # A batch of products, for which the weights stay as they lie.
    x_END = jnp.broadcast_to(x_BTD.reshape(1, -1, size), (num_experts, x_BTD.size // size, size))
    y_END = jnp.matmul(jax.nn.silu(x_END @ weights.gate_EDF) * (x_END @ weights.up_EDF), weights.down_EFD)
    chosen_BTkE = expert_BTk[..., None] == jnp.arange(num_experts)
    weight_BTE = jnp.sum(weight_BTk[..., None], axis=2, where=chosen_BTkE)
    y_EBTD = y_END.reshape(num_experts, *x_BTD.shape).astype(weight_BTE.dtype)
    return jnp.einsum("bte,ebtd->btd", weight_BTE, y_EBTD)


# Dropless: sort the assignments by expert, then one matmul over groups of unequal size.


def dropless_experts(
    x_BTD: jax.Array,
    expert_BTk: jax.Array,
    weight_BTk: jax.Array,
    weights: ExpertWeights,
    *,
    first_expert: int | jax.Array,
    dispatch: Literal["ragged", "blocks"],
) -> jax.Array:
    """The part of the sum that comes from experts first_expert, first_expert + 1, ..., whose matrices `weights` holds.

    Returns y_BTD in the dtype of weight_BTk.
    """
    num_experts = weights.gate_EDF.shape[0]
    k = expert_BTk.shape[-1]
    local_M = expert_BTk.reshape(-1) - first_expert
    # Assignments to experts that are elsewhere sort last, behind the rows any group covers.
    local_M = jnp.where((local_M >= 0) & (local_M < num_experts), local_M, num_experts)
    order_M = jnp.argsort(local_M, stable=True)
    rank_M = jnp.argsort(order_M)
    group_sizes_E = jnp.sum(local_M[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)

    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    x_MD = take_rows(x_ND, order_M // k, rank_M.reshape(-1, k))
    y_MD = GROUPED_SWIGLU[dispatch](x_MD, weights, group_sizes_E)
    y_NkD = take_rows(y_MD, rank_M, order_M[:, None]).reshape(-1, k, x_ND.shape[-1])
    y_ND = jnp.einsum("nk,nkd->nd", weight_BTk.reshape(-1, k), y_NkD.astype(weight_BTk.dtype))
    return y_ND.reshape(x_BTD.shape)


def for_platform(dispatch: Dispatch, platform: str) -> Dispatch:
    """What "auto" means on a platform.

    XLA lowers `jax.lax.ragged_dot` to a grouped matmul on TPU and GPU, but on CPU to one matmul over all rows for each
    expert with the other rows masked: E times the work.
    """
    if dispatch == "auto":
        return "blocks" if platform == "cpu" else "ragged"
    return dispatch


def ragged_swiglu(x_MD: jax.Array, weights: ExpertWeights, group_sizes_E: jax.Array) -> jax.Array:
    """SwiGLU of rows sorted by expert; rows behind the last group give 0."""
    # What ragged_dot leaves in rows no group covers is not defined, nor is their gradient.
    covered_M1 = (jnp.arange(x_MD.shape[0]) < jnp.sum(group_sizes_E))[:, None]
    x_MD = jnp.where(covered_M1, x_MD, 0)
    gate_MF = jax.lax.ragged_dot(x_MD, weights.gate_EDF, group_sizes_E)
    up_MF = jax.lax.ragged_dot(x_MD, weights.up_EDF, group_sizes_E)
    y_MD = jax.lax.ragged_dot(jax.nn.silu(gate_MF) * up_MF, weights.down_EFD, group_sizes_E)
    return jnp.where(covered_M1, y_MD, 0)


@jax.custom_vjp
def blocks_swiglu(x_MD: jax.Array, weights: ExpertWeights, group_sizes_E: jax.Array) -> jax.Array:
    """SwiGLU of rows sorted by expert, a block of one expert's rows at a time; rows behind the last group give 0."""
    return _blocks_forward(x_MD, weights, group_sizes_E)[0]


def _blocks_forward(x_MD, weights, group_sizes_E):
    rows, block = x_MD.shape[0], min(BLOCK_ROWS, x_MD.shape[0])
    x_PD = jnp.pad(x_MD, ((0, block), (0, 0)))  # so that a group's last block may reach behind the end
    hidden_PF = jnp.zeros((rows + block, weights.gate_EDF.shape[-1]), x_MD.dtype)

    # A group's last block also writes rows of the groups behind it, which then overwrite them.
    def one_expert(buffers, expert):
        (wg_DF, wu_DF, wd_FD), start, size = expert

        def one_block(i, buffers):
            gate_PF, up_PF, y_PD = buffers
            row = start + i * block
            x_RD = _rows(x_PD, row, block)
            gate_RF, up_RF = x_RD @ wg_DF, x_RD @ wu_DF
            y_RD = (jax.nn.silu(gate_RF) * up_RF) @ wd_FD
            return _write(gate_PF, gate_RF, row), _write(up_PF, up_RF, row), _write(y_PD, y_RD, row)

        return jax.lax.fori_loop(0, -(-size // block), one_block, buffers), None

    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    (gate_PF, up_PF, y_PD), _ = jax.lax.scan(
        one_expert, (hidden_PF, hidden_PF, jnp.zeros_like(x_PD)), (weights, starts_E, group_sizes_E)
    )
    y_MD = jnp.where((jnp.arange(rows) < jnp.sum(group_sizes_E))[:, None], y_PD[:rows], 0)
    return y_MD, (x_PD, gate_PF, up_PF, weights, group_sizes_E)


def _blocks_backward(residuals, dy_MD):
    x_PD, gate_PF, up_PF, weights, group_sizes_E = residuals
    rows = dy_MD.shape[0]
    block = x_PD.shape[0] - rows
    dy_PD = jnp.pad(dy_MD, ((0, block), (0, 0)))

    def one_expert(dx_PD, expert):
        (wg_DF, wu_DF, wd_FD), start, size = expert

        def one_block(i, carry):
            dx_PD, gradients = carry
            row = start + i * block
            own_R1 = (i * block + jnp.arange(block) < size)[:, None]
            x_RD, gate_RF, up_RF = _rows(x_PD, row, block), _rows(gate_PF, row, block), _rows(up_PF, row, block)
            dy_RD = jnp.where(own_R1, _rows(dy_PD, row, block), 0)
            hidden_RF, hidden_vjp = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate_RF, up_RF)
            dgate_RF, dup_RF = hidden_vjp(dy_RD @ wd_FD.T)
            dx_RD = dgate_RF @ wg_DF.T + dup_RF @ wu_DF.T
            block_gradients = ExpertWeights(x_RD.T @ dgate_RF, x_RD.T @ dup_RF, hidden_RF.T @ dy_RD)
            return _write(dx_PD, dx_RD, row), jax.tree.map(jnp.add, gradients, block_gradients)

        zeros = ExpertWeights(jnp.zeros_like(wg_DF), jnp.zeros_like(wu_DF), jnp.zeros_like(wd_FD))
        return jax.lax.fori_loop(0, -(-size // block), one_block, (dx_PD, zeros))

    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    dx_PD, dweights = jax.lax.scan(one_expert, jnp.zeros_like(x_PD), (weights, starts_E, group_sizes_E))
    dx_MD = jnp.where((jnp.arange(rows) < jnp.sum(group_sizes_E))[:, None], dx_PD[:rows], 0)
    return dx_MD, dweights, None


blocks_swiglu.defvjp(_blocks_forward, _blocks_backward)

GROUPED_SWIGLU = {"ragged": ragged_swiglu, "blocks": blocks_swiglu}


def _rows(array_PX: jax.Array, row: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array_PX, row, count, axis=0)


def _write(array_PX: jax.Array, rows_RX: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array_PX, rows_RX, row, axis=0)


# Capacity: every expert has C places in each group of tokens, filled in their order.


def experts_by_capacity(
    x_BTD: jax.Array,
    expert_BTk: jax.Array,
    weight_BTk: jax.Array,
    compute: Callable[[jax.Array], jax.Array],
    *,
    mask_BT: jax.Array,
    num_experts: int,
    capacity_factor: float,
    capacity_group: int,
) -> tuple[jax.Array, jax.Array]:
    """The sum over each token's experts, without those that had no place left for it, and how many those were.

    Rows are cut into groups, each with places of its own: a device that holds whole groups, of whichever rows, needs no
    other to know what is dropped, and nothing but the groups decides it.

    Args:
        weight_BTk: 0 for padding.
        compute: from the tokens at their places [groups, E, C, D], 0 where a place is free, to the experts' outputs.
        capacity_factor: places of an expert in a group, as a multiple of an even share.
        capacity_group: tokens of a group; rows that are shorter are one group each.
    """
    B, T, D = x_BTD.shape
    group = min(capacity_group, T)

    def in_groups(x_BT: jax.Array) -> jax.Array:
        filled_BT = jnp.pad(x_BT, [(0, 0), (0, -T % group), *((0, 0) for _ in x_BT.shape[2:])])
        return filled_BT.reshape(-1, group, *x_BT.shape[2:])

    places = dispatch_by_capacity(in_groups(expert_BTk), in_groups(mask_BT), num_experts, capacity_factor)
    y_BTD = places.combine(compute(places.gather(in_groups(x_BTD))), in_groups(weight_BTk))
    return y_BTD.reshape(B, -1, D)[:, :T].astype(x_BTD.dtype), places.dropped


class Places(NamedTuple):
    """Which assignment holds which place, both ways round; an index out of range means none."""

    token_BM: jax.Array  # M = E * C places: the token that holds each place, T if it is free
    assignment_BM: jax.Array  # the assignment t * k + j that holds each place, T * k if it is free
    place_BTk: jax.Array  # the place of each assignment, M if it was dropped
    dropped: jax.Array
    num_experts: int

    def gather(self, x_BTD: jax.Array) -> jax.Array:
        """The tokens at their places, x_BECD; free places hold 0."""
        x_BMD = jax.vmap(take_rows)(x_BTD, self.token_BM, self.place_BTk)
        return x_BMD.reshape(x_BMD.shape[0], self.num_experts, -1, x_BMD.shape[-1])

    def combine(self, y_BECD: jax.Array, weight_BTk: jax.Array) -> jax.Array:
        """Each token's weighted sum over the places it holds, y_BTD in the dtype of the weights."""
        B, T, k = weight_BTk.shape
        y_BMD = y_BECD.reshape(B, -1, y_BECD.shape[-1])
        y_BAD = jax.vmap(take_rows)(y_BMD, self.place_BTk.reshape(B, T * k), self.assignment_BM[..., None])
        return jnp.einsum("btk,btkd->btd", weight_BTk, y_BAD.reshape(B, T, k, -1).astype(weight_BTk.dtype))


def capacity(config_factor: float, sequence: int, experts_per_token: int, num_experts: int) -> int:
    """Places per expert and group of `sequence` tokens."""
    return math.ceil(config_factor * sequence * experts_per_token / num_experts)


def dispatch_by_capacity(expert_BTk: jax.Array, mask_BT: jax.Array, num_experts: int, capacity_factor: float) -> Places:
    """Gives each expert's places in a group, here a row, to the first of its tokens that were routed to it.

    Places go by token, not (as in GShard) to all first choices before any second: a token's fate must not depend on
    later tokens.
    """
    B, T, k = expert_BTk.shape
    C = capacity(capacity_factor, T, k, num_experts)
    places = num_experts * C
    expert_BA = jnp.where(mask_BT[..., None], expert_BTk, num_experts).reshape(B, T * k)
    order_BA = jnp.argsort(expert_BA, axis=-1, stable=True)
    rank_BA = jnp.argsort(order_BA, axis=-1)
    sizes_BE = jnp.sum(expert_BA[..., None] == jnp.arange(num_experts), axis=1, dtype=jnp.int32)
    starts_BE = jnp.cumsum(sizes_BE, axis=-1) - sizes_BE

    position_BA = rank_BA - jnp.take_along_axis(starts_BE, jnp.minimum(expert_BA, num_experts - 1), axis=-1)
    kept_BA = (expert_BA < num_experts) & (position_BA < C)
    place_BA = jnp.where(kept_BA, expert_BA * C + position_BA, places)

    held_BEC = jnp.arange(C) < sizes_BE[..., None]
    sorted_BEC = jnp.minimum(starts_BE[..., None] + jnp.arange(C), T * k - 1)
    assignment_BM = jnp.take_along_axis(order_BA, sorted_BEC.reshape(B, places), axis=-1)
    assignment_BM = jnp.where(held_BEC.reshape(B, places), assignment_BM, T * k)
    dropped = jnp.sum((expert_BA < num_experts) & ~kept_BA, dtype=jnp.float32)
    return Places(assignment_BM // k, assignment_BM, place_BA.reshape(B, T, k), dropped, num_experts)


def batched_swiglu(x_BECD: jax.Array, weights: ExpertWeights) -> jax.Array:
    """SwiGLU of each expert's places."""
    gate_BECF = jnp.einsum("becd,edf->becf", x_BECD, weights.gate_EDF)
    up_BECF = jnp.einsum("becd,edf->becf", x_BECD, weights.up_EDF)
    return jnp.einsum("becf,efd->becd", jax.nn.silu(gate_BECF) * up_BECF, weights.down_EFD)


@jax.custom_vjp
def take_rows(x_ND: jax.Array, index_M: jax.Array, readers_Nr: jax.Array) -> jax.Array:
    """x[index], 0 where the index is N, with a gradient that gathers too.

    Args:
        readers_Nr: the output rows that read each row of x, M where there are fewer. The gradient sums over them, in a
          fixed order and without the scatter-add that XLA would derive.
    """
    return x_ND.at[index_M].get(mode="fill", fill_value=0)


def _take_rows_forward(x_ND, index_M, readers_Nr):
    return take_rows(x_ND, index_M, readers_Nr), readers_Nr


def _take_rows_backward(readers_Nr, dy_MD):
    dy_NrD = dy_MD.at[readers_Nr].get(mode="fill", fill_value=0)
    return jnp.sum(dy_NrD, axis=1, dtype=dy_MD.dtype), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)
