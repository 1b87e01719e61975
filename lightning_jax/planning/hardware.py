"""Accelerators as the planner knows them: compute, memory and links of one chip, and slices of many.

Sources: TPUs: cloud.google.com/tpu/docs, the "system architecture" page of each version; GPUs: NVIDIA's data sheets
(SXM, NVLink). Links: all of a chip together, one direction.
"""

import math
import re
from dataclasses import dataclass

from lightning_jax.config import nearest_name
from lightning_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One chip; per second, and in bytes."""

    name: str
    platform: str
    bf16_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float


GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, 32 * GIB, 1228e9, 300e9),
        Chip("v5e", "tpu", 197e12, 16 * GIB, 819e9, 200e9),
        Chip("v5p", "tpu", 459e12, 95 * GIB, 2765e9, 600e9),
        Chip("v6e", "tpu", 918e12, 32 * GIB, 1638e9, 448e9),
        Chip("a100", "gpu", 312e12, 80e9, 2039e9, 300e9),
        Chip("h100", "gpu", 989e12, 80e9, 3350e9, 450e9),
        Chip("h200", "gpu", 989e12, 141e9, 4800e9, 450e9),
        Chip("cpu", "cpu", 5e10, 16 * GIB, 2e10, 1e10),  # a core of a laptop: to try the planner itself
    )
}


@dataclass(frozen=True)
class Slice:
    """Chips with direct links between neighbours; `topology` is its name, such as v5p:8x8x8."""

    chip: Chip
    num_chips: int
    topology: str


def parse_slice(text: str) -> Slice:
    """The slice that `v5p:8x8x8`, `h100:16` or `cpu:8` names.

    Raises:
        UserError: it names none.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--devices={text}: no chip {name!r}; {nearest_name(name, CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--devices={text}: not of the form {name}:8x8x8 or {name}:512")
    return Slice(CHIPS[name], math.prod(map(int, shape.split("x"))), text)
