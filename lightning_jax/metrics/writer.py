"""The record of a run: metrics.jsonl, samples.jsonl, events.jsonl and TensorBoard files in the run's folder.

metrics.jsonl has one JSON object per line: `step` first, then the step's metrics by name, and last `timing`, the only
part that two runs of the same configuration may disagree on. Everything else is a function of the configuration and the
step, so the file of a run that was killed and resumed equals that of one that never was, once `timing` is taken out.
That holds if whoever trains writes the line of a step before committing the checkpoint of that step.

Names that the console and the report know (all optional):
  stage             name of the stage
  loss              what is minimised, mean over the step's target tokens, in nats
  learning_rate, gradient_norm
  tokens            consumed by the run so far, this step included
  batch_tokens, context_length
  expert_load       [layers][experts] tokens of each expert relative to an even share, which is 1
  dropped_fraction  share of routed tokens that found no room (capacity dispatch only)
  validation_loss   {corpus: nats per token, or per pair}
  accuracy, margin  of preferences: share of pairs told right, and by how much on average
  validation_accuracy  {corpus: share of pairs told right}
  reward            mean of a generation's rollouts, before prompts are replaced; with it in records of their own
                    score, equal_reward_groups, completion_tokens, probability_correlation, refills, prompts, ...
  entropy, clip_share, cap_share, kl, policy_change  of the policy at the trained tokens
  validation_reward {corpus: mean reward of the likeliest completions of held-out prompts}
  timing            {seconds, tokens_per_second, milliseconds_per_step, mfu, memory_bytes}, see throughput.py
"""

import json
import logging
import math
import os
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVENTS_FILE = "events.jsonl"
_LINE_FILES = (METRICS_FILE, SAMPLES_FILE, EVENTS_FILE)
TENSORBOARD_FOLDER = "tensorboard"

EventKind = Literal["start", "resume", "checkpoint", "skipped_step", "rollouts", "preempted", "finish"]

_logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends what a run reports to the files in its folder; on processes other than 0 every call does nothing.

    Args:
      folder: of the run; made if missing.
      resume_step: the step of the checkpoint that was restored: metrics and samples of later steps are cut, for the run
        will write them again. None where nothing was restored: metrics and samples of an earlier attempt are removed.
        Events are a history of what happened and are never cut.
      tensorboard: also write TensorBoard event files, which forget the same steps.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int | None, tensorboard: bool):
        self._active = jax.process_index() == 0
        self._summary: SummaryWriter | None = None
        if not self._active:
            return
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        last_step = -1 if resume_step is None else resume_step
        for name in (METRICS_FILE, SAMPLES_FILE):
            _cut_after(self.folder / name, last_step)
        _end_last_line(self.folder / EVENTS_FILE)
        self._files = {name: open(self.folder / name, "a", encoding="utf-8") for name in _LINE_FILES}  # noqa: SIM115
        if tensorboard:
            self._summary = _summary_writer(self.folder / TENSORBOARD_FOLDER, purge_step=last_step + 1)

    def write(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Appends one line and hands it to the operating system, so that a kill right after cannot lose it.

        Args:
          step: of the run, counted from 1 for the first update; 0 is before it.
          metrics: by name; numbers, text, None, arrays of any shape, and mappings of those. Device arrays are fetched.
          timing: whatever depends on the machine and the moment, kept apart under "timing".

        Returns:
          The record as `read_metrics` will return it.
        """
        record = {"step": int(step)} | {name: _plain(metrics[name]) for name in sorted(metrics)}
        if timing is not None:
            record["timing"] = {name: _plain(timing[name]) for name in sorted(timing)}
        if self._active:
            self._append(METRICS_FILE, record)
        if self._summary is not None:
            for tag, value in _scalars(record):
                self._summary.add_scalar(tag, value, step)
        return record

    def sample(self, step: int, *, stage: str, prompt: str, text: str, **facts: str | float) -> None:
        """Appends a text that the model wrote after `prompt`, and what else is known of it, as its reward."""
        if not self._active:
            return
        self._append(SAMPLES_FILE, {"step": int(step), "stage": stage, "prompt": prompt, "text": text, **facts})
        if self._summary is not None:
            self._summary.add_text("sample", textwrap.indent(prompt + text, "    ", lambda line: True), step)

    def event(self, kind: EventKind, message: str, *, step: int) -> None:
        """Appends something that happened to the run, with the time of day."""
        if self._active:
            moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            self._append(EVENTS_FILE, {"step": int(step), "time": moment, "kind": kind, "message": message})

    def close(self) -> None:
        """Closes the files. Calling it again does nothing."""
        if not self._active:
            return
        for file in self._files.values():
            file.close()
        if self._summary is not None:
            self._summary.close()
        self._active, self._summary = False, None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        self._files[name].write(_line(record))
        self._files[name].flush()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads metrics.jsonl (or samples.jsonl, events.jsonl) back, each float to the same bits.

    A last line that a kill or a running writer left unfinished is left out; so is any other line that is no JSON
    object with a step, with a warning that names it. A file that nobody wrote yet has no records.

    Args:
      path: the file, or the run's folder for its metrics.jsonl.
    """
    path = Path(path)
    return [record for _, record in _lines(path / METRICS_FILE if path.is_dir() else path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Complete lines of `path` with what they say."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                record["step"] = int(record["step"])
            except (ValueError, TypeError, KeyError):
                _logger.warning("%s:%d is not a record of a step and was left out", path, number)
                continue
            yield line, record


def _cut_after(path: Path, last_step: int) -> None:
    """Leaves the complete lines of steps up to `last_step`; a kill at any moment leaves the old file or the new one."""
    kept = [line for line, record in _lines(path) if record["step"] <= last_step]
    replacement = path.with_suffix(".cut")
    replacement.write_bytes(b"".join(kept))
    os.replace(replacement, path)


def _end_last_line(path: Path) -> None:
    """Drops an unfinished last line, which would swallow the next one."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _summary_writer(folder: Path, purge_step: int) -> "SummaryWriter":
    from tensorboardX import SummaryWriter  # its import costs more than all of ours

    # TensorBoard's file names end in whole seconds: a run that starts twice in one second would lose its first file.
    return SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=f".{time.time_ns()}", flush_secs=30)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """A value as Python's json writes it: NaN and infinities as the bare words NaN, Infinity, -Infinity."""
    if isinstance(value, Mapping):
        return {str(name): _plain(value[name]) for name in sorted(value)}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    array = np.asarray(value)
    # Other floats (float32, bfloat16) go through float64, which holds each of them exactly.
    return (array if array.dtype.kind in "biuU" else array.astype(np.float64)).tolist()


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a record as TensorBoard tags: a/b for the entry b of the mapping a."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step" and math.isfinite(value):
            yield prefix + name, value
