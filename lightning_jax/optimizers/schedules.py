"""Learning rates as plain functions of the step.

Sources: warmup-stable-decay, arXiv 2404.06395; its sqrt decay, arXiv 2405.18392 section 3; cosine, arXiv 1608.03983;
constant then exponential, MiniMax-01 (arXiv 2501.08313) section 4.2; constant then decay, MiniMax-M1 (arXiv 2506.13585)
section 2.1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lightning_jax.errors import UserError
from lightning_jax.optimizers.config import ScheduleConfig

LearningRate = Callable[[int | jax.Array], jax.Array]


def learning_rate(config: ScheduleConfig, total_steps: int) -> LearningRate:
    """The learning rate at each step of a stage of `total_steps` steps; takes a step or an array of steps.

    Warm-up rises from 0 at step 0 to `peak` at `warmup_steps`. After the last step the value stays what it became.
    Raises UserError where warm-up and decay do not fit into the stage.
    """
    if problems := config.problems_in(total_steps):
        raise UserError(f"schedule.{problems[0]}")
    if config.kind == "wsd":
        decay_start = config.first_step + total_steps - config.decay_steps
        pieces = {config.warmup_steps: optax.constant_schedule(config.peak)}
        if config.decay_steps:
            pieces[decay_start] = _decay(config)
    elif config.kind == "cosine":
        fall = optax.cosine_decay_schedule(
            config.peak, config.decay_steps - config.warmup_steps, config.final / config.peak
        )
        pieces = {config.warmup_steps: fall}
    else:
        pieces = {config.warmup_steps: optax.constant_schedule(config.peak)}
    if config.warmup_steps:
        pieces = {0: optax.linear_schedule(0.0, config.peak, config.warmup_steps), **pieces}
    schedule = optax.join_schedules(list(pieces.values()), list(pieces)[1:])

    def rate(step: int | jax.Array) -> jax.Array:
        value = jnp.asarray(schedule(jnp.asarray(step) + config.first_step), jnp.float32)
        return jnp.broadcast_to(value, jnp.shape(step))  # optax.constant_schedule ignores the step and its shape

    return rate


def _decay(config: ScheduleConfig) -> LearningRate:
    """From peak at step 0 to final at `decay_steps`, and final from there on."""
    peak, final, steps = config.peak, config.final, config.decay_steps
    match config.decay_shape:
        case "linear":
            return optax.linear_schedule(peak, final, steps)
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps, final / peak)
        case "exponential":
            return optax.exponential_decay(peak, steps, final / peak, end_value=final)
        case "sqrt":
            return lambda step: peak - (peak - final) * jnp.sqrt(jnp.clip(step / steps, 0.0, 1.0))
