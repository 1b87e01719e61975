"""Accelerators as the planner knows them: compute, memory and links of a device, and slices of many.

A device is what JAX takes for one: a chip, but on TPU7x one of its two halves.

Sources. TPUs: the specifications on docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. What they give for
the links of a chip counts both directions, and here it is one of them; v4's page gives only the all-reduce bandwidth of
a pod, here divided by its 4,096 chips. The JAX team's book (jax-ml.github.io/scaling-book/tpus) counts on a tenth less
for all but v4. The data center's network of a chip is the pages', of v5e and v6e that of a pod by its 256 chips, of v4
the book's.

GPUs are SXM, their bf16 dense, NVLink in one direction. A100: nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf; H100
and H200: nvidia.com/en-us/data-center/h100 and /h200, whose FLOPs are twice those here, with sparsity. The network is
that of NVIDIA's own systems, an InfiniBand port for each of eight GPUs: 200 Gb/s in the DGX A100 (its data sheet), 400
Gb/s in the DGX H100 and H200 (docs.nvidia.com/dgx-basepod, core components). H800: an H100 with 400 GB/s of NVLink for
both directions, arXiv 2505.09343 section 4.1.
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
    most_chips: int = 0  # of a slice; 0 where there is no limit
    per_chip: int = 1  # devices of one chip, which is what is sold and counted


@dataclass(frozen=True)
class Price:
    """What a chip costs an hour where nobody says otherwise: an assumption, and whose and of when."""

    dollars: float
    source: str


GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", "TPU v4", 275e12, 32 * GIB, 1200e9, 270e9, 0, 6.25e9, 4096),
        Chip("v5e", "tpu", "TPU v5 ?(lite|e)", 197e12, 16 * GIB, 819e9, 200e9, 0, 3.125e9, 256),
        Chip("v5p", "tpu", "TPU v5p?", 459e12, 95 * GIB, 2765e9, 600e9, 0, 6.25e9, 6144),
        Chip("v6e", "tpu", "TPU v6 ?(lite|e)", 918e12, 32 * GIB, 1638e9, 400e9, 0, 12.5e9, 256),
        Chip("tpu7x", "tpu", "TPU7x?", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 600e9 / 2, 0, 12.5e9 / 2, 9216, 2),
        Chip("a100_40g", "gpu", "A100.*40GB", 312e12, 40e9, 1555e9, 300e9, 8, 25e9),
        Chip("a100", "gpu", "A100", 312e12, 80e9, 2039e9, 300e9, 8, 25e9),
        Chip("h800", "gpu", "H800", 989e12, 80e9, 3350e9, 200e9, 8, 50e9),
        Chip("h100", "gpu", "H100", 989e12, 80e9, 3350e9, 450e9, 8, 50e9),
        Chip("h200", "gpu", "H200", 989e12, 141e9, 4800e9, 450e9, 8, 50e9),
        # A core of a laptop: to try the planner itself.
        Chip("cpu", "cpu", "cpu", 5e10, 16 * GIB, 2e10, 1e10, 0, 1e9),
    )
}
_ON_DEMAND = "Google Cloud's list price on demand, as quoted in 2026"
PRICES = {  # of chips for which somebody has named one
    "v4": Price(3.22, _ON_DEMAND),
    "v5e": Price(1.20, _ON_DEMAND),
    "v5p": Price(4.20, _ON_DEMAND),
    "v6e": Price(2.70, _ON_DEMAND),
    "h800": Price(2.00, "the rent that arXiv 2412.19437 reckons with, December 2024"),
}


@dataclass(frozen=True)
class Slice:
    """Chips that work together, in one slice or in several equal ones that only the data center's network joins."""

    chip: Chip
    num_chips: int  # of all slices
    topology: str  # of one slice, such as v5p:8x8x8
    num_slices: int = 1

    @property
    def name(self) -> str:
        """As `parse_slice` reads it."""
        return self.topology if self.num_slices == 1 else f"{self.num_slices}x{self.topology}"

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.per_chip

    @property
    def num_islands(self) -> int:
        """Slices, or nodes of GPUs: the devices of each have direct links, and only the network joins them."""
        nodes = math.ceil(self.num_devices / self.chip.linked) if self.chip.linked else 1
        return max(self.num_slices, nodes)

    def times(self, factor: int) -> "Slice":
        """So many times as many chips, in one slice where there are such slices, else in so many times as many."""
        chips = factor * self.num_chips
        if self.num_slices == 1 and chips <= (self.chip.most_chips or chips):
            return Slice(self.chip, chips, f"{self.chip.name}:{chips}")
        return Slice(self.chip, chips, self.topology, factor * self.num_slices)


def parse_slice(text: str) -> Slice:
    """The slice that `v5p:8x8x8`, `h100:16` or `cpu:8` names, its shape in chips; four of them are `4xv5p:8x8x8`.

    Raises:
        UserError: it names none.
    """
    number, several, topology = text.partition("x")
    if not (several and number.isdecimal()):
        number, topology = "1", text
    name, _, shape = topology.partition(":")
    if google := re.fullmatch(r"(v4|v5p|v5e|v5litepod|v6e)-(\d+)", topology):
        kind, count = google[1].replace("v5litepod", "v5e"), int(google[2])
        chips = count // 2 if kind in ("v4", "v5p") else count  # of these Google counts the cores
        named = f"{text.removesuffix(topology)}{kind}:{chips}"
        raise UserError(f"--devices={text}: Google's name; here a slice is named by its chips: {named}")
    if name not in CHIPS:
        raise UserError(f"--devices={text}: no chip {name!r}; {nearest_name(name.lower(), CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or int(number) < 1:
        raise UserError(
            f"--devices={text}: not of the form {name}:8x8x8 or {name}:512, or 4x{name}:8x8x8 for four slices"
        )
    chips, most = math.prod(map(int, shape.split("x"))), CHIPS[name].most_chips
    if most and chips > most:
        raise UserError(
            f"--devices={text}: a slice of {name} has at most {most:,} chips; several are written 4x{name}:SHAPE"
        )
    if int(number) > 1 and CHIPS[name].linked:
        raise UserError(
            f"--devices={text}: only TPUs come in slices; {number} x {shape} {name} are {name}:{number}x{shape}"
        )
    return Slice(CHIPS[name], int(number) * chips, topology, int(number))


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
    num_slices = 1 if chip.linked else len({getattr(device, "slice_index", 0) for device in devices})
    return Slice(chip, num_chips, f"{chip.name}:{num_chips // num_slices}", num_slices)
