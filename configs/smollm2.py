"""SmolLM2 (arXiv 2502.02737): small Llamas on up to 11T tokens, with warmup-stable-decay.

    python -m lightning_jax.train --config=configs/smollm2.py            # the largest size that fits
    python -m lightning_jax.train --config=configs/smollm2.py:135m,seed  # a size and a recipe

What follows the colon is a size (laptop, 135m, 360m, 1.7b), a recipe (paper, seed), or both with a comma between.

| size | parameters | cost | result to expect |
|---|---|---|---|
| laptop | 3.1M | minutes on two CPU cores | validation loss far below the corpus' unigram entropy |
| 135m | 134,515,008 | 64 H100, 2.1T tokens | no number quoted here |
| 360m | 361,821,120 | 128 H100, 4.1T tokens | no number quoted here |
| 1.7b | 1,711,376,384 | 256 H100, 11T tokens | HellaSwag 68.7, ARC 60.5, PIQA 77.6, GSM8K 31.1, MATH 11.6 |

paper (sections 4 and 6, and the released training configs). AdamW (0.9, 0.95), weight decay 0.01, 2,000 steps of
warm-up, linear decay to 0 over the last 20% of the steps (135m, 360m) or 10% (1.7b, from step 4,716,000 of 5,240,000,
which is shortly before its fourth stage); batches of 2^20, 1.5 x 2^20 and 2^21 tokens. 1.7b has four stages with more
code and math in each; its context grows from 2K to 8K on the last 75B tokens, in a branch: stage context_8k stands for
stage_4_end, which --config.run_stages=stage_1,stage_2,stage_3,stage_4,stage_4_end takes instead. Undisclosed, and ours
here: the shares within the math of stages 3 and 4, within the web of stage 4 and within the small models' corpora, and
the learning rate of the branch, which goes on with the decay.

sft and dpo (section 5, and the released configs) are runs of their own, each in a folder of its own:

    python -m lightning_jax.train --config=configs/smollm2.py:laptop --config.run_stages=sft \
        --init_from=runs/smollm2_laptop --workdir=runs/smollm2_sft
    python -m lightning_jax.train --config=configs/smollm2.py:laptop --config.run_stages=dpo \
        --init_from=runs/smollm2_sft --workdir=runs/smollm2_dpo

sft: 2 passes over SmolTalk (135m, 360m: smol-smoltalk) in rows
of 8,192 tokens, 128 of them a batch, a cosine from 3e-4 (small sizes: 1e-3) after 10% of warm-up. dpo: 2 passes over
UltraFeedback, 128 pairs of chats of up to 1,024 tokens, beta 0.5, a cosine from 1e-6 (the released config of 1.7b makes
3). Template: ChatML; its default system message is left out. Adam's numbers and clipping are the defaults of the
library that was used. On laptop, with seed 0 and after 200 steps of pre-training, the loss on held-out answers was 0.29
nats after 100 steps of sft and 0.13 after 350, with which 134 of 400 other problems are solved (standard error 9). The
72 steps of dpo bring the loss of held-out pairs from 0.693 to 0.681, of which 74% are right then, and 133 problems are
still solved: 125 with steps of 3e-6, 107 with 1e-5, though no more pairs are right with them.

seed. A widely read summary of the recipe has instead beta2 0.999, batches of 2M tokens and a decay over the last 10%
for every size, and math and code in the small models' decay; 1.7b's four stages keep their mixtures. Its sft and dpo
hold their rate before they fall, over the last 10% as well (it gives no number), and its sft has 3e-4 for every size.

Data of 135m, 360m and 1.7b, each document a JSON line with its text in "text", all files *.jsonl.zst: data/smollm2/
fineweb_edu, dclm, starcoderdata, stack_edu, jupyter, infimm_webmath, owm, infiwebmath_3plus, finemath, finemath_4plus,
aug_gsm8k, cosmopedia_v2, dolma_books, as far as the size names them, dclm_long and fineweb_edu_long (documents of 8K
tokens and more); for sft and dpo, as released in Parquet, smoltalk ("messages") and ultrafeedback ("chosen",
"rejected"); and tokenizer.json, SmolLM2's. laptop needs none: its corpora, "text" and "code" at 7:3, come with
every Python installation.
"""

