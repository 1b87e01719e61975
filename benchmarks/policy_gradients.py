"""Algorithms of reinforcement learning beside each other where the right token is rare: does clipping hurt?

    export XLA_FLAGS=--xla_cpu_multi_thread_eigen=false   # threads cost such a small model more than they give
    python benchmarks/policy_gradients.py                 # five algorithms, three seeds, two learning rates
    python benchmarks/policy_gradients.py --rates 3e-4:3 --algorithms CISPO DAPO --seeds 1   # less of it

MiniMax-M1 (arXiv 2506.13585, section 3.1) says that tokens which are rare and on which a completion turns were clipped
out after the first update on a policy's rollouts, and did not contribute to the other 15. Here such a fork is made: a
small hybrid model is taught additions, worked out in up to 20 tokens, of which 97% forget to carry, and then rewarded
for right sums. A fifth of the pairs of numbers is held out of both, by a hash.

The runs are those of the main job, from the same fine-tuned model, with 16 updates on the rollouts of a policy. GRPO
and PPO's clip sample without DAPO's replacement of prompts, the others with it. Runs lie in --folder. Stopped and
started again, those that are finished are not made again and the one that was not goes on. Writes policy_gradients.md,
.json and .png to benchmarks/results/: rewards at equal updates, and at equal completions generated, of which replacing
prompts takes more; and of the first generation how far its own updates moved the right forks and all other tokens.
"""

import argparse
import contextlib
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import recording
from flax import nnx
from forgotten_carries import fork, write_additions
from reward_curves import Curve, curve, differences, plot, table

from lightning_jax import train
from lightning_jax.objectives.policy_gradient import ADVANTAGES, OLD, sequence_log_probs
from lightning_jax.reinforcement.sampling_policy import Position
from lightning_jax.trained_model import load_model

CONFIG = str(Path(__file__).parents[1] / "configs" / "minimax_m1.py") + ":laptop"
SAMPLES, ROWS, UPDATES = 16, 32, 16
SFT_ROWS, SFT_CONTEXT = 16, 96
CONTEXT, MAX_NEW_TOKENS = 32, 22
RIGHT = 0.03  # of the demonstrations
RATES = ("1e-4:12", "3e-4:6")
DYNAMIC = {"rollouts.dynamic_sampling": True, "rollouts.max_refills": 5}
STATIC = {"rollouts.dynamic_sampling": False, "rollouts.max_refills": 0}
DAPO_HIGH = 0.28
CLIP = {"policy_gradient.is_weight_max": "none", "policy_gradient.mask_low": 0.2}
# What each changes of the config's CISPO.
ALGORITHMS = {
    "CISPO": DYNAMIC,
    "CISPO with DAPO's mask": {**DYNAMIC, "policy_gradient.mask_low": 0.2, "policy_gradient.mask_high": DAPO_HIGH},
    "DAPO": {**DYNAMIC, **CLIP, "policy_gradient.mask_high": DAPO_HIGH},
    "GRPO": {**STATIC, **CLIP, "policy_gradient.mask_high": 0.2, "policy_gradient.reduction": "sequence_mean"},
    "PPO's clip": {**STATIC, **CLIP, "policy_gradient.mask_high": 0.2},
}
MODEL = {
    "model.vocab_size": 260,
    "model.hidden_size": 48,
    "model.num_layers": 4,
    "model.layer_pattern": "lightning,lightning,lightning,softmax",
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.head_dim": 12,
    "model.rotary_dim": 12,
    "model.intermediate_size": 96,
    "model.num_experts": 0,
    "model.experts_per_token": 0,
    # With DeepNorm, at a rate of 3e-3, the held-out loss was 1.32 where this one's, at 4e-3, was 0.60.
    "model.norm_placement": "pre",
    "model.residual_alpha": 1.0,
    "model.initializer": "tinyllama",
    "data.tokenizer.kind": "bytes",
    "data.tokenizer.vocab_size": 257,
    "data.tokenizer.eos": "</s>",
    "data.validation_fraction": 0.2,
    "data.corpora.legs.format": "jsonl",
    "metrics.tensorboard": False,
    "metrics.sample_tokens": 0,
    "checkpoints.every_steps": 0,
}


def run(
    folder: Path, name: str, stage: str, rows: int, length: int, init_from: Path | None = None, **overrides: object
) -> None:
    """Trains one stage, a batch being so many rows of so many tokens, in a folder of its own, or goes on there."""
    if (folder / name / "finished").exists():
        return
    settings = MODEL | {
        "name": name,
        "run_stages": stage,
        "data.cache_dir": folder / "cache",
        "data.corpora.legs.path": folder / f"{stage}.jsonl",
        "data.chat_template": folder / "chat.jinja",
        f"stages.{stage}.context_length": length,
        f"stages.{stage}.batch_size.tokens": rows * length,
    }
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}
    arguments = [f"--config={CONFIG}", f"--workdir={folder / name}"]
    arguments += [f"--config.{name}={value}" for name, value in settings.items()]
    arguments += [f"--init_from={init_from}"] if init_from else []
    with open(folder / f"{name}.txt", "a") as log, contextlib.redirect_stdout(log):
        code = train.main(arguments)
    if code:
        raise SystemExit(f"{name} ended with {code}: {(folder / f'{name}.txt').read_text()[-500:]}")
    (folder / name / "finished").touch()


def fine_tune(folder: Path, *, passes: float, rate: float = 4e-3) -> None:
    """Teaches the additions of the folder, in its folder `sft`."""
    run(
        folder,
        "sft",
        "sft",
        SFT_ROWS,
        SFT_CONTEXT,
        stages__sft__passes__count=passes,
        stages__sft__schedule__peak=rate,
        stages__sft__schedule__final=rate / 10,
        metrics__evaluate_every_steps=10_000,
    )


