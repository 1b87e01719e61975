"""The main job as a user meets it: what it leaves behind, what it refuses, and what it says."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_run

from lightning_jax import train
from lightning_jax.checkpoints import run_lock

pytestmark = pytest.mark.slow

ONE_STAGE = {"run_stages": "pretraining", "stages__pretraining__tokens": 8 * 64 * 15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Corpora, and in `done` a complete run of one short stage on eight devices."""
    folder = tmp_path_factory.mktemp("train")
    tiny_run.write_corpus(folder)
    assert train.main(tiny_run.arguments(folder, "done", **ONE_STAGE)) == 0
    return folder


def records_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_record_and_a_report(folder):
    run = folder / "done"
    records = records_of(run)
    trained = [record for record in records if "loss" in record]
    assert [record["step"] for record in trained] == list(range(1, 16))
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.3
    assert trained[-1]["tokens"] == 15 * 8 * 64
    assert np.shape(trained[9]["expert_load"]) == (3, 4)
    assert {name for record in records for name in record.get("validation_loss", {})} == {"text", "code"}
    assert json.loads((run / "samples.jsonl").read_text().splitlines()[0])["prompt"] == "alpha"
    assert json.loads((run / "config.json").read_text())["model"]["hidden_size"] == 32
    assert "<svg" in (run / "report.html").read_text() or "data:image" in (run / "report.html").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["12", "15"]


def test_a_complete_run_started_again_says_so_and_changes_nothing(folder, capsys):
    before = (folder / "done" / "metrics.jsonl").read_bytes()
    assert train.main(tiny_run.arguments(folder, "done", **ONE_STAGE)) == 0
    assert "complete after 15 steps; for another run give another --workdir" in capsys.readouterr().out
    assert (folder / "done" / "metrics.jsonl").read_bytes() == before


def test_the_mesh_may_be_left_to_the_planner_and_be_another_than_before(folder, capsys):
    assert train.main([*tiny_run.arguments(folder, "done", **ONE_STAGE), "--mesh=auto"]) == 0
    assert capsys.readouterr().err.startswith("mesh data 4 x expert 2: fits with ")


def test_a_save_that_failed_is_said_and_on_record(folder, capsys, monkeypatch):
    full = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr("lightning_jax.checkpoints.checkpoints.shutil.disk_usage", lambda path: full)
    assert train.main(tiny_run.arguments(folder, "full", **ONE_STAGE)) == 2
    events = [json.loads(line) for line in (folder / "full" / "events.jsonl").read_text().splitlines()]
    failed = [event for event in events if event["kind"] == "checkpoint"]
    assert [event["step"] for event in failed] == [3, 6]
    output = capsys.readouterr()
    assert all("could not be saved" in event["message"] and event["message"] in output.out for event in failed)
    assert "that is 3 in a row, so the run stops" in output.err


def test_the_second_run_on_a_folder_is_refused(folder, capsys):
    with run_lock(folder / "busy"):
        assert train.main(tiny_run.arguments(folder, "busy", **ONE_STAGE)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is in use by process" in line


def test_another_learning_rate_is_refused_unless_it_is_meant(folder, capsys):
    arguments = tiny_run.arguments(folder, "done", **ONE_STAGE, stages__pretraining__schedule__peak=0.004)
    assert train.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.stages.pretraining.schedule.peak is 0.004, but was" in line
    assert "--change_config" in line
    shutil.copytree(folder / "done", folder / "longer")
    longer = {**ONE_STAGE, "stages__pretraining__tokens": 8 * 64 * 17}
    assert train.main([*tiny_run.arguments(folder, "longer", **longer), "--change_config"]) == 0
    output = capsys.readouterr().out
    assert "changed: config.stages.pretraining.tokens is 8704, but was 7680" in output
    assert "complete after 17 steps" in output


def test_another_architecture_is_refused_by_its_first_difference(folder, capsys):
    assert train.main(tiny_run.arguments(folder, "done", **ONE_STAGE, model__intermediate_size=48)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of another model" in line
    assert "float32[1, 2, 4, 32, 32]" in line
    assert "float32[1, 2, 4, 48, 32]" in line


def test_other_data_under_the_same_config_are_refused(folder, capsys, tmp_path):
    for corpus in ("text", "code"):
        (tmp_path / f"{corpus}.jsonl").write_bytes((folder / f"{corpus}.jsonl").read_bytes())
    assert train.main(tiny_run.arguments(tmp_path, "run", **ONE_STAGE)) == 0
    (tmp_path / "text.jsonl").write_text((tmp_path / "text.jsonl").read_text().replace("alpha", "omega"))
    assert train.main(tiny_run.arguments(tmp_path, "run", **ONE_STAGE)) == 2
    assert "data of text: not what the run was started with" in capsys.readouterr().err


def test_a_stage_alone_begins_with_the_parameters_of_another_run(folder, capsys):
    extension = {"run_stages": "context_extension", "stages__context_extension__tokens": 8 * 128 * 2}
    arguments = tiny_run.arguments(folder, "extended", **extension)
    assert train.main([*arguments, f"--init_from={folder / 'done'}"]) == 0
    assert "parameters from step" in capsys.readouterr().out
    losses = [record["loss"] for record in records_of(folder / "done") if "loss" in record]
    begun = records_of(folder / "extended")[0]["loss"]
    assert losses[0] - begun > 0.8 * (losses[0] - losses[-1])  # it is where that run ended, not where it began
    assert train.main([*tiny_run.arguments(folder, "other", **extension), f"--init_from={folder / 'nowhere'}"]) == 2
    assert "there is no checkpoint in this folder" in capsys.readouterr().err


def test_a_run_that_diverges_skips_dumps_and_stops(folder, capsys):
    arguments = tiny_run.arguments(
        folder, "diverged", **ONE_STAGE, stages__pretraining__schedule__peak=1e38, max_nonfinite_steps=3
    )
    assert train.main(arguments) == 1
    captured = capsys.readouterr()
    assert "3 steps in a row were not finite" in captured.err
    assert "Traceback" not in captured.err
    dumps = sorted((folder / "diverged" / "nonfinite").iterdir())
    assert len(dumps) == 3
    with np.load(dumps[0]) as batch:
        assert batch["inputs"].shape == (8, 64)
    assert "skipped_step" in (folder / "diverged" / "events.jsonl").read_text()
    assert (folder / "diverged" / "report.html").exists()


def test_micro_batches_train_to_the_same_losses(folder):
    sizes = {"stages__pretraining__batch_size__tokens": 32 * 64, "stages__pretraining__tokens": 32 * 64 * 4}
    schedule = {"stages__pretraining__schedule__warmup_steps": 0, "stages__pretraining__schedule__decay_steps": 0}
    losses = []
    for name, micro_batch_tokens in (("whole", 0), ("parts", 64)):
        micro = {"stages__pretraining__batch_size__micro_batch_tokens": micro_batch_tokens}
        options = {"run_stages": "pretraining", **sizes, **schedule, **micro}
        assert train.main(tiny_run.arguments(folder, name, **options)) == 0
        losses.append([record["loss"] for record in records_of(folder / name)[:4]])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
