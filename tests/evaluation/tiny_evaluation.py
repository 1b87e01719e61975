"""A trained model small enough for every test of evaluation, and its plain forward pass over one sequence."""

import functools
import pathlib
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import parallel
from lightning_jax.evaluation import Scorer

sys.path.append(str(pathlib.Path(__file__).parents[1] / "generation"))
from tiny_generation import CONFIG, TOKENIZER, model, params

BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def trained_model(layout=(1, 1, 1, 1), context_length=64, config=CONFIG, tokenizer=TOKENIZER):
    """As load_model returns it, on a mesh (data, fsdp, expert, tensor)."""
    mesh = parallel.make_mesh(
        parallel.MeshConfig.of(**dict(zip(("data", "fsdp", "expert", "tensor"), layout, strict=True))),
        jax.devices()[: int(np.prod(layout))],
    )
    return SimpleNamespace(
        name="tiny",
        config=config,
        params=jax.device_put(params(), parallel.shardings(params(), mesh)),
        mesh=mesh,
        tokenizer=tokenizer,
        chat_template=None,
        special_tokens={},
        context_length=context_length,
        eos_ids=(EOS,),
        step=7,
    )


@functools.cache
def scorer(layout=(1, 1, 1, 1), context_length=64, batch_tokens=2048):
    return Scorer(trained_model(layout, context_length), batch_tokens=batch_tokens)


@functools.cache
def _forward():
    lm = model()
    return jax.jit(lambda ids_BT: jax.nn.log_softmax(lm(ids_BT)[0] @ lm.output_weights(), axis=-1))


def _log_probs_TV(ids):
    # What stands to the right is not seen; one shape is compiled.
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_forward()(jnp.array(padded)))[0, : len(ids)]


def log_probs_alone(ids, first):
    """The log-probabilities of ids[first:] and whether each is the likeliest, from one sequence in an fp32 forward."""
    log_probs_TV = _log_probs_TV(ids)[first - 1 : -1]
    targets = np.asarray(ids[first:])
    return log_probs_TV[np.arange(len(targets)), targets], log_probs_TV.argmax(axis=-1) == targets


def greedy_alone(prompt, tokens):
    """The likeliest next tokens, each by a forward pass over all before it, up to eos."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and ids[-1] != EOS:
        ids.append(int(_log_probs_TV(ids)[-1].argmax()))
    return ids[len(prompt) :]