def learn(folder: Path, algorithm: str, seed: int, *, generations: int, rate: float, evaluations: int = 10) -> Path:
    """The folder of one run of reinforcement learning."""
    name = f"{algorithm} {seed} {generations} {rate:g}".replace(" ", "_").replace("'", "")
    overrides = {f"stages.rl.reinforcement.{key}": value for key, value in ALGORITHMS[algorithm].items()}
    run(
        folder,
        name,
        "rl",
        ROWS,
        CONTEXT,
        folder / "sft",
        seed=seed,
        stages__rl__tokens=generations * UPDATES * ROWS * CONTEXT,
        stages__rl__schedule__peak=rate,
        stages__rl__schedule__final=rate,
        stages__rl__schedule__warmup_steps=0,
        stages__rl__reinforcement__rollouts__samples=SAMPLES,
        stages__rl__reinforcement__rollouts__updates=UPDATES,
        stages__rl__reinforcement__rollouts__max_new_tokens=MAX_NEW_TOKENS,
        stages__rl__reinforcement__rollouts__slots=256,
        stages__rl__reinforcement__rollouts__decode_steps=MAX_NEW_TOKENS,
        stages__rl__reinforcement__rollouts__prefill_tokens=16,
        metrics__log_every_steps=1,
        metrics__evaluate_every_steps=UPDATES * max(generations // evaluations, 1),
        metrics__evaluation_batches=1,
        **overrides,
    )
    return folder / name


def moved(run_folder: Path, bound: float) -> dict[str, float]:
    """Of the last generation, the tokens of right answers that its updates made more than `bound` times as likely.

    Shares of the right forks (the first token that the carry changes) and of all other tokens.
    """
    model = load_model(run_folder, say=print)
    newest = max((run_folder / "rollouts").glob("rl_*.npz"), key=lambda path: int(path.stem.partition("_")[2]))
    with np.load(newest) as file:
        _, rows = Position.taken_from(dict(file))

    @jax.jit
    def log_probs(params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        return sequence_log_probs(nnx.merge(model.graphdef, params), model.config, batch, temperature=1.0)[0]

    ratio_NT = np.exp(np.asarray(log_probs(model.params, rows)) - rows[OLD])
    right_NT = rows["loss_mask"] & (rows[ADVANTAGES] > 0)
    fork_NT = np.zeros_like(right_NT)
    for row in np.flatnonzero(right_NT.any(axis=1)):
        places = np.flatnonzero(right_NT[row])
        a, b = (int(bytes(rows["inputs"][row, i : i + 2].astype(np.uint8))) for i in (0, 3))
        fork_NT[row, places[fork(a, b)]] = True
    beyond_NT = ratio_NT > bound
    return {
        "right forks": float(beyond_NT[fork_NT].mean()),
        "other tokens": float(beyond_NT[right_NT & ~fork_NT].mean()),
        "probability of a right fork": float(np.exp(rows[OLD])[fork_NT].mean()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/policy_gradients"), help="of the runs")
    parser.add_argument("--results", type=Path, default=recording.RESULTS, help="where the files are written")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=float, default=8.0, help="of fine-tuning over the demonstrations")
    parser.add_argument("--rates", nargs="+", default=RATES, help="learning rate:generations")
    options = parser.parse_args()
    if not (options.folder / "rl.jsonl").exists():
        write_additions(options.folder, right=RIGHT, demonstrations=20_000, prompts=4_000)
    fine_tune(options.folder, passes=options.passes)
    lines: list[str] = []
    figures: dict[str, Any] = {"curves": {}, "moved": {}}
    for pair in options.rates:
        rate, _, generations = pair.partition(":")
        curves, shares = compare(float(rate), int(generations), options)
        title = f"learning rate {rate}"
        figures["curves"][title], figures["moved"][title] = curves, shares
        lines += [f"## {title.capitalize()}", "", *table(curves), *differences(curves)]
        lines += [*(describe_moved(each, of) for each, of in shares.items()), ""]
    title = "# Policy gradients where the right token is rare"
    lines = [title, "", *lines, "![curves](policy_gradients.png)"]
    recording.write("policy_gradients", lines, figures, folder=options.results)
    static = [name for name, changes in ALGORITHMS.items() if changes.items() >= STATIC.items()]
    plot(figures["curves"], options.results / "policy_gradients.png", dashed=static)
    return 0


def compare(
    rate: float, generations: int, options: argparse.Namespace
) -> tuple[dict[str, list[Curve]], dict[str, dict[str, float]]]:
    """The curves of every algorithm, one for each seed; and what the first updates moved."""
    curves: dict[str, list[Curve]] = {algorithm: [] for algorithm in options.algorithms}
    for seed, algorithm in itertools.product(range(options.seeds), options.algorithms):
        run_folder = learn(options.folder, algorithm, seed, generations=generations, rate=rate)
        curves[algorithm].append(curve(run_folder, samples=SAMPLES))
    once = {each: learn(options.folder, each, 0, generations=1, rate=rate) for each in ("CISPO", "DAPO")}
    return curves, {each: moved(of, 1 + DAPO_HIGH) for each, of in once.items()}


def describe_moved(name: str, shares: dict[str, float]) -> str:
    return (
        f"- {name}: the updates on the first generation made {shares['right forks']:.0%} of its right forks more "
        f"than {1 + DAPO_HIGH} times as likely, and {shares['other tokens']:.0%} of the other tokens of right answers; "
        f"a right fork had a probability of {shares['probability of a right fork']:.3f}."
    )


if __name__ == "__main__":
    sys.exit(main())
