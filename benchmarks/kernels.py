"""Lightning attention's kernels on the device of this machine: numerics, races and speed, in one call of eight minutes.

    python benchmarks/kernels.py [--torch-python PYTHON] [--minutes 7.5] [--folder FOLDER]

PYTHON is an interpreter that has torch and, to be measured beside it, flash-linear-attention; by default the one that
runs this file. A GPU needs Python 3.12 or newer and jax 0.11 or newer with its CUDA plugin. Where nothing can be
fetched, bring what it lacks, beside torch and triton, as wheels made on another machine:

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels fla-core einops
    python -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site:. python benchmarks/kernels.py

In this order, so that a cut loses the least; everything is written after every step, and what fails is recorded with
its error while the rest goes on:

1. The device's own rates, of a large matmul and of a large copy: with them `kernel_roofline.py` has the floors.
2. The numerics (`kernel_numerics.py`), and ten runs on the same inputs, which must give the same bits. Meanwhile on the
   CPU the tests that search the interpreted kernels for races, and flash-linear-attention's tuning of its kernels, some
   minutes for each number of heads.
3. The times of B=1, H=64, K=128 at 8K to 128K tokens: ours (`pallas_gpu` or `pallas_tpu`, and `xla`),
   flash-linear-attention's chunk_simple_gla and fused_chunk_simple_gla (Triton), and softmax attention by cuDNN
   (`jax.nn.dot_product_attention`) and FlashAttention-2 (torch). They begin when all of 2 has ended.
4. The times of other lengths (1K to 1M), rows times heads (1 to 512), head dims and packed documents, while time is
   left.
5. What the compilers say without a device (`kernel_compilation.py`).

"training" is one call forward and backward, "backward" what it takes longer than the forward. All sides take turns, one
window of about 40 ms each (`kernel_sides.py`), in an order that every second round reverses; a figure is the median.
Every call has the same inputs: where they fit in the device's cache, the memory's floor can be beaten.

Without an accelerator it times `xla` and torch at a few small shapes, and for the kernels gives 5 only: no times. There
nothing is cut, since the compilers take longer than eight minutes and no device is held.

Result: benchmarks/results/kernels.json, .md and .png, or FOLDER's. `--quick` proves that it works and writes nothing.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import kernel_report
import recording
from kernel_benchmark import Benchmark, Worker
from kernel_compilation import compilation_side
from kernel_numerics import LIMITS
from kernel_roofline import Case
from kernel_sides import jax_side, torch_side
from sides import ON_THE_CPU

HEADLINE = [Case(1, 64, 128, 1024 * thousands) for thousands in (8, 128, 32, 16, 64)]
OTHERS = [
    Case(1, 64, 128, 8192, documents=8),
    *(Case(batch, heads, 128, 8192) for batch, heads in ((1, 1), (8, 64), (1, 16), (2, 64))),
    *(Case(1, heads, 128, length) for heads, length in ((64, 1024), (16, 2**20), (64, 2048), (64, 4096))),
    *(Case(1, 64, dim, 8192) for dim in (64, 256, 96)),
    *(Case(batch, heads, 128, 8192) for batch, heads in ((1, 4), (1, 8), (1, 32), (4, 64))),
    Case(1, 16, 128, 2**18),
]
TIMED_ON_A_CPU = [Case(1, 4, 64, length) for length in (1024, 2048, 4096, 8192)]

CHECKED = [
    (Case(2, 4, 128, 1000, documents=4), "bfloat16"),
    (Case(1, 64, 128, 8192), "bfloat16"),
    *((Case(2, 4, dim, 1000, documents=4), "bfloat16") for dim in (64, 96, 256)),
    *((Case(2, 4, 128, length), "bfloat16") for length in (1, 5, 64, 130, 1000)),
    (Case(1, 1, 128, 5000, documents=3), "bfloat16"),
]
CHECKED_IN_FLOAT32 = [(Case(2, 4, dim, 1000, documents=4), "float32") for dim in (64, 128)]
CHECKED_OF_XLA = [CHECKED[0], *CHECKED_IN_FLOAT32]
CHECKED_ON_A_CPU = [(Case(2, 4, 64, 300, documents), dtype) for dtype in LIMITS for documents in (1, 4)]
REPEATED = [Case(1, 64, 128, 8192), Case(1, 4, 128, 8000)]
COMPILED_FOR_TPUS = [(chip, dim) for dim in (128, 64, 96, 256) for chip in ("v5e", "v5p", "v6e", "v4", "tpu7x")]
COMPILED_FOR_GPUS = [Case(1, 64, dim, 8192) for dim in (128, 64, 96, 256)] + [Case(4, 64, 128, 8192)]

RESERVE = 10  # seconds at the end, for the last record
SHARE_OF_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}  # of the device's, for jax; the rest is torch's
NEEDED = {
    "torch": "for attention in torch and flash-linear-attention (or --torch-python)",
    "jax_cuda13_plugin": "to compile for a GPU",
    "libtpu": "to compile for TPUs",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="interpreter that has torch; this one if not given")
    parser.add_argument("--minutes", type=float, default=7.5, help="with an accelerator, after which nothing is begun")
    parser.add_argument("--folder", type=Path, default=recording.RESULTS, help="where the result is written")
    parser.add_argument("--quick", action="store_true", help="one step of each kind, nothing written")
    arguments = parser.parse_args()
    folder = None if arguments.quick else arguments.folder
    with (
        Worker(sys.executable, jax_side, SHARE_OF_MEMORY) as ours,
        Worker(arguments.torch_python or sys.executable, torch_side, {}) as theirs,
        Worker(sys.executable, compilation_side, ON_THE_CPU) as compilers,
    ):
        benchmark = Benchmark(ours, theirs, compilers, time.monotonic() + 60 * arguments.minutes - RESERVE)
        done = set()
        for step in steps(benchmark, have("torch") or arguments.torch_python is not None):
            if benchmark.remaining() < 0:
                benchmark.record["left_out"].append(" ".join([step.func.__name__, *map(str, step.args)]))
            elif not arguments.quick or step.func not in done:
                step()
                done.add(step.func)
                if folder:
                    save(benchmark, folder, arguments.torch_python, show=False)
    save(benchmark, folder, arguments.torch_python, show=True)
    if folder:
        kernel_report.plot(benchmark.record, folder / "kernels.png")


def steps(benchmark: Benchmark, torch: bool) -> Iterator[partial]:
    """What to do, in order; each step is a method of `benchmark` with its arguments."""
    missing = [name for name in NEEDED if not (torch if name == "torch" else have(name))]
    benchmark.record["missing"] = [f"{name}, {NEEDED[name]}" for name in missing]
    yield partial(benchmark.begin, torch)
    platform = benchmark.record["device"]["platform"]
    if platform == "none":
        return
    on_a_cpu = platform == "cpu"
    for name in benchmark.lightning_of_ours():
        of_a_kernel = CHECKED + ([] if name == "pallas_gpu" else CHECKED_IN_FLOAT32)  # which takes bfloat16 only
        checked = CHECKED_ON_A_CPU if on_a_cpu else CHECKED_OF_XLA if name == "xla" else of_a_kernel
        yield from (partial(benchmark.check, name, *each) for each in checked)
        if name != "xla":
            yield from (partial(benchmark.repeat, name, case) for case in REPEATED)
    yield partial(benchmark.meet)
    yield partial(benchmark.compare)
    yield from (partial(benchmark.time, case) for case in (TIMED_ON_A_CPU if on_a_cpu else HEADLINE + OTHERS))
    if have("jax_cuda13_plugin"):
        yield from (partial(benchmark.compile_for_gpu, case) for case in COMPILED_FOR_GPUS)
    if have("libtpu") and on_a_cpu:
        yield from (partial(benchmark.compile_for_tpu, *each) for each in COMPILED_FOR_TPUS)


def have(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def save(benchmark: Benchmark, folder: Path | None, torch_python: str | None, *, show: bool) -> None:
    recording.write(
        "kernels",
        kernel_report.lines(benchmark.record),
        benchmark.record,
        benchmark.versions(),
        interpreter=torch_python,
        folder=folder,
        show=show,
    )


if __name__ == "__main__":
    main()
