"""Every mistake in a config or on the command line is one line that names the field and what would be right."""

import json
import pathlib

import pytest
import tiny_run

from lightning_jax import train
from lightning_jax.config import ConfigError, RunConfig, differences
from lightning_jax.config_reader import load_config, parse
from lightning_jax.mesh_problems import problems_on

LAPTOP = tiny_run.CONFIG

MISTAKES = {
    # unknown names, anywhere on the path
    "model.num_head=8": ("model.num_head", "did you mean 'num_heads'?"),
    "modle.num_heads=8": ("modle", "did you mean 'model'?"),
    "stages.pretrain.tokens=1": ("stages.pretrain", "did you mean 'pretraining'?"),
    "data.corpora.txt.path=x": ("data.corpora.txt", "did you mean 'text'?"),
    "stages.pretraining.optimizer.beta_1=0.9": ("optimizer.beta_1", "did you mean 'beta1'?"),
    "seed.value=3": ("seed is int", "it has no fields"),
    # wrong types
    "model.num_heads=four": ("model.num_heads=four", "not int"),
    "model.num_layers=1.5": ("model.num_layers=1.5", "not int"),
    "model.tie_embeddings=maybe": ("model.tie_embeddings", "not bool"),
    "model.rms_norm_eps=small": ("model.rms_norm_eps", "not float"),
    "model=3": ("config.model", "set one of its fields"),
    "stages.pretraining.mixture.start=text": ("mixture.start", "names with float"),
    "model.rms_norm_eps=nan": ("model.rms_norm_eps", "not a finite number"),
    "seed": ("config.seed", "no value"),
    # no such choice
    "model.remat=some": ("model.remat", "'some' is not a choice"),
    "model.layer_pattern=lightning,softmx": ("model.layer_pattern[1]", "did you mean 'softmax'?"),
    "data.on_bad_record=ignore": ("data.on_bad_record", "'ignore' is not a choice"),
    # impossible combinations
    "model.num_kv_heads=3": ("model.num_kv_heads", "3"),
    "model.rotary_dim=33": ("model.rotary_dim", "33"),
    "model.experts_per_token=99": ("model.experts_per_token", "99"),
    "model.num_layers=0": ("model.num_layers", "0"),
    "stages.pretraining.context_length=100": ("stages.pretraining.batch_size.tokens", "context_length=100"),
    "stages.pretraining.context_length=0": ("stages.pretraining.context_length", "0"),
    "stages.pretraining.tokens=10": ("stages.pretraining.tokens", "less than one batch"),
    "stages.pretraining.mixture.start=text:1,prose:1": ("stages.pretraining.mixture", "no corpus 'prose'"),
    "stages.pretraining.optimizer.beta1=1.5": ("optimizer.beta1", "1.5"),
    "stages.pretraining.schedule.peak=-1": ("schedule.peak", "-1"),
    "stages.pretraining.schedule.decay_steps=9999": ("stages.pretraining.schedule.decay_steps", "do not fit"),
    "stages.pretraining.batch_size.micro_batch_tokens=100": ("batch_size.micro_batch_tokens", "context_length=256"),
    "run_stages=pretrainin": ("run_stages", "did you mean 'pretraining'?"),
    "run_stages=pretraining,pretraining": ("run_stages", "named twice"),
    "data.tokenizer.vocab_size=100000": ("data.tokenizer.vocab_size", "exceeds model.vocab_size=4096"),
    "stages.pretraining.optimizer.moment_dtype=bfloat16": ("moment_dtype", "differs between stages"),
    "mesh.fsdp=-7": ("mesh.fsdp", "-7"),
    "data.validation_fraction=2": ("data.validation_fraction", "2"),
    "checkpoints.every_steps=-1": ("checkpoints.every_steps", "-1"),
    "metrics.log_every_steps=0": ("metrics.log_every_steps", "0"),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_with_the_field_and_what_would_be_right(override):
    with pytest.raises(ConfigError) as error:
        load_config(LAPTOP, [override])
    lines = [line for line in error.value.problems if all(part in line for part in MISTAKES[override])]
    assert lines, error.value.problems
    assert not any("\n" in line for line in error.value.problems)


def test_all_mistakes_are_told_at_once():
    overrides = ["model.num_head=8", "model.remat=some", "stages.pretraining.tokens=10", "sed=1"]
    with pytest.raises(ConfigError) as error:
        load_config(LAPTOP, overrides)
    text = str(error.value)
    assert all(field in text for field in ("num_head", "sed"))
    assert len(error.value.problems) >= 3


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["mesh.data=3", "mesh.fsdp=1"], "mesh"),
        (["mesh.sequence=8", "mesh.fsdp=1", "stages.pretraining.context_length=8"], "context_length: 8 does"),
        (["mesh.sequence=8", "mesh.fsdp=1", "model.expert_dispatch=capacity"], "x model.capacity_group"),
        (["mesh.tensor=8", "mesh.fsdp=1"], "model.num_heads"),
        (["mesh.expert=8", "mesh.fsdp=1", "model.num_experts=4"], "model.num_experts"),
        (["stages.pretraining.batch_size.tokens=1024"], "stages.pretraining.batch_size.tokens"),
        (["mesh.tensor=8", "mesh.fsdp=1", "model.vocab_size=4097"], "model.vocab_size"),
    ],
)
def test_what_does_not_fit_the_devices_is_told_before_anything_starts(overrides, field):
    problems = problems_on(load_config(LAPTOP, overrides), 8)
    assert any(field in problem for problem in problems), problems


