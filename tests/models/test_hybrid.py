"""The model as a whole: layouts of layers, precision, rematerialisation, and a compile cost that is flat in depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_config import LLAMA, MINIMAX

from lightning_jax.models import HybridLM, Operators
from lightning_jax.models.layer_stack import Run, runs
from lightning_jax.objectives import NextToken

TINY = dataclasses.replace(
    MINIMAX,
    vocab_size=32,
    hidden_size=16,
    num_layers=5,
    layer_pattern=("lightning", "lightning", "softmax"),
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rotary_dim=4,
    intermediate_size=16,
    num_experts=0,
    experts_per_token=0,
    initializer_range=0.3,
    compute_dtype="float32",
    loss_chunk=8,
)
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 12))


def test_a_pattern_is_cut_into_runs_of_equal_kinds():
    assert runs(MINIMAX.layer_pattern) == [Run("lightning", 0, 7), Run("softmax", 7, 1)]
    assert [run.length for run in runs(("softmax", "lightning", "softmax"))] == [1, 1, 1]


def test_scanned_layers_equal_the_same_layers_one_by_one():
    model = HybridLM(TINY, rngs=nnx.Rngs(0))
    expected = HybridLM(dataclasses.replace(TINY, layer_pattern=(*TINY.layer_kinds(),)), rngs=nnx.Rngs(0))
    first, second = model.stacks
    order = [(first, 0, 0, 0), (first, 0, 0, 1), (first, 1, 0, 0), (second, 0, 0, 0), (second, 0, 0, 1)]
    unrolled = [(run, i) for run in expected.stacks[0].runs for i in range(run.mixer_norm.weight.shape[1])]
    for (stack, run, repeat, i), (target, j) in zip(order, unrolled, strict=True):
        source = nnx.state(stack.runs[run])
        state = jax.tree.map(
            lambda to, value, r=repeat, i=i, j=j: to.at[0, j].set(value[r, i]), nnx.state(target), source
        )
        nnx.update(target, state)
    for name in ("embedding", "head"):
        getattr(expected, name).set_value(getattr(model, name)[...])
    np.testing.assert_allclose(model(TOKENS)[0], expected(TOKENS)[0], rtol=1e-5, atol=1e-6)


def test_every_parameter_names_the_axes_behind_its_layers():
    known = {"vocab", "embed", "expert_embed", "heads", "kv_heads", "mlp", "expert_mlp", "experts", None}
    for config in (TINY, dataclasses.replace(TINY, num_experts=4, experts_per_token=2)):
        state = nnx.state(HybridLM(config, rngs=nnx.Rngs(0)), nnx.Param)
        for path, parameter in nnx.to_flat_state(state):
            stacked = 2 if path[0] == "stacks" else 0
            assert parameter.ndim == len(parameter.logical_axes) + stacked, path
            assert set(parameter.logical_axes) <= known, path


def test_equal_configs_make_equal_module_definitions():
    """Else every new module would compile its step anew."""
    first, second = (nnx.split(HybridLM(TINY, rngs=nnx.Rngs(seed)))[0] for seed in (0, 1))
    abstract = nnx.graphdef(nnx.eval_shape(lambda: HybridLM(TINY, rngs=nnx.Rngs(0))))
    assert first == second == abstract
    assert hash(first) == hash(second) == hash(abstract)


def loss_and_gradients(config):
    model = HybridLM(config, rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(model, nnx.Param)
    batch = {"inputs": TOKENS, "targets": np.roll(TOKENS, -1, 1), "segment_ids": np.ones_like(TOKENS)}
    batch |= {"positions": np.broadcast_to(np.arange(12), TOKENS.shape), "loss_mask": np.ones(TOKENS.shape, bool)}
    objective = NextToken(config)
    return jax.jit(jax.value_and_grad(lambda p: objective.loss(objective.sums(nnx.merge(graphdef, p), batch))[0]))(
        parameters
    )


def test_rematerialisation_changes_nothing():
    config = dataclasses.replace(TINY, num_layers=2, layer_pattern=("lightning", "softmax"))
    kept = loss_and_gradients(config)
    for remat in ("dots", "full", "offload"):
        recomputed = loss_and_gradients(dataclasses.replace(config, remat=remat))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), kept, recomputed)


def test_bf16_compute_keeps_fp32_weights_and_gradients():
    exact, exact_gradients = loss_and_gradients(TINY)
    loss, gradients = loss_and_gradients(dataclasses.replace(TINY, compute_dtype="bfloat16"))
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, exact, rtol=1e-2)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(exact_gradients)))
    error = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), gradients, exact_gradients)
    assert np.sqrt(sum(jax.tree.leaves(error))) < 0.05 * norm


def test_tied_weights_are_one_parameter():
    tied = HybridLM(dataclasses.replace(TINY, tie_embeddings=True), rngs=nnx.Rngs(0))
    assert not hasattr(tied, "head")
    np.testing.assert_array_equal(tied.output_weights(), tied.embedding[...].T)


def test_positions_default_to_the_place_in_the_row():
    model = HybridLM(TINY, rngs=nnx.Rngs(0))
    positions = np.broadcast_to(np.arange(12), TOKENS.shape)
    ones = np.ones_like(TOKENS)
    given, _ = model(TOKENS, segment_ids_BT=ones, positions_BT=positions)
    np.testing.assert_allclose(model(TOKENS)[0], given, rtol=1e-5, atol=1e-6)
    shifted, _ = model(TOKENS, positions_BT=2 * positions)
    assert np.abs(shifted - given).max() > 1e-3


def test_router_sums_come_in_the_order_of_the_layers():
    """Five layers in two stacks; the padding of the second row is not counted."""
    config = dataclasses.replace(TINY, num_experts=4, experts_per_token=2)
    model = HybridLM(config, rngs=nnx.Rngs(0))
    for stack in model.stacks:
        for run in stack.runs:
            layers = run.feed_forward.router.shape[:2]
            places = stack.first_layer + run_place(stack, run) + len(stack.pattern) * np.arange(layers[0])[:, None]
            # Layer l prefers expert l mod 4: its router answers to a constant feature.
            favourite = jax.nn.one_hot((places + np.arange(layers[1])) % 4, 4)
            run.feed_forward_norm.weight.set_value(
                jnp.zeros_like(run.feed_forward_norm.weight[...]).at[..., 0].set(1.0)
            )
            run.feed_forward.router.set_value(
                jnp.zeros_like(run.feed_forward.router[...]).at[..., 0, :].set(1e3 * favourite)
            )
    segment_ids = np.ones_like(TOKENS)
    segment_ids[1, 5:] = 0
    _, router = model(TOKENS, segment_ids_BT=segment_ids)
    assert router.load_E.shape == (5, 4)
    np.testing.assert_array_equal(router.load_E.sum(axis=1), 2 * 17)
    decided = np.ptp(np.asarray(router.probability_E), axis=1) > 1
    top = np.argmax(np.abs(np.asarray(router.probability_E) - np.median(router.probability_E, axis=1)[:, None]), axis=1)
    assert decided.all()
    np.testing.assert_array_equal(top, np.arange(5) % 4)


def run_place(stack, run):
    return next(place.start for place, each in zip(runs(stack.pattern), stack.runs, strict=True) if each is run)


def test_operators_replace_how_a_layer_computes():
    called = []

    def constrain(x, logical_axes):
        called.append(logical_axes)
        return x

    def attention(q_BTHK, k_BTGK, v_BTGK, *, segment_ids_BT):
        assert (q_BTHK.shape[2], k_BTGK.shape[2]) == (2, 1)
        return jnp.zeros_like(q_BTHK)

    HybridLM(TINY, rngs=nnx.Rngs(0), operators=Operators(softmax_attention=attention, constrain=constrain))(TOKENS)
    assert ("batch", "sequence", None) in called


@pytest.mark.parametrize("config", [MINIMAX, LLAMA], ids=["MiniMax-M1", "TinyLlama"])
def test_the_compiled_program_does_not_grow_with_depth(config):
    period = len(config.layer_pattern)

    def size(num_layers):
        deep = dataclasses.replace(config, num_layers=num_layers, remat="full", loss_chunk=128)
        graphdef, parameters = nnx.split(nnx.eval_shape(lambda: HybridLM(deep, rngs=nnx.Rngs(0))), nnx.Param)
        objective = NextToken(deep)
        batch = {name: jax.ShapeDtypeStruct((1, 256), jnp.int32) for name in ("inputs", "targets", "segment_ids")}
        batch |= {"positions": batch["inputs"], "loss_mask": jax.ShapeDtypeStruct((1, 256), bool)}

        def loss(parameters, batch):
            return objective.loss(objective.sums(nnx.merge(graphdef, parameters), batch))[0]

        return jax.jit(jax.grad(loss)).lower(parameters, batch).as_text().count("\n")

    assert size(10 * period) <= 1.02 * size(period)
