"""The three modes of rollouts beside each other: tokens per second, and how near their log-probabilities are.

    python benchmarks/rollout_modes.py

The laptop's hybrid, and the same with softmax attention, after a few hundred steps of training, in fp32 and in bf16:
`fast` as the model generates, with a head in the compute dtype; `aligned` with an fp32 head and without excess
precision; `exact` drawn by the training forward. Each mode is a process of its own, and they take turns. A turn makes
the completions and then scores them by the training forward, which every generation of reinforcement learning needs.

Result: benchmarks/results/rollout_modes.json and .md. `--quick` proves that it works and writes nothing.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import recording
from sides import ON_THE_CPU, Answers, Side, ratios, take_turns

CONFIG = str(Path(__file__).parents[1] / "configs" / "minimax_m1.py")
MODELS = {"hybrid with experts": "laptop", "softmax": "laptop_softmax"}
PROMPTS = ("Once upon a time", "The", "def ", "What is the sum of 12 and 7?")
MODES = ("fast", "aligned", "exact")
# In aligned mode bf16 is rounded wherever the program says so.
ROUNDING = {"aligned": {"XLA_FLAGS": "--xla_allow_excess_precision=false"}}
PROMPT_TOKENS, ROWS = 24, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.0, help="for all of it; 2 rounds at least of each row")
    parser.add_argument("--rounds", type=int, default=10, help="of measurements at most, per model and dtype")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores")
    parser.add_argument("--steps", type=int, default=150, help="of training before")
    parser.add_argument("--new", type=int, default=128, help="tokens of each completion")
    parser.add_argument("--samples", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--quick", action="store_true", help="one model, few steps, nothing written")
    arguments, models = parser.parse_args(), MODELS
    if arguments.quick:
        arguments.rounds, arguments.steps, arguments.new, arguments.samples = 2, 2, 16, 4
        models = dict(list(MODELS.items())[:1])
    results, end = [], time.monotonic() + 60 * arguments.minutes
    rows = [(name, dtype) for name in models for dtype in ("float32", "bfloat16")]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        sides = {
            mode: stack.enter_context(
                Side(sys.executable, mode_side, arguments.threads, ON_THE_CPU | ROUNDING.get(mode, {}))
            )
            for mode in MODES
        }
        for size in models.values():
            train(Path(folder), size, arguments.steps)
        for number, (name, dtype) in enumerate(rows):
            built = {"path": str(Path(folder) / models[name]), "dtype": dtype}
            built |= {"samples": arguments.samples, "new": arguments.new}
            begin = time.monotonic()
            until = begin + (end - begin) / (len(rows) - number)
            results.append({"model": name, "dtype": dtype} | compare(sides, built, arguments.rounds, until))
            print(row(results[-1]), flush=True)
    tokens = len(PROMPTS) * arguments.samples * arguments.new
    recording.write(
        "rollout_modes",
        [
            "# Modes of rollouts",
            "",
            f"{len(PROMPTS) * arguments.samples} completions of {arguments.new} tokens at temperature 1, {tokens:,} "
            f"tokens a round, from models trained for {arguments.steps} steps. Tokens per second of generation and "
            "scoring together, medians of the rounds, and as a share of `fast` in the same round (least to most). "
            "Differences are the greatest of the recorded probabilities to the trainer's; passes are those of the "
            "training forward that `exact` took to agree.",
            "",
            "| model | dtype | mode | rounds | tokens/s | of fast's | difference | correlation | equal bits | passes |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(row, results),
        ],
        {"results": results},
        cores=arguments.threads,
        folder=None if arguments.quick else recording.RESULTS,
    )


def train(folder: Path, size: str, steps: int) -> None:
    """The laptop's model after some steps of pre-training, in a folder of its size's name."""
    from lightning_jax import train

    settings = {
        "run_stages": "pretraining",
        "stages.pretraining.tokens": steps * 8 * 256,
        "stages.pretraining.schedule.warmup_steps": max(steps // 10, 1),
        "stages.pretraining.schedule.decay_steps": max(steps // 3, 1),
        "metrics.tensorboard": False,
        "metrics.sample_tokens": 0,
        "metrics.evaluate_every_steps": steps,
        "checkpoints.every_steps": 0,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    with open(folder / f"{size}.txt", "w") as log, contextlib.redirect_stdout(log):
        if train.main([f"--config={CONFIG}:{size}", f"--workdir={folder / size}", *flags]):
            raise SystemExit(f"training {size} failed: {(folder / f'{size}.txt').read_text()[-500:]}")


def compare(sides: dict[str, Side], built: dict[str, Any], rounds: int, until: float) -> dict[str, Any]:
    """The figures of each mode, from as many rounds as there is time for."""
    gaps = {mode: side.ask(mode=mode, **built) for mode, side in sides.items()}
    seconds: dict[str, list[float]] = {mode: [] for mode in sides}
    while not seconds["fast"] or (len(seconds["fast"]) < rounds and time.monotonic() < until):
        for mode, figures in take_turns({mode: side.ask for mode, side in sides.items()}, 2).items():
            seconds[mode] += figures
    return {
        mode: gaps[mode]
        | {
            "seconds": seconds[mode],
            "tokens_per_second": gaps[mode]["tokens"] / statistics.median(seconds[mode]),
            "of_fast": ratios(seconds["fast"], seconds[mode]),
        }
        for mode in sides
    }


def row(result: dict[str, Any]) -> str:
    lines = []
    for mode in MODES:
        figures = result[mode]
        least, median, most = figures["of_fast"]
        lines.append(
            f"| {result['model']} | {result['dtype']} | {mode} | {len(figures['seconds'])} | "
            f"{figures['tokens_per_second']:,.0f} | {median:.2f} ({least:.2f} to {most:.2f}) | "
            f"{figures['difference']:.1e} | {figures['correlation']:.7f} | {figures['equal_bits']:.1%} | "
            f"{figures['passes'] or ''} |"
        )
    return "\n".join(lines)


def mode_side(threads: int) -> Answers:
    """Makes rollouts in one mode."""
    import dataclasses

    import jax
    import numpy as np
    from flax import nnx

    from lightning_jax.generation import GenerationSettings, Generator, Sampling, completion_batch
    from lightning_jax.generation.exact import drawn_tokens, exact_completions
    from lightning_jax.input_pipeline import encode
    from lightning_jax.models import HybridLM
    from lightning_jax.objectives.policy_gradient import sequence_log_probs
    from lightning_jax.trained_model import load_model

    make = None

    def build(mode: str, path: str, dtype: str, samples: int, new: int) -> dict[str, float]:
        nonlocal make
        trained = load_model(path, compute_dtype=dtype, say=lambda line: None)
        config = dataclasses.replace(trained.config, logits_dtype=dtype if mode == "fast" else "float32")
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))
        params, length, passes = trained.params, PROMPT_TOKENS + new, 0
        scored = jax.jit(lambda p, b: sequence_log_probs(nnx.merge(graphdef, p), config, b, temperature=1.0)[0])
        drawn = jax.jit(lambda p, b: drawn_tokens(nnx.merge(graphdef, p), config, b, temperature=1.0))
        settings = GenerationSettings(slots=len(PROMPTS) * samples, capacity=length + 1, prefill_tokens=16)
        generator = Generator(config, params, settings)
        prompts = [encode(trained.tokenizer, text)[:PROMPT_TOKENS] for text in PROMPTS]

        def in_batches(step: Any, rows: dict[str, np.ndarray]) -> Any:
            count = len(rows["inputs"])
            rows = {name: np.resize(x, (-(-count // ROWS) * ROWS, *x.shape[1:])) for name, x in rows.items()}
            parts = [
                step(params, {name: x[first : first + ROWS] for name, x in rows.items()})
                for first in range(0, count, ROWS)
            ]
            return jax.tree.map(lambda *each: np.concatenate(each)[:count], *parts)

        def draw(rows: dict[str, np.ndarray]) -> Any:
            nonlocal passes
            passes += 1
            return in_batches(drawn, rows)

        def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
            """Log-probabilities as recorded and as scored."""
            sampling = Sampling(max_new_tokens=new, samples=samples, seed=seed)
            if mode == "exact":
                completions = list(exact_completions(generator, draw, prompts, sampling, length))
            else:
                completions = list(generator.generate(prompts, sampling))
            rows = completion_batch([prompts[c.prompt] for c in completions], [c.ids for c in completions], length)
            log_probs = in_batches(scored, rows)[rows["loss_mask"]]
            return np.array([each for c in completions for each in c.log_probs], np.float32), log_probs

        recorded, trainers = make(0)
        p, q = np.exp(recorded, dtype=np.float64), np.exp(trainers, dtype=np.float64)
        return {
            "tokens": len(recorded),
            "difference": float(np.abs(p - q).max()),
            "correlation": float(np.corrcoef(p, q)[0, 1]),
            "equal_bits": float(np.mean(recorded == trainers)),
            "passes": passes,
        }

    seed = 0

    def answer(**built: Any) -> dict[str, float] | float:
        nonlocal seed
        if built:
            return build(**built)
        seed += 1
        begin = time.perf_counter()
        make(seed)
        return time.perf_counter() - begin

    return recording.package_versions("jax", "flax"), answer


if __name__ == "__main__":
    main()
