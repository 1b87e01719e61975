import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.checkpoints.fingerprint import fingerprints

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "int8", "bool", "complex64"]


def fingerprint(array: np.ndarray | jax.Array) -> str:
    return fingerprints({"x": jnp.asarray(array)})()["x"]


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    size = np.dtype(jnp.dtype(dtype)).itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, (*shape, size), np.uint8)
    return raw.view(jnp.dtype(dtype))[..., 0]


def reference(array: np.ndarray) -> str:
    """The same two sums in NumPy, with 64-bit integers reduced by hand."""
    mask = 0xFFFFFFFF

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> 16)) * 0x85EBCA6B & mask
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & mask
        return x ^ (x >> 16)

    words = array.view(f"uint{8 * array.itemsize}").astype(np.uint64)
    sums = []
    for seed in (0x9E3779B9, 0x3C6EF372):
        position = np.full(array.shape, seed, np.uint64)
        for axis, index in enumerate(np.indices(array.shape, np.uint64)):
            position = (position + index * (mix(np.uint64(seed + axis)) | np.uint64(1))) & mask
        sums.append(int(mix(words ^ position).sum()) & mask)
    return f"{sums[0]:08x}{sums[1]:08x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_equals_the_same_sums_in_numpy(dtype, shape):
    array = random_array(dtype, shape)
    assert fingerprint(array) == reference(array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_does_not_depend_on_the_sharding(dtype):
    array = random_array(dtype, (8, 16))
    expected = fingerprint(array)
    meshes = [((8,), ("a",)), ((8,), (None, "a")), ((2, 4), ("a", "b")), ((4, 2), ("b", "a")), ((2,), ("a",))]
    for shape, spec in meshes:
        mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)], devices=jax.devices()[: np.prod(shape)])
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert fingerprint(jax.device_put(array, sharding)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_it(dtype):
    array = random_array(dtype, (5, 7))
    intact = fingerprint(array)
    generator = np.random.default_rng(1)
    for _ in range(20):
        damaged = array.copy()
        byte, bit = generator.integers(array.nbytes), generator.integers(1 if dtype == "bool" else 8)
        damaged.reshape(-1).view(np.uint8)[byte] ^= np.uint8(1 << bit)
        assert fingerprint(damaged) != intact


def test_any_two_exchanged_rows_or_columns_change_it():
    array = random_array("float32", (6, 6))
    seen = {fingerprint(array)}
    for row in range(1, 6):
        order = list(range(6))
        order[0], order[row] = row, 0
        seen |= {fingerprint(array[order]), fingerprint(array[:, order])}
    assert len(seen) == 11


def test_tells_bit_patterns_apart_that_compare_equal():
    assert fingerprint(np.float32([0.0])) != fingerprint(np.float32([-0.0]))
    quiet, payload = np.uint32([0x7FC00000, 0x7FC00001])
    assert fingerprint(quiet.view(np.float32)) != fingerprint(payload.view(np.float32))


def test_sixty_four_bit_elements():
    with jax.enable_x64(True):
        array = random_array("float64", (4, 3))
        flipped = array.copy()
        flipped.view(np.uint64)[2, 1] ^= np.uint64(1 << 50)
        assert fingerprint(array) != fingerprint(flipped)


def test_arrays_may_be_donated_at_once():
    array = jnp.arange(1 << 16, dtype=jnp.float32)
    finish = fingerprints({"x": array})
    jax.jit(lambda x: x * 2, donate_argnums=0)(array).block_until_ready()
    assert finish()["x"] == fingerprint(np.arange(1 << 16, dtype=np.float32))
