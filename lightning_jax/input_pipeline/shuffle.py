"""Seeded shuffles that can be asked for any element without computing the others.

Source: a Feistel network over a domain of any size, by walking cycles (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", CT-RSA 2002), with SplitMix64's mixing (Steele, Lea and Flood, OOPSLA 2014) as round function.
"""

import hashlib
import math

import numpy as np

_ROUNDS = 6


def fold_key(*parts: int | str) -> int:
    """A 64-bit key that depends on every part and on their order, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def random_bits(counter: np.ndarray) -> np.ndarray:
    """SplitMix64's output at each counter: uint64 [n] -> uint64 [n]."""
    bits = counter + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def shuffled(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """The elements at the positions `index` of endless passes over `size` elements, each pass in an order of its own.

    Args:
      index: int64 [n], not negative; pass `index // size`, position `index % size` in it.
      size: number of elements.
      key: decides all orders.

    Returns:
      int64 [n], in [0, size).
    """
    epoch, element = np.divmod(np.asarray(index, np.uint64), np.uint64(size))
    key_of_epoch = random_bits(epoch + np.uint64(key))
    # The network permutes side² >= size elements; one that lands outside is sent through again until it is inside.
    side = np.uint64(math.isqrt(size - 1) + 1)
    walking = np.arange(len(element))
    while len(walking):
        element[walking] = _feistel(element[walking], side, key_of_epoch[walking])
        walking = walking[element[walking] >= size]
    return element.astype(np.int64)


def _feistel(element: np.ndarray, side: np.uint64, key: np.ndarray) -> np.ndarray:
    left, right = np.divmod(element, side)
    for round_index in range(_ROUNDS):
        random = random_bits(key ^ (right * np.uint64(_ROUNDS) + np.uint64(round_index)))
        left, right = right, (left + random % side) % side
    return left * side + right
