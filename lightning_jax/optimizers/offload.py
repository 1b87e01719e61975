"""Elementwise work on arrays that wait in the host's memory: they come to the devices and go back layer by layer.

Source: ZeRO-Offload (arXiv 2101.06840) for moments on the host; the update itself stays on the devices here.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def on_device_in_turns(function: Callable[..., tuple], here: Any, *waiting: Any) -> tuple:
    """`function(here, *waiting)`, trees of equal structure, where all but the first lie in the host's memory.

    Args:
        function: elementwise, of arrays; returns as many arrays of the same shapes and dtypes, and what it returns for
            `waiting` goes to the host. It is called for every array, and for every layer of those that are stacked.
        here, waiting: trees of nnx variables that carry `logical_axes`; an array's axes before these are layers.
    """

    def of_variables(*variables: nnx.Variable) -> list[nnx.Variable]:
        own, *others = (variable.get_value() for variable in variables)
        layers = own.shape[: own.ndim - len(variables[0].get_metadata("logical_axes"))]
        results = _in_turns(function, layers, own, *others)
        return [variable.replace(result) for variable, result in zip(variables, results, strict=True)]

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    trees = [jax.tree.flatten(tree, is_leaf=is_variable) for tree in (here, *waiting)]
    results = [of_variables(*variables) for variables in zip(*(leaves for leaves, _ in trees), strict=True)]
    columns = zip(*results, strict=True)
    return tuple(structure.unflatten(column) for (_, structure), column in zip(trees, columns, strict=True))


def _in_turns(
    function: Callable[..., tuple], layers: tuple[int, ...], here: jax.Array, *waiting: jax.Array
) -> tuple[jax.Array, ...]:
    def brought(here: jax.Array, *waiting: jax.Array) -> tuple[jax.Array, ...]:
        here, *results = function(here, *(jax.device_put(array, jax.memory.Space.Device) for array in waiting))
        return here, *(jax.device_put(result, jax.memory.Space.Host) for result in results)

    if not layers:
        return brought(here, *waiting)

    # A loop that carries the arrays, and so overwrites them where they are: a scan would make new ones beside them. One
    # axis of layers, because TPUs' compiler ends the process for copies out of the host's memory along two. The barrier
    # takes the layer out before anything is written: a fusion that reads and writes the array has all of it copied.
    def one_layer(turn: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        here, *waiting = (jax.lax.dynamic_slice_in_dim(array, turn, 1) for array in arrays)
        results = brought(jax.lax.optimization_barrier(here), *waiting)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(array, result, turn, 0)
            for array, result in zip(arrays, results, strict=True)
        )

    count, shape = math.prod(layers), here.shape
    arrays = tuple(array.reshape(count, *shape[len(layers) :]) for array in (here, *waiting))
    return tuple(array.reshape(shape) for array in jax.lax.fori_loop(0, count, one_layer, arrays))
