"""A step that is not finite changes nothing: neither parameters nor moments nor their count.

optax.apply_if_finite lets an update that is not finite through after some in a row; here none passes, and how many in a
row stop the run is the trainer's decision.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def is_finite(loss: jax.Array, gradient_norm: jax.Array) -> jax.Array:
    """Whether the step may be taken, a bool scalar.

    The global norm is not finite exactly where some gradient is not, or where the sum of squares passes float32's
    3e38: clipping by such a norm would make every gradient 0 and let the step through unseen.
    """
    return jnp.isfinite(loss) & jnp.isfinite(gradient_norm)


def where_finite(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` if `finite`, else `old`, leaf by leaf; the values of the one not taken do not matter.

    An elementwise choice rather than a branch: it fuses into the update that made `new`, and donated buffers stay
    donated.
    """
    return jax.tree.map(lambda new_leaf, old_leaf: jnp.where(finite, new_leaf, old_leaf), new, old)
