"""What is put on record of a generation's completions.

Shapes: P prompts, G completions of each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_jax.input_pipeline.prompts import Prompt
from lightning_jax.input_pipeline.tokenizers import Tokenizer
from lightning_jax.reinforcement.generated import Groups
from lightning_jax.rewards.length_bias import FEWEST, correlation, relative


def measures(groups: Groups, informative_P: np.ndarray) -> dict[str, float]:
    """Numbers of groups of completions; to be of the first prompts, before any were replaced: no selection flatters it.

    Args:
        informative_P: whether the completions of each prompt have different rewards.
    """
    completions = [completion for group in groups.completions for completion in group]
    tokens = np.array([len(completion.ids) for completion in completions])
    reward_PG = groups.grades.reward_PG
    graded_P = ~np.isnan(reward_PG).all(axis=1)
    likes_length = length_correlation(groups)
    return {
        **({} if likes_length is None else {"length_correlation": likes_length}),
        "reward": float(np.nanmean(reward_PG)),
        "score": float(np.nanmean(groups.grades.score_PG)),
        "best_reward": float(np.mean(np.nanmax(reward_PG[graded_P], axis=1))),
        "ungraded": int(np.sum(np.isnan(reward_PG))),
        "equal_reward_groups": float(np.mean(~informative_P)),
        "completion_tokens": float(tokens.mean()),
        "completion_tokens_99": float(np.quantile(tokens, 0.99)),
        "perplexity": float(np.exp(-np.mean(np.concatenate([each.log_probs for each in completions])))),
        **{
            f"{reason}_share": float(np.mean([each.finish_reason == reason for each in completions]))
            for reason in ("stop", "length", "repetition")
        },
    }


def length_correlation(groups: Groups) -> float | None:
    """Of reward and length among completions of one prompt; None where there are too few, or nothing differs."""
    graded = (
        [(len(each.ids), reward) for each, reward in zip(group, reward_G, strict=True) if not np.isnan(reward)]
        for group, reward_G in zip(groups.completions, groups.grades.reward_PG, strict=True)
    )
    pairs = np.concatenate([relative(group) for group in graded])
    return correlation(pairs) if len(pairs) >= FEWEST else None


def samples(groups: Groups, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The completions of the first prompts, these, as the record of a run keeps them."""
    return [
        {
            "prompt": tokenizer.decode(list(prompt.ids)),
            "text": completion.text,
            "reward": float(groups.grades.reward_PG[p, g]),
            "reason": groups.grades.reasons[p][g],
            "score": float(groups.grades.score_PG[p, g]),
            "finish_reason": completion.finish_reason,
        }
        for p, prompt in enumerate(prompts)
        for g, completion in enumerate(groups.completions[p])
    ]
