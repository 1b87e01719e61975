"""What was evaluated, to be read: the same tables on the console and, with their pictures, on a page."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lightning_jax.errors import UserError
from lightning_jax.files import replace_text
from lightning_jax.metrics.figures import COLORS
from lightning_jax.metrics.page import html_table, write_page

RESULTS_FILE, PAGE_FILE = "results.json", "evaluation.html"
_LOW, _MIDDLE, _HIGH = ((0xEF, 0x44, 0x44), (0xFB, 0xD3, 0x8D), (0x10, 0xB9, 0x81))


@dataclass(frozen=True)
class Section:
    """A table with its heading, a sentence that says how to read it, and perhaps a picture."""

    title: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    svg: str = ""

    def text(self) -> str:
        """For the console: numbers aligned at the right."""
        cells = [list(self.headings), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
        return "\n".join([self.title, *(f"  {line}" for line in lines)])

    def html(self) -> str:
        figure = f"<figure>{self.svg}</figure>" if self.svg else ""
        table = html_table(self.headings, self.rows, numbers=True)
        return f'<h2>{escape(self.title)}</h2><p class="faint">{escape(self.caption)}</p>{figure}{table}'


def table(results: Mapping[str, Any]) -> str:
    """The results as tables for the console."""
    return "\n\n".join(section.text() for section in _sections(results))


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes results.json and evaluation.html, each as a whole.

    Args:
        results: of `run_parts`.

    Raises:
        UserError: they cannot be written there.
    """
    title = str(results["model"]["name"])
    facts = " · ".join(f"{name.replace('_', ' ')} {value}" for name, value in results["model"].items())
    sections = "".join(section.html() for section in _sections(results))
    body = f'<h1>{escape(title)}</h1>\n<p class="faint">{escape(facts)}</p>\n{sections}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, ensure_ascii=False)
        replace_text(folder / RESULTS_FILE, text + "\n")
        write_page(folder / PAGE_FILE, title, body)
    except OSError as error:
        raise UserError(f"--out={folder}: {error.strerror}") from None


def _sections(results: Mapping[str, Any]) -> Iterator[Section]:
    if corpora := results.get("perplexity"):
        yield from _perplexity(corpora)
    if needle := results.get("needle"):
        yield _needle(needle)
    if tasks := results.get("lm_eval"):
        yield _harness(tasks)


def _perplexity(corpora: Mapping[str, Any]) -> Iterator[Section]:
    measures = {"nats_per_token": ".4f", "perplexity": ".3f", "bits_per_byte": ".4f", "tokens": ",", "bytes": ","}
    asked = next(iter(corpora.values()))["asked"]
    how = {"documents": "Each document by itself", "windows": "All documents in one sequence"}[asked["layout"]]
    yield Section(
        "Perplexity by corpus",
        f"{how}, in windows of {asked['context_length']:,} tokens that go on by {asked['stride']:,}.",
        ["corpus", *(name.replace("_", " ") for name in measures)],
        [[name, *(format(corpus[key], shape) for key, shape in measures.items())] for name, corpus in corpora.items()],
    )
    buckets = {(b["from"], b["to"]) for corpus in corpora.values() for b in corpus["by_position"]}
    values = {
        name: {(b["from"], b["to"]): b["nats_per_token"] for b in corpus["by_position"]}
        for name, corpus in corpora.items()
    }
    yield Section(
        "Perplexity by position",
        "Nats per token, over the tokens before which the model had seen so many.",
        ["tokens seen", *corpora],
        [
            [
                f"{first:,} to {last:,}" if last > first else f"{first}",
                *(f"{of[first, last]:.4f}" if (first, last) in of else "" for of in values.values()),
            ]
            for first, last in sorted(buckets)
        ],
        _curves({name: [(math.log2(first), nats) for (first, _), nats in of.items()] for name, of in values.items()}),
    )


def _needle(lengths: Mapping[str, Any]) -> Section:
    cells = [cell for length in lengths.values() for cell in length["cells"]]
    asked = next(iter(lengths.values()))["asked"]
    candidates = asked["distractors"] + 1
    scores = {
        "exact_match": "the number is generated",
        "choice": f"the number is the likeliest of {candidates}",
    }
    return Section(
        "Needle in a haystack",
        f"Of {asked['trials']} questions for each length and depth, the share in which greedy generation gives the "
        f"number (exact match), and in which it is likelier than {asked['distractors']} others (choice; chance: "
        f"{1 / candidates:.0%}). Depth 0% is the beginning of the text, 100% its end.",
        ["length", "depth", "exact match", "choice", "nats of the answer"],
        [
            [
                f"{cell['length']:,}",
                f"{cell['depth']:g}%",
                f"{cell['exact_match']:.0%}",
                f"{cell['choice']:.0%}",
                f"{cell['answer_nats']:.3f}",
            ]
            for cell in cells
        ],
        _heat_maps({title: {(c["length"], c["depth"]): c[name] for c in cells} for name, title in scores.items()}),
    )


