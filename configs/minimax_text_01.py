"""MiniMax-Text-01 (arXiv 2501.08313): the 456B hybrid, from scratch to a context of 1M tokens.

    python -m lightning_jax.train --config=configs/minimax_text_01.py              # the largest size that fits
    python -m lightning_jax.train --config=configs/minimax_text_01.py:456b,seed    # a size and a recipe

What follows the colon is a size (laptop, 1b, 8b, 456b), a recipe (paper, seed), or both with a comma between.

| size | parameters | active, no embeddings | cost | result to expect |
|---|---|---|---|---|
| laptop | 6.4M | 1.8M | minutes on two CPU cores | validation loss far below the corpus' unigram entropy |
| 1b | 1.3B | 0.13B | one 80 GB GPU, 20B tokens | ours, no published number |
| 8b | 8.2B | 0.8B | eight 80 GB GPUs, 40B tokens | ours; the paper's proxy for data experiments is as large |
| 456b | 456B | 45.9B | 1,500 to 2,500 H800, 11.4T tokens | RULER 0.963 at 4K, 0.910 at 1M; MMLU 88.5 (instruct) |

paper (section 4.2, Table 6). The learning rate warms up over 500 steps to 2e-4 for 7.2T tokens, goes on at 1.3e-4 for
3.2T, and falls exponentially to 3e-5 over 1T; the batch grows from 16M tokens to 32M at 69B, 64M at 790B and 128M at
4.7T (M taken as 2^20). The paper does not say whether the 3.2T lie within the 7.2T; we count them after. The context
then grows to 128K, 512K and 1M, rope theta to 5M and 10M; the last fifth of each of these stages has a tenth of long
questions and answers, and shares move linearly from one stage to the next. Undisclosed, and ours here: Adam's epsilon
and the clipping, the shares of the corpora, how long the shares take to move (the first four fifths), learning rate and
batch of the extension, and the capacity factor of the experts, which drop what exceeds it, counted over groups of 8,192
tokens whatever the length of a row. 456b takes a multiple of 256 chips. Its mesh divides the rows of every stage but
splits none, and those of the extension have no room then: --config.run_stages=context_1024k --mesh=auto
--init_from=FOLDER splits them, each stage a run of its own; the long stages after it, whose rows are 63 times 16,384
tokens, with --config.model.capacity_group=16128.

After it (section 5, Table 7) come sft_short, sft_long, dpo_short and dpo_long, each a run of its own with
--config.run_stages=NAME, --init_from=FOLDER and a --workdir: chats of 8,192 and of 1,032,192 tokens in turn, half of
the long stages' prompts long. Undisclosed, and ours here: beta, Adam's numbers (those of pre-training) and one chat to
a row. Then rl (section 5.4.2), on mathematics whose answers can be verified: GRPO without gradient for tokens of a
large ratio and a negative advantage, and with a divergence of probabilities. All its numbers are undisclosed, and ours.

laptop has sft_short and dpo_short, on generated word problems:

    python -m lightning_jax.train --config=configs/minimax_text_01.py:laptop --config.run_stages=sft_short \
        --init_from=runs/minimax_text_01_laptop --workdir=runs/text_01_sft
    python -m lightning_jax.train --config=configs/minimax_text_01.py:laptop --config.run_stages=dpo_short \
        --init_from=runs/text_01_sft --workdir=runs/text_01_dpo

With seed 0, and the pre-training of MiniMax-M1's laptop size, whose model is the same, the loss on held-out answers was
0.29 nats after 100 steps of sft_short and 0.07 after 350, with which 281 of 400 other problems are solved (standard
error 9). The 72 steps of dpo_short bring the loss of held-out pairs from 0.693 to 0.683, of which 69% are right then,
and 286 problems are solved.

seed. What a widely read summary of the recipe gives instead: 300B tokens, AdamW (0.9, 0.98) with weight decay 0.01,
10,000 steps of warm-up to 1e-4 and a cosine over 500,000, on CommonCrawl, Wikipedia, BookCorpus and news. Its batch of
2,048 sequences on each of 1,024 GPUs contradicts its 300B tokens in 500,000 steps; we keep the latter, with 64
sequences of 8,192. The end of the cosine and the shares are ours, the context's extension is the paper's.

Data of 1b, 8b and 456b, each document a JSON line with its text in "text", all files *.jsonl.zst: for paper
data/minimax_text_01/web, academic, books, code; for seed common_crawl, wikipedia, book_corpus, news; for the extension
long_32k_128k, long_over_128k (documents of such lengths in tokens) and long_qa; for post-training sft,
long_sft ("messages"), preferences, long_preferences ("chosen", "rejected") and rl_prompts ("messages" and
"ground_truth"); and tokenizer.json, the released model's. laptop needs none: its corpora, "text" and "code" at 7:3,
come with every Python installation.
"""

