"""The estimate against the compiler, and against arithmetic by hand."""

import dataclasses
import json

import jax
import pytest
from planned_runs import EIGHT, ROOT, RUNS, golden, planned

from lightning_jax.config_reader import load_config
from lightning_jax.parallel import MeshConfig
from lightning_jax.planning.compiled import compile_step, lower
from lightning_jax.planning.estimate import estimate
from lightning_jax.planning.hardware import parse_slice
from lightning_jax.stages import plan_stages

RECORD = ROOT / "benchmarks/results/pod_memory.json"


@pytest.mark.parametrize("name", RUNS)
def test_estimated_memory_is_the_compilers_within_15_percent(name):
    memory, compiled = estimate(*planned(name), EIGHT).memory, golden()[name]
    scalars = 64
    assert abs(memory.arguments - compiled["arguments"]) <= scalars
    total = compiled["arguments"] + compiled["temporaries"]
    assert memory.total == pytest.approx(total, rel=0.15)


def test_the_456b_steps_on_record_are_estimated_within_15_percent():
    on_record = [row for row in json.loads(RECORD.read_text())["rows"] if "temporaries" in row]
    # The estimate with offloaded inputs is too low by a fifth: planning/README.md says so.
    rows = [row for row in on_record if "model.remat=offload" not in row["overrides"]]
    assert len(rows) >= 8
    for row in rows:
        stage = row["stage"]
        config = load_config("configs/minimax_m1.py:456b", [f"run_stages={stage}", *row["overrides"]])
        axes = dict(part.rsplit(" ", 1) for part in row["mesh"].split(" x "))
        mesh = MeshConfig.of(**{axis: int(size) for axis, size in axes.items()})
        config = dataclasses.replace(config, mesh=mesh)
        total = estimate(config, plan_stages(config)[0], parse_slice(row["slice"])).memory.total
        assert total == pytest.approx(row["arguments"] + row["temporaries"], rel=0.15), row


def test_a_small_456b_is_estimated_within_15_percent_of_what_libtpu_says():
    sizes = "hidden_size=1536 num_heads=16 num_kv_heads=2 intermediate_size=2304 num_layers=16 num_experts=8"
    overrides = [f"model.{each}" for each in sizes.split()]
    overrides += ["run_stages=continual_pretraining", "stages.continual_pretraining.batch_size.tokens=524288"]
    config = load_config("configs/minimax_m1.py:456b", [*overrides, "mesh.expert=8", "mesh.tensor=1", "mesh.fsdp=1"])
    memory = estimate(config, plan_stages(config)[0], parse_slice("v5p:2x2x2")).memory
    arguments, temporaries = 3_314_329_088, 7_136_706_560  # of libtpu 0.0.51, which took twenty minutes for them
    assert memory.arguments == pytest.approx(arguments, rel=0.01)
    assert memory.total == pytest.approx(arguments + temporaries, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "expert, capacity"])
def test_goldens_are_what_the_compiler_says(name):
    compiled, expected = compile_step(*planned(name), jax.devices()), golden()[name]
    assert compiled.arguments == expected["arguments"]
    assert compiled.temporaries == pytest.approx(expected["temporaries"], rel=0.1)
    estimated = estimate(*planned(name), EIGHT).sent
    assert compiled.sent.keys() == estimated.keys()
    for axes, sent in compiled.sent.items():
        # On CPUs the compiler sums a gradient and drops what is not its own, where others scatter it: 4 for 3.
        most = 1.5 if "fsdp" in axes else 1.01
        assert 0.95 * estimated[axes].total < sent < most * estimated[axes].total, axes


def test_weights_moments_and_gradients_of_456b_on_512_chips_are_its_parameters_by_512():
    config = load_config("configs/minimax_m1.py:456b")
    plan = estimate(config, plan_stages(config)[0], parse_slice("v5p:8x8x8"))
    assert plan.mesh == {"data": 1, "fsdp": 2, "expert": 32, "expert_tensor": 1, "sequence": 1, "tensor": 8}
    share = 4 * config.model.num_parameters() / 512
    # Attention is not split over "expert", nor norms over anything: 7% of the parameters.
    assert share < plan.memory.weights < 3 * share
    assert plan.memory.moments == 2 * plan.memory.weights


