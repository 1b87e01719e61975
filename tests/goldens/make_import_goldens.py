"""What checkpoints of twelve tiny architectures compute when transformers loads them.

    python tests/goldens/make_import_goldens.py        (torch 2.13, transformers 5.23.0, CPU, fp32)

writes tests/goldens/import_<case>.npz: `config` (config.json as a released checkpoint has it), `shapes` (JSON, of the
tensors by name, as transformers saves them), `tokens`, `hidden` (what goes into every layer, and the final norm's
output), `logits`, `gradients` (of the mean cross-entropy of each next token, by parameter in transformers' order: the
sum of its product with a random tensor), `parameters` (their names and shapes, JSON), `greedy` (prompts of five tokens
and their 64 likeliest continuations). Weights are those of golden_weights.py.

Where transformers 5.23.0 differs from the released modelling code of MiniMax it is patched: it rotates whole heads
whatever `rotary_dim` says, and gives heads whose number is no power of two other decays.
"""

import json
import pathlib
import tempfile

import golden_weights
import numpy as np
import torch
from make_model_goldens import llama, minimax
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "intermediate_size": 8}
MINIMAX = SIZES | {
    "num_experts": 4,
    "experts_per_token": 2,
    "rope_theta": 1e4,
    "rotary_dim": 2,
    "tie_embeddings": False,
}
LLAMA = SIZES | {"layer_pattern": ["softmax"], "num_layers": 2, "rope_theta": 1e4, "tie_embeddings": False}
L, S = "lightning", "softmax"
SCALED = {
    "factor": 8.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_context_length": 32,
}

CASES = {
    "minimax_as_released": MINIMAX | {"layer_pattern": [L] * 7 + [S], "num_layers": 8},
    "minimax_ten_layers": MINIMAX | {"layer_pattern": [L] * 7 + [S], "num_layers": 10, "released": False},
    "minimax_three_heads": MINIMAX | {"layer_pattern": [L, S], "num_layers": 3, "num_heads": 3, "num_kv_heads": 1},
    "minimax_six_heads": MINIMAX | {"layer_pattern": [L, L, S], "num_layers": 5, "num_heads": 6, "num_kv_heads": 3},
    "minimax_two_heads": MINIMAX | {"layer_pattern": [L, S], "num_layers": 4, "num_heads": 2, "head_dim": 8},
    "minimax_softmax_first": MINIMAX | {"layer_pattern": [S, L, L], "num_layers": 7, "released": False},
    "minimax_whole_heads": MINIMAX | {"layer_pattern": [S, L], "num_layers": 2, "rotary_dim": 4, "num_experts": 3},
    "llama": LLAMA,
    "llama_grouped": LLAMA | {"hidden_size": 24, "num_heads": 6, "num_layers": 3},
    "llama_tied": LLAMA
    | {"hidden_size": 12, "tie_embeddings": True, "num_heads": 3, "num_kv_heads": 3, "rope_theta": 1e5},
    "llama_scaled": LLAMA | {"rope_scaling": SCALED, "rope_theta": 5e5, "head_dim": 8},
    "llama_scaled_tied": LLAMA | {"rope_scaling": SCALED, "tie_embeddings": True, "num_kv_heads": 1},
}


def slopes_as_released(module: MiniMaxLightningAttention, device: torch.device | None = None) -> torch.Tensor:
    """The slopes of the power of two below, then every other one of the power of two above (ALiBi's rule)."""

    def power_of_two(heads: int) -> list[float]:
        return [2 ** (-8 * (head + 1) / heads) for head in range(heads)]

    heads = module.num_attention_heads
    below = 2 ** int(np.log2(heads))
    slopes = power_of_two(below) + power_of_two(2 * below)[0::2][: heads - below]
    factor = 1 - module.layer_idx / (module.num_hidden_layers - 1 + 1e-5) + 1e-5
    return torch.tensor(slopes, dtype=torch.float32, device=device)[:, None, None] * factor


def released_config(fields: dict) -> dict:
    """The config.json of MiniMax-Text-01 for the model that transformers' describes."""
    names = {"full_attn": "full_attention", "linear_attn": "linear_attention", "mlp": "mlp"}
    kept = {name: value for name, value in fields.items() if "_factor" not in name}
    kinds = kept.pop("layer_types")
    rope = kept.pop("rope_parameters")
    for theirs, released in names.items():
        for scale in ("alpha", "beta"):
            kept[f"layernorm_{released}_{scale}"] = fields[f"{theirs}_{scale}_factor"]
    return kept | {
        "architectures": ["MiniMaxText01ForCausalLM"],
        "model_type": "minimax_text_01",
        "attn_type_list": [int(kind == "full_attention") for kind in kinds],
        "rope_theta": rope["rope_theta"],
        "postnorm": True,
        "shared_intermediate_size": 0,
    }


def golden(name: str, case: dict) -> dict[str, np.ndarray]:
    is_minimax = "num_experts" in case
    case = case | {"residual_alpha": (2 * case["num_layers"]) ** 0.25}
    model = minimax(case) if is_minimax else llama(case)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        model.save_pretrained(path)
        file = path / "model.safetensors"
        derived = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
        shapes = {n: tuple(t.shape) for n, t in load_file(file).items() if not n.endswith(derived)}
        save_file({n: torch.tensor(t) for n, t in golden_weights.tensors(shapes).items()}, file, {"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    fields = json.loads(model.config.to_json_string())
    if is_minimax:
        fields["rotary_dim"] = case["rotary_dim"]
        fields = released_config(fields) if case.get("released", True) else fields
    random = np.random.RandomState(sum(map(ord, name)))
    tokens = torch.tensor(random.randint(0, case["vocab_size"], (2, 13)))
    output = model(tokens, use_cache=False, output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = [
        float((parameter.grad * torch.tensor(golden_weights.direction(n, tuple(parameter.shape)))).sum())
        for n, parameter in parameters.items()
    ]
    return {
        "config": np.array(json.dumps(fields)),
        "shapes": np.array(json.dumps(shapes)),
        "tokens": tokens.numpy().astype(np.int32),
        "hidden": torch.stack(output.hidden_states).detach().numpy(),
        "logits": output.logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "gradients": np.array(gradients, np.float32),
        "parameters": np.array(json.dumps({n: list(parameter.shape) for n, parameter in parameters.items()})),
        "greedy": greedy(model, random, case["vocab_size"]),
    }


@torch.no_grad()
def greedy(model: torch.nn.Module, random: np.random.RandomState, vocab_size: int) -> np.ndarray:
    """Random prompts and their continuations, in which no token is so nearly the likeliest that rounding decides."""
    rows = []
    while len(rows) < 2:
        tokens, margin = torch.tensor(random.randint(0, vocab_size, (1, 5))), 1.0
        for _ in range(64):
            logits = model(tokens, use_cache=False).logits[:, -1]
            best, second = logits.topk(2).values[0]
            margin = min(margin, float((best - second) / logits.abs().max()))
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        if margin > 1e-4:
            rows.append(tokens.numpy().astype(np.int32)[0])
    return np.stack(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)  # more wait for one another
    MiniMaxLightningAttention.get_slope_rate = slopes_as_released
    for name, case in CASES.items():
        arrays = golden(name, case)
        np.savez_compressed(pathlib.Path(__file__).parent / f"import_{name}.npz", **arrays)
