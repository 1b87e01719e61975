"""What a run opens and says before its first step: the data, the header, the record of what ran where."""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from lightning_jax.config import RunConfig, StageConfig
from lightning_jax.input_pipeline import (
    GlobalBatches,
    PreparedCorpus,
    Progress,
    Tokenizer,
    encode,
    prepare,
    prepare_tokenizer,
    unigram_cross_entropy,
)
from lightning_jax.input_pipeline.chat_masks import end_of_turn
from lightning_jax.input_pipeline.examples import pack
from lightning_jax.input_pipeline.prompts import Prompts, read_prompts
from lightning_jax.metrics import formatting, record_session
from lightning_jax.models import ModelConfig
from lightning_jax.models.layer_stack import runs
from lightning_jax.parallel import RowsOfHost
from lightning_jax.stages import Stage, with_lengths
from pallas_kernels import choose_implementation


@dataclass(frozen=True)
class Data:
    """The tokenizer and the corpora of a run."""

    tokenizer: Tokenizer
    corpora: dict[str, PreparedCorpus]
    prompts: dict[str, Prompts]  # of the stages of reinforcement learning

    @property
    def fingerprints(self) -> dict[str, str]:
        """Equal for data that give equal batches."""
        stores = {name: corpus.train.fingerprint for name, corpus in self.corpora.items()}
        prompts = {f"the prompts of {name}": prompts.fingerprint for name, prompts in self.prompts.items()}
        return {"the tokenizer": self.tokenizer.fingerprint, **stores, **prompts}

    def prompt(self, text: str) -> list[int]:
        """The tokens of the beginning of a document, at least one."""
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        ids = encode(self.tokenizer, text).tolist()
        return ids if ids and self.tokenizer.bos_id is None else [first, *ids]

    def chat_prompts(self, corpus: str, count: int) -> list[list[int]]:
        """The different beginnings of the first held-out chats, up to what the assistant says; at most `count`."""
        store = self.corpora[corpus].validation
        prompts: list[list[int]] = []
        for begin, end in itertools.pairwise(store.offsets):
            if len(prompts) == count:
                break
            prompt = store.tokens[begin : begin + int(np.argmax(store.trained[begin:end]))].tolist()
            if prompt not in prompts:  # both chats of a pair begin with it
                prompts.append(prompt)
        return prompts


def open_run(config: RunConfig, say: Callable[[str], None]) -> tuple[RunConfig, Data]:
    """Opens the data; the config comes back with the length of every stage, which may depend on them."""
    data = open_data(config, say)

    def rows_of_a_pass(stage: StageConfig) -> int:
        settings = (stage.mixture.packing, stage.context_length, stage.documents_per_example)
        return sum(len(pack(data.corpora[name].train, *settings)) for name in stage.mixture.start)

    return with_lengths(config, rows_of_a_pass), data


def global_batches(
    stages: Sequence[Stage], stage: Stage, corpora: Mapping[str, PreparedCorpus], *, seed: int, host: RowsOfHost
) -> GlobalBatches:
    """The batches of a stage, which reads each corpus on from where stages that cut it into equal rows left it."""
    rows_before: dict[str, int] = {}
    for each in stages[: stages.index(stage) + 1]:
        if _cut(each) != _cut(stage):
            continue
        batches = GlobalBatches(
            {name: corpus.train for name, corpus in corpora.items()},
            each.config.mixture,
            each.batch_sizes,
            each.config.context_length,
            seed=seed,
            documents_per_example=each.config.documents_per_example,
            rows_before=rows_before,
            process_index=host.index,
            process_count=host.count,
        )
        rows_before |= batches.row_counts(len(batches))
    return batches


def _cut(stage: Stage) -> tuple[int, str, int, bool]:
    config = stage.config
    return config.context_length, config.mixture.packing, config.documents_per_example, config.reinforcement is None


