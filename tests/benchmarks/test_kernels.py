"""The whole plan on an H200 that is imagined: who is checked and timed where, and what stands in the table."""

import collections
import os
import pathlib
import sys
import time

import imagined_sides
import kernel_benchmark
import kernel_report
import kernels
import pytest
from kernel_benchmark import Benchmark, Worker

HERE = pathlib.Path(__file__).parent
PATH = {"PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parents[1])))}


@pytest.fixture(scope="module")
def record():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_benchmark, "SEARCH_FOR_RACES", ["-c", "print('8 passed in 20 s')"])
        patch.setattr(kernels, "have", lambda module: module == "torch")
        with (
            Worker(sys.executable, imagined_sides.jax_side, PATH) as ours,
            Worker(sys.executable, imagined_sides.torch_side, PATH) as theirs,
        ):
            benchmark = Benchmark(ours, theirs, ours, time.monotonic() + 120)
            for step in kernels.steps(benchmark, torch=True):
                step()
    return benchmark.record


def test_without_a_device_nothing_follows():
    with Worker(sys.executable, imagined_sides.torch_side, {"PYTHONPATH": ""}) as broken:
        benchmark = Benchmark(broken, broken, broken, time.monotonic() + 60)
        for step in kernels.steps(benchmark, torch=True):
            step()
    assert len(benchmark.record["failures"]) == 1


def test_every_case_is_timed_in_both_directions(record):
    timed = [(each["case"], each["direction"]) for each in record["times"]]
    cases = [case._asdict() for case in kernels.HEADLINE + kernels.OTHERS]
    assert timed == [(case, direction) for case in cases for direction in ("forward", "training")]


def test_the_headline_has_every_implementation(record):
    everyone = {"pallas_gpu", "xla", "cudnn", "fla chunk", "fla fused_chunk", "torch flash"}
    for each in record["times"][: 2 * len(kernels.HEADLINE)]:
        alone = {"cudnn"} if each["case"]["length"] > 100_000 else set()
        assert set(each["seconds"]) == everyone - alone
        assert next(iter(each["seconds"])) == "pallas_gpu"


def test_others_are_timed_only_where_they_can_be(record):
    for each in record["times"]:
        case = each["case"]
        tunes = case["dim"] == 128 and case["heads"] in (16, 64) and case["documents"] == 1
        assert ("fla chunk" in each["seconds"]) == tunes
        assert ("torch flash" in each["seconds"]) == (case["documents"] == 1 and case["length"] <= 131_072)


def test_the_kernel_is_checked_everywhere_and_the_portable_form_in_both_dtypes(record):
    checked = collections.Counter((each["implementation"], each["dtype"]) for each in record["numerics"])
    assert checked == {("pallas_gpu", "bfloat16"): len(kernels.CHECKED), ("xla", "bfloat16"): 1, ("xla", "float32"): 2}
    assert [each["implementation"] for each in record["same_bits"]] == ["pallas_gpu"] * len(kernels.REPEATED)


def test_one_that_fails_is_on_record_and_given_up(record):
    assert len(record["failures"]) == 2
    assert all("cudnn" in each and "out of memory" in each for each in record["failures"])


def test_the_table_has_the_shares_of_the_floor(record):
    lines = kernel_report.lines(record)
    ours = [line for line in lines if line.startswith("| 1 | 64 | 128 | 8,192 | pallas_gpu")]
    assert ours[0].count("50%") == 3
    assert "- The tests that search the interpreted kernels for races: 8 passed in 20 s" in lines
    assert any("fla chunk" in line and "2.00 (2.00 to 2.00)" in line for line in lines)
