"""The vocabulary that configs/*.py are written in: models by architecture, stages, and the size that fits the machine.

Every function returns a ConfigDict section of the schema in lightning_jax/config.py that names all of its fields; a
config file states what is particular to its system and nothing twice.
"""

import glob
from collections.abc import Callable, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from lightning_jax.config import ConfigError, ModelConfig, nearest_name, parse
from lightning_jax.errors import UserError

Tokens = int | float  # 1.5e12 reads better than its digits

# Share of the devices' memory that weights, moments and gradients may take; the rest is for activations, the logits of
# one chunk and what the compiler keeps.
STATE_SHARE = 0.7


def minimax(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    num_experts: int,
    vocab_size: int,
    router_aux_coefficient: float,
    layer_pattern: tuple[str, ...] = ("lightning",) * 7 + ("softmax",),
) -> ConfigDict:
    """The architecture of MiniMax-Text-01 and M1 (arXiv 2501.08313 section 2; released config.json) in any size."""
    return ConfigDict(
        {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "layer_pattern": layer_pattern,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "rotary_dim": head_dim // 2,
            "rope_scaling": None,
            "lightning_norm_eps": 1e-6,
            "attention_implementation": "auto",
            "lightning_implementation": "auto",
            "intermediate_size": intermediate_size,
            "num_experts": num_experts,
            "experts_per_token": 2,
            "expert_dispatch": "auto",
            "capacity_factor": 1.25,
            "router_aux_loss": "paper",
            "router_aux_coefficient": router_aux_coefficient,
            "norm_placement": "post",
            "residual_alpha": (2 * num_layers) ** 0.25,
            "residual_beta": 1.0,
            "rms_norm_eps": 1e-5,
            "tie_embeddings": False,
            "initializer": "deepnorm",
            "initializer_range": 0.02,
            "logits_dtype": "float32",
            **PRECISION_ON_ACCELERATORS,
        }
    )


def llama(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
    tie_embeddings: bool,
    initializer: str,
    initializer_range: float,
) -> ConfigDict:
    """A Llama (arXiv 2407.21783 section 3.2) in any size: pre-norm, softmax attention, dense SwiGLU."""
    return ConfigDict(
        {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "layer_pattern": ("softmax",),
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "rotary_dim": head_dim,
            "rope_scaling": None,
            "lightning_norm_eps": 1e-6,
            "attention_implementation": "auto",
            "lightning_implementation": "auto",
            "intermediate_size": intermediate_size,
            "num_experts": 0,
            "experts_per_token": 0,
            "expert_dispatch": "auto",
            "capacity_factor": 1.25,
            "router_aux_loss": "paper",
            "router_aux_coefficient": 0.0,
            "norm_placement": "pre",
            "residual_alpha": 1.0,
            "residual_beta": 1.0,
            "rms_norm_eps": 1e-5,
            "tie_embeddings": tie_embeddings,
            "initializer": initializer,
            "initializer_range": initializer_range,
            "logits_dtype": "float32",
            **PRECISION_ON_ACCELERATORS,
        }
    )


MINIMAX_VOCABULARY = 200_064
EMBEDDED_VOCABULARY = 4096
MINIMAX_SIZES = {
    "456b": {  # published
        "hidden_size": 6144,
        "num_layers": 80,
        "num_heads": 64,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9216,
        "num_experts": 32,
        "vocab_size": MINIMAX_VOCABULARY,
    },
    "8b": {  # the paper's proxy for data experiments has 8B parameters, 1B active; its dimensions are undisclosed, ours
        "hidden_size": 1536,
        "num_layers": 24,
        "num_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 128,
        "intermediate_size": 2048,
        "num_experts": 32,
        "vocab_size": MINIMAX_VOCABULARY,
    },
    "1b": {  # ours
        "hidden_size": 1024,
        "num_layers": 16,
        "num_heads": 8,
        "num_kv_heads": 1,
        "head_dim": 128,
        "intermediate_size": 512,
        "num_experts": 32,
        "vocab_size": MINIMAX_VOCABULARY,
    },
    "laptop": {  # ours
        "hidden_size": 128,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "intermediate_size": 192,
        "num_experts": 8,
        "vocab_size": EMBEDDED_VOCABULARY,
    },
}
LLAMA_LAPTOP = {  # ours
    "hidden_size": 192,
    "num_layers": 6,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": EMBEDDED_VOCABULARY,
}
PRECISION_ON_ACCELERATORS = {
    "param_dtype": "float32",
    "compute_dtype": "bfloat16",
    "loss_chunk": 512,
    "remat": "full",
}
PRECISION_ON_CPU = {
    "param_dtype": "float32",
    "compute_dtype": "float32",
    "loss_chunk": 128,
    "remat": "none",
}


