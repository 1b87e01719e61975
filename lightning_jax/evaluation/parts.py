"""The parts of an evaluation: each is written as soon as it is there, and not computed again where it was.

Beside each part stands what it was an answer to: the texts and options that decide it. Parts of another model, or of
other options, are computed anew.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from lightning_jax.checkpoints import processes
from lightning_jax.errors import UserError
from lightning_jax.evaluation.report import RESULTS_FILE, write_results
from lightning_jax.model_folders import read_json

Results = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A corpus, a length of needles, or a task of the harness.

    Attributes:
        asked: all that decides the answer but the model; what JSON can hold.
        answer: computes it; what JSON can hold.
    """

    kind: Literal["perplexity", "needle", "lm_eval"]
    name: str
    asked: Mapping[str, Any]
    answer: Callable[[], Results]


def run_parts(
    parts: Sequence[Part], model: Mapping[str, Any], folder: Path | None, say: Callable[[str], None]
) -> Results:
    """Runs the parts that are not in the folder's results yet.

    Args:
        model: facts about it; two with one `fingerprint` are the same.
        folder: where results.json and its page are, or shall be; None for nowhere.
        say: is told what goes on.

    Returns:
        `model`, and for each kind its parts by name, each with what was `asked` and its answer. Kinds that are not
        asked for stay as the folder has them.

    Raises:
        UserError: the folder's results.json is something else, or cannot be written.
    """
    kinds = dict.fromkeys(part.kind for part in parts)
    before = _results_before(folder, model, say)
    results: Results = {"model": dict(model)} | {k: v for k, v in before.items() if k not in ("model", *kinds)}
    answers: dict[tuple[str, str], Results] = {}

    def write() -> None:
        for kind in kinds:
            names = [part.name for part in parts if part.kind == kind and (kind, part.name) in answers]
            results[kind] = {name: answers[kind, name] for name in names}
        if folder and jax.process_index() == 0:
            write_results(folder, results)

    for part in parts:
        there = before.get(part.kind, {}).get(part.name)
        if processes.all_agree(there is not None and there["asked"] == json.loads(json.dumps(part.asked))):
            answers[part.kind, part.name] = there
            say(f"{part.kind}: {part.name}: it is in {RESULTS_FILE} already")
    write()  # if it cannot be done, now is the time to hear of it
    for part in parts:
        if (part.kind, part.name) not in answers:
            say(f"{part.kind}: {part.name}")
            answers[part.kind, part.name] = {"asked": dict(part.asked), **part.answer()}
            write()
    return results


def _results_before(folder: Path | None, model: Mapping[str, Any], say: Callable[[str], None]) -> Results:
    """What an earlier evaluation of the same model left; empty if there was none."""
    if folder is None:
        return {}
    path = folder / RESULTS_FILE
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder}: it is no folder")
    if not (before := read_json(path)):
        return {}
    try:
        same = before["model"].get("fingerprint") == model["fingerprint"]
    except (KeyError, AttributeError):
        raise UserError(f"{path}: not the results of an evaluation; give another --out") from None
    if not same:
        say(f"{path}: of another model, or of this one before it was trained on; all is evaluated anew")
        return {}
    return before
