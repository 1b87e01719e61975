"""Tulu 3 (arXiv 2411.15124): fine-tuning, preference tuning, a reward model and PPO on top of Llama 3.1.

    python -m lightning_jax.train --config=configs/tulu3.py             # the largest size that fits this machine
    python -m lightning_jax.train --config=configs/tulu3.py:8b --init_from=runs/llama_3.1_8b --workdir=runs/tulu3_8b_sft
    python -m lightning_jax.train --config=configs/tulu3.py:8b --config.run_stages=dpo \
        --init_from=runs/tulu3_8b_sft --workdir=runs/tulu3_8b_dpo
    python -m lightning_jax.train --config=configs/tulu3.py:8b --config.run_stages=reward_model \
        --init_from=runs/tulu3_8b_sft --workdir=runs/tulu3_8b_rm
    python -m lightning_jax.train --config=configs/tulu3.py:8b --config.run_stages=rlvr \
        --init_from=runs/tulu3_8b_dpo --workdir=runs/tulu3_8b_rlvr
    python -m lightning_jax.train --config=configs/tulu3.py:8b,lora --init_from=runs/llama_3.1_8b
    python -m lightning_jax.train --config=configs/tulu3.py:laptop --config.run_stages=reward_model \
        --init_from=runs/tulu3_laptop --workdir=runs/reward_model

What follows the colon is a size, a recipe (paper, lora), or both with a comma between. runs/llama_3.1_8b is Llama 3.1's
safetensors through lightning_jax.convert. Each stage is a run of its own with fresh moments, as published; laptop
begins with fresh weights and goes through sft and dpo.

| size | parameters | cost | result to expect |
|---|---|---|---|
| laptop | 3.9M | minutes on two CPU cores | held-out: 0.17 nats a token after sft, 67% of pairs right after dpo |
| 8b | 8,030,261,248 | 64 GPUs of 80 GB | no number quoted here |
| 70b | 70,553,706,496 | 128 GPUs of 80 GB | no number quoted here |
| 405b | 405,853,388,800 | 256 GPUs of 80 GB and more | no number quoted here |

sft (section 4): AdamW (0.9, 0.999) without weight decay or clipping, linear fall to 0 after 3% of warm-up, 2 passes,
128 chats of up to 4,096 tokens a batch, 5e-6 and seed 123 (8b) or 2e-6 and 456 (70b); the loss is each chat's sum over
the assistant's tokens, averaged over the batch's chats, which is the published sum loss where a micro-batch is one
chat. dpo (section 5): length-normalised, beta 5, one pass, 10% of warm-up, 128 pairs (405b: 256) of chats of up to
2,048 tokens, 5e-7 (8b) or 2e-7; a row holds a pair. reward_model: from the sft model, 3e-6 without warm-up, 256 pairs,
epsilon 1e-5; the paper trains it for 8b and takes that one for all sizes.

rlvr (section 6): PPO on the dpo model, with the 8b reward model (runs/tulu3_8b_rm) as the beginning of the value model
and no other use of it, on prompts of GSM8K, MATH and IFEval (405b: of MATH, data/tulu3/rlvr_math): 10 for a right
answer and -10 for one without an end, four passes over 224 (70b: 640, 405b: 1,856) completions of up to 2,048 tokens, a
divergence of 0.05 (70b: 0.07) by k1 in the reward, clips of 0.2, 3e-7 (70b, 405b: 1e-7) falling to 0, without warm-up
(70b: a tenth), rollouts one step stale. 8b's 10,000,000 episodes are an end that its run never reached; 405b's length
and 300,000 episodes are its model card's, where its script says 1,024 and 400,000. A batch divides over 32 devices
(8b), 64 pairs (70b) or 64 groups of 8 (405b). Not as in the published trainer: means and whitening are over all of a
batch, there over a device's share of it. rlvr_grpo (8b): what Tulu 3.1 was released with in its place: GRPO with k3 of
0.01, 48 prompts of 16 completions for two updates, 10 for a right answer and 0 for one without an end, 5e-7.

Undisclosed, and ours here: learning rate and batch of 405b's sft, which are 70b's, 70b's and 405b's reward models,
which are 8b's, and the clipping of rlvr_grpo.

laptop. Ours; 31% of 400 other problems are solved after sft. Its dpo is short and slow, because the wrong answers are
near misses that the model half believes, and unlearning them costs right ones. With 72 steps at 1e-5 it still solves
30%; with 215 steps 26%, with as many at 1e-4 25%, and the loss is above log 2 on the way. With lora 68% of pairs are
right and 28% are solved. Its reward model, after sft and dpo, is right of 66% of 574 held-out pairs (95%: 62% to 70%).
All with seed 0.

lora. Not published, ours: the same with adapters of rank 64 and alpha 32 on all matrices of all layers in place of the
weights, and ten times the learning rates, as "LoRA Without Regret" (Schulman and others, 2025) finds best. The laptop's
goes through dpo alone, from a run of sft: --init_from=runs/tulu3_laptop.

Data of 8b, 70b and 405b, as released, in Parquet: data/tulu3/sft_mixture with "messages", data/tulu3/preferences (of
the size) with "chosen" and "rejected", data/tulu3/rlvr with "messages", "ground_truth" and "dataset"; and
tokenizer.json, Llama 3.1's. laptop needs none: its word problems are generated. Its rlvr, on these, goes on from the
run of sft and dpo, with its own reward model in runs/reward_model.
"""

