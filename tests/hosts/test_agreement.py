"""What hosts compare: config, code, versions, devices and options, each by its name."""

import dataclasses

import jax

from lightning_jax.hosts import run_facts
from lightning_jax.hosts.agreement import disagreements


@dataclasses.dataclass(frozen=True)
class Model:
    layers: int
    pattern: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    model: Model
    stages: dict[str, Model]


CONFIG = Config(0, Model(2, ("lightning", "softmax")), {"first": Model(3, ())})


def test_every_field_file_and_version_is_a_fact():
    facts = run_facts(CONFIG, {"workdir": "runs/x"})
    assert facts["config.stages.first.layers"] == "3"
    assert facts["config.model.pattern"] == '["lightning", "softmax"]'
    assert facts["version of jax"] == jax.__version__
    assert facts["devices"] == "8 x cpu"
    assert facts["--workdir"] == "runs/x"
    assert "xla_force_host_platform_device_count=8" in facts["XLA_FLAGS"]
    assert facts["lightning_jax/hosts/agreement.py"].startswith("version ")
    assert "pallas_kernels/__init__.py" in facts


def test_the_minority_differs_and_of_two_hosts_the_second():
    def told(*values):
        facts = {index: {"x": value} for index, value in enumerate(values)}
        return disagreements(facts, {index: f"n{index}" for index in facts})

    assert told("1", "1", "1") == []
    assert told("2", "1", "1") == ["host 0 (n0) differs: x is 2, and 1 elsewhere"]
    assert told("2", "1") == ["host 1 (n1) differs: x is 1, and 2 elsewhere"]
    (line,) = told("1", "y" * 100)
    assert len(line) < 140


def test_many_differences_are_counted():
    facts = {0: {str(n): "1" for n in range(50)}, 1: {}}
    lines = disagreements(facts, {0: "a", 1: "b"})
    assert len(lines) == 9
    assert lines[-1] == "and 42 further differences"
