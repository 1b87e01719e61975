"""HybridLM: a decoder whose layers repeat a pattern of kinds; the pattern is scanned, so compile time is flat.

Sources: MiniMax-01 (arXiv 2501.08313) sections 2 and 4.2 (DeepNorm post-norm, seven lightning layers to one softmax
layer); Llama (arXiv 2407.21783) for the pre-norm dense case.

Shapes: B batch, T sequence, D model dim, V vocabulary.
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

from lightning_jax.models import initializers, rope
from lightning_jax.models.config import LayerKind, ModelConfig
from lightning_jax.models.layers import RMSNorm, SwiGLU
from lightning_jax.models.mixers import MIXERS, LayerState, StateArray, Tokens
from lightning_jax.models.moe import MoE, RouterSums
from lightning_jax.models.operators import ONE_DEVICE, Operators, complete

LAYER_INPUT = "layer_input"  # the name by which a rematerialisation policy knows it

State = list[list[Any]]  # of every stack, for every run of it: its mixer's state arrays [layers, ...]


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
        self, x_BTD: jax.Array, tokens: Tokens, mask_BT: jax.Array, state: list[Any] | None
    ) -> tuple[jax.Array, RouterSums | None, list[Any] | None]:
        """The last layer's output, the layers' router sums stacked in layer order (None for dense layers), the state.

        The scans carry the state whole and every layer writes its part of it in place. Sliced and stacked by a scan,
        like the parameters, all of it would be copied.
        """
        split = [nnx.split(run) for run in self.runs]

        def layer(graphdef: nnx.GraphDef, carry: tuple[jax.Array, Any], inputs: tuple[nnx.State, Any, Any]):
            (x_BTD, arrays), (parameters, constants, place) = carry, inputs
            x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
            own = None if place is None else LayerState(arrays, place)
            x_BTD, router, own = nnx.merge(graphdef, parameters)(x_BTD, constants, tokens, mask_BT, own)
            return (x_BTD, own and own.arrays), router

        def repeat(carry: tuple[jax.Array, list[Any]], stacks: list[tuple[nnx.State, Any, Any]]):
            x_BTD, states = carry
            routers, new_states = [], []
            for (graphdef, _), stack, state in zip(split, stacks, states, strict=True):
                body = rematerialised(functools.partial(layer, graphdef), self.config.remat)
                (x_BTD, state), router = jax.lax.scan(body, (x_BTD, state), stack)
                routers.append(router)
                new_states.append(state)
            return (x_BTD, new_states), jax.tree.map(lambda *sums: jnp.concatenate(sums), *routers)

        stacks = [
            (parameters, self._constants(run), None if state is None else self._places(run))
            for (_, parameters), run in zip(split, runs(self.pattern), strict=True)
        ]
        states = [None] * len(stacks) if state is None else state
        (x_BTD, states), router = jax.lax.scan(repeat, (x_BTD, states), stacks)
        router = jax.tree.map(lambda sums: sums.reshape(-1, *sums.shape[2:]), router)
        return x_BTD, router, None if state is None else states

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


class HybridLM(nnx.Module):
    """A language model: embedding, layers, final norm; `output_weights` give the logits.

    Parameters are declared once, in the config's param_dtype, with their logical axes; layers are stacked, so their
    parameters have two more leading axes ("layers") than logical axes.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, operators: Operators = ONE_DEVICE):
        operators = complete(operators, config)
        self.config, self.operators = config, operators
        V, D = config.vocab_size, config.hidden_size
        embed = initializers.weight(config, "embedding", V, D)
        self.embedding = nnx.Param(embed(rngs.params(), (V, D), config.param_dtype), logical_axes=("vocab", "embed"))
        pattern = config.layer_pattern
        repeats, left = divmod(config.num_layers, len(pattern))
        make = functools.partial(LayerStack, config, rngs=rngs, operators=operators)
        parts = [(pattern, repeats, 0), (pattern[:left], 1, repeats * len(pattern))]
        self.stacks = nnx.List(make(*part) for part in parts if part[0] and part[1])
        self.final_norm = RMSNorm(D, config.rms_norm_eps, None, param_dtype=config.param_dtype)
        if not config.tie_embeddings:
            head = initializers.weight(config, "head", D, V)
            self.head = nnx.Param(head(rngs.params(), (D, V), config.param_dtype), logical_axes=("embed", "vocab"))

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        segment_ids_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        rope_theta: jax.Array | float | None = None,
    ) -> tuple[jax.Array, RouterSums | None]:
        """Hidden vectors after the final norm, and the router's sums.

        Args:
            tokens_BT: token ids.
            segment_ids_BT: documents of a row numbered 1, 2, ..., 0 for padding; without it, each row is one document.
            positions_BT: positions for the rotary embedding; without it, 0 to T - 1.
            rope_theta: replaces the config's, and may be traced.

        Returns:
            hidden_BTD in the compute dtype, and None for dense models, else sums over tokens with a leading axis of
            layers; padding is not counted.
        """
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        mask_BT = jnp.ones(tokens_BT.shape, bool) if segment_ids_BT is None else segment_ids_BT > 0
        tokens = Tokens(segment_ids_BT, rope.rotation(self.config, positions_BT, rope_theta))
        hidden_BTD, router, _ = self._hidden(tokens_BT, tokens, mask_BT, None)
        return hidden_BTD, router

    def initial_state(self, batch: int, capacity: int) -> State:
        """The state before the first token of `batch` sequences that will have up to `capacity` tokens.

        It is a list of pytrees whose arrays are [layers, B, ...].
        """
        return [stack.place_state(stack.initial_state(batch, capacity)) for stack in self.stacks]

    def advance(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        state: State,
        *,
        rope_theta: jax.Array | float | None = None,
    ) -> tuple[jax.Array, State]:
        """Goes on from a state by T tokens of each sequence; a state that is given away (donated) is updated in place.

        The hidden vectors are those of the forward pass over whole sequences, whatever pieces they come in.

        Args:
            tokens_BT: the next token ids.
            positions_BT: their places in their sequences, counted from 0 and below the state's capacity; -1 for
                padding, which stands left of the first tokens of a sequence only and is not remembered.
            rope_theta: replaces the config's, and may be traced.

        Returns:
            hidden_BTD after the final norm in the compute dtype, and the state behind the last token.
        """
        tokens = Tokens(None, rope.rotation(self.config, positions_BT, rope_theta), positions_BT)
        hidden_BTD, _, state = self._hidden(tokens_BT, tokens, positions_BT >= 0, state)
        return hidden_BTD, [stack.place_state(each) for stack, each in zip(self.stacks, state, strict=True)]

    def _hidden(
        self, tokens_BT: jax.Array, tokens: Tokens, mask_BT: jax.Array, state: State | None
    ) -> tuple[jax.Array, RouterSums | None, State | None]:
        # Gathered along the model dim before the lookup: between two arrays split over the same devices the compiler
        # would replicate the whole batch's vectors.
        embedding_VD = self.operators.constrain(self.embedding[...], ("vocab", None))
        x_BTD = embedding_VD[tokens_BT].astype(self.config.compute_dtype)
        x_BTD = self.operators.constrain(x_BTD, ("batch", "sequence", None))
        routers, states = [], []
        for stack, before in zip(self.stacks, state or [None] * len(self.stacks), strict=True):
            x_BTD, router, after = stack(x_BTD, tokens, mask_BT, before)
            routers.append(router)
            states.append(after)
        router = jax.tree.map(lambda *sums: jnp.concatenate(sums), *routers)
        return self.final_norm(x_BTD), router, None if state is None else states

    def output_weights(self) -> jax.Array:
        """The weights [D, V] that turn hidden vectors into logits, in the param dtype."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def logits(self, hidden_XD: jax.Array) -> jax.Array:
        """The logits [..., V] of hidden vectors, in at least fp32, multiplied as the training loss multiplies them."""
        dtype = jnp.dtype(self.config.logits_dtype)
        return jnp.einsum(
            "...d,dv->...v",
            hidden_XD.astype(dtype),
            self.output_weights().astype(dtype),
            # By default accelerators round the factors of an fp32 product.
            precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )
