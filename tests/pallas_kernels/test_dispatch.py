"""The public function's arguments: defaults, and one clear line for each mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_attention

B, T, H, K, V = 2, 6, 3, 4, 5


def arguments(**changes):
    q, k, v = jnp.ones((B, T, H, K)), jnp.ones((B, T, H, K)), jnp.ones((B, T, H, V))
    return {"q": q, "k": k, "v": v, "log_decay": -np.ones(H)} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.ones((T, H, K))}, r"q has shape \(6, 3, 4\); it must be \[B, T, H, K\]"),
        ({"q": jnp.ones((B, 0, H, K))}, "none of them 0"),
        ({"k": jnp.ones((B, T, 1, K))}, r"k has shape .* it must be q's, \(2, 6, 3, 4\)"),
        ({"v": jnp.ones((B, T + 1, H, V))}, "v has shape"),
        ({"v": jnp.ones((B, T, H, V), jnp.bfloat16)}, "dtypes float32, float32, bfloat16; they must share one of"),
        ({"q": jnp.ones((B, T, H, K), int), "k": jnp.ones((B, T, H, K), int)}, "must share one of"),
        ({"log_decay": -np.ones((H, 1))}, r"log_decay has shape \(3, 1\); it must be \[H\] = \(3,\)"),
        ({"log_decay": np.array([-1.0, 0.0, 0.1])}, "pass -slope, not slope"),
        ({"log_decay": np.array([-1.0, 0.0, np.nan])}, "pass -slope, not slope"),
        ({"segment_ids": jnp.ones((B, T - 1), int)}, r"segment_ids has shape \(2, 5\)"),
        ({"segment_ids": jnp.ones((B, T))}, "segment_ids has dtype float32; it must be integers"),
        (
            {"initial_state": jnp.ones((B, H, V, K))},
            r"initial_state is float32\[2, 3, 5, 4\]; it must be float32\[2, 3, 4",
        ),
        ({"initial_state": jnp.ones((B, H, K, V), jnp.bfloat16)}, "initial_state is bfloat16"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; it must be one of"),
        ({"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
    ],
)
def test_each_mistake_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        lightning_attention(**arguments(**changes))
    assert "\n" not in str(error.value)


def test_without_options_a_row_is_one_document_from_the_zero_state():
    plain = lightning_attention(**arguments())
    options = {"segment_ids": jnp.full((B, T), 7), "initial_state": jnp.zeros((B, H, K, V)), "return_final_state": True}
    o, final_state = lightning_attention(**arguments(**options))
    assert plain.shape == (B, T, H, V)
    assert final_state.shape == (B, H, K, V)
    np.testing.assert_array_equal(plain, o)


def test_decays_may_be_traced():
    traced = jax.jit(lambda log_decay: lightning_attention(**arguments(log_decay=log_decay)))(-np.ones(H))
    np.testing.assert_allclose(traced, lightning_attention(**arguments()), rtol=1e-6)