def test_adapters_have_gradients_and_moments_of_their_own_size():
    config = load_config("configs/tulu3.py:8b,lora", ["stages.sft.tokens=1000000", "stages.sft.passes=none"])
    plan = estimate(config, plan_stages(config)[0], parse_slice("v5p:4x4x4"))
    D, F, A, kv, rank = 4096, 14_336, 4096, 1024, 64
    adapters = 32 * rank * (2 * (D + A) + 2 * (D + kv) + 3 * (D + F))
    share = 4 * adapters / 64
    # What is on the axis of outputs, or of a vector, "fsdp" does not split.
    assert share < plan.memory.moments / 2 < 64 * share
    assert plan.memory.gradients in (plan.memory.moments / 2, plan.memory.moments)
    assert plan.memory.weights > 4 * config.model.num_parameters() / 64
    assert plan.micro_batches > 1
    # No gradient of what is frozen, but three forward passes, of the head two.
    assert plan.model_flops < plan.flops < plan.model_flops * 4 / 3


def test_ppo_holds_a_reference_and_a_value_model_with_its_training_beside_the_policy():
    config = load_config("configs/tulu3.py:8b", ["run_stages=rlvr"])
    memory = estimate(config, plan_stages(config)[0], parse_slice("h100:4x8")).memory
    # The reference; the value's weights, gradients and two moments.
    assert memory.companions == (1 + 1 + 1 + 2) * memory.weights
    config = load_config("configs/tulu3.py:8b", ["run_stages=rlvr_grpo"])
    memory = estimate(config, plan_stages(config)[0], parse_slice("h100:8x8")).memory
    assert memory.companions == memory.weights
    rollouts = {"staleness": 1, "dynamic_sampling": True, "max_refills": 1}
    overrides = [f"stages.rlvr_grpo.reinforcement.rollouts.{name}={value}" for name, value in rollouts.items()]
    stale = load_config("configs/tulu3.py:8b", ["run_stages=rlvr_grpo", *overrides])
    memory = estimate(stale, plan_stages(stale)[0], parse_slice("h100:8x8")).memory
    assert memory.companions == 2 * memory.weights


def test_flops_are_the_models_and_those_of_the_forward_passes_that_are_made_again():
    config, stage = planned("dense")
    plan = estimate(config, stage, EIGHT)
    tokens, head = 65536, 2 * config.model.vocab_size * config.model.hidden_size
    forward = config.model.flops_per_token(stage.config.context_length, "model") / 3
    assert plan.tokens == tokens
    assert plan.micro_batches == 4
    assert plan.model_flops == pytest.approx(3 * forward * tokens / 8)
    # Forward for the sums, again for their gradient, and layers once more from their inputs, but for the last product.
    down = 2 * config.model.hidden_size * config.model.intermediate_size * config.model.num_layers
    assert plan.flops == pytest.approx((5 * (forward - head) + 4 * head - down) * tokens / 8)
    kept = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    assert estimate(kept, stage, EIGHT).flops == pytest.approx(4 * forward * tokens / 8)


