"""Rewards that runs of reinforcement learning recorded, compared in tables and curves, seed by seed."""

from collections.abc import Callable, Collection
from pathlib import Path

import matplotlib
import numpy as np
import scipy.stats

from lightning_jax.metrics import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Curve = dict[str, list[float]]


def curve(run_folder: Path, *, samples: int) -> Curve:
    """What a run recorded: rewards by generation, with the updates and completions before; shares of tokens by update.

    Args:
        samples: completions of a prompt.
    """
    records = read_metrics(run_folder)
    made = [record for record in records if "reward" in record]
    updates = [record for record in records if "clip_share" in record]
    measured = [record for record in records if "validation_reward" in record]
    return {
        "updates": [record["step"] - 1 for record in made],
        "completions": [0, *(record["prompts"] * samples for record in made[:-1])],
        "reward": [record["reward"] for record in made],
        "held_out_steps": [record["step"] for record in measured],
        "held_out": [record["validation_reward"]["legs"] for record in measured],
        "clip_share": [record["clip_share"] for record in updates],
        "cap_share": [record["cap_share"] for record in updates],
        "entropy": [record["entropy"] for record in updates],
    }


def until_half(run: Curve) -> float:
    """The updates after which half of the sampled completions were right, by a line between generations; else inf."""
    after = next((place for place, reward in enumerate(run["reward"]) if reward >= 0.5), None)
    if after is None:
        return np.inf
    pair = slice(max(after - 1, 0), after + 1)
    return float(np.interp(0.5, run["reward"][pair], run["updates"][pair]))


def after_one_generation(run: Curve) -> float:
    return run["reward"][1]


def in_all_generations(run: Curve) -> float:
    return float(np.mean(run["reward"]))


def table(curves: dict[str, list[Curve]]) -> list[str]:
    """What the seeds gave in the mean, with the least and the most."""
    budget = min(each["completions"][-1] for runs in curves.values() for each in runs)
    updates = next(iter(curves.values()))[0]["updates"][1]
    columns: dict[str, tuple[Callable[[Curve], float], str]] = {
        f"sampled after {updates} updates": (after_one_generation, ".3f"),
        "updates until half": (until_half, ".0f"),
        "sampled, all generations": (in_all_generations, ".3f"),
        "sampled, last": (lambda run: run["reward"][-1], ".3f"),
        "held out, likeliest": (lambda run: run["held_out"][-1], ".3f"),
        f"sampled after {budget:,} completions": (
            lambda run: float(np.interp(budget, run["completions"], run["reward"])),
            ".3f",
        ),
    }

    def spread(measure: Callable[[Curve], float], form: str, runs: list[Curve]) -> str:
        values = [measure(each) for each in runs]
        return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    lines = [f"| algorithm | {' | '.join(columns)} | tokens clipped |", "|---" * (len(columns) + 2) + "|"]
    for name, runs in curves.items():
        clipped = float(np.mean([np.mean(each["clip_share"]) for each in runs]))
        cells = [spread(measure, form, runs) for measure, form in columns.values()]
        lines.append(f"| {' | '.join([name, *cells, f'{clipped:.1%}'])} |")
    start = np.mean([each["reward"][0] for runs in curves.values() for each in runs])
    held_out = np.mean([each["held_out"][0] for runs in curves.values() for each in runs])
    return [*lines, "", f"At the start {start:.3f} of the samples were right, {held_out:.3f} of what is held out.", ""]


def differences(curves: dict[str, list[Curve]], other: str = "DAPO") -> list[str]:
    """By how much each algorithm is ahead of another one in sampled rewards, seed by seed."""
    if len(curves.get(other, [])) < 2:
        return []

    def interval(runs: list[Curve], measure: Callable[[Curve], float], form: str) -> str:
        gaps = [measure(one) - measure(two) for one, two in zip(runs, curves[other], strict=True)]
        margin = scipy.stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / np.sqrt(len(gaps))
        return f"{np.mean(gaps):+{form}} ({np.mean(gaps) - margin:+{form}} to {np.mean(gaps) + margin:+{form}})"

    lines = [
        f"| less {other}'s (95% interval, {len(curves[other])} seeds) | sampled after one generation "
        "| sampled, all generations | updates until half |",
        "|---|---|---|---|",
    ]
    for name, runs in curves.items():
        if name != other:
            sampled = [interval(runs, measure, ".3f") for measure in (after_one_generation, in_all_generations)]
            lines.append(f"| {' | '.join([name, *sampled, interval(runs, until_half, '.1f')])} |")
    return [*lines, ""]


def plot(compared: dict[str, dict[str, list[Curve]]], path: Path, *, dashed: Collection[str]) -> None:
    """Rewards by updates and by completions, the mean of the seeds in a band from the least to the most.

    Args:
        compared: by what a row of panels shows, the curves of each algorithm.
        dashed: algorithms whose lines are.
    """
    size = (10, 3.4 * len(compared))
    figure, panels_SX = plt.subplots(len(compared), 2, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for panels, (title, curves) in zip(panels_SX, compared.items(), strict=True):
        for number, (name, runs) in enumerate(curves.items()):
            rewards = np.array([each["reward"] for each in runs])
            completions = np.mean([each["completions"] for each in runs], axis=0)
            style = {"linestyle": "--" if name in dashed else "-", "linewidth": 3.5 - 0.5 * number}  # some coincide
            for panel, x in zip(panels, (runs[0]["updates"], completions), strict=True):
                (line,) = panel.plot(x, rewards.mean(axis=0), label=name, **style)
                panel.fill_between(x, rewards.min(axis=0), rewards.max(axis=0), alpha=0.15, color=line.get_color())
        panels[0].set(ylabel=f"share of samples right\n{title}")
        for panel, axis in zip(panels, ("updates", "completions generated"), strict=True):
            panel.set(xlabel=axis)
            panel.grid(alpha=0.3)
    panels_SX[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