import dataclasses

from ml_collections import ConfigDict

from lightning_jax import recipes, selection
from lightning_jax.models.config import FEED_FORWARD_WEIGHTS, MIXER_WEIGHTS
from lightning_jax.objectives import algorithms
from lightning_jax.recipes import Dimensions, adamw, batch_size, constant, corpus, stage, wsd
from lightning_jax.reinforcement.recipes import (
    OF_VALUE_MODEL,
    group_relative,
    reinforcement,
    rewards,
    rollouts,
    value_model,
)

SIZES = ("laptop", "8b", "70b", "405b")  # from the smallest up
RECIPES = ("paper", "lora")
LLAMA_3_1 = {  # arXiv 2407.21783, table 3
    "8b": Dimensions(4096, 32, 32, 8, 128, 14_336, 128_256),
    "70b": Dimensions(8192, 80, 64, 8, 128, 28_672, 128_256),
    "405b": Dimensions(16_384, 126, 128, 8, 128, 53_248, 128_256),
}
LORA = {"rank": 64, "alpha": 32.0, "targets": (*MIXER_WEIGHTS["softmax"], *FEED_FORWARD_WEIGHTS)}
ADAMW = adamw(beta2=0.999, weight_decay=0.0, clip_norm=0.0)
REWARD_ADAMW = adamw(beta2=0.999, weight_decay=0.0, epsilon=1e-5, clip_norm=0.0)
SFT = {"8b": (5e-6, 128), "70b": (2e-6, 128), "405b": (2e-6, 128)}  # learning rate, chats; 405b undisclosed: 70b's
SEEDS = {"8b": 123, "70b": 456}  # published
DPO = {"8b": (5e-7, 128), "70b": (2e-7, 128), "405b": (2e-7, 256)}  # learning rate, pairs
RLVR = {  # learning rate, share of warm-up, coefficient of the divergence, completions of a generation, of the stage
    "8b": (3e-7, 0.0, 0.05, 224, 10_000_000),
    "70b": (1e-7, 0.1, 0.07, 640, 400_000),
    "405b": (1e-7, 0.0, 0.05, 1856, 300_000),
}
RLVR_ADAMW = adamw(beta2=0.999, weight_decay=0.01)  # torch's own numbers


def get_config(arg: str = "") -> ConfigDict:
    return selection.select(arg, SIZES, RECIPES, _config)


