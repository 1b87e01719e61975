"""Log-likelihoods of tokens by the training forward, many spans of tokens packed into each row.

A span is scored as if it were alone: segment ids keep packed spans apart in every layer, as they keep documents apart
in training. Rows have few lengths, so that few shapes are compiled whatever the spans are.

Shapes: B batch, T sequence, C chunk, N chunks, D model dim, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lightning_jax import parallel
from lightning_jax.errors import UserError
from lightning_jax.generation import GenerationSettings, Generator, Sampling
from lightning_jax.generation.log_probs import map_logits, target_log_probs
from lightning_jax.generation.sampling import likeliest
from lightning_jax.input_pipeline import Tokenizer
from lightning_jax.input_pipeline.packing import PackedRows, Pieces, best_fit_decreasing
from lightning_jax.trained_model import TrainedModel
from lightning_jax.weights import abstract_model

SHORTEST_ROW, ROW_FACTOR = 256, 4  # rows are 256, 1024, 4096, ... tokens long, and as long as the context


Encode = Callable[[str], np.ndarray]  # a text's ids, without bos and eos


class Span(NamedTuple):
    """Tokens of which those from `first` on are scored, each given all before it; `first` is at least 1."""

    ids: np.ndarray  # int [n]
    first: int


class TokenScores(NamedTuple):
    """Of a span's scored tokens."""

    log_probs: np.ndarray  # fp32 [scored], nats
    likeliest: np.ndarray  # bool [scored], whether greedy decoding would have taken the token

    @property
    def log_likelihood(self) -> float:
        """Of all of them together, in nats."""
        return float(np.sum(self.log_probs, dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding gives exactly these tokens."""
        return bool(self.likeliest.all())


def windows(ids: np.ndarray, context_length: int, stride: int) -> Iterator[Span]:
    """Spans of at most `context_length` inputs in which each token but the first is scored exactly once.

    The first window scores all that it holds; each further one goes on by `stride` tokens, which it scores, and fills
    the rest of its inputs with the tokens before them. The last one is as full as the others. With a stride of the
    context's length these are lm-eval's rolling windows.
    """
    scored, stop = 1, min(context_length + 1, len(ids))
    while scored < len(ids):
        start = max(stop - context_length - 1, 0)
        yield Span(ids[start:stop], scored - start)
        scored, stop = stop, min(stop + stride, len(ids))


def start_ids(tokenizer: Tokenizer) -> np.ndarray:
    """What stands before a text: bos, or eos where there is no bos, or nothing."""
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return np.array([] if first is None else [first], np.int32)


def encode_pair(encode: Encode, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a context and of what continues it, encoded as one text; spaces between them go to the continuation.

    That is how lm-eval's harness splits them.
    """
    whole = encode(context + continuation).astype(np.int32)
    # A token across the border counts as continuation's, which has one at least.
    border = min(len(encode(context.rstrip())), max(len(whole) - 1, 0))
    return whole[:border], whole[border:]


class Scorer:
    """Scores spans and continues prompts with one model, on the mesh and with the shardings on which it lies.

    Experts are dispatched without dropping tokens, because which ones are dropped depends on the rest of the batch.

    Args:
        batch_tokens: computed at one time; at least one row for each part that the mesh splits a batch into.

    Raises:
        UserError: the model has no tokenizer.
    """

    def __init__(self, model: TrainedModel, *, batch_tokens: int = 16_384):
        if model.tokenizer is None:
            raise UserError(f"{model.name}: there is no tokenizer in it, and all that is asked is text")
        self.model, self.tokenizer, self.batch_tokens = model, model.tokenizer, batch_tokens
        dispatch = "auto" if model.config.expert_dispatch == "capacity" else model.config.expert_dispatch
        config = dataclasses.replace(model.config, expert_dispatch=dispatch, remat="none")
        graphdef, _ = abstract_model(config, model.mesh)
        # Every process gets all scores, whichever devices computed them.
        self._score = jax.jit(
            functools.partial(target_scores, graphdef),
            out_shardings=NamedSharding(model.mesh, PartitionSpec()),
        )

    def score(self, spans: Sequence[Span]) -> list[TokenScores]:
        """The scores of each span."""
        lengths = np.array([self._row_length(len(span.ids) - 1) for span in spans])
        scores: dict[int, TokenScores] = {}
        for length in np.unique(lengths):
            members = np.flatnonzero(lengths == length)
            rows = PackedSpans([spans[member].ids for member in members.tolist()], int(length))
            columns = [np.concatenate(column) for column in zip(*self._scored_batches(rows), strict=True)]
            end = 0
            for member in members[rows.order].tolist():
                span = spans[member]
                end += len(span.ids) - 1
                scores[member] = TokenScores(*(column[end - len(span.ids) + span.first : end] for column in columns))
        return [scores[number] for number in range(len(spans))]

    def continuations(self, prompts: Sequence[np.ndarray], samplings: Sequence[Sampling]) -> list[str]:
        """What is generated behind each prompt, with room for the longest in slots for the scorer's batch of tokens."""
        model, shards = self.model, parallel.batch_shards(self.model.mesh)
        needed = [len(prompt) + sampling.max_new_tokens for prompt, sampling in zip(prompts, samplings, strict=True)]
        capacity = -(-max(needed) // 256) * 256
        slots = min(max(self.batch_tokens // capacity, 1), len(prompts))
        settings = GenerationSettings(slots=-(-slots // shards) * shards, capacity=capacity)
        generator = Generator(model.config, model.params, settings, mesh=model.mesh, tokenizer=self.tokenizer)
        completions = generator.generate([prompt.tolist() for prompt in prompts], samplings)
        texts = {completion.prompt: completion.text or "" for completion in completions}
        return [texts[number] for number in range(len(prompts))]

    def _row_length(self, inputs: int) -> int:
        length = SHORTEST_ROW
        while length < inputs:
            length *= ROW_FACTOR
        context_length = self.model.context_length or length
        return context_length if inputs <= context_length < length else length

    def _scored_batches(self, rows: "PackedSpans") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-probabilities of the targets of all rows one after the other, and whether they are the likeliest."""
        shards = parallel.batch_shards(self.model.mesh)
        per_batch = min(max(self.batch_tokens // rows.context_length, 1), 1 << (len(rows) - 1).bit_length())
        per_batch = -(-per_batch // shards) * shards
        sharding = parallel.batch_sharding(self.model.mesh)
        for first in range(0, len(rows), per_batch):
            taken = rows.take(np.arange(first, min(first + per_batch, len(rows))))
            missing = per_batch - len(taken["inputs"])
            batch = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in taken.items()}
            log_probs_BT, likeliest_BT = self._score(self.model.params, jax.device_put(batch, sharding))
            yield np.asarray(log_probs_BT)[batch["loss_mask"]], np.asarray(likeliest_BT)[batch["loss_mask"]]


class PackedSpans(PackedRows):
    """Every sequence of tokens whole in one row, by best-fit-decreasing.

    Attributes:
        order: the numbers of the sequences in the order in which they stand in the rows.
    """

    def __init__(self, sequences: Sequence[np.ndarray], context_length: int):
        sizes = np.array([len(ids) for ids in sequences], np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        store = SimpleNamespace(
            folder="spans", tokens=np.concatenate(sequences), offsets=offsets, trained=None, document_values={}
        )
        super().__init__(store, context_length)
        row = best_fit_decreasing(sizes - 1, context_length)
        self.order = np.argsort(row, kind="stable")
        self._start, self._size = offsets[self.order], sizes[self.order]
        self._row_end = np.cumsum(np.bincount(row))

    def __len__(self) -> int:
        return len(self._row_end)

    def pieces(self, rows: np.ndarray) -> Pieces:
        first = np.where(rows > 0, self._row_end[rows - 1], 0)
        piece = np.concatenate([np.arange(*ends) for ends in zip(first, self._row_end[rows], strict=True)])
        start, size = self._start[piece], self._size[piece]
        return Pieces(self._row_end[rows] - first, start, size - 1, start + size)


def target_scores(
    graphdef: nnx.GraphDef, params: nnx.State, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The log-probability [B, T] of every target, at least fp32, in nats, and whether it is the likeliest token."""
    model = nnx.merge(graphdef, params)
    hidden_BTD, _ = model(batch["inputs"], segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"])
    return map_logits(
        model,
        hidden_BTD,
        batch["targets"],
        lambda logits, targets: (target_log_probs(logits, targets), likeliest(logits) == targets),
    )
