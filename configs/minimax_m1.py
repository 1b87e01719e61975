"""MiniMax-M1 (arXiv 2506.13585): lightning attention in 7 of 8 layers, a mixture of experts, DeepNorm post-norm.

    python -m lightning_jax.train --config=configs/minimax_m1.py             # the largest size that fits this machine
    python -m lightning_jax.train --config=configs/minimax_m1.py:laptop      # insists; so do 1b, 8b, 456b

What follows the colon is a size. 456b is the published model with the paper's continual pre-training (section 2.1) and
its extension of the context to 1M tokens in four stages. The other sizes have the same architecture in small, train
from random weights, and fall from a constant learning rate as the paper does; their dimensions and stages are ours.

| size | parameters | active, no embeddings | cost | result to expect |
|---|---|---|---|---|
| laptop | 6.4M | 1.8M | minutes on two CPU cores | validation loss far below the corpus' unigram entropy |
| laptop_softmax | 6.4M (0.5% more) | 1.8M | the same | its loss is not ahead of laptop's at equal steps |
| 1b | 1.3B | 0.13B | one 80 GB GPU, 20B tokens | ours, no published number |
| 8b | 8.2B | 0.8B | eight 80 GB GPUs, 40B tokens | ours, no published number |
| 456b | 456B | 45.9B | 512 chips of 95 GB; 7.5T tokens | after RL: AIME 2024 86.0, MRCR 1M 56.2 (80K budget) |

laptop_softmax is the ablation: softmax attention in all eight layers, with five full heads of 32 instead of four
grouped ones, so that a layer's attention has exactly a lightning layer's matrices.

456b, what the paper gives: 7.5T tokens, 8e-5 for 2.5T then down to 8e-6 over 5T, 70% STEM, code, books and reasoning,
a smaller auxiliary loss than Text-01, 32K to 1M tokens in four stages, AdamW with beta2 0.95 and epsilon 1e-15. What it
leaves undisclosed, and ours here: the shape of the decay, batch sizes, shares within the 70%, the auxiliary coefficient
(the released config.json's), the extension's lengths between 32K and 1M, its tokens, learning rate and mixtures, weight
decay and clipping (Text-01's weight decay). The paper starts from Text-01's weights, here --init_from=FOLDER with the
folder of a Text-01 run. It takes a multiple of 256 chips. Its mesh divides the rows of every stage but splits none,
and those from 128K on have no room then: --config.run_stages=context_1024k --mesh=auto --init_from=FOLDER splits them,
each stage a run of its own. An expert's places are counted over groups of 8,192 tokens, whatever the length of a row.

After pre-training comes sft: on laptop as a stage of the run, half a minute on 4,500 generated questions for the legs
of animals, of whose demonstrations most are mistaken (data/README.md); on 456b by --config.run_stages=sft
--init_from=FOLDER, on long chains of thought, about 60% of them mathematics and code (section 2.2). Its length, batch
and learning rate are undisclosed, and here those of Text-01's first such stage.

Then reinforcement learning with CISPO (section 3): importance weights capped and no token left out, advantages of
groups, no divergence from a reference, 16 updates on the rollouts of one policy, DAPO's dynamic sampling and overlong
penalty, the head in fp32, AdamW (0.9, 0.95) with epsilon 1e-15, and an end to completions after 3,000 tokens in a row
of a probability above 0.99. On laptop it is rl, the run's last stage, on the same questions: with seed 0 the
reward of sampled answers went from 0.59 to 0.97 in 64 updates, and that of the likeliest answers to held-out questions,
which are about the same animals, from 0.27 to 1.00. The task is chosen to have something for a reward to teach: the
demonstrations have taught the right answers too, but not as the likeliest. On 456b it is rl, by
--config.run_stages=rl --init_from=FOLDER: completions of up to 40K tokens, then 48K, 56K, 64K, 72K and 80K, each limit
raised when the perplexity of completions has converged and the 99th percentile of their lengths is near it (section 5).
Prompts of mathematics, logic and code at first, then general ones mixed in gradually (section 4); a prompt of
`pass_rate` 0, or 0.9 and more, is left out. Rewards by each record's `dataset`: math, logic and code are verified,
general_graded and general judged by a language model, with a ground truth and against a reference response; and a tenth
for the form. Undisclosed, and ours here: the cap of 5 (ScaleRL's, arXiv 2510.13786), 16 completions of 512
prompts and the buffer of 4,096 tokens (DAPO's), learning rate, weight decay, clipping and steps, what counts as
converged and as near, the share of general prompts, the weight of the form; and the mean over tokens at all lengths,
where section 5 combines losses of samples and of tokens in a way that it does not say
(lightning_jax/reinforcement/README.md). Not here: the paper's software tasks, which need containers.

Data of 1b, 8b and 456b, each document a JSON line with its text in "text", all files *.jsonl.zst: data/minimax_m1/web,
stem, code, books, reasoning, and for the extension long_32k_128k and long_over_128k (documents of such lengths in
tokens); for sft long_cot, whose lines have "messages"; for rl rl_rules and rl_general, with "messages", "dataset" and
what its verifier reads (lightning_jax/rewards/README.md), and the judge at http://localhost:8000/v1; and
tokenizer.json, the released model's. laptop needs none: its corpora, "text" and "code" at 7:3, come with every Python
installation.
"""

