"""When checkpoints are written and which are kept."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class CheckpointConfig:
    """Lengths are in steps of the run; 0 turns that rule off. The newest is always kept."""

    every_steps: int
    every_minutes: float  # also after so much wall time
    keep_newest: int
    keep_every_steps: int  # multiples of it are kept for ever
    max_failures: int  # so many failed saves in a row stop the run

    def problems(self) -> list[str]:
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return [f"{name}: {size} is negative; 0 turns the rule off" for name, size in sizes.items() if size < 0]

    def keeps(self, steps: list[int]) -> set[int]:
        """Those of the committed `steps` that stay on disk."""
        newest = sorted(steps)[-max(self.keep_newest, 1) :]
        forever = [step for step in steps if self.keep_every_steps and step % self.keep_every_steps == 0]
        return {*newest, *forever}
