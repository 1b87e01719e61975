"""What a trained model can do: perplexity, a needle in a haystack, and the tasks of lm-evaluation-harness."""

from lightning_jax.evaluation.harness import TextModel, run_tasks
from lightning_jax.evaluation.needle import NeedleSettings, needle_in_a_haystack
from lightning_jax.evaluation.perplexity import perplexity, read_texts
from lightning_jax.evaluation.report import table, write_results
from lightning_jax.evaluation.scoring import Scorer, Span, TokenScores, windows

__all__ = [
    "NeedleSettings",
    "Scorer",
    "Span",
    "TextModel",
    "TokenScores",
    "needle_in_a_haystack",
    "perplexity",
    "read_texts",
    "run_tasks",
    "table",
    "windows",
    "write_results",
]
