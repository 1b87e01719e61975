"""What a run reports, and how often."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricsConfig:
    """Lengths are in steps of the run."""

    log_every_steps: int
    evaluate_every_steps: int
    evaluation_batches: int  # per corpus
    tensorboard: bool
    sample_prompts: tuple[str, ...]
    sample_tokens: int
    sample_temperature: float
    flops_convention: str  # name of the FLOPs count that MFU divides by, see models.config
