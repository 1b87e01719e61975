"""Random weights that a golden and its test make anew from the same seed."""

import zlib
from collections.abc import Mapping

import numpy as np


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A float32 tensor for every name, which is also its seed; norms are near one."""
    return {name: 0.25 * direction(name, shape) + (len(shape) == 1) for name, shape in shapes.items()}


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Along which a gradient is measured."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
