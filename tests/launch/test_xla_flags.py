"""What the compilers make of collectives with the flags of launch/xla_flags.sh and without, in scheduled programs."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from tiny_model import tiny_model

from lightning_jax import parallel
from lightning_jax.models.experts import ExpertWeights
from lightning_jax.planning.compiled import described_devices
from lightning_jax.planning.hardware import parse_slice

ROOT = pathlib.Path(__file__).parents[2]
LAYERS, ROWS, LENGTH, D, F, EXPERTS = 3, 8, 1024, 512, 1024, 8


def flags(variable: str) -> str:
    """What the script puts into an empty variable."""
    script = f'. {ROOT}/launch/xla_flags.sh && echo "${variable}"'
    environment = os.environ | {variable: ""}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout


def collectives(program: str, work: str) -> Counter:
    """How often a kind of collective is waited for, begun with work beside it, and begun with none."""
    found: Counter = Counter()
    begun: dict[str, tuple[str, bool]] = {}
    for line in program.splitlines():
        operation = re.search(
            r"%([\w.\-]+) = .*? (all-gather|all-to-all|reduce-scatter|all-reduce)(-start|-done)?\(", line
        )
        if not operation:
            begun = {name: (kind, beside or bool(re.search(work, line))) for name, (kind, beside) in begun.items()}
            continue
        name, kind, part = operation.groups()
        if part == "-start":
            begun[name] = kind, False
        elif part == "-done":
            beside = begun.pop(re.search(r"-done\(%([\w.\-]+)", line)[1])[1]
            found[kind, "work beside it" if beside else "nothing beside it"] += 1
        else:
            found[kind, "waited for"] += 1
    return found


def layers_of_experts(gradient_dtype: str, options: dict[str, str]) -> str:
    """The scheduled program of the gradient of a scan over layers of experts, each behind a product, in bfloat16."""
    mesh = parallel.make_mesh(parallel.MeshConfig.of(fsdp=2, expert=2), described_devices(parse_slice("v5p:2x2x1")))
    model = tiny_model(num_experts=EXPERTS, expert_dispatch="capacity", capacity_group=LENGTH, compute_dtype="bfloat16")
    operators = parallel.operators(mesh, model, "ring", gradient_dtype)

    def loss(layers, x_BTD):
        def layer(x_BTD, weights):
            product, experts = weights
            x_BTD = x_BTD + jnp.tanh(operators.project(x_BTD, nnx.Param(product)))
            expert_BTk = jnp.argsort(x_BTD[..., :EXPERTS], axis=-1)[..., -2:].astype(jnp.int32)
            weight_BTk = jax.nn.softmax(x_BTD[..., :2].astype(jnp.float32))
            mask_BT = jnp.ones(x_BTD.shape[:2], bool)
            return x_BTD + operators.experts(x_BTD, expert_BTk, weight_BTk, experts, mask_BT=mask_BT)[0], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x_BTD, layers)[0].astype(jnp.float32) ** 2)

    def weight(axes, *shape):
        spec = parallel.RULES.spec(axes, (LAYERS, *shape), mesh)
        return jax.ShapeDtypeStruct((LAYERS, *shape), jnp.float32, sharding=NamedSharding(mesh, spec))

    inside, outside = ("experts", "expert_embed", "expert_mlp"), ("experts", "expert_mlp", "expert_embed")
    experts = ExpertWeights(
        weight(inside, EXPERTS, D, F), weight(inside, EXPERTS, D, F), weight(outside, EXPERTS, F, D)
    )
    x_BTD = jax.ShapeDtypeStruct((ROWS, LENGTH, D), jnp.bfloat16, sharding=parallel.batch_sharding(mesh))
    lowered = jax.jit(jax.grad(loss)).lower((weight(("embed", None), D, D), experts), x_BTD)
    return lowered.compile(options).as_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu's compiler: pip install libtpu")
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="shows no program of described TPUs before jax 0.12")
@pytest.mark.parametrize(
    ("gradient_dtype", "width", "with_flags"), [("float32", "f32", False), ("compute", "bf16", True)]
)
def test_on_tpus_tokens_travel_to_their_experts_beside_work_and_gradients_in_the_dtype_asked_for(
    gradient_dtype, width, with_flags
):
    options = dict(flag.removeprefix("--").split("=") for flag in flags("LIBTPU_INIT_ARGS").split())
    program = layers_of_experts(gradient_dtype, options if with_flags else {})
    found = collectives(program, work=r" (fusion|convolution|custom-call)\(")
    exchanges = {how: times for (kind, how), times in found.items() if kind == "all-to-all"}
    assert exchanges == ({"work beside it": 4, "waited for": 2} if with_flags else {"waited for": 6})
    sums = re.findall(r"= (\w+)\[[\d,]+\]\S* (?:reduce-scatter|all-reduce)(?:-start)?\(", program)
    assert len(sums) == 4  # of the product and of three matrices of the experts
    assert set(sums) == {width}
    weights = re.findall(r"= (\w+)\[[\d,]+\]\S* all-gather\(", program)
    assert set(weights) == {"bf16"}


SCAN_ON_GPUS = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.gpu.deviceless import TARGETS

devices = topologies.get_topology_desc(platform="cuda", target_config=TARGETS["h200"], topology="1x1x8").devices
mesh, size = Mesh(np.array(devices), ("fsdp",)), 4096
def split(*shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
def layers(weights, x):
    return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]
weights = split(6, size, size, spec=PartitionSpec(None, "fsdp"))
x = split(8 * 2048, size, spec=PartitionSpec("fsdp"))
print(jax.jit(layers).lower(weights, x).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA plugin: pip install jax-cuda13-plugin"
)
@pytest.mark.parametrize("with_flags", [False, True])
def test_on_gpus_a_layers_weights_are_gathered_during_the_product_of_the_layer_before(with_flags):
    environment = os.environ | {"XLA_FLAGS": flags("XLA_FLAGS") if with_flags else "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCAN_ON_GPUS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = collectives(done.stdout, work=r"%gemm_fusion_dot\S* = ")
    assert (found["all-gather", "work beside it"] > 0) == with_flags, found
