"""A hybrid mixture of experts small enough to compile for every layout, a packed batch, and its documents alone."""

import collections
import functools
import itertools
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from tiny_model import tiny_model

from lightning_jax import parallel
from lightning_jax.models import HybridLM, ModelConfig
from lightning_jax.objectives import NextToken

ROWS, LENGTH, VOCABULARY = 8, 48, 32
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def config(dispatch: str, dtype: str) -> ModelConfig:
    return tiny_model(
        vocab_size=VOCABULARY,
        num_layers=4,
        intermediate_size=24,
        num_experts=8,
        expert_dispatch=dispatch,
        capacity_group=6,  # what every layout leaves whole
        router_aux_loss="huggingface",
        router_aux_coefficient=0.1,
        residual_alpha=8**0.25,
        initializer="deepnorm",
        param_dtype=dtype,
        compute_dtype=dtype,
        logits_dtype=dtype,
        loss_chunk=5,
    )


def packed_batch() -> dict[str, np.ndarray]:
    """Rows of two or three documents with borders anywhere, some with padding behind them."""
    rng = np.random.default_rng(0)
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        borders = [0, *sorted(rng.choice(np.arange(1, LENGTH), size=2, replace=False)), LENGTH]
        for number, (start, end) in enumerate(itertools.pairwise(borders), start=1):
            padding = number == 3 and row % 2
            segment_ids[row, start:end] = 0 if padding else number
            positions[row, start:end] = np.arange(end - start)
    targets = rng.integers(0, VOCABULARY, size=(ROWS, LENGTH), dtype=np.int32)
    ends = np.append(segment_ids[:, 1:], np.zeros((ROWS, 1), np.int32), axis=1) != segment_ids
    return {
        "inputs": rng.integers(0, VOCABULARY, size=(ROWS, LENGTH), dtype=np.int32),
        "targets": targets,
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_mask": (segment_ids > 0) & ~ends,
    }


def documents_alone(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The documents of a packed batch, each at the start of a row of its own."""
    documents = [
        (packed["segment_ids"][row] == number, row)
        for row in range(ROWS)
        for number in range(1, packed["segment_ids"].max() + 1)
        if (packed["segment_ids"][row] == number).any()
    ]

    def unpack(name: str) -> np.ndarray:
        rows = np.zeros((len(documents), LENGTH), packed[name].dtype)
        for alone, (members, row) in enumerate(documents):
            alone_values = packed[name][row][members]
            rows[alone, : alone_values.size] = alone_values
        return rows

    batch = {name: unpack(name) for name in packed}
    return batch | {"segment_ids": (batch["segment_ids"] > 0).astype(np.int32)}


def mesh(
    data: int, fsdp: int, expert: int, tensor: int, sequence: int = 1, expert_tensor: int = 1
) -> jax.sharding.Mesh:
    sizes = parallel.MeshConfig.of(
        data=data, fsdp=fsdp, expert=expert, expert_tensor=expert_tensor, sequence=sequence, tensor=tensor
    )
    return parallel.make_mesh(sizes, jax.devices()[: math.prod(sizes.sizes().values())])


@functools.cache
def parameters(dtype: str) -> nnx.State:
    """Random parameters, in numpy, with norms' weights around 1."""
    rng = np.random.default_rng(1)
    abstract = nnx.eval_shape(lambda: nnx.state(HybridLM(config("auto", dtype), rngs=nnx.Rngs(0)), nnx.Param))

    def draw(path, leaf):
        norm = any("norm" in str(part) for part in path)
        return np.asarray(rng.normal(1.0 if norm else 0.0, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


class Result(NamedTuple):
    loss: float
    gradients: dict[str, np.ndarray]
    program: str  # the compiled program's text


@functools.cache
def loss_and_gradients(
    layout: tuple[int, ...],
    dispatch: str,
    dtype: str,
    *,
    packed: bool = True,
    sequence_attention: str = "ring",
    gradient_dtype: str = "compute",
) -> Result:
    """Loss and gradients of the batch from the same parameters.

    Args:
        layout: data, fsdp, expert, tensor, and if not 1 sequence, expert_tensor.
    """
    with jax.enable_x64(dtype == "float64"):
        model_config, on_mesh = config(dispatch, dtype), mesh(*layout)
        operators = parallel.operators(on_mesh, model_config, sequence_attention, gradient_dtype)
        model = nnx.eval_shape(lambda: HybridLM(model_config, rngs=nnx.Rngs(0), operators=operators))
        graphdef, objective = nnx.graphdef(model), NextToken(model_config)
        params = jax.device_put(parameters(dtype), parallel.shardings(parameters(dtype), on_mesh))

        def loss(params, batch):
            return objective.loss(objective.sums(nnx.merge(graphdef, params), batch))[0]

        batch = packed_batch() if packed else documents_alone(packed_batch())
        batch = jax.device_put(batch, parallel.batch_sharding(on_mesh))
        quickly = {"xla_backend_optimization_level": 0}
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile(quickly)
        value, gradients = compiled(params, batch)
        named = {".".join(map(str, path)): np.asarray(g.get_value()) for path, g in nnx.to_flat_state(gradients)}
        return Result(float(value), named, compiled.as_text())


def collectives(program: str) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each kind of collective of a compiled program produces, where it has more than one device."""
    shapes = collections.defaultdict(list)
    operation = rf"= (\S+|\([^=]*?\)) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)"
    for results, kind, rest in re.findall(operation, program):
        if re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\])", rest):
            continue
        for dimensions in re.findall(r"\w+\[([\d,]*)\]", results):
            shapes[kind].append(tuple(int(size) for size in dimensions.split(",") if size))
    return dict(shapes)