from ml_collections import ConfigDict

from lightning_jax import recipes, selection
from lightning_jax.objectives import algorithms
from lightning_jax.recipes import adamw, batch_size, blend, constant, corpus, cosine, stage, steps, wsd
from lightning_jax.reinforcement.recipes import group_relative, reinforcement, rewards, rollouts

SIZES = ("laptop", "1b", "8b", "456b")  # from the smallest up
RECIPES = ("paper", "seed")

ADAMW = {"paper": adamw(beta2=0.95, weight_decay=0.1), "seed": adamw(beta2=0.98, weight_decay=0.01)}
PRETRAINING = {  # shares: ours
    "paper": {"web": 0.6, "academic": 0.1, "books": 0.1, "code": 0.2},
    "seed": {"common_crawl": 0.7, "wikipedia": 0.1, "book_corpus": 0.1, "news": 0.1},
}
POST_TRAINING = {
    "sft": "conversations",
    "long_sft": "conversations",
    "preferences": "preferences",
    "long_preferences": "preferences",
    "rl_prompts": "conversations",
}
LONG = ("long_32k_128k", "long_over_128k", "long_qa")


def get_config(arg: str = "") -> ConfigDict:
    return selection.select(arg, SIZES, RECIPES, _config)


def _config(size: str, recipe: str) -> ConfigDict:
    pretraining = _published_stages(recipe) if size == "456b" else _small_stages(recipe, size)
    return recipes.run(
        f"minimax_text_01_{size}" + ("_seed" if recipe == "seed" else ""),
        model=_model(size),
        data=recipes.embedded() if size == "laptop" else _data(recipe),
        stages=pretraining | POST_TRAINING_STAGES.get(size, dict)(),
        run_stages=pretraining,
        laptop=size == "laptop",
        replicate=size == "laptop",
        expert_parallel=32 if size == "456b" else 1,
        tensor_parallel=8 if size == "456b" else 1,
    )


def _model(size: str) -> ConfigDict:
    model = recipes.minimax(recipes.MINIMAX[size], router_aux_coefficient=0.01)
    if size == "456b":
        model.update(expert_dispatch="capacity")  # tokens over capacity are dropped; its factor is undisclosed, ours
    return model


def _data(recipe: str) -> ConfigDict:
    corpora = (*PRETRAINING[recipe], *LONG)
    data = recipes.files_on_disk("data/minimax_text_01", corpora, vocab_size=200_064, bos="", eos="<end_of_document>")
    for name, content in POST_TRAINING.items():
        data.corpora[name] = corpus("jsonl", f"data/minimax_text_01/{name}/*.jsonl.zst", content=content)
    data.chat_template = "minimax_m1"
    return data


