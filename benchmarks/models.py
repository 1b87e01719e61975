"""Models of one size on both sides of a comparison: what our ModelConfig and transformers' configs make of a few sizes.

A model is a dict, as JSON holds it, with the fields of LLAMA. Each function imports its side's library.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers

    from lightning_jax.models import ModelConfig

# 12M parameters each. A pattern is repeated; H heads of 64.
LLAMA = {
    "name": "Llama",
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_layers": 8,
    "layer_pattern": ["softmax"],
    "num_heads": 4,
    "num_kv_heads": 4,
    "intermediate_size": 960,
    "num_experts": 0,
    "experts_per_token": 0,
}
HYBRID = LLAMA | {
    "name": "hybrid",
    "layer_pattern": ["lightning"] * 7 + ["softmax"],
    "intermediate_size": 224,
    "num_experts": 4,
    "experts_per_token": 2,
}
TINY = {"vocab_size": 256, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 64}


def jax_config(model: dict[str, Any]) -> "ModelConfig":
    """Ours, in float32."""
    from lightning_jax.models import ModelConfig

    sizes = {name: value for name, value in model.items() if name not in ("name", "layer_pattern")}
    hybrid = model["num_experts"] > 0
    return ModelConfig(
        **sizes,
        layer_pattern=tuple(model["layer_pattern"]),
        head_dim=model["hidden_size"] // model["num_heads"],
        rotary_dim=model["hidden_size"] // model["num_heads"],
        rope_theta=10_000.0,
        rope_scaling=None,
        lightning_norm_eps=1e-5,
        attention_implementation="auto",
        lightning_implementation="auto",
        expert_dispatch="auto",
        capacity_factor=1.0,
        capacity_group=8192,
        router_aux_loss="huggingface",
        router_aux_coefficient=0.001,
        norm_placement="post" if hybrid else "pre",
        residual_alpha=deepnorm_alpha(model) if hybrid else 1.0,
        residual_beta=1.0,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        initializer="normal",
        initializer_range=0.02,
        param_dtype="float32",
        compute_dtype="float32",
        logits_dtype="float32",
        loss_chunk=256,
        remat="none",
    )


def torch_config(model: dict[str, Any]) -> "transformers.PreTrainedConfig":
    """transformers', Llama's or MiniMax's."""
    import transformers

    sizes = {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["intermediate_size"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "head_dim": model["hidden_size"] // model["num_heads"],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "attn_implementation": "sdpa",
    }
    if not model["num_experts"]:
        return transformers.LlamaConfig(**sizes)
    kinds = {"lightning": "linear_attention", "softmax": "full_attention"}
    pattern = [kinds[kind] for kind in model["layer_pattern"]]
    alphas = dict.fromkeys(
        ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"), deepnorm_alpha(model)
    )
    return transformers.MiniMaxConfig(
        **sizes,
        **alphas,
        layer_types=[pattern[layer % len(pattern)] for layer in range(model["num_layers"])],
        num_local_experts=model["num_experts"],
        num_experts_per_tok=model["experts_per_token"],
        output_router_logits=True,  # adds the balance loss
    )


def deepnorm_alpha(model: dict[str, Any]) -> float:
    return (2 * model["num_layers"]) ** 0.25