def open_data(config: RunConfig, say: Callable[[str], None]) -> Data:
    """Opens the corpora of the stages that run, preparing what is not in the cache, and says what they are made of."""
    tokenizer = prepare_tokenizer(config.data)

    def progress(done: Progress) -> None:
        if sys.stdout.isatty():
            say(f"tokenizing {done.corpus}: {formatting.count(done.tokens)} tokens")

    stages = [config.stages[name] for name in config.run_stages]
    wanted = {name for stage in stages if not stage.reinforcement for name in stage.mixture.start}
    chosen = {name: corpus for name, corpus in config.data.corpora.items() if name in wanted}
    corpora = prepare(dataclasses.replace(config.data, corpora=chosen), tokenizer, progress=progress)
    for corpus in corpora.values():
        say(f"corpus {corpus}")
    if any(each.content != "text" for each in chosen.values()) and end_of_turn(config.data, tokenizer) is None:
        say("data.chat_template: the assistant's turn ends with no special token, so nothing teaches where to stop")
    room: dict[str, int] = {}  # for the prompts of a corpus, in all stages that draw from it
    fields: set[str] = set()  # of their records, by which prompts are left out
    for stage in stages:
        if stage.reinforcement:
            fields |= stage.reinforcement.rollouts.sample_filter.keys()
            most = stage.context_length - stage.reinforcement.rollouts.max_new_tokens
            room |= {name: min(most, room.get(name, most)) for name in stage.mixture.start}
    prompts = {
        name: read_prompts(name, config.data, tokenizer, most_tokens=most, fields=fields)
        for name, most in sorted(room.items())
    }
    for each in prompts.values():
        say(f"prompts {each}")
    return Data(tokenizer, corpora, prompts)


def describe(config: RunConfig, stages: Sequence[Stage], folder: pathlib.Path) -> dict[str, str | list[str]]:
    """The facts in the header of a run."""
    model, devices = config.model, jax.devices()
    split = _split(config.resolved_mesh(len(devices)))
    if config.rollout_mesh:
        split += f"; {config.num_rollout_devices} of them make rollouts, split: {_split(config.rollout_mesh.sizes())}"
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    kinds = " + ".join(f"{run.length} {run.kind}" for run in runs(model.layer_pattern))
    return {
        "size": config.size_reason,
        "devices": f"{len(devices)} x {devices[0].device_kind}{hosts}, split: {split}",
        "model": (
            f"{formatting.count(model.num_parameters())} parameters, "
            f"{formatting.count(model.num_active_parameters())} active without embeddings; "
            f"{model.num_layers} layers of {kinds}"
        ),
        **_lightning_kernel(model),
        **_adapters(config),
        "stages": [
            f"{stage.name}: {stage.batch_sizes.num_steps:,} steps, "
            f"{formatting.count(stage.config.tokens)} tokens, context {stage.config.context_length:,}, "
            + ", ".join(f"{share:.0%} {name}" for name, share in stage.config.mixture.start.items())
            for stage in stages
        ],
        "folder": str(folder),
    }


def _split(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "none"


def _adapters(config: RunConfig) -> dict[str, str]:
    """What is trained in place of the weights."""
    if not config.lora:
        return {}
    return {"adapters": f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, of {', '.join(config.lora.targets)}"}


def _lightning_kernel(model: ModelConfig) -> dict[str, str]:
    """Which implementation computes lightning attention, and why."""
    if "lightning" not in model.layer_pattern:
        return {}
    if model.lightning_implementation != "auto":
        return {"lightning": f"{model.lightning_implementation}: as the config says"}
    choice = choose_implementation(model.head_dim, model.head_dim, model.compute_dtype)
    return {"lightning": f"{choice.name}: {choice.why}"}


def record_run(config: RunConfig, stages: Sequence[Stage], data: Data, folder: pathlib.Path, first_step: int) -> None:
    """Writes run.json, from which the report says what was run where."""
    facts = {
        "title": config.name,
        "size": config.size_reason,
        "parameters": config.model.num_parameters(),
        "total_steps": stages[-1].last_step,
        "flops_convention": config.metrics.flops_convention,
        "unigram_entropy": {
            name: unigram_cross_entropy(corpus.train, corpus.validation, data.tokenizer.vocab_size)
            for name, corpus in data.corpora.items()
            if corpus.validation.num_tokens and corpus.validation.trained is None
        },
        "stages": [
            {
                "name": stage.name,
                "steps": stage.batch_sizes.num_steps,
                "tokens": stage.config.tokens,
                "context length": stage.config.context_length,
                "mixture": ", ".join(f"{name} {share:g}" for name, share in stage.config.mixture.start.items()),
            }
            for stage in stages
        ],
        "corpora": {name: str(corpus) for name, corpus in data.corpora.items()},
    }
    record_session(folder, facts, first_step=first_step, devices=jax.devices())
