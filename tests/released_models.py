"""Tiny Hugging Face folders with random weights, written by the `safetensors` library."""

import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
TIED = LLAMA | {
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
ALPHA = 10**0.25
RELEASED = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "model_type": "minimax_m1",
    "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000000,
    "max_position_embeddings": 10240000,
    "tie_word_embeddings": False,
    "attn_type_list": [0, 0, 1, 0, 0],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "postnorm": True,
    "shared_intermediate_size": 0,
    "router_aux_loss_coef": 0.001,
    **{f"layernorm_{part}_alpha": ALPHA for part in ("full_attention", "linear_attention", "mlp")},
    **{f"layernorm_{part}_beta": 1.0 for part in ("full_attention", "linear_attention", "mlp")},
    "bos_token_id": None,
    "eos_token_id": None,
}
PORT = {
    **{name: value for name, value in RELEASED.items() if not name.startswith(("layernorm", "attn", "auto", "post"))},
    "architectures": ["MiniMaxForCausalLM"],
    "model_type": "minimax",
    "rotary_dim": 8,
    "layer_types": [["linear_attention", "full_attention"][kind] for kind in RELEASED["attn_type_list"]],
    **{f"{part}_alpha_factor": ALPHA for part in ("full_attn", "linear_attn", "mlp")},
    **{f"{part}_beta_factor": 1.0 for part in ("full_attn", "linear_attn", "mlp")},
}
CONFIGS = {"llama": LLAMA, "tied": TIED, "released": RELEASED, "port": PORT}
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def shapes(fields: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, written down once more and by hand."""
    V, D, F = fields["vocab_size"], fields["hidden_size"], fields["intermediate_size"]
    A, kv = (fields[name] * fields["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not fields["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, D)
    kinds = fields.get("attn_type_list", fields.get("layer_types", [1] * fields["num_hidden_layers"]))
    for layer, kind in enumerate(kinds):
        own = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        if kind in (1, "full_attention"):
            own |= {"self_attn.q_proj.weight": (A, D), "self_attn.o_proj.weight": (D, A)}
            own |= {"self_attn.k_proj.weight": (kv, D), "self_attn.v_proj.weight": (kv, D)}
        else:
            own |= {"self_attn.qkv_proj.weight": (3 * A, D), "self_attn.output_gate.weight": (A, D)}
            own |= {"self_attn.norm.weight": (A,), "self_attn.out_proj.weight": (D, A)}
        if experts := fields.get("num_local_experts"):
            own["block_sparse_moe.gate.weight"] = (experts, D)
            for expert in range(experts):
                for name, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                    own[f"block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        else:
            own |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return found


def weights(fields: dict, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors; the router is float32, as released."""
    random = np.random.default_rng(seed)
    kinds = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    return {
        name: (random.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.1) + (len(shape) == 1)).astype(
            np.float32 if name.endswith("moe.gate.weight") else kinds[dtype]
        )
        for name, shape in shapes(fields).items()
    }


def write(folder: pathlib.Path, fields: dict, tensors: dict[str, np.ndarray], *, shards: int = 1) -> pathlib.Path:
    """A folder of a model with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path, size: int = 48) -> None:
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"] + [chr(97 + i) for i in range(size - 3)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.6}))
