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


def arguments(folder: pathlib.Path, workdir: str, *, steps: int, **more: object) -> list[str]:
    """Command-line arguments of the run; `more` are further overrides, with __ for dots."""
    overrides: dict[str, object] = {
        "run_stages": "rl",
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
        "data.corpora.legs.format": "jsonl",
        "data.corpora.legs.path": folder / "prompts.jsonl",
        "stages.rl.context_length": CONTEXT,
        "stages.rl.batch_size.tokens": ROWS * CONTEXT,
        "stages.rl.tokens": steps * ROWS * CONTEXT,
        "stages.rl.schedule.peak": 3e-3,
        "stages.rl.schedule.final": 3e-3,
        "stages.rl.reinforcement.rollouts.samples": SAMPLES,
        "stages.rl.reinforcement.rollouts.updates": UPDATES,
        "stages.rl.reinforcement.rollouts.max_new_tokens": 8,
        "stages.rl.reinforcement.rollouts.slots": 8,
        "stages.rl.reinforcement.rollouts.decode_steps": 8,
        "stages.rl.reinforcement.rollouts.prefill_tokens": 32,
        "stages.rl.reinforcement.rollouts.max_refills": 1,
        "metrics.log_every_steps": 1,
        "metrics.evaluate_every_steps": 8,
        "metrics.evaluation_batches": 1,
        "metrics.tensorboard": False,
        "checkpoints.every_steps": 3,
        "checkpoints.keep_newest": 100,
    }
    overrides |= {name.replace("__", "."): value for name, value in more.items()}
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    return [f"--config={CONFIG}", f"--workdir={folder / workdir}", *flags]
