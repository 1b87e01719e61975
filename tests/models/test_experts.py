"""The experts' dispatches against a dense computation of every expert for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.models import experts as experts_module
from lightning_jax.models.experts import ExpertWeights, capacity, dropless_experts, experts, take_rows

B, T, D, E, F, K = 3, 21, 5, 6, 7, 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of four rows, so that groups span several blocks and end inside one."""
    monkeypatch.setattr(experts_module, "BLOCK_ROWS", 4)


def routed(seed=0, dtype=np.float64, skew=1.0):
    """Tokens, their experts (expert 3 gets none), their weights, and the experts' matrices."""
    rng = np.random.default_rng(seed)
    scores_BTE = rng.normal(size=(B, T, E)) + skew * rng.normal(size=E)
    scores_BTE[..., 3] = -np.inf
    expert_BTk = np.argsort(-scores_BTE, axis=-1)[..., :K].astype(np.int32)
    weight_BTk = rng.uniform(0.1, 1.0, size=(B, T, K))
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = ExpertWeights(*(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes))
    return jnp.asarray(rng.normal(size=(B, T, D)), dtype), jnp.asarray(expert_BTk), jnp.asarray(weight_BTk), weights


def dense(x_BTD, expert_BTk, weight_BTk, weights, mask_BT):
    """Every expert for every token, weighted by the one-hot routing."""
    gate_BTEF = jnp.einsum("btd,edf->btef", x_BTD, weights.gate_EDF)
    up_BTEF = jnp.einsum("btd,edf->btef", x_BTD, weights.up_EDF)
    hidden_BTEF = gate_BTEF / (1 + jnp.exp(-gate_BTEF)) * up_BTEF
    y_BTED = jnp.einsum("btef,efd->bted", hidden_BTEF, weights.down_EFD)
    share_BTE = jnp.einsum("btk,btke->bte", weight_BTk, jax.nn.one_hot(expert_BTk, E, dtype=weight_BTk.dtype))
    return jnp.einsum("bte,bted->btd", share_BTE, y_BTED) * mask_BT[..., None]


def values_and_gradients(call, x_BTD, weight_BTk, weights):
    """The output, and the gradients of a fixed random projection of it."""
    projection_BTD = jnp.asarray(np.random.default_rng(9).normal(size=x_BTD.shape))

    def scalar(*operands):
        y_BTD = call(*operands)
        return jnp.sum(y_BTD * projection_BTD), y_BTD

    gradients, y_BTD = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(x_BTD, weight_BTk, weights)
    return y_BTD, gradients


def assert_trees_close(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance)


def places(factor, group=T):
    return {"capacity_factor": float(factor), "capacity_group": group}


def documents_mask():
    mask_BT = np.ones((B, T), bool)
    mask_BT[1, 15:] = False
    mask_BT[2, 4:9] = False
    return jnp.asarray(mask_BT)


def as_few_tokens(monkeypatch):
    """As in a decoding step, when no tokens are sorted."""
    monkeypatch.setattr(experts_module, "BLOCK_ROWS", B * T * K)
    monkeypatch.delattr(experts_module, "dropless_experts")


@pytest.mark.parametrize("dispatch", ["auto", "auto of few tokens", "ragged", "blocks", "capacity"])
def test_values_and_gradients_equal_the_dense_computation(dispatch, monkeypatch):
    if dispatch == "auto of few tokens":
        as_few_tokens(monkeypatch)
        dispatch = "auto"
    with jax.enable_x64(True):
        x_BTD, expert_BTk, weight_BTk, weights = routed()
        mask_BT = documents_mask()

        def dispatched(x_BTD, weight_BTk, weights):
            y_BTD, dropped = experts(
                x_BTD, expert_BTk, weight_BTk, weights, mask_BT=mask_BT, dispatch=dispatch, **places(E)
            )
            return y_BTD + 0 * dropped

        def oracle(x_BTD, weight_BTk, weights):
            return dense(x_BTD, expert_BTk, weight_BTk, weights, mask_BT)

        actual = values_and_gradients(dispatched, x_BTD, weight_BTk, weights)
        assert_trees_close(actual, values_and_gradients(oracle, x_BTD, weight_BTk, weights), 1e-12)


