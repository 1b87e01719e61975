"""The progress line, character by character, on terminals wide and narrow and elsewhere."""

import io
import logging
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_jax.metrics.console import Console, SmoothedLoss
from lightning_jax.metrics.writer import MetricsWriter, read_metrics

FULL = (
    "step 1,200/10,000 12.0% | pretrain | loss 2.3412 | lr 3.00e-4 | grad 0.81 | 8.12k tok/s | 504 ms | "
    "mfu 41.2% (6N) | 1.90 GiB | eta n/a"
)
CLEAR = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    @property
    def lines(self):
        """What is to be seen: each carriage return with a clear starts its line anew."""
        return [line.rsplit(CLEAR, 1)[-1] for line in self.getvalue().split("\n")]


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def record(step=1200, loss=2.3412, **changes):
    return {
        "step": step,
        "stage": "pretrain",
        "loss": loss,
        "learning_rate": 3e-4,
        "gradient_norm": 0.8123,
        "tokens": step * 4096,
        "timing": {
            "tokens_per_second": 8123.4,
            "milliseconds_per_step": 504.2,
            "mfu": 0.412,
            "memory_bytes": 1.9 * 2**30,
        },
    } | changes


@pytest.fixture
def make_console(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def make(stream, **arguments):
        clock = Clock()
        defaults = {"total_steps": 10_000, "total_tokens": 40_960_000, "flops_convention": "6N"}
        return Console(stream=stream, clock=clock, **(defaults | arguments)), clock

    return make


def test_plain_line(make_console):
    stream = io.StringIO()
    console, _ = make_console(stream)
    console.progress(record())
    assert stream.getvalue() == FULL + "\n"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (len(FULL) + 1, FULL),
        (len(FULL), FULL.replace(" | 1.90 GiB", "")),
        (132, "step 1,200/10,000 12.0% | pretrain | loss 2.3412 | lr 3.00e-4 | grad 0.81 | 8.12k tok/s | 504 ms | "
              "mfu 41.2% (6N) | eta n/a"),
        (110, "step 1,200/10,000 12.0% | pretrain | loss 2.3412 | lr 3.00e-4 | grad 0.81 | 8.12k tok/s | 504 ms | "
              "eta n/a"),
        (80, "step 1,200/10,000 12.0% | loss 2.3412 | grad 0.81 | 8.12k tok/s | eta n/a"),
        (50, "step 1,200/10,000 12.0% | loss 2.3412 | eta n/a"),
        (40, "step 1,200/10,000 12.0% | loss 2.3412"),
        (30, "step 1,200/10,000 12.0%"),
        (10, "step 1,20"),
    ],
)  # fmt: skip
def test_narrow_terminals_lose_the_least_important_first(columns, line, make_console, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    console, _ = make_console(stream)
    console.progress(record())
    assert stream.getvalue() == CLEAR + line + "\n"
    assert len(line) < columns


def test_unknown_values_are_said_or_left_out(make_console):
    stream = io.StringIO()
    console, _ = make_console(stream)
    timing = {"tokens_per_second": None, "milliseconds_per_step": None, "mfu": None, "memory_bytes": None}
    console.progress({"step": 1, "loss": math.nan, "timing": timing})
    assert stream.getvalue() == "step 1/10,000 0.0% | loss nan | mfu n/a (6N)\n"


def test_terminal_rewrites_in_place_at_a_readable_rate(make_console):
    stream = Terminal()
    console, clock = make_console(stream)
    for step in range(1, 200):
        console.progress({"step": step})
        clock.now += 0.03
    console.close()
    standing = ["step 1/10,000 0.0%", "step 199/10,000 2.0%", ""]
    assert stream.lines == standing
    # 5.94 seconds, redrawn when at least a tenth of one has passed, so every fourth step; and what was left at the end.
    assert stream.getvalue().count(CLEAR) == 1 + 198 // 4 + 1


def test_every_ten_seconds_a_line_stays(make_console):
    for stream in (Terminal(), io.StringIO()):
        console, clock = make_console(stream)
        for step in range(1, 26):
            console.progress({"step": step})
            clock.now += 1.0
        console.close()
        lines = stream.lines if isinstance(stream, Terminal) else stream.getvalue().split("\n")
        assert [line.split("/")[0] for line in lines] == ["step 1", "step 11", "step 21", "step 25", ""]


def test_the_last_step_stays_and_close_adds_nothing(make_console):
    stream = io.StringIO()
    console, clock = make_console(stream, total_steps=2)
    console.progress({"step": 1})
    clock.now += 0.5
    console.progress({"step": 2})
    console.close()
    assert stream.getvalue() == "step 1/2 50.0%\nstep 2/2 100.0%\n"


def test_announcements_do_not_garble_the_progress_line(make_console):
    stream = Terminal()
    console, clock = make_console(stream)
    console.say("resumed from step 40")
    console.progress({"step": 41})
    clock.now += 1
    console.progress({"step": 42})
    assert stream.lines[-1] == "step 42/10,000 0.4%"
    console.say("checkpoint 42 written")
    assert stream.lines[-2:] == ["checkpoint 42 written", "step 42/10,000 0.4%"]
    clock.now += 1
    console.progress({"step": 43})
    logger = logging.getLogger("test_announcements")
    logger.addHandler(console.log_handler())
    logger.propagate = False
    logger.warning("one record was skipped")
    console.close()
    assert stream.lines == [
        "resumed from step 40",
        "step 41/10,000 0.4%",
        "checkpoint 42 written",
        "one record was skipped",
        "step 43/10,000 0.4%",
        "",
    ]


def test_announcements_are_plain_lines_where_there_is_no_terminal(make_console, monkeypatch):
    for stream in (io.StringIO(), Terminal()):
        if isinstance(stream, Terminal):
            monkeypatch.setenv("TERM", "dumb")
        console, clock = make_console(stream)
        console.progress({"step": 1})
        clock.now += 1
        console.progress({"step": 2})
        console.say("preempted")
        console.close()
        assert stream.getvalue() == "step 1/10,000 0.0%\npreempted\nstep 2/10,000 0.0%\n"


def test_time_left_follows_tokens_not_steps(make_console):
    stream = io.StringIO()
    console, clock = make_console(stream, total_steps=300, total_tokens=1_000_000)
    console.progress({"step": 100, "tokens": 100_000})
    clock.now += 50.0
    console.progress({"step": 200, "tokens": 200_000})
    clock.now += 50.0
    console.progress({"step": 300, "tokens": 1_000_000})
    assert [line.split(" | ")[-1] for line in stream.getvalue().splitlines()] == ["eta n/a", "eta 6m40s", "eta 0s"]


def test_header_aligns_and_wraps(make_console, monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    stream = io.StringIO()
    console, _ = make_console(stream)
    console.header(
        "minimax_m1:laptop",
        {
            "device": "1 × cpu",
            "stages": ["pretrain: 600 steps", "long: 200 steps"],
            "corpus": "text 70%, code 30%, " * 3,
        },
    )
    assert stream.getvalue() == (
        "minimax_m1:laptop\n"
        "  device  1 × cpu\n"
        "  stages  pretrain: 600 steps\n"
        "          long: 200 steps\n"
        "  corpus  text 70%, code 30%, text 70%, code\n"
        "          30%, text 70%, code 30%,\n"
    )


def test_a_stream_that_cannot_write_a_character_replaces_it(make_console):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console, _ = make_console(stream)
    console.say("2 × TPU")
    assert raw.getvalue() == b"2 ? TPU\n"


def test_other_processes_print_nothing(make_console, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stream = Terminal()
    console, _ = make_console(stream)
    console.header("a", {"b": "c"})
    console.progress(record())
    console.close()
    assert stream.getvalue() == ""


losses = st.lists(st.floats(0, 20) | st.just(math.nan) | st.just(math.inf), max_size=30)


@settings(max_examples=50, deadline=None)
@given(losses=losses)
def test_smoothing_is_the_weighted_mean_of_all_finite_losses(losses):
    smoothed = SmoothedLoss()
    finite = []
    for loss in losses:
        average = smoothed.update(loss)
        finite += [loss] if math.isfinite(loss) else []
        if finite:
            weights = 0.9 ** np.arange(len(finite))[::-1]
            assert average == pytest.approx(np.average(finite, weights=weights), rel=1e-12, abs=1e-300)
        else:
            assert math.isnan(average)


@settings(max_examples=20, deadline=None)
@given(losses=st.lists(st.floats(0, 20, width=32), min_size=1, max_size=12), data=st.data())
def test_smoothing_resumes_to_the_bit_from_the_file(losses, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with MetricsWriter(folder, resume_step=None, tensorboard=False) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.write(step, {"loss": np.float32(loss)})
    resume_step = data.draw(st.integers(0, len(losses)))
    MetricsWriter(folder, resume_step=resume_step, tensorboard=False).close()
    uninterrupted, resumed = SmoothedLoss(), SmoothedLoss()
    expected = [uninterrupted.update(float(np.float32(loss))) for loss in losses]
    for earlier in read_metrics(folder):
        resumed.update(earlier["loss"])
    assert [resumed.update(float(np.float32(loss))) for loss in losses[resume_step:]] == expected[resume_step:]


def test_console_goes_on_smoothing_from_its_history(make_console):
    history = [{"step": step, "loss": 9.0 - step} for step in range(1, 6)]
    whole, resumed = io.StringIO(), io.StringIO()
    console, clock = make_console(whole)
    for earlier in history:
        console.progress(earlier)
    clock.now += 20
    console.progress({"step": 6, "loss": 3.0})
    console, _ = make_console(resumed, history=history)
    console.progress({"step": 6, "loss": 3.0})
    assert resumed.getvalue().splitlines()[-1] == whole.getvalue().splitlines()[-1]
