"""What it costs to generate N tokens: MiniMax-M1 against DeepSeek-R1, the right half of figure 1 of arXiv 2506.13585.

F(N) = 2 P N + c N (N + 1) / 2: two for every active parameter, and for every pair of a token and one before it (or
itself) the products of softmax attention; lightning layers add a constant per token.

The ratio depends on how the attention of DeepSeek-R1, which is latent, is counted. The curve of the figure is a
parabola with 2 (192 + 2 * 128) for each pair, head and layer, and 37.7B parameters, and these are used here; counted
as it is defined, 2 (192 + 128), R1 is cheaper at length. MiniMax-M1 is counted from its config. So counted the ratio is
below a half at 64K tokens and about a quarter at 100K, as the paper's text says; its own curve for M1 lies higher.
"""

import pathlib
from dataclasses import dataclass
from typing import Self

import numpy as np

from lightning_jax.models import ModelConfig


@dataclass(frozen=True)
class GenerationCost:
    """FLOPs of generating, as a function of the length."""

    name: str
    per_token: float
    per_pair: float  # of tokens

    @classmethod
    def of(cls, name: str, model: ModelConfig) -> Self:
        """Of a model: its head counts, its embedding does not; 4 K for each pair, head and softmax layer."""
        heads, kinds = model.num_heads, model.layer_kinds()
        weights = model.num_active_parameters() + model.vocab_size * model.hidden_size
        state = 4 * heads * model.head_dim**2  # k vᵀ into it and q out of it
        lightning, softmax = kinds.count("lightning"), kinds.count("softmax")
        return cls(name, 2 * weights + lightning * state, 4 * softmax * heads * model.head_dim)

    def flops(self, tokens: np.ndarray | float) -> np.ndarray | float:
        """Of the first `tokens` tokens."""
        return self.per_token * tokens + self.per_pair * tokens * (tokens + 1) / 2


DEEPSEEK_R1 = GenerationCost("DeepSeek-R1", per_token=7.541e10, per_pair=61 * 128 * 2 * (192 + 2 * 128))


def generation_table(costs: list[GenerationCost]) -> str:
    """FLOPs at some lengths, and the first's share of the last's."""
    lines = [f"{'tokens':>8}" + "".join(f"{cost.name:>22}" for cost in costs) + "   ratio"]
    for tokens in (8_192, 32_768, 65_536, 100_000, 131_072):
        flops = [cost.flops(tokens) for cost in costs]
        cells = "".join(f"{each:>22.3e}" for each in flops)
        lines.append(f"{tokens:>8,}{cells}   {flops[0] / flops[-1]:.3f}")
    return "\n".join(lines)


def plot_generation_flops(costs: list[GenerationCost], path: pathlib.Path) -> None:
    """FLOPs over the number of generated tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    tokens = np.linspace(0, 128 * 1024, 200)
    for cost in costs:
        axes.plot(tokens / 1024, cost.flops(tokens), label=cost.name)
    axes.set_xlabel("generated tokens, in 1,024")
    axes.set_ylabel("FLOP")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
