"""The 456B train step on slices of TPUs: memory of a device by our estimate and by the compiler, which needs no TPU.

    python benchmarks/pod_memory.py                  # the rows that results/pod_memory.json lacks, one after the other
    python benchmarks/pod_memory.py --rows=v6e --again
    python benchmarks/pod_memory.py --quick          # a small model on eight virtual devices, prints only

Each compilation is a process of its own, which gives its time and the host memory it took; pip install libtpu first.
The mesh of each row is what --mesh=auto chose when it was compiled, and chooses now where it was not; such a row says
so and has the estimate alone.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import recording
from lightning_jax.config_reader import load_config
from lightning_jax.errors import UserError
from lightning_jax.metrics.provenance import versions
from lightning_jax.parallel import MeshConfig
from lightning_jax.planning.compiled import compile_step, described_devices
from lightning_jax.planning.estimate import RESERVE, estimate
from lightning_jax.planning.hardware import parse_slice
from lightning_jax.planning.meshes import ERROR, with_mesh
from lightning_jax.planning.report import mesh_text
from lightning_jax.stages import plan_stages

ROOT = Path(__file__).parents[1]
RESULT = recording.RESULTS / "pod_memory.json"
GIB = 2**30

STAGES = ("continual_pretraining", "context_32k", "context_128k", "context_1024k")
BF16 = ("model.param_dtype=bfloat16", *(f"stages.{stage}.optimizer.moment_dtype=bfloat16" for stage in STAGES))
SLICES = {"v5p:8x8x8": (), "v6e:16x16": BF16, "tpu7x:4x8x8": ()}
OFFLOAD, MOMENTS = "model.remat=offload", "mesh.moments=host"
ROWS = [(topology, stage, overrides) for stage in STAGES for topology, overrides in SLICES.items()]
# What long rows want of chips of 32 GiB: layer inputs on the host, and moments too, or two slices.
ROWS += [
    ("v6e:16x16", "context_128k", (*BF16, OFFLOAD)),
    ("v6e:16x16", "context_1024k", (*BF16, OFFLOAD, MOMENTS)),
    ("2xv6e:16x16", "context_1024k", BF16),
]
TIMEOUT = 3500


def row_config(
    topology: str, stage: str, overrides: tuple[str, ...], config: str, mesh: str = ""
) -> tuple[Any, Any, Any, str]:
    """Config, stage and slice of a row, with this mesh or the one that suits it, and why that one."""
    run = load_config(config, [f"run_stages={stage}", *overrides])
    (planned,), target = plan_stages(run), parse_slice(topology)
    if mesh:
        axes = dict(part.split() for part in mesh.split(" x "))
        sizes = {axis: int(size) for axis, size in axes.items()}
        sizes = MeshConfig.of(**sizes).sizes()
        return dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, **sizes)), planned, target, f"mesh {mesh}"
    run, why = with_mesh(run, "auto", [planned], target)
    return run, planned, target, why


def estimated(topology: str, stage: str, overrides: tuple[str, ...], config: str, mesh: str = "") -> dict[str, Any]:
    """What the planner says of a row."""
    row = {"slice": topology, "stage": stage, "overrides": overrides}
    try:
        run, planned, target, why = row_config(topology, stage, overrides, config, mesh)
    except UserError as error:
        return row | {"problem": str(error)}
    plan = estimate(run, planned, target)
    return row | {
        "mesh": mesh_text(plan.mesh),
        "why": why,
        "micro_batches": plan.micro_batches,
        "estimate": plan.memory.total,
        "memory": target.chip.memory_bytes,
        "fits": plan.fits,
    }


def compiled(topology: str, stage: str, overrides: tuple[str, ...], config: str) -> dict[str, Any]:
    """What the compiler says of a row, measured in this process."""
    run, planned, target, _ = row_config(topology, stage, overrides, config)
    began = time.process_time()
    result = compile_step(run, planned, described_devices(target))
    return {
        "arguments": result.arguments,
        "temporaries": result.temporaries,
        "compile_seconds": result.compile_seconds,
        "cpu_seconds": time.process_time() - began,
        "host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "libtpu": versions().get("libtpu", "-"),
    }


def compiled_apart(*row: Any) -> dict[str, Any]:
    """`compiled` in a process of its own; what went wrong where it did."""
    command = [sys.executable, __file__, "--one", json.dumps(row)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"problem": f"the compiler was stopped after {TIMEOUT // 60} minutes"}
    if process.returncode:
        return {"problem": process.stderr.strip().splitlines()[-1]}
    return json.loads(process.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "# Memory of the 456B train step",
        "",
        "MiniMax-M1, AdamW, GiB of a device. Weights and moments are float32, on v6e bfloat16; a micro-batch is a row",
        "of the context; layer inputs wait on the device, or, where it says so, on the host. Estimate: the planner's.",
        "Compiled: arguments + temporaries of the step for described devices. Fits, with 8% of the memory free: by",
        "the compiler where there is its word, else by the estimate; maybe: only if that is less than 15% too low.",
        "Compile: seconds on a machine that others used at the same time, and seconds of its processors.",
        "",
        "| slice | stage | mesh | estimate | compiled | of | fits | compile | host memory | libtpu |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        on_host = {OFFLOAD: ", offload", MOMENTS: ", moments on the host"}
        added = "".join(text for override, text in on_host.items() if override in row["overrides"])
        name = f"| {row['slice']} | {row['stage']}{added} |"
        if "estimate" not in row:
            lines.append(f"{name} - | - | - | - | no: {row['problem']} | - | - | - |")
            continue
        memory = row["memory"] / GIB
        total, compile_time, host = "estimate only", "-", "-"
        room = (1 - RESERVE) * memory
        fits = "yes" if ERROR * row["estimate"] / GIB <= room else "maybe" if row["fits"] else "no"
        if "temporaries" in row:
            arguments, temporaries = row["arguments"] / GIB, row["temporaries"] / GIB
            total = f"{arguments:.1f} + {temporaries:.1f} = {arguments + temporaries:.1f}"
            compile_time, host = (
                f"{row['compile_seconds']:.0f} s, {row['cpu_seconds']:.0f} s",
                f"{row['host_memory'] / GIB:.1f} GiB",
            )
            fits = "yes" if arguments + temporaries <= room else "no"
        elif "problem" in row:
            total += f": {row['problem']}"
        lines.append(
            f"{name} {row['mesh']} | {row['estimate'] / GIB:.1f} | {total} | {memory:.0f} | {fits} "
            f"| {compile_time} | {host} | {row.get('libtpu', '-')} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="only rows whose slice, stage and overrides contain this")
    parser.add_argument("--again", action="store_true", help="also rows that are on record")
    parser.add_argument("--estimate", action="store_true", help="compile nothing")
    parser.add_argument("--quick", action="store_true", help="a small model on virtual devices; records nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compiled(*json.loads(options.one))))
        return
    config = f"{ROOT}/configs/minimax_m1.py:"
    if options.quick:
        row = ("cpu:8", "pretraining", (), config + "laptop")
        print("\n".join(table([estimated(*row) | compiled_apart(*row)])))
        return
    on_record = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    done = {(row["slice"], row["stage"], tuple(row["overrides"])): row for row in on_record}
    for key in ROWS:
        if options.rows not in " ".join((*key[:2], *key[2])):
            continue
        row, old = (*key, config + "456b"), done.get(key, {})
        if "temporaries" in old and not options.again:
            figures = old | estimated(*row, old["mesh"]) | {"why": old["why"]}
        else:
            figures = estimated(*row)
            if "estimate" in figures and not options.estimate:
                figures |= compiled_apart(*row)
        done[key] = figures
        rows = [done[each] for each in ROWS if each in done]
        recording.write("pod_memory", table(rows), {"rows": rows}, show=False)
        print(table([figures])[-1], flush=True)


if __name__ == "__main__":
    main()
