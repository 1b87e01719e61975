"""What a trained model can do: perplexity, a needle in a haystack, and the tasks of lm-evaluation-harness."""

from lightning_jax.evaluation.harness import TextModel, load_tasks, run_task
from lightning_jax.evaluation.needle import NeedleSettings, make_trials, needle_in_a_haystack
from lightning_jax.evaluation.parts import Part, run_parts
from lightning_jax.evaluation.perplexity import perplexity, read_texts
from lightning_jax.evaluation.report import table, write_results
from lightning_jax.evaluation.scoring import Scorer, Span, TokenScores, windows

__all__ = [
    "NeedleSettings",
    "Part",
    "Scorer",
    "Span",
    "TextModel",
    "TokenScores",
    "load_tasks",
    "make_trials",
    "needle_in_a_haystack",
    "perplexity",
    "read_texts",
    "run_parts",
    "run_task",
    "table",
    "windows",
    "write_results",
]