from ml_collections import ConfigDict

from lightning_jax import recipes, selection
from lightning_jax.objectives import algorithms
from lightning_jax.recipes import adamw, batch_size, blend, constant, corpus, cosine, stage, steps, wsd
from lightning_jax.reinforcement.recipes import group_relative, reinforcement, rewards, rollouts

SIZES = ("laptop_softmax", "laptop", "1b", "8b", "456b")  # from the smallest up

M1_ADAMW = adamw(beta2=0.95, epsilon=1e-15, weight_decay=0.1)  # weight decay undisclosed; Text-01's
RL_ADAMW = adamw(beta2=0.95, epsilon=1e-15, weight_decay=0.0)  # section 3.2; weight decay and clipping undisclosed
JUDGE = {
    "url": "http://localhost:8000/v1",
    "model": "judge",
    "api_key_variable": "",
    "temperature": 0.0,
    "max_tokens": 2048,
    "seconds": 300.0,
    "threads": 64,
}
LAPTOP_RL_STEPS = 64  # eight to a generation

PRETRAINING = {"web": 0.3, "stem": 0.2, "code": 0.25, "books": 0.1, "reasoning": 0.15}  # within the 70%: ours
LONG = ("long_32k_128k", "long_over_128k")


def get_config(arg: str = "") -> ConfigDict:
    return selection.select(arg, SIZES, ("paper",), _config)


def _config(size: str, recipe: str) -> ConfigDict:
    laptop, published = size.startswith("laptop"), size == "456b"
    stages = STAGES[size]()
    return recipes.run(
        f"minimax_m1_{size}",
        model=_model(size),
        data=_laptop_data() if laptop else _data(),
        stages=stages | ({"sft": _long_cot(), "rl": _published_reinforcement()} if published else {}),
        run_stages=stages,
        laptop=laptop,
        replicate=laptop,
        expert_parallel=32 if published else 1,
        tensor_parallel=8 if published else 1,
    )


def _model(size: str) -> ConfigDict:
    coefficient = 0.001 if size == "456b" else 0.01  # 0.01 is Text-01's
    model = recipes.minimax(recipes.MINIMAX[size.removesuffix("_softmax")], router_aux_coefficient=coefficient)
    if size == "laptop_softmax":
        model.update(layer_pattern=("softmax",), num_heads=5, num_kv_heads=5)
    if size == "456b":
        model.update(expert_dispatch="capacity")  # tokens over capacity are dropped; its factor is undisclosed, ours
    return model


def _laptop_data() -> ConfigDict:
    data = recipes.embedded()
    data.corpora.legs = corpus("generated", "legs", content="conversations")
    return data


def _data() -> ConfigDict:
    corpora = (*PRETRAINING, *LONG)
    data = recipes.files_on_disk("data/minimax_m1", corpora, vocab_size=200_064, bos="", eos="<end_of_document>")
    for name in ("long_cot", "rl_rules", "rl_general"):
        data.corpora[name] = corpus("jsonl", f"data/minimax_m1/{name}/*.jsonl.zst", content="conversations")
    data.chat_template = "minimax_m1"
    return data


def _laptop_stages() -> dict[str, ConfigDict]:
    batch, long_batch = 8 * 256, 8 * 512
    return {
        "pretraining": stage(
            tokens=700 * batch,
            context_length=256,
            rope_theta=1e4,
            mixture=recipes.EMBEDDED_MIXTURE,
            batch_size=batch_size(batch),
            optimizer=M1_ADAMW,
            schedule=wsd(2e-3, 2e-4, warmup_steps=50, decay_steps=350),
        ),
        "context_extension": stage(
            tokens=60 * long_batch,
            context_length=512,
            rope_theta=5e4,
            mixture=recipes.EMBEDDED_MIXTURE,
            batch_size=batch_size(long_batch),
            optimizer=M1_ADAMW,
            schedule=constant(2e-4),
        ),
        "sft": stage(
            passes=0.4,
            warmup_share=0.05,
            context_length=256,
            rope_theta=5e4,
            mixture={"legs": 1.0},
            packing="best_fit",
            batch_size=batch_size(batch),
            optimizer=M1_ADAMW,
            schedule=cosine(1e-3, 1e-4),
        ),
        "rl": stage(
            tokens=LAPTOP_RL_STEPS * 64 * 48,
            context_length=48,
            rope_theta=5e4,
            mixture={"legs": 1.0},
            packing="one_per_row",
            batch_size=batch_size(64 * 48),
            optimizer=RL_ADAMW,
            schedule=constant(1e-4, warmup_steps=8),
            reinforcement=reinforcement(
                algorithms.cispo(),
                advantages=group_relative(),
                rollouts=rollouts(
                    samples=8,
                    updates=8,
                    max_new_tokens=3,
                    slots=64,
                    dynamic_sampling=True,
                    max_refills=2,
                    decode_steps=3,
                    prefill_tokens=32,
                ),
                rewards=rewards(gsm8k=1.0),
            ),
        ),
    }


