"""The search for block sizes tries what can win, and goes on where it was cut."""

import pathlib

import pytest
import tpu_block_sizes
from tpu_block_sizes import Candidate, Figures, choose, fewer_and_fewer_heads, recorded

from pallas_kernels.tpu.block_size_table import BLOCK_SIZES

SEARCH = [Candidate("v5e", 64, "bfloat16", "forward", 128, heads) for heads in (16, 8, 4, 2)]


@pytest.mark.parametrize(
    ("nanoseconds", "tried"),
    [
        ({16: 1.0, 8: 1.0, 4: 0.5, 2: 0.5}, [16, 8]),
        ({16: 1.0, 8: 0.9, 4: 0.95, 2: 0.5}, [16, 8, 4]),
        ({16: 1.0, 8: 0.9, 4: 0.8, 2: 0.7}, [16, 8, 4, 2]),
        ({16: None, 8: 0.9, 4: 1.0, 2: 0.5}, [16, 8, 4]),
        ({16: None, 8: None, 4: None, 2: 0.5}, [16, 8, 4, 2]),
    ],
)
def test_fewer_heads_are_tried_as_long_as_they_are_faster(nanoseconds, tried):
    """None: it does not fit."""

    def figures(candidate):
        time = nanoseconds[candidate.heads]
        return candidate._asdict() | ({"fits": True, "ns_per_token": time} if time else {"fits": False})

    assert [row["heads"] for row in fewer_and_fewer_heads(SEARCH, figures)] == tried


def test_what_is_kept_is_not_compiled_again(tmp_path, monkeypatch):
    measured = []

    def measure(candidate, dumps):
        measured.append(candidate)
        return {"fits": True, "ns_per_token": 1.0}

    monkeypatch.setattr(tpu_block_sizes, "measure", measure)
    first, second = SEARCH[:2]
    Figures(pathlib.Path("dumps"), tmp_path / "kept")(first)
    figures = Figures(pathlib.Path("dumps"), tmp_path / "kept")
    assert [figures(each)["ns_per_token"] for each in (first, second)] == [1.0, 1.0]
    assert measured == [first, second]


def test_the_table_is_what_the_record_chooses():
    """The committed figures of all candidates, and the committed table."""
    assert choose(recorded()) == BLOCK_SIZES
