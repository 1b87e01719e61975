"""The report holds the numbers, escapes what others wrote, loads nothing and survives whatever is missing."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lightning_jax.metrics.page import write_report
from lightning_jax.metrics.report import main
from lightning_jax.metrics.writer import MetricsWriter

NASTY = "<script>alert('1')</script> & \"$x_\\alpha$\" _hidden"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Collects text and attributes and fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.text_of_plots = [], set(), [], "", ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "svg" in self.open:
            self.text_of_plots += data


def parse(path):
    page = Checker()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def write_run(folder, steps=40):
    with MetricsWriter(folder, resume_step=None, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            metrics = {
                "stage": "pretrain" if step <= 30 else NASTY,
                "loss": math.nan if step == 7 else 8.0 / step,
                "learning_rate": 1e-3,
                "gradient_norm": math.inf if step == 7 else 1.0,
                "tokens": step * 4096,
                "batch_tokens": 4096,
                "context_length": 512,
                "expert_load": np.ones((2, 4)),
                "dropped_fraction": 0.01,
            }
            if step % 20 == 0:
                metrics["validation_loss"] = {NASTY: 50.0 / step}
            timing = {"seconds": 0.5, "tokens_per_second": 8192.0, "mfu": 0.411, "memory_bytes": 3 * 2**30}
            writer.write(step, metrics, timing)
        writer.sample(20, stage="pretrain", prompt="early", text="words")
        writer.sample(40, stage="pretrain", prompt="def f():", text=NASTY)
        writer.event("skipped_step", NASTY, step=7)
        writer.event("skipped_step", "the same again after a resume", step=7)
        writer.event("resume", "from step 20", step=20)
    facts = {
        "title": NASTY,
        "total_steps": 80,
        "flops_convention": "6N",
        "unigram_entropy": {NASTY: 6.25},
        "corpora": {NASTY: "documentation"},
        "stages": [{"name": "pretrain", "steps": 30}, {"name": "long", "context_length": 2048}],
        "sessions": [{"started": "2026-01-01T00:00:00Z", "commit": None, "versions": {"jax": "0.10.2"}}],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(json.dumps({"model": {"hidden_size": 1536, "note": NASTY}}))


FILES = ("metrics.jsonl", "samples.jsonl", "events.jsonl", "run.json", "config.json")


def test_report_holds_the_numbers(tmp_path):
    write_run(tmp_path)
    write_report(tmp_path)
    words = spaced(tmp_path)
    for expected in (
        "Step 40 of 80 (50.0%)",
        "tokens 164k",  # 40 * 4096
        "training time 20s",
        "8.19k",
        "MFU (6N) 41.1%",
        "3.00 GiB",
        "steps skipped 1",
        "2.5000 1.2500 (step 40) 1.2500 3.49 6.2500",  # validation: first, best, last, exp(1.25), entropy
        "resume from step 20",
        "def f():",
        "jax: 0.10.2",
        "2,048",
        '"hidden_size": 1536',
    ):
        assert expected in words, expected
    headings = re.findall(r"<h2>(.*?)</h2>", (tmp_path / "report.html").read_text())
    assert headings == [
        "Results", "Loss", "Learning rate", "Gradient norm", "Batch size and context", "Throughput", "Expert load",
        "Expert balance", "Samples", "Events", "What was run where", "Configuration",
    ]  # fmt: skip


def test_report_of_reinforcement_learning_shows_what_it_learns_from_and_how_fast(tmp_path):
    measured = {"reward": 0.5, "equal_reward_groups": 0.25, "completion_tokens": 30.0, "probability_correlation": 0.999}
    rates = {f"{part}_tokens_per_second": 100.0 for part in ("generated", "rewarded", "scored")}
    with MetricsWriter(tmp_path, resume_step=None, tensorboard=False) as writer:
        for step in range(1, 4):
            writer.write(step, measured, rates)
            writer.write(step, {"loss": 0.1, "kl": 0.01, "entropy": 1.0, "clip_share": 0.0}, {"tokens_per_second": 9.0})
            writer.sample(step, stage="rl", prompt="1 + 1", text="2", reward=1.0, reason="equal", advantage=0.7)
    page = write_report(tmp_path).read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    expected = {"Reward", "Length of completions", "Entropy", "Clipped tokens", "Prompts that teach nothing"}
    expected |= {
        "Divergence from the reference",
        "Agreement of rollouts and trainer",
        "Speed of rollouts, rewards and updates",
    }
    assert expected <= set(headings)
    assert "reward 1 (equal), advantage 0.7" in page
    for part in ("generation", "reward", "scoring by the trainer", "update"):
        assert part in page


def spaced(folder):
    """The page's text with a space where a tag was."""
    page = re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text())
    return " ".join(page.replace("&quot;", '"').split())


