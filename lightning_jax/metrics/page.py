"""report.html: one self-contained page about a run, from whichever of its files exist."""

import json
import logging
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lightning_jax.files import replace_text
from lightning_jax.metrics.console import SmoothedLoss
from lightning_jax.metrics.formatting import count, duration, size
from lightning_jax.metrics.plots import of_likelihoods, plots, validation_corpora, validation_curve
from lightning_jax.metrics.provenance import RUN_FILE
from lightning_jax.metrics.writer import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, read_metrics

REPORT_FILE = "report.html"
CONFIG_FILE = "config.json"

_MOST_EVENTS = 200
_logger = logging.getLogger(__name__)

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --faint: #6b7280; --line: #e3e5e9; --page: #ffffff; --box: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #9aa1ab; --line: #2c3138; --page: #14171b; --box: #1c2025; }
}
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
p { margin: .3rem 0; } .faint, figcaption { color: var(--faint); font-size: .875rem; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1.4rem 0; }
dl.tiles div { background: var(--box); border-radius: .5rem; padding: .7rem .9rem; }
dl.tiles dt { color: var(--faint); font-size: .8rem; } dl.tiles dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; } .wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--faint); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
pre { background: var(--box); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; margin: .5rem 0; }
pre .prompt { color: var(--faint); } summary { cursor: pointer; color: var(--faint); margin: .5rem 0; }
"""


@dataclass(frozen=True)
class _Run:
    """What the files of a run's folder say; empty where a file is missing."""

    facts: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "_Run":
        return cls(
            _read_json(folder / RUN_FILE),
            _read_json(folder / CONFIG_FILE),
            read_metrics(folder / METRICS_FILE),
            read_metrics(folder / SAMPLES_FILE),
            read_metrics(folder / EVENTS_FILE),
        )


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Writes report.html in a run's folder from metrics.jsonl, samples.jsonl, events.jsonl, run.json and config.json.

    Any of them may be missing: a run that was stopped early, or is still going, has a report too.

    Returns:
      The page's path.

    Raises:
      FileNotFoundError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the folder of a run, where its {METRICS_FILE} is")
    run = _Run.read(folder)
    title = str(run.facts.get("title") or folder.resolve().name)
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            _state(run),
            _tiles(run),
            _results(run),
            *_plots(run),
            _samples(run),
            _events(run),
            _where(run),
            _config(run),
        ]
    )
    path = folder / REPORT_FILE
    write_page(path, title, body)
    return path


def write_page(path: Path, title: str, body: str) -> None:
    """A page that needs nothing else, of HTML for its body."""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
    replace_text(path, page, errors="replace")  # a sample may hold half a surrogate pair


def _state(run: _Run) -> str:
    if not run.records:
        return '<p class="faint">No step has been logged yet.</p>'
    step = run.records[-1]["step"]
    total = run.facts.get("total_steps")
    progress = f"Step {step:,}" + (f" of {total:,} ({step / total:.1%})" if total else "")
    stage = f", stage {run.records[-1]['stage']}" if "stage" in run.records[-1] else ""
    return f'<p class="faint">{escape(progress + stage)}</p>'


def _tiles(run: _Run) -> str:
    timings = [record.get("timing", {}) for record in run.records]

    def known(name: str) -> list[float]:
        return [timing[name] for timing in timings if timing.get(name) is not None]

    tiles = {}
    if tokens := [record["tokens"] for record in run.records if "tokens" in record]:
        tiles["tokens"] = count(tokens[-1])
    if seconds := known("seconds"):
        tiles["training time"] = duration(math.fsum(seconds))
    if rates := known("tokens_per_second"):
        tiles["tokens per second, median"] = count(statistics.median(rates))
        utilisation = known("mfu")
        convention = f"MFU ({run.facts['flops_convention']})" if "flops_convention" in run.facts else "MFU"
        tiles[convention] = f"{statistics.median(utilisation):.1%}" if utilisation else "n/a"
    if memory := known("memory_bytes"):
        tiles["peak memory"] = size(max(memory))
    if run.events:
        skipped = {event["step"] for event in run.events if event["kind"] == "skipped_step"}
        tiles["steps skipped"] = f"{len(skipped):,}"
    entries = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles.items())
    return f'<dl class="tiles">{entries}</dl>' if tiles else ""


def _results(run: _Run) -> str:
    entropies = _mapping(run.facts.get("unigram_entropy"))
    curves: dict[str, tuple[list[tuple[int, float]], float | None]] = {}
    smoothed = SmoothedLoss()
    trained = of_likelihoods(run.records)
    training = [(record["step"], smoothed.update(record["loss"], record.get("stage"))) for record in trained]
    if training:
        curves["training, smoothed"] = training, None
    for corpus in validation_corpora(run.records):
        curves[f"validation, {corpus}"] = validation_curve(run.records, corpus), entropies.get(corpus)
    rewards = _rewards(run)
    if not curves:
        return f"<h2>Results</h2>{rewards}" if rewards else ""
    of_pairs = {f"validation, {corpus}" for r in run.records for corpus in r.get("validation_accuracy", {})}
    if training and "pairs" in trained[-1]:
        of_pairs.add("training, smoothed")
    rows = []
    for name, (curve, entropy) in curves.items():
        finite = [(loss, step) for step, loss in curve if math.isfinite(loss)]
        best = f"{min(finite)[0]:.4f} (step {min(finite)[1]:,})" if finite else "n/a"
        last = curve[-1][1]
        perplexity = f"{math.exp(last):.2f}" if last < 700 and name not in of_pairs else "n/a"
        reference = "" if entropy is None else f"{entropy:.4f}"
        rows.append([name, f"{curve[0][1]:.4f}", best, f"{last:.4f}", perplexity, reference])
    headings = ["loss, nats per token or pair", "first", "best", "last", "perplexity", "unigram entropy"]
    return "<h2>Results</h2>" + html_table(headings, rows, numbers=True) + rewards