def _config(size: str, recipe: str) -> ConfigDict:
    laptop = size == "laptop"
    model = recipes.llama(
        recipes.LLAMA_LAPTOP if laptop else LLAMA_3_1[size],
        tie_embeddings=False,
        initializer="normal",
        initializer_range=0.02,
    )
    if not laptop:
        model.rope_scaling = {
            "factor": 8.0,
            "low_frequency_factor": 1.0,
            "high_frequency_factor": 4.0,
            "original_context_length": 8192,
        }
    lora = recipe == "lora"
    rate = 10 if lora else 1
    config = recipes.run(
        f"tulu3_{size}" + ("_lora" if lora else ""),
        model=model,
        data=recipes.embedded() if laptop else _data(),
        stages=_laptop_stages(rate) if laptop else _published_stages(size, rate),
        run_stages=(("dpo",) if lora else ("sft", "dpo")) if laptop else ("sft",),
        laptop=laptop,
        replicate=laptop,
        tensor_parallel={"70b": 2, "405b": 8}.get(size, 1),
    )
    if lora:
        config.lora = LORA
    if size in ("70b", "405b"):
        # The reward model is 8b's for all sizes, and so is the value model that begins as it.
        config.stages.rlvr.reinforcement.value.model = _config("8b", recipe).model
    config.seed = SEEDS.get(size, 0)
    config.metrics.sample_prompts = ("", "", "")  # as many held-out questions are answered
    return config


def _data() -> ConfigDict:
    data = recipes.files_on_disk("data/tulu3", (), vocab_size=128_256, bos="<|begin_of_text|>", eos="<|end_of_text|>")
    data.corpora = {
        "sft_mixture": corpus("parquet", "data/tulu3/sft_mixture/*.parquet", content="conversations"),
        "preferences": corpus("parquet", "data/tulu3/preferences/*.parquet", content="preferences"),
        "rlvr": corpus("parquet", "data/tulu3/rlvr/*.parquet", content="conversations"),
        "rlvr_math": corpus("parquet", "data/tulu3/rlvr_math/*.parquet", content="conversations"),
    }
    data.chat_template = "tulu"
    return data


def _published_stages(size: str, rate: int) -> dict[str, ConfigDict]:
    common = {"rope_theta": 5e5, "packing": "one_per_row"}
    pair = 2 * 2048
    (sft_rate, chats), (dpo_rate, pairs) = SFT[size], DPO[size]
    return {
        "sft": stage(
            passes=2,
            warmup_share=0.03,
            context_length=4096,
            mixture={"sft_mixture": 1.0},
            batch_size=batch_size(chats * 4096, micro_batch_tokens=4096),
            optimizer=ADAMW,
            schedule=wsd(rate * sft_rate, 0.0),
            reduction="conversation_sum",
            **common,
        ),
        "dpo": stage(
            passes=1,
            warmup_share=0.1,
            context_length=pair,
            mixture={"preferences": 1.0},
            batch_size=batch_size(pairs * pair, micro_batch_tokens=pair),
            optimizer=ADAMW,
            schedule=wsd(rate * dpo_rate, 0.0),
            preference={"loss": "dpo_norm", "beta": 5.0, "reference": "cached"},
            **common,
        ),
        "reward_model": stage(
            passes=1,
            context_length=pair,
            mixture={"preferences": 1.0},
            batch_size=batch_size(256 * pair, micro_batch_tokens=pair),
            optimizer=REWARD_ADAMW,
            schedule=wsd(rate * 3e-6, 0.0),
            reward_model={"use_margin": False, "centring": 0.0},
            **common,
        ),
        "rlvr": _rlvr(size, rate),
    } | ({"rlvr_grpo": _rlvr_grpo(rate)} if size == "8b" else {})


def _rlvr(size: str, rate: int) -> ConfigDict:
    peak, warmup_share, kl_coefficient, completions, episodes = RLVR[size]
    generations = episodes // completions
    return _ppo(
        steps=4 * generations,
        warmup_steps=int(4 * generations * warmup_share),
        length=4096,
        rows=completions,
        corpus_name="rlvr_math" if size == "405b" else "rlvr",
        rope_theta=5e5,
        peak=rate * peak,
        kl_coefficient=kl_coefficient,
        reward_model="runs/tulu3_8b_rm",
        rollouts=rollouts(
            samples=1, updates=4, epochs=4, staleness=1, max_new_tokens=2048, slots=512, dynamic_sampling=False
        ),
        reward="tulu3",
    )


