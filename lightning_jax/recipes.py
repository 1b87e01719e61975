"""The vocabulary that configs/*.py are written in: models, data and stages.

Every function returns a ConfigDict section of the schema in lightning_jax/config.py that names all of its fields; a
config file states what is particular to its system and nothing twice.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

Tokens = int | float  # 1.5e12 reads better than its digits

EMBEDDED_VOCABULARY = 4096
EMBEDDED_MIXTURE = {"text": 0.7, "code": 0.3}  # TinyLlama's ratio of text to code


class Dimensions(NamedTuple):
    """The sizes that tell models of one architecture apart, as in ModelConfig."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_experts: int = 0


MINIMAX = {
    "laptop": Dimensions(128, 8, 4, 2, 32, 192, EMBEDDED_VOCABULARY, num_experts=8),  # ours
    "1b": Dimensions(1024, 16, 8, 1, 128, 512, 200_064, num_experts=32),  # ours
    # The paper's proxy for data experiments has 8B parameters, 1B active; its dimensions are undisclosed, ours.
    "8b": Dimensions(1536, 24, 16, 2, 128, 2048, 200_064, num_experts=32),
    "456b": Dimensions(6144, 80, 64, 8, 128, 9216, 200_064, num_experts=32),  # published
}
LLAMA_LAPTOP = Dimensions(192, 6, 6, 2, 32, 512, EMBEDDED_VOCABULARY)  # ours


def llama(dimensions: Dimensions, *, tie_embeddings: bool, initializer: str, initializer_range: float) -> ConfigDict:
    """A Llama (arXiv 2407.21783 section 3.2): pre-norm, softmax attention, dense SwiGLU."""
    return ConfigDict(
        {
            **dimensions._asdict(),
            "layer_pattern": ("softmax",),
            "rotary_dim": dimensions.head_dim,
            "rope_scaling": None,
            "lightning_norm_eps": 1e-6,
            "attention_implementation": "auto",
            "lightning_implementation": "auto",
            "experts_per_token": 0,
            "expert_dispatch": "auto",
            "capacity_factor": 1.25,
            "capacity_group": 8192,
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
        }
    )


def minimax(dimensions: Dimensions, *, router_aux_coefficient: float) -> ConfigDict:
    """The architecture of MiniMax-Text-01 and M1: arXiv 2501.08313 section 2 and 4.2, and the released config.json."""
    model = llama(dimensions, tie_embeddings=False, initializer="deepnorm", initializer_range=0.02)
    model.update(
        layer_pattern=("lightning",) * 7 + ("softmax",),
        rotary_dim=dimensions.head_dim // 2,
        experts_per_token=2,
        router_aux_coefficient=router_aux_coefficient,
        norm_placement="post",
        residual_alpha=(2 * dimensions.num_layers) ** 0.25,
    )
    return model


