"""Problems of a metrics configuration are named one by one."""

from lightning_jax.metrics.config import MetricsConfig

GOOD = {
    "log_every_steps": 10,
    "evaluate_every_steps": 100,
    "evaluation_batches": 4,
    "tensorboard": True,
    "sample_prompts": ("The",),
    "sample_tokens": 64,
    "sample_temperature": 0.8,
    "flops_convention": "6N",
}


def test_a_good_configuration_has_no_problems():
    assert MetricsConfig(**GOOD).problems() == []


def test_every_problem_is_named():
    bad = MetricsConfig(**GOOD | {"log_every_steps": 0, "sample_temperature": float("nan")})
    assert bad.problems() == [
        "log_every_steps: 0 is too small; use 1 or more",
        "sample_temperature: nan is too small; use 0 or more",
    ]
