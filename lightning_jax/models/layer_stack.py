"""LayerStack: a pattern of layers repeated any number of times; it is scanned, so compile time is flat.

Sources: MiniMax-01 (arXiv 2501.08313) section 2 (DeepNorm post-norm, seven lightning layers to one softmax layer);
Llama (arXiv 2407.21783) for the pre-norm dense case.

Shapes: B batch, T sequence, D model dim.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lightning_jax.models.config import LayerKind, ModelConfig
from lightning_jax.models.layers import RMSNorm, SwiGLU
from lightning_jax.models.mixers import MIXERS, LayerState, StateArray, Tokens
from lightning_jax.models.moe import MoE, RouterSums
from lightning_jax.models.operators import Operators

LAYER_INPUT = "layer_input"  # the name by which a rematerialisation policy knows it


class Block(nnx.Module):
    """One layer: a mixer and a feed-forward, each x -> alpha * residual + beta * f(norm(x)).

    With norms placed "post" the residual is the normed input, which is DeepNorm's post-norm with every norm moved to
    the start of the next sub-layer; with "pre" it is the input itself.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, *, rngs: nnx.Rngs, operators: Operators):
        self.config, self.operators = config, operators
        norm = functools.partial(RMSNorm, config.hidden_size, config.rms_norm_eps, None, param_dtype=config.param_dtype)
        self.mixer_norm = norm()
        self.mixer = MIXERS[kind](config, rngs=rngs, operators=operators)
        self.feed_forward_norm = norm()
        if config.num_experts:
            self.feed_forward = MoE(config, rngs=rngs, operators=operators)
        else:
            self.feed_forward = SwiGLU(config, rngs=rngs, operators=operators)

    def __call__(
        self, x_BTD: jax.Array, constants: Any, tokens: Tokens, mask_BT: jax.Array, state: LayerState | None
    ) -> tuple[jax.Array, RouterSums | None, LayerState | None]:
        normed_BTD = self.mixer_norm(x_BTD)
        y_BTD, state = self.mixer(normed_BTD, constants, tokens, state)
        x_BTD = self._residual(x_BTD, normed_BTD, y_BTD)
        normed_BTD = self.feed_forward_norm(x_BTD)
        if self.config.num_experts:
            y_BTD, router = self.feed_forward(normed_BTD, mask_BT)
        else:
            y_BTD, router = self.feed_forward(normed_BTD), None
        return self._residual(x_BTD, normed_BTD, y_BTD), router, state

    def _residual(self, x_BTD: jax.Array, normed_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        kept_BTD = normed_BTD if self.config.norm_placement == "post" else x_BTD
        x_BTD = self.config.residual_alpha * kept_BTD + self.config.residual_beta * y_BTD
        return self.operators.constrain(x_BTD, ("batch", "sequence", None))


class Run(NamedTuple):
    """Neighbouring layers of one kind inside the pattern: their first place in it, and how many they are."""

    kind: LayerKind
    start: int
    length: int


def runs(pattern: tuple[LayerKind, ...]) -> list[Run]:
    """The pattern as runs of equal kinds."""
    grouped = itertools.groupby(range(len(pattern)), key=lambda place: pattern[place])
    return [Run(kind, places[0], len(places)) for kind, places in ((kind, list(group)) for kind, group in grouped)]


class LayerStack(nnx.Module):
    """A pattern of layers repeated `repeats` times: each run's parameters are stacked [repeats, run length, ...].

    Layer `first_layer + r * len(pattern) + run.start + i` of the model is element [r, i] of its run.
    """

    def __init__(
        self,
        config: ModelConfig,
        pattern: tuple[LayerKind, ...],
        repeats: int,
        first_layer: int,
        *,
        rngs: nnx.Rngs,
        operators: Operators,
    ):
        self.config, self.pattern, self.repeats, self.first_layer = config, pattern, repeats, first_layer
        self.operators = operators
        self.runs = nnx.List(
            stacked(
                lambda rngs, kind=run.kind: Block(config, kind, rngs=rngs, operators=operators),
                (repeats, run.length),
                rngs=rngs,
            )
            for run in runs(pattern)
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        tokens: Tokens,
        mask_BT: jax.Array,
        state: list[Any] | None,
        separate_layers: list[Any] | None = None,
    ) -> tuple[jax.Array, RouterSums | None, list[Any] | None]:
        """The last layer's output, the layers' router sums stacked in layer order (None for dense layers), the state.

        The loops carry the state whole and every layer writes its part of it in place. Sliced and stacked by a scan,
        like the parameters, all of it would be copied.

        Args:
            separate_layers: what the method of this name gave; then the layers are not scanned.
        """
        graphdefs = [nnx.graphdef(run) for run in self.runs]

        def layer(graphdef: nnx.GraphDef, carry: tuple[jax.Array, Any], inputs: tuple[nnx.State, Any, Any]):
            (x_BTD, arrays), (parameters, constants, place) = carry, inputs
            x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
            own = None if state is None else LayerState(arrays, place)
            x_BTD, router, own = nnx.merge(graphdef, parameters)(x_BTD, constants, tokens, mask_BT, own)
            return (x_BTD, own and own.arrays), router

        def repeat(carry: tuple[jax.Array, list[Any]], layers: list[Any]):
            x_BTD, states = carry
            routers, new_states = [], []
            for graphdef, run, run_state in zip(graphdefs, layers, states, strict=True):
                body = rematerialised(functools.partial(layer, graphdef), self.config.remat)
                (x_BTD, run_state), router = scan(body, (x_BTD, run_state), run)
                routers.append(router)
                new_states.append(run_state)
            return (x_BTD, new_states), jax.tree.map(lambda *sums: jnp.concatenate(sums), *routers)

        scan: Callable[..., tuple[Any, Any]] = jax.lax.scan if separate_layers is None else scan_list
        layers = separate_layers or self._stacked_layers(with_places=state is not None)
        states = [None] * len(self.runs) if state is None else state
        (x_BTD, states), router = scan(repeat, (x_BTD, states), layers)
        router = jax.tree.map(lambda sums: sums.reshape(-1, *sums.shape[2:]), router)
        return x_BTD, router, None if state is None else states

    def separate_layers(self) -> list[Any]:
        """Parameters, constants and place of every single layer, by repeat, run and layer of the run."""
        stacks = self._stacked_layers(with_places=True)

        def layer(stack: tuple[nnx.State, Any, Any], repeat: int, place: int) -> tuple[nnx.State, Any, Any]:
            return jax.tree.map(lambda stacked: stacked[repeat, place], stack)

        return [
            [
                [layer(stack, repeat, place) for place in range(run.length)]
                for run, stack in zip(runs(self.pattern), stacks, strict=True)
            ]
            for repeat in range(self.repeats)
        ]

    def _stacked_layers(self, *, with_places: bool) -> list[tuple[nnx.State, Any, Any]]:
        """Parameters, constants and places of the layers of each run, stacked [repeats, run length, ...]."""
        return [
            (nnx.state(module), self._constants(run), self._places(run) if with_places else None)
            for module, run in zip(self.runs, runs(self.pattern), strict=True)
        ]

    def initial_state(self, batch: int, capacity: int) -> list[Any]:
        """The state of each run before the first token: arrays [layers of the run, ...]."""
        return [
            jax.tree.map(
                lambda array, run=run: jnp.zeros((self.repeats * run.length, *array.shape), array.dtype),
                self._state_arrays(run, batch, capacity),
                is_leaf=_is_state_array,
            )
            for run in runs(self.pattern)
        ]

    def place_state(self, states: list[Any]) -> list[Any]:
        """The state of each run, split over devices as its logical axes say."""

        def place(declared: StateArray, array: jax.Array) -> jax.Array:
            return self.operators.constrain(array, declared.logical_axes)

        return [
            jax.tree.map(place, self._state_arrays(run, 1, 1), state, is_leaf=_is_state_array)
            for run, state in zip(runs(self.pattern), states, strict=True)
        ]

    def _state_arrays(self, run: Run, batch: int, capacity: int) -> Any:
        return MIXERS[run.kind].state(self.config, batch, capacity)

    def _places(self, run: Run) -> np.ndarray:
        """The index of each of the run's layers in the arrays of its state [repeats, run length]."""
        return np.arange(self.repeats * run.length).reshape(self.repeats, run.length)

    def _constants(self, run: Run) -> Any:
        """The run's per-layer constants, stacked like its parameters [repeats, run length, ...]."""
        layers = self.first_layer + run.start + np.arange(self.repeats)[:, None] * len(self.pattern)
        layers = layers + np.arange(run.length)
        constants = [MIXERS[run.kind].constants(self.config, int(layer)) for layer in layers.flat]
        return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*layers.shape, *leaves[0].shape), *constants)