def stage(
    *,
    tokens: Tokens = 0,
    passes: float = 0.0,
    warmup_share: float = 0.0,
    decay_share: float = 1.0,
    context_length: int,
    rope_theta: float,
    mixture: Mapping[str, float] | tuple[Mapping[str, float], Mapping[str, float]],
    packing: str = "split",
    batch_size: ConfigDict,
    optimizer: ConfigDict,
    schedule: ConfigDict,
    reduction: str = "token_mean",
    preference: Mapping[str, str | float] | None = None,
    reward_model: Mapping[str, bool | float] | None = None,
    reinforcement: ConfigDict | None = None,
) -> ConfigDict:
    """A stage; a pair of mixtures moves linearly from the first to the second.

    Its length is so many tokens, or so many passes over its corpora, of whose steps `warmup_share` are warm-up and the
    last `decay_share` the fall of `wsd`. The objective is the next token, unless there are the numbers of another.
    """
    start, end = mixture if isinstance(mixture, tuple) else (mixture, mixture)
    corpora = [name for name in {**start, **end} if start.get(name) or end.get(name)]
    lengths = {"count": passes, "warmup_share": warmup_share, "decay_share": decay_share}
    others = {"preference": preference, "reward_model": reward_model, "policy_gradient": reinforcement}
    return ConfigDict(
        {
            "objective": next((name for name, numbers in others.items() if numbers), "next_token"),
            "reduction": reduction,
            "preference": preference,
            "reward_model": reward_model,
            "reinforcement": reinforcement,
            "tokens": int(tokens),
            "passes": lengths if passes else None,
            "context_length": context_length,
            "rope_theta": rope_theta,
            "mixture": {
                "start": {name: start.get(name, 0.0) for name in corpora},
                "end": {name: end.get(name, 0.0) for name in corpora},
                "packing": packing,
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
    *,
    beta2: float,
    weight_decay: float,
    beta1: float = 0.9,
    epsilon: float = 1e-8,
    decay_mask: str = "all",
    clip_norm: float = 1.0,
) -> ConfigDict:
    """AdamW; gradients are clipped to norm 1 where a recipe has it so or leaves it unsaid."""
    return ConfigDict(
        {
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
            "decay_mask": decay_mask,
            "clip_norm": clip_norm,
            "moment_dtype": "float32",
        }
    )


def wsd(
    peak: float, final: float, *, warmup_steps: int = 0, decay_steps: int = 0, decay_shape: str = "linear"
) -> ConfigDict:
    """Warm up, hold, and fall over the stage's last `decay_steps`; without steps, as a stage in passes has them."""
    return _schedule("wsd", peak, final, warmup_steps, decay_steps, decay_shape)


def cosine(
    peak: float, final: float, *, warmup_steps: int = 0, decay_steps: int = 1, first_step: int = 0
) -> ConfigDict:
    """Warm up, then fall until step `decay_steps`; the stage begins at the schedule's `first_step`.

    Without steps, as a stage in passes has them.
    """
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


def corpus(
    format: str, path: str, *, field: str = "", content: str = "text", turns: str = "all", split: str = ""
) -> dict[str, str]:
    """A corpus; its `content` is "text", "conversations" or "preferences"."""
    return {"format": format, "path": path, "split": split, "field": field, "content": content, "turns": turns}


def files_on_disk(folder: str, corpora: Iterable[str], *, vocab_size: int, bos: str, eos: str) -> ConfigDict:
    """Corpora in folders of `folder`: JSON lines, compressed, with the text in "text"; and a tokenizer.json there."""
    return ConfigDict(
        {
            "corpora": {name: corpus("jsonl", f"{folder}/{name}/*.jsonl.zst", field="text") for name in corpora},
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
            "chat_template": "",
        }
    )


def embedded() -> ConfigDict:
    """What needs no files: "text" and "code", which every Python installation carries, a tokenizer trained on them at
    first use, and generated tasks, "arithmetic" as conversations and "arithmetic_pairs" as preferences.
    """
    tasks = {"arithmetic": "conversations", "arithmetic_pairs": "preferences"}
    return ConfigDict(
        {
            "corpora": {
                **{name: corpus("embedded", name) for name in EMBEDDED_MIXTURE},
                **{name: corpus("generated", "arithmetic", content=content) for name, content in tasks.items()},
            },
            "tokenizer": {
                "kind": "train",
                "path": "",
                "vocab_size": EMBEDDED_VOCABULARY,
                "bos": "",
                "eos": "<|endoftext|>",
            },
            "cache_dir": "",
            "validation_fraction": 0.05,
            "on_bad_record": "skip",
            "max_document_bytes": 2**20,
            "chat_template": "tulu",  # needs no special token but eos
        }
    )


def run(
    name: str,
    *,
    model: ConfigDict,
    data: ConfigDict,
    stages: Mapping[str, ConfigDict],
    run_stages: Iterable[str] = (),
    laptop: bool,
    replicate: bool = False,
    expert_parallel: int = 1,
    tensor_parallel: int = 1,
) -> ConfigDict:
    """A whole run, its stages in the order given, at home on a laptop for minutes or on accelerators for weeks.

    It goes through `run_stages`, or all; the model's own rope theta is that of the last one. With `replicate` every
    device holds all parameters; else they are split over all devices, as many as `expert_parallel` and
    `tensor_parallel` leave, along the hidden size.
    """
    run_stages = tuple(run_stages or stages)
    precision = {"param_dtype": "float32", "compute_dtype": "bfloat16", "loss_chunk": 512, "remat": "full"}
    if laptop:
        precision = {"param_dtype": "float32", "compute_dtype": "float32", "loss_chunk": 128, "remat": "none"}
    return ConfigDict(
        {
            "name": name,
            "size_reason": "",
            "seed": 0,
            "model": {**model, **precision, "rope_theta": stages[run_stages[-1]].rope_theta},
            "lora": None,
            "data": data,
            "mesh": {
                "data": -1 if replicate else 1,
                "fsdp": 1 if replicate else -1,
                "expert": expert_parallel,
                "expert_tensor": 1,
                "sequence": 1,
                "tensor": tensor_parallel,
                "sequence_attention": "ring",
                "gradient_dtype": "compute",
                "moments": "device",
            },
            "stages": dict(stages),
            "run_stages": run_stages,
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
            "hang_minutes": 30.0,
        }
    )
