"""A hybrid mixture of experts small enough to compile for every layout, a packed batch, and its documents alone.

Every axis of the mesh divides what it splits, up to eight devices.
"""

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
from lightning_jax.parallel import MeshConfig

PACKED_ROWS, DOCUMENTS, LENGTH, VOCABULARY = 8, 3, 48, 32
ROWS = PACKED_ROWS * DOCUMENTS  # of both batches, so that one program takes them: packed, two of three are empty
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def config(dispatch: str, dtype: str) -> ModelConfig:
    return tiny_model(
        vocab_size=VOCABULARY,
        num_layers=4,
        num_heads=16,
        num_kv_heads=8,
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
        loss_chunk=20,
    )


def packed_batch() -> dict[str, np.ndarray]:
    """Rows of two or three documents with borders anywhere, some with padding behind them, and empty rows between."""
    rng = np.random.default_rng(0)
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, LENGTH), np.int32)
    for row in range(0, ROWS, DOCUMENTS):
        borders = [0, *sorted(rng.choice(np.arange(1, LENGTH), size=DOCUMENTS - 1, replace=False)), LENGTH]
        for number, (start, end) in enumerate(itertools.pairwise(borders), start=1):
            padding = number == DOCUMENTS and row % 2
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


def documents_alone() -> dict[str, np.ndarray]:
    """The documents of the packed batch, each at the start of a row of its own."""
    packed = packed_batch()
    alone = {name: np.zeros_like(array) for name, array in packed.items()}
    for row, number in itertools.product(range(0, ROWS, DOCUMENTS), range(1, DOCUMENTS + 1)):
        members = packed["segment_ids"][row] == number
        for name, array in packed.items():
            alone[name][row + number - 1, : members.sum()] = array[row][members]
    return alone | {"segment_ids": (alone["segment_ids"] > 0).astype(np.int32)}


def mesh(**sizes: int) -> jax.sharding.Mesh:
    """Of these sizes and 1 for the other axes, over the first devices."""
    return on_first_devices(MeshConfig.of(**sizes))


def on_first_devices(layout: MeshConfig) -> jax.sharding.Mesh:
    return parallel.make_mesh(layout, jax.devices()[: math.prod(layout.sizes().values())])


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


class Results(NamedTuple):
    """Of the same documents, and the compiled program's text."""

    packed: Result
    alone: Result
    program: str


@functools.cache
def loss_and_gradients(layout: MeshConfig, dispatch: str, dtype: str) -> Results:
    """Loss and gradients of both batches from the same parameters."""
    with jax.enable_x64(dtype == "float64"):
        model_config, on_mesh = config(dispatch, dtype), on_first_devices(layout)
        operators = parallel.operators(on_mesh, model_config, layout.sequence_attention, layout.gradient_dtype)
        model = nnx.eval_shape(lambda: HybridLM(model_config, rngs=nnx.Rngs(0), operators=operators))
        graphdef, objective = nnx.graphdef(model), NextToken(model_config)
        params = jax.device_put(parameters(dtype), parallel.shardings(parameters(dtype), on_mesh))

        def loss(params, batch):
            return objective.loss(objective.sums(nnx.merge(graphdef, params), batch))[0]

        batches = jax.device_put((packed_batch(), documents_alone()), parallel.batch_sharding(on_mesh))
        quickly = {"xla_backend_optimization_level": 0}
        if jax.__version_info__ < (0, 11):  # whose compiler takes half the time without
            quickly["xla_cpu_use_fusion_emitters"] = False
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, batches[0]).compile(quickly)

        def result(batch):
            value, gradients = compiled(params, batch)
            named = {".".join(map(str, path)): np.asarray(g.get_value()) for path, g in nnx.to_flat_state(gradients)}
            return Result(float(value), named)

        return Results(*map(result, batches), compiled.as_text())


def assert_same(actual: Result, expected: Result, tolerance: float) -> None:
    """Losses and gradients are equal, to a tolerance relative to each array's largest element."""
    np.testing.assert_allclose(actual.loss, expected.loss, rtol=tolerance)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 0, name
        np.testing.assert_allclose(actual.gradients[name], gradient, rtol=0, atol=tolerance * scale, err_msg=name)


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