def _harness(tasks: Mapping[str, Any]) -> Section:
    rows = []
    for name, measures in (each for task in tasks.values() for each in task["results"].items()):
        for key, value in measures.items():
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = measures.get(f"{metric}_stderr,{filter_name}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                rows.append([name, metric, filter_name, f"{value:.4f}", shown])
    version = next(iter(tasks.values())).get("lm_eval_version", "")
    caption = f"As lm-evaluation-harness {version} reports them."
    return Section("Tasks", caption, ["task", "metric", "filter", "value", "standard error"], rows)


def _heat_maps(maps: Mapping[str, Mapping[tuple[int, float], float]]) -> str:
    """One map beside the other: lengths to the right, depths downwards, from red (0) to green (1)."""
    lengths, depths = (sorted({key[axis] for cells in maps.values() for key in cells}) for axis in (0, 1))
    width, height = min(60.0, 380 / len(lengths)), 24.0
    panel = max(width * len(lengths), 200) + 70
    marks = []
    for index, (title, cells) in enumerate(maps.items()):
        left = 60 + index * panel
        marks.append(_text(left, 14, title))
        for (length, depth), share in cells.items():
            x, y = left + lengths.index(length) * width, 26 + depths.index(depth) * height
            place = f"{length:,} tokens, depth {depth:g}%: {share:.0%}"
            marks.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" rx="2" '
                f'fill="{_heat(share)}"><title>{place}</title></rect>'
            )
        bottom = 26 + len(depths) * height
        for column, tokens in enumerate(lengths):
            marks.append(_text(left + (column + 0.5) * width, bottom + 14, _tokens(tokens), "middle"))
        marks.append(_text(left + len(lengths) * width / 2, bottom + 30, "tokens", "middle"))
        marks += [_text(left - 6, 26 + (row + 0.65) * height, f"{d:g}%", "end") for row, d in enumerate(depths)]
    size = 60 + len(maps) * panel, 26 + len(depths) * height + 40
    return _svg("Needle in a haystack", size, marks)


def _curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over a logarithmic axis of positions."""
    points = [point for curve in curves.values() for point in curve]
    right, low, high = max(max(x for x, _ in points), 1), min(y for _, y in points), max(y for _, y in points)
    low, high = (low - 0.05 * (high - low), high) if high > low else (low - 0.5, high + 0.5)

    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + 700 * x / right, 20 + 200 * (high - y) / (high - low)

    marks = []
    for step in range(5):
        value = low + (high - low) * step / 4
        y = place(0, value)[1]
        marks.append(f'<path d="M60 {y:.1f}H760" stroke="currentColor" stroke-opacity="0.15"/>')
        marks.append(_text(54, y + 4, f"{value:.2f}", "end"))
    marks += [_text(place(x, low)[0], 238, _tokens(2**x), "middle") for x in range(math.floor(right) + 1)]
    marks.append(_text(410, 256, "tokens seen", "middle"))
    for index, (name, curve) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        spots = [place(*point) for point in sorted(curve)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        marks.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in spots]
        marks.append(f'<circle cx="776" cy="{24 + 18 * index}" r="4" fill="{color}"/>')
        marks.append(_text(786, 28 + 18 * index, name))
    return _svg("Perplexity by position", (920, max(264, 40 + 18 * len(curves))), marks)


def _svg(name: str, size: tuple[float, float], marks: Iterable[str]) -> str:
    look = f'style="max-width:{size[0]:.0f}px" font-family="system-ui, sans-serif" font-size="12"'
    box = f'viewBox="0 0 {size[0]:.0f} {size[1]:.0f}"'
    return f'<svg {box} {look} role="img" aria-label="{name}">{"".join(marks)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'


def _heat(value: float) -> str:
    first, second, share = (_LOW, _MIDDLE, 2 * value) if value < 0.5 else (_MIDDLE, _HIGH, 2 * value - 1)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(first, second, strict=True))


def _tokens(count: float) -> str:
    """4096 as 4K, as contexts are called."""
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit:.0f}{letter}"
    return f"{count:,.0f}"
