"""Tiny MiniMax and Llama models equal Hugging Face's: logits, loss and every gradient, to 1e-5 in fp32.

The reference values were made by tests/goldens/make_model_goldens.py.
"""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_config import LLAMA

from lightning_jax.models import HybridLM, RopeScaling, hugging_face
from lightning_jax.objectives import NextToken

GOLDENS = sorted((pathlib.Path(__file__).parents[1] / "goldens").glob("model_*.npz"))


def our_config(case):
    case = dict(case, layer_pattern=tuple(case["layer_pattern"]), router_aux_loss="huggingface", loss_chunk=8)
    if "rope_scaling" in case:
        case["rope_scaling"] = RopeScaling(**case["rope_scaling"])
    return dataclasses.replace(LLAMA, **case)


def ours(config, theirs):
    """Hugging Face's arrays by name -> ours by path, layers stacked as in LayerStack."""
    arrays = {path: np.full(leaf.shape, np.nan) for path, leaf in hugging_face.parameter_shapes(config).items()}
    for piece in hugging_face.pieces(config, hugging_face.feed_forward_names(config, theirs)):
        tensor = theirs[piece.tensor].reshape(-1, *piece.shape[1:])[piece.first_row :][: piece.shape[0]]
        arrays[piece.path][piece.index] = tensor.T if piece.transposed else tensor
    return arrays


def flat(state):
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_logits_loss_and_gradients_equal_hugging_face(path):
    golden = np.load(path)
    config = our_config(json.loads(str(golden["config"])))
    model = HybridLM(config, rngs=nnx.Rngs(0))
    parameters = flat(nnx.state(model, nnx.Param))
    weights = {key.removeprefix("weight/"): golden[key] / 64 for key in golden if key.startswith("weight/")}
    weights = ours(config, weights)
    assert weights.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == weights[name].shape, name
        parameter.set_value(jnp.asarray(weights[name], jnp.float32))

    tokens = golden["tokens"].astype(np.int32)
    batch = {
        "inputs": tokens,
        "targets": golden["targets"].astype(np.int32),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
        "loss_mask": np.ones(tokens.shape, bool),
    }
    graphdef, parameters = nnx.split(model, nnx.Param)
    objective = NextToken(config)

    @jax.jit
    def outputs(parameters):
        def loss(parameters):
            return objective.loss(objective.sums(nnx.merge(graphdef, parameters), batch))[0]

        model = nnx.merge(graphdef, parameters)
        return model(tokens)[0] @ model.output_weights(), *jax.value_and_grad(loss)(parameters)

    logits, loss, gradients = outputs(parameters)
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-5, atol=1e-5 * np.abs(golden["logits"]).max())
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    expected = {key.removeprefix("gradient/"): golden[key] for key in golden if key.startswith("gradient/")}
    expected = ours(config, expected)
    scale = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in flat(gradients).items():
        np.testing.assert_allclose(gradient[...], expected[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_the_goldens_cover_both_families():
    names = " ".join(path.stem for path in GOLDENS)
    assert len(re.findall("minimax", names)) == 5
    assert len(re.findall("llama", names)) == 3
