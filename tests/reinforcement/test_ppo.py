"""PPO as a user runs it: with a value model, rollouts one step stale, and the reward model of another run."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_judge
import tiny_reinforcement
import tiny_run
from tiny_reinforcement import UPDATES

from lightning_jax import train

pytestmark = pytest.mark.slow
STEPS = 12
CONFIG = str(tiny_run.REPOSITORY / "configs" / "tulu3.py") + ":laptop"
SETTINGS = "stages__rlvr__reinforcement"
PPO = {
    "config": CONFIG,
    "stage": "rlvr",
    "prompts": "arithmetic",
    "model__router_aux_coefficient": 0.0,
    "stages__rlvr__schedule__decay_steps": 0,
    f"{SETTINGS}__rollouts__epochs": 2,
    f"{SETTINGS}__rollouts__samples": 1,
    f"{SETTINGS}__value__reward_model": "",
    f"{SETTINGS}__value__schedule__peak": 3e-3,
    f"{SETTINGS}__value__schedule__decay_steps": 0,
    f"{SETTINGS}__value__schedule__final": 3e-3,
}


def arguments(folder, workdir, *, steps=STEPS, **more):
    return tiny_reinforcement.arguments(folder, workdir, steps=steps, **(PPO | more))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Prompts, and in `whole` the run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("ppo")
    tiny_reinforcement.write_prompts(folder)
    assert train.main(arguments(folder, "whole")) == 0
    return folder


def lines(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def metrics(run):
    return [{name: value for name, value in row.items() if name != "timing"} for row in lines(run, "metrics.jsonl")]


def fingerprints(run, step=STEPS):
    manifest = json.loads((run / "checkpoints" / str(step) / "MANIFEST.json").read_text())
    return {name: leaf["fingerprint"] for name, leaf in manifest["leaves"].items()}


@pytest.mark.parametrize("step", [6, 8])
def test_going_on_in_a_generation_or_behind_it_gives_the_same_bits_of_policy_and_value(folder, step):
    run = folder / f"resumed_{step}"
    shutil.copytree(folder / "whole", run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    assert (step in (6,)) == bool(step % UPDATES)
    assert train.main(arguments(folder, run.name, checkpoints__every_steps=1)) == 0
    assert fingerprints(run) == fingerprints(folder / "whole")
    assert metrics(run) == metrics(folder / "whole")
    assert (run / "samples.jsonl").read_bytes() == (folder / "whole" / "samples.jsonl").read_bytes()


def test_value_and_policy_have_states_of_their_own_and_metrics(folder):
    leaves = fingerprints(folder / "whole")
    assert any(name.startswith("value/params/backbone/") for name in leaves)
    assert any(name.startswith("value/opt_state/") for name in leaves)
    rows = [row for row in metrics(folder / "whole") if "value_loss" in row]
    assert len(rows) == STEPS
    assert {"value_explained_variance", "value_clip_share", "value_gradient_norm", "value_learning_rate"} <= rows[
        0
    ].keys()
    assert all(np.isfinite(row["value_loss"]) for row in rows)
    assert rows[0]["value_clip_share"] == 0  # nothing has moved yet


def test_warm_up_trains_the_value_alone(folder):
    more = {f"{SETTINGS}__value__warmup_steps": UPDATES, f"{SETTINGS}__rollouts__staleness": 0}
    assert train.main(arguments(folder, "warm_up", checkpoints__every_steps=UPDATES // 2, **more)) == 0
    early, late, after = (fingerprints(folder / "warm_up", step) for step in (UPDATES // 2, UPDATES, 2 * UPDATES))
    policy, value = ([name for name in early if name.startswith(part)] for part in ("params/", "value/params/"))
    assert all(early[name] == late[name] for name in policy)
    assert not any(early[name] == late[name] for name in value)
    assert not any(late[name] == after[name] for name in policy)


def test_stale_rollouts_are_those_of_the_policy_before_and_corrected_as_such(folder):
    """The second generation is made by the policy that made the first, whatever is trained between them."""
    samples, gaps = {}, {}
    for staleness, rate in ((0, 3e-3), (1, 3e-3), (1, 1e-3)):
        name = f"stale_{staleness}_{rate}"
        more = {f"{SETTINGS}__rollouts__staleness": staleness, "stages__rlvr__schedule__peak": rate}
        more |= {"stages__rlvr__schedule__final": rate, "checkpoints__every_steps": 0}
        assert train.main(arguments(folder, name, steps=2 * UPDATES, **more)) == 0
        texts = [line["text"] for line in lines(folder / name, "samples.jsonl") if line["step"] == UPDATES + 1]
        samples[staleness, rate] = texts
        gaps[staleness, rate] = [row["log_prob_gap_max"] for row in metrics(folder / name) if "reward" in row]
    assert samples[1, 3e-3] == samples[1, 1e-3]
    assert max(gaps[0, 3e-3]) < 1e-4
    assert gaps[1, 3e-3][0] < 1e-4 < gaps[1, 3e-3][1]


def test_a_reward_model_of_our_own_is_reward_and_beginning_of_a_value(folder, capsys):
    """It is trained to like some answers; the policy learns to give what it likes."""
    pairs = []
    for number in range(200):
        question = {"role": "user", "content": str(number)}
        long, short = ("".join(chr(97 + (number * k) % 26) for k in range(1, size)) for size in (9, 2 + number % 3))
        answers = {"chosen": short, "rejected": long}
        pairs.append({name: [question, {"role": "assistant", "content": text}] for name, text in answers.items()})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    pairs_of = {"data__corpora__arithmetic_pairs__format": "jsonl", "metrics__evaluate_every_steps": 1000}
    pairs_of |= {"checkpoints__every_steps": 0}
    pairs_of |= {"data__corpora__arithmetic_pairs__path": folder / "pairs.jsonl"}
    trained = folder / "reward_model"
    of_stage = {"passes__count": 3, "context_length": 128, "batch_size__tokens": 8 * 128, "schedule__peak": 1e-2}
    of_stage = {f"stages__reward_model__{name}": value for name, value in of_stage.items()}
    more = PPO | pairs_of | of_stage | {"run_stages": "reward_model"}
    assert train.main(tiny_reinforcement.arguments(folder, trained.name, steps=STEPS, **more)) == 0
    assert [row["accuracy"] for row in metrics(trained) if "accuracy" in row][-1] > 0.9

    section = "stages__rl__reinforcement__rewards"
    use = {"folder": trained, "shift": 0.0, "scale": 1.0, "low": -20.0, "high": 20.0}
    more = {f"{section}__reward_model__{name}": value for name, value in use.items()}
    more |= {f"{section}__weights": "{reward_model:1}", "stages__rl__reinforcement__rollouts__samples": 8}
    more |= {"stages__rl__schedule__peak": 1e-2, "stages__rl__schedule__final": 1e-2, "checkpoints__every_steps": 0}
    assert train.main(tiny_reinforcement.arguments(folder, "by_model", steps=12 * UPDATES, **more)) == 0
    likeliest = [row["validation_reward"]["legs"] for row in metrics(folder / "by_model") if "validation_reward" in row]
    assert likeliest[-1] > likeliest[0] + 1
    sample = lines(folder / "by_model", "samples.jsonl")[0]
    assert "reward_model" in sample["reason"]

    capsys.readouterr()
    more = {f"{SETTINGS}__value__reward_model": trained, f"{SETTINGS}__value__warmup_steps": STEPS}
    more |= {f"{SETTINGS}__value__schedule__{name}": 1e-12 for name in ("peak", "final")}
    assert train.main(arguments(folder, "from_model", **more)) == 0
    assert "the value model begins as the reward model of step" in capsys.readouterr().out
    steps = sorted(int(path.name) for path in (trained / "checkpoints").iterdir())
    assert head_of(folder / "from_model", STEPS, "value/params/") == head_of(trained, steps[-1], "params/")


def test_a_judge_that_likes_length_teaches_it_and_is_seen_on_record(folder, capsys):
    section = "stages__rl__reinforcement__rewards"
    more = {
        "stages__rl__reinforcement__rollouts__samples": 8,
        "stages__rl__reinforcement__rollouts__max_new_tokens": 16,
    }
    more |= {f"{section}__weights": "{graded_judge:1}", "checkpoints__every_steps": 0}
    with tiny_judge.serving(lambda response: 1 + min(len(response) // 4, 4)) as judge:
        more |= {f"{section}__judge__{name}": value for name, value in judge.items()}
        assert train.main(tiny_reinforcement.arguments(folder, "judged", steps=2 * UPDATES, **more)) == 0
    rows = [row for row in metrics(folder / "judged") if "reward" in row]
    assert all(0 <= row["reward"] <= 1 and row["ungraded"] == 0 for row in rows)
    assert max(row.get("length_correlation", 0) for row in rows) > 0.3
    assert "the reward likes length" in capsys.readouterr().out
    assert "grade " in lines(folder / "judged", "samples.jsonl")[0]["reason"]


def head_of(run, step, prefix):
    (fingerprint,) = [each for name, each in fingerprints(run, step).items() if name.startswith(f"{prefix}head")]
    return fingerprint


def test_adapters_are_trained_beside_a_whole_value_model_and_rolled_out_on_devices_of_their_own(folder):
    more = {"lora__rank": 2, "lora__alpha": 4, "lora__targets": "mixer.query_key_value,mixer.output,mixer.query"}
    more |= {"mesh__data": 1, "mesh__fsdp": 4, f"{SETTINGS}__rollouts__devices": "{fsdp:4}"}
    command = [*arguments(folder, "adapters", **more), f"--init_from={folder / 'whole'}"]
    assert train.main(command) == 0
    run, leaves = folder / "adapters", fingerprints(folder / "adapters")
    of_policy = {name for name in leaves if name.startswith("params/")}
    assert of_policy
    assert all(name.endswith(("/down/value", "/up/value")) for name in of_policy)
    assert any(name.startswith("value/params/backbone/") for name in leaves)
    generations = [row for row in metrics(run) if "reward" in row]
    assert generations[0]["log_prob_gap_max"] < 1e-4  # of merged weights, and of adapters beside theirs
    before, record = leaves, metrics(run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > 6:
            shutil.rmtree(path)
    assert train.main(command) == 0
    assert fingerprints(run) == before
    assert metrics(run) == record