@pytest.mark.parametrize("dispatch", ["ragged", "blocks"])
@pytest.mark.parametrize("first_expert", [0, 2, 4])
def test_two_of_the_experts_give_their_part_of_the_sum(dispatch, first_expert):
    with jax.enable_x64(True):
        x_BTD, expert_BTk, weight_BTk, weights = routed(seed=1)
        here = slice(first_expert, first_expert + 2)
        ours_BTk = (expert_BTk >= here.start) & (expert_BTk < here.stop)

        def part(x_BTD, weight_BTk, weights):
            weights = jax.tree.map(lambda w: w[here], weights)
            return dropless_experts(
                x_BTD, expert_BTk, weight_BTk, weights, first_expert=first_expert, dispatch=dispatch
            )

        def oracle(x_BTD, weight_BTk, weights):
            weight_BTk = jnp.where(ours_BTk, weight_BTk, 0)
            return dense(x_BTD, expert_BTk, weight_BTk, weights, jnp.ones((B, T), bool))

        actual = values_and_gradients(part, x_BTD, weight_BTk, weights)
        assert_trees_close(actual, values_and_gradients(oracle, x_BTD, weight_BTk, weights), 1e-12)


@pytest.mark.parametrize("dispatch", ["ragged", "blocks"])
def test_dropless_output_does_not_depend_on_the_order_of_the_tokens(dispatch):
    with jax.enable_x64(True):
        x_BTD, expert_BTk, weight_BTk, weights = routed(seed=2)
        mask_BT = jnp.ones((B, T), bool)
        order_T = np.random.default_rng(3).permutation(T)

        def call(x_BTD, expert_BTk, weight_BTk):
            options = {"mask_BT": mask_BT, "dispatch": dispatch, **places(1.0)}
            return experts(x_BTD, expert_BTk, weight_BTk, weights, **options)[0]

        shuffled_BTD = call(x_BTD[:, order_T], expert_BTk[:, order_T], weight_BTk[:, order_T])
        np.testing.assert_allclose(shuffled_BTD, call(x_BTD, expert_BTk, weight_BTk)[:, order_T], rtol=1e-13)


@pytest.mark.parametrize("factor", [0.4, 1.0, 1.7])
def test_capacity_serves_each_row_in_the_order_of_its_tokens_and_drops_the_rest(factor):
    with jax.enable_x64(True):
        x_BTD, expert_BTk, weight_BTk, weights = routed(seed=4, skew=3.0)
        mask_BT = documents_mask()
        kept_BTk, dropped = np.zeros((B, T, K), bool), 0
        for row in range(B):
            used_E = np.zeros(E, int)
            for t in range(T):
                for j, expert in enumerate(np.asarray(expert_BTk[row, t])):
                    if not mask_BT[row, t]:
                        continue
                    kept_BTk[row, t, j] = used_E[expert] < capacity(factor, T, K, E)
                    used_E[expert] += 1
                    dropped += not kept_BTk[row, t, j]
        assert 0 < dropped < mask_BT.sum() * K

        def dispatched(x_BTD, weight_BTk, weights):
            y_BTD, reported = experts(
                x_BTD, expert_BTk, weight_BTk, weights, mask_BT=mask_BT, dispatch="capacity", **places(factor)
            )
            return y_BTD + 0 * reported

        def oracle(x_BTD, weight_BTk, weights):
            return dense(x_BTD, expert_BTk, jnp.where(kept_BTk, weight_BTk, 0), weights, mask_BT)

        actual = values_and_gradients(dispatched, x_BTD, weight_BTk, weights)
        assert_trees_close(actual, values_and_gradients(oracle, x_BTD, weight_BTk, weights), 1e-12)
        options = {"mask_BT": mask_BT, "dispatch": "capacity", **places(factor)}
        assert experts(x_BTD, expert_BTk, weight_BTk, weights, **options)[1] == dropped


def test_what_capacity_drops_in_a_row_does_not_depend_on_the_other_rows():
    x_BTD, expert_BTk, weight_BTk, weights = routed(seed=5, dtype=np.float32, skew=3.0)
    options = {"dispatch": "capacity", **places(1.0)}
    mask_BT = jnp.ones((B, T), bool)
    together_BTD, _ = experts(x_BTD, expert_BTk, weight_BTk, weights, mask_BT=mask_BT, **options)
    for row in range(B):
        one = slice(row, row + 1)
        alone_BTD, _ = experts(x_BTD[one], expert_BTk[one], weight_BTk[one], weights, mask_BT=mask_BT[one], **options)
        np.testing.assert_allclose(together_BTD[one], alone_BTD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [4, 7, T])