def _published_stages(recipe: str) -> dict[str, ConfigDict]:
    def pretraining(tokens: float, batch: ConfigDict, schedule: ConfigDict) -> ConfigDict:
        return stage(
            tokens=tokens,
            context_length=8192,
            rope_theta=1e4,
            mixture=PRETRAINING[recipe],
            batch_size=batch,
            optimizer=ADAMW[recipe],
            schedule=schedule,
        )

    micro = 8192
    sizes = [millions * 2**20 for millions in (16, 32, 64, 128)]
    if recipe == "seed":
        batch = batch_size(64 * 8192, micro_batch_tokens=micro)
        schedule = cosine(1e-4, 1e-5, warmup_steps=10_000, decay_steps=500_000)
        stages = {"pretraining": pretraining(300e9, batch, schedule)}
    else:
        ramp = batch_size(*sizes, starts=(0, 69e9, 790e9, 4.7e12), micro_batch_tokens=micro)
        last = batch_size(sizes[-1], micro_batch_tokens=micro)
        decay = wsd(1.3e-4, 3e-5, warmup_steps=0, decay_steps=steps(1e12, sizes[-1]), decay_shape="exponential")
        stages = {
            "constant": pretraining(7.2e12, ramp, constant(2e-4, warmup_steps=500)),
            "constant_lower": pretraining(3.2e12, last, constant(1.3e-4)),
            "fast_decay": pretraining(1e12, last, decay),
        }
    rate = stages[list(stages)[-1]].schedule.final
    return stages | _extension(recipe, rate, sizes[-1])


def _extension(recipe: str, rate: float, batch: int) -> dict[str, ConfigDict]:
    """Table 6. Each stage's first four fifths move to its mixture; the last fifth holds it, with long questions."""
    table = {  # context length: tokens, rope theta, shares of documents up to 32K, to 128K and beyond
        128 * 1024: (300e9, 5e6, (0.3, 0.7, 0.0)),
        512 * 1024: (32e9, 1e7, (0.35, 0.35, 0.3)),
        1024 * 1024: (26e9, 1e7, (0.3, 0.3, 0.4)),
    }
    stages, before = {}, PRETRAINING[recipe]
    for context_length, (tokens, rope_theta, (short, medium, long)) in table.items():
        mixture = blend((short, PRETRAINING[recipe]), (medium, {"long_32k_128k": 1.0}), (long, {"long_over_128k": 1.0}))
        with_questions = blend((0.9, mixture), (0.1, {"long_qa": 1.0}))
        parts = {"": (0.8, (before, mixture)), "_qa": (0.2, with_questions)}
        for suffix, (share, mixtures) in parts.items():
            stages[f"context_{context_length // 1024}k{suffix}"] = stage(
                tokens=share * tokens,
                context_length=context_length,
                rope_theta=rope_theta,
                mixture=mixtures,
                batch_size=batch_size(batch, micro_batch_tokens=context_length),
                optimizer=ADAMW[recipe],
                schedule=constant(rate),
            )
        before = mixture
    return stages


def _post_training() -> dict[str, ConfigDict]:
    """Table 7, but for its last column; a row of preference tuning holds the two chats of a pair."""
    long = 1_032_192
    optimizer = adamw(beta2=0.95, weight_decay=0.1)
    half = {"long_": 0.5, "": 0.5}
    table = {  # chats of up to so many tokens, passes, batch, schedule, shares of long and short prompts
        "sft_short": (8192, 2, 128, cosine(1e-5, 1e-6), {"": 1.0}),
        "sft_long": (long, 2, 80, constant(3e-6), half),
        "dpo_short": (8192, 1, 64, cosine(5e-7, 5e-8), {"": 1.0}),
        "dpo_long": (long, 1, 64, constant(5e-7), half),
    }
    stages = {}
    for name, (length, passes, rows, schedule, shares) in table.items():
        kind, chats = ("sft", 1) if name.startswith("sft") else ("preferences", 2)
        row = chats * length
        stages[name] = stage(
            passes=passes,
            context_length=row,
            rope_theta=1e7,
            mixture={f"{prefix}{kind}": share for prefix, share in shares.items()},
            packing="one_per_row",
            batch_size=batch_size(rows * row, micro_batch_tokens=row),
            optimizer=optimizer,
            schedule=schedule,
            preference={"loss": "dpo", "beta": 0.1, "reference": "cached"} if chats == 2 else None,
        )
    stages["rl"] = _reinforcement()
    return stages


