"""Tables and the page hold what was measured, and pictures are one cell or point for each number."""

import json
import re
from xml.etree import ElementTree

import pytest

from lightning_jax.errors import UserError
from lightning_jax.evaluation import table, write_results

POSITIONS = [
    {"from": 1, "to": 1, "tokens": 3, "nats_per_token": 5.5, "perplexity": 244.7},
    {"from": 2, "to": 3, "tokens": 6, "nats_per_token": 4.25, "perplexity": 70.1},
    {"from": 1024, "to": 2047, "tokens": 6, "nats_per_token": 2.0, "perplexity": 7.4},
]
CORPUS = {
    "asked": {"layout": "documents", "context_length": 64, "stride": 32},
    "documents": 3,
    "bytes": 12,
    "bits_per_byte": 7.25,
    "tokens": 1234567,
    "nats_per_token": 4.5,
    "perplexity": 90.0,
    "by_position": POSITIONS,
}
CELLS = [
    {"length": length, "depth": depth, "choice": depth / 100, "exact_match": 0.25, "answer_nats": 12.5}
    for length in (1000, 4096)
    for depth in (0.0, 12.5, 100.0)
]
RESULTS = {
    "model": {"name": "<tiny>", "parameters": 1234},
    "perplexity": {"wiki": CORPUS, "book & co": CORPUS | {"by_position": POSITIONS[:1]}},
    "needle": {
        f"{length} tokens": {"asked": {"trials": 4, "distractors": 7}, "cells": cells}
        for length, cells in ((1000, CELLS[:3]), (4096, CELLS[3:]))
    },
    "lm_eval": {
        "toy.yaml": {
            "lm_eval_version": "0.4.13",
            "results": {
                "toy": {
                    "alias": "toy",
                    "acc,none": 0.5,
                    "acc_stderr,none": 0.125,
                    "bits,none": 1.5,
                    "bits_stderr,none": "N/A",
                }
            },
        }
    },
}


def test_the_console_shows_every_number_in_aligned_columns():
    shown = table(RESULTS)
    assert "  wiki               4.5000      90.000         7.2500  1,234,567     12\n" in shown
    assert "  1,024 to 2,047  2.0000" in shown
    assert "  4,096    12%" not in shown
    assert re.search(r"4,096 +12\.5% +25% +12% +12\.500", shown)
    assert re.search(r"toy +acc +none +0\.5000 +0\.1250", shown)
    assert re.search(r"toy +bits +none +1\.5000$", shown, re.MULTILINE)
    assert table({"model": {}}) == ""


def test_the_page_is_self_contained_and_its_pictures_have_a_mark_for_each_number(tmp_path):
    write_results(tmp_path / "out", RESULTS)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == RESULTS
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "<h1>&lt;tiny&gt;</h1>" in page
    assert "http://" not in page
    assert "https://" not in page
    curves, heat_maps = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert len(heat_maps.findall("rect")) == 2 * len(CELLS)
    titles = [rect.find("title").text for rect in heat_maps.findall("rect")]
    assert "4,096 tokens, depth 100%: 100%" in titles
    fills = {rect.find("title").text: rect.get("fill") for rect in heat_maps.findall("rect")}
    assert (fills["1,000 tokens, depth 0%: 0%"], fills["1,000 tokens, depth 100%: 100%"]) == ("#ef4444", "#10b981")
    labels = [text.text for text in heat_maps.findall("text")]
    assert {"1,000", "4K", "12.5%"} <= set(labels)
    assert len(curves.findall("polyline")) == 2
    assert len(curves.findall("circle")) == 4 + 2
    assert {"wiki", "book & co", "1K"} <= {text.text for text in curves.findall("text")}


def test_a_folder_that_cannot_be_written_is_a_mistake_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out=.*file: "):
        write_results(tmp_path / "file", RESULTS)
