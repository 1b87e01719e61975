"""Validation loss of runs beside each other, at equal steps: does the hybrid learn as well as softmax attention?

    python -m lightning_jax.train --config=configs/minimax_m1.py:laptop
    python -m lightning_jax.train --config=configs/minimax_m1.py:laptop_softmax
    python benchmarks/learning_curves.py runs/minimax_m1_laptop runs/minimax_m1_laptop_softmax

Reads what the runs recorded, and refuses runs that did not see the same data. Writes learning_curves.md, .json and .png
to benchmarks/results/. The runs take about six minutes each on two cores.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib
import recording

from lightning_jax.metrics import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SAME_DATA = ("seed", "data", "stages", "run_stages")


def read_run(folder: Path) -> dict:
    """What a run is and its validation losses by step, per corpus and as the mixture weighs them."""
    config = json.loads((folder / "config.json").read_text())
    facts = json.loads((folder / "run.json").read_text())
    curves: dict[str, dict[int, float]] = {}
    for record in read_metrics(folder):
        losses = record.get("validation_loss")
        if losses:
            shares = config["stages"][record["stage"]]["mixture"]["start"]
            weights = {name: shares[name] for name in losses}
            mean = sum(losses[name] * weight for name, weight in weights.items()) / sum(weights.values())
            for name, loss in {**losses, "mixture": mean}.items():
                curves.setdefault(name, {})[record["step"]] = loss
    entropy = facts["unigram_entropy"]
    shares = config["stages"][config["run_stages"][0]]["mixture"]["start"]
    entropy["mixture"] = sum(entropy[name] * share for name, share in shares.items()) / sum(shares.values())
    return {
        "name": config["name"],
        "parameters": facts["parameters"],
        "total_steps": facts["total_steps"],
        "unigram_entropy": entropy,
        "validation_loss": curves,
        "data": {name: config[name] for name in SAME_DATA},
    }


def table(runs: list[dict], steps: list[int]) -> list[str]:
    """Losses of the mixture at some steps, a row for each run, and what ignoring context would give."""
    rows = [
        "| run | parameters | " + " | ".join(f"step {step}" for step in steps) + " |",
        "|---" * (2 + len(steps)) + "|",
    ]
    for run in runs:
        losses = [f"{run['validation_loss']['mixture'][step]:.4f}" for step in steps]
        rows.append(f"| {run['name']} | {run['parameters']:,} | " + " | ".join(losses) + " |")
    entropy = f"{runs[0]['unigram_entropy']['mixture']:.4f}"
    rows.append("| unigram entropy | | " + " | ".join([entropy] * len(steps)) + " |")
    return rows


def plot(runs: list[dict], path: Path) -> None:
    """One panel for each corpus."""
    names = list(runs[0]["validation_loss"])
    figure, panels = plt.subplots(1, len(names), figsize=(4 * len(names), 3.2), layout="constrained", sharey=True)
    for panel, name in zip(panels, names, strict=True):
        for run in runs:
            curve = run["validation_loss"][name]
            panel.plot(list(curve), list(curve.values()), marker="o", markersize=3, label=run["name"])
        panel.axhline(runs[0]["unigram_entropy"][name], color="grey", linestyle=":", label="unigram entropy")
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss, nats per token")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    runs = [read_run(folder) for folder in parser.parse_args().runs]
    for run in runs[1:]:
        if different := [name for name in SAME_DATA if run["data"][name] != runs[0]["data"][name]]:
            print(f"error: {run['name']} and {runs[0]['name']} differ in {', '.join(different)}", file=sys.stderr)
            return 2
    every = sorted(set.intersection(*(set(run["validation_loss"]["mixture"]) for run in runs)))
    steps = every[:: max(1, math.ceil(len(every) / 6))]
    steps = sorted({*steps, every[-1]})
    lines = ["# Validation loss at equal steps", "", "Nats per token, the corpora weighed as in the mixture.", ""]
    lines += [*table(runs, steps), "", "![curves](learning_curves.png)"]
    recording.write("learning_curves", lines, {"runs": [{k: v for k, v in run.items() if k != "data"} for run in runs]})
    plot(runs, recording.RESULTS / "learning_curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