def _laptop_post_training() -> dict[str, ConfigDict]:
    """The first and third column of Table 7 in small, on generated problems: ours throughout."""
    common = {"context_length": 256, "rope_theta": 1e5, "packing": "best_fit", "batch_size": batch_size(8 * 256)}
    return {
        "sft_short": stage(
            passes=1,
            warmup_share=0.05,
            mixture={"arithmetic": 1.0},
            optimizer=ADAMW["paper"],
            schedule=cosine(1e-3, 1e-4),
            **common,
        ),
        "dpo_short": stage(
            passes=0.1,
            warmup_share=0.1,
            mixture={"arithmetic_pairs": 1.0},
            optimizer=ADAMW["paper"],
            schedule=cosine(3e-6, 3e-7),
            preference={"loss": "dpo", "beta": 0.1, "reference": "live"},
            **common,
        ),
    }


def _reinforcement() -> ConfigDict:
    """Section 5.4.2, and but for its three changes of GRPO all of it undisclosed: ours."""
    length, rows, updates = 8192, 512, 4
    return stage(
        tokens=500 * updates * rows * length,
        context_length=length,
        rope_theta=1e7,
        mixture={"rl_prompts": 1.0},
        packing="one_per_row",
        batch_size=batch_size(rows * length, micro_batch_tokens=length),
        optimizer=adamw(beta2=0.95, weight_decay=0.1),
        schedule=constant(1e-6),
        reinforcement=reinforcement(
            algorithms.minimax_text_01(),
            advantages=group_relative(),
            rollouts=rollouts(samples=16, updates=updates, max_new_tokens=6144, slots=2048, dynamic_sampling=False),
            rewards=rewards(math=1.0),
        ),
    )


def _small_stages(recipe: str, size: str) -> dict[str, ConfigDict]:
    """The recipe's curves in small, then a tenth of the tokens at four times the length: ours throughout."""
    num_steps, rows, context_length, micro_rows, peak, warmup_steps = {
        "laptop": (350, 16, 256, 16, 2e-3, 30),
        "1b": (20_000, 128, 8192, 2, 6e-4, 500),
        "8b": (40_000, 128, 8192, 2, 3e-4, 500),
    }[size]
    short = recipes.EMBEDDED_MIXTURE if size == "laptop" else PRETRAINING[recipe]
    longer = short if size == "laptop" else blend((0.3, short), (0.7, {"long_32k_128k": 1.0}))
    batch, micro = rows * context_length, micro_rows * context_length
    if recipe == "paper":
        batches = batch_size(batch // 2, batch, starts=(0, num_steps * batch // 10), micro_batch_tokens=micro)
        decay = {"decay_steps": num_steps // 8, "decay_shape": "exponential"}
        schedule = wsd(peak, peak / 6, warmup_steps=warmup_steps, **decay)
    else:
        batches = batch_size(batch, micro_batch_tokens=micro)
        schedule = cosine(peak, peak / 10, warmup_steps=warmup_steps, decay_steps=num_steps)
    return {
        "pretraining": stage(
            tokens=num_steps * batch,
            context_length=context_length,
            rope_theta=1e4,
            mixture=short,
            batch_size=batches,
            schedule=schedule,
            optimizer=ADAMW[recipe],
        ),
        "context_extension": stage(
            tokens=num_steps * batch // 10,
            context_length=4 * context_length,
            rope_theta=1e5,
            mixture=longer,
            batch_size=batch_size(4 * batch, micro_batch_tokens=max(micro, 4 * context_length)),
            schedule=constant(schedule.final),
            optimizer=ADAMW[recipe],
        ),
    }


POST_TRAINING_STAGES = {"laptop": _laptop_post_training, "456b": _post_training}
