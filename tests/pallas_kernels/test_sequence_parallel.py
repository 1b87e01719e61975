"""A sequence over eight devices equals one device, in values and gradients, with one all-gather of states."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from lightning_cases import Results, assert_close, by_loops, random_case

from pallas_kernels import sequence_parallel_lightning_attention

PIECES = PartitionSpec(None, "sequence")
WHOLE = PartitionSpec()


def over_eight_devices(log_decay, *, check_vma=True, return_final_state=True, **options):
    """(q, k, v, initial state, segment ids) -> o and, on request, the final state."""
    return jax.shard_map(
        lambda q, k, v, state, ids: sequence_parallel_lightning_attention(
            q,
            k,
            v,
            log_decay,
            axis_name="sequence",
            segment_ids=ids,
            initial_state=state,
            return_final_state=return_final_state,
            **options,
        ),
        mesh=Mesh(np.array(jax.devices()), ("sequence",)),
        in_specs=(PIECES, PIECES, PIECES, WHOLE, PIECES),
        out_specs=(PIECES, WHOLE) if return_final_state else PIECES,
        check_vma=check_vma,
    )


def by_devices(case, **options) -> Results:
    ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids)

    @jax.jit
    def results(q, k, v, state, do, d_final_state):
        attention = over_eight_devices(jnp.asarray(case.log_decay, q.dtype), **options)
        outputs, pull_back = jax.vjp(lambda *x: attention(*x, ids), q, k, v, state)
        return *outputs, *pull_back((do, d_final_state))

    arrays = (case.q, case.k, case.v, case.initial_state, case.do, case.d_final_state)
    return Results(*results(*map(jnp.asarray, arrays)))


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("borders", [None, 0.1, 3, 30])
def test_eight_devices_equal_the_recurrence(borders, check_vma):
    """Documents over many devices, ids that come back, borders between devices; gradients from both outputs."""
    with jax.enable_x64(True):
        case = random_case(64, borders=borders)
        assert_close(by_devices(case, chunk_size=4, check_vma=check_vma), by_loops(case), 1e-12)


def test_borders_exactly_between_devices_cut_the_state():
    with jax.enable_x64(True):
        case = random_case(64)
        ids = np.array([1, 1, 2, 1, 1, 3, 3, 3], np.int32).repeat(8)
        case = case._replace(segment_ids=np.stack([ids, ids]))
        assert_close(by_devices(case), by_loops(case), 1e-12)


def test_the_tpu_kernel_runs_on_each_piece():
    case = random_case(64, slopes=(0.1, 0.92), borders=3)
    # The interpreter cannot check what varies over the mesh.
    options = {"implementation": "pallas_tpu", "chunk_size": 8, "check_vma": False}
    with pltpu.force_tpu_interpret_mode(True):
        assert_close(by_devices(case, **options), by_loops(case), 1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_training_needs_one_gather_of_states_and_one_scatter_back(documents):
    case = random_case(64, batch=1, borders=3)
    ids = jnp.asarray(case.segment_ids) if documents else None
    attention = over_eight_devices(jnp.asarray(case.log_decay, jnp.float32), return_final_state=False)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (case.q, case.k, case.v))
    loss = partial(lambda ids, q, k, v: jnp.sin(attention(q, k, v, None, ids)).sum(), ids)
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().as_text()
    names = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
    collectives = re.findall(rf"= (\w+)\[\S* ({names})\(", text)
    of_states = sorted(name for dtype, name in collectives if dtype == "f32")
    of_documents = [name for dtype, name in collectives if dtype != "f32"]
    assert of_states == ["all-gather", "reduce-scatter"]
    assert of_documents == (["all-gather"] if documents else [])
