"""A trained reward model to use: chats in, scores out. As a reward in reinforcement learning it says what a chat is
worth; its parameters are where a value model begins."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lightning_jax import parallel
from lightning_jax.input_pipeline.chat_masks import ChatEncoder
from lightning_jax.input_pipeline.chat_template import Message
from lightning_jax.input_pipeline.readers import Problem
from lightning_jax.model_folders import ModelFolderError, RunFolder, read_texts
from lightning_jax.models import RewardModel
from lightning_jax.objectives.reward import segment_scores
from lightning_jax.weights import abstract_model, restore_weights

SHORTEST_ROW = 64  # tokens; rows are padded to powers of two, so that few programs are compiled


@dataclass(frozen=True, eq=False)
class TrainedRewardModel:
    """A reward model with its tokenizer and chat template.

    Attributes:
        graphdef, params: `nnx.merge(graphdef, params)` is the model.
        step: of the run that trained it.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    chats: ChatEncoder
    step: int

    def scores(self, chats: Sequence[Sequence[Message]], *, rows: int = 8) -> np.ndarray:
        """The score of each chat, float32 [chats]; comparable between chats of one prompt.

        Args:
            rows: chats scored at a time.

        Raises:
            ModelFolderError: a chat that the template refuses.
        """
        encoded = self.chats.encode(chats)
        if problems := [each for each in encoded if isinstance(each, Problem)]:
            raise ModelFolderError(f"chat {encoded.index(problems[0])}: {problems[0]}")
        scores = np.zeros(len(chats), np.float32)
        for first in range(0, len(chats), rows):
            part = encoded[first : first + rows]
            longest = max(len(chat.ids) for chat in part)
            shape = rows, max(SHORTEST_ROW, 1 << (longest - 1).bit_length())
            batch = {name: np.zeros(shape, np.int32) for name in ("inputs", "segment_ids")}
            for row, chat in enumerate(part):
                batch["inputs"][row, : len(chat.ids)] = chat.ids
                batch["segment_ids"][row, : len(chat.ids)] = 1
            batch["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
            scores[first : first + rows] = _score(self.graphdef, self.params, batch)[: len(part), 0]
        return scores


@jax.jit(static_argnums=0)
def _score(graphdef: nnx.GraphDef, params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
    return segment_scores(nnx.merge(graphdef, params), batch)[0]


def load_reward_model(path: str | os.PathLike, *, say: Callable[[str], None]) -> TrainedRewardModel:
    """The reward model of a run's newest checkpoint that verifies, on the first device.

    Args:
        say: takes one line for each checkpoint that was rejected.

    Raises:
        UserError: there is no reward model in the folder, or it is damaged.
    """
    folder = RunFolder.open(Path(path))
    if not folder.is_reward_model:
        raise ModelFolderError(f"{path}: no run that trained a reward model")
    config = folder.config()
    mesh = parallel.make_mesh(parallel.MeshConfig.of(), jax.local_devices()[:1])
    graphdef, _ = abstract_model(config, mesh, kind=RewardModel)
    params, step = restore_weights(folder.path, config, mesh, kind=RewardModel, say=say)
    texts = read_texts(folder, config.vocab_size)
    encoder = ChatEncoder(texts.tokenizer, texts.chat_template, texts.special_tokens, "all")
    return TrainedRewardModel(graphdef, params, encoder, step)
