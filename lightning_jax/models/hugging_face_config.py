"""A Hugging Face config.json to our ModelConfig and back, for the MiniMax and Llama families.

Sources: the released config.json of MiniMax-M1 and MiniMax-Text-01; transformers' `MiniMaxConfig` and `LlamaConfig`,
whose defaults stand where a file leaves a field out.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning_jax.errors import UserError
from lightning_jax.models.config import LayerKind, ModelConfig, RopeScaling

Architecture = Literal["released", "transformers", "llama"]

# model_type -> how the rest of the file is to be read. The first of each is what we write for a model of our own.
MODEL_TYPES: dict[str, Architecture] = {
    "minimax_text_01": "released",
    "minimax_m1": "released",
    "minimax": "transformers",
    "llama": "llama",
}
CLASSES = {
    "minimax_text_01": "MiniMaxText01",
    "minimax_m1": "MiniMaxM1",
    "minimax": "MiniMax",
    "llama": "Llama",
}
GENERATING, SCORING = "ForCausalLM", "ForSequenceClassification"

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
EXPERTS = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
SCALING = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_context_length": "original_max_position_embeddings",
}
# One alpha and one beta here; there, one for each kind of sub-layer.
RESIDUALS = {
    "released": "layernorm_{}_attention_{}".format,
    "transformers": "{}_attn_{}_factor".format,
}
LAYER_KINDS: dict[Architecture, dict[Any, LayerKind]] = {
    "released": {0: "lightning", 1: "softmax"},
    "transformers": {"linear_attention": "lightning", "full_attention": "softmax"},
}
# The models' own code norms the heads of lightning layers with this, whatever rms_norm_eps is.
LIGHTNING_NORM_EPS = 1e-6
# What we cannot compute, and the values with which there is nothing to compute.
INERT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "shared_intermediate_size": (0, [0], None),
    "quantization_config": (None,),
}
# What a checkpoint does not say: how to compute, not what.
NUMERICS = {
    "attention_implementation": "auto",
    "lightning_implementation": "auto",
    "expert_dispatch": "auto",
    "capacity_factor": 1.25,
    "capacity_group": 8192,
    "initializer": "normal",
    "logits_dtype": "float32",
    "loss_chunk": 512,
    "remat": "none",
}


class HuggingFaceError(UserError):
    """A Hugging Face checkpoint that is not one of our models, or a model of ours that is none of theirs."""


def architecture(fields: Mapping[str, Any]) -> Architecture:
    """Which of the configs we know a config.json is. Raises HuggingFaceError where it is none."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise HuggingFaceError(f"config.json: model_type: {model_type!r} is no architecture of ours; known: {known}")
    return MODEL_TYPES[model_type]


