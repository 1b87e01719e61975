"""The progress line of a run, its header and its announcements.

On a terminal the line is rewritten in place and now and then left standing; anywhere else (a pipe, CI, a notebook) only
the lines that would be left standing are printed. Only process 0 prints.
"""

import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

import jax

from lightning_jax.metrics.formatting import count, duration, scientific, size

_SMOOTHING = 0.9  # weight that the mean so far keeps when a logged loss joins it
_SECONDS_BETWEEN_REDRAWS = 0.1
_SECONDS_BETWEEN_STANDING_LINES = 10.0
_CLEAR_LINE = "\r\x1b[K"
_HEADER_WIDTH = 100


class SmoothedLoss:
    """Exponential moving average of the logged losses without the bias towards its start (as in Adam, arXiv 1412.6980).

    It begins anew with every stage, for what is minimised may differ. It is a function of the losses in the order of
    metrics.jsonl, so feeding it that file's losses resumes it exactly. Losses that are not finite are left out.
    """

    def __init__(self) -> None:
        self._stage: str | None = None
        self._mean = 0.0
        self._weight = 0.0

    def update(self, loss: float, stage: str | None = None) -> float:
        """Takes in a loss and returns the average; NaN before the first finite loss of the stage."""
        if stage != self._stage:
            self._stage, self._mean, self._weight = stage, 0.0, 0.0
        if abs(loss) < float("inf"):
            self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
            self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        return self._mean / self._weight if self._weight else float("nan")


class Console:
    """What a person sees of a run.

    Args:
      total_steps: of the run.
      total_tokens: of the run; the time left is estimated by tokens, for steps may grow.
      flops_convention: name of the FLOPs count behind the records' MFU.
      history: records of the run's earlier steps (`read_metrics` after a resume), which the smoothed loss goes on from.
      stream: where to print; standard output if None.
      clock: seconds, never going back.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        total_tokens: int,
        flops_convention: str,
        history: Iterable[Mapping[str, Any]] = (),
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total_steps, self._total_tokens, self._flops_convention = total_steps, total_tokens, flops_convention
        self._stream, self._clock = stream or sys.stdout, clock
        self._active = jax.process_index() == 0
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()  # checkpoints announce themselves from their own thread
        self._smoothed = SmoothedLoss()
        for record in history:
            if "loss" in record:
                self._smoothed.update(record["loss"], record.get("stage"))
        self._live = ""  # the line that stands unfinished on the terminal
        self._pending = ""  # the newest line, where it was not printed for good
        self._drawn = self._stood = float("-inf")
        self._first: tuple[float, int] | None = None  # time and tokens of the first record: the pace is taken from it

    def header(self, title: str, rows: Mapping[str, str | Sequence[str]]) -> None:
        """Prints a block of labelled facts; long ones are wrapped, a sequence takes a line for each entry."""
        label_width = max(map(len, rows), default=0)
        width = min(self._width() or _HEADER_WIDTH, _HEADER_WIDTH)
        lines = [title]
        for label, facts in rows.items():
            indent = "  " + " " * label_width + "  "
            for index, fact in enumerate([facts] if isinstance(facts, str) else facts):
                first = f"  {label:{label_width}}  " if index == 0 else indent
                room = max(width, len(indent) + 20)
                lines += textwrap.wrap(fact, room, initial_indent=first, subsequent_indent=indent) or [first.rstrip()]
        self.say("\n".join(lines))

    def say(self, text: str) -> None:
        """Prints an announcement on its own line or lines; the progress line moves below it."""
        with self._lock:
            self._print((_CLEAR_LINE if self._live else "") + text + "\n" + self._live)

    def progress(self, record: Mapping[str, Any]) -> None:
        """Shows a record as `MetricsWriter.write` returned it; fields that it lacks are left out."""
        with self._lock:
            now = self._clock()
            line = self._line(record, now)
            self._pending = line
            if now - self._stood >= _SECONDS_BETWEEN_STANDING_LINES or record["step"] >= self._total_steps:
                self._stand(now)
            elif self._terminal and now - self._drawn >= _SECONDS_BETWEEN_REDRAWS:
                self._drawn, self._live = now, line
                self._print(_CLEAR_LINE + line)

    def close(self) -> None:
        """Leaves the newest progress line standing."""
        with self._lock:
            if self._pending:
                self._stand(self._clock())

    def log_handler(self) -> logging.Handler:
        """A handler through which log messages become announcements, instead of running into the progress line."""
        return _AnnouncingHandler(self)

    def _stand(self, now: float) -> None:
        self._print((_CLEAR_LINE if self._terminal else "") + self._pending + "\n")
        self._drawn = self._stood = now
        self._live = self._pending = ""

    def _line(self, record: Mapping[str, Any], now: float) -> str:
        fields = self._fields(record, now)
        width = self._width()
        # A terminal whose last column is written to starts a new line, hence width - 1.
        while width and len(line := " | ".join(text for _, text in fields)) > width - 1 and len(fields) > 1:
            fields.remove(max(fields))
        line = " | ".join(text for _, text in fields)
        return line[: width - 1] if width else line

    def _fields(self, record: Mapping[str, Any], now: float) -> list[tuple[int, str]]:
        """The line from left to right, each part with its rank: the highest goes first where the line is too long."""
        step, timing = record["step"], record.get("timing", {})
        fields = [(0, f"step {step:,}/{self._total_steps:,} {step / self._total_steps:.1%}")]
        if "stage" in record:
            fields.append((7, record["stage"]))
        if "loss" in record:
            fields.append((1, f"loss {self._smoothed.update(record['loss'], record.get('stage')):.4f}"))
        if "learning_rate" in record:
            fields.append((5, f"lr {scientific(record['learning_rate'])}"))
        if "gradient_norm" in record:
            fields.append((4, f"grad {record['gradient_norm']:.2f}"))
        if timing.get("tokens_per_second") is not None:
            fields.append((3, f"{count(timing['tokens_per_second'])} tok/s"))
        if timing.get("milliseconds_per_step") is not None:
            fields.append((6, f"{timing['milliseconds_per_step']:,.0f} ms"))
        if "mfu" in timing:
            value = "n/a" if timing["mfu"] is None else f"{timing['mfu']:.1%}"
            fields.append((8, f"mfu {value} ({self._flops_convention})"))
        if timing.get("memory_bytes") is not None:
            fields.append((9, size(timing["memory_bytes"])))
        if "tokens" in record:
            fields.append((2, f"eta {self._time_left(record['tokens'], now)}"))
        return fields

    def _time_left(self, tokens: int, now: float) -> str:
        if self._first is None:
            self._first = now, tokens
        begin, tokens_then = self._first
        if tokens >= self._total_tokens:
            return "0s"
        if tokens == tokens_then or now == begin:
            return "n/a"
        return duration((self._total_tokens - tokens) * (now - begin) / (tokens - tokens_then))

    def _width(self) -> int | None:
        """Columns of the terminal, asked each time because windows change; None where lines may be of any length."""
        if os.environ.get("COLUMNS", "").isdecimal() and int(os.environ["COLUMNS"]) > 0:
            return int(os.environ["COLUMNS"])
        if not self._terminal:
            return None
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80

    def _print(self, text: str) -> None:
        if not self._active:
            return
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


class _AnnouncingHandler(logging.Handler):
    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(self.format(record))
