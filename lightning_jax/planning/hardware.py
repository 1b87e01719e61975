"""Accelerators as the planner knows them: compute, memory and links of a device, and slices of many.

A device is what JAX takes for one: a chip, but on TPU7x one of its two halves.

Sources: TPUs: docs.cloud.google.com/tpu/docs, the table of each version's page (v4, v5e, v5p, v6e, tpu7x), links in one
direction, which is half of what it gives for both; GPUs: NVIDIA's data sheets (SXM, dense bf16, NVLink in one
direction), and the network of NVIDIA's own systems: an InfiniBand port for each GPU, 200 Gb/s in the DGX A100, 400 Gb/s
in the DGX H100. H800: an H100 with 400 GB/s of NVLink for both directions.
"""

import math
import re
from dataclasses import dataclass

import jax

from lightning_jax.config import nearest_name
from lightning_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One device of a kind; per second, and in bytes."""

    name: str
    platform: str
    kind: str  # a pattern of `jax.Device.device_kind`
    bf16_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float  # of all direct links together
    linked: int  # as many devices have direct links, and the others only the network; 0 is all of a slice
    network_bandwidth: float
    per_chip: int = 1  # devices of one chip, which is what is sold and counted


GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", "TPU v4", 275e12, 32 * GIB, 1228e9, 300e9, 0, 6.25e9),
        Chip("v5e", "tpu", "TPU v5 ?(lite|e)", 197e12, 16 * GIB, 819e9, 200e9, 0, 3.125e9),
        Chip("v5p", "tpu", "TPU v5p?", 459e12, 95 * GIB, 2765e9, 600e9, 0, 6.25e9),
        Chip("v6e", "tpu", "TPU v6 ?(lite|e)", 918e12, 32 * GIB, 1638e9, 400e9, 0, 12.5e9),
        Chip("tpu7x", "tpu", "TPU7x?", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 600e9 / 2, 0, 12.5e9 / 2, per_chip=2),
        Chip("a100_40g", "gpu", "A100.*40GB", 312e12, 40e9, 1555e9, 300e9, 8, 25e9),
        Chip("a100", "gpu", "A100", 312e12, 80e9, 2039e9, 300e9, 8, 25e9),
        Chip("h800", "gpu", "H800", 989e12, 80e9, 3350e9, 200e9, 8, 50e9),
        Chip("h100", "gpu", "H100", 989e12, 80e9, 3350e9, 450e9, 8, 50e9),
        Chip("h200", "gpu", "H200", 989e12, 141e9, 4800e9, 450e9, 8, 50e9),
        # A core of a laptop: to try the planner itself.
        Chip("cpu", "cpu", "cpu", 5e10, 16 * GIB, 2e10, 1e10, 0, 1e9),
    )
}


@dataclass(frozen=True)
class Slice:
    """Chips that work together; `topology` is its name, such as v5p:8x8x8."""

    chip: Chip
    num_chips: int
    topology: str

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.per_chip

    def bandwidth(self, span: int) -> float:
        """What a device sends a second to others among `span` neighbouring ones."""
        chip = self.chip
        return chip.link_bandwidth if span <= (chip.linked or self.num_devices) else chip.network_bandwidth


def parse_slice(text: str) -> Slice:
    """The slice that `v5p:8x8x8`, `h100:16` or `cpu:8` names, its shape in chips.

    Raises:
        UserError: it names none.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--devices={text}: no chip {name!r}; {nearest_name(name, CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--devices={text}: not of the form {name}:8x8x8 or {name}:512")
    return Slice(CHIPS[name], math.prod(map(int, shape.split("x"))), text)


def slice_of(devices: list[jax.Device]) -> Slice:
    """The slice that these devices are.

    Raises:
        UserError: they are of a kind that is not in the table.
    """
    kind = devices[0].device_kind
    chip = next((chip for chip in CHIPS.values() if re.search(rf"\b{chip.kind}\b", kind)), None)
    if chip is None:
        raise UserError(f"the planner does not know {kind}; it knows {', '.join(CHIPS)}")
    num_chips = len(devices) // chip.per_chip
    return Slice(chip, num_chips, f"{chip.name}:{num_chips}")