def test_each_group_of_a_row_is_served_as_a_row_of_its_own_the_last_one_padded(group):
    x_BTD, expert_BTk, weight_BTk, weights = routed(seed=8, dtype=np.float32, skew=3.0)
    mask_BT = documents_mask()
    whole_BTD, dropped = experts(
        x_BTD, expert_BTk, weight_BTk, weights, mask_BT=mask_BT, dispatch="capacity", **places(0.8, group)
    )
    missing = -T % group
    filled = [jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) for x in (x_BTD, expert_BTk, weight_BTk)]
    filled_mask_BT = jnp.pad(mask_BT, [(0, 0), (0, missing)])
    parts = []
    for start in range(0, T, group):
        part = np.s_[:, start : start + group]
        mask = filled_mask_BT[part]
        options = {"mask_BT": mask, "dispatch": "capacity", **places(0.8)}
        parts.append(experts(*(x[part] for x in filled), weights, **options))
    alone_BTD = jnp.concatenate([y_BTD for y_BTD, _ in parts], axis=1)[:, :T]
    np.testing.assert_allclose(whole_BTD, alone_BTD, rtol=1e-6, atol=1e-6)
    assert dropped == sum(count for _, count in parts) > 0


@pytest.mark.parametrize("dispatch", ["ragged", "blocks", "capacity"])
def test_padding_gives_zero(dispatch):
    x_BTD, expert_BTk, weight_BTk, weights = routed(seed=6, dtype=np.float32)
    mask_BT = documents_mask()
    options = {"mask_BT": mask_BT, "dispatch": dispatch, **places(1.0)}
    y_BTD, _ = experts(x_BTD, expert_BTk, weight_BTk, weights, **options)
    assert (y_BTD[~mask_BT] == 0).all()
    assert (y_BTD[mask_BT] != 0).any(axis=-1).mean() > 0.8


@pytest.mark.parametrize("dispatch", ["ragged", "blocks", "capacity"])
def test_bfloat16_stays_near_float32(dispatch):
    x_BTD, expert_BTk, weight_BTk, weights = routed(seed=7, dtype=np.float32)
    mask_BT = jnp.ones((B, T), bool)
    weight_BTk = weight_BTk.astype(jnp.float32)

    def call(x_BTD, weight_BTk, weights):
        options = {"mask_BT": mask_BT, "dispatch": dispatch, **places(E)}
        return experts(x_BTD, expert_BTk, weight_BTk, weights, **options)[0]

    exact_BTD, _ = values_and_gradients(call, x_BTD, weight_BTk, weights)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), (x_BTD, weights))
    y_BTD, (dx_BTD, dweight_BTk, dweights) = values_and_gradients(call, narrow[0], weight_BTk, narrow[1])
    assert y_BTD.dtype == dx_BTD.dtype == dweights.gate_EDF.dtype == jnp.bfloat16
    assert dweight_BTk.dtype == jnp.float32
    error = jnp.linalg.norm(y_BTD.astype(jnp.float32) - exact_BTD) / jnp.linalg.norm(exact_BTD)
    assert error < 2e-2


def test_take_rows_gradient_counts_every_reader():
    with jax.enable_x64(True):
        x_ND = jnp.asarray(np.random.default_rng(8).normal(size=(3, 2)))
        index_M = jnp.array([2, 0, 2, 3])  # the last reads nothing
        readers_Nr = jnp.array([[1, 4], [4, 4], [0, 2]])
        dy_MD = jnp.arange(8.0).reshape(4, 2)
        y_MD, vjp = jax.vjp(lambda x: take_rows(x, index_M, readers_Nr), x_ND)
        np.testing.assert_array_equal(y_MD, jnp.stack([x_ND[2], x_ND[0], x_ND[2], jnp.zeros(2)]))
        np.testing.assert_array_equal(vjp(dy_MD)[0], jnp.stack([dy_MD[1], jnp.zeros(2), dy_MD[0] + dy_MD[2]]))
