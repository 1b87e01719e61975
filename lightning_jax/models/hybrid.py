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

from lightning_jax.models import initializers, rope
from lightning_jax.models.config import LayerKind, ModelConfig
from lightning_jax.models.layers import RMSNorm, SwiGLU
from lightning_jax.models.mixers import MIXERS, Tokens
from lightning_jax.models.moe import MoE, RouterSums
from lightning_jax.models.operators import ONE_DEVICE, Operators, complete


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
            self.feed_forward = SwiGLU(config, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, constants: Any, tokens: Tokens, mask_BT: jax.Array
    ) -> tuple[jax.Array, RouterSums | None]:
        normed_BTD = self.mixer_norm(x_BTD)
        x_BTD = self._residual(x_BTD, normed_BTD, self.mixer(normed_BTD, constants, tokens))
        normed_BTD = self.feed_forward_norm(x_BTD)
        if self.config.num_experts:
            y_BTD, router = self.feed_forward(normed_BTD, mask_BT)
        else:
            y_BTD, router = self.feed_forward(normed_BTD), None
        return self._residual(x_BTD, normed_BTD, y_BTD), router

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
        self.runs = nnx.List(
            stacked(
                lambda rngs, kind=run.kind: Block(config, kind, rngs=rngs, operators=operators),
                (repeats, run.length),
                rngs=rngs,
            )
            for run in runs(pattern)
        )

    def __call__(self, x_BTD: jax.Array, tokens: Tokens, mask_BT: jax.Array) -> tuple[jax.Array, RouterSums | None]:
        """The last layer's output, and the layers' router sums stacked in layer order (None for dense layers)."""
        split = [nnx.split(run) for run in self.runs]

        def layer(graphdef: nnx.GraphDef, x_BTD: jax.Array, inputs: tuple[nnx.State, Any]):
            parameters, constants = inputs
            return nnx.merge(graphdef, parameters)(x_BTD, constants, tokens, mask_BT)

        def repeat(x_BTD: jax.Array, stacks: list[tuple[nnx.State, Any]]):
            routers = []
            for (graphdef, _), stack in zip(split, stacks, strict=True):
                body = rematerialised(functools.partial(layer, graphdef), self.config.remat)
                x_BTD, router = jax.lax.scan(body, x_BTD, stack)
                routers.append(router)
            return x_BTD, jax.tree.map(lambda *sums: jnp.concatenate(sums), *routers)

        stacks = [
            (parameters, self._constants(run)) for (_, parameters), run in zip(split, runs(self.pattern), strict=True)
        ]
        x_BTD, router = jax.lax.scan(repeat, x_BTD, stacks)
        return x_BTD, jax.tree.map(lambda sums: sums.reshape(-1, *sums.shape[2:]), router)

    def _constants(self, run: Run) -> Any:
        """The run's per-layer constants, stacked like its parameters [repeats, run length, ...]."""
        layers = self.first_layer + run.start + np.arange(self.repeats)[:, None] * len(self.pattern)
        layers = layers + np.arange(run.length)
        constants = [MIXERS[run.kind].constants(self.config, int(layer)) for layer in layers.flat]
        return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*layers.shape, *leaves[0].shape), *constants)


def stacked(create: Callable[[nnx.Rngs], nnx.Module], sizes: tuple[int, ...], *, rngs: nnx.Rngs) -> Any:
    """A module whose every parameter has leading axes `sizes`, each element initialised from its own key."""

    def parameters(key: jax.Array) -> nnx.State:
        return nnx.state(create(nnx.Rngs(params=key)))

    for _ in sizes:
        parameters = jax.vmap(parameters)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return nnx.merge(graphdef, parameters(jax.random.split(rngs.params(), sizes)))


def rematerialised(body: Callable, remat: str) -> Callable:
    """A scanned layer that keeps for its backward pass everything, its weight products ("dots"), or its input only."""
    if remat == "none":
        return body
    policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    return jax.checkpoint(body, policy=policies[remat])


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
        # Gathered along the model dim before the lookup: between two arrays split over the same devices the compiler
        # would replicate the whole batch's vectors.
        embedding_VD = self.operators.constrain(self.embedding[...], ("vocab", None))
        x_BTD = embedding_VD[tokens_BT].astype(self.config.compute_dtype)
        x_BTD = self.operators.constrain(x_BTD, ("batch", "sequence", None))
        routers = []
        for stack in self.stacks:
            x_BTD, router = stack(x_BTD, tokens, mask_BT)
            routers.append(router)
        return self.final_norm(x_BTD), jax.tree.map(lambda *sums: jnp.concatenate(sums), *routers)

    def output_weights(self) -> jax.Array:
        """The weights [D, V] that turn hidden vectors into logits, in the param dtype."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]
