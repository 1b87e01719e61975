"""A run of reinforcement learning small enough to be killed: a model of a few thousand parameters."""

import json
import pathlib

import tiny_run

CONFIG = str(tiny_run.REPOSITORY / "configs" / "minimax_m1.py") + ":laptop"
UPDATES, SAMPLES, ROWS, CONTEXT = 4, 4, 8, 48


def write_prompts(folder: pathlib.Path, count: int = 40) -> None:
    """Questions whose answer is a digit."""
    records = [
        {"messages": [{"role": "user", "content": str(number)}], "ground_truth": str(number % 10)}
        for number in range(count)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def arguments(
    folder: pathlib.Path,
    workdir: str,
    *,
    steps: int,
    config: str = CONFIG,
    stage: str = "rl",
    prompts: str = "legs",
    **more: object,
) -> list[str]:
    """Command-line arguments of the run; `prompts` is the stage's corpus, `more` are further overrides, __ for dots."""
    overrides: dict[str, object] = {
        "run_stages": stage,
        "model.vocab_size": 260,
        "model.hidden_size": 16,
        "model.num_layers": 2,
        "model.layer_pattern": "lightning,softmax",
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.head_dim": 8,
        "model.rotary_dim": 4,
        "model.intermediate_size": 16,
        "model.num_experts": 0,
        "model.experts_per_token": 0,
        "model.loss_chunk": 64,
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.vocab_size": 257,
        "data.tokenizer.eos": "</s>",
        "data.validation_fraction": 0.1,
        "data.cache_dir": folder / "cache",
        f"data.corpora.{prompts}.format": "jsonl",
        f"data.corpora.{prompts}.path": folder / "prompts.jsonl",
        f"stages.{stage}.context_length": CONTEXT,
        f"stages.{stage}.batch_size.tokens": ROWS * CONTEXT,
        f"stages.{stage}.tokens": steps * ROWS * CONTEXT,
        f"stages.{stage}.schedule.peak": 3e-3,
        f"stages.{stage}.schedule.final": 3e-3,
        f"stages.{stage}.reinforcement.rollouts.samples": SAMPLES,
        f"stages.{stage}.reinforcement.rollouts.updates": UPDATES,
        f"stages.{stage}.reinforcement.rollouts.max_new_tokens": 8,
        f"stages.{stage}.reinforcement.rollouts.slots": 8,
        f"stages.{stage}.reinforcement.rollouts.decode_steps": 8,
        f"stages.{stage}.reinforcement.rollouts.prefill_tokens": 32,
        f"stages.{stage}.reinforcement.rollouts.max_refills": 1,
        "metrics.log_every_steps": 1,
        "metrics.evaluate_every_steps": 8,
        "metrics.evaluation_batches": 1,
        "metrics.tensorboard": False,
        "checkpoints.every_steps": 3,
        "checkpoints.keep_newest": 100,
    }
    overrides |= {name.replace("__", "."): value for name, value in more.items()}
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    return [f"--config={config}", f"--workdir={folder / workdir}", *flags]
