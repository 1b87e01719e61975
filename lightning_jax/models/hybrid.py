"""HybridLM: a decoder whose layers repeat a pattern of kinds.

Sources: MiniMax-01 (arXiv 2501.08313) sections 2 and 4.2; Llama (arXiv 2407.21783) for the pre-norm dense case.

Shapes: B batch, T sequence, D model dim, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lightning_jax.models import initializers, rope
from lightning_jax.models.config import ModelConfig
from lightning_jax.models.layer_stack import LayerStack
from lightning_jax.models.layers import RMSNorm
from lightning_jax.models.mixers import Tokens
from lightning_jax.models.moe import RouterSums
from lightning_jax.models.operators import ONE_DEVICE, Operators, complete

State = list[list[Any]]  # of every stack, for every run of it: its mixer's state arrays [layers, ...]
SeparateLayers = list[list[Any]]  # of every stack: parameters, constants and place of each of its layers


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
        separate_layers: SeparateLayers | None = None,
    ) -> tuple[jax.Array, State]:
        """Goes on from a state by T tokens of each sequence; a state that is given away (donated) is updated in place.

        The hidden vectors are those of the forward pass over whole sequences, whatever pieces they come in.

        Args:
            tokens_BT: the next token ids.
            positions_BT: their places in their sequences, counted from 0 and below the state's capacity; -1 for
                padding, which stands left of the first tokens of a sequence only and is not remembered.
            rope_theta: replaces the config's, and may be traced.
            separate_layers: what the method of this name gave; then the layers are not scanned.

        Returns:
            hidden_BTD after the final norm in the compute dtype, and the state behind the last token.
        """
        tokens = Tokens(None, rope.rotation(self.config, positions_BT, rope_theta), positions_BT)
        hidden_BTD, _, state = self._hidden(tokens_BT, tokens, positions_BT >= 0, state, separate_layers)
        return hidden_BTD, [stack.place_state(each) for stack, each in zip(self.stacks, state, strict=True)]

    def separate_layers(self) -> SeparateLayers:
        """Every layer's parameters as arrays of their own, for a loop whose every pass is a call of `advance`.

        From a scan's stack, each layer's parameters may be copied at each pass; these are copied once. What is compiled
        grows with the depth.
        """
        return [stack.separate_layers() for stack in self.stacks]

    def _hidden(
        self,
        tokens_BT: jax.Array,
        tokens: Tokens,
        mask_BT: jax.Array,
        state: State | None,
        separate_layers: SeparateLayers | None = None,
    ) -> tuple[jax.Array, RouterSums | None, State | None]:
        # Gathered along the model dim before the lookup: between two arrays split over the same devices the compiler
        # would replicate the whole batch's vectors.
        embedding_VD = self.operators.constrain(self.embedding[...], ("vocab", None))
        x_BTD = embedding_VD[tokens_BT].astype(self.config.compute_dtype)
        x_BTD = self.operators.constrain(x_BTD, ("batch", "sequence", None))
        routers, states = [], []
        none = [None] * len(self.stacks)
        for stack, before, layers in zip(self.stacks, state or none, separate_layers or none, strict=True):
            x_BTD, router, after = stack(x_BTD, tokens, mask_BT, before, layers)
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
