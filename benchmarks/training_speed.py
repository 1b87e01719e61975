"""Training speed on a CPU, in tokens per second: ours against Hugging Face transformers on PyTorch.

    python benchmarks/training_speed.py --torch-python PYTHON

PYTHON is an interpreter that has torch and transformers; the one that runs this file has lightning_jax. A step is
forward, backward and AdamW in float32, of the same model on the same batch and number of threads. Each side is a
process that stays alive, compiles and warms up before the clock starts, times its own steps when asked, and sleeps
while the other runs; they take turns, and every second pair begins with the other one. PyTorch runs eagerly, as
transformers trains by default, with its fused attention and fused AdamW.

Result: benchmarks/results/training_speed.json and .md. `--quick` proves in a minute that it works and writes nothing.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# 12M parameters each, with the sizes that both sides read. A pattern is repeated; H heads of 64.
LLAMA = {
    "name": "Llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_layers": 8,
    "layer_pattern": ["softmax"],
    "num_heads": 4,
    "num_kv_heads": 4,
    "intermediate_size": 960,
    "num_experts": 0,
    "experts_per_token": 0,
}
HYBRID = LLAMA | {
    "name": "hybrid",
    "layer_pattern": ["lightning"] * 7 + ["softmax"],
    "intermediate_size": 224,
    "num_experts": 4,
    "experts_per_token": 2,
}
TINY = {"vocab_size": 256, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 64}
SHAPES = ((8, 512), (1, 8192))  # rows, tokens of each
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 0.1

Step = Callable[[], float]  # makes a step and returns its loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", required=True, help="interpreter that has torch and transformers")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of measurements per model and shape")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores for each side")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two pairs, nothing written")
    arguments = parser.parse_args()
    models, shapes, pairs = [LLAMA, HYBRID], SHAPES, arguments.pairs
    if arguments.quick:
        models = [model | TINY | {"name": f"tiny {model['name']}"} for model in models]
        shapes, pairs = ((2, 64), (1, 256)), 2
    workers = {
        "lightning_jax": Worker(sys.executable, "jax", arguments.threads),
        "transformers": Worker(arguments.torch_python, "torch", arguments.threads),
    }
    results = []
    for model in models:
        for rows, length in shapes:
            results.append(compare(workers, model, rows, length, pairs))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/training_speed.py --torch-python PYTHON --pairs {pairs} "
        f"--threads {arguments.threads}",
        "machine": f"{cpu()}, {arguments.threads} of {os.cpu_count()} cores, {platform.platform()}",
        "versions": {name: worker.versions for name, worker in workers.items()},
        "results": results,
    }
    for worker in workers.values():
        worker.close()
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "training_speed.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "training_speed.md").write_text(markdown(record), encoding="utf-8")


class Worker:
    """A side of the comparison: a process that is asked in lines of JSON and answers in lines of JSON."""

    def __init__(self, python: str, side: str, threads: int):
        command = [python, __file__, "--worker", side, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {shlex.join(self._process.args)} ended; its error is above")
        return json.loads(line)


def compare(workers: dict[str, Worker], model: dict[str, Any], rows: int, length: int, pairs: int) -> dict[str, Any]:
    """Builds the model on both sides, then takes turns, one step each."""
    built = {name: worker.ask(model=model, rows=rows, length=length) for name, worker in workers.items()}
    parameters = {answer["parameters"] for answer in built.values()}
    if len(parameters) > 1:
        raise RuntimeError(f"the two sides built different models: {built}")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for pair in range(pairs):
        for name in sorted(workers, reverse=pair % 2 == 1):
            seconds[name].append(workers[name].ask()["seconds"])
    ratios = [theirs / ours for ours, theirs in zip(seconds["lightning_jax"], seconds["transformers"], strict=True)]
    return {
        "model": model["name"],
        "parameters": parameters.pop(),
        "rows": rows,
        "length": length,
        "first_loss": {name: answer["loss"] for name, answer in built.items()},
        "seconds": seconds,
        "tokens_per_second": {name: rows * length / statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| model | parameters | batch | ours, tokens/s | transformers, tokens/s | ratio (least to most of all pairs) |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        speed, (least, most) = result["tokens_per_second"], result["ratio_range"]
        lines.append(
            f"| {result['model']} | {result['parameters']:,} | {result['rows']} x {result['length']:,} | "
            f"{speed['lightning_jax']:,.0f} | {speed['transformers']:,.0f} | "
            f"{result['ratio']:.2f} ({least:.2f} to {most:.2f}) |"
        )
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    versions = "; ".join(f"{name}: {_words(packages)}" for name, packages in record["versions"].items())
    pairs = len(record["results"][0]["seconds"]["lightning_jax"])
    return (
        "# Training speed on a CPU\n\nForward, backward and AdamW in float32, the same model and batch on both sides, "
        f"taking turns; medians of {pairs} pairs. Above 1 ours is faster.\n\n{table(record['results'])}\n\n"
        f"- Date: {record['date']}\n- Machine: {record['machine']}\n- Versions: {versions}\n"
        f"- Command: `{record['command']}`\n"
    )


def _words(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def cpu() -> str:
    """The processor's name as Linux gives it."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].split(":")[1].strip() if names else platform.machine()


