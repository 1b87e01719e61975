"""The training command, which keeps what rows of the batches this host was given, and may hang.

The environment names the file, RECORD_ROWS; the seconds by which a step is later, WAIT; the step at which the host
hangs, HANG_AT.
"""

import hashlib
import itertools
import json
import os
import sys
import time

from lightning_jax import programs, train


class RecordedPrograms(programs.Programs):
    def on_devices(self, batch):
        self.rows = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in batch["inputs"]]
        return super().on_devices(batch)

    def train_step(self, stage, rows):
        step = super().train_step(stage, rows)
        numbers = None

        def recorded(state, batch):
            nonlocal numbers
            numbers = numbers or itertools.count(int(state.step) + 1)  # later to read it would wait for the devices
            number = next(numbers)
            with open(os.environ["RECORD_ROWS"], "a") as file:
                file.write(json.dumps({"step": number, "part": self.host.index, "rows": self.rows}) + "\n")
            if str(number) == os.environ.get("HANG_AT"):
                time.sleep(1000)
            time.sleep(float(os.environ.get("WAIT", 0)))
            return step(state, batch)

        return recorded


if __name__ == "__main__":
    train.Programs = RecordedPrograms
    sys.exit(train.main())
