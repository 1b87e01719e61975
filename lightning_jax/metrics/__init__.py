"""What a run shows: the console, the record in files, TensorBoard, throughput and the report."""

from lightning_jax.metrics.console import Console, SmoothedLoss
from lightning_jax.metrics.page import write_report
from lightning_jax.metrics.provenance import record_session
from lightning_jax.metrics.throughput import StepTimer, mfu, peak_flops
from lightning_jax.metrics.writer import MetricsWriter, read_metrics

__all__ = [
    "Console",
    "MetricsWriter",
    "SmoothedLoss",
    "StepTimer",
    "mfu",
    "peak_flops",
    "read_metrics",
    "record_session",
    "write_report",
]