def stage(
    *,
    tokens: Tokens,
    context_length: int,
    rope_theta: float,
    mixture: Mapping[str, float] | tuple[Mapping[str, float], Mapping[str, float]],
    batch_size: ConfigDict,
    optimizer: ConfigDict,
    schedule: ConfigDict,
) -> ConfigDict:
    """A next-token stage; a pair of mixtures moves linearly from the first to the second."""
    start, end = mixture if isinstance(mixture, tuple) else (mixture, mixture)
    corpora = [name for name in {**start, **end} if start.get(name) or end.get(name)]
    return ConfigDict(
        {
            "objective": "next_token",
            "tokens": int(tokens),
            "context_length": context_length,
            "rope_theta": rope_theta,
            "mixture": {
                "start": {name: start.get(name, 0.0) for name in corpora},
                "end": {name: end.get(name, 0.0) for name in corpora},
                "packing": "split",
            },
            "batch_size": batch_size,
            "optimizer": optimizer,
            "schedule": schedule,
        }
    )


def batch_size(*tokens: int, starts: Sequence[Tokens] = (0,), micro_batch_tokens: int = 0) -> ConfigDict:
    """Batches of so many tokens, each from its start in consumed tokens of the stage on."""
    return ConfigDict(
        {
            "tokens": tokens,
            "starts": tuple(int(start) for start in starts),
            "micro_batch_tokens": micro_batch_tokens,
        }
    )


