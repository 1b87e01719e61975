"""Algorithms of reinforcement learning beside each other where the right token is rare: does clipping hurt?

    python benchmarks/policy_gradients.py           # five algorithms, three seeds
    python benchmarks/policy_gradients.py --quick   # one seed of two algorithms, a few updates: only that it runs

The task has a fork. A small hybrid model is taught additions of which 90% forget the carry, then rewarded for right
sums of other additions with carries; the digit behind a carry is a token of a low probability on which everything
depends, which is where MiniMax-M1 (arXiv 2506.13585, section 3.1) says that clipping tokens hurts. A fifth of the pairs
of numbers is held out, by a hash. The runs are those of the main job, from the same fine-tuned model; GRPO and PPO's
clip sample without DAPO's replacement of prompts, the others with it.

Writes policy_gradients.md, .json and .png to benchmarks/results/: rewards at equal updates, and at equal completions
generated, of which replacing prompts takes more.
"""

import argparse
import contextlib
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import recording

from lightning_jax import train
from lightning_jax.metrics import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIG = str(Path(__file__).parents[1] / "configs" / "minimax_m1.py") + ":laptop"
SAMPLES, ROWS, UPDATES, CONTEXT = 16, 64, 16, 48
LEAST_START = 0.02  # reward before reinforcement learning, below which hardly any prompt teaches anything
DYNAMIC = {"rollouts.dynamic_sampling": True, "rollouts.max_refills": 5}
STATIC = {"rollouts.dynamic_sampling": False, "rollouts.max_refills": 0}
CLIP = {"policy_gradient.is_weight_max": "none", "policy_gradient.mask_low": 0.2}
# What each changes of the config's CISPO.
ALGORITHMS = {
    "CISPO": DYNAMIC,
    "CISPO with DAPO's mask": {**DYNAMIC, "policy_gradient.mask_low": 0.2, "policy_gradient.mask_high": 0.28},
    "DAPO": {**DYNAMIC, **CLIP, "policy_gradient.mask_high": 0.28},
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
    "data.tokenizer.kind": "bytes",
    "data.tokenizer.vocab_size": 257,
    "data.tokenizer.eos": "</s>",
    "data.validation_fraction": 0.2,
    "data.corpora.arithmetic.format": "jsonl",
    "metrics.tensorboard": False,
    "metrics.sample_tokens": 0,
    "checkpoints.every_steps": 0,
}


def without_carry(a: int, b: int) -> int:
    """What a sum is for who forgets to carry: 47 + 38 = 75."""
    return (a + b) % 10 + (a // 10 + b // 10) % 10 * 10


def write_additions(folder: Path, demonstrations: int, prompts: int) -> None:
    """`demonstrations` of additions with a carry, of which one in ten is right, and prompts with the right sum."""
    noise = random.Random(0)

    def additions(count: int) -> Iterator[tuple[int, int]]:
        while count:
            a, b = noise.randrange(100), noise.randrange(100)
            if without_carry(a, b) != a + b:
                count -= 1
                yield a, b

    def record(a: int, b: int, answer: int) -> str:
        turns = [("user", f"{a:02}+{b:02}="), ("assistant", str(answer))]
        messages = [{"role": role, "content": content} for role, content in turns]
        return json.dumps({"messages": messages, "ground_truth": str(a + b)}) + "\n"

    shown = [record(a, b, a + b if noise.random() < 0.1 else without_carry(a, b)) for a, b in additions(demonstrations)]
    (folder / "sft.jsonl").write_text("".join(shown))
    asked = sorted(set(additions(prompts)))
    (folder / "rl.jsonl").write_text("".join(record(a, b, a + b) for a, b in asked))


def run(folder: Path, name: str, stage: str, init_from: Path | None = None, **overrides: object) -> list[dict]:
    """Trains one stage in a folder of its own; what it recorded."""
    settings = MODEL | {
        "name": name,
        "run_stages": stage,
        "data.cache_dir": folder / "cache",
        "data.corpora.arithmetic.path": folder / f"{stage}.jsonl",
        f"stages.{stage}.context_length": CONTEXT,
        f"stages.{stage}.batch_size.tokens": ROWS * CONTEXT,
    }
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}
    arguments = [f"--config={CONFIG}", f"--workdir={folder / name}"]
    arguments += [f"--config.{name}={value}" for name, value in settings.items()]
    arguments += [f"--init_from={init_from}"] if init_from else []
    with open(folder / f"{name}.txt", "w") as log, contextlib.redirect_stdout(log):
        code = train.main(arguments)
    if code:
        raise SystemExit(f"{name} ended with {code}: {(folder / f'{name}.txt').read_text()[-500:]}")
    return read_metrics(folder / name)


