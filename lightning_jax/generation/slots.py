"""The host's side of continuous batching: which sample of which prompt is in which slot.

All tokens of a prompt but its last are prefilled in pieces of few sizes into a state of its own, which is then copied
into the slot of each of its samples; the slots go on from there, token by token, beginning with the prompt's last. So
all sampling happens in one place, and what is compiled does not depend on the prompts: few sizes of
pieces, empty states, the copy into a slot and the decoding loop.

Source: Orca (OSDI 2022) section 3.2.

Shapes: B slots, X parts that the rows are split into over devices, N steps of a call.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lightning_jax import parallel
from lightning_jax.generation import decoding
from lightning_jax.generation.completion import Completion, FinishReason, GrowingCompletion, OnText
from lightning_jax.generation.prefill import prefill
from lightning_jax.generation.sampling import Needs, RowSettings, Sampling, stop_ids_width
from lightning_jax.generation.text import TextStream

if TYPE_CHECKING:
    from lightning_jax.generation.generator import Generator

FINISH_REASONS: dict[int, FinishReason] = {
    decoding.STOPPED: "stop",
    decoding.FULL: "length",
    decoding.REPETITIVE: "repetition",
}


@dataclass
class Prompt:
    """A prompt whose state is ready for its samples that have no slot yet."""

    number: int
    ids: np.ndarray
    sampling: Sampling
    waiting: collections.deque[int]
    begun: int = 0  # how many of the ids are the sample's already


class Slots:
    """The slots during one call of `Generator.generate`; slot b is of part b // (B / X) of the rows.

    Args:
        queue: the prompts, checked.
        samplings: every sampling that any of them has.
    """

    def __init__(
        self, generator: "Generator", queue: Iterator[Prompt], samplings: list[Sampling], on_text: OnText | None
    ):
        self.generator, self.queue, self.on_text = generator, queue, on_text
        self.settings, self.shards = generator.settings, parallel.batch_shards(generator.mesh)
        self.needs, self.width = Needs.of(samplings), stop_ids_width(samplings)
        self.sequences: list[GrowingCompletion | None] = [None] * self.settings.slots
        self.prefilled: list[Prompt | None] = [None] * self.shards
        self.prompts_wait = True

        graphdef, params, slots = generator.graphdef, generator.params, self.settings.slots
        self.state = decoding.initial_state(graphdef, params, slots, self.settings.capacity)
        self.prefilled_state: decoding.State | None = None
        self.rows = decoding.split_rows(graphdef, params, self._rows([None] * slots))

    def completions(self) -> Iterator[Completion]:
        """Each completion as soon as it is finished."""
        while True:
            self._fill_slots()
            if not any(self.sequences):
                return
            yield from self._decode()

    # Prompts into slots.

    def _fill_slots(self) -> None:
        while True:
            free = self._free_slots()
            drawn = [
                self._draw() if free[part] is not None and self.prefilled[part] is None else None
                for part in range(self.shards)
            ]
            if any(drawn):
                self._prefill(drawn)
            taken = [free[part] if self.prefilled[part] else None for part in range(self.shards)]
            if all(slot is None for slot in taken):
                return
            self._insert(taken)

    def _draw(self) -> Prompt | None:
        prompt = next(self.queue, None)
        self.prompts_wait = prompt is not None
        return prompt

    def _free_slots(self) -> list[int | None]:
        """The first free slot of each part of the rows."""
        per_part = self.settings.slots // self.shards
        return [
            next((slot for slot in range(part * per_part, (part + 1) * per_part) if not self.sequences[slot]), None)
            for part in range(self.shards)
        ]

    def _prefill(self, drawn: list[Prompt | None]) -> None:
        """The states of the prompts drawn, up to their last tokens."""
        generator = self.generator
        with generator.speed.timed("prefill") as count:
            state = prefill(generator, [prompt.ids[:-1] if prompt else () for prompt in drawn])
            if any(self.prefilled):
                take_X = np.array([prompt is not None for prompt in drawn])
                state = decoding.select_rows(take_X, state, self.prefilled_state)
            self.prefilled_state = jax.block_until_ready(state)
            count(sum(len(prompt.ids) - 1 for prompt in drawn if prompt))
        self.prefilled = [new or old for new, old in zip(drawn, self.prefilled, strict=True)]

    def _insert(self, slots: list[int | None]) -> None:
        """The next sample of each part's prompt into the part's slot, where there is one."""
        per_part = self.settings.slots // self.shards
        chosen: list[tuple[Prompt, int] | None] = [None] * self.shards
        for part, slot in enumerate(slots):
            prompt = self.prefilled[part]
            if slot is None or prompt is None:
                continue
            sample = prompt.waiting.popleft()
            chosen[part] = prompt, sample
            tokenizer = self.generator.tokenizer
            stream = TextStream(tokenizer, prompt.sampling.stop) if tokenizer else None
            self.sequences[slot] = GrowingCompletion(prompt.number, sample, stream, self.on_text)
            if not prompt.waiting:
                self.prefilled[part] = None
        local_X = np.array([-1 if slot is None else slot % per_part for slot in slots], np.int32)
        self.state, self.rows = decoding.insert(
            self.generator.mesh, self.state, self.rows, self.prefilled_state, self._rows(chosen), local_X
        )

    def _rows(self, chosen: Sequence[tuple[Prompt, int] | None]) -> decoding.Rows:
        """What is to know of samples that begin; rows of None do not run. In numpy."""
        prompts = [each and each[0] for each in chosen]
        off = Sampling(max_new_tokens=1)

        def column(of_prompt: Callable[[Prompt], int], otherwise: int) -> np.ndarray:
            return np.array([of_prompt(prompt) if prompt else otherwise for prompt in prompts], np.int32)

        seen_BV = None
        if self.needs.penalty:
            seen_BV = np.zeros((len(chosen), self.generator.config.vocab_size), bool)
            for row, prompt in zip(seen_BV, prompts, strict=True):
                row[prompt.ids if prompt else []] = True
        keys = [sample_key(each[0].sampling, each[0].number, each[1]) if each else (0, 0) for each in chosen]
        columns: dict[str, Any] = {
            "token_B": column(lambda prompt: prompt.ids[-1], 0),
            "position_B": column(lambda prompt: len(prompt.ids) - 1, 0),
            "reason_B": column(lambda prompt: decoding.RUNNING, decoding.STOPPED),
            "generated_B": column(lambda prompt: prompt.begun, 0),
            "certain_B": column(lambda prompt: 0, 0),
            "key_B2": np.array(keys, np.uint32),
            "seen_BV": seen_BV,
        }
        settings = RowSettings.of([prompt.sampling if prompt else off for prompt in prompts], self.width)
        return decoding.Rows(**columns, settings=settings)

    # Slots into completions.

    def _decode(self) -> Iterator[Completion]:
        generator = self.generator
        with generator.speed.timed("decode") as count:
            self.state, self.rows, output = decoding.decode(
                generator.graphdef,
                generator.params,
                self.state,
                self.rows,
                self.settings.decode_steps,
                self.needs,
                np.array([sequence is not None for sequence in self.sequences]),
                self.prompts_wait or any(self.prefilled),
            )
            tokens_BN, log_probs_BN, reason_B = jax.device_get(output)
            count(int((tokens_BN >= 0).sum()))
        for slot, sequence in enumerate(self.sequences):
            if sequence and (completion := self._read(sequence, tokens_BN[slot], log_probs_BN[slot], reason_B[slot])):
                self.sequences[slot] = None
                yield completion

    def _read(
        self, sequence: GrowingCompletion, tokens_N: np.ndarray, log_probs_N: np.ndarray, reason: int
    ) -> Completion | None:
        """Takes what a call gave one sequence; its completion where that was the end."""
        count = int((tokens_N >= 0).sum())
        for place in range(count):
            ends_here = reason == decoding.STOPPED and place == count - 1
            if not sequence.push(int(tokens_N[place]), float(log_probs_N[place]), is_text=not ends_here):
                return sequence.finish("stop")
        return sequence.finish(FINISH_REASONS[reason]) if reason != decoding.RUNNING else None


def sample_key(sampling: Sampling, prompt: int, sample: int) -> np.ndarray:
    """The raw key of one sample: of the seed, the prompt's number and the sample's, and of nothing else."""
    key = jax.random.key(sampling.seed, impl=decoding.KEY_KIND)
    key = jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
    return np.asarray(jax.random.key_data(key))
