"""A trained model to use: from a run of ours or from a Hugging Face folder, laid out over devices."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lightning_jax import parallel
from lightning_jax.checkpoints.fingerprint import fingerprints
from lightning_jax.checkpoints.safetensors_folder import Tensor
from lightning_jax.checkpoints.state_tree import named_leaves
from lightning_jax.input_pipeline import Tokenizer
from lightning_jax.input_pipeline.sources import fingerprint
from lightning_jax.model_folders import (
    HuggingFaceFolder,
    ModelFolderError,
    RunFolder,
    open_model_folder,
    read_texts,
)
from lightning_jax.models import ModelConfig
from lightning_jax.models.hugging_face import Piece
from lightning_jax.weights import abstract_model, restore_weights


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """Everything that generation and evaluation need of a model.

    Attributes:
        name: of its folder.
        config: with the rotary base that it was last trained with.
        graphdef, params: `nnx.merge(graphdef, params)` is the model, with the operators of its mesh.
        special_tokens: by the names that chat templates know: bos_token, eos_token, ...
        context_length: in tokens, that it was trained for; None where nothing says.
        eos_ids: any of them ends what it generates.
        step: of the run; None for a Hugging Face folder.
    """

    name: str
    config: ModelConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    mesh: Mesh
    tokenizer: Tokenizer | None
    chat_template: str | None
    special_tokens: dict[str, str]
    context_length: int | None
    eos_ids: tuple[int, ...]
    step: int | None


def load_model(
    path: str | os.PathLike,
    *,
    mesh: parallel.MeshConfig | None = None,
    compute_dtype: Literal["float32", "bfloat16"] | None = None,
    say: Callable[[str], None],
) -> TrainedModel:
    """Loads a model; each process reads the weights that its devices hold.

    Args:
        path: a run of ours, whose newest checkpoint that verifies is taken, or a Hugging Face folder.
        mesh: over which devices; all on the first one if not given.
        compute_dtype: instead of the model's own.
        say: takes one line for each checkpoint that was rejected.

    Raises:
        UserError: there is no model, it is damaged, or it does not divide over the mesh; a line for every reason.
    """
    folder = open_model_folder(Path(path))
    if isinstance(folder, RunFolder) and folder.is_reward_model:
        raise ModelFolderError(f"{path}: a reward model; it scores chats (load_reward_model) and writes none")
    config = folder.config() if isinstance(folder, RunFolder) else folder.config
    config = dataclasses.replace(config, compute_dtype=compute_dtype or config.compute_dtype)
    texts = read_texts(folder, config.vocab_size)
    try:
        devices = parallel.make_mesh(mesh or parallel.MeshConfig.of(), None if mesh else jax.local_devices()[:1])
        graphdef, abstract = abstract_model(config, devices)
    except (parallel.MeshError, parallel.ShardingError) as error:
        raise ModelFolderError(f"{path}: {error}") from None
    step = None
    if isinstance(folder, RunFolder):
        params, step = restore_weights(folder.path, config, devices, say=say)
        rope_theta = folder.config(step).rope_theta
        if rope_theta != config.rope_theta:
            config = dataclasses.replace(config, rope_theta=rope_theta)
            graphdef, _ = abstract_model(config, devices)
    else:
        params = read_params(folder, abstract)
    return TrainedModel(
        name=Path(path).absolute().name,
        config=config,
        graphdef=graphdef,
        params=params,
        mesh=devices,
        tokenizer=texts.tokenizer,
        chat_template=texts.chat_template,
        special_tokens=texts.special_tokens,
        context_length=folder.context_length,
        eos_ids=texts.eos_ids,
        step=step,
    )


def model_fingerprint(model: TrainedModel) -> str:
    """Equal for models that compute the same from the same text, however they are laid out; every process calls it."""
    weights = fingerprints(named_leaves(nnx.to_pure_dict(model.params)))()
    tokenizer = model.tokenizer and model.tokenizer.fingerprint
    return fingerprint([weights, dataclasses.asdict(model.config), tokenizer, model.chat_template])[:16]


def read_params(folder: HuggingFaceFolder, abstract: nnx.State) -> nnx.State:
    """The parameters from safetensors, each device's part of an array read for itself."""
    pieces: dict[str, list[Piece]] = {}
    for piece in folder.pieces:
        pieces.setdefault(piece.path, []).append(piece)

    def read(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        own = pieces[jax.tree_util.keystr(path[:-1], simple=True, separator="/")]

        def part(index: Any) -> np.ndarray:
            return read_part(own, folder.tensors, leaf, index)

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree_util.tree_map_with_path(read, abstract)


def read_part(
    pieces: list[Piece], tensors: dict[str, Tensor], leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]
) -> np.ndarray:
    """The part of an array of ours that `index` selects, from the pieces of the array."""
    ranges = [range(*each.indices(size)) for each, size in zip(index, leaf.shape, strict=True)]
    part: Any = np.empty([len(each) for each in ranges], leaf.dtype)
    for piece in pieces:
        outer, own = ranges[: len(piece.index)], ranges[len(piece.index) :]
        if not all(place in each for each, place in zip(outer, piece.index, strict=True)):
            continue
        leading = tuple(each.index(place) for each, place in zip(outer, piece.index, strict=True))
        rows, *others = own[::-1] if piece.transposed else own
        columns = slice(others[0].start, others[0].stop) if others else slice(None)
        shape = (len(rows), *piece.shape[1:])
        block = tensors[piece.tensor].read(piece.first_row + rows.start, shape, columns)
        part[leading] = block.T if piece.transposed else block
    return part