def learn(folder: Path, algorithm: str, seed: int, generations: int, rate: float) -> dict[str, list[float]]:
    """The rewards of one run, a value for each generation."""
    name = f"{algorithm} {seed}".replace(" ", "_").replace("'", "")
    overrides = {f"stages.rl.reinforcement.{key}": value for key, value in ALGORITHMS[algorithm].items()}
    records = run(
        folder,
        name,
        "rl",
        folder / "sft",
        seed=seed,
        stages__rl__tokens=generations * UPDATES * ROWS * CONTEXT,
        stages__rl__schedule__peak=rate,
        stages__rl__schedule__final=rate,
        stages__rl__reinforcement__rollouts__samples=SAMPLES,
        stages__rl__reinforcement__rollouts__updates=UPDATES,
        stages__rl__reinforcement__rollouts__max_new_tokens=6,
        stages__rl__reinforcement__rollouts__slots=256,
        stages__rl__reinforcement__rollouts__decode_steps=6,
        stages__rl__reinforcement__rollouts__prefill_tokens=32,
        metrics__log_every_steps=1,
        metrics__evaluate_every_steps=UPDATES * max(generations // 10, 1),
        metrics__evaluation_batches=1,
        **overrides,
    )
    made = [record for record in records if "reward" in record]
    updates = [record for record in records if "clip_share" in record]
    return {
        "reward": [record["reward"] for record in made],
        "completions": [record["prompts"] * SAMPLES for record in made],
        "held_out_steps": [record["step"] for record in records if "validation_reward" in record],
        "held_out": [record["validation_reward"]["arithmetic"] for record in records if "validation_reward" in record],
        "clip_share": [float(np.mean([record["clip_share"] for record in updates]))],
        "entropy": [updates[-1]["entropy"]],
    }


def table(curves: dict[str, list[dict[str, list[float]]]]) -> list[str]:
    """Rewards at the end, with the least and the most of the seeds."""

    def spread(values: list[float]) -> str:
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    budget = min(curve["completions"][-1] for runs in curves.values() for curve in runs)
    rows = [
        "| algorithm | reward, sampled | held out, likeliest | sampled, at equal completions | tokens clipped |",
        "|---|---|---|---|---|",
    ]
    for name, runs in curves.items():
        last = [float(np.mean(curve["reward"][-3:])) for curve in runs]
        equal = [float(np.interp(budget, curve["completions"], curve["reward"])) for curve in runs]
        clipped = float(np.mean([curve["clip_share"][0] for curve in runs]))
        held_out = spread([curve["held_out"][-1] for curve in runs])
        rows.append(f"| {name} | {spread(last)} | {held_out} | {spread(equal)} | {clipped:.1%} |")
    return [*rows, "", f"Equal completions: {budget:,}."]


def plot(curves: dict[str, list[dict[str, list[float]]]], path: Path) -> None:
    """Rewards by updates and by completions, the mean of the seeds in a band from the least to the most."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for name, runs in curves.items():
        rewards = np.array([curve["reward"] for curve in runs])
        completions = np.mean([curve["completions"] for curve in runs], axis=0)
        for panel, x in zip(panels, (np.arange(rewards.shape[1]) * UPDATES, completions), strict=True):
            (line,) = panel.plot(x, rewards.mean(axis=0), label=name)
            panel.fill_between(x, rewards.min(axis=0), rewards.max(axis=0), alpha=0.15, color=line.get_color())
    panels[0].set(xlabel="updates", ylabel="reward of sampled completions")
    panels[1].set(xlabel="completions generated")
    panels[0].legend(fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only that it runs; writes nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    options = parser.parse_args()
    seeds, generations = (1, 1) if options.quick else (options.seeds, options.generations)
    algorithms = list(ALGORITHMS)[:2] if options.quick else list(ALGORITHMS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_additions(folder, demonstrations=20_000, prompts=4_000)
        run(
            folder,
            "sft",
            "sft",
            stages__sft__passes__count=0.2 if options.quick else 10.0,
            stages__sft__schedule__peak=2e-3,
            stages__sft__schedule__final=2e-4,
            stages__sft__mixture__packing="best_fit",
        )
        curves: dict[str, list[dict[str, list[float]]]] = {name: [] for name in algorithms}
        for name, seed in itertools.product(algorithms, range(seeds)):
            curve = learn(folder, name, seed, generations, options.learning_rate)
            if curve["reward"][0] < LEAST_START and not options.quick:
                print(f"error: the fine-tuned model is right {curve['reward'][0]:.1%} of the time", file=sys.stderr)
                return 1
            curves[name].append(curve)
    lines = ["# Policy gradients where the right token is rare", "", *table(curves)]
    if options.quick:
        print(*lines, sep="\n")
        return 0
    recording.write("policy_gradients", [*lines, "", "![curves](policy_gradients.png)"], {"curves": curves})
    plot(curves, recording.RESULTS / "policy_gradients.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