from ml_collections import ConfigDict

from lightning_jax import recipes, selection
from lightning_jax.recipes import Dimensions, adamw, batch_size, blend, corpus, cosine, stage, steps, wsd

SIZES = ("laptop", "135m", "360m", "1.7b")  # from the smallest up
RECIPES = ("paper", "seed")

Mixture = dict[str, float]

ADAMW = {"paper": adamw(beta2=0.95, weight_decay=0.01), "seed": adamw(beta2=0.999, weight_decay=0.01)}

STAGE_1 = {"fineweb_edu": 0.54, "dclm": 0.36, "starcoderdata": 0.1}
STAGE_2 = {"fineweb_edu": 0.45, "dclm": 0.3, "starcoderdata": 0.2, "owm": 0.05}
STAGE_3 = {
    "fineweb_edu": 0.296,
    "dclm": 0.444,
    "stack_edu": 0.14,
    "jupyter": 0.02,
    "infimm_webmath": 0.07,
    "owm": 0.03,
}
STAGE_4 = {
    "fineweb_edu": 0.232,
    "dclm": 0.348,
    "stack_edu": 0.24,
    "infiwebmath_3plus": 0.0695,
    "finemath_4plus": 0.0695,
    "owm": 0.0008,
    "aug_gsm8k": 0.0002,
    "cosmopedia_v2": 0.04,
}
LONG = {"dclm_long": 0.25, "fineweb_edu_long": 0.25, "dolma_books": 0.5}
SMALL_STABLE = {"dclm": 0.95, "cosmopedia_v2": 0.05}  # the seed's, before math and code come
CHATS = {"smoltalk": "conversations", "ultrafeedback": "preferences"}  # smol-smoltalk for 135m and 360m
SMALL = {"dclm": 0.74, "stack_edu": 0.12, "infimm_webmath": 0.06, "finemath": 0.04, "cosmopedia_v2": 0.04}


def get_config(arg: str = "") -> ConfigDict:
    return selection.select(arg, SIZES, RECIPES, _config)


def _config(size: str, recipe: str) -> ConfigDict:
    laptop = size == "laptop"
    pretraining = _stages(size, recipe)
    dimensions, deviation = {
        "laptop": (recipes.LLAMA_LAPTOP, 0.05),
        "135m": (Dimensions(576, 30, 9, 3, 64, 1536, 49_152), 0.041667),
        "360m": (Dimensions(960, 32, 15, 5, 64, 2560, 49_152), 0.03227),
        "1.7b": (Dimensions(2048, 24, 32, 32, 64, 8192, 49_152), 0.02),
    }[size]
    return recipes.run(
        f"smollm2_{size}" + ("_seed" if recipe == "seed" else ""),
        model=recipes.llama(dimensions, tie_embeddings=True, initializer="normal", initializer_range=deviation),
        data=recipes.embedded() if laptop else _data(pretraining),
        stages=pretraining | _post_training(size, recipe),
        run_stages=(name for name in pretraining if name != "stage_4_end"),
        laptop=laptop,
        replicate=size != "1.7b",
    )


def _data(stages: dict[str, ConfigDict]) -> ConfigDict:
    corpora = sorted({corpus for each in stages.values() for corpus in each.mixture.end})
    data = recipes.files_on_disk("data/smollm2", corpora, vocab_size=49_152, bos="", eos="<|endoftext|>")
    for name, content in CHATS.items():
        data.corpora[name] = corpus("parquet", f"data/smollm2/{name}/*.parquet", content=content)
    data.chat_template = "chatml"
    return data


