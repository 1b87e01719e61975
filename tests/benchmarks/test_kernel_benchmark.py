"""The benchmark of the kernels goes on when a process fails, and sees a wrong kernel."""

import pathlib
import subprocess
import sys
import time

import kernel_benchmark
import kernel_numerics
import kernel_report
import kernel_sides
import pytest
from failing_side import failing_side
from kernel_benchmark import Benchmark, Worker
from kernel_roofline import Case

PATH = {"PYTHONPATH": str(pathlib.Path(__file__).parent)}


@pytest.fixture
def worker():
    with Worker(sys.executable, failing_side, PATH) as worker:
        yield worker


def test_a_refusal_is_one_line_and_the_process_lives_on(worker):
    process = worker.ask(60, do="process")["answer"]
    assert worker.ask(60, do="refuse") == {"error": "NotImplementedError: not for heads of 96", "usable": True}
    assert worker.ask(60, do="process")["answer"] == process


@pytest.mark.parametrize("failure", ["crash", "end", "hang"])
def test_a_process_that_fails_is_started_anew(worker, failure):
    process = worker.ask(60, do="process")["answer"]
    assert not worker.ask(0.2 if failure == "hang" else 60, do=failure)["usable"]
    assert worker.ask(60, do="process")["answer"] != process


def test_an_implementation_that_ends_processes_is_given_up(worker):
    benchmark = Benchmark(worker, worker, worker, deadline=time.monotonic() + 60)
    for _ in range(5):
        assert benchmark._ask(worker, do="end", implementation="broken") is None
    assert len(benchmark.record["failures"]) == 2
    assert benchmark._ask(worker, do="process", implementation="sound")


def test_a_search_for_races_that_cannot_start_is_on_record(monkeypatch):
    monkeypatch.setattr(kernel_benchmark, "SEARCH_FOR_RACES", ["-m", "no_such_module"])
    benchmark = Benchmark(None, None, None, deadline=time.monotonic() + 60)
    benchmark._search_for_races()
    assert benchmark.record["races"] == []
    (failure,) = benchmark.record["failures"]
    assert failure.startswith("the search for races: ")
    assert failure.endswith("No module named no_such_module")


@pytest.mark.parametrize("dtype", kernel_numerics.LIMITS)
@pytest.mark.parametrize("documents", [1, 3])
def test_the_xla_path_is_within_the_limits(dtype, documents):
    case = Case(1, 4, 16, 100, documents)
    errors = kernel_numerics.errors("xla", case, dtype)
    assert set(errors) == set(kernel_numerics.NAMES)
    assert max(errors.values()) <= kernel_numerics.LIMITS[dtype]


@pytest.mark.parametrize("dtype", kernel_numerics.LIMITS)
def test_a_wrong_result_is_beyond_the_limits(dtype, monkeypatch):
    attend = kernel_numerics.attend

    def wrong(*arrays, implementation):
        o, *others = attend(*arrays, implementation=implementation)
        return (1.01 * o if implementation == "xla" else o), *others

    monkeypatch.setattr(kernel_numerics, "attend", wrong)
    errors = kernel_numerics.errors("xla", Case(1, 4, 16, 100), dtype)
    beyond = [name for name, error in errors.items() if error > kernel_numerics.LIMITS[dtype]]
    assert beyond == ["o"]


def test_the_jax_side_answers_every_question():
    versions, answer = kernel_sides.jax_side(1)
    assert versions["jax"]
    assert answer(do="device")["answer"]["implementations"] == ["xla"]
    case = Case(1, 2, 8, 40)
    for direction in ("forward", "training"):
        assert 0 < answer(do="time", implementation="xla", direction=direction, case=case)["answer"] < 1
    assert answer(do="repeat", implementation="xla", case=case) == {"answer": True}
    assert len(answer(do="output", implementation="xla", case=case)["answer"]) == 40 * 2 * 8