def steps(tokens: Tokens, batch_tokens: int) -> int:
    """Steps that consume at least `tokens`, as the stage counts them."""
    return -(-int(tokens) // batch_tokens)


def adamw(
    *, beta2: float, weight_decay: float, beta1: float = 0.9, epsilon: float = 1e-8, decay_mask: str = "all"
) -> ConfigDict:
    """AdamW with gradients clipped to norm 1, as all these recipes have it or leave it unsaid."""
    return ConfigDict(
        {
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
            "decay_mask": decay_mask,
            "clip_norm": 1.0,
            "moment_dtype": "float32",
        }
    )


def wsd(peak: float, final: float, *, warmup_steps: int, decay_steps: int, decay_shape: str = "linear") -> ConfigDict:
    """Warm up, hold, and fall over the stage's last `decay_steps`."""
    return _schedule("wsd", peak, final, warmup_steps, decay_steps, decay_shape)


def cosine(peak: float, final: float, *, warmup_steps: int, decay_steps: int, first_step: int = 0) -> ConfigDict:
    """Warm up, then fall until step `decay_steps`; the stage begins at the schedule's `first_step`."""
    return _schedule("cosine", peak, final, warmup_steps, decay_steps, "cosine", first_step)


def constant(rate: float, *, warmup_steps: int = 0) -> ConfigDict:
    """Warm up and hold."""
    return _schedule("constant", rate, rate, warmup_steps, 0, "linear")


def _schedule(
    kind: str, peak: float, final: float, warmup_steps: int, decay_steps: int, decay_shape: str, first_step: int = 0
) -> ConfigDict:
    return ConfigDict(
        {
            "kind": kind,
            "peak": _six_digits(peak),
            "final": _six_digits(final),
            "warmup_steps": warmup_steps,
            "decay_steps": decay_steps,
            "decay_shape": decay_shape,
            "first_step": first_step,
        }
    )


def _six_digits(rate: float) -> float:
    """6e-4 / 10 as one writes it."""
    return float(f"{rate:.6g}")


def blend(*parts: tuple[float, Mapping[str, float]]) -> dict[str, float]:
    """One mixture out of several, each with its share of the whole."""
    mixture: dict[str, float] = {}
    for share, corpora in parts:
        for corpus, weight in corpora.items():
            mixture[corpus] = round(mixture.get(corpus, 0.0) + share * weight, 12)
    return mixture


def files_on_disk(folder: str, corpora: Mapping[str, str], *, vocab_size: int, bos: str, eos: str) -> ConfigDict:
    """Corpora in `folder`, each a glob of JSON lines with the text in "text", and the tokenizer.json beside them."""
    return ConfigDict(
        {
            "corpora": {
                name: {"format": "jsonl", "path": f"{folder}/{path}", "split": "", "field": "text"}
                for name, path in corpora.items()
            },
            "tokenizer": {
                "kind": "file",
                "path": f"{folder}/tokenizer.json",
                "vocab_size": vocab_size,
                "bos": bos,
                "eos": eos,
            },
            "cache_dir": "",
            "validation_fraction": 0.0005,
            "on_bad_record": "skip",
            "max_document_bytes": 64 * 2**20,
        }
    )


def embedded() -> ConfigDict:
    """The corpora every Python installation carries, "text" and "code", and a tokenizer trained at first use."""
    return ConfigDict(
        {
            "corpora": {
                name: {"format": "embedded", "path": name, "split": "", "field": ""} for name in EMBEDDED_MIXTURE
            },
            "tokenizer": {
                "kind": "train",
                "path": "",
                "vocab_size": EMBEDDED_VOCABULARY,
                "bos": "",
                "eos": "<|endoftext|>",
            },
            "cache_dir": "",
            "validation_fraction": 0.02,
            "on_bad_record": "skip",
            "max_document_bytes": 2**20,
        }
    )


EMBEDDED_MIXTURE = {"text": 0.7, "code": 0.3}  # TinyLlama's ratio of text to code


def run(
    name: str, *, model: ConfigDict, data: ConfigDict, mesh: ConfigDict, stages: Mapping[str, ConfigDict], laptop: bool
) -> ConfigDict:
    """A whole run, its stages in the order given; saved and evaluated as suits a laptop's minutes or a pod's weeks.

    The model's own rope theta is the last stage's.
    """
    return ConfigDict(
        {
            "name": name,
            "size_reason": "",
            "seed": 0,
            "model": {**model, "rope_theta": stages[list(stages)[-1]].rope_theta},
            "data": data,
            "mesh": mesh,
            "stages": dict(stages),
            "run_stages": tuple(stages),
            "checkpoints": {
                "every_steps": 100 if laptop else 1000,
                "every_minutes": 0.0 if laptop else 30.0,
                "keep_newest": 2,
                "keep_every_steps": 0 if laptop else 20_000,
                "max_failures": 3,
            },
            "metrics": {
                "log_every_steps": 10,
                "evaluate_every_steps": 100 if laptop else 1000,
                "evaluation_batches": 4 if laptop else 16,
                "tensorboard": True,
                "sample_prompts": ("Return the", "def main(", "import "),
                "sample_tokens": 64,
                "sample_temperature": 0.7,
                "flops_convention": "model",
            },
            "max_nonfinite_steps": 5,
        }
    )


def mesh(*, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> ConfigDict:
    """Devices per axis of parallelism; -1 takes all that are left."""
    return ConfigDict({"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor})


def select(
    argument: str, sizes: Sequence[str], recipes: Sequence[str], build: Callable[[str, str], ConfigDict]
) -> ConfigDict:
    """The config that `argument` names: a size, a recipe, or both as "size,recipe", in any order.

    Without a recipe it is the first of `recipes`; without a size the largest of `sizes`, which are listed from the
    smallest up, that fits this machine. Raises UserError for a name that is neither.
    """
    names = [name for name in argument.split(",") if name]
    unknown = [name for name in names if name not in (*sizes, *recipes)]
    if unknown:
        raise UserError(
            f"{unknown[0]!r} is neither a size nor a recipe; {nearest_name(unknown[0], [*sizes, *recipes])}"
        )
    chosen = {kind: [name for name in names if name in valid] for kind, valid in (("size", sizes), ("recipe", recipes))}
    for kind, names in chosen.items():
        if len(names) > 1:
            raise UserError(f"{argument!r} names more than one {kind}; take one of {', '.join(names)}")
    recipe = chosen["recipe"][0] if chosen["recipe"] else recipes[0]
    if chosen["size"]:
        size, reason = chosen["size"][0], f"{chosen['size'][0]}: asked for"
    else:
        size, reason = largest_fitting({size: build(size, recipe) for size in sizes}, jax.devices())
    config = build(size, recipe)
    config.size_reason = reason
    return config


def largest_fitting(configs: Mapping[str, ConfigDict], devices: Sequence[jax.Device]) -> tuple[str, str]:
    """The last of `configs`, from the smallest up, that fits the devices and whose data are here, and why in one line.

    Weights, Adam's moments and gradients, split over all devices, may take STATE_SHARE of their memory. Devices that
    do not tell their memory, as CPUs, take "laptop". Raises UserError where nothing fits.
    """
    local = next(device for device in devices if device.process_index == jax.process_index())
    machine = f"{len(devices)} x {local.device_kind}"
    limit = (local.memory_stats() or {}).get("bytes_limit")
    if local.platform == "cpu" or limit is None:
        return "laptop", f"laptop: {machine}, no accelerator"
    memory = limit * len(devices)
    obstacles = {name: _obstacle(config, memory) for name, config in configs.items()}
    fitting = [name for name, obstacle in obstacles.items() if not obstacle]
    if not fitting:
        raise UserError(f"no size fits {machine}: " + "; ".join(f"{name} {why}" for name, why in obstacles.items()))
    larger = list(configs)[list(configs).index(fitting[-1]) + 1 :]
    reason = f"{fitting[-1]}: the largest for {machine}, {memory / 2**30:.0f} GiB"
    return fitting[-1], "; ".join([reason, *(f"{name} {obstacles[name]}" for name in larger)])


def training_bytes(config: ConfigDict) -> int:
    """Bytes of weights, gradients and Adam's moments."""
    model, problems = parse(ModelConfig, config.model)
    if problems:
        raise ConfigError(problems)
    moments = max(model.optimizer_bytes(stage.optimizer.moment_dtype) for stage in config.stages.values())
    return 2 * model.weight_bytes(model.param_dtype) + moments


def _obstacle(config: ConfigDict, memory: int) -> str:
    """What keeps `config` from this machine, "" for nothing."""
    needed = training_bytes(config)
    if needed > STATE_SHARE * memory:
        return f"needs {needed / 2**30:.0f} GiB for weights, moments and gradients"
    paths = [corpus.path for corpus in config.data.corpora.values() if corpus.format != "embedded"]
    missing = [path for path in [*paths, config.data.tokenizer.path] if path and not glob.glob(path)]
    return f"needs {missing[0]}, which is not here" if missing else ""
