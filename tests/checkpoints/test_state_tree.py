import jax
import jax.numpy as jnp
import pytest
from checkpoint_states import abstract, training_state

from lightning_jax.checkpoints import CheckpointError
from lightning_jax.checkpoints.state_tree import named_leaves, rebuild, stored_arrays


def test_paths_name_the_leaves_of_any_container():
    names = named_leaves(training_state(0))
    assert {"key", "step", "params/second/value", "optimizer/1/0/mu/first/kernel/value"} <= set(names)


def test_rebuild_inverts_named_leaves():
    state = training_state(0)
    rebuilt = rebuild(abstract(state), named_leaves(state))
    assert jax.tree.structure(rebuilt) == jax.tree.structure(state)
    assert all(one is other for one, other in zip(jax.tree.leaves(rebuilt), jax.tree.leaves(state), strict=True))


def test_a_leaf_that_is_no_jax_array_is_refused():
    with pytest.raises(CheckpointError, match=r"a/step is a int; every leaf must be a jax\.Array"):
        named_leaves({"a": {"step": 3}})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(CheckpointError, match="same path"):
        named_leaves({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})


def test_keys_are_stored_as_their_data_and_empty_arrays_not_at_all():
    stored = stored_arrays({"key": jax.random.key(0), "empty": jnp.zeros((0, 3)), "x": jnp.zeros(2)})
    assert set(stored) == {"key", "x"}
    assert stored["key"].dtype == jnp.uint32