def _stages(size: str, recipe: str) -> dict[str, ConfigDict]:
    """One schedule over all steps, cut where stages meet."""
    rows, micro_rows, context_length, peak, warmup_steps = {
        "laptop": (8, 8, 256, 2e-3, 30),
        "135m": (512, 8, 2048, 3e-3, 2000),
        "360m": (768, 6, 2048, 3e-3, 2000),
        "1.7b": (1024, 4, 2048, 5e-4, 2000),
    }[size]
    if recipe == "seed" and size in ("135m", "360m"):
        rows = 1024
    batch = rows * context_length
    decay_steps, parts = _parts(size, recipe, batch)
    total_steps = max(end for _, end, _ in parts.values())

    def rate(step: int) -> float:
        return peak * min(1.0, (total_steps - step) / decay_steps)

    stages = {}
    for name, (start, end, mixture) in parts.items():
        extends = name == "context_8k"
        stages[name] = stage(
            tokens=(end - start) * batch,
            context_length=8192 if extends else context_length,
            rope_theta=1.3e5 if extends else 1e4,
            mixture=mixture,
            batch_size=batch_size(batch, micro_batch_tokens=micro_rows * context_length),
            optimizer=ADAMW[recipe],
            schedule=wsd(
                rate(start),
                rate(end),
                warmup_steps=0 if start else warmup_steps,
                decay_steps=max(0, end - max(start, total_steps - decay_steps)),
            ),
        )
    return stages


def _post_training(size: str, recipe: str) -> dict[str, ConfigDict]:
    """Section 5 of the paper and the released configs; the laptop's lengths are ours."""
    laptop, large = size == "laptop", size == "1.7b"
    schedule, decay_share = {"paper": (cosine, 1.0), "seed": (wsd, 0.1)}[recipe]
    sft_rate = 3e-4 if large or (recipe == "seed" and not laptop) else 1e-3
    chats, pairs = ("arithmetic", "arithmetic_pairs") if laptop else CHATS
    length, pair, rows = (256, 256, 8) if laptop else (8192, 2 * 1024, 128)
    theta = 1e4 if laptop else 1.3e5 if large else 1e5
    optimizer = adamw(beta2=0.999, weight_decay=0.0)
    return {
        "sft": stage(
            passes=1 if laptop else 2,
            warmup_share=0.1,
            decay_share=decay_share,
            context_length=length,
            rope_theta=theta,
            mixture={chats: 1.0},
            packing="best_fit",
            batch_size=batch_size(rows * length, micro_batch_tokens=0 if laptop else length),
            optimizer=optimizer,
            schedule=schedule(sft_rate, 0.0),
        ),
        "dpo": stage(
            passes=0.1 if laptop else 2,
            warmup_share=0.1,
            decay_share=decay_share,
            context_length=pair,
            rope_theta=theta,
            mixture={pairs: 1.0},
            packing="best_fit" if laptop else "one_per_row",
            batch_size=batch_size(rows * pair, micro_batch_tokens=0 if laptop else pair),
            optimizer=optimizer,
            schedule=schedule(1e-6, 0.0),
            preference={"loss": "dpo", "beta": 0.5, "reference": "live" if laptop else "cached"},
        ),
    }


def _parts(size: str, recipe: str, batch: int) -> tuple[int, dict[str, tuple[int, int, Mixture]]]:
    """(steps of the decay, name -> first step, last step and mixture of each stage)."""
    if size == "1.7b":
        end, branch = 5_240_000, 5_240_000 - steps(75e9, batch)
        ends = [steps(tokens, batch) for tokens in (6e12, 8e12, 10e12)]
        return 524_000, {
            "stage_1": (0, ends[0], STAGE_1),
            "stage_2": (ends[0], ends[1], STAGE_2),
            "stage_3": (ends[1], ends[2], STAGE_3),
            "stage_4": (ends[2], branch, STAGE_4),
            "stage_4_end": (branch, end, STAGE_4),
            "context_8k": (branch, end, blend((0.6, STAGE_4), (0.4, LONG))),
        }
    if recipe == "paper":
        total = {"laptop": 600, "135m": 2_000_000, "360m": 2_600_000}[size]
        return total // 5, {"pretraining": (0, total, recipes.EMBEDDED_MIXTURE if size == "laptop" else SMALL)}
    total = 600 if size == "laptop" else steps({"135m": 2e12, "360m": 4e12}[size], batch)
    stable, decay = ({"text": 1.0}, recipes.EMBEDDED_MIXTURE) if size == "laptop" else (SMALL_STABLE, SMALL)
    decay_steps = total // 10
    return decay_steps, {"stable": (0, total - decay_steps, stable), "decay": (total - decay_steps, total, decay)}