def read_config(fields: Mapping[str, Any], dtype: Literal["float32", "bfloat16"]) -> ModelConfig:
    """The model that a config.json describes, its weights kept and multiplied in `dtype`.

    Raises:
        HuggingFaceError: it is no model of ours; a line for every field that is why.
    """
    family = architecture(fields)
    named = fields.get("architectures")
    if isinstance(named, list) and named and str(named[0]).endswith(SCORING):
        raise HuggingFaceError(f"config.json: architectures: {named[0]} is a classifier; only language models are read")
    reader = _Reader(fields)
    for name, values in INERT.items():
        if name in fields and fields[name] not in values:
            reader.problems.append(f"{name}: {fields[name]!r} is not supported; only {values[0]!r} is")
    sizes = {ours: reader.number(theirs, int) for ours, theirs in SIZES.items()}
    heads = sizes["num_heads"]
    head_dim = reader.number("head_dim", int, sizes["hidden_size"] // max(heads, 1))
    theta, scaling = _read_rope(reader, family)
    values: dict[str, Any] = {
        **NUMERICS,
        **sizes,
        "num_kv_heads": reader.number("num_key_value_heads", int, heads),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": reader.number("rms_norm_eps", float, 1e-6 if family == "llama" else 1e-5),
        "lightning_norm_eps": LIGHTNING_NORM_EPS,
        "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
        "initializer_range": reader.number("initializer_range", float, 0.02),
        "router_aux_loss": "huggingface",
        "router_aux_coefficient": reader.number("router_aux_loss_coef", float, 0.0 if family == "llama" else 0.001),
        "param_dtype": dtype,
        "compute_dtype": dtype,
    }
    if family == "llama":
        values |= {"layer_pattern": ("softmax",), "rotary_dim": head_dim, "num_experts": 0, "experts_per_token": 0}
        values |= {"norm_placement": "pre", "residual_alpha": 1.0, "residual_beta": 1.0}
    else:
        values |= {ours: reader.number(theirs, int) for ours, theirs in EXPERTS.items()}
        values |= _read_minimax(reader, family, head_dim, sizes["num_layers"])
    reader.check()
    config = ModelConfig(**values)
    found = config.problems() + [f"rope_scaling.{problem}" for problem in (scaling.problems() if scaling else [])]
    if found:
        raise HuggingFaceError("\n".join(f"config.json: {problem}" for problem in found))
    return config


def _read_minimax(reader: "_Reader", family: Architecture, head_dim: int, num_layers: int) -> dict[str, Any]:
    fields = reader.fields
    name = "attn_type_list" if family == "released" else "layer_types"
    listed = reader.required(name, list) or []
    kinds = [LAYER_KINDS[family].get(kind) if isinstance(kind, int | str) else None for kind in listed]
    if None in kinds or len(kinds) != num_layers:
        known = " or ".join(map(repr, LAYER_KINDS[family]))
        reader.problems.append(f"{name}: not {known} for each of {num_layers} layers")
    share = 1.0 if family == "released" else reader.number("partial_rotary_factor", float, 1.0)
    residual = {}
    for scale in ("alpha", "beta"):
        names = _residual_names(family, scale, set(kinds))
        given = {theirs: reader.number(theirs, float, 1.0) for theirs in names}
        if len(set(given.values())) > 1:
            described = ", ".join(f"{theirs}={value:g}" for theirs, value in given.items())
            reader.problems.append(f"{described}: they differ; one value for all sub-layers is supported")
        residual[f"residual_{scale}"] = next(iter(given.values()))
    post = family == "transformers" or bool(fields.get("postnorm", False))
    return {
        "layer_pattern": _period(kinds),
        "rotary_dim": reader.number("rotary_dim", int, int(head_dim * share)),
        "norm_placement": "post" if post else "pre",
        **residual,
    }


def _residual_names(family: Architecture, scale: str, kinds: set[LayerKind | None]) -> list[str]:
    named = {"lightning": "linear", "softmax": "full"}
    mlp = "layernorm_mlp_{}" if family == "released" else "mlp_{}_factor"
    return [RESIDUALS[family](named[kind], scale) for kind in named if kind in kinds] + [mlp.format(scale)]


def _read_rope(reader: "_Reader", family: Architecture) -> tuple[float, RopeScaling | None]:
    """The rotary base and its scaling: in `rope_parameters`, or in older files in fields of their own."""
    fields = reader.fields
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if fields.get(name) is not None:
            rope |= reader.required(name, dict) or {}
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    reader = _Reader({**rope, "rope_theta": theta}, reader.problems)
    defaults = {"llama": 1e4, "transformers": 1e6, "released": 1e6}
    base = reader.number("rope_theta", float, defaults[family])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3" or family != "llama":
        only = "'default' or 'llama3'" if family == "llama" else "'default'"
        reader.problems.append(f"rope_scaling: rope_type {kind!r} is not supported; only {only} is")
        return base, None
    kinds = RopeScaling.__annotations__
    return base, RopeScaling(**{ours: reader.number(theirs, kinds[ours]) for ours, theirs in SCALING.items()})


def _period(kinds: list[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest pattern whose repetition, cut to their number, gives these layers."""
    length = next((p for p in range(1, len(kinds)) if kinds[p:] == kinds[:-p]), len(kinds))
    return tuple(kinds[:length])


class _Reader:
    """Reads fields and collects what is wrong with them."""

    def __init__(self, fields: Mapping[str, Any], problems: list[str] | None = None):
        self.fields, self.problems = fields, [] if problems is None else problems

    def required(self, name: str, kind: type) -> Any:
        value = self.fields.get(name)
        if not isinstance(value, kind):
            what = "missing" if value is None else f"{value!r} is {type(value).__name__}"
            self.problems.append(f"{name}: {what}; it should be a {kind.__name__}")
            return None
        return value

    def number(self, name: str, kind: type, default: float | None = None) -> Any:
        """A finite number, `kind` int or float; 1 where there is none, and a problem with it."""
        value = self.fields.get(name)
        value = default if value is None else value
        if type(value) in (int, float) and math.isfinite(value) and kind(value) == value:
            return kind(value)
        what = "missing" if value is None else f"{value!r} is wrong"
        self.problems.append(f"{name}: {what}; it should be a number ({kind.__name__})")
        return kind(1)

    def check(self) -> None:
        if self.problems:
            raise HuggingFaceError("\n".join(f"config.json: {problem}" for problem in self.problems))


def write_config(
    config: ModelConfig,
    names: Literal["released", "transformers"] | None,
    original: Mapping[str, Any],
    *,
    dtype: str,
    context_length: int | None,
    scores: bool = False,
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        names: for MiniMax, whose config it shall be; None for that of `original`, transformers' where there is none.
        original: the config.json that the model came with, whose other fields are kept; empty for a model of our own.
        dtype: of the weights.
        context_length: becomes max_position_embeddings where `original` has none.
        scores: whether it is a reward model, with one label in place of a vocabulary.

    Raises:
        HuggingFaceError: no architecture that we know how to write computes this model; a line for every reason.
    """
    known = original.get("model_type")
    if config.num_experts == 0:
        if names:
            raise HuggingFaceError("--names: only MiniMax has other names than one; leave it out")
        family: Architecture = "llama"
    else:
        family = names or MODEL_TYPES.get(known, "transformers")
    if scores and family == "released":
        why = "the code released with MiniMax's models has no class for reward models; --names=transformers"
        raise HuggingFaceError(f"--names: {why}")
    if found := _not_expressible(config, family):
        raise HuggingFaceError("\n".join(f"model.{problem}" for problem in found))
    model_type = known if MODEL_TYPES.get(known) == family else next(t for t, f in MODEL_TYPES.items() if f == family)
    kept = dict(original) if model_type == known else {k: original[k] for k in KEPT_TOKENS if k in original}
    kept.pop("torch_dtype", None)
    written = {
        **kept,
        "architectures": [CLASSES[model_type] + (SCORING if scores else GENERATING)],
        "model_type": model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **_write_rope(config),
    }
    if scores:
        written |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}  # one label: transformers counts them
    if context_length and "max_position_embeddings" not in written:
        written["max_position_embeddings"] = context_length
    if family == "llama":
        return written | {"attention_bias": False, "mlp_bias": False}
    kinds = {kind: theirs for theirs, kind in LAYER_KINDS[family].items()}
    written |= {theirs: getattr(config, ours) for ours, theirs in EXPERTS.items()}
    written["rotary_dim"] = config.rotary_dim
    written["attn_type_list" if family == "released" else "layer_types"] = [kinds[k] for k in config.layer_kinds()]
    for scale, value in (("alpha", config.residual_alpha), ("beta", config.residual_beta)):
        written |= dict.fromkeys(_residual_names(family, scale, {"lightning", "softmax"}), value)
    # transformers has no other placement and ignores the field; vLLM reads both files with the same code.
    written["postnorm"] = config.norm_placement == "post"
    if family == "released":
        written["shared_intermediate_size"] = 0
    return written


KEPT_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """Both spellings: transformers 5 reads `rope_parameters`, what is older the fields of their own."""
    if scaling := config.rope_scaling:
        scaled = {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for ours, theirs in SCALING.items()}
    else:
        scaled = None
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": scaled,
        "rope_parameters": {**(scaled or {"rope_type": "default"}), "rope_theta": config.rope_theta},
    }


def _not_expressible(config: ModelConfig, family: Architecture) -> list[str]:
    """Why the architecture does not compute this model, one line each."""
    found = []

    def needs(field: str, *right: Any) -> None:
        if (value := getattr(config, field)) not in right:
            found.append(f"{field}: {value!r} cannot be written as {family}; only {right[0]!r} can")

    if family == "llama":
        needs("norm_placement", "pre")
        needs("residual_alpha", 1.0)
        needs("residual_beta", 1.0)
        needs("rotary_dim", config.head_dim)
        if set(config.layer_pattern) != {"softmax"}:
            found.append("layer_pattern: lightning layers with a dense feed-forward are no architecture that we know")
        return found
    needs("rope_scaling", None)
    if "lightning" in config.layer_kinds():
        needs("lightning_norm_eps", LIGHTNING_NORM_EPS)
    if family == "transformers":
        needs("norm_placement", "post")
    return found


def caveats(config: ModelConfig, fields: Mapping[str, Any]) -> list[str]:
    """Where the other side's own code is known not to compute the model that config.json describes, one line each."""
    family, found = architecture(fields), []
    if fields["architectures"][0].endswith(SCORING) and fields.get("pad_token_id") is None:
        found.append(
            "the tokenizer has no token for padding that is not an end too: transformers scores one chat at a time; "
            "for more give config.json a pad_token_id with which no chat ends"
        )
    if family == "released":
        found.append(
            "transformers and vLLM read this config.json only with the code that was released with the model: put its "
            "*.py files beside it and trust_remote_code, or export with --names=transformers"
        )
    if family == "transformers" and "softmax" in config.layer_kinds() and config.rotary_dim != config.head_dim:
        found.append(
            f"transformers (5.23 and before) rotates whole heads and ignores rotary_dim={config.rotary_dim}: "
            "its logits will differ; vLLM reads it"
        )
    if family != "llama" and config.tie_embeddings:
        found.append("vLLM does not tie a MiniMax model's embeddings: it will miss lm_head.weight")
    power = config.num_heads & (config.num_heads - 1) == 0
    if family == "transformers" and "lightning" in config.layer_kinds() and not power:
        found.append(
            f"transformers (5.23 and before) has other decays for num_heads={config.num_heads}, which is no power of "
            "two: its logits will differ; vLLM has these"
        )
    return found
