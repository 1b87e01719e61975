"""Every named size and recipe loads without problems, resolves to its golden file, and says what the papers say."""

import dataclasses
import itertools
import json
import pathlib
import re
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from lightning_jax import selection
from lightning_jax.config import ConfigError
from lightning_jax.config_reader import load_config
from lightning_jax.mesh_problems import problems_on
from lightning_jax.optimizers import learning_rate
from lightning_jax.stages import plan_stages, with_lengths

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = pathlib.Path(__file__).parent / "goldens"
REGENERATE = "python tests/configs/make_goldens.py"

PARAMETERS = {  # of every size: all, and active without embeddings
    "minimax_m1:laptop": (6_401_024, 1_813_504),
    "minimax_m1:laptop_softmax": (6_432_896, 1_845_376),
    "minimax_m1:1b": (1_293_728_768, 129_022_976),
    "minimax_m1:8b": (8_215_186_944, 805_817_856),
    "minimax_m1:456b": (456_089_655_296, 45_944_920_064),
    "minimax_text_01:laptop": (6_401_024, 1_813_504),
    "minimax_text_01:1b": (1_293_728_768, 129_022_976),
    "minimax_text_01:8b": (8_215_186_944, 805_817_856),
    "minimax_text_01:456b": (456_089_655_296, 45_944_920_064),
    "tinyllama:laptop": (3_934_656, 2_361_792),
    "tinyllama:1.1b": (1_100_048_384, 968_976_384),
    "smollm2:laptop": (3_148_224, 2_361_792),
    "smollm2:135m": (134_515_008, 106_203_456),
    "smollm2:360m": (361_821_120, 314_635_200),
    "smollm2:1.7b": (1_711_376_384, 1_610_713_088),
    "tulu3:laptop": (3_934_656, 2_361_792),
    "tulu3:8b": (8_030_261_248, 6_979_588_096),
    "tulu3:70b": (70_553_706_496, 68_452_360_192),
    "tulu3:405b": (405_853_388_800, 401_650_696_192),
}
RECIPES = {
    "minimax_m1": ("paper",),
    "minimax_text_01": ("paper", "seed"),
    "tinyllama": ("v1.0", "v1.1", "v1.1_math_code", "v1.1_chinese"),
    "smollm2": ("paper", "seed"),
    "tulu3": ("paper", "lora"),
}
NAMES = [f"{size},{recipe}" for size in PARAMETERS for recipe in RECIPES[size.partition(":")[0]]]
SYSTEMS = list(RECIPES)


def load(name: str):
    system, _, argument = name.partition(":")
    return load_config(f"{ROOT}/configs/{system}.py" + (f":{argument}" if argument else ""))


def golden_path(name: str) -> pathlib.Path:
    return GOLDENS / (name.replace(":", "_").replace(",", "_") + ".json")


@pytest.mark.parametrize("name", NAMES)
def test_resolved_config_equals_its_golden(name):
    resolved = json.loads(load(name).to_json())
    assert golden_path(name).exists(), f"no golden for {name}; write it with: {REGENERATE}"
    golden = json.loads(golden_path(name).read_text())
    assert resolved == golden, f"{name} has changed; if that was meant, write the goldens with: {REGENERATE}"


def test_no_golden_is_left_over():
    assert {path.name for path in GOLDENS.glob("*.json")} == {golden_path(name).name for name in NAMES}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_are_exact(size):
    model = load(size).model
    assert (model.num_parameters(), model.num_active_parameters()) == PARAMETERS[size]


@pytest.mark.parametrize("name", NAMES)
def test_stages_make_steps_and_every_schedule_fits(name):
    for stage in plan_stages(with_lengths(load(name), lambda stage: 100_000)):
        rate = learning_rate(stage.config.schedule, stage.batch_sizes.num_steps)
        rates = np.asarray(rate(np.linspace(0, stage.batch_sizes.num_steps, 200, dtype=np.int64)))
        assert stage.batch_sizes.num_steps > 0
        assert rates.min() >= 0
        assert rates.max() <= stage.config.schedule.peak * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_mesh_divides_over_the_devices_it_is_meant_for(name):
    size = name.partition(":")[2].partition(",")[0]
    published = {"456b": (512, 1024), "1.1b": (16,), "135m": (64,), "360m": (128,), "1.7b": (256,)}
    published |= {"70b": (128,), "405b": (1024,)} | ({"8b": (64,)} if name.startswith("tulu3") else {})
    if name == "minimax_text_01:456b,seed":
        published["456b"] = (256,)  # its rows are 64
    for num_devices in published.get(size, (1, 8)):
        assert problems_on(load(name), num_devices) == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_docstring_has_the_command_every_size_and_every_recipe(system):
    docstring = (ROOT / "configs" / f"{system}.py").read_text().split('"""')[1]
    assert f"python -m lightning_jax.train --config=configs/{system}.py" in docstring
    for size in PARAMETERS:
        if size.startswith(system):
            assert re.search(rf"^\| {size.partition(':')[2]} \|", docstring, re.MULTILINE), size
    for recipe in RECIPES[system]:
        assert len(RECIPES[system]) == 1 or re.search(rf"\b{recipe}\b", docstring), recipe


def corner(name: str, stage_name: str):
    """(rate at a step, batch sizes) of one stage."""
    (stage,) = (stage for stage in plan_stages(load(name)) if stage.name == stage_name)
    rate = learning_rate(stage.config.schedule, stage.batch_sizes.num_steps)
    return (lambda step: float(rate(step))), stage.batch_sizes


