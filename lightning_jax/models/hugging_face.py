"""How Hugging Face names and lays out the weights of our models: one table, read in both directions.

A tensor of theirs holds one layer's matrix [outputs, inputs] or, of a mixture of experts, one expert's; an array of
ours holds those of all layers of a run, each [inputs, outputs]. So a checkpoint is a list of pieces: some rows of a
tensor there are a matrix inside an array here.

Sources: the weight index of MiniMax-M1 (arXiv 2506.13585; model.safetensors.index.json), whose names transformers
writes too; transformers' `MiniMaxForCausalLM` in memory, which fuses the experts; `LlamaForCausalLM`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from lightning_jax.models.config import LayerKind, ModelConfig
from lightning_jax.models.hybrid import HybridLM
from lightning_jax.models.layer_stack import runs


class Entry(NamedTuple):
    """One kind of weight.

    Attributes:
        ours: its path in the model or in a block.
        theirs: its name there; `{expert}` where each expert has a tensor of its own.
        transposed: theirs is [outputs, inputs], ours [inputs, outputs].
        part: which part of how many equal ones of their rows it is.
    """

    ours: str
    theirs: str
    transposed: bool = True
    part: tuple[int, int] = (0, 1)


ENDS = (
    Entry("embedding", "model.embed_tokens.weight", transposed=False),
    Entry("final_norm/weight", "model.norm.weight", transposed=False),
    Entry("head", "lm_head.weight"),  # absent on both sides where embeddings are tied
)
BLOCK = (
    Entry("mixer_norm/weight", "input_layernorm.weight", transposed=False),
    Entry("feed_forward_norm/weight", "post_attention_layernorm.weight", transposed=False),
)
MIXER: dict[LayerKind, tuple[Entry, ...]] = {
    "lightning": (
        # Both have the query, key and value columns of a head side by side, head after head.
        Entry("mixer/query_key_value", "self_attn.qkv_proj.weight"),
        Entry("mixer/gate", "self_attn.output_gate.weight"),
        Entry("mixer/norm/weight", "self_attn.norm.weight", transposed=False),
        Entry("mixer/output", "self_attn.out_proj.weight"),
    ),
    "softmax": (
        Entry("mixer/query", "self_attn.q_proj.weight"),
        Entry("mixer/key", "self_attn.k_proj.weight"),
        Entry("mixer/value", "self_attn.v_proj.weight"),
        Entry("mixer/output", "self_attn.o_proj.weight"),
    ),
}
FeedForwardNames = Literal["dense", "experts", "fused_experts"]
FEED_FORWARD: dict[FeedForwardNames, tuple[Entry, ...]] = {
    "dense": (
        Entry("feed_forward/gate", "mlp.gate_proj.weight"),
        Entry("feed_forward/up", "mlp.up_proj.weight"),
        Entry("feed_forward/down", "mlp.down_proj.weight"),
    ),
    "experts": (
        Entry("feed_forward/router", "block_sparse_moe.gate.weight"),
        Entry("feed_forward/gate", "block_sparse_moe.experts.{expert}.w1.weight"),
        Entry("feed_forward/up", "block_sparse_moe.experts.{expert}.w3.weight"),
        Entry("feed_forward/down", "block_sparse_moe.experts.{expert}.w2.weight"),
    ),
    "fused_experts": (
        Entry("feed_forward/router", "mlp.gate.weight"),
        Entry("feed_forward/gate", "mlp.experts.gate_up_proj", part=(0, 2)),
        Entry("feed_forward/up", "mlp.experts.gate_up_proj", part=(1, 2)),
        Entry("feed_forward/down", "mlp.experts.down_proj"),
    ),
}
# What transformers stores though it follows from the config: the decays, and Llama's rotary frequencies in old files.
DERIVED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay", "rotary_emb.inv_freq")
ROUTER = "feed_forward/router"


@dataclass(frozen=True)
class Piece:
    """A matrix or vector: rows of a tensor of theirs, and the same, perhaps transposed, inside an array of ours."""

    tensor: str
    tensor_shape: tuple[int, ...]
    first_row: int  # in the tensor as a matrix [all but the last axis, last axis]
    shape: tuple[int, ...]  # as it lies in their tensor
    path: str
    index: tuple[int, ...]  # the leading axes of our array
    transposed: bool

    def blocks(self, most_elements: int) -> Iterator["Block"]:
        """The piece cut into neighbouring rows of theirs that have at most so many elements, or one row."""
        rows = self.block_shape(most_elements)[0]
        for first in range(0, self.shape[0], rows):
            shape = (min(rows, self.shape[0] - first), *self.shape[1:])
            place = (0, first) if self.transposed else (first, *(0 for _ in self.shape[1:]))
            yield Block(self.first_row + first, shape, (*self.index, *place), self.transposed)

    def block_shape(self, most_elements: int) -> tuple[int, ...]:
        """The shape of a piece's first block as it lies in their tensor."""
        row = math.prod(self.shape[1:])
        return (max(1, min(self.shape[0], most_elements // max(row, 1))), *self.shape[1:])

    @property
    def is_router(self) -> bool:
        """Whether it is one of the weights that are float32 in the released models, whatever the others are."""
        return self.path.endswith(ROUTER)


@dataclass(frozen=True)
class Block:
    """Some rows of a piece: where they lie in their tensor, and where in our array."""

    first_row: int
    shape: tuple[int, ...]
    start: tuple[int, ...]
    transposed: bool

    @property
    def our_shape(self) -> tuple[int, ...]:
        """With all axes of our array."""
        own = self.shape[::-1] if self.transposed else self.shape
        return (1,) * (len(self.start) - len(own)) + own

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        return (theirs.T if self.transposed else theirs).reshape(self.our_shape)

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        return (ours.T if self.transposed else ours).reshape(self.shape)


@functools.cache
def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model by path, e.g. `stacks/0/runs/0/mixer/gate`."""
    model = nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0)))
    return {
        "/".join(map(str, path)): jax.ShapeDtypeStruct(leaf.get_value().shape, leaf.get_value().dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def feed_forward_names(config: ModelConfig, tensors: Sequence[str] | Mapping[str, object] = ()) -> FeedForwardNames:
    """How the feed-forwards are named in a checkpoint of these tensors; without any, how we write them."""
    if not config.num_experts:
        return "dense"
    return "fused_experts" if "model.layers.0.mlp.gate.weight" in tensors else "experts"


def reward_model_pieces(config: ModelConfig, names: FeedForwardNames) -> list[Piece]:
    """All of a reward model's weights that scores depend on, as transformers' ...ForSequenceClassification has them."""
    backbone = [piece for piece in pieces(config, names) if piece.path != "head"]
    D = config.hidden_size
    score = Piece("score.weight", (1, D), 0, (D,), "head", (), transposed=False)
    return [*(dataclasses.replace(piece, path=f"backbone/{piece.path}") for piece in backbone), score]


def pieces(config: ModelConfig, names: FeedForwardNames) -> list[Piece]:
    """All of a model's weights, in the order of the layers.

    Together they cover every tensor and every array exactly once.
    """
    shapes = {path: leaf.shape for path, leaf in parameter_shapes(config).items()}
    found = [piece for entry in ENDS if entry.ours in shapes for piece in _pieces(entry, "", "", (), shapes)]
    period = len(config.layer_pattern)
    for layer, kind in enumerate(config.layer_kinds()):
        repeat, place = divmod(layer, period)
        whole = config.num_layers // period
        stack, repeat = (0, repeat) if repeat < whole else (1, 0)
        pattern = config.layer_pattern if stack == 0 else config.layer_pattern[: config.num_layers % period]
        number, run = next((n, r) for n, r in enumerate(runs(pattern)) if r.start <= place < r.start + r.length)
        ours, theirs = f"stacks/{stack}/runs/{number}/", f"model.layers.{layer}."
        for entry in (*BLOCK, *MIXER[kind], *FEED_FORWARD[names]):
            found.extend(_pieces(entry, ours, theirs, (repeat, place - run.start), shapes))
    return found


def _pieces(
    entry: Entry, ours: str, theirs: str, index: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Piece]:
    path = ours + entry.ours
    inner = shapes[path][len(index) :]
    own = inner[-2:] if entry.transposed else inner
    experts = inner[: len(inner) - len(own)]
    part, parts = entry.part
    shape = own[::-1] if entry.transposed else own
    for expert in itertools.product(*map(range, experts)):
        name = theirs + entry.theirs
        whole = (shape[0] * parts, *shape[1:])
        first_row = part * shape[0]
        if "{expert}" in name:
            name = name.format(expert=expert[0])
        elif expert:
            first_row += expert[0] * whole[0]
            whole = (*experts, *whole)
        yield Piece(name, whole, first_row, shape, path, (*index, *expert), entry.transposed)


def tensor_shapes(pieces: Sequence[Piece]) -> dict[str, tuple[int, ...]]:
    """The tensors that the pieces lie in, in their order."""
    return {piece.tensor: piece.tensor_shape for piece in pieces}


def differences(pieces: Sequence[Piece], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps a checkpoint from being this model: a line for every tensor that is missing, unexpected or mis-shaped.

    Args:
        found: the shapes of its tensors.
    """
    expected = tensor_shapes(pieces)
    wrong = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            wrong.append(f"tensor {name} is missing; it should be {list(expected[name])}")
        elif name not in expected and not name.endswith(DERIVED):
            wrong.append(f"tensor {name} {list(found[name])} is unexpected; the model has no such weight")
        elif name in expected and tuple(found[name]) != expected[name]:
            wrong.append(f"tensor {name} is {list(found[name])}; it should be {list(expected[name])}")
    return wrong
