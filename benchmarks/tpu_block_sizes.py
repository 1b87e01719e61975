"""Block sizes of the TPU kernels, chosen by a model of the compiled program: no TPU is needed, and nothing is timed.

    python benchmarks/tpu_block_sizes.py [--head-dims 64 ...] [--kept FILE]

needs the package libtpu and takes about half an hour on one core; of head dims that are not named, the last result's
figures stay. FILE gets each candidate's figures as they come; what it holds is not compiled again, so that a run which
was cut goes on. For every TPU generation, head dim and dtype it compiles the forward and the backward kernel (with
documents and a tail) at candidate block sizes, reads the compiler's dumps, and takes the sizes with the least model
time of both directions together; of those within a percent the largest, because every step costs something that the
model omits. Fewer heads are tried as long as fewer are faster: where all 442 candidates were, this chose the same. The
model time of one step of the grid is the largest of

- crit: the compiler's critical path through the step, in cycles;
- bundle: the instruction bundles from the step's first matmul to its last, in cycles;
- mxu: its matmuls, padded to the width of the matrix unit, at the published peak;
- dma: its traffic at the published bandwidth of the memory.

It omits what the pipeline costs to start and per step, the latency of copies, and whatever a real memory loses of its
bandwidth. It ranks variants and shows regressions; it is no time and makes no claim about speed. tpu7x's clock is not
published and assumed to be 2.2 GHz.

Result: pallas_kernels/tpu/block_size_table.py; benchmarks/results/tpu_block_sizes.json (every candidate) and .md.
`--quick` tries two candidates and writes nothing.
"""

import argparse
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import recording

from pallas_kernels.tpu.backward import backward
from pallas_kernels.tpu.chunk import find_borders
from pallas_kernels.tpu.deviceless import compile_for, vmem_of_kernels
from pallas_kernels.tpu.forward import forward

HEAD_DIMS = (64, 96, 128, 256)
CHUNKS = {"bfloat16": (128, 256), "float32": (128,)}  # six times the matmuls: longer fp32 chunks only cost
WIDE_CHUNKS = (128, 256, 512)  # bfloat16 where the matrix unit is 256 wide
LANES = 128
WIDEST_BLOCK = 1024  # lanes
MXU_PASSES = {"bfloat16": 1, "float32": 6}  # bf16 multiplications per product at Precision.HIGHEST
TABLE = Path(__file__).parents[1] / "pallas_kernels" / "tpu" / "block_size_table.py"


class Chip(NamedTuple):
    """Per TensorCore, as Google publishes it for the chip."""

    flops: float  # bf16, per second
    bandwidth: float  # bytes per second
    clock: float  # Hz
    matrix_unit: int  # rows and columns


CHIPS = {
    "v4": Chip(275e12 / 2, 1228e9 / 2, 1.05e9, 128),
    "v5e": Chip(197e12, 819e9, 1.5e9, 128),
    "v5p": Chip(459e12 / 2, 2765e9 / 2, 1.75e9, 128),
    "v6e": Chip(918e12, 1640e9, 1.75e9, 256),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 2.2e9, 256),
}


