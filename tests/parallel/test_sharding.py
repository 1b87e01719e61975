"""The table of rules: what it splits, what it refuses, and where every parameter and moment ends up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tiny_hybrid import config, mesh

from lightning_jax import parallel
from lightning_jax.models import HybridLM
from lightning_jax.parallel import RULES, MeshConfig, ShardingError

GOLDEN_TABLE = """\
embedding                                   P('tensor', ('fsdp', 'sequence', 'expert', 'expert_tensor'))
final_norm.weight                           P(None)
head                                        P(('fsdp', 'sequence', 'expert', 'expert_tensor'), 'tensor')
stacks.0.runs.0.feed_forward.down           P(None, None, 'expert', ('expert_tensor', 'tensor'), ('fsdp', 'sequence'))
stacks.0.runs.0.feed_forward.gate           P(None, None, 'expert', ('fsdp', 'sequence'), ('expert_tensor', 'tensor'))
stacks.0.runs.0.feed_forward.router         P(None, None, ('fsdp', 'sequence', 'expert', 'expert_tensor'), None)
stacks.0.runs.0.feed_forward.up             P(None, None, 'expert', ('fsdp', 'sequence'), ('expert_tensor', 'tensor'))
stacks.0.runs.0.feed_forward_norm.weight    P(None, None, None)
stacks.0.runs.0.mixer.gate                  P(None, None, ('fsdp', 'sequence', 'expert', 'expert_tensor'), 'tensor')
stacks.0.runs.0.mixer.norm.weight           P(None, None, 'tensor')
stacks.0.runs.0.mixer.output                P(None, None, 'tensor', ('fsdp', 'sequence', 'expert', 'expert_tensor'))
stacks.0.runs.0.mixer.query_key_value       P(None, None, ('fsdp', 'sequence', 'expert', 'expert_tensor'), 'tensor')
stacks.0.runs.0.mixer_norm.weight           P(None, None, None)
stacks.0.runs.1.feed_forward.down           P(None, None, 'expert', ('expert_tensor', 'tensor'), ('fsdp', 'sequence'))
stacks.0.runs.1.feed_forward.gate           P(None, None, 'expert', ('fsdp', 'sequence'), ('expert_tensor', 'tensor'))
stacks.0.runs.1.feed_forward.router         P(None, None, ('fsdp', 'sequence', 'expert', 'expert_tensor'), None)
stacks.0.runs.1.feed_forward.up             P(None, None, 'expert', ('fsdp', 'sequence'), ('expert_tensor', 'tensor'))
stacks.0.runs.1.feed_forward_norm.weight    P(None, None, None)
stacks.0.runs.1.mixer.key                   P(None, None, ('fsdp', 'sequence', 'expert', 'expert_tensor'), 'tensor')
stacks.0.runs.1.mixer.output                P(None, None, 'tensor', ('fsdp', 'sequence', 'expert', 'expert_tensor'))
stacks.0.runs.1.mixer.query                 P(None, None, ('fsdp', 'sequence', 'expert', 'expert_tensor'), 'tensor')
stacks.0.runs.1.mixer.value                 P(None, None, ('fsdp', 'sequence', 'expert', 'expert_tensor'), 'tensor')
stacks.0.runs.1.mixer_norm.weight           P(None, None, None)
"""


def abstract_params():
    return jax.eval_shape(lambda: nnx.state(HybridLM(config("auto", "float32"), rngs=nnx.Rngs(0)), nnx.Param))


def test_every_parameter_of_a_hybrid_model_is_split_as_the_golden_table_says():
    shardings = parallel.shardings(abstract_params(), mesh(fsdp=2, expert=2, tensor=2))
    specs = {".".join(map(str, path)): leaf.get_value().spec for path, leaf in nnx.to_flat_state(shardings)}
    table = {name: f"P({', '.join(map(repr, spec))})" for name, spec in specs.items()}
    assert "".join(f"{name:<44}{spec}\n" for name, spec in sorted(table.items())) == GOLDEN_TABLE


def created(create, on_mesh):
    """What `create()` returns, split as the rules say."""
    return jax.jit(create, out_shardings=parallel.shardings(jax.eval_shape(create), on_mesh))()


@pytest.fixture(scope="module")
def train_state():
    """Parameters and AdamW state with a masked decay, created in their shards."""
    adamw = optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda p: p.ndim > 3, params))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def create():
        params = jax.tree.map(lambda p: jnp.ones(p.shape, p.dtype), abstract_params())
        return {"params": params, "optimizer": optimizer.init(params), "step": jnp.int32(0)}

    return created(create, mesh(fsdp=2, expert=2, tensor=2))


def test_each_device_holds_its_share_of_parameters_and_moments(train_state):
    for tree in (
        train_state["params"],
        optax.tree.get(train_state["optimizer"], "mu"),
        optax.tree.get(train_state["optimizer"], "nu"),
    ):
        run = tree["stacks"][0]["runs"][1]
        for weight, whole, share in (
            (run["feed_forward"]["gate"], (2, 1, 8, 16, 24), (2, 1, 4, 8, 12)),
            (run["feed_forward"]["router"], (2, 1, 16, 8), (2, 1, 4, 8)),
            (run["mixer"]["key"], (2, 1, 16, 32), (2, 1, 4, 16)),
            (tree["embedding"], (32, 16), (16, 4)),
        ):
            value = weight.get_value()
            assert value.shape == whole
            assert {shard.data.shape for shard in value.addressable_shards} == {share}


def test_counts_are_on_every_device(train_state):
    assert train_state["step"].sharding.is_fully_replicated
    assert optax.tree.get(train_state["optimizer"], "count").sharding.is_fully_replicated


def test_random_parameters_do_not_depend_on_how_they_are_split():
    def create():
        return nnx.State({"w": nnx.Param(jax.random.normal(jax.random.key(0), (4, 6)), logical_axes=("embed", "mlp"))})

    split = created(create, mesh(fsdp=2, expert=2, tensor=2))["w"].get_value()
    assert split.sharding.shard_shape(split.shape) == (1, 3)
    np.testing.assert_array_equal(split, create()["w"].get_value())


def test_rows_are_split_over_all_axes_but_tensor_and_sequence():
    on_mesh = mesh(data=2, fsdp=2, tensor=2)
    batch = jax.device_put(np.zeros((8, 3), np.int32), parallel.batch_sharding(on_mesh))
    assert batch.sharding.shard_shape(batch.shape) == (2, 3)
    assert parallel.batch_shards(on_mesh) == 4


def test_tokens_of_a_row_are_split_over_the_sequence_axis():
    on_mesh = mesh(data=2, sequence=4)
    batch = jax.device_put(np.zeros((8, 12), np.int32), parallel.batch_sharding(on_mesh))
    assert batch.sharding.shard_shape(batch.shape) == (4, 3)
    assert parallel.batch_shards(on_mesh) == 2


def test_axes_before_the_logical_ones_are_layers_and_stay_whole():
    spec = RULES.spec(("embed", "mlp"), (3, 5, 16, 8), mesh(fsdp=2, expert=2, tensor=2))
    assert spec == PartitionSpec(None, None, ("fsdp", "sequence", "expert", "expert_tensor"), "tensor")


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (
            ("embed", "heads"),
            (16, 9),
            "w: axis 'heads' of size 9 does not divide over mesh axes tensor=2; use a divisor of 9",
        ),
        (
            ("batch", None),
            (6, 2),
            "w: axis 'batch' of size 6 does not divide over mesh axes fsdp=2 x expert=2; use a divisor of 6",
        ),
        (
            ("heads", "mlp"),
            (16, 8),
            "w: axes 'heads' and 'mlp' are both split over mesh axis 'tensor'; declare one of them None",
        ),
        (
            ("batch", "embed"),
            (16, 8),
            "w: axes 'batch' and 'embed' are both split over mesh axis 'fsdp'; declare one of them None",
        ),
        (
            ("hedas",),
            (16,),
            "w: no sharding rule for axis 'hedas'; known: batch, sequence, layers, embed, expert_embed, vocab, heads, "
            "kv_heads, mlp, expert_mlp, experts",
        ),
    ],
)
def test_what_cannot_be_split_is_one_line_that_names_it(axes, shape, message):
    with pytest.raises(ShardingError) as error:
        RULES.spec(axes, shape, mesh(fsdp=2, expert=2, tensor=2), name="w")
    assert str(error.value) == message


def test_a_parameter_that_cannot_be_split_is_named_by_its_path():
    params = nnx.State({"layer": {"gate": nnx.Param(jnp.zeros((3, 8)), logical_axes=("embed", "mlp"))}})
    with pytest.raises(ShardingError, match=r"^layer\.gate: axis 'embed' of size 3 does not divide"):
        parallel.shardings(params, mesh(fsdp=2, expert=2, tensor=2))


class FakeDevice(NamedTuple):
    process_index: int


class FakeMesh(NamedTuple):
    devices: np.ndarray
    shape: dict[str, int]


def hosts(devices_per_host, **sizes):
    """The rows of each host of a mesh whose hosts hold neighbouring devices."""
    shape = MeshConfig.of(**sizes).sizes()
    count = np.prod(list(shape.values()))
    devices = np.empty(count, object)
    devices[:] = [FakeDevice(place // devices_per_host) for place in range(count)]
    on_mesh = FakeMesh(devices.reshape(list(shape.values())), shape)
    return [tuple(parallel.rows_of_host(on_mesh, host)) for host in range(count // devices_per_host)]


def test_hosts_that_share_a_row_read_the_same_rows():
    assert hosts(4, data=2, fsdp=4) == [(0, 2), (1, 2)]
    assert hosts(4, data=2, sequence=8) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert hosts(4, sequence=4, tensor=2) == [(0, 1), (0, 1)]
    assert hosts(2, expert=2, tensor=4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(ShardingError, match="hosts share some rows of a batch and not others"):
        hosts(4, data=4, sequence=3)