def _rewards(run: _Run) -> str:
    """What reinforcement learning began with and came to."""
    sampled = [(record["step"], record["reward"]) for record in run.records if "reward" in record]
    curves = {"sampled": sampled} if sampled else {}
    for corpus in validation_corpora(run.records, "validation_reward"):
        curves[f"held out, {corpus}"] = validation_curve(run.records, corpus, "validation_reward")
    rows = []
    for name, curve in curves.items():
        best, step = max((reward, -step) for step, reward in curve)
        rows.append([name, f"{curve[0][1]:.3f}", f"{best:.3f} (step {-step:,})", f"{curve[-1][1]:.3f}"])
    return html_table(["reward", "first", "best", "last"], rows, numbers=True) if rows else ""


def _plots(run: _Run) -> Iterable[str]:
    convention = str(run.facts.get("flops_convention", "convention not recorded"))
    entropies = {corpus: float(value) for corpus, value in _mapping(run.facts.get("unigram_entropy")).items()}
    for plot in plots(run.records, entropies, convention):
        caption = f"<figcaption>{escape(plot.caption)}</figcaption>"
        yield f"<h2>{escape(plot.title)}</h2><figure>{plot.svg}{caption}</figure>"


def _samples(run: _Run) -> str:
    if not run.samples:
        return ""
    steps = sorted({sample["step"] for sample in run.samples}, reverse=True)

    def at(step: int) -> str:
        return "".join(
            f'<pre><span class="prompt">{escape(sample["prompt"])}</span>{escape(sample["text"])}</pre>{_worth(sample)}'
            for sample in run.samples
            if sample["step"] == step
        )

    earlier = "".join(f"<details><summary>Step {step:,}</summary>{at(step)}</details>" for step in steps[1:])
    return f'<h2>Samples</h2><p class="faint">Step {steps[0]:,}; the prompt is in grey.</p>{at(steps[0])}{earlier}'


def _worth(sample: Mapping[str, Any]) -> str:
    """What a completion of reinforcement learning was rewarded with, and why."""
    if "reward" not in sample:
        return ""
    facts = f"reward {sample['reward']:g} ({sample['reason']}), advantage {sample['advantage']:.3g}"
    return f'<p class="faint">{escape(facts)}</p>'


def _events(run: _Run) -> str:
    if not run.events:
        return ""
    shown = run.events[-_MOST_EVENTS:]
    rows = [[event["time"], f"{event['step']:,}", event["kind"].replace("_", " "), event["message"]] for event in shown]
    note = ""
    if left_out := len(run.events) - len(shown):
        note = f'<p class="faint">The newest {len(shown)}; {left_out:,} earlier ones are in {EVENTS_FILE}.</p>'
    return "<h2>Events</h2>" + html_table(["time", "step", "what", "message"], rows) + note


def _where(run: _Run) -> str:
    if not run.facts:
        return ""
    known = ("title", "sessions", "stages")
    parts = ["<h2>What was run where</h2>"]
    parts.append(_facts({name: value for name, value in run.facts.items() if name not in known}))
    for name in ("stages", "sessions"):
        entries = [_mapping(entry) for entry in run.facts.get(name, [])]
        if not entries:
            continue
        headings = list(dict.fromkeys(key for entry in entries for key in entry))
        parts.append(f"<h3>{name.capitalize()}</h3>")
        parts.append(html_table(headings, [[_text(entry.get(key)) for key in headings] for entry in entries]))
    return "".join(parts)


def _config(run: _Run) -> str:
    if not run.config:
        return ""
    text = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return f"<h2>Configuration</h2><details><summary>{CONFIG_FILE}</summary><pre>{text}</pre></details>"


def html_table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """An HTML table; `numbers` aligns all columns but the first to the right."""

    def row(tag: str, cells: Sequence[str]) -> str:
        rest = f'{tag} class="number"' if numbers else tag
        tags = [tag] + [rest] * (len(cells) - 1)
        filled = "".join(f"<{start}>{escape(cell)}</{tag}>" for start, cell in zip(tags, cells, strict=True))
        return f"<tr>{filled}</tr>"

    head = row("th", [heading.replace("_", " ") for heading in headings])
    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(_text(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>' if rows else ""


def _text(value: Any) -> str:
    """A value of a JSON file in words."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "n/a"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        _logger.warning("%s was left out of the report: %s", path, error)
        return {}
