"""How fast a run is and how much memory it takes, and its model FLOPs utilisation (MFU).

MFU = FLOPs per token * tokens per second / peak FLOP/s of the devices (PaLM, arXiv 2204.02311, appendix B). What counts
as a model FLOP is a convention; models.config has them by name and whoever shows an MFU shows that name.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import jax

# Peak dense bf16 FLOP/s of one JAX device, by a pattern that matches its `device_kind`; the first match counts.
# TPU: cloud.google.com/tpu/docs, peak compute per chip. On v2, v3 and TPU7x a JAX device is one of the chip's two
# cores, from v4 to v6e the whole chip. NVIDIA and AMD: data sheets, tensor-core figures without sparsity.
_PEAK_BF16_FLOPS = (
    (r"TPU v2", 45e12 / 2),
    (r"TPU v3", 123e12 / 2),
    (r"TPU v4 lite", 138e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 ?(lite|e)", 918e12),
    (r"TPU7x?", 2307e12 / 2),
    (r"A100", 312e12),
    (r"H100.*PCIe", 756e12),
    (r"H[12]00.*NVL", 835e12),
    (r"G?H[12]00", 989e12),
    (r"GB[23]00", 2500e12),
    (r"B[23]00", 2250e12),
    (r"L40S", 362e12),
    (r"L4", 121e12),
    (r"MI300X", 1307e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device, or None for one that is not in the table, such as a CPU.

    Args:
      device_kind: as `jax.Device.device_kind` spells it, e.g. "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    for pattern, peak in _PEAK_BF16_FLOPS:
        if re.search(rf"\b{pattern}\b", device_kind):
            return peak
    return None


def mfu(flops_per_token: float, tokens_per_second: float, devices: Sequence[jax.Device]) -> float | None:
    """Share of the devices' peak that the model's own arithmetic uses, or None where a device's peak is not known."""
    peaks = [peak_flops(device.device_kind) for device in devices]
    if not peaks or None in peaks:
        return None
    return flops_per_token * tokens_per_second / sum(peaks)


def memory_in_use(devices: Sequence[jax.Device]) -> int | None:
    """Peak bytes so far on the fullest local device; the process's peak resident memory where devices do not count.

    The peak rather than the present: between two steps the activations are gone, and with them what decides if it fits.
    """
    statistics = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    peaks = [entry["peak_bytes_in_use"] for entry in statistics if entry and "peak_bytes_in_use" in entry]
    return max(peaks) if peaks else _peak_resident_memory()


class StepTimer:
    """Times training steps, leaving out what is not training.

        timer = StepTimer()
        with timer.pause():
            step()  # compiles
        for ...:
            step()
            timer.step(tokens)
            if ...:
                writer.write(step, metrics, timer.lap(flops_per_token, devices))
                with timer.pause():
                    evaluate()

    JAX dispatches asynchronously: the time between two laps is right when something of the step before each lap was
    fetched to the host (its loss, say), as logging does anyway.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._running_since = clock()
        self._seconds = 0.0  # counted before `_running_since`
        self._pauses = 0  # pauses within pauses that are going on
        self._steps = 0
        self._tokens = 0

    def step(self, tokens: int) -> None:
        """Counts a step over `tokens` tokens, all devices together; a step within a pause is not counted."""
        if not self._pauses:
            self._steps += 1
            self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside (evaluation, checkpoints, compilation) takes no time."""
        self._seconds = self._elapsed()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            self._running_since = self._clock()

    def lap(self, flops_per_token: float, devices: Iterable[jax.Device]) -> dict[str, float | None]:
        """The `timing` of a record, over the steps since the last lap; then starts the next lap.

        Returns:
          seconds, tokens_per_second, milliseconds_per_step (None where no step was counted), mfu (None also where the
          devices' peak is unknown), memory_bytes (None where the platform does not say).
        """
        seconds, devices = self._elapsed(), list(devices)
        counted = self._steps > 0 and seconds > 0
        rate = self._tokens / seconds if counted else None
        timing = {
            "seconds": seconds,
            "tokens_per_second": rate,
            "milliseconds_per_step": 1000 * seconds / self._steps if counted else None,
            "mfu": mfu(flops_per_token, rate, devices) if counted else None,
            "memory_bytes": memory_in_use(devices),
        }
        self._running_since, self._seconds, self._steps, self._tokens = self._clock(), 0.0, 0, 0
        return timing

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._pauses else self._clock() - self._running_since)


def _peak_resident_memory() -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:  # no /proc outside Linux
        return None
    return None
