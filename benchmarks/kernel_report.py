"""The table and the plot of what `kernels.py` found."""

import collections
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernel_numerics import LIMITS
from kernel_roofline import H200, SOFTMAX, Case, of_gpu_kernel, work
from sides import ratios

CACHE = 50e6  # bytes of an H200's L2
HEADLINE = {"batch": 1, "heads": 64, "dim": 128, "documents": 1}  # the cases of the plot


def lines(record: dict[str, Any]) -> list[str]:
    """Markdown for `recording.write`."""
    device, rates = record["device"], record["rates"]
    parts = [
        [
            "# Kernels of lightning attention: numerics, races and speed",
            "",
            f"Device: {device['kind']}. `auto` is {device['auto']}.",
        ]
    ]
    if rates:
        parts[0][-1] += (
            f" It reaches {rates['operations'] / 1e12:,.1f} TFLOP/s in a large {device['dtype']} matmul and "
            f"{rates['bytes'] / 1e9:,.0f} GB/s in a large copy; floors are from these."
        )
    parts.append(_times(record))
    parts.append(_numerics(record))
    parts.append(_races(record))
    parts.append(_gpu(record["gpu"]))
    parts.append(_tpu(record["tpu"]))
    parts.append(_list("What is not installed here", record["missing"]))
    parts.append(_list("What failed", record["failures"]))
    parts.append(_list("What was left out when the time was up", record["left_out"]))
    return [line for part in parts if part for line in [*part, ""]][:-1]


def _times(record: dict[str, Any]) -> list[str]:
    if not record["times"]:
        return ["## Times", "", "None."]
    itemsize = {"float32": 4, "bfloat16": 2}[record["device"]["dtype"]]
    rows = []
    for forward, training in _pairs(record["times"]):
        case = Case(**forward["case"])
        for name in training["seconds"] | forward["seconds"]:
            cells = [*_shape(case), name]
            cells += _speed(forward, name, case, itemsize)
            cells += _backward(forward, training, name)
            cells += _speed(training, name, case, itemsize)
            rows.append([*cells, _beside_ours(training, name)])
    shape = "B | H | K | T"
    speed = "ms | TFLOP/s | GB/s | of floor"
    return [
        "## Times",
        "",
        f"Inputs in {record['device']['dtype']}; median of the rounds. Training is forward and backward in one call; "
        "backward is what it takes longer than the forward. TFLOP/s and GB/s count what the function needs "
        "(`kernel_roofline.py`), whatever an implementation does. The last column is its training time over that of "
        "the first row of the shape, in the same rounds, with their range. * moves less than the L2 of an H200 "
        "holds, so that memory is not the bound.",
        "",
        f"| {shape} | implementation | forward {speed} | backward ms | of floor | training {speed} | over the first |",
        _rule(17, left={4}),
        *map(_row, rows),
    ]