def test_a_window_is_divided_by_its_calls(monkeypatch):
    """Three calls of 2 ms per program: 7 programs fill 40 ms."""
    now, queued = [0.0], []
    monkeypatch.setattr(kernel_sides.time, "perf_counter", lambda: now[0])

    def wait():
        now[0] += 0.006 * len(queued)
        queued.clear()

    built = kernel_sides.Program(lambda: queued.append(1), wait, calls=3)
    stopwatch = kernel_sides.Stopwatch(lambda *_: built)
    assert stopwatch("any", "forward", Case(1, 1, 1, 1)) == pytest.approx(0.002)
    assert now[0] == pytest.approx(0.006 * (2 + 1 + 7))


def record():
    """Of one shape, on which ours takes twice the floor and fla four times."""
    timed = {"case": Case(1, 64, 128, 8192)._asdict()}
    return {
        "device": {"platform": "gpu", "kind": "NVIDIA H200", "dtype": "bfloat16", "auto": "pallas_gpu: why"},
        "rates": {"operations": 790e12, "bytes": 4.3e12},
        "times": [
            timed | {"direction": "forward", "floor": 1e-4, "seconds": {"pallas_gpu": [2e-4], "fla chunk": [4e-4]}},
            timed | {"direction": "training", "floor": 3e-4, "seconds": {"pallas_gpu": [6e-4], "fla chunk": [12e-4]}},
        ],
        "numerics": [
            {
                "implementation": "pallas_gpu",
                "case": Case(2, 4, 64, 100, 3)._asdict(),
                "dtype": "bfloat16",
                "errors": {"o": 1.2, "dq": 2.5},
            }
        ],
        "same_function": [{"implementation": "fla chunk", "beside": "pallas_gpu", "error": 0.003}],
        "same_bits": [{"implementation": "pallas_gpu", "case": Case(1, 64, 128, 8192)._asdict(), "same": False}],
        "races": ["8 passed"],
        "gpu": [
            {"case": Case(1, 64, 128, 8192)._asdict(), "name": "lightning_attention_sweep", "registers": 208}
            | {"spill_stores": 0, "spill_loads": 0, "shared_memory": 215_040}
        ],
        "tpu": [],
        "failures": ["time fla: out of memory"],
        "left_out": [],
        "missing": [],
    }


def test_the_table_says_what_was_found(tmp_path):
    lines = kernel_report.lines(record())
    (ours,) = (line for line in lines if line.startswith("| 1 | 64 | 128 | 8,192 | pallas_gpu"))
    (fla,) = (line for line in lines if line.startswith("| 1 | 64 | 128 | 8,192 | fla chunk"))
    assert [cell.strip() for cell in ours.split("|")][6:] == [
        *("0.200", "257.7", "2,684", "50%"),
        *("0.400", "50%"),
        *("0.600", "272.0", "2,573", "50%", "", ""),
    ]
    assert "2.00 (2.00 to 2.00)" in fla
    assert any("2.5 (dq) | 2 | **beyond**" in line for line in lines)
    assert any("**different bits**" in line for line in lines)
    assert "- time fla: out of memory" in lines
    assert "| 1 | 64 | 128 | 8,192 | lightning_attention_sweep | 208 | 0 / 0 | 215,040 | 111.8 | memory | 1 |" in lines
    kernel_report.plot(record(), tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000


def test_a_record_of_nothing_is_a_table_too():
    empty = Benchmark(None, None, None, 0).record
    assert "None." in kernel_report.lines(empty)


@pytest.mark.slow
def test_it_runs_where_there_is_nothing_but_a_cpu(tmp_path):
    program = pathlib.Path(__file__).parents[2] / "benchmarks" / "kernels.py"
    done = subprocess.run(
        [sys.executable, program, "--quick", "--minutes=2", f"--folder={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=program.parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "| 1 | 4 | 64 | 1,024 | xla |" in done.stdout
    assert "passed" in done.stdout[done.stdout.index("## Races") :]
    assert not list(tmp_path.iterdir())
