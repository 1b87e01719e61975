"""Peak host memory of importing and exporting weights, against the largest tensor.

    python benchmarks/conversion_memory.py
    python benchmarks/conversion_memory.py --largest_mb=100 --no_record    # a few hundred MB in all

Writes a synthetic MiniMax checkpoint in bfloat16 to a temporary folder, block by block, and converts it to one of our
checkpoints, that to a Hugging Face folder, and what training would have saved of the same weights too: each conversion
a process of its own, whose peak resident memory the kernel reports. What a conversion of a model of a few kilobytes
takes, Python and its packages, is measured the same way and taken off. Writes conversion_memory.md and .json to
benchmarks/results/; needs 12 times the largest tensor on disk, and for the last conversion's preparation 5 times in
memory.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
import recording

from lightning_jax.checkpoints import CheckpointConfig, Checkpoints, safetensors_folder
from lightning_jax.models import hugging_face
from lightning_jax.models.hugging_face_config import read_config
from lightning_jax.trained_model import load_model

HIDDEN, LAYERS, EXPERTS = 2048, 8, 8
BLOCK_ROWS = 4096


def config(largest_bytes: int) -> dict:
    """config.json of a model whose embedding has so many bytes, and its experts about as many in all."""
    return {
        "model_type": "minimax_text_01",
        "vocab_size": max(largest_bytes // (2 * HIDDEN), 16),
        "hidden_size": HIDDEN if largest_bytes > 1e6 else 16,
        "intermediate_size": HIDDEN if largest_bytes > 1e6 else 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128 if largest_bytes > 1e6 else 4,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "attn_type_list": [0] * (LAYERS - 1) + [1],
        "postnorm": True,
    }


def make_checkpoint(folder: pathlib.Path, largest_bytes: int) -> tuple[int, int]:
    """Writes random weights in shards; the bytes of the largest tensor and of all."""
    folder.mkdir()
    fields = config(largest_bytes)
    (folder / "config.json").write_text(json.dumps(fields))
    pieces = hugging_face.pieces(read_config(fields, "bfloat16"), "experts")
    dtypes = {piece.tensor: np.dtype(np.float32 if piece.is_router else ml_dtypes.bfloat16) for piece in pieces}
    shapes = {name: (shape, dtypes[name]) for name, shape in hugging_face.tensor_shapes(pieces).items()}
    planned = safetensors_folder.plan(folder, shapes, shard_bytes=10**9)
    safetensors_folder.create(planned)
    random = np.random.default_rng(0)
    for piece in pieces:
        for block in piece.blocks(BLOCK_ROWS * HIDDEN):
            values = random.standard_normal(block.shape, np.float32)
            planned[piece.tensor].write(block.first_row, values.astype(dtypes[piece.tensor]))
    safetensors_folder.write_index(folder, planned)
    sizes = [tensor.nbytes for tensor in planned.values()]
    return max(sizes), sum(sizes)


def save_as_training_does(source: pathlib.Path, target: pathlib.Path) -> None:
    """The same parameters, whole in memory, saved as a run saves them."""
    model = load_model(source, say=print)
    manifest = json.loads((source / "checkpoints" / "0" / "MANIFEST.json").read_text())
    with Checkpoints(target / "checkpoints", CheckpointConfig(1, 0, 1, 0, 1)) as checkpoints:
        checkpoints.save(0, {"params": model.params}, manifest["metadata"], wait=True)


def peak_bytes(source: pathlib.Path, target: pathlib.Path) -> tuple[int, float]:
    """Peak resident memory of the command that converts, and its seconds."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "lightning_jax.convert", f"--from={source}", f"--to={target}"]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_maxrss * 1024, time.perf_counter() - begin


def measure(folder: pathlib.Path, largest_bytes: int) -> dict[str, float]:
    """Peak bytes and seconds of each direction, and the sizes."""
    folder.mkdir()
    largest, total = make_checkpoint(folder / "theirs", largest_bytes)
    figures: dict[str, float] = {"largest": largest, "total": total}
    for name, source, target in (
        ("import", "theirs", "ours"),
        ("export", "ours", "exported"),
        ("export of a run", "trained", "exported_run"),
    ):
        if source == "trained":
            # In a process of its own: what this one has had in memory, the kernel counts as its children's too.
            save = multiprocessing.get_context("spawn").Process(
                target=save_as_training_does, args=(folder / "ours", folder / "trained")
            )
            save.start()
            save.join()
            assert save.exitcode == 0
        figures[f"{name}: peak"], figures[f"{name}: seconds"] = peak_bytes(folder / source, folder / target)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--largest_mb", type=float, default=800, help="of the largest tensor")
    parser.add_argument("--folder", help="for the files; the system's temporary folder if not given")
    parser.add_argument("--no_record", action="store_true", help="print the result only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        small = measure(pathlib.Path(folder) / "small", 0)
        large = measure(pathlib.Path(folder) / "large", int(options.largest_mb * 1e6))
    lines = [
        "# Host memory of a conversion",
        "",
        f"A MiniMax model of {large['total'] / 1e9:.2f} GB; its largest tensor has {large['largest'] / 1e6:,.0f} MB.",
        "",
        "| conversion | peak | without Python and packages | over the largest tensor | time |",
        "|---|---|---|---|---|",
    ]
    for name in ("import", "export", "export of a run"):
        peak, constant = large[f"{name}: peak"], small[f"{name}: peak"]
        lines.append(
            f"| {name} | {peak / 1e6:,.0f} MB | {(peak - constant) / 1e6:,.0f} MB | "
            f"{(peak - constant) / large['largest']:.2f} | {large[f'{name}: seconds']:.0f} s |"
        )
    recording.write(
        "conversion_memory",
        lines,
        {"small": small, "large": large},
        {"lightning_jax": recording.package_versions("jax", "numpy", "tensorstore", "orbax-checkpoint")},
        folder=None if options.no_record else recording.RESULTS,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
