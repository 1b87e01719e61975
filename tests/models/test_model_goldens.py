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

from lightning_jax.models import HybridLM, RopeScaling
from lightning_jax.models.hybrid import runs
from lightning_jax.objectives import NextToken

GOLDENS = sorted((pathlib.Path(__file__).parents[1] / "goldens").glob("model_*.npz"))

# Our parameter of a block -> Hugging Face's, and how to turn theirs [out, in] into ours.
BLOCK = {
    "mixer_norm.weight": ("input_layernorm.weight", np.asarray),
    "feed_forward_norm.weight": ("post_attention_layernorm.weight", np.asarray),
    "feed_forward.router": ("mlp.gate.weight", np.transpose),
}
MIXER = {
    "lightning": {
        "mixer.query_key_value": ("self_attn.qkv_proj.weight", np.transpose),
        "mixer.gate": ("self_attn.output_gate.weight", np.transpose),
        "mixer.norm.weight": ("self_attn.norm.weight", np.asarray),
        "mixer.output": ("self_attn.out_proj.weight", np.transpose),
    },
    "softmax": {
        "mixer.query": ("self_attn.q_proj.weight", np.transpose),
        "mixer.key": ("self_attn.k_proj.weight", np.transpose),
        "mixer.value": ("self_attn.v_proj.weight", np.transpose),
        "mixer.output": ("self_attn.o_proj.weight", np.transpose),
    },
}
MOE = {
    "feed_forward.gate": ("mlp.experts.gate_up_proj", lambda w: np.split(w.swapaxes(1, 2), 2, axis=2)[0]),
    "feed_forward.up": ("mlp.experts.gate_up_proj", lambda w: np.split(w.swapaxes(1, 2), 2, axis=2)[1]),
    "feed_forward.down": ("mlp.experts.down_proj", lambda w: w.swapaxes(1, 2)),
}
DENSE = {
    "feed_forward.gate": ("mlp.gate_proj.weight", np.transpose),
    "feed_forward.up": ("mlp.up_proj.weight", np.transpose),
    "feed_forward.down": ("mlp.down_proj.weight", np.transpose),
}


def our_config(case):
    case = dict(case, layer_pattern=tuple(case["layer_pattern"]), router_aux_loss="huggingface", loss_chunk=8)
    if "rope_scaling" in case:
        case["rope_scaling"] = RopeScaling(**case["rope_scaling"])
    return dataclasses.replace(LLAMA, **case)


def ours(config, theirs):
    """Hugging Face's arrays by name -> ours by path, layers stacked as in LayerStack."""
    arrays = {"embedding": theirs["model.embed_tokens.weight"], "final_norm.weight": theirs["model.norm.weight"]}
    if not config.tie_embeddings:
        arrays["head"] = theirs["lm_head.weight"].T
    period = len(config.layer_pattern)
    repeats, left = divmod(config.num_layers, period)
    for stack, (pattern, count) in enumerate([(config.layer_pattern, repeats), (config.layer_pattern[:left], 1)]):
        for place, run in enumerate(runs(pattern)):
            names = BLOCK | MIXER[run.kind] | MOE if config.num_experts else BLOCK | MIXER[run.kind] | DENSE
            for name, (their_name, convert) in names.items():
                if name == "feed_forward.router" and not config.num_experts:
                    continue
                first = stack * repeats * period + run.start
                layers = [[first + r * period + i for i in range(run.length)] for r in range(count)]
                stacked = [[convert(theirs[f"model.layers.{i}.{their_name}"]) for i in row] for row in layers]
                arrays[f"stacks.{stack}.runs.{place}.{name}"] = np.array(stacked)
    return arrays


def flat(state):
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


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