class Candidate(NamedTuple):
    generation: str
    head_dim: int
    dtype: str
    direction: str
    chunk: int
    heads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--kept", type=Path, help="file of figures so far; new ones are added")
    parser.add_argument("--quick", action="store_true", help="two candidates, nothing written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dump_to(folder)
        figures = Figures(Path(folder), None if arguments.quick else arguments.kept)
        if arguments.quick:
            for candidate in next(searches(HEAD_DIMS))[:2]:
                figures(candidate)
            return
        rows = [row for search in searches(arguments.head_dims) for row in fewer_and_fewer_heads(search, figures)]
    rows += [row for row in recorded() if row["head_dim"] not in arguments.head_dims]
    rows.sort(key=lambda row: (list(CHIPS).index(row["generation"]), row["head_dim"]))
    table = choose(rows)
    TABLE.write_text(source(table), encoding="utf-8")
    record(rows, table, arguments.head_dims)


class Figures:
    """What `measure` says of candidates; a file keeps it, so that a run which was cut goes on."""

    def __init__(self, dumps: Path, file: Path | None):
        self._dumps, self._file = dumps, file
        lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
        self._kept = {Candidate(*candidate): figures for candidate, figures in map(json.loads, lines)}

    def __call__(self, candidate: Candidate) -> dict[str, Any]:
        """The candidate with its figures."""
        if candidate not in self._kept:
            self._kept[candidate] = measure(candidate, self._dumps)
            print(*candidate, self._kept[candidate], flush=True)
            if self._file:
                with self._file.open("a", encoding="utf-8") as file:
                    print(json.dumps([candidate, self._kept[candidate]]), file=file)
        return candidate._asdict() | self._kept[candidate]


def fewer_and_fewer_heads(search: list[Candidate], figures: Figures) -> list[dict[str, Any]]:
    """Of the candidates from the most heads down, all until fewer heads are no faster."""
    rows: list[dict[str, Any]] = []
    for candidate in search:
        before = rows[-1] if rows else {"fits": False}
        rows.append(figures(candidate))
        if before["fits"] and rows[-1]["ns_per_token"] >= before["ns_per_token"]:
            break
    return rows


def recorded() -> list[dict[str, Any]]:
    return json.loads((recording.RESULTS / "tpu_block_sizes.json").read_text(encoding="utf-8"))["candidates"]


def dump_to(folder: str) -> None:
    """Makes the compiler write there what `measure` reads; only before this process compiles for the first time."""
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"


def searches(head_dims: Sequence[int]) -> Iterator[list[Candidate]]:
    """Candidates that differ in their heads only, from the most down."""
    for generation, head_dim, dtype in itertools.product(CHIPS, head_dims, CHUNKS):
        for chunk, direction in itertools.product(chunks(generation, dtype), ("forward", "backward")):
            heads = reversed(head_counts(head_dim))
            yield [Candidate(generation, head_dim, dtype, direction, chunk, each) for each in heads]


def chunks(generation: str, dtype: str) -> tuple[int, ...]:
    return WIDE_CHUNKS if dtype == "bfloat16" and CHIPS[generation].matrix_unit == 256 else CHUNKS[dtype]


def head_counts(head_dim: int) -> list[int]:
    fewest = LANES // math.gcd(LANES, head_dim)
    return [fewest * 2**n for n in range(5) if fewest * 2**n * head_dim <= WIDEST_BLOCK]


def measure(candidate: Candidate, dumps: Path) -> dict[str, Any]:
    """The model of one step of the grid in microseconds, or what the compiler says where it does not fit."""
    for file in dumps.iterdir():
        file.unlink()
    try:
        compiled = compile_candidate(candidate)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False}
    chip = CHIPS[candidate.generation]
    schedule = read_schedule(dumps, f"lightning_attention_{candidate.direction}")
    (schedule["vmem"],) = vmem_of_kernels(compiled)
    microseconds = {
        "crit": schedule.pop("critical_path") / chip.clock * 1e6,
        "bundle": schedule.pop("bundles") / chip.clock * 1e6,
        "mxu": padded_flops(candidate) / chip.flops * 1e6,
        "dma": traffic(candidate) / chip.bandwidth * 1e6,
    }
    limit = max(microseconds, key=microseconds.get)
    step = candidate.heads * candidate.chunk
    roofline = max(flops(candidate) / chip.flops, traffic(candidate) / chip.bandwidth) * 1e6
    if microseconds[limit] < roofline:
        raise AssertionError(f"{candidate}: the model beats the roofline, so it is wrong")
    figures = microseconds | {"ns_per_token": 1e3 * microseconds[limit] / step, "share": roofline / microseconds[limit]}
    return {"fits": True, **{name: round(x, 4) for name, x in figures.items()}, **schedule, "limit": limit}


def compile_candidate(candidate: Candidate) -> jax.stages.Compiled:
    _, head_dim, dtype, direction, chunk, heads = candidate
    batch, chunks, num_heads = 1, 4, 2 * heads
    length = chunks * chunk - 8
    x = jax.ShapeDtypeStruct((batch, length, num_heads * head_dim), dtype)
    log_decay = jax.ShapeDtypeStruct((num_heads,), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, num_heads, head_dim, head_dim), jnp.float32)
    borders = jax.eval_shape(partial(find_borders, chunk=chunk), jax.ShapeDtypeStruct((batch, length), jnp.int32))
    if direction == "forward":
        kernel = partial(forward, chunk=chunk, heads=heads, save_states=True)
        arguments = (x, x, x, log_decay, borders, state)
    else:
        kernel = partial(backward, chunk=chunk, heads=heads)
        states = jax.ShapeDtypeStruct((batch, chunks, *state.shape[1:]), dtype)
        arguments = (x, x, x, log_decay, borders, states, x, state)
    return compile_for(candidate.generation, jax.jit(kernel), *arguments)


def read_schedule(dumps: Path, kernel: str) -> dict[str, int]:
    """Cycles of the critical path, bundles between the first and the last matmul, and the spills among them."""
    (utilization,) = dumps.glob(f"*{kernel}*final_hlo-static-per-bundle-utilization.txt")
    header, _, body = utilization.read_text().partition("== UTILIZATION:")
    columns = [name.strip() for name in header.splitlines()[1].split(",")]
    bundles = [[int(x) for x in line.split()] for line in body.splitlines() if line.strip()]
    matmul, fill, spill = (columns.index(name) for name in ("MATMUL", "VLOAD:FILL", "VSTORE:SPILL"))
    with_matmul = [n for n, bundle in enumerate(bundles) if bundle[matmul]]
    step = bundles[with_matmul[0] : with_matmul[-1] + 1]
    (critical_path,) = dumps.glob(f"*{kernel}*critical-path.txt")
    return {
        "critical_path": max(int(x) for x in re.findall(r"Length to end: (\d+)", critical_path.read_text())),
        "bundles": len(step),
        "fills": sum(bundle[fill] for bundle in step),
        "spills": sum(bundle[spill] for bundle in step),
    }


