"""Memory of a sequence during rollouts by the length of its output, of hybrids and of the same models with softmax.

    python benchmarks/rollout_memory.py

A slot of a rollout holds one sequence: a lightning layer's matrix, of one size for ever, and a softmax layer's keys and
values of every token. The laptop's models generate, in slots of several lengths, and the arrays of their generators are
counted: what a slot more takes is what a sequence takes. To 128K, and for 456B, the config's arithmetic goes on.

Writes rollout_memory.md, .json and .png to benchmarks/results/. `--quick` measures at two lengths and writes nothing.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import matplotlib
import recording
from flax import nnx

from lightning_jax.config_reader import load_config
from lightning_jax.generation import GenerationSettings, Generator, Sampling
from lightning_jax.models import HybridLM, ModelConfig
from lightning_jax.models.stateful_attention import places

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONFIG = str(Path(__file__).parents[1] / "configs" / "minimax_m1.py")
PROMPT = 8
MEASURED = (256, 2048, 16384)
COMPUTED = tuple(1024 * 2**power for power in range(8))
SLOTS = (2, 6)
DEVICE = 80 * 2**30  # bytes, for the count of sequences that fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two lengths, nothing written")
    quick = parser.parse_args().quick
    sizes = {size: {"hybrid": load_config(f"{CONFIG}:{size}").model, "softmax": None} for size in ("laptop", "456b")}
    for models in sizes.values():
        models["softmax"] = dataclasses.replace(models["hybrid"], layer_pattern=("softmax",))
    lengths = MEASURED[:2] if quick else MEASURED
    measured = [
        {"model": name, "length": length, "measured": measure(model, length), "computed": computed(model, length)}
        for name, model in sizes["laptop"].items()
        for length in lengths
    ]
    curves = {
        size: {name: [computed(model, length) for length in COMPUTED] for name, model in models.items()}
        for size, models in sizes.items()
    }
    recording.write(
        "rollout_memory",
        ["# Memory of a sequence during rollouts", "", *tables(measured, curves), "", "![](rollout_memory.png)"],
        {"measured": measured, "lengths": COMPUTED, "computed": curves},
        folder=None if quick else recording.RESULTS,
    )
    if not quick:
        draw(measured, curves).savefig(recording.RESULTS / "rollout_memory.png", dpi=120)


def computed(model: ModelConfig, length: int) -> int:
    """Bytes of a slot for outputs of so many tokens, by the config: its cache has whole blocks of places."""
    return model.state_bytes_per_sequence() + places(PROMPT + length) * model.kv_cache_bytes_per_token()


def measure(model: ModelConfig, length: int) -> float:
    """Bytes that a slot more takes in the arrays of a generation under way."""
    few, many = (arrays(model, length, slots) for slots in SLOTS)
    return (many - few) / (SLOTS[1] - SLOTS[0])


def arrays(model: ModelConfig, length: int, slots: int) -> int:
    params = nnx.state(HybridLM(model, rngs=nnx.Rngs(0)), nnx.Param)
    before = sum(array.nbytes for array in jax.live_arrays())
    settings = GenerationSettings(slots=slots, capacity=PROMPT + length, decode_steps=4)
    prompts = [[number, *range(PROMPT - 1)] for number in range(2 * slots)]
    completions = Generator(model, params, settings).generate(prompts, Sampling(max_new_tokens=4))
    next(completions)
    return sum(array.nbytes for array in jax.live_arrays()) - before


def tables(measured: list[dict[str, Any]], curves: dict[str, dict[str, list[int]]]) -> list[str]:
    largest = max(abs(each["measured"] / each["computed"] - 1) for each in measured)
    lines = [
        f"The laptop's model (fp32) in slots for a prompt of {PROMPT} tokens and outputs of the lengths given: what a "
        "slot more takes in the arrays of a generation under way, and what the config says; they are at most "
        f"{largest:.2%} apart.",
        "",
        "| length | hybrid, measured | computed | softmax, measured | computed |",
        "|---|---|---|---|---|",
    ]
    for length in dict.fromkeys(each["length"] for each in measured):
        hybrid, softmax = (each for each in measured if each["length"] == length)
        cells = [each[kind] for each in (hybrid, softmax) for kind in ("measured", "computed")]
        lines.append(f"| {length:,} | " + " | ".join(f"{cell / 1e6:.3f} MB" for cell in cells) + " |")
    hybrid, softmax = curves["456b"]["hybrid"], curves["456b"]["softmax"]
    return [
        *lines,
        "",
        "MiniMax-M1's 456B with bf16 caches, computed, and the same with softmax attention in every layer: bytes of a "
        f"sequence, and how many of them {DEVICE // 2**30} GiB hold.",
        "",
        "| length | hybrid | softmax | ratio | sequences, hybrid | softmax |",
        "|---|---|---|---|---|---|",
        *(
            f"| {length // 1024}K | {one / 1e9:.2f} GB | {other / 1e9:.2f} GB | {other / one:.2f} | "
            f"{DEVICE // one} | {DEVICE // other} |"
            for length, one, other in zip(COMPUTED, hybrid, softmax, strict=True)
        ),
    ]


def draw(measured: list[dict[str, Any]], curves: dict[str, dict[str, list[int]]]) -> plt.Figure:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, (size, models) in zip(panels, curves.items(), strict=True):
        for (name, bytes_), color in zip(models.items(), ("#3b82f6", "#f59e0b"), strict=True):
            panel.plot(COMPUTED, [each / 1e6 for each in bytes_], color=color, label=f"{name}, computed")
            if size == "laptop":
                points = [(each["length"], each["measured"] / 1e6) for each in measured if each["model"] == name]
                panel.plot(*zip(*points, strict=True), "o", color=color, label=f"{name}, measured")
        panel.set(title=size, xscale="log", yscale="log", xlabel="tokens of output", ylabel="MB per sequence")
        panel.set_xticks(COMPUTED, [f"{length // 1024}K" for length in COMPUTED])
        panel.minorticks_off()
        panel.legend()
    return figure


if __name__ == "__main__":
    main()
