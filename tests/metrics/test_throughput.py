"""MFU and step times against hand computation."""

import contextlib
from types import SimpleNamespace

import jax
import pytest

from lightning_jax.metrics.throughput import StepTimer, memory_in_use, mfu, peak_flops


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def devices(kind, number):
    return [SimpleNamespace(device_kind=kind)] * number


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_peak_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_mfu_by_hand():
    # 8 v4 chips make 2.2e15 FLOP/s; 6e9 FLOPs for each of 110,000 tokens a second are 6.6e14, three tenths of it.
    assert mfu(6e9, 110_000, devices("TPU v4", 8)) == pytest.approx(0.3, rel=1e-15)
    # TinyLlama's published 24,000 tokens/s on an A100, counted as 6(N - embedding) + 12 L d T, are 56% MFU.
    flops_per_token = 6 * (1_100_048_384 - 32_000 * 2_048) + 12 * 22 * 2_048 * 2_048
    assert mfu(flops_per_token, 24_000, devices("NVIDIA A100-SXM4-40GB", 1)) == pytest.approx(0.563, abs=2e-3)


def test_mfu_is_unknown_on_a_cpu_and_on_mixed_devices():
    assert mfu(1e9, 1e3, jax.devices()[:1]) is None
    assert mfu(1e9, 1e3, devices("TPU v4", 1) + devices("cpu", 1)) is None


def test_lap_leaves_out_pauses_and_starts_anew():
    clock = Clock()
    timer = StepTimer(clock)
    with timer.pause():
        clock.now += 30  # compilation
    for _ in range(4):
        clock.now += 0.5
        timer.step(1000)
    with contextlib.suppress(KeyError), timer.pause():
        clock.now += 8
        raise KeyError("an evaluation that failed takes no time either")
    lap = timer.lap(1e9, jax.devices()[:1])
    assert lap == {
        "seconds": 2.0,
        "tokens_per_second": 2000.0,
        "milliseconds_per_step": 500.0,
        "mfu": None,
        "memory_bytes": lap["memory_bytes"],
    }
    clock.now += 1
    timer.step(10)
    assert timer.lap(1e9, jax.devices()[:1])["tokens_per_second"] == 10.0


def test_lap_takes_the_devices_of_a_mesh_as_they_come():
    """`mesh.devices.flat` can be gone through only once, and a lap needs it twice."""
    clock = Clock()
    timer = StepTimer(clock)
    clock.now += 2
    timer.step(220_000)
    chips = [SimpleNamespace(device_kind="TPU v4", process_index=0, memory_stats=lambda: {"peak_bytes_in_use": 7})] * 8
    lap = timer.lap(6e9, iter(chips))
    assert (lap["mfu"], lap["memory_bytes"]) == (pytest.approx(0.3), 7)


def test_lap_without_steps_knows_no_rate():
    timer = StepTimer(Clock())
    lap = timer.lap(1e9, jax.devices()[:1])
    assert (lap["tokens_per_second"], lap["milliseconds_per_step"], lap["mfu"]) == (None, None, None)


def test_lap_within_a_pause_counts_none_of_it():
    clock = Clock()
    timer = StepTimer(clock)
    clock.now += 1
    with timer.pause():
        clock.now += 5
        timer.step(10)
        with timer.pause():
            clock.now += 1
        lap = timer.lap(1e9, jax.devices()[:1])
        assert (lap["seconds"], lap["tokens_per_second"]) == (1, None)
        clock.now += 3
    clock.now += 2
    timer.step(10)
    assert timer.lap(1e9, jax.devices()[:1])["seconds"] == 2


def test_memory_is_the_fullest_local_device_or_the_process():
    def device(process, statistics):
        return SimpleNamespace(process_index=process, memory_stats=lambda: statistics)

    full = [
        device(0, {"peak_bytes_in_use": 5}),
        device(0, {"peak_bytes_in_use": 9}),
        device(1, {"peak_bytes_in_use": 99}),
    ]
    assert memory_in_use(full) == 9
    assert memory_in_use([device(0, None)]) > 10 * 2**20