def _pairs(times: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """The forward and the training of each case."""
    return zip(times[::2], times[1::2], strict=False)


def _shape(case: Case) -> list[str]:
    length = f"{case.length:,}" + (f" in {case.documents} documents" if case.documents > 1 else "")
    return [*map(str, case[:3]), length]


def _speed(timed: dict[str, Any], name: str, case: Case, itemsize: int) -> list[str]:
    figures = timed["seconds"].get(name)
    if not figures:
        return [""] * 4
    seconds = statistics.median(figures)
    needed = work(name, case, timed["direction"], itemsize)
    cached = "*" if needed.bytes < CACHE else ""
    share = "" if name in SOFTMAX or not timed["floor"] else f"{timed['floor'] / seconds:.0%}{cached}"
    rate = "" if name in SOFTMAX else f"{needed.bytes / seconds / 1e9:,.0f}"
    operations = needed.operations / seconds / 1e12
    return [f"{1e3 * seconds:,.3f}", f"{operations:,.1f}" if operations >= 1 else f"{operations:.3f}", rate, share]


def _backward(forward: dict[str, Any], training: dict[str, Any], name: str) -> list[str]:
    if name not in forward["seconds"] or name not in training["seconds"]:
        return ["", ""]
    seconds = statistics.median(training["seconds"][name]) - statistics.median(forward["seconds"][name])
    known = name not in SOFTMAX and training["floor"] and seconds > 0
    share = f"{(training['floor'] - forward['floor']) / seconds:.0%}" if known else ""
    return [f"{1e3 * seconds:,.3f}", share]


def _beside_ours(timed: dict[str, Any], name: str) -> str:
    first = next(iter(timed["seconds"]), None)
    if name not in timed["seconds"] or name == first:
        return ""
    least, median, most = ratios(timed["seconds"][name], timed["seconds"][first])
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


def _numerics(record: dict[str, Any]) -> list[str]:
    if not record["numerics"]:
        return []
    rows = []
    for row in record["numerics"]:
        case, limit = Case(**row["case"]), LIMITS[row["dtype"]]
        name, worst = max(row["errors"].items(), key=lambda item: item[1])
        verdict = "within" if worst <= limit else "**beyond**"
        rows.append(
            [*_shape(case), row["implementation"], row["dtype"], f"{worst:.2g} ({name})", f"{limit:g}", verdict]
        )
    same = [f"{each['implementation']} and {each['beside']} ({each['error']:.1e})" for each in record["same_function"]]
    return [
        "## Numerics",
        "",
        "The largest error of o, the final state and the gradients of q, k, v and the initial state, against the "
        "recurrence in fp64: in float32 over the largest magnitude, in bfloat16 over the error of rounding the exact "
        "result to bfloat16. Decays from 0 to 0.92.",
        "",
        "| B | H | K | T | implementation | dtype | worst error | limit | |",
        _rule(9, left={4, 5, 8}),
        *map(_row, rows),
        *(["", f"Outputs of one function on the same inputs, relative difference: {'; '.join(same)}."] if same else []),
    ]


def _races(record: dict[str, Any]) -> list[str]:
    facts = [f"- The tests that search the interpreted kernels for races: {line}" for line in record["races"]]
    for row in record["same_bits"]:
        verdict = "the same bits" if row["same"] else "**different bits**"
        facts.append(
            f"- {row['implementation']}, {' x '.join(_shape(Case(**row['case'])))}: {verdict} in repeated runs"
        )
    return ["## Races", "", *facts] if facts else []


def _gpu(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    kernels = collections.Counter(
        (
            *_shape(Case(**row["case"])),
            row["name"],
            str(row["registers"]),
            f"{row['spill_stores']} / {row['spill_loads']}",
            f"{row['shared_memory']:,}",
            *_bound(row["name"], Case(**row["case"])),
        )
        for row in rows
    )
    return [
        "## GPU kernels, compiled for an H200 without one",
        "",
        "Of a call forward and backward: registers per thread, bytes spilled, bytes of shared memory per block, and "
        "how many kernels are alike. The bound is no time, and less than any: the larger of the kernel's operations "
        "and of its memory traffic at the rates that NVIDIA publishes for an H200.",
        "",
        "| B | H | K | T | kernel | registers | spill stores / loads | shared memory | bound µs | by | alike |",
        _rule(11, left={4, 9}),
        *(_row([*kernel, str(number)]) for kernel, number in kernels.items()),
    ]


def _bound(name: str, case: Case) -> tuple[str, str]:
    needed = of_gpu_kernel(name, case)
    bounds = {"operations": needed.operations / H200.operations, "memory": needed.bytes / H200.bytes}
    limit = max(bounds, key=bounds.get)
    return f"{1e6 * bounds[limit]:,.1f}", limit


def _tpu(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [
        [
            *(str(row[name]) for name in ("generation", "head_dim", "direction", "chunk", "heads")),
            f"{row['vmem'] / 2**20:.1f}",
            f"{row['ns_per_token']:.3f}",
            row["limit"],
            f"{row['share']:.0%}",
        ]
        for row in rows
    ]
    return [
        "## TPU kernels, compiled without a TPU: a model, no times",
        "",
        "bfloat16 with documents, at the block sizes of the table. The model is the largest of critical path, bundles, "
        "matmuls and memory traffic of one step (`tpu_block_sizes.py`), in ns per token and head of one TensorCore.",
        "",
        "| chip | K | direction | chunk | heads per step | VMEM MiB | model ns | its limit | roofline / model |",
        _rule(9, left={0, 2, 7}),
        *map(_row, cells),
    ]


def _list(title: str, items: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {item}" for item in items)] if items else []


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int, left: set[int]) -> str:
    return "|" + "|".join("---" if n in left else "---:" for n in range(columns)) + "|"


def plot(record: dict[str, Any], path: Path) -> None:
    """Milliseconds by length, forward and training; of the headline's shape where it was timed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, direction in zip(figure.subplots(1, 2), ("forward", "training"), strict=True):
        timed = [each for each in record["times"] if each["direction"] == direction]
        shape = HEADLINE if any(HEADLINE.items() <= each["case"].items() for each in timed) else {}
        chosen = sorted(
            (each for each in timed if shape.items() <= each["case"].items()), key=lambda each: each["case"]["length"]
        )
        for name in dict.fromkeys(name for each in chosen for name in each["seconds"]):
            points = [
                (each["case"]["length"], 1e3 * statistics.median(each["seconds"][name]))
                for each in chosen
                if name in each["seconds"]
            ]
            axes.loglog(*zip(*points, strict=True), "s--" if name in SOFTMAX else "o-", base=2, label=name)
        floors = [(each["case"]["length"], 1e3 * each["floor"]) for each in chosen if each["floor"]]
        if floors:
            axes.loglog(*zip(*floors, strict=True), "k:", base=2, label="floor of lightning attention")
        axes.set_yscale("log", base=10)
        what = "forward" if direction == "forward" else "forward and backward"
        axes.set(xlabel="tokens", ylabel="ms", title=f"{record['device']['kind']}, {what}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
