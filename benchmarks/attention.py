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
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
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
    sides = {
        "jax": Side(sys.executable, "jax", arguments.threads),
        "torch": Side(arguments.torch_python, "torch", arguments.threads),
    }
    results = []
    for length in lengths:
        results.append(measure(sides, length, rounds if length < LONGEST["torch"] else MOST_ROUNDS_OF_SECONDS))
        print(row(results[-1]), flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/attention.py --torch-python PYTHON --rounds {rounds} "
        f"--threads {arguments.threads}",
        "machine": f"{processor()}, {arguments.threads} of {os.cpu_count()} cores, {platform.platform()}, "
        f"load average {os.getloadavg()[0]:.1f} at the end",
        "versions": sides["jax"].versions | sides["torch"].versions,
        "exponent": exponent(results),
        "results": results,
    }
    for side in sides.values():
        side.close()
    print(markdown(record))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "attention.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "attention.md").write_text(markdown(record), encoding="utf-8")
        plot(record)


class Side:
    """A process that holds one library, is asked in lines of JSON and answers in lines of JSON."""

    def __init__(self, python: str, library: str, threads: int):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "OMP_NUM_THREADS": str(threads),
        }
        command = [python, __file__, "--side", library, str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._answer()

    def seconds(self, **question: Any) -> float:
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._process.args)} ended; its error is above")
        return json.loads(line)


def measure(sides: dict[str, Side], length: int, rounds: int) -> dict[str, Any]:
    names = [name for name, longest in LONGEST.items() if length <= longest]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            side = sides["torch" if name == "torch" else "jax"]
            seconds[name].append(side.seconds(name=name, length=length))
    result = {"length": length, "seconds": seconds}
    if "torch" in names:
        ratios = [torch / ours for torch, ours in zip(seconds["torch"], seconds["lightning"], strict=True)]
        result["torch_over_lightning"] = [min(ratios), statistics.median(ratios), max(ratios)]
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


def markdown(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join(
        [
            "# Attention alone, forward and backward",
            "",
            f"`{record['command']}` on {record['date']}: {record['machine']}; {versions}.",
            f"One row, {HEADS} heads of {DIM} dims, float32; median milliseconds; what each is stands in the program.",
            "",
            "| tokens | lightning | softmax, blocked | softmax, xla | softmax, torch | torch / lightning (range) |",
            "|---:|---:|---:|---:|---:|---:|",
            *map(row, record["results"]),
            "",
            f"The time of lightning attention grows as tokens^{record['exponent']:.3f}.",
            "",
            *(["![Milliseconds by sequence length](attention.png)", ""] if len(record["results"]) > 2 else []),
        ]
    )


def plot(record: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for name in LONGEST:
        points = [
            (r["length"], 1e3 * statistics.median(r["seconds"][name]))
            for r in record["results"]
            if name in r["seconds"]
        ]
        axes.loglog(*zip(*points, strict=True), "o-", base=2, label=name if name == "lightning" else f"softmax, {name}")
    axes.set_yscale("log", base=10)
    axes.set(
        xlabel="tokens", ylabel="ms, forward and backward", title=f"Attention, {HEADS} heads of {DIM}, float32, CPU"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "attention.png", dpi=120)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def work(library: str, threads: int) -> None:
    """The loop of a side: answers each question with the seconds of one call, compiled and warmed up before."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    versions, build = {"jax": jax_side, "torch": torch_side}[library]()
    print(json.dumps(versions), flush=True)
    calls: dict[tuple[str, int], tuple[Callable[[], None], int]] = {}
    for line in sys.stdin:
        question = json.loads(line)
        key = question["name"], question["length"]
        if key not in calls:
            calls[key] = warm_up(build(*key))
        call, repeats = calls[key]
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        print(json.dumps((time.perf_counter() - start) / repeats), flush=True)


def warm_up(call: Callable[[], None]) -> tuple[Callable[[], None], int]:
    call()
    start = time.perf_counter()
    call()
    return call, max(1, round(TURN / (time.perf_counter() - start)))


def jax_side() -> tuple[dict[str, str], Callable[[str, int], Callable[[], None]]]:
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

    return {"python": platform.python_version(), "jax": jax.__version__}, build


def torch_side() -> tuple[dict[str, str], Callable[[str, int], Callable[[], None]]]:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    def build(name: str, length: int) -> Callable[[], None]:
        q, k, v, do = torch.randn(4, 1, HEADS, length, DIM)
        for x in (q, k, v):
            x.requires_grad_()

        def forward_and_backward() -> None:
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(o, (q, k, v), do)

        return forward_and_backward

    return {"torch": torch.__version__}, build


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main()