@pytest.mark.parametrize(("remat", "experts", "parts"), [("none", 0, 1), ("full", 4, 1), ("full", 0, 2)])
def test_where_no_loop_turns_twice_the_flops_are_the_compilers(remat, experts, parts):
    context, rows = 64, 64  # a block of softmax attention and a chunk of lightning attention, not more
    config, _ = planned("dense")
    model = dataclasses.replace(
        config.model,
        hidden_size=512,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        rotary_dim=64,
        intermediate_size=1024,
        layer_pattern=("lightning", "softmax"),
        num_layers=2,
        num_experts=experts,
        experts_per_token=2 if experts else 0,
        expert_dispatch="capacity",
        capacity_factor=1.0,
        loss_chunk=context,
        remat=remat,
    )
    config = dataclasses.replace(config, model=model, mesh=MeshConfig.of(data=1))
    (stage,) = (dataclasses.replace(each, context_length=context) for each in config.stages.values())
    tokens = rows * context
    batch = dataclasses.replace(stage.batch_size, tokens=(tokens,), starts=(0,), micro_batch_tokens=tokens // parts)
    stage = dataclasses.replace(stage, batch_size=batch)
    config = dataclasses.replace(config, stages={"only": stage}, run_stages=("only",))
    (planned_stage,) = plan_stages(config)
    plan = estimate(config, planned_stage, parse_slice("cpu:1"))
    assert plan.micro_batches == parts
    flops = plan.flops / parts  # the compiler counts a loop's body once
    compiled = lower(config, planned_stage, jax.devices()[:1]).compile().cost_analysis()["flops"]
    # Besides products: norms, softmaxes, the optimizer; the half of attention's square that is masked.
    assert flops < compiled < 1.08 * flops


def test_fsdp_gathers_weights_for_every_forward_pass_and_scatters_their_gradient():
    config, stage = planned("dense")
    plan = estimate(config, stage, EIGHT)
    norms = (2 * config.model.num_layers + 1) * config.model.hidden_size
    ends = 2 * config.model.vocab_size * config.model.hidden_size
    layers = config.model.num_parameters() - norms - ends
    assert plan.sent.keys() == {("fsdp",)}
    assert plan.sent["fsdp",].total == pytest.approx(plan.micro_batches * 4 * (4 * layers + 3 * ends) * 7 / 8)


def test_what_a_lightning_layer_sends_over_the_sequence_axis_does_not_grow_with_the_context():
    config, stage = planned("sequence")
    lightning = dataclasses.replace(config, model=dataclasses.replace(config.model, layer_pattern=("lightning",)))
    longer = dataclasses.replace(stage, config=dataclasses.replace(stage.config, context_length=512))
    batch = dataclasses.replace(stage.config.batch_size, tokens=(2 * 65536,))
    twice = dataclasses.replace(longer.config, batch_size=batch)
    longer = plan_stages(dataclasses.replace(lightning, stages={"long": twice}, run_stages=("long",)))[0]
    sent = [estimate(lightning, each, EIGHT).sent for each in (stage, longer)]
    assert sent[0]["sequence",] == sent[1]["sequence",]
    assert sent[0]["sequence",].total > 0


ROLLOUTS = "stages.rlvr.reinforcement.rollouts"


def rollouts_of(fsdp, *overrides):
    """The plan of Tulu 3's RLVR stage for 8B on a node, with few sequences under way."""
    overrides = ["run_stages=rlvr", "mesh.data=1", "mesh.tensor=1", f"mesh.fsdp={fsdp}", *overrides]
    config = load_config("configs/tulu3.py:8b", [*overrides, f"{ROLLOUTS}.slots=64"])
    return config, estimate(config, plan_stages(config)[0], parse_slice("h100:8"))


def test_a_share_of_the_devices_gathers_no_weights_for_a_token_and_leaves_the_others_to_train():
    config, in_turns = rollouts_of(8)
    _, share = rollouts_of(4, f"{ROLLOUTS}.devices={{tensor:4}}")
    assert (in_turns.rollouts.num_devices, share.rollouts.num_devices, share.mesh["fsdp"]) == (8, 4, 4)
    assert share.model_flops == 2 * in_turns.model_flops
    assert in_turns.rollouts.token_seconds > 5 * share.rollouts.token_seconds
    # fp32, a quarter of them on each; norms are not split.
    assert share.rollouts.weights == pytest.approx(4 * config.model.num_parameters() / 4, rel=0.001)
    assert in_turns.rollouts.weights == in_turns.memory.arguments


def test_states_of_rollouts_are_those_of_the_slots_that_a_device_has():
    config, plan = rollouts_of(8)
    tokens = config.stages["rlvr"].context_length + 1
    # Eight slots and a prompt on its way; caches have whole blocks of places.
    assert plan.rollouts.states == pytest.approx(9 * tokens * config.model.kv_cache_bytes_per_token(), rel=0.1)
