"""AdamW as an optax chain: clip by global norm, Adam, decoupled weight decay, learning rate at a given step.

Source: AdamW, arXiv 1711.05101 algorithm 2; the epsilon of 1e-15 is MiniMax-M1's (arXiv 2506.13585 section 3.2).

What float32 does with such an epsilon: it stands outside the square root (inside, it would have to be 1e-30). A
gradient's square is lost below about 1e-18 (the least normal number is 1.2e-38), and the update is then first moment /
epsilon, which is what exact arithmetic gives too, for the root of what was lost is a thousand times below epsilon.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lightning_jax.optimizers.config import OptimizerConfig
from lightning_jax.optimizers.finite import where_finite
from lightning_jax.optimizers.offload import on_device_in_turns
from lightning_jax.optimizers.schedules import LearningRate


def build_optimizer(
    config: OptimizerConfig, learning_rate: LearningRate, *, moments_on_host: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of one stage: `update(gradients, state, params, step=step, finite=finite)` with the stage's step.

    Where `finite`, a bool that may be traced, is false the state stays as it is, and the updates are not to be used.
    With `moments_on_host` the moments are given and come back in the host's memory.

    The state (two moments and the count of updates) has the same structure and dtypes for every config of equal
    `moment_dtype`, so that a stage goes on with the state of the one before; the step is an argument because the
    learning rate follows the stage, and the count of updates the whole run.

    `params` for decay_mask="matrices" must be nnx variables that carry `logical_axes`: stacked layers give even
    norms a second dimension, so shapes alone do not tell a matrix. Raises ValueError where they do not.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _with_moments_in(
            jnp.dtype(config.moment_dtype),
            moments_on_host,
            optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        ),
        optax.add_decayed_weights(config.weight_decay, _MASKS[config.decay_mask]),
        _scale_by_learning_rate(learning_rate),
    )


def _with_moments_in(
    dtype: jnp.dtype, on_host: bool, adam: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Adam computed in float32 whatever the gradients are in, with both moments stored in `dtype`."""

    def cast(state: optax.ScaleByAdamState, to: jnp.dtype) -> optax.ScaleByAdamState:
        return state._replace(mu=optax.tree.cast(state.mu, to), nu=optax.tree.cast(state.nu, to))

    def init(params: Any) -> optax.ScaleByAdamState:
        return cast(adam.init(params), dtype)

    def update(
        updates: Any, state: optax.ScaleByAdamState, params: Any = None, *, finite: bool | jax.Array = True, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        def of_arrays(updates: Any, mu: Any, nu: Any) -> tuple[Any, Any, Any]:
            before = optax.ScaleByAdamState(state.count, mu, nu)
            updates, after = adam.update(updates, cast(before, jnp.float32))
            _, mu, nu = where_finite(finite, cast(after, dtype), before)
            return updates, mu, nu

        trees = (optax.tree.cast(updates, jnp.float32), state.mu, state.nu)
        updates, mu, nu = on_device_in_turns(of_arrays, *trees) if on_host else of_arrays(*trees)
        count = where_finite(finite, optax.safe_increment(state.count), state.count)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_learning_rate(learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, step: int | jax.Array, **_: Any) -> tuple[Any, Any]:
        rate = learning_rate(step)
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _matrices(params: Any) -> Any:
    """True for parameters that have two or more dimensions of their own, not counting stacked layers."""

    def is_matrix(path: Any, param: Any) -> bool:
        if not isinstance(param, nnx.Variable) or not hasattr(param, "logical_axes"):
            raise ValueError(
                f"decay_mask='matrices': parameter {jax.tree_util.keystr(path)} carries no logical_axes; "
                "declare it as nnx.Param(value, logical_axes=...) and pass the nnx.State"
            )
        return len(param.logical_axes) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _everything(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


_MASKS = {"all": _everything, "matrices": _matrices}