def scan_list(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, items: list[Any]) -> tuple[Any, Any]:
    """`jax.lax.scan` of what is not stacked: a list of trees, unrolled."""
    results = []
    for item in items:
        carry, result = body(carry, item)
        results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _is_state_array(node: Any) -> bool:
    return isinstance(node, StateArray)


def stacked(create: Callable[[nnx.Rngs], nnx.Module], sizes: tuple[int, ...], *, rngs: nnx.Rngs) -> Any:
    """A module whose every parameter has leading axes `sizes`, each element initialised from its own key."""

    def parameters(key: jax.Array) -> nnx.State:
        return nnx.state(create(nnx.Rngs(params=key)))

    for _ in sizes:
        parameters = jax.vmap(parameters)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return nnx.merge(graphdef, parameters(jax.random.split(rngs.params(), sizes)))


def rematerialised(body: Callable, remat: str) -> Callable:
    """A scanned layer that keeps for its backward pass everything, its weight products ("dots"), or its input only.

    "offload" keeps the input in the host's memory, where the platform has such a memory; CPUs keep it as "full" does.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "none":
            return body
        case "dots":
            return jax.checkpoint(body, policy=policies.dots_with_no_batch_dims_saveable)
        case "full":
            return jax.checkpoint(body)
    to_host = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=(LAYER_INPUT,),
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(body, policy=to_host)
