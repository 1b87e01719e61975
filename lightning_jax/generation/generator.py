"""Generator: completions of any number of prompts in a fixed number of slots, which finished ones leave at once."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lightning_jax import parallel
from lightning_jax.errors import UserError
from lightning_jax.generation.completion import Completion, OnText
from lightning_jax.generation.prefill import PIECES
from lightning_jax.generation.sampling import Sampling, check
from lightning_jax.generation.slots import Prompt, Slots
from lightning_jax.generation.speed import Speed
from lightning_jax.input_pipeline import Tokenizer
from lightning_jax.models import HybridLM, ModelConfig


class GenerationError(UserError):
    """A prompt or setting with which nothing can be generated; one line for each."""


@dataclass(frozen=True)
class GenerationSettings:
    """How much is generated at one time; it decides memory and speed, not what is generated.

    Attributes:
        slots: sequences that are decoded together; the mesh's batch shards divide it.
        capacity: the most tokens of a sequence, prompt and completion together.
        prefill_tokens: of a prompt's largest pieces; a multiple of 16.
        decode_steps: tokens of each sequence between two looks of the host: for stop texts and to fill free slots.
    """

    slots: int = 8
    capacity: int = 2048
    prefill_tokens: int = 256
    decode_steps: int = 32

    def problems(self) -> list[str]:
        """What is wrong, one line each: "field: what is wrong; what would be right"."""
        found = [f"{name}: {value} is not positive" for name, value in dataclasses.asdict(self).items() if value < 1]
        if self.prefill_tokens % max(PIECES):
            found.append(f"prefill_tokens: {self.prefill_tokens} is no multiple of {max(PIECES)}")
        return found


class Beginning(NamedTuple):
    """A completion that has begun."""

    prompt: int  # their numbers, by which the dice fall
    sample: int
    ids: Sequence[int]  # of the prompt, and behind them those of the completion
    begun: int  # how many the latter are


class Generator:
    """Generates with one model on one mesh.

    A completion is a function of the model, its prompt and its sampling alone, with the prompt's and the sample's
    number for the dice: slots, other prompts and the order in which they come change only how sums are rounded.

    Args:
        config: of the model; its rope_theta is used. Experts are dispatched without dropping tokens.
        params: its parameters (nnx.Param), laid out on the mesh as for training.
        mesh: the devices; one where None.
        tokenizer: for texts, which are None without one, and stop texts.

    Attributes:
        graphdef: of the model as it generates.
        params: may be replaced by others of the same shapes at any time between two calls of `generate`.
        speed: tokens and seconds so far.

    Raises:
        GenerationError: settings that cannot be.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: nnx.State,
        settings: GenerationSettings,
        *,
        mesh: Mesh | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        self.mesh = mesh or parallel.make_mesh(parallel.MeshConfig.of(), jax.devices()[:1])
        self.settings, self.params, self.tokenizer = settings, params, tokenizer
        problems, shards = settings.problems(), parallel.batch_shards(self.mesh)
        if settings.slots % shards:
            right = -(-settings.slots // shards) * shards
            problems.append(f"slots: {settings.slots} do not divide over {shards} batch shards; use {right}")
        if problems:
            raise GenerationError("\n".join(problems))
        dispatch = "auto" if config.expert_dispatch == "capacity" else config.expert_dispatch
        self.config = dataclasses.replace(config, expert_dispatch=dispatch, remat="none")
        operators = parallel.operators(self.mesh, self.config)
        model = nnx.eval_shape(lambda: HybridLM(self.config, rngs=nnx.Rngs(0), operators=operators))
        self.graphdef = nnx.graphdef(model)
        self.speed = Speed()

    def generate(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        on_text: OnText | None = None,
    ) -> Iterator[Completion]:
        """Completions of the prompts, each as soon as it is finished.

        Args:
            prompts: token ids, taken from the iterable when there is room for them.
            sampling: of all prompts, or of each.
            on_text: is called with a prompt's number, a sample's and a further piece of its text, when there is one.

        Raises:
            SamplingError: a sampling that cannot be.
            GenerationError: a prompt without tokens, or longer than the capacity allows.
        """
        samplings = [sampling] if isinstance(sampling, Sampling) else list(sampling)
        check(samplings, self.config.vocab_size)
        if self.tokenizer is None and any(each.stop for each in samplings):
            raise GenerationError("stop: texts cannot be found without a tokenizer; use stop_ids")
        of_prompt = (lambda _: sampling) if isinstance(sampling, Sampling) else samplings.__getitem__
        queue = (self._prompt(number, ids, of_prompt(number)) for number, ids in enumerate(prompts))
        return Slots(self, queue, samplings, on_text).completions()

    def go_on(self, beginnings: Iterable[Beginning], sampling: Sampling, most: int) -> Iterator[Completion]:
        """What `generate` would add to completions that have begun, of each at most so many tokens.

        Returns:
            completions with `ids` and `log_probs` of the new tokens alone; where there are `most`, it is not their end.
        """
        check([sampling], self.config.vocab_size)

        def prompt(each: Beginning) -> Prompt:
            last = min(sampling.max_new_tokens, each.begun + most)
            limited = dataclasses.replace(sampling, max_new_tokens=last)
            ids = np.array(each.ids, np.int32)
            return Prompt(each.prompt, ids, limited, collections.deque([each.sample]), each.begun)

        return Slots(self, map(prompt, beginnings), [sampling], None).completions()

    def problem(self, number: int, ids: Sequence[int], sampling: Sampling) -> str | None:
        """What is wrong with a prompt, in one line, or None."""
        most, capacity = len(ids) + sampling.max_new_tokens, self.settings.capacity
        if len(ids) == 0:
            return f"prompt {number}: it has no tokens; begin it with the tokenizer's bos or eos token"
        if most > capacity:
            return (
                f"prompt {number}: its {len(ids):,} tokens and max_new_tokens={sampling.max_new_tokens:,} exceed the "
                f"capacity of {capacity:,}; shorten it, or raise the capacity to {most:,}"
            )
        if foreign := [token for token in ids if not 0 <= token < self.config.vocab_size]:
            return f"prompt {number}: token {foreign[0]} is not in the vocabulary of {self.config.vocab_size:,}"
        return None

    def _prompt(self, number: int, ids: Sequence[int], sampling: Sampling) -> Prompt:
        if problem := self.problem(number, ids, sampling):
            raise GenerationError(problem)
        return Prompt(number, np.asarray(ids, np.int32), sampling, collections.deque(range(sampling.samples)))
