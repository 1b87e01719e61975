"""MiniMax-Text-01's forward pass in fp64, token by token, from the paper and the released weights' names alone.

Sources: MiniMax-01 (arXiv 2501.08313) sections 2.1, 2.2 and 4.2, equation 1; the released config.json.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def forward(
    fields: Mapping[str, Any], weights: Mapping[str, np.ndarray], tokens: np.ndarray
) -> tuple[list, np.ndarray]:
    """What goes into every layer and the final norm's output [T, D] each; logits [T, V]; of one sequence [T]."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    eps = fields["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    hidden = []
    for layer, kind in enumerate(fields["attn_type_list"]):
        hidden.append(x)
        own = {name.split(".", 3)[3]: t for name, t in w.items() if name.startswith(f"model.layers.{layer}.")}
        u = rms_norm(x, own["input_layernorm.weight"], eps)
        y = softmax_attention(fields, own, u) if kind else lightning_attention(fields, own, u, layer)
        part = "full" if kind else "linear"
        x = fields[f"layernorm_{part}_attention_alpha"] * u + fields[f"layernorm_{part}_attention_beta"] * y
        u = rms_norm(x, own["post_attention_layernorm.weight"], eps)
        x = fields["layernorm_mlp_alpha"] * u + fields["layernorm_mlp_beta"] * experts(fields, own, u)
    hidden.append(rms_norm(x, w["model.norm.weight"], eps))
    return hidden, hidden[-1] @ w["lm_head.weight"].T


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def lightning_attention(fields, own, u, layer):
    heads, size = fields["num_attention_heads"], fields["head_dim"]
    fused = silu(u @ own["self_attn.qkv_proj.weight"].T).reshape(len(u), heads, 3, size)
    factor = 1 - layer / max(fields["num_hidden_layers"] - 1, 1) + 1e-5
    output = np.zeros((len(u), heads, size))
    for head, slope in enumerate(slopes(heads)):
        state = np.zeros((size, size))
        for t in range(len(u)):
            query, key, value = fused[t, head]
            state = np.exp(-slope * factor) * state + np.outer(key, value)
            output[t, head] = query @ state
    normed = rms_norm(output.reshape(len(u), -1), own["self_attn.norm.weight"], 1e-6)
    gate = 1 / (1 + np.exp(-u @ own["self_attn.output_gate.weight"].T))
    return (gate * normed) @ own["self_attn.out_proj.weight"].T


def slopes(heads):
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (head + 1) / heads) for head in range(heads)]
    below = 1 << (heads.bit_length() - 1)
    return slopes(below) + slopes(2 * below)[0::2][: heads - below]


def softmax_attention(fields, own, u):
    heads, groups, size = (fields[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    project = {name: (u @ own[f"self_attn.{name}_proj.weight"].T).reshape(len(u), -1, size) for name in "qkv"}
    q, k = (np.stack([rotate(fields, project[name][t], t) for t in range(len(u))]) for name in "qk")
    output = np.zeros((len(u), heads, size))
    for head in range(heads):
        group = head // (heads // groups)
        for t in range(len(u)):
            scores = k[: t + 1, group] @ q[t, head] / np.sqrt(size)
            probability = np.exp(scores - scores.max())
            output[t, head] = probability / probability.sum() @ project["v"][: t + 1, group]
    return output.reshape(len(u), -1) @ own["self_attn.o_proj.weight"].T


def rotate(fields, x, position):
    """Turns the pairs (i, i + rotary_dim / 2) of the leading dimensions of each head [H, K]."""
    half = fields["rotary_dim"] // 2
    turned = x.copy()
    for i in range(half):
        angle = position * fields["rope_theta"] ** (-i / half)
        turned[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
        turned[:, i + half] = x[:, i + half] * np.cos(angle) + x[:, i] * np.sin(angle)
    return turned


def experts(fields, own, u):
    moe = "block_sparse_moe"
    output = np.zeros_like(u)
    for t, token in enumerate(u):
        logits = own[f"{moe}.gate.weight"] @ token
        chosen = np.argsort(-logits)[: fields["num_experts_per_tok"]]
        share = np.exp(logits[chosen] - logits[chosen].max())
        for expert, weight in zip(chosen, share / share.sum(), strict=True):
            w1, w2, w3 = (own[f"{moe}.experts.{expert}.{name}.weight"] for name in ("w1", "w2", "w3"))
            output[t] += weight * (w2 @ (silu(w1 @ token) * (w3 @ token)))
    return output