def _scaled_stages(tokens: float, peak: float) -> dict[str, ConfigDict]:
    """Pre-training on `tokens`, then a tenth as many at 32K: ours throughout."""
    batch = 2**20
    return {
        "pretraining": stage(
            tokens=tokens,
            context_length=8192,
            rope_theta=1e4,
            mixture=PRETRAINING,
            batch_size=batch_size(batch, micro_batch_tokens=2 * 8192),
            optimizer=M1_ADAMW,
            schedule=wsd(peak, peak / 10, warmup_steps=500, decay_steps=steps(tokens * 2 / 3, batch)),
        ),
        "context_32k": stage(
            tokens=tokens / 10,
            context_length=32 * 1024,
            rope_theta=1e6,
            mixture=blend((0.3, PRETRAINING), (0.7, {"long_32k_128k": 1.0})),
            batch_size=batch_size(batch, micro_batch_tokens=32 * 1024),
            optimizer=M1_ADAMW,
            schedule=constant(peak / 10),
        ),
    }


def _published_stages() -> dict[str, ConfigDict]:
    batch = 128 * 2**20  # undisclosed; where Text-01's ramp ended
    stages = {
        "continual_pretraining": stage(
            tokens=7.5e12,
            context_length=8192,  # undisclosed; Text-01's
            rope_theta=1e7,
            mixture=PRETRAINING,
            batch_size=batch_size(batch, micro_batch_tokens=8192),
            optimizer=M1_ADAMW,
            schedule=wsd(8e-5, 8e-6, warmup_steps=0, decay_steps=steps(5e12, batch)),  # linear: ours
        )
    }
    extensions = {  # context length: tokens and shares up to 32K, to 128K and beyond; undisclosed, after Text-01's
        32 * 1024: (300e9, (1.0, 0.0, 0.0)),
        128 * 1024: (300e9, (0.3, 0.7, 0.0)),
        512 * 1024: (32e9, (0.35, 0.35, 0.3)),
        1024 * 1024: (26e9, (0.3, 0.3, 0.4)),
    }
    for context_length, (tokens, (short, medium, long)) in extensions.items():
        stages[f"context_{context_length // 1024}k"] = stage(
            tokens=tokens,
            context_length=context_length,
            rope_theta=1e7,
            mixture=blend((short, PRETRAINING), (medium, {"long_32k_128k": 1.0}), (long, {"long_over_128k": 1.0})),
            batch_size=batch_size(batch, micro_batch_tokens=context_length),
            optimizer=M1_ADAMW,
            schedule=constant(8e-6),
        )
    return stages


def _long_cot() -> ConfigDict:
    """Fine-tuning on long chains of thought (section 2.2): what of it is undisclosed is Text-01's first such stage."""
    context_length = 32 * 1024  # undisclosed: ours
    return stage(
        passes=2,
        context_length=context_length,
        rope_theta=1e7,
        mixture={"long_cot": 1.0},
        packing="best_fit",
        batch_size=batch_size(128 * context_length, micro_batch_tokens=context_length),
        optimizer=M1_ADAMW,
        schedule=cosine(1e-5, 1e-6),
    )


def _published_reinforcement() -> ConfigDict:
    """CISPO (section 3) on tasks of growing generality (section 4), with outputs that grow (section 5)."""
    rows, updates, limits = 512, 16, tuple(thousands * 1024 for thousands in (40, 48, 56, 64, 72, 80))
    length = limits[-1] + 8 * 1024
    return stage(
        tokens=600 * updates * rows * length,
        context_length=length,
        rope_theta=1e7,
        mixture=({"rl_rules": 1.0}, {"rl_rules": 0.85, "rl_general": 0.15}),
        packing="one_per_row",
        batch_size=batch_size(rows * length, micro_batch_tokens=length),
        optimizer=RL_ADAMW,
        schedule=constant(1e-6),
        reinforcement=reinforcement(
            algorithms.cispo(),
            advantages=group_relative(),
            rollouts=rollouts(
                samples=16,
                updates=updates,
                max_new_tokens=limits[-1],
                lengths={"limits": limits, "window": 5, "perplexity_change": 0.01, "length_share": 0.9},
                sample_filter={"pass_rate": (0.0, 0.9)},
                slots=2048,
                dynamic_sampling=True,
                repetition_tokens=3000,
                decode_steps=256,
            ),
            rewards=rewards(minimax_m1=1.0, form=0.1, overlong_buffer=4096, judge=JUDGE, code_workers=64),
        ),
    )


STAGES = {
    "laptop_softmax": _laptop_stages,
    "laptop": _laptop_stages,
    "1b": lambda: _scaled_stages(20e9, 6e-4),
    "8b": lambda: _scaled_stages(40e9, 3e-4),
    "456b": _published_stages,
}
