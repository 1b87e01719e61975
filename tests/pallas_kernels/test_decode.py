"""The decode step against the recurrence, and in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lightning_cases import by_loops, random_case

from pallas_kernels import lightning_attention_step

B, H, K, V = 2, 3, 4, 5


def test_steps_equal_the_recurrence():
    case = random_case(30)
    expected = by_loops(case)
    state = jnp.asarray(case.initial_state, jnp.float32)
    step = jax.jit(lightning_attention_step)
    for t in range(30):
        q, k, v = (jnp.asarray(x[:, t], jnp.float32) for x in (case.q, case.k, case.v))
        o, state = step(q, k, v, case.log_decay, state)
        np.testing.assert_allclose(o, expected.o[:, t], rtol=0, atol=1e-6 * np.abs(expected.o).max())
    np.testing.assert_allclose(state, expected.final_state, rtol=0, atol=1e-6 * np.abs(expected.final_state).max())


def test_with_bf16_inputs_only_they_and_the_output_are_rounded():
    case = random_case(1)
    q, k, v = (jnp.asarray(x[:, 0], jnp.bfloat16) for x in (case.q, case.k, case.v))
    state = jnp.asarray(case.initial_state, jnp.float32)
    o, new_state = lightning_attention_step(q, k, v, case.log_decay, state)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    exact_o, exact_state = lightning_attention_step(q, k, v, case.log_decay, state)
    assert o.dtype == jnp.bfloat16
    np.testing.assert_array_equal(o, exact_o.astype(jnp.bfloat16))
    np.testing.assert_array_equal(new_state, exact_state)


def test_a_donated_state_is_updated_in_place():
    case = random_case(1)
    q, k, v = (jnp.asarray(x[:, 0], jnp.float32) for x in (case.q, case.k, case.v))
    state = jnp.asarray(case.initial_state, jnp.float32)
    address = state.unsafe_buffer_pointer()
    _, new_state = jax.jit(lightning_attention_step, donate_argnames="state")(q, k, v, case.log_decay, state)
    assert new_state.unsafe_buffer_pointer() == address


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": jnp.ones((B, H, 1))}, r"k has shape \(2, 3, 1\); it must be \(2, 3, 4\)"),
        ({"v": jnp.ones((B, 1, V))}, "v has shape"),
        ({"log_decay": -jnp.ones((H, 1))}, r"log_decay has shape \(3, 1\); it must be \(3,\)"),
        ({"state": jnp.ones((B, H, V, K))}, r"state has shape \(2, 3, 5, 4\); it must be \(2, 3, 4, 5\)"),
        ({"state": jnp.ones((B, H, K, V), jnp.bfloat16)}, "the state is bfloat16; it must be float32 or float64"),
    ],
)
def test_each_mistake_is_one_line(changes, message):
    arguments = {"q": jnp.ones((B, H, K)), "k": jnp.ones((B, H, K)), "v": jnp.ones((B, H, V))}
    arguments |= {"log_decay": -jnp.ones(H), "state": jnp.ones((B, H, K, V))} | changes
    with pytest.raises(ValueError, match=message) as error:
        lightning_attention_step(**arguments)
    assert "\n" not in str(error.value)
