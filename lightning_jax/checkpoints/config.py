"""When checkpoints are written and which are kept."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """Lengths are in steps of the run; 0 turns that rule off. The newest is always kept."""

    every_steps: int
    every_minutes: float  # also after so much wall time
    keep_newest: int
    keep_every_steps: int  # multiples of it are kept for ever
    max_failures: int  # so many failed saves in a row stop the run
