"""How many rows each step takes: a plain function of the step, in whole rows and exact integers.

Source: MiniMax-01 (arXiv 2501.08313) section 4.2, whose batch doubles at 69B, 790B and 4.7T consumed tokens.
"""

import bisect
from dataclasses import dataclass

from lightning_jax.errors import UserError
from lightning_jax.optimizers.config import BatchSizeConfig


@dataclass(frozen=True)
class _Ramp:
    """A run of steps with one batch size."""

    first_step: int
    first_row: int
    rows: int


class BatchSizes:
    """The batches of one stage.

    A batch size begins at the first step before which at least its `starts` tokens were consumed, and the stage ends
    at the first step before which at least `tokens` were: 3T tokens in batches of 2,097,152 are 1,430,512 steps.

    Raises UserError for a batch that is no whole number of rows.
    """

    def __init__(self, config: BatchSizeConfig, context_length: int, tokens: int):
        ragged = [batch for batch in config.tokens if batch % context_length]
        if ragged:
            raise UserError(f"batch_size.tokens: {ragged[0]} is no multiple of context_length={context_length}")
        self.context_length = context_length
        self._ramps: list[_Ramp] = []
        step = row = 0
        ends = [*config.starts[1:], tokens]
        for batch, end in zip(config.tokens, ends, strict=True):
            rows = batch // context_length
            self._ramps.append(_Ramp(step, row, rows))
            steps = max(0, _divide_up(min(end, tokens) - row * context_length, batch))
            step, row = step + steps, row + steps * rows
        self.num_steps = step
        self.num_rows = row

    def rows(self, step: int) -> int:
        """Rows of the batch at `step`."""
        return self._ramp(step).rows

    def first_row(self, step: int) -> int:
        """Rows of the stage before `step`, which is also the number of its first row."""
        ramp = self._ramp(step)
        return ramp.first_row + (step - ramp.first_step) * ramp.rows

    def tokens_before(self, step: int) -> int:
        """Tokens of the stage consumed before `step`."""
        return self.first_row(step) * self.context_length

    def _ramp(self, step: int) -> _Ramp:
        if not 0 <= step <= self.num_steps:
            raise IndexError(f"step {step} is not in this stage of {self.num_steps} steps")
        return self._ramps[bisect.bisect_right(self._ramps, step, key=lambda ramp: ramp.first_step) - 1]


def _divide_up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
