"""Figures of the report, as SVG that takes its text colour from the page."""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]

INK = "#010203"  # stands for the page's text colour, which the page alone knows
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#ec4899", "#84cc16")
_POINTS = 1500  # most points of a curve: more would only make the file larger


def figure(name: str, records: Sequence[Record], draws: Sequence[Callable[["Axes"], None]], height: float = 2.6) -> str:
    """Draws panels that share their steps, one below the other, with the borders of the stages."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # figures share the page: their identifiers must differ, and be the same every time
        "text.parse_math": False,  # names of corpora may hold a dollar sign
        "font.size": 9,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "grid.linewidth": 0.8,
        "axes.linewidth": 0.6,
        "lines.linewidth": 1.4,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    }
    with matplotlib.rc_context(settings):
        drawn = Figure(figsize=(9.0, height), layout="constrained")
        panels = drawn.subplots(len(draws), 1, sharex=True, squeeze=False)[:, 0]
        for draw, axes in zip(draws, panels, strict=True):
            draw(axes)
            _mark_stages(axes, records)
            axes.margins(x=0.01)
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
        drawn.align_ylabels()
        drawing = io.StringIO()
        drawn.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawing.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure, and nothing refers to them
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]*"', svg)[0]
    return f'<svg {size} role="img" aria-label="{name}"' + svg[svg.index(">") :]


def _mark_stages(axes: "Axes", records: Sequence[Record]) -> None:
    stages = [(record["step"], record["stage"]) for record in records if "stage" in record]
    for (_, before), (step, stage) in itertools.pairwise(stages):
        if stage != before:
            axes.axvline(step, color=INK, linewidth=0.7, linestyle=":")
            axes.text(step, 1.01, stage, transform=axes.get_xaxis_transform(), fontsize=7)


def peaks(values: np.ndarray) -> np.ndarray:
    """Indices of at most _POINTS values that keep every stretch's highest and lowest, so that no spike is lost."""
    if len(values) <= _POINTS:
        return np.arange(len(values))
    kept = []
    for group in np.array_split(np.arange(len(values)), _POINTS // 2):
        known = group[np.isfinite(values[group])]
        kept += [known[values[known].argmin()], known[values[known].argmax()]] if known.size else [group[0]]
    return np.unique(kept)
