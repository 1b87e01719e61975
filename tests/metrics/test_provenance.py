"""run.json says what was run where, one entry per start."""

import json

import jax

from lightning_jax.metrics.provenance import record_session


def test_each_start_adds_a_session_and_renews_the_facts(tmp_path):
    record_session(tmp_path / "run", {"title": "first", "total_steps": 5}, first_step=1, devices=jax.devices()[:1])
    record_session(tmp_path / "run", {"title": "second"}, first_step=4, devices=jax.devices()[:1])
    run = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert run["title"] == "second"
    assert "total_steps" not in run
    assert [session["first_step"] for session in run["sessions"]] == [1, 4]
    session = run["sessions"][0]
    assert session["versions"]["jax"] == jax.__version__
    assert session["devices"] == f"1 × {jax.devices()[0].device_kind}"
    assert session["command"]
    assert (tmp_path / "run").joinpath("run.new").exists() is False


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    record_session(tmp_path, {}, first_step=1, devices=jax.devices()[:1])
    assert list(tmp_path.iterdir()) == []
