"""The public function's arguments: defaults, and one clear line for each mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import choose_implementation, lightning_attention
from pallas_kernels.gpu import plans as gpu
from pallas_kernels.tpu import attention as tpu

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


def test_the_choice_says_why():
    name, why = choose_implementation(128, 128, jnp.bfloat16)
    assert name == "xla"
    assert "cpu" in why


@pytest.mark.parametrize(
    ("generation", "key_dim", "value_dim", "dtype", "name", "why"),
    [
        ("v5e", 128, 128, "bfloat16", "pallas_tpu", "TPU v5e"),
        ("tpu7x", 64, 64, "float32", "pallas_tpu", "TPU 7x"),
        ("v5e", 80, 80, "bfloat16", "xla", "head dims 64, 96, 128, 256, not 80"),
        ("v5e", 64, 128, "bfloat16", "xla", "not 64 and 128"),
        ("v5e", 128, 128, "float64", "xla", "bfloat16 and float32, not float64"),
        (None, 128, 128, "bfloat16", "xla", "no block sizes for"),
    ],
)
def test_a_tpu_takes_its_kernel_or_says_why_not(generation, key_dim, value_dim, dtype, name, why, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(tpu, "generation", lambda: generation)
    choice = choose_implementation(key_dim, value_dim, dtype)
    assert choice.name == name
    assert why in choice.why
    assert "\n" not in choice.why


@pytest.mark.parametrize(
    ("obstacle", "name", "why"), [(None, "pallas_gpu", "kernel for Hopper GPUs"), ("too old", "xla", "too old")]
)
def test_a_gpu_takes_its_kernel_or_says_why_not(obstacle, name, why, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "obstacle", lambda *_: obstacle)
    choice = choose_implementation(128, 128, jnp.bfloat16)
    assert choice.name == name
    assert why in choice.why


@pytest.mark.skipif(jax.__version_info__[:2] < gpu.OLDEST_JAX, reason="the GPU kernels need jax 0.11 or newer")
@pytest.mark.parametrize(
    ("dim", "dtype", "chunk_size", "message"),
    [
        (80, jnp.bfloat16, None, "head dims 64, 96, 128, 256, not 80 and 80; use xla"),
        (64, jnp.float32, None, "takes bfloat16, not float32; use xla"),
        (64, jnp.bfloat16, 32, "chunk_size is 32; pallas_gpu has chunks of 64 tokens"),
    ],
)
def test_the_gpu_kernel_refuses_what_it_does_not_have(dim, dtype, chunk_size, message):
    x = jnp.ones((1, 4, 1, dim), dtype)
    with pytest.raises(ValueError, match=message):
        lightning_attention(x, x, x, -np.ones(1), implementation="pallas_gpu", chunk_size=chunk_size)


def test_the_tpu_kernel_refuses_what_it_cannot_hold():
    wide = jnp.ones((1, 4, 1, 320))
    with pytest.raises(ValueError, match="heads of up to 256 dims, not 320 and 320; use xla"):
        lightning_attention(wide, wide, wide, -np.ones(1), implementation="pallas_tpu")
    with jax.enable_x64(True), pytest.raises(ValueError, match="bfloat16 or float32, not float64; use xla"):
        lightning_attention(
            **{name: np.asarray(x, np.float64) for name, x in arguments().items()}, implementation="pallas_tpu"
        )
