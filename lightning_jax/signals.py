"""Stopping a run between two steps, when the user or the machine's owner asks for it.

On many hosts the request may come to one alone, and all must stop after the same step: JAX's preemption service, which
listens to SIGTERM itself, sees to that.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jax.experimental import multihost_utils


class StopRequest:
    """Whether SIGTERM or Ctrl-C arrived, and which; on many hosts, at any of them."""

    def __init__(self, many_hosts: bool) -> None:
        self.signal: signal.Signals | None = None
        self._many_hosts = many_hosts

    def after(self, step: int) -> bool:
        """Whether to stop after this step, the same on all hosts. Every host asks after every step."""
        if self._many_hosts and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return bool(self)

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What shells and schedulers expect of a process ended by that signal; 0 if there was none."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def stop_requests(many_hosts: bool) -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or Ctrl-C is only noted; the second acts as it would have outside."""
    request = StopRequest(many_hosts)
    listened_to = (signal.SIGINT,) if many_hosts else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in listened_to}

    def note(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        if many_hosts:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            request.signal = signal.Signals(number)
        # Not print: the signal may have come while print held the stream.
        os.write(sys.stderr.fileno(), b"\nstopping after this step and saving; once more to stop at once\n")

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
