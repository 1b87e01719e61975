"""Attention alone, forward and backward, by sequence length: lightning attention against softmax attention.

    python benchmarks/attention.py --torch-python PYTHON

PYTHON is an interpreter that has torch; the one that runs this file has jax. One row of 4 heads of 64 dims in float32,
the outputs and the gradients of q, k and v, in milliseconds:

- lightning: `pallas_kernels.lightning_attention`;
- blocked: `lightning_jax.models.softmax_attention`, as it runs on this platform;
- xla: `jax.nn.dot_product_attention`, up to 4K tokens (it keeps the scores of all pairs of tokens);
- torch: `torch.nn.functional.scaled_dot_product_attention`, PyTorch's fused softmax attention, up to 32K tokens.

All take turns, each for about a tenth of a second or one call, in an order that every second round reverses; a figure
is the median over the rounds. It takes about three minutes on two free cores.

Result: benchmarks/results/attention.json, .md and .png. `--quick` proves that it works and writes nothing.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import recording
from sides import Answers, Side, ratios, take_turns

HEADS, DIM = 4, 64
SLOPES = (0.25, 0.0625, 0.015625, 0.00390625)  # 2^(-8 (h + 1) / H), the heads of a first layer
LONGEST = {"lightning": 65536, "blocked": 16384, "xla": 4096, "torch": 32768}
TURN = 0.1  # seconds: a call that is shorter is repeated
MOST_ROUNDS_OF_SECONDS = 3  # rounds where PyTorch alone takes many seconds per call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", required=True, help="interpreter that has torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="CPU cores for each side")
    parser.add_argument("--quick", action="store_true", help="two short lengths, two rounds, nothing written")
    arguments = parser.parse_args()
    lengths = (256, 512) if arguments.quick else tuple(2**n for n in range(10, 17))
    rounds = 2 if arguments.quick else arguments.rounds
    results = []
    with (
        Side(sys.executable, jax_side, arguments.threads) as ours,
        Side(arguments.torch_python, torch_side, arguments.threads) as theirs,
    ):
        for length in lengths:
            results.append(
                measure(ours, theirs, length, rounds if length < LONGEST["torch"] else MOST_ROUNDS_OF_SECONDS)
            )
            print(row(results[-1]), flush=True)
    growth = exponent(results)
    lines = [
        "# Attention alone, forward and backward",
        "",
        f"One row, {HEADS} heads of {DIM} dims, float32; milliseconds, the median of {rounds} rounds "
        f"({MOST_ROUNDS_OF_SECONDS} from {LONGEST['torch']:,} tokens on); what each is stands in the program.",
        "",
        "| tokens | lightning | softmax, blocked | softmax, xla | softmax, torch | torch / lightning (range) |",
        "|---:|---:|---:|---:|---:|---:|",
        *map(row, results),
        "",
        f"The time of lightning attention grows as tokens^{growth:.3f}.",
        *([] if arguments.quick else ["", "![Milliseconds by sequence length](attention.png)"]),
    ]
    recording.write(
        "attention",
        lines,
        {"exponent": growth, "results": results},
        {"lightning_jax": ours.versions, "torch": theirs.versions},
        cores=arguments.threads,
        interpreter=arguments.torch_python,
        folder=None if arguments.quick else recording.RESULTS,
    )
    if not arguments.quick:
        plot(results)


def measure(ours: Side, theirs: Side, length: int, rounds: int) -> dict[str, Any]:
    questions = {
        name: functools.partial((theirs if name == "torch" else ours).ask, name=name, length=length)
        for name, longest in LONGEST.items()
        if length <= longest
    }
    seconds = take_turns(questions, rounds)
    result = {"length": length, "seconds": seconds}
    if "torch" in seconds:
        result["torch_over_lightning"] = ratios(seconds["torch"], seconds["lightning"])
    return result


def exponent(results: list[dict[str, Any]]) -> float:
    """Least-squares slope of log(median seconds) of lightning attention over log(length)."""
    import numpy as np

    seconds = [statistics.median(result["seconds"]["lightning"]) for result in results]
    return float(np.polyfit(np.log([result["length"] for result in results]), np.log(seconds), 1)[0])


def row(result: dict[str, Any]) -> str:
    cells = [f"{result['length']:,}"]
    for name in LONGEST:
        seconds = result["seconds"].get(name)
        cells.append(f"{1e3 * statistics.median(seconds):,.1f}" if seconds else "")
    if "torch_over_lightning" in result:
        least, median, most = result["torch_over_lightning"]
        cells.append(f"{median:.1f} ({least:.1f} to {most:.1f})")
    else:
        cells.append("")
    return f"| {' | '.join(cells)} |"


def plot(results: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for name in LONGEST:
        points = [(r["length"], 1e3 * statistics.median(r["seconds"][name])) for r in results if name in r["seconds"]]
        axes.loglog(*zip(*points, strict=True), "o-", base=2, label=name if name == "lightning" else f"softmax, {name}")
    axes.set_yscale("log", base=10)
    axes.set(
        xlabel="tokens", ylabel="ms, forward and backward", title=f"Attention, {HEADS} heads of {DIM}, float32, CPU"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(recording.RESULTS / "attention.png", dpi=120)


def timed(build: Callable[[str, int], Callable[[], None]]) -> Callable[[str, int], float]:
    """Answers with the seconds of one call, compiled and warmed up before."""

    @functools.cache
    def warmed_up(name: str, length: int) -> tuple[Callable[[], None], int]:
        call = build(name, length)
        call()
        start = time.perf_counter()
        call()
        return call, max(1, round(TURN / (time.perf_counter() - start)))

    def seconds(name: str, length: int) -> float:
        call, repeats = warmed_up(name, length)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return seconds


def jax_side(threads: int) -> Answers:
    """Ours and jax's own; XLA takes as many threads as the process may use cores."""
    import jax
    import jax.numpy as jnp

    from lightning_jax.models.softmax_attention import softmax_attention
    from pallas_kernels import lightning_attention

    attentions = {
        "lightning": lambda q, k, v: lightning_attention(q, k, v, -jnp.array(SLOPES)),
        "blocked": softmax_attention,
        "xla": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
    }

    def build(name: str, length: int) -> Callable[[], None]:
        q, k, v, do = jax.random.normal(jax.random.key(0), (4, 1, length, HEADS, DIM))

        @jax.jit
        def forward_and_backward(q, k, v, do):
            o, pull_back = jax.vjp(attentions[name], q, k, v)
            return o, *pull_back(do)

        return lambda: jax.block_until_ready(forward_and_backward(q, k, v, do))

    return recording.package_versions("jax"), timed(build)


def torch_side(threads: int) -> Answers:
    import torch

    torch.set_num_threads(threads)

    def build(name: str, length: int) -> Callable[[], None]:
        q, k, v, do = torch.randn(4, 1, HEADS, length, DIM)
        for x in (q, k, v):
            x.requires_grad_()

        def forward_and_backward() -> None:
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(o, (q, k, v), do)

        return forward_and_backward

    return recording.package_versions("torch"), timed(build)


if __name__ == "__main__":
    main()
