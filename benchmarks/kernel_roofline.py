"""The least time that attention can take: its arithmetic at the device's fastest, or its memory traffic.

Counts are those of Lightning Attention-2 (arXiv 2401.04658) algorithms 1 and 2, per token and head: C tokens per chunk,
K dims of keys and of values. The forward has four matmuls, Q Kᵀ and its product with V (2 C K operations each), Q with
the state KV, and Kᵀ V (2 K² each), and touches four tensors, q, k, v and o:

    4 C K + 4 K² operations,    4 K numbers

The backward has nine, five of C K and four of K²; in one sweep it reads q, k, v, do and the states, of which it needs
one every G tokens, and writes dq, dk, dv:

    10 C K + 8 K² operations,   7 K + K² / G numbers

Causal softmax attention (FlashAttention-2, arXiv 2307.08691, section 4.1) over T tokens: 2 T K operations forward and
5 T K backward, of which the recomputed Q Kᵀ is one; numbers 4 K and 8 K (o is read as well).
"""

from typing import NamedTuple

CHUNK = 64  # tokens: the fewest that fill a matrix unit; more of them are more arithmetic
STATES_EVERY = 256  # tokens
SOFTMAX = ("cudnn", "torch flash")  # implementations of softmax attention; all others are lightning attention's


class Case(NamedTuple):
    """The shape of one call: q, k, v are [batch, length, heads, dim], and each row holds so many documents."""

    batch: int
    heads: int
    dim: int
    length: int
    documents: int = 1

    @property
    def tokens(self) -> int:
        """Of all rows and heads."""
        return self.batch * self.heads * self.length


class Work(NamedTuple):
    operations: float
    bytes: float


class Rates(NamedTuple):
    """Per second."""

    operations: float
    bytes: float


H200 = Rates(989e12, 4.8e12)  # in dense bfloat16, as NVIDIA publishes them


def lightning(case: Case, direction: str, itemsize: int) -> Work:
    """Of "forward", "backward", or "training", which is both."""
    K = case.dim
    forward = _work(case, 4 * CHUNK * K + 4 * K**2, 4 * K, itemsize)
    backward = _work(case, 10 * CHUNK * K + 8 * K**2, 7 * K + K**2 / STATES_EVERY, itemsize)
    return _choose(direction, forward, backward)


def softmax(case: Case, direction: str, itemsize: int) -> Work:
    """As `lightning`; every token attends to half the row on average."""
    T, K = case.length, case.dim
    forward, backward = _work(case, 2 * T * K, 4 * K, itemsize), _work(case, 5 * T * K, 8 * K, itemsize)
    return _choose(direction, forward, backward)


def work(implementation: str, case: Case, direction: str, itemsize: int) -> Work:
    """What `implementation` is for, as counted above, whatever it does."""
    return (softmax if implementation in SOFTMAX else lightning)(case, direction, itemsize)


def floor(case: Case, direction: str, itemsize: int, rates: Rates) -> float:
    """Seconds in which no lightning attention can be done; training's is the sum, since the two follow each other."""
    if direction == "training":
        return floor(case, "forward", itemsize, rates) + floor(case, "backward", itemsize, rates)
    least = lightning(case, direction, itemsize)
    return max(least.operations / rates.operations, least.bytes / rates.bytes)


def of_gpu_kernel(name: str, case: Case) -> Work:
    """Of one kernel of `pallas_kernels.gpu`, in bfloat16: its matmuls, and each tensor read or written once."""
    K = case.dim
    if name.endswith("dk_dv"):  # q, k, v, do; dk, dv
        return _work(case, 8 * CHUNK * K + 6 * K**2, 6 * K, 2)
    if name.endswith("states"):  # k and v, or q and do
        return _work(case, 2 * K**2, 2 * K, 2)
    return _work(case, 4 * CHUNK * K + 4 * K**2, 4 * K, 2)


def _work(case: Case, operations: float, numbers: float, itemsize: int) -> Work:
    return Work(case.tokens * operations, case.tokens * numbers * itemsize)


def _choose(direction: str, forward: Work, backward: Work) -> Work:
    both = Work(forward.operations + backward.operations, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "training": both}[direction]
