"""Completions by a policy, in the mode of a stage and on the devices that make its rollouts."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flax import nnx

from lightning_jax.config import RunConfig
from lightning_jax.generation import Completion, GenerationSettings, Generator, Sampling
from lightning_jax.generation.exact import exact_completions
from lightning_jax.input_pipeline.packing import Batch
from lightning_jax.input_pipeline.prompts import Prompt
from lightning_jax.input_pipeline.tokenizers import Tokenizer
from lightning_jax.programs import Programs
from lightning_jax.stages import Stage


class RolloutGenerator:
    """Makes the completions of a stage by the policy that was loaded last.

    Args:
        ends: tokens that end a completion.
        progress: takes what is being done, again whenever it gets on.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        tokenizer: Tokenizer,
        ends: set[int],
        programs: Programs,
        progress: Callable[[str], None],
    ):
        rollouts = stage.config.reinforcement.rollouts
        self._stage, self._programs, self._progress = stage, programs, progress
        self._model = dataclasses.replace(config.model, rope_theta=stage.config.rope_theta)
        self._tokenizer, self._length = tokenizer, stage.config.context_length
        self._settings = GenerationSettings(
            slots=rollouts.slots,
            capacity=self._length + 1,
            prefill_tokens=rollouts.prefill_tokens,
            decode_steps=rollouts.decode_steps,
        )
        self._sampling = Sampling(
            max_new_tokens=rollouts.max_new_tokens,
            temperature=rollouts.temperature,
            stop_ids=tuple(ends),
            repetition_tokens=rollouts.repetition_tokens,
            repetition_probability=rollouts.repetition_probability,
        )
        self._samples = rollouts.samples
        self._draws = programs.draw_step(stage) if rollouts.mode == "exact" else None
        self._generator: Generator | None = None
        self._params: nnx.State | None = None

    def load(self, params: nnx.State) -> None:
        """Brings a policy's parameters to the devices that make completions; they are used where they are already."""
        mesh, weights = self._programs.to_generate(params)
        if self._generator is None:
            self._generator = Generator(self._model, weights, self._settings, mesh=mesh, tokenizer=self._tokenizer)
        self._generator.params, self._params = weights, params

    def release(self) -> None:
        """Lets go of the policy: of adapters and on devices of their own it is a copy of all weights."""
        self._generator.params, self._params = nnx.State({}), None

    def completions(self, prompts: Sequence[Prompt], *, limit: int, seed: int) -> list[list[Completion]]:
        """Of each prompt as many as the stage wants, of at most `limit` tokens."""
        sampling = dataclasses.replace(self._sampling, max_new_tokens=limit, samples=self._samples, seed=seed)
        ids = [prompt.ids for prompt in prompts]
        if self._draws:
            return self._groups(ids, exact_completions(self._generator, self._drawn, ids, sampling, self._length))
        return self._groups(ids, self._generator.generate(ids, sampling))

    def likeliest(self, prompts: Sequence[Prompt]) -> list[list[Completion]]:
        """Of each prompt the completion of likeliest tokens."""
        ids = [prompt.ids for prompt in prompts]
        sampling = dataclasses.replace(self._sampling, temperature=0.0)
        return self._groups(ids, self._generator.generate(ids, sampling))

    def _groups(self, ids: Sequence[Sequence[int]], completions: Iterable[Completion]) -> list[list[Completion]]:
        groups: list[list[Completion]] = [[] for _ in ids]
        self._progress("making rollouts")
        for completion in completions:
            groups[completion.prompt].append(completion)
            self._progress("making rollouts")
        return [sorted(group, key=lambda completion: completion.sample) for group in groups]

    def _drawn(self, rows: Batch) -> tuple[np.ndarray, np.ndarray]:
        """What the training forward draws at every place of the rows."""
        self._progress("drawing rollouts by the training forward")
        return self._programs.by_rows(self._stage, self._draws, self._programs.weights(self._params), rows)