def work(side: str, threads: int) -> None:
    """A worker's life: builds what it is asked to, then times a step for each empty question."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not be taken for an answer
    if hasattr(os, "sched_setaffinity"):  # Linux; before a library counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    versions, build = {"jax": jax_side, "torch": torch_side}[side](threads)

    def answer(**reply: Any) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    answer(python=platform.python_version(), **versions)
    step: Step
    for line in sys.stdin:
        question = json.loads(line)
        if question:
            parameters, step = build(**question)
            loss = step()  # compiles
            step()
            answer(parameters=parameters, loss=loss)
        else:
            begin = time.perf_counter()
            step()
            answer(seconds=time.perf_counter() - begin)


def random_tokens(model: dict[str, Any], rows: int, length: int):
    import numpy as np

    return np.random.default_rng(0).integers(model["vocab_size"], size=(rows, length + 1), dtype=np.int32)


def jax_side(threads: int) -> tuple[dict[str, str], Callable[..., tuple[int, Step]]]:
    """lightning_jax; XLA takes as many threads as the process may use cores."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from lightning_jax.models import HybridLM, ModelConfig
    from lightning_jax.objectives import NextToken

    def config(model: dict[str, Any]) -> ModelConfig:
        sizes = {name: value for name, value in model.items() if name not in ("name", "layer_pattern")}
        hybrid = model["num_experts"] > 0
        return ModelConfig(
            **sizes,
            layer_pattern=tuple(model["layer_pattern"]),
            head_dim=model["hidden_size"] // model["num_heads"],
            rotary_dim=model["hidden_size"] // model["num_heads"],
            rope_theta=10_000.0,
            rope_scaling=None,
            lightning_norm_eps=1e-5,
            attention_implementation="auto",
            lightning_implementation="auto",
            expert_dispatch="auto",
            capacity_factor=1.0,
            router_aux_loss="huggingface",
            router_aux_coefficient=0.001,
            norm_placement="post" if hybrid else "pre",
            residual_alpha=deepnorm_alpha(model) if hybrid else 1.0,
            residual_beta=1.0,
            rms_norm_eps=1e-5,
            tie_embeddings=False,
            initializer="normal",
            initializer_range=0.02,
            param_dtype="float32",
            compute_dtype="float32",
            logits_dtype="float32",
            loss_chunk=256,
            remat="none",
        )

    def build(model: dict[str, Any], rows: int, length: int) -> tuple[int, Step]:
        objective = NextToken(config(model))
        graphdef, params = nnx.split(HybridLM(objective.config, rngs=nnx.Rngs(0)))
        optimizer = optax.adamw(LEARNING_RATE, b2=0.95, weight_decay=WEIGHT_DECAY)
        tokens = jnp.asarray(random_tokens(model, rows, length))
        batch = {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": jnp.ones((rows, length), jnp.int32),
            "positions": jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1)),
            "loss_mask": jnp.ones((rows, length), bool),
        }

        def train_step(params: nnx.State, opt_state: optax.OptState, batch: dict[str, jax.Array]):
            def loss(params: nnx.State) -> jax.Array:
                return objective.loss(objective.sums(nnx.merge(graphdef, params), batch))[0]

            value, gradients = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        compiled = jax.jit(train_step, donate_argnums=(0, 1))
        state = params, optimizer.init(params)

        def step() -> float:
            nonlocal state
            *state, loss = compiled(*state, batch)
            jax.block_until_ready(state)
            return float(loss)

        return sum(leaf.size for leaf in jax.tree.leaves(params)), step

    return {"jax": jax.__version__}, build


def torch_side(threads: int) -> tuple[dict[str, str], Callable[..., tuple[int, Step]]]:
    """transformers on PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    def config(model: dict[str, Any]) -> transformers.PreTrainedConfig:
        sizes = {
            "vocab_size": model["vocab_size"],
            "hidden_size": model["hidden_size"],
            "intermediate_size": model["intermediate_size"],
            "num_hidden_layers": model["num_layers"],
            "num_attention_heads": model["num_heads"],
            "num_key_value_heads": model["num_kv_heads"],
            "head_dim": model["hidden_size"] // model["num_heads"],
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "use_cache": False,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "attn_implementation": "sdpa",
        }
        if not model["num_experts"]:
            return transformers.LlamaConfig(**sizes)
        kinds = {"lightning": "linear_attention", "softmax": "full_attention"}
        pattern = [kinds[kind] for kind in model["layer_pattern"]]
        alphas = dict.fromkeys(
            ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"), deepnorm_alpha(model)
        )
        return transformers.MiniMaxConfig(
            **sizes,
            **alphas,
            layer_types=[pattern[layer % len(pattern)] for layer in range(model["num_layers"])],
            num_local_experts=model["num_experts"],
            num_experts_per_tok=model["experts_per_token"],
            output_router_logits=True,  # adds the balance loss
        )

    def build(model: dict[str, Any], rows: int, length: int) -> tuple[int, Step]:
        network = transformers.AutoModelForCausalLM.from_config(config(model), dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
        )
        tokens = torch.from_numpy(random_tokens(model, rows, length)).long()
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def step() -> float:
            loss = network(input_ids=inputs, labels=targets, shift_labels=targets).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return sum(parameter.numel() for parameter in network.parameters()), step

    return {"torch": torch.__version__, "transformers": transformers.__version__}, build


def deepnorm_alpha(model: dict[str, Any]) -> float:
    return (2 * model["num_layers"]) ** 0.25


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main()
