"""Small runs on eight virtual devices whose memory is dominated by what the estimate has to get right."""

import json
import pathlib

from lightning_jax.config import RunConfig
from lightning_jax.config_reader import load_config
from lightning_jax.planning.hardware import parse_slice
from lightning_jax.stages import Stage, plan_stages

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests/goldens/planned_memory.json"
EIGHT = parse_slice("cpu:8")

LARGE_BATCH = ("stages.pretraining.tokens=1e9", "stages.pretraining.batch_size.tokens=65536")
MINIMAX = ("minimax_m1", *LARGE_BATCH, "stages.context_extension.tokens=1e9", "mesh.data=1", "model.remat=full")
RUNS = {
    "fsdp": (*MINIMAX, "mesh.fsdp=8"),
    "twice the tokens": (*MINIMAX, "mesh.fsdp=8", "stages.pretraining.batch_size.tokens=131072"),
    "twice the layers": (*MINIMAX, "mesh.fsdp=8", "model.num_layers=16"),
    "twice the vocabulary": (*MINIMAX, "mesh.fsdp=8", "model.vocab_size=8192"),
    "twice the feed-forward": (*MINIMAX, "mesh.fsdp=8", "model.intermediate_size=384"),
    "twice the heads' width": (*MINIMAX, "mesh.fsdp=8", "model.head_dim=64"),
    "tensor": (*MINIMAX, "mesh.fsdp=4", "mesh.tensor=2"),
    "sequence": (*MINIMAX, "mesh.fsdp=2", "mesh.sequence=4"),
    "expert, capacity": (*MINIMAX, "mesh.fsdp=2", "mesh.expert=4", "model.expert_dispatch=capacity"),
    "dense": ("tinyllama", *LARGE_BATCH, "mesh.data=1", "mesh.fsdp=8", "model.remat=full"),
}


def planned(name: str, *changes: str) -> tuple[RunConfig, Stage]:
    system, *overrides = RUNS[name]
    config = load_config(f"{ROOT}/configs/{system}.py:laptop", [*overrides, *changes])
    return config, plan_stages(config)[0]


def golden() -> dict[str, dict[str, int]]:
    return json.loads(GOLDEN.read_text())