def test_text_01_as_published():
    rate, sizes = corner("minimax_text_01:456b", "constant")
    assert [rate(0), rate(250), rate(500), rate(sizes.num_steps)] == pytest.approx([0, 1e-4, 2e-4, 2e-4])
    ramps = [step for step in range(1, sizes.num_steps) if sizes.rows(step) != sizes.rows(step - 1)]
    assert [sizes.rows(0), *(sizes.rows(step) for step in ramps)] == [2048, 4096, 8192, 16384]
    for step, tokens in zip(ramps, (69e9, 790e9, 4.7e12), strict=True):
        assert 0 <= sizes.tokens_before(step) - tokens < sizes.rows(step - 1) * 8192
    rate, sizes = corner("minimax_text_01:456b", "fast_decay")
    half = (1.3e-4 * 3e-5) ** 0.5
    assert [rate(0), rate(sizes.num_steps)] == pytest.approx([1.3e-4, 3e-5])
    assert rate(sizes.num_steps // 2) == pytest.approx(half, rel=1e-3)


def test_text_01_extension_as_published():
    config = load("minimax_text_01:456b")
    for context_length, theta, tokens, medium, long in (
        (128 * 1024, 5e6, 300e9, 0.7, 0.0),
        (512 * 1024, 1e7, 32e9, 0.35, 0.3),
        (1024 * 1024, 1e7, 26e9, 0.3, 0.4),
    ):
        stages = [stage for stage in config.stages.values() if stage.context_length == context_length]
        assert sum(stage.tokens for stage in stages) == tokens
        assert {stage.rope_theta for stage in stages} == {theta}
        by_questions = sorted(stages, key=lambda stage: stage.mixture.end.get("long_qa", 0))
        end = by_questions[0].mixture.end
        assert (end["long_32k_128k"], end.get("long_over_128k", 0)) == pytest.approx((medium, long))
        assert by_questions[1].mixture.end["long_qa"] == pytest.approx(0.1)
        assert by_questions[1].tokens == pytest.approx(0.2 * tokens)


def test_m1_as_published():
    rate, sizes = corner("minimax_m1:456b", "continual_pretraining")
    constant = next(s for s in range(0, sizes.num_steps, 100) if sizes.tokens_before(s) > 2.5e12) - 200
    assert [rate(0), rate(constant), rate(sizes.num_steps)] == pytest.approx([8e-5, 8e-5, 8e-6])
    config = load("minimax_m1:456b")
    assert config.stages["continual_pretraining"].tokens == 7.5e12
    assert [config.stages[name].context_length // 1024 for name in config.run_stages] == [8, 32, 128, 512, 1024]
    assert {(s.optimizer.beta2, s.optimizer.epsilon) for s in config.stages.values()} == {(0.95, 1e-15)}
    assert config.model.residual_alpha == 3.5565588200778455
    assert [kind for kind, _ in zip(config.model.layer_kinds(), range(8), strict=False)].count("lightning") == 7


def test_reinforcement_learning_of_m1_as_published():
    config = load("minimax_m1:456b")
    stage = config.stages["rl"]
    optimizer, learning = stage.optimizer, stage.reinforcement
    rollouts, policy = learning.rollouts, learning.policy_gradient
    assert [limit // 1024 for limit in rollouts.lengths.limits] == [40, 48, 56, 64, 72, 80]
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-15)
    assert (rollouts.updates, rollouts.repetition_tokens, rollouts.repetition_probability) == (16, 3000, 0.99)
    assert rollouts.dynamic_sampling
    assert rollouts.sample_filter == {"pass_rate": (0.0, 0.9)}
    assert (policy.kl_coefficient, policy.mask_low, policy.mask_high, policy.is_weight_min) == (0, None, None, 0)
    assert policy.reduction == "token_mean"
    assert stage.mixture.start == {"rl_rules": 1.0, "rl_general": 0.0}
    assert stage.mixture.end["rl_general"] > 0
    assert config.model.logits_dtype == "float32"


@pytest.mark.parametrize(
    ("size", "rate", "warmup", "divergence", "completions", "episodes", "corpus"),
    [
        ("8b", 3e-7, 0, 0.05, 224, 10_000_000, "rlvr"),
        ("70b", 1e-7, 250, 0.07, 640, 400_000, "rlvr"),
        ("405b", 1e-7, 0, 0.05, 1856, 300_000, "rlvr_math"),
    ],
)
def test_reinforcement_learning_of_tulu_3_as_published(size, rate, warmup, divergence, completions, episodes, corpus):
    stage = load(f"tulu3:{size}").stages["rlvr"]
    learning = stage.reinforcement
    rollouts, policy, value = learning.rollouts, learning.policy_gradient, learning.value
    rows = max(stage.batch_size.tokens) // stage.context_length
    generations = stage.tokens // stage.context_length // rows // rollouts.updates
    assert (rollouts.updates, rollouts.epochs, rollouts.samples, rows) == (4, 4, 1, completions)
    assert 0 <= episodes - generations * completions < completions
    assert (rollouts.max_new_tokens, rollouts.temperature, rollouts.staleness) == (2048, 1.0, 1)
    assert (policy.mask_low, policy.mask_high, policy.is_weight_max) == (0.2, 0.2, None)
    assert (policy.kl_estimator, policy.kl_coefficient, policy.kl_in) == ("k1", divergence, "reward")
    assert (value.clip, value.coefficient, value.discount, value.trace) == (0.2, 0.1, 1.0, 0.95)
    assert (value.whiten_rewards, value.whiten_advantages, value.reward_position) == (False, True, "after_eos")
    assert value.reward_model == "runs/tulu3_8b_rm"
    assert (value.model or load("tulu3:8b").model) == load("tulu3:8b").model
    for optimizer, schedule in ((stage.optimizer, stage.schedule), (value.optimizer, value.schedule)):
        assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon, optimizer.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
        assert (schedule.peak, schedule.final, schedule.warmup_steps) == (rate, 0.0, warmup)
        assert schedule.warmup_steps + schedule.decay_steps == 4 * generations
    rewards = learning.rewards
    assert (rewards.weights, rewards.unfinished, rewards.unfinished_score) == ({"tulu3": 10.0}, "replace", -10.0)
    assert stage.mixture.start == {corpus: 1.0}


def test_reinforcement_learning_of_tulu_3_1_as_released():
    stage = load("tulu3:8b").stages["rlvr_grpo"]
    rollouts, policy = stage.reinforcement.rollouts, stage.reinforcement.policy_gradient
    rows = max(stage.batch_size.tokens) // stage.context_length
    assert (rollouts.samples, rows * rollouts.updates // rollouts.samples) == (16, 48)
    assert (policy.kl_estimator, policy.kl_coefficient, policy.kl_in) == ("k3", 0.01, "loss")
    assert (stage.schedule.peak, stage.schedule.kind) == (5e-7, "constant")
    assert 0 <= 2_000_000 - stage.tokens // stage.context_length < 768


def test_tinyllama_as_published():
    rate, sizes = corner("tinyllama:1.1b", "pretraining")
    assert (sizes.num_steps, sizes.rows(0)) == (1_430_512, 1024)
    middle = 2000 + (1_430_512 - 2000) // 2
    assert [rate(0), rate(1000), rate(2000), rate(middle), rate(1_430_512)] == pytest.approx(
        [0, 2e-4, 4e-4, 2.2e-4, 4e-5]
    )


def test_tinyllama_v1_1_is_one_cosine_over_its_stages_and_cools_down_with_four_times_the_batch():
    stages = plan_stages(load("tinyllama:1.1b,v1.1_math_code"))
    assert [stage.name for stage in stages] == ["basic", "continual_ramp", "continual", "cooldown"]
    assert [stage.config.tokens for stage in stages] == [1.5e12, 6e9, 344e9, 150e9]
    assert stages[-1].config.batch_size.tokens[0] == 4 * stages[0].config.batch_size.tokens[0]
    ends = [(stage.config.schedule, stage.batch_sizes.num_steps) for stage in stages]
    for (before, steps), (after, more) in itertools.pairwise(ends):
        meeting = float(learning_rate(before, steps)(steps)), float(learning_rate(after, more)(0))
        assert meeting[0] == pytest.approx(meeting[1])
    assert float(learning_rate(*ends[-1])(ends[-1][1])) == pytest.approx(4e-5)
    assert stages[1].config.mixture.start["slimpajama"] == 1.0
    assert stages[1].config.mixture.end == {"slimpajama": 0.75, "starcoderdata": 0.15, "proof_pile_2": 0.1}


@pytest.mark.parametrize(
    ("name", "steps", "batch", "decay_start"),
    [("135m", 2_000_000, 1_048_576, 1_600_000), ("360m", 2_600_000, 1_572_864, 2_080_000)],
)
def test_smollm2_small_as_published(name, steps, batch, decay_start):
    rate, sizes = corner(f"smollm2:{name}", "pretraining")
    assert (sizes.num_steps, sizes.tokens_before(1)) == (steps, batch)
    middle = (decay_start + steps) // 2
    assert [rate(s) for s in (0, 2000, decay_start, middle, steps)] == pytest.approx([0, 3e-3, 3e-3, 1.5e-3, 0])


def test_smollm2_1_7b_is_one_schedule_over_its_stages():
    stages = plan_stages(load("smollm2:1.7b"))
    assert [stage.name for stage in stages] == ["stage_1", "stage_2", "stage_3", "stage_4", "context_8k"]
    assert stages[-1].last_step == 5_240_000
    rates = [learning_rate(stage.config.schedule, stage.batch_sizes.num_steps) for stage in stages]
    for step in (0, 1000, 2000, 2_861_023, 4_716_000, 4_768_372, 4_978_000, 5_239_999):
        expected = 5e-4 * min(1.0, step / 2000, (5_240_000 - step) / 524_000)
        ((stage, rate),) = [(s, r) for s, r in zip(stages, rates, strict=True) if s.first_step <= step < s.last_step]
        assert float(rate(step - stage.first_step)) == pytest.approx(expected, rel=2e-6), step
    extended = stages[-1].config
    assert (extended.context_length, extended.rope_theta) == (8192, 1.3e5)
    end = extended.mixture.end
    assert (end["dclm_long"], end["fineweb_edu_long"], end["dolma_books"]) == pytest.approx((0.1, 0.1, 0.2))


def test_tulu_3_as_published():
    for size, sft, dpo, pairs in (("8b", 5e-6, 5e-7, 128), ("70b", 2e-6, 2e-7, 128), ("405b", 2e-6, 2e-7, 256)):
        config = with_lengths(
            dataclasses.replace(load(f"tulu3:{size}"), run_stages=("sft", "dpo")), lambda stage: 128_000
        )
        first, second = plan_stages(config)
        assert (first.batch_sizes.num_steps, first.batch_sizes.rows(0)) == (2000, 128)
        rate = learning_rate(first.config.schedule, 2000)
        assert [float(rate(step)) for step in (0, 60, 1030, 2000)] == pytest.approx([0, sft, sft / 2, 0], abs=1e-12)
        assert first.config.reduction == "conversation_sum"
        assert (first.config.context_length, second.config.context_length) == (4096, 2 * 2048)
        assert (second.batch_sizes.num_steps, second.batch_sizes.rows(0)) == (128_000 // pairs, pairs)
        rate = learning_rate(second.config.schedule, second.batch_sizes.num_steps)
        assert float(rate(128_000 // pairs // 10)) == pytest.approx(dpo)
        assert dataclasses.astuple(second.config.preference) == ("dpo_norm", 5.0, "cached")
        assert {s.optimizer.weight_decay for s in config.stages.values() if not s.reinforcement} == {0.0}
        assert {s.optimizer.clip_norm for s in config.stages.values() if not s.reinforcement} == {0.0}
    reward = load("tulu3:8b").stages["reward_model"]
    assert (reward.schedule.peak, reward.optimizer.epsilon, reward.batch_size.tokens) == (3e-6, 1e-5, (256 * 4096,))
    assert (reward.passes.count, reward.passes.warmup_share) == (1, 0)
    assert [load(f"tulu3:{size}").seed for size in ("8b", "70b")] == [123, 456]


@pytest.mark.parametrize(
    ("name", "sft", "half_way", "near_end"),
    [
        ("135m", 1e-3, 0.5, 0.0076),
        ("360m", 1e-3, 0.5, 0.0076),
        ("1.7b", 3e-4, 0.5, 0.0076),
        ("135m,seed", 3e-4, 1.0, 0.5),
        ("1.7b,seed", 3e-4, 1.0, 0.5),
    ],
)
def test_smollm2_post_training_as_published(name, sft, half_way, near_end):
    """A cosine, or in the summary a rate that is held and falls over the last tenth."""
    config = with_lengths(dataclasses.replace(load(f"smollm2:{name}"), run_stages=("sft", "dpo")), lambda _: 64_000)
    for stage, peak, rows, length in zip(
        plan_stages(config), (sft, 1e-6), (8192, 2 * 1024), ("best_fit", "one_per_row"), strict=True
    ):
        assert stage.config.passes.count == 2
        assert (stage.config.context_length, stage.config.mixture.packing) == (rows, length)
        assert (stage.batch_sizes.num_steps, stage.batch_sizes.rows(0)) == (1000, 128)
        rate = learning_rate(stage.config.schedule, 1000)
        shares = [float(rate(step)) / peak for step in (0, 100, 550, 950)]
        assert shares == pytest.approx([0, 1, half_way, near_end], abs=1e-4)
    assert dataclasses.astuple(config.stages["dpo"].preference) == ("dpo", 0.5, "cached")


def test_text_01_post_training_as_published():
    stages = load("minimax_text_01:456b").stages
    for name, chats, length, passes, rows, peak, final in (
        ("sft_short", 1, 8192, 2, 128, 1e-5, 1e-6),
        ("sft_long", 1, 1_032_192, 2, 80, 3e-6, 3e-6),
        ("dpo_short", 2, 8192, 1, 64, 5e-7, 5e-8),
        ("dpo_long", 2, 1_032_192, 1, 64, 5e-7, 5e-7),
    ):
        stage = stages[name]
        assert (stage.documents_per_example, stage.context_length) == (chats, chats * length)
        assert (stage.passes.count, stage.batch_size.tokens[0] // stage.context_length) == (passes, rows)
        assert (stage.schedule.peak, stage.schedule.final, stage.rope_theta) == (peak, final, 1e7)


def test_seed_recipes_are_what_their_source_says():
    for name, beta2 in (("minimax_text_01:456b,seed", 0.98), ("smollm2:135m,seed", 0.999)):
        config = load(name)
        stages = [config.stages[stage] for stage in config.run_stages]
        assert {(s.optimizer.beta2, s.optimizer.weight_decay) for s in stages} == {(beta2, 0.01)}
    rate, _ = corner("minimax_text_01:456b,seed", "pretraining")
    assert [rate(0), rate(10_000), rate(500_000)] == pytest.approx([0, 1e-4, 1e-5])
    small = load("smollm2:360m,seed")
    for stage in (small.stages[name] for name in small.run_stages):
        assert stage.batch_size.tokens == (2_097_152,)


def test_softmax_ablation_differs_in_its_layers_only_and_is_not_smaller():
    hybrid, softmax = load("minimax_m1:laptop"), load("minimax_m1:laptop_softmax")
    assert 1 <= softmax.model.num_parameters() / hybrid.model.num_parameters() < 1.006
    assert 1 <= softmax.model.num_active_parameters() / hybrid.model.num_active_parameters() < 1.02
    same = dataclasses.replace(softmax.model, layer_pattern=hybrid.model.layer_pattern, num_heads=4, num_kv_heads=2)
    assert same == hybrid.model
    assert (softmax.data, softmax.stages) == (hybrid.data, hybrid.stages)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("labtop", "'labtop' is neither a size nor a recipe; did you mean 'laptop'?"),
        ("135m,360m", "'135m,360m' names more than one size"),
        ("paper,seed", "'paper,seed' names more than one recipe"),
    ],
)
def test_a_wrong_argument_is_one_line(argument, line):
    with pytest.raises(ConfigError) as caught:
        load(f"smollm2:{argument}")
    assert len(caught.value.problems) == 1
    assert line in caught.value.problems[0]


def test_order_of_size_and_recipe_does_not_matter():
    assert load("smollm2:seed,135m") == load("smollm2:135m,seed")


class Device(types.SimpleNamespace):
    """An accelerator with so much memory."""

    def __init__(self, gib: float):
        super().__init__(platform="gpu", device_kind="H200", process_index=0)
        self.memory_stats = lambda: {"bytes_limit": int(gib * 2**30)}


@pytest.fixture
def data_of_m1(tmp_path, monkeypatch):
    """An empty file for each file that the sizes of M1 need."""
    monkeypatch.chdir(tmp_path)
    for corpus in load("minimax_m1:456b").data.corpora.values():
        folder = pathlib.Path(corpus.path).parent
        folder.mkdir(parents=True)
        (folder / "0.jsonl.zst").touch()
    pathlib.Path("data/minimax_m1/tokenizer.json").touch()


@pytest.mark.parametrize(
    ("devices", "gib", "size"), [(1, 16, "laptop"), (1, 80, "1b"), (8, 80, "8b"), (512, 95, "456b"), (256, 32, "8b")]
)
@pytest.mark.usefixtures("data_of_m1")
def test_the_largest_size_that_fits_is_chosen_and_explained(monkeypatch, devices, gib, size):
    monkeypatch.setattr(jax, "devices", lambda: [Device(gib)] * devices)
    config = load("minimax_m1")
    assert config.name == f"minimax_m1_{size}"
    assert config.size_reason.startswith(f"{size}: the largest for {devices} x H200 of {gib} GiB")
    assert ("456b needs 6796 GiB for weights, moments and gradients" in config.size_reason) == (size != "456b")


def test_a_size_whose_data_are_missing_is_not_chosen(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "devices", lambda: [Device(80)])
    config = load("minimax_m1")
    assert config.name == "minimax_m1_laptop"
    assert re.search(r"1b needs data/minimax_m1/\w+/\*.jsonl.zst, which is not here", config.size_reason)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_machine_without_accelerator_takes_the_laptop_size(system):
    config = load(system)
    assert config.name.startswith(f"{system}_laptop")
    assert config.size_reason.endswith("no accelerator")
    assert config.data == load(f"{system}:laptop").data


def test_training_state_of_456b_is_sixteen_bytes_a_parameter():
    config = load("minimax_m1:456b")
    raw = ConfigDict(dataclasses.asdict(config))
    assert selection.training_bytes(raw) == 16 * 456_089_655_296
