"""What a run reports, and how often."""

from dataclasses import dataclass

from lightning_jax.models.config import FlopsConvention


@dataclass(frozen=True)
class MetricsConfig:
    """Lengths are in steps of the run."""

    log_every_steps: int
    evaluate_every_steps: int
    evaluation_batches: int  # per corpus
    tensorboard: bool
    sample_prompts: tuple[str, ...]
    sample_tokens: int
    sample_temperature: float  # 0 takes the likeliest token each time
    flops_convention: FlopsConvention  # what MFU counts as the model's work

    def problems(self) -> list[str]:
        """What cannot work, one line each."""
        lower_bounds = {
            "log_every_steps": 1,
            "evaluate_every_steps": 1,
            "evaluation_batches": 1,
            "sample_tokens": 0,
            "sample_temperature": 0,
        }
        return [
            f"{name}: {getattr(self, name)} is too small; use {bound} or more"
            for name, bound in lower_bounds.items()
            if not getattr(self, name) >= bound
        ]