def test_report_of_reinforcement_learning_tells_rewards_and_takes_no_policy_gradient_for_a_loss(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None, tensorboard=False) as writer:
        writer.write(1, {"loss": 2.5, "stage": "sft"})
        for step, (reward, held_out) in enumerate([(0.3, 0.25), (0.75, 0.875), (0.7, 0.5)], start=2):
            writer.write(step, {"reward": reward, "stage": "rl"})
            writer.write(step, {"validation_reward": {"sums": held_out}, "stage": "rl"})
            writer.write(step, {"loss": -0.01, "surrogate": -0.01, "stage": "rl"})
    page = parse(write_report(tmp_path))
    words = spaced(tmp_path)
    assert "training, smoothed 2.5000 2.5000 (step 1) 2.5000 12.18" in words
    assert "sampled 0.300 0.750 (step 3) 0.700" in words
    assert "held out, sums 0.250 0.875 (step 3) 0.500" in words
    assert "held out, sums" in page.text_of_plots


def test_report_escapes_what_others_wrote_and_loads_nothing(tmp_path):
    write_run(tmp_path)
    page = parse(write_report(tmp_path))
    assert "script" not in page.tags
    assert NASTY in page.text_of_plots  # the name of the second stage
    assert page.text.count(NASTY) > page.text_of_plots.count(NASTY)  # and elsewhere
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value)
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text)


def test_identifiers_are_unique_and_the_page_is_reproducible(tmp_path):
    write_run(tmp_path)
    path = write_report(tmp_path)
    first = path.read_bytes()
    identifiers = [value for name, value in parse(path).attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers)) > 0
    assert write_report(tmp_path).read_bytes() == first


@pytest.mark.parametrize("missing", [*[(name,) for name in FILES], FILES, FILES[1:], FILES[:3]], ids=" ".join)
def test_report_survives_missing_files(missing, tmp_path):
    write_run(tmp_path, steps=3)
    for name in missing:
        (tmp_path / name).unlink()
    page = parse(write_report(tmp_path))
    assert ("No step has been logged yet." in page.text) == ("metrics.jsonl" in missing)


@pytest.mark.parametrize(
    "record",
    [
        {"step": 1},
        {"step": 1, "loss": math.nan},
        {"step": 0, "validation_loss": {"text": 5.0}},
        {"step": 1, "loss": 2.0, "gradient_norm": -1.0, "expert_load": [[1.5, 0.5]], "timing": {"mfu": None}},
        {"step": 1, "loss": 9.0, "learning_rate": 0.0, "timing": {"tokens_per_second": None}},
        {"step": 5, "loss": math.inf, "gradient_norm": 0.0, "tokens": 1, "validation_loss": {"text": math.nan}},
    ],
)
def test_report_survives_odd_records(record, tmp_path):
    with MetricsWriter(tmp_path, resume_step=None, tensorboard=False) as writer:
        writer.write(record.pop("step"), record, record.pop("timing", None))
    parse(write_report(tmp_path))


def test_report_survives_half_written_files(tmp_path):
    write_run(tmp_path, steps=3)
    for name in FILES:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) - 7])
    assert "Step 2" in parse(write_report(tmp_path)).text


def test_long_runs_keep_their_spikes_in_a_page_of_bounded_size(tmp_path):
    with MetricsWriter(tmp_path, resume_step=None, tensorboard=False) as writer:
        for step in range(20_000):
            norm = 1234.5 if step == 12_345 else 1.0 + 0.1 * math.sin(step)
            writer.write(step, {"loss": 3.0, "gradient_norm": norm, "expert_load": [[1.0, 1.0]]})
    path = write_report(tmp_path)
    assert path.stat().st_size < 1_000_000
    assert ">1000<" in path.read_text()  # the logarithmic axis reaches the spike


def test_command_writes_the_report_and_refuses_what_is_no_folder(tmp_path, capsys):
    write_run(tmp_path, steps=2)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path / 'nothing'} is no folder; give the folder of a run, where its metrics.jsonl is\n"
    )
