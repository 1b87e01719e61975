"""A run small enough to be killed twenty times: a hybrid MoE model of a few thousand parameters."""

import json
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Sequence

REPOSITORY = pathlib.Path(__file__).parents[1]
CONFIG = str(REPOSITORY / "configs" / "minimax_m1.py") + ":laptop"


def write_corpus(folder: pathlib.Path) -> None:
    """Two corpora of JSON lines, the same every time."""
    words = random.Random(0)
    for corpus in ("text", "code"):
        lines = [
            json.dumps({"text": " ".join(words.choice(("alpha", "beta", "gamma", "delta")) for _ in range(30))})
            for _ in range(200)
        ]
        (folder / f"{corpus}.jsonl").write_text("\n".join(lines))


def arguments(folder: pathlib.Path, workdir: str, **more: object) -> list[str]:
    """Command-line arguments of the run; `more` are further overrides, with __ for dots."""
    overrides: dict[str, object] = {
        "run_stages": "pretraining,context_extension",
        "model.vocab_size": 512,
        "model.hidden_size": 32,
        "model.num_layers": 3,
        "model.layer_pattern": "lightning,lightning,softmax",
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.head_dim": 16,
        "model.rotary_dim": 8,
        "model.intermediate_size": 32,
        "model.num_experts": 4,
        "model.loss_chunk": 32,
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.vocab_size": 512,
        "data.validation_fraction": 0.1,
        "data.cache_dir": folder / "cache",
        "metrics.log_every_steps": 1,
        "metrics.evaluate_every_steps": 10,
        "metrics.evaluation_batches": 2,
        "metrics.tensorboard": False,
        "metrics.sample_prompts": "alpha",
        "metrics.sample_tokens": 4,
        "checkpoints.every_steps": 3,
        "checkpoints.keep_newest": 2,
    }
    for corpus in ("text", "code"):
        overrides |= {
            f"data.corpora.{corpus}.format": "jsonl",
            f"data.corpora.{corpus}.path": folder / f"{corpus}.jsonl",
            f"data.corpora.{corpus}.field": "text",
        }
    for stage, context, steps in (("pretraining", 64, 40), ("context_extension", 128, 20)):
        overrides |= {
            f"stages.{stage}.context_length": context,
            f"stages.{stage}.batch_size.tokens": 8 * context,
            f"stages.{stage}.tokens": 8 * context * steps,
        }
    overrides |= {"stages.pretraining.schedule.warmup_steps": 5, "stages.pretraining.schedule.decay_steps": 10}
    overrides |= {name.replace("__", "."): value for name, value in more.items()}
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    return [f"--config={CONFIG}", f"--workdir={folder / workdir}", *flags]


def start(
    arguments: list[str], num_devices: int = 1, program: Sequence[str] = ("-m", "lightning_jax.train")
) -> subprocess.Popen:
    """The training command as a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    }
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, expected: int = 0) -> str:
    """Waits for the process; its output."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == expected, output
    return output