def matmuls(candidate: Candidate) -> list[tuple[int, int, int]]:
    """(rows, contracted, columns) of every matmul for one head and chunk."""
    C, K = candidate.chunk, candidate.head_dim
    if candidate.direction == "forward":
        return [(C, K, C), (C, C, K), (C, K, K), (K, C, K)]
    return 2 * [(C, K, C)] + 3 * [(C, C, K)] + 3 * [(C, K, K)] + [(K, C, K)]


def flops(candidate: Candidate) -> float:
    passes = MXU_PASSES[candidate.dtype]
    return candidate.heads * passes * sum(2 * m * k * n for m, k, n in matmuls(candidate))


def padded_flops(candidate: Candidate) -> float:
    """With the contracted dim and the better of the two others filled up to the width of the matrix unit."""
    width = CHIPS[candidate.generation].matrix_unit

    def fill_up(x):
        return -(-x // width) * width

    total = sum(2 * fill_up(k) * min(m * fill_up(n), n * fill_up(m)) for m, k, n in matmuls(candidate))
    return candidate.heads * MXU_PASSES[candidate.dtype] * total


def traffic(candidate: Candidate) -> float:
    """Bytes of q, k, v, o and the saved state (forward), with do, dq, dk, dv instead of o (backward)."""
    tensors = 4 if candidate.direction == "forward" else 7
    numbers = tensors * candidate.chunk * candidate.head_dim + candidate.head_dim**2
    return candidate.heads * numbers * jnp.dtype(candidate.dtype).itemsize


Table = dict[tuple[str, int, str], tuple[int, int, int]]


def choose(rows: list[dict[str, Any]]) -> Table:
    """(generation, head dim, dtype) -> chunk, heads of the forward, heads of the backward: least sum of both."""

    def best(generation, head_dim, dtype, direction, chunk):
        key = (generation, head_dim, dtype, direction, chunk)
        fitting = [row for row in rows if row["fits"] and tuple(row.values())[:5] == key]
        return least(fitting, lambda row: row["ns_per_token"], lambda row: row["heads"])

    table = {}
    for key in itertools.product(CHIPS, HEAD_DIMS, CHUNKS):
        lengths = chunks(key[0], key[2])
        pairs = [(best(*key, "forward", chunk), best(*key, "backward", chunk)) for chunk in lengths]
        ahead, back = least(
            [pair for pair in pairs if None not in pair],
            lambda pair: pair[0]["ns_per_token"] + pair[1]["ns_per_token"],
            lambda pair: pair[0]["chunk"],
        )
        table[key] = (ahead["chunk"], ahead["heads"], back["heads"])
    return table


def least(items: list, cost: Callable[[Any], float], size: Callable[[Any], int]) -> Any:
    """The largest of those that cost at most a percent more than the cheapest; None if there are none."""
    limit = 1.01 * min(map(cost, items), default=0)
    return max((item for item in items if cost(item) <= limit), key=size, default=None)


def source(table: Table) -> str:
    lines = [
        '"""Written by benchmarks/tpu_block_sizes.py from a model of the compiled kernels, not from measurements.',
        "",
        "(generation, head dim, dtype): (tokens per chunk, heads per step of the forward, and of the backward)",
        '"""',
        "",
        "BLOCK_SIZES = {",
    ]
    lines += [f'    ("{generation}", {dim}, "{dtype}"): {sizes},' for (generation, dim, dtype), sizes in table.items()]
    return "\n".join([*lines, "}", ""])


def record(rows: list[dict[str, Any]], table: Table, compiled: Sequence[int]) -> None:
    lines = [
        "# Block sizes of the TPU kernels: a model, not a measurement",
        "",
        "Nothing here ran on a TPU. `benchmarks/tpu_block_sizes.py` says what the model is and what it omits. Model ns "
        "is per token and head on one TensorCore; roofline is the share of it that the arithmetic or the traffic alone "
        "would take; limit is the model's largest term; spills are stores of vector registers in one step. This run "
        f"compiled head dims {', '.join(map(str, compiled))}; figures of others are those of the run before.",
        "",
        "| chip | head dim | dtype | direction | chunk | heads | model ns | roofline | limit | spills |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (generation, head_dim, dtype), (chunk, *both) in table.items():
        for direction, heads in zip(("forward", "backward"), both, strict=True):
            key = Candidate(generation, head_dim, dtype, direction, chunk, heads)
            row = next(row for row in rows if tuple(row.values())[:6] == key)
            lines.append(
                f"| {generation} | {head_dim} | {dtype} | {direction} | {chunk} | {heads} "
                f"| {row['ns_per_token']:.3f} | {row['share']:.0%} | {row['limit']} | {row['spills']} |"
            )
    versions = {"lightning_jax": recording.package_versions("jax", "libtpu")}
    recording.write("tpu_block_sizes", lines, {"candidates": rows}, versions)


if __name__ == "__main__":
    main()
