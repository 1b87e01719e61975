"""Imported models compute what transformers and a reference in numpy compute, and the table covers every weight once.

The values of transformers were made by tests/goldens/make_import_goldens.py.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path += [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[1] / "goldens")]
import golden_weights
import numpy_minimax
import released_models
from test_config import LLAMA, MINIMAX

from lightning_jax.generation import GenerationSettings, Generator, Sampling
from lightning_jax.model_folders import HuggingFaceFolder
from lightning_jax.models import HybridLM, hugging_face, rope
from lightning_jax.models.hugging_face_config import HuggingFaceError, read_config, write_config
from lightning_jax.models.layer_stack import runs
from lightning_jax.models.mixers import MIXERS, Tokens
from lightning_jax.trained_model import TrainedModel, load_model

GOLDENS = sorted((pathlib.Path(__file__).parents[1] / "goldens").glob("import_*.npz"))


FAST = ("minimax_three_heads", "llama_scaled_tied")


def named(path: pathlib.Path) -> str:
    return path.stem.removeprefix("import_")


@pytest.fixture(
    scope="module",
    params=[pytest.param(p, id=named(p), marks=() if named(p) in FAST else pytest.mark.slow) for p in GOLDENS],
)
def imported(request, tmp_path_factory) -> tuple[dict[str, np.ndarray], TrainedModel]:
    """A golden and the model that is loaded from a folder with its config and weights."""
    golden = dict(np.load(request.param))
    fields = json.loads(str(golden["config"]))
    shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    path = tmp_path_factory.mktemp("model")
    released_models.write(path, fields, golden_weights.tensors(shapes))
    (path / "tokenizer.json").unlink()
    return golden, load_model(path, say=print)


def layer_inputs(model: HybridLM, tokens: np.ndarray) -> list[jax.Array]:
    """What goes into every layer, computed one layer after the other."""
    x = model.embedding[...][tokens]
    positions = jnp.arange(tokens.shape[1])[None]
    given = Tokens(None, rope.rotation(model.config, positions))
    inputs = []
    for stack in model.stacks:
        blocks = [(run, *nnx.split(own)) for run, own in zip(runs(stack.pattern), stack.runs, strict=True)]
        for repeat in range(stack.repeats):
            for run, graphdef, parameters in blocks:
                for place in range(run.length):
                    inputs.append(x)
                    constants = MIXERS[run.kind].constants(model.config, len(inputs) - 1)
                    own = jax.tree.map(lambda leaf, at=(repeat, place): leaf[at], parameters)
                    block = nnx.merge(graphdef, own)
                    x, *_ = block(x, constants, given, jnp.ones(tokens.shape, bool), None)
    return inputs


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_logits_and_hidden_states_of_every_layer_equal_transformers(imported):
    golden, trained = imported

    @jax.jit
    def outputs(params, tokens):
        model = nnx.merge(trained.graphdef, params)
        hidden, _ = model(tokens)
        return model.logits(hidden), jnp.stack([*layer_inputs(model, tokens), hidden])

    logits, hidden = outputs(trained.params, golden["tokens"])
    assert_close(logits, golden["logits"])
    assert_close(hidden, golden["hidden"])


def test_gradients_equal_transformers(imported):
    golden, trained = imported
    tokens = golden["tokens"]

    @jax.jit
    def loss_and_gradients(params):
        def loss(params):
            model = nnx.merge(trained.graphdef, params)
            log_probs = jax.nn.log_softmax(model.logits(model(tokens)[0][:, :-1]))
            return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

        return jax.value_and_grad(loss)(params)

    loss, gradients = loss_and_gradients(trained.params)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    flat = {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}
    names = "fused_experts" if trained.config.num_experts else "dense"  # as transformers has them in memory
    theirs = {}
    for piece in hugging_face.pieces(trained.config, names):
        (block,) = piece.blocks(10**9)
        whole = theirs.setdefault(piece.tensor, np.zeros(piece.tensor_shape, np.float32))
        rows = whole if whole.ndim == 1 else whole.reshape(-1, whole.shape[-1])
        rows[piece.first_row : piece.first_row + piece.shape[0]] = block.theirs(flat[piece.path][piece.index])
    parameters = json.loads(str(golden["parameters"]))
    assert {name: list(gradient.shape) for name, gradient in theirs.items()} == parameters
    found = [np.sum(theirs[name] * golden_weights.direction(name, shape)) for name, shape in parameters.items()]
    assert_close(found, golden["gradients"])


def test_greedy_continuations_equal_transformers_token_for_token(imported):
    golden, trained = imported
    prompts, expected = golden["greedy"][:, :5], golden["greedy"][:, 5:]
    settings = GenerationSettings(slots=2, capacity=80, prefill_tokens=16, decode_steps=16)
    generator = Generator(trained.config, trained.params, settings, mesh=trained.mesh)
    sampling = Sampling(max_new_tokens=64, temperature=0)
    for completion in generator.generate(prompts.tolist(), sampling):
        assert completion.ids == expected[completion.prompt].tolist()


RELEASED = [path for path in GOLDENS if "attn_type_list" in str(np.load(path)["config"])]


@pytest.mark.parametrize("path", RELEASED, ids=named)
def test_a_reference_in_numpy_of_the_released_semantics_agrees(path):
    golden = np.load(path)
    fields = json.loads(str(golden["config"]))
    shapes = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    weights = golden_weights.tensors(shapes)
    for row in range(len(golden["tokens"])):
        hidden, logits = numpy_minimax.forward(fields, weights, golden["tokens"][row])
        assert_close(golden["logits"][row], logits)
        assert_close(golden["hidden"][:, row], np.stack(hidden))


def test_the_reference_in_numpy_agrees_beyond_a_chunk(tmp_path):
    weights = golden_weights.tensors(released_models.shapes(released_models.RELEASED))
    released_models.write(tmp_path, released_models.RELEASED, weights)
    trained = load_model(tmp_path, say=print)
    model = nnx.merge(trained.graphdef, trained.params)
    tokens = np.random.default_rng(0).integers(0, 48, (1, 70))
    _, logits = numpy_minimax.forward(released_models.RELEASED, weights, tokens[0])
    assert_close(model.logits(model(tokens)[0])[0], logits)


def test_the_goldens_are_twelve_architectures():
    assert len(GOLDENS) == 12
    assert sum(path.stat().st_size for path in GOLDENS) < 300_000


@pytest.mark.parametrize("names", ["dense", "experts", "fused_experts"])
def test_the_pieces_cover_every_tensor_and_every_array_once(names):
    config = dataclasses.replace(
        MINIMAX if names != "dense" else LLAMA, vocab_size=11, hidden_size=6, num_layers=5, num_heads=2, head_dim=4,
        num_kv_heads=1, rotary_dim=2, intermediate_size=3, layer_pattern=("lightning", "softmax", "softmax"),
    )  # fmt: skip
    config = dataclasses.replace(config, num_experts=3) if names != "dense" else config
    pieces = hugging_face.pieces(config, names)
    ours = {path: np.zeros(leaf.shape, int) for path, leaf in hugging_face.parameter_shapes(config).items()}
    theirs = {name: np.zeros(shape, int) for name, shape in hugging_face.tensor_shapes(pieces).items()}
    for piece in pieces:
        for block in piece.blocks(7):
            where = tuple(slice(a, a + n) for a, n in zip(block.start, block.our_shape, strict=True))
            ours[piece.path][where] += 1
            tensor = theirs[piece.tensor]
            rows = tensor if tensor.ndim == 1 else tensor.reshape(-1, tensor.shape[-1])
            rows[block.first_row : block.first_row + block.shape[0]] += 1
    for counts in (*ours.values(), *theirs.values()):
        assert (counts == 1).all()


@pytest.mark.parametrize("name", released_models.CONFIGS)
def test_the_tensors_are_those_of_the_released_files(name, tmp_path):
    fields = released_models.CONFIGS[name]
    pieces = hugging_face.pieces(read_config(fields, "float32"), "experts" if name in ("released", "port") else "dense")
    assert hugging_face.tensor_shapes(pieces) == released_models.shapes(fields)


def test_text_01_has_the_released_number_of_tensors_and_bytes():
    fields = released_models.RELEASED | {
        "vocab_size": 200_064, "hidden_size": 6144, "intermediate_size": 9216, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64,
        "attn_type_list": ([0] * 7 + [1]) * 10, "num_local_experts": 32,
    }  # fmt: skip
    config = read_config(fields, "bfloat16")
    pieces = hugging_face.pieces(config, "experts")
    shapes = hugging_face.tensor_shapes(pieces)
    assert len(shapes) == 8243
    routers = sum(int(np.prod(piece.shape)) for piece in pieces if piece.is_router)
    assert sum(2 * int(np.prod(shape)) for shape in shapes.values()) + 2 * routers == 912_210_767_872
    assert config.layer_pattern == ("lightning",) * 7 + ("softmax",)


@pytest.mark.parametrize("names", ["released", "transformers"])
@pytest.mark.parametrize("alpha", [1.0, 3.5565588200778455])
def test_a_config_comes_back_as_it_was_written(names, alpha):
    config = dataclasses.replace(
        MINIMAX, num_layers=13, layer_pattern=("softmax", "lightning"), residual_alpha=alpha, residual_beta=0.5,
        router_aux_loss="huggingface", router_aux_coefficient=0.001, param_dtype="float32", compute_dtype="float32",
    )  # fmt: skip
    written = write_config(config, names, {}, dtype="float32", context_length=100)
    assert read_config(json.loads(json.dumps(written)), "float32") == config
    assert written["max_position_embeddings"] == 100
    assert written["postnorm"] is True  # without it vLLM adds the residual before the norm


@pytest.mark.parametrize("names", [None, "released"])
def test_what_no_architecture_computes_is_named(names):
    config = dataclasses.replace(
        LLAMA if names is None else MINIMAX, residual_alpha=2.0, lightning_norm_eps=1e-5,
        rope_scaling=None, layer_pattern=("lightning",), norm_placement="post",
    )  # fmt: skip
    with pytest.raises(HuggingFaceError) as error:
        write_config(config, names, {}, dtype="float32", context_length=None)
    fields = [line.split(":")[0] for line in str(error.value).splitlines()]
    if names:
        assert fields == ["model.lightning_norm_eps"]
    else:
        assert fields == ["model.norm_placement", "model.residual_alpha", "model.layer_pattern"]


def test_a_tied_models_copy_of_its_embedding_is_not_another_weight(tmp_path):
    tensors = released_models.weights(released_models.TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    released_models.write(tmp_path, released_models.TIED, tensors)
    assert HuggingFaceFolder.open(tmp_path).config.tie_embeddings