def _ppo(
    *,
    steps: int,
    warmup_steps: int,
    length: int,
    rows: int,
    corpus_name: str,
    rope_theta: float,
    peak: float,
    kl_coefficient: float,
    reward_model: str,
    rollouts: dict[str, object],
    reward: str,
) -> ConfigDict:
    """Section 6: PPO with a value model that begins as the reward model; both are trained alike."""
    schedule = wsd(peak, 0.0, warmup_steps=warmup_steps, decay_steps=steps - warmup_steps)
    return stage(
        tokens=steps * rows * length,
        context_length=length,
        rope_theta=rope_theta,
        mixture={corpus_name: 1.0},
        packing="one_per_row",
        batch_size=batch_size(rows * length, micro_batch_tokens=length),
        optimizer=RLVR_ADAMW,
        schedule=schedule,
        reinforcement=reinforcement(
            dataclasses.replace(algorithms.ppo(0.2), kl_coefficient=kl_coefficient, kl_estimator="k1", kl_in="reward"),
            advantages=OF_VALUE_MODEL,
            value=value_model(reward_model=reward_model, optimizer=RLVR_ADAMW, schedule=schedule),
            rollouts=rollouts,
            rewards=rewards(unfinished="replace", unfinished_score=-10.0, **{reward: 10.0}),
        ),
    )


def _rlvr_grpo(rate: int) -> ConfigDict:
    """Tulu 3.1's: GRPO instead of PPO, 48 prompts of 16 completions, two updates on them, 2,000,000 completions."""
    length, rows, updates = 4096, 384, 2
    return stage(
        tokens=2_000_000 // (rows * updates) * updates * rows * length,
        context_length=length,
        rope_theta=5e5,
        mixture={"rlvr": 1.0},
        packing="one_per_row",
        batch_size=batch_size(rows * length, micro_batch_tokens=length),
        optimizer=adamw(beta2=0.999, weight_decay=0.0),
        schedule=constant(rate * 5e-7),
        reinforcement=reinforcement(
            dataclasses.replace(algorithms.ppo(0.2), kl_coefficient=0.01),
            advantages=group_relative(std_ddof=0, std_epsilon=1e-8),
            rollouts=rollouts(samples=16, updates=updates, max_new_tokens=2048, slots=512, dynamic_sampling=False),
            rewards=rewards(tulu3=10.0, unfinished="replace"),
        ),
    )


def _laptop_stages(rate: int) -> dict[str, ConfigDict]:
    """The recipe in small on generated problems; the learning rates, for fresh weights, are ours."""
    common = {"rope_theta": 1e4, "packing": "best_fit", "context_length": 256, "batch_size": batch_size(8 * 256)}
    return {
        "sft": stage(
            passes=1,
            warmup_share=0.03,
            mixture={"arithmetic": 1.0},
            optimizer=ADAMW,
            schedule=wsd(2e-3, 0.0),
            reduction="token_mean",
            **common,
        ),
        "dpo": stage(
            passes=0.1,
            warmup_share=0.1,
            mixture={"arithmetic_pairs": 1.0},
            optimizer=ADAMW,
            schedule=wsd(rate * 1e-5, 0.0),
            # For a tenth of the pairs: to score them as they come costs less than all of them beforehand.
            preference={"loss": "dpo_norm", "beta": 5.0, "reference": "live"},
            **common,
        ),
        "reward_model": stage(
            passes=0.5,
            mixture={"arithmetic_pairs": 1.0},
            optimizer=REWARD_ADAMW,
            schedule=wsd(rate * 3e-4, 0.0),
            reward_model={"use_margin": False, "centring": 0.0},
            **common,
        ),
        "rlvr": _ppo(
            steps=4 * 40,
            warmup_steps=0,
            length=96,
            rows=64,
            corpus_name="arithmetic",
            rope_theta=1e4,
            peak=rate * 3e-5,
            kl_coefficient=0.05,
            reward_model="runs/reward_model",
            rollouts=rollouts(
                samples=1,
                updates=4,
                epochs=4,
                staleness=1,
                max_new_tokens=32,
                slots=64,
                dynamic_sampling=False,
                decode_steps=16,
                prefill_tokens=64,
            ),
            reward="gsm8k",
        ),
    }
