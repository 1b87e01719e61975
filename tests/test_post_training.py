"""Fine-tuning, preference tuning and reward models as a user runs them: they learn, resume bit for bit, and load."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_run

from lightning_jax import train
from lightning_jax.checkpoints.state_tree import named_leaves
from lightning_jax.errors import UserError
from lightning_jax.input_pipeline import word_problems
from lightning_jax.trained_model import load_model
from lightning_jax.trained_reward_model import load_reward_model

pytestmark = pytest.mark.slow

CONFIG = str(tiny_run.REPOSITORY / "configs" / "tulu3.py") + ":laptop"


def arguments(folder, workdir, **more):
    overrides = {
        "model.vocab_size": 260,
        "model.hidden_size": 32,
        "model.num_layers": 2,
        "model.layer_pattern": "lightning,softmax",
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.head_dim": 16,
        "model.rotary_dim": 8,
        "model.intermediate_size": 64,
        "model.loss_chunk": 64,
        "data.tokenizer.kind": "bytes",
        "data.tokenizer.vocab_size": 257,
        "data.tokenizer.eos": "</s>",
        "data.validation_fraction": 0.1,
        "data.cache_dir": folder / "cache",
        "data.corpora.arithmetic.format": "jsonl",
        "data.corpora.arithmetic.path": folder / "chats.jsonl",
        "data.corpora.arithmetic_pairs.format": "jsonl",
        "data.corpora.arithmetic_pairs.path": folder / "pairs.jsonl",
        "stages.sft.passes.count": 2,
        "stages.dpo.passes.count": 1,
        "stages.reward_model.passes.count": 2,
        "stages.dpo.schedule.peak": 1e-3,
        "stages.dpo.preference.reference": "cached",
        "stages.reward_model.schedule.peak": 3e-3,
        "metrics.log_every_steps": 1,
        "metrics.evaluate_every_steps": 10,
        "metrics.tensorboard": False,
        "metrics.sample_tokens": 0,
        "checkpoints.every_steps": 4,
        "checkpoints.keep_newest": 100,
    }
    for stage in ("sft", "dpo", "reward_model"):
        overrides |= {f"stages.{stage}.context_length": 512, f"stages.{stage}.batch_size.tokens": 8 * 512}
    overrides |= {name.replace("__", "."): value for name, value in more.items()}
    return [f"--config={CONFIG}", f"--workdir={folder / workdir}", *(f"--config.{k}={v}" for k, v in overrides.items())]


def preferences(count):
    """Pairs that a tiny model can tell apart: the wrong answers are shouted."""
    for record in word_problems.preferences(count):
        question, answer = record["rejected"]
        yield record | {"rejected": [question, answer | {"content": "NO " + answer["content"]}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Word problems, and in `whole` a run of fine-tuning and then preference tuning."""
    folder = tmp_path_factory.mktemp("post_training")
    for name, records in (("chats", word_problems.conversations(300)), ("pairs", preferences(300))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert train.main(arguments(folder, "whole", metrics__sample_tokens=4)) == 0
    return folder


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def fingerprints(run, step):
    manifest = json.loads((run / "checkpoints" / str(step) / "MANIFEST.json").read_text())
    return {name: leaf["fingerprint"] for name, leaf in manifest["leaves"].items()}


def test_both_stages_learn_what_is_held_out(folder):
    rows = records(folder / "whole")
    held_out = [row["validation_loss"]["arithmetic"] for row in rows if "arithmetic" in row.get("validation_loss", {})]
    assert held_out[-1] < rows[0]["loss"] - 0.5
    tuned = [row for row in rows if row["stage"] == "dpo" and "margin" in row]
    assert tuned[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # the policy is still its reference
    assert tuned[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert tuned[-1]["margin"] > 0.5
    accuracy = [row["validation_accuracy"]["arithmetic_pairs"] for row in rows if "validation_accuracy" in row]
    assert accuracy[-1] > 0.9
    config = json.loads((folder / "whole" / "config.json").read_text())
    assert config["stages"]["dpo"]["tokens"] > 0
    samples = [json.loads(line) for line in (folder / "whole" / "samples.jsonl").read_text().splitlines()]
    assert "<|assistant|>" in samples[0]["prompt"]
    assert len({sample["prompt"] for sample in samples if sample["stage"] == "dpo"}) == 3


def cut_back(folder, name, whole="whole"):
    """A copy of the run as it was in the middle of its preference tuning; the last step of the whole run."""
    run = folder / name
    shutil.copytree(folder / whole, run)
    steps = [row["step"] for row in records(run) if row["stage"] == "dpo"]
    saved = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    kept = [step for step in saved if min(steps) < step < max(steps)]
    assert kept
    for step in saved:
        if step > kept[0]:
            shutil.rmtree(run / "checkpoints" / str(step))
    return max(steps)


def assert_equal_runs(run, whole, last):
    assert fingerprints(run, last) == fingerprints(whole, last)
    without = [{k: v for k, v in row.items() if k != "timing"} for row in records(run)]
    assert without == [{k: v for k, v in row.items() if k != "timing"} for row in records(whole)]


def test_going_on_in_the_middle_of_a_pass_gives_the_same_bits(folder, capsys):
    last = cut_back(folder, "resumed")
    assert train.main(arguments(folder, "resumed")) == 0
    assert "resumed from the checkpoint" in capsys.readouterr().out
    assert_equal_runs(folder / "resumed", folder / "whole", last)


@pytest.mark.parametrize("harm", ["missing", "of other weights"])
def test_a_reference_that_is_not_the_runs_own_is_refused(folder, capsys, harm):
    cut_back(folder, harm)
    path = folder / harm / "reference" / "dpo.npz"
    if harm == "missing":
        path.unlink()
    else:
        with np.load(path) as file:
            arrays = dict(file)
        arrays["key"] = str(arrays["key"]).replace('"weights": "', '"weights": "0')
        np.savez(path, **arrays)
    assert train.main(arguments(folder, harm)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert "is missing or damaged" in line or "is of other weights or data" in line


def test_a_reward_model_begins_as_the_fine_tuned_model_learns_and_loads(folder, capsys):
    alone = {"run_stages": "reward_model"}
    assert train.main([*arguments(folder, "rm", **alone), f"--init_from={folder / 'whole'}"]) == 0
    assert "parameters from step" in capsys.readouterr().out
    accuracy = [row["validation_accuracy"]["arithmetic_pairs"] for row in records(folder / "rm") if "pairs" not in row]
    assert accuracy[-1] > 0.9
    model = load_reward_model(folder / "rm", say=print)
    pairs = list(preferences(30))
    chosen, rejected = (model.scores([pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    assert np.mean(chosen > rejected) > 0.9
    again = model.scores([pairs[3]["chosen"]], rows=1)
    np.testing.assert_allclose(again, chosen[3:4], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="no run that trained a reward model"):
        load_reward_model(folder / "whole", say=print)


def test_a_reward_model_is_a_run_of_its_own(folder, capsys):
    assert train.main(arguments(folder, "mixed", run_stages="sft,reward_model")) == 2
    assert "a reward model has parameters of its own; run its stage alone" in capsys.readouterr().err


ADAPTERS = {
    "lora.rank": 2,
    "lora.alpha": 4,
    "lora.targets": "mixer.query_key_value,mixer.output,mixer.query,feed_forward.down",
}
LIVE = {"run_stages": "dpo", "stages.dpo.preference.reference": "live", "stages.dpo.schedule.peak": 1e-2}


@pytest.fixture(scope="module")
def adapted(folder) -> pathlib.Path:
    """A run that trains adapters of the whole run's weights, preferring against a live reference."""
    command = arguments(folder, "adapted", **ADAPTERS, **LIVE)
    assert train.main([*command, f"--init_from={folder / 'whole'}"]) == 0
    return folder / "adapted"


def parameters(fingerprints):
    return {name: each for name, each in fingerprints.items() if name.startswith("params/")}


def test_a_live_reference_trains_as_the_cached_one_does(folder, adapted):
    cached = LIVE | {"stages.dpo.preference.reference": "cached"}
    command = arguments(folder, "adapted_cached", **ADAPTERS, **cached)
    assert train.main([*command, f"--init_from={folder / 'whole'}"]) == 0
    live, cached = records(adapted), records(folder / "adapted_cached")
    assert live[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert [row["loss"] for row in live if "loss" in row] == pytest.approx(
        [row["loss"] for row in cached if "loss" in row], rel=1e-3
    )
    assert live[-1]["validation_accuracy"] == cached[-1]["validation_accuracy"]


def test_adapters_learn_and_what_they_belong_to_keeps_its_bits(folder, adapted):
    rows = [row for row in records(adapted) if "margin" in row]
    assert rows[-1]["margin"] > rows[0]["margin"] + 0.1
    newest = {
        run: max(int(path.name) for path in (run / "checkpoints").iterdir()) for run in (adapted, folder / "whole")
    }
    base, whole = fingerprints(adapted / "base", 0), fingerprints(folder / "whole", newest[folder / "whole"])
    assert base == parameters(whole)
    assert all(
        name.endswith(("/down/value", "/up/value")) for name in parameters(fingerprints(adapted, newest[adapted]))
    )


def test_a_run_of_adapters_goes_on_to_the_same_bits_and_refuses_another_reference(folder, adapted, capsys):
    last = cut_back(folder, "adapted_resumed", "adapted")
    assert train.main(arguments(folder, "adapted_resumed", **ADAPTERS, **LIVE)) == 0
    assert_equal_runs(folder / "adapted_resumed", adapted, last)
    cut_back(folder, "adapted_without", "adapted")
    shutil.rmtree(folder / "adapted_without" / "reference")
    capsys.readouterr()
    assert train.main(arguments(folder, "adapted_without", **ADAPTERS, **LIVE)) == 2
    assert "reference/dpo: is missing" in capsys.readouterr().err


def test_merged_adapters_load_and_are_begun_with(folder, adapted):
    merged = load_model(adapted, say=print)
    before = load_model(folder / "whole", say=print)
    name = "stacks/0/runs/1/mixer/query/value"
    assert np.abs(named_leaves(merged.params)[name] - named_leaves(before.params)[name]).max() > 1e-4
    command = arguments(folder, "on", run_stages="sft", checkpoints__every_steps=1000)
    assert train.main([*command, f"--init_from={adapted}"]) == 0
    rows = records(folder / "on")
    assert rows[0]["loss"] < records(folder / "whole")[0]["loss"] - 0.5


def test_adapters_of_a_reward_model(folder):
    alone = {"run_stages": "reward_model", "stages.reward_model.schedule.peak": 1e-2}
    command = arguments(folder, "adapted_rm", **ADAPTERS, **alone)
    assert train.main([*command, f"--init_from={folder / 'whole'}"]) == 0
    rows = [row for row in records(folder / "adapted_rm") if "validation_accuracy" in row]
    assert rows[-1]["validation_accuracy"]["arithmetic_pairs"] > 0.8
    model = load_reward_model(folder / "adapted_rm", say=print)
    pairs = list(preferences(20))
    chosen, rejected = (model.scores([pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    assert np.mean(chosen > rejected) > 0.8


def test_adapters_without_a_model_are_refused(folder, capsys):
    assert train.main(arguments(folder, "nothing", **ADAPTERS, **LIVE)) == 2
    assert "adapters belong to a model; name the folder of its run by --init_from" in capsys.readouterr().err


def test_preference_tuning_of_fresh_weights_is_said(folder, capsys):
    command = arguments(folder, "fresh", run_stages="dpo", stages__dpo__passes__count=0.1)
    assert train.main(command) == 0
    assert "stage dpo begins with fresh weights; --init_from=FOLDER" in capsys.readouterr().out
