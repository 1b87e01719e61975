"""Logits, loss and gradients of tiny random MiniMax and Llama models, from Hugging Face transformers.

    python tests/goldens/make_model_goldens.py        (torch 2.13, transformers 5.23.0, CPU, fp32)

writes tests/goldens/model_<case>.npz for every case below: `config` (JSON, the fields of our ModelConfig that define
the case), `tokens`, `targets`, `logits`, `loss` (mean cross-entropy plus the weighted balance loss), and for every
parameter by its Hugging Face name `weight/<name>` (int8, in units of 1/64: exact and small) and `gradient/<name>`.

transformers 5.23.0 rotates whole heads whatever `rotary_dim` says; the released MiniMax models rotate half of each. The
rotary embedding is patched here to rotate the leading dimensions only, as the released modelling code does.
"""

import json
import pathlib

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax import modeling_minimax

FOLDER = pathlib.Path(__file__).parent
SIZES = {"vocab_size": 32, "hidden_size": 12, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "intermediate_size": 8}
MOE = {"num_experts": 4, "experts_per_token": 2, "router_aux_coefficient": 0.3, "norm_placement": "post"}
MINIMAX = SIZES | MOE | {"rope_theta": 1e4, "rotary_dim": 2, "residual_alpha": 1.5, "tie_embeddings": False}
LLAMA = SIZES | {"layer_pattern": ["softmax"], "num_layers": 2, "head_dim": 8, "rotary_dim": 8, "rope_theta": 1e4}

CASES = {
    "minimax": MINIMAX | {"layer_pattern": ["lightning"] * 3 + ["softmax"], "num_layers": 4},
    "minimax_whole_head_rope": MINIMAX | {"layer_pattern": ["lightning", "softmax"], "num_layers": 2, "rotary_dim": 4},
    "minimax_partial_pattern": MINIMAX | {"layer_pattern": ["lightning", "lightning", "softmax"], "num_layers": 5},
    "minimax_softmax_first": MINIMAX
    | {"layer_pattern": ["softmax", "lightning"], "num_layers": 3, "residual_beta": 0.5, "num_kv_heads": 1},
    "minimax_one_layer": MINIMAX | {"layer_pattern": ["lightning"], "num_layers": 1, "experts_per_token": 1},
    "llama": LLAMA | {"tie_embeddings": False},
    "llama_tied": LLAMA | {"tie_embeddings": True, "num_heads": 3, "num_kv_heads": 3},
    "llama_scaled_rope": LLAMA
    | {
        "tie_embeddings": False,
        "rope_scaling": {
            "factor": 8.0,
            "low_frequency_factor": 1.0,
            "high_frequency_factor": 4.0,
            "original_context_length": 128,
        },
    },
}


def minimax(case: dict) -> MiniMaxForCausalLM:
    kinds = {"lightning": "linear_attention", "softmax": "full_attention"}
    pattern = case["layer_pattern"] * case["num_layers"]
    alpha, beta = case["residual_alpha"], case.get("residual_beta", 1.0)
    config = MiniMaxConfig(
        num_local_experts=case["num_experts"],
        num_experts_per_tok=case["experts_per_token"],
        layer_types=[kinds[kind] for kind in pattern[: case["num_layers"]]],
        block_size=8,
        full_attn_alpha_factor=alpha,
        linear_attn_alpha_factor=alpha,
        mlp_alpha_factor=alpha,
        full_attn_beta_factor=beta,
        linear_attn_beta_factor=beta,
        mlp_beta_factor=beta,
        rope_parameters={"rope_type": "default", "rope_theta": case["rope_theta"]},
        attn_implementation="eager",
        **common(case),
    )
    rotate_leading(case["rotary_dim"])
    return MiniMaxForCausalLM(config)


def rotate_leading(rotary_dim: int) -> None:
    """Makes transformers' MiniMax rotate the leading `rotary_dim` dimensions of each head."""

    def frequencies(config, **_):
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    def apply(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

        def rotated(x):
            turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
            return torch.cat([turning * cos + modeling_minimax.rotate_half(turning) * sin, rest], dim=-1)

        return rotated(q), rotated(k)

    modeling_minimax.MiniMaxRotaryEmbedding.compute_default_rope_parameters = staticmethod(frequencies)
    modeling_minimax.apply_rotary_pos_emb = apply


def llama(case: dict) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": case["rope_theta"]}
    if "rope_scaling" in case:
        scaling = case["rope_scaling"]
        rope |= {
            "rope_type": "llama3",
            "factor": scaling["factor"],
            "low_freq_factor": scaling["low_frequency_factor"],
            "high_freq_factor": scaling["high_frequency_factor"],
            "original_max_position_embeddings": scaling["original_context_length"],
        }
    return LlamaForCausalLM(LlamaConfig(rope_parameters=rope, attn_implementation="eager", **common(case)))


def common(case: dict) -> dict:
    return {
        "vocab_size": case["vocab_size"],
        "hidden_size": case["hidden_size"],
        "intermediate_size": case["intermediate_size"],
        "num_hidden_layers": case["num_layers"],
        "num_attention_heads": case["num_heads"],
        "num_key_value_heads": case["num_kv_heads"],
        "head_dim": case["head_dim"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": case["tie_embeddings"],
        "max_position_embeddings": 256,
    }


def golden(name: str, case: dict) -> dict[str, np.ndarray]:
    random = np.random.RandomState(sum(map(ord, name)))
    is_moe = "num_experts" in case
    model = minimax(case) if is_moe else llama(case)
    arrays = {"config": np.array(json.dumps(case))}
    for parameter_name, parameter in model.named_parameters():
        spread, centre = (8, 64) if parameter.ndim == 1 else (20, 0)
        weight = np.clip(np.rint(centre + spread * random.standard_normal(tuple(parameter.shape))), -127, 127)
        parameter.data = torch.tensor(weight / 64, dtype=torch.float32)
        arrays[f"weight/{parameter_name}"] = weight.astype(np.int8)
    tokens, targets = torch.tensor(random.randint(0, case["vocab_size"], (2, 2, 21)))
    output = model(tokens, use_cache=False, **({"output_router_logits": True} if is_moe else {}))
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    if is_moe:
        balance = modeling_minimax.load_balancing_loss_func(
            output.router_logits, case["num_experts"], case["experts_per_token"]
        )
        loss = loss + case["router_aux_coefficient"] * balance
    loss.backward()
    arrays |= {"tokens": tokens.numpy(), "targets": targets.numpy()}
    arrays |= {"logits": output.logits.detach().numpy(), "loss": loss.detach().numpy()}
    return arrays | {f"gradient/{n}": parameter.grad.numpy() for n, parameter in model.named_parameters()}


if __name__ == "__main__":
    for name, case in CASES.items():
        np.savez_compressed(FOLDER / f"model_{name}.npz", **golden(name, case))
