"""Stopping a run between two steps, when the user or the machine's owner asks for it."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether SIGTERM or Ctrl-C arrived, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What shells and schedulers expect of a process ended by that signal; 0 if there was none."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or Ctrl-C is only noted; the second acts as it would have outside."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        # Not print: the signal may have come while print held the stream.
        os.write(sys.stderr.fileno(), b"\nstopping after this step and saving; once more to stop at once\n")

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
