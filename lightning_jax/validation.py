"""What a run looks at beside its training loss: the held-out part of each corpus, and what the model writes."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.config import RunConfig
from lightning_jax.generation import sample_prompts
from lightning_jax.input_pipeline import validation_batches
from lightning_jax.input_pipeline.chat_masks import end_of_turn
from lightning_jax.programs import Programs
from lightning_jax.references import Reference
from lightning_jax.run_setup import Data
from lightning_jax.stages import Stage

Measures = dict[str, dict[str, float]]  # by what is measured, then by corpus
MEASURES = ("loss", "accuracy")  # of an objective's metrics, as far as it has them


class Validation:
    """The measures of a stage on held-out rows, always the same ones.

    Args:
      reference: of the stage, with its corpora.
    """

    def __init__(self, stage: Stage, reference: Reference, programs: Programs, num_batches: int):
        self._objective, self._programs, self._reference = programs.objective(stage), programs, reference
        self._step = programs.evaluation_step(stage)
        self._batches = {
            name: validation_batches(
                corpus.validation,
                stage.config.context_length,
                batch_rows=programs.evaluation_rows(stage),
                num_batches=num_batches,
                documents_per_example=stage.config.documents_per_example,
                process_index=programs.host.index,
                process_count=programs.host.count,
            )
            for name, corpus in reference.corpora.items()
            if corpus.validation.num_tokens > 1
        }

    def __call__(self, params: nnx.State) -> Measures:
        """`validation_loss` and, where answers are right or wrong, `validation_accuracy`, by corpus."""
        measures: Measures = {}
        weights = self._programs.weights(params)
        for corpus, batches in self._batches.items():
            sums = [self._step(weights, self._reference.add(self._programs.on_devices(batch))) for batch in batches]
            total = functools.reduce(functools.partial(jax.tree.map, jnp.add), sums)
            metrics = self._objective.loss(total)[1]
            for name in MEASURES:
                if name in metrics:
                    measures.setdefault(f"validation_{name}", {})[corpus] = float(metrics[name])
        return measures


def describe_measures(measures: Mapping[str, Mapping[str, float]]) -> str:
    """The measures on one line."""
    return "; ".join(
        f"{name.replace('_', ' ')}: " + ", ".join(f"{corpus} {value:.4f}" for corpus, value in values.items())
        for name, values in measures.items()
    )


def samples(
    config: RunConfig, stage: Stage, data: Data, params: nnx.State, programs: Programs
) -> Iterator[tuple[str, str]]:
    """(prompt, what the model writes after it): of a stage on chats the prompts of held-out ones."""
    settings = config.metrics
    wordless = stage.config.objective in ("reward_model", "policy_gradient")  # rollouts are samples already
    if not settings.sample_prompts or not settings.sample_tokens or wordless:
        return
    prompts = [data.prompt(text) for text in settings.sample_prompts]
    chats = [name for name in stage.config.mixture.start if data.corpora[name].validation.trained is not None]
    if held_out := [ids for name in chats for ids in data.chat_prompts(name, len(prompts))]:
        prompts = held_out[: len(prompts)]
    continuations = sample_prompts(
        dataclasses.replace(config.model, rope_theta=stage.config.rope_theta),
        params,
        prompts,
        num_tokens=settings.sample_tokens,
        temperature=0.0 if held_out else settings.sample_temperature,
        seed=config.seed,
        mesh=programs.mesh,
    )
    ends = {data.tokenizer.eos_id, end_of_turn(config.data, data.tokenizer)} if held_out else set()
    for number, (prompt, ids) in enumerate(zip(prompts, continuations, strict=True)):
        said = data.tokenizer.decode(prompt) if held_out else settings.sample_prompts[number]
        yield said, data.tokenizer.decode(list(itertools.takewhile(lambda token: token not in ends, ids)))
