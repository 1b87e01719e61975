"""TinyLlama (arXiv 2401.02385): a 1.1B Llama on up to 3T tokens.

    python -m lightning_jax.train --config=configs/tinyllama.py                   # the largest size that fits
    python -m lightning_jax.train --config=configs/tinyllama.py:1.1b,v1.1_chinese # a size and a recipe

What follows the colon is a size (laptop, 1.1b), a recipe (v1.0, v1.1, v1.1_math_code, v1.1_chinese), or both with a
comma between.

| size | recipe | parameters | cost | result to expect |
|---|---|---|---|---|
| laptop | any | 3.9M | minutes on two CPU cores | validation loss far below the corpus' unigram entropy |
| 1.1b | v1.0 | 1.1B | 16 A100-40G, 24,000 tokens/s each: 90 days | 52.99 |
| 1.1b | v1.1 | 1.1B | 16 A100-40G, 2T tokens | 53.63 |
| 1.1b | v1.1_math_code | 1.1B | 16 A100-40G, 2T tokens | 53.75 |
| 1.1b | v1.1_chinese | 1.1B | 16 A100-40G, 2T tokens | 53.41 |

The result is the mean of HellaSwag, OpenBookQA, WinoGrande, ARC-c, ARC-e, BoolQ and PIQA.

v1.0: 1,430,512 steps of 1,024 rows of 2,048, SlimPajama and StarCoderData at 0.694 to 0.306, a cosine from 4e-4 to
4e-5. Two faults of its code, a learning-rate slip (issue 27) and one of the BOS token (issue 83), are not repeated.

v1.1: 1.5T tokens of SlimPajama in batches of 1.8M; 350B of continual pre-training on the recipe's own mixture, which
moves there over the first 6B; a cooldown of 150B in batches of 7.2M. One cosine spans the three. Undisclosed, and ours
here: the optimizer and the cosine's ends (v1.0's), that the cosine counts steps, and the exact batches, 896 and 3,584
rows.

Data of 1.1b, each document a JSON line with its text in "text", all files *.jsonl.zst: data/tinyllama/slimpajama
(without its GitHub part), starcoderdata, proof_pile_2, skypile; and tokenizer.json, Llama 2's. laptop needs none: its
corpora, "text" and "code" at 7:3, come with every Python installation.
"""

from ml_collections import ConfigDict

from lightning_jax import recipes, selection
from lightning_jax.recipes import Dimensions, adamw, batch_size, cosine, stage, steps

SIZES = ("laptop", "1.1b")  # from the smallest up
RECIPES = ("v1.0", "v1.1", "v1.1_math_code", "v1.1_chinese")

ADAMW = adamw(beta2=0.95, weight_decay=0.1)

MIXTURES = {  # v1.0's; for v1.1 that of its last two stages
    "v1.0": {"slimpajama": 0.693584, "starcoderdata": 0.306416},
    "v1.1": {"slimpajama": 1.0},
    "v1.1_math_code": {"slimpajama": 0.75, "starcoderdata": 0.15, "proof_pile_2": 0.1},
    "v1.1_chinese": {"slimpajama": 0.5, "skypile": 0.5},
}


def get_config(arg: str = "") -> ConfigDict:
    return selection.select(arg, SIZES, RECIPES, _config)


def _config(size: str, recipe: str) -> ConfigDict:
    laptop = size == "laptop"
    stages = _single_stage if recipe == "v1.0" else _three_stages
    return recipes.run(
        f"tinyllama_{size}_{recipe}",
        model=recipes.llama(
            recipes.LLAMA_LAPTOP if laptop else Dimensions(2048, 22, 32, 4, 64, 5632, 32_000),
            tie_embeddings=False,
            initializer="tinyllama",
            initializer_range=0.02,
        ),
        data=recipes.embedded() if laptop else _data(recipe),
        stages=stages(size, recipe),
        laptop=laptop,
        replicate=laptop,
    )


def _data(recipe: str) -> ConfigDict:
    return recipes.files_on_disk("data/tinyllama", MIXTURES[recipe], vocab_size=32_000, bos="<s>", eos="</s>")


def _single_stage(size: str, recipe: str) -> dict[str, ConfigDict]:
    if size == "laptop":
        rows, context_length, num_steps, warmup_steps, micro_rows, peak = 8, 256, 600, 30, 8, 2e-3
    else:
        rows, context_length, num_steps, warmup_steps, micro_rows, peak = 1024, 2048, 1_430_512, 2000, 8, 4e-4
    batch = rows * context_length
    return {
        "pretraining": stage(
            tokens=num_steps * batch,
            context_length=context_length,
            rope_theta=1e4,
            mixture=_mixture(size, recipe),
            batch_size=batch_size(batch, micro_batch_tokens=micro_rows * context_length),
            optimizer=ADAMW,
            schedule=cosine(peak, peak / 10, warmup_steps=warmup_steps, decay_steps=num_steps),
        )
    }


def _three_stages(size: str, recipe: str) -> dict[str, ConfigDict]:
    if size == "laptop":
        rows, context_length, total, warmup_steps, micro_rows, peak = 8, 256, 600 * 8 * 256, 30, 8, 2e-3
    else:
        rows, context_length, total, warmup_steps, micro_rows, peak = 896, 2048, 2e12, 2000, 8, 4e-4
    batch = rows * context_length
    basic, domain = _mixture(size, "v1.1"), _mixture(size, recipe)
    parts = {  # share of the tokens, their mixture, tokens of a batch
        "basic": (0.75, basic, batch),
        "continual_ramp": (0.003, (basic, domain), batch),
        "continual": (0.172, domain, batch),
        "cooldown": (0.075, domain, 4 * batch),
    }
    decay_steps = sum(steps(share * total, tokens) for share, _, tokens in parts.values())
    stages, first_step = {}, 0
    for name, (share, mixture, tokens) in parts.items():
        stages[name] = stage(
            tokens=share * total,
            context_length=context_length,
            rope_theta=1e4,
            mixture=mixture,
            batch_size=batch_size(tokens, micro_batch_tokens=micro_rows * context_length),
            optimizer=ADAMW,
            schedule=cosine(peak, peak / 10, warmup_steps=warmup_steps, decay_steps=decay_steps, first_step=first_step),
        )
        first_step += steps(share * total, tokens)
    return stages


def _mixture(size: str, recipe: str) -> dict[str, float]:
    """On a laptop "text" stands for SlimPajama and "code" for everything else."""
    mixture = MIXTURES[recipe]
    if size == "laptop":
        return {"text": mixture["slimpajama"], "code": 1 - mixture["slimpajama"]}
    return mixture