def test_overrides_are_read_by_the_type_of_their_field():
    config = load_config(
        LAPTOP,
        [
            "stages.pretraining.tokens=4_096_000",
            "stages.context_extension.tokens=1e6",
            "model.tie_embeddings=true",
            "stages.pretraining.mixture.start=text:0.5,code:0.5",
            "stages.pretraining.batch_size.tokens=2048,4096",
            "stages.pretraining.batch_size.starts=0,1024000",
            "model.rope_scaling=none",
            "metrics.sample_prompts=one,two",
        ],
    )
    assert config.stages["pretraining"].tokens == 4_096_000
    assert config.stages["context_extension"].tokens == 1_000_000
    assert config.model.tie_embeddings is True
    assert config.stages["pretraining"].mixture.start == {"text": 0.5, "code": 0.5}
    assert config.stages["pretraining"].batch_size.tokens == (2048, 4096)
    assert config.model.rope_scaling is None
    assert config.metrics.sample_prompts == ("one", "two")


def test_a_section_that_a_config_leaves_out_is_set_field_by_field_and_what_is_missing_told():
    whole = ["lora.rank=4", "lora.alpha=8", "lora.targets=mixer.output,feed_forward.up"]
    adapters = load_config(LAPTOP, whole).lora
    assert (adapters.rank, adapters.alpha, adapters.targets) == (4, 8.0, ("mixer.output", "feed_forward.up"))
    with pytest.raises(ConfigError) as caught:
        load_config(LAPTOP, ["lora.rank=4"])
    assert [line.split(":")[0] for line in caught.value.problems] == ["config.lora.alpha", "config.lora.targets"]
    with pytest.raises(ConfigError, match=r"did you mean 'mixer\.output'"):
        load_config(LAPTOP, [*whole, "lora.targets=mixer.outputs"])
    with pytest.raises(ConfigError, match=r"no layer of this model has mixer\.query; there is mixer\.query_key_value"):
        load_config(LAPTOP, [*whole, "model.layer_pattern=lightning", "lora.targets=mixer.query"])


def test_a_field_missing_in_a_config_file_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('m', {str(pathlib.Path(LAPTOP.partition(':')[0]))!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "def get_config(arg=''):\n    config = module.get_config('laptop').unlock()\n    "
        "del config.model['num_heads']\n"
        "    config.model['num_haeds'] = 4\n    return config\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert any("config.model.num_heads: missing" in line for line in error.value.problems)
    assert any(
        "config.model.num_haeds: no such field; did you mean 'num_heads'?" in line for line in error.value.problems
    )


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("configs/minimax_m.py", "did you mean 'configs/minimax_m1.py'?"),
        ("configs/minimax_m1.py:latop", "did you mean 'laptop'?"),
        ("README.md", "not a Python file"),
    ],
)
def test_a_wrong_config_file_is_one_line(spec, line, monkeypatch):
    monkeypatch.chdir(tiny_run.REPOSITORY)
    with pytest.raises(ConfigError) as error:
        load_config(spec)
    assert len(error.value.problems) == 1
    assert line in error.value.problems[0]


def test_the_command_prints_lines_and_no_traceback_and_returns_2(tmp_path, capsys):
    arguments = [f"--config={LAPTOP}", f"--workdir={tmp_path}", "--config.model.num_head=8", "--wrkdir=x"]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "--wrkdir=x: unknown argument; did you mean '--workdir'?" in error
    assert "did you mean 'num_heads'?" in error
    assert not any(tmp_path.iterdir())


def test_a_resolved_config_reads_back_from_its_json():
    config = load_config(LAPTOP)
    again, problems = parse(RunConfig, json.loads(config.to_json()))
    assert not problems
    assert again == config


def test_differences_name_the_fields_that_changed():
    before, after = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 3, "c": 2}, "d": [1, 2]}
    lines = differences(before, after)
    assert lines == [
        "config.a.b is 3, but was 1 when the run was started",
        "config.d is [1, 2], but was [1] when the run was started",
    ]
    assert differences(before, after, ignore=("a", "d")) == []
    assert differences(before, after, ignore=("*.b",)) == lines[1:]
