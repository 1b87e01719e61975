"""Exact rollouts: completions drawn by the training forward itself, with its own log-probabilities, bit for bit.

A decoding loop and the training forward are two programs, which round differently. Here the loop only proposes. A token
is the likeliest of the logits with the noise of its key, whichever program computes them: so the training forward, one
pass over the row, says at every place behind an unchanged beginning which token it draws there. Up to the first one
that differs, the proposal is its own draw; that one is replaced, and the loop goes on behind it. What comes out is what
the training forward would have drawn token by token, at the price of about one pass where the programs hardly differ.

Sources: speculative decoding (arXiv 2211.17192), here with common random numbers in place of rejection; MiniMax-M1
(arXiv 2506.13585) section 3.2 for why the two programs' probabilities should agree.

Shapes: N rows, B batch, T sequence, M tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from lightning_jax.generation import decoding
from lightning_jax.generation.completion import Completion, FinishReason, GrowingCompletion
from lightning_jax.generation.generator import Beginning, Generator
from lightning_jax.generation.log_probs import completion_batch, target_log_probs
from lightning_jax.generation.sampling import Sampling, gumbel_noise, likeliest
from lightning_jax.generation.slots import sample_key
from lightning_jax.generation.text import TextStream
from lightning_jax.models import HybridLM, ModelConfig
from lightning_jax.objectives.cross_entropy import map_logits
from lightning_jax.objectives.forward import training_forward

KEYS, NUMBERS = "draw_keys", "draw_numbers"  # of a batch: [B, T, 2] and [B, T]

# From rows to the tokens that the training forward draws behind each of theirs, and these tokens' log-probabilities.
Draw = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]


def drawn_tokens(
    model: HybridLM,
    config: ModelConfig,
    batch: dict[str, jax.Array],
    *,
    temperature: float,
    rope_theta: float | jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The token [B, T] that is drawn at every place by the training forward, and its log-probability in nats."""
    hidden_BTD, _ = training_forward(model, batch, rope_theta)

    def draw(logits_MV, keys_M2, number_M):
        noise_MV = gumbel_noise(decoding.token_keys(keys_M2, number_M), logits_MV)
        token_M = likeliest(logits_MV + noise_MV)
        return token_M, target_log_probs(logits_MV, token_M)

    def each(weights_DV, *rows):
        chunk, dtype = config.loss_chunk, config.logits_dtype
        return map_logits(draw, rows[0], weights_DV, *rows[1:], chunk=chunk, dtype=dtype, temperature=temperature)

    return model.operators.map_rows(each, model.output_weights(), hidden_BTD, batch[KEYS], batch[NUMBERS])


def exact_completions(
    generator: Generator, draw: Draw, prompts: Sequence[Sequence[int]], sampling: Sampling, length: int
) -> Iterator[Completion]:
    """What `generator.generate(prompts, sampling)` gives, drawn by the training forward.

    Args:
        sampling: at the temperature of `draw`.
        length: of the rows that `draw` takes.

    Raises:
        ValueError: a sampling that is another distribution than the model's, or that ends at texts.
    """
    if not sampling.temperature or sampling.truncates or sampling.repetition_penalty != 1 or sampling.stop:
        raise ValueError(
            "exact completions are drawn from the model's own distribution and end at tokens: a positive temperature, "
            "no top_k, top_p, min_p or repetition_penalty, and stop_ids in place of stop"
        )
    growing = {
        (number, sample): _Growing.begin(generator, number, sample, ids, sampling)
        for number, ids in enumerate(prompts)
        for sample in range(sampling.samples)
    }
    drafts = list(generator.generate(prompts, sampling))
    while drafts:
        sequences = [growing[draft.prompt, draft.sample] for draft in drafts]
        tokens_NT, log_probs_NT = draw(_rows(sequences, drafts, length))
        unfinished, accepted = [], 0
        for sequence, draft, tokens_T, log_probs_T in zip(sequences, drafts, tokens_NT, log_probs_NT, strict=True):
            begun = len(sequence.completion.ids)
            if completion := sequence.take(draft.ids, tokens_T, log_probs_T):
                yield completion
            else:
                unfinished.append(sequence.beginning)
                accepted += len(sequence.completion.ids) - begun
        # What is proposed behind a token that differs is lost, so not much more than was accepted of the last ones.
        most = -(-2 * accepted // max(len(unfinished), 1))
        drafts = list(generator.go_on(unfinished, sampling, most)) if unfinished else []


@dataclass
class _Growing:
    """A completion as far as the training forward has drawn it."""

    prompt_ids: list[int]
    sampling: Sampling
    completion: GrowingCompletion
    certain: int = 0  # how many of the last tokens in a row were nearly certain

    @classmethod
    def begin(
        cls, generator: Generator, number: int, sample: int, prompt_ids: Iterable[int], sampling: Sampling
    ) -> "_Growing":
        stream = TextStream(generator.tokenizer, ()) if generator.tokenizer else None
        return cls(list(prompt_ids), sampling, GrowingCompletion(number, sample, stream, None))

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.completion.ids

    @property
    def beginning(self) -> Beginning:
        completion = self.completion
        return Beginning(completion.prompt, completion.sample, self.ids, len(completion.ids))

    def take(self, draft: list[int], tokens_T: np.ndarray, log_probs_T: np.ndarray) -> Completion | None:
        """Takes what is drawn behind the ids so far and the part of the draft that agrees; the completion at its end.

        Args:
            tokens_T, log_probs_T: what is drawn behind each token of the row.
        """
        for place, proposed in enumerate(draft, len(self.ids) - 1):
            token, log_prob = int(tokens_T[place]), float(log_probs_T[place])
            if reason := self._push(token, log_prob):
                return self.completion.finish(reason)
            if token != proposed:
                break
        return None

    def _push(self, token: int, log_prob: float) -> FinishReason | None:
        """Takes a token; why it is the last, if it is, by the rules of the decoding loop."""
        sampling = self.sampling
        stops = token in sampling.stop_ids
        self.completion.push(token, log_prob, is_text=not stops)
        self.certain = self.certain + 1 if np.exp(log_prob) > sampling.repetition_probability else 0
        if stops:
            return "stop"
        if sampling.repetition_tokens and self.certain >= sampling.repetition_tokens:
            return "repetition"
        return "length" if len(self.completion.ids) >= sampling.max_new_tokens else None


def _rows(sequences: list[_Growing], drafts: list[Completion], length: int) -> dict[str, np.ndarray]:
    """The rows of beginnings with their drafts, and the key and number of the token behind each place."""
    rows = completion_batch([sequence.ids for sequence in sequences], [draft.ids for draft in drafts], length)
    keys_N2 = np.array(
        [
            sample_key(sequence.sampling, draft.prompt, draft.sample)
            for sequence, draft in zip(sequences, drafts, strict=True)
        ]
    )
    begin_N = np.array([len(sequence.prompt_ids) - 1 for sequence in sequences])
    numbers_NT = np.maximum(np.arange(length) - begin_N[:, None], 0).astype(np.int32)
    return rows | {KEYS: np.repeat(keys_N2[:, None], length, axis=1), NUMBERS: numbers_NT}
