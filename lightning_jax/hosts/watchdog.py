"""Ends a run that hangs, and says where: JAX waits for ever for a host that does not come to a step."""

import contextlib
import faulthandler
import signal
import threading
import time
from collections.abc import Iterator

from lightning_jax.hosts.hosts import Hosts

_GRACE_S = 60.0
_PRINTING_S = 1.0


@contextlib.contextmanager
def watch(hosts: Hosts, seconds: float) -> Iterator[None]:
    """Inside, all hosts end with their stacks printed when this one does nothing new for so long; 0 for never.

    A thread looks at `hosts.since`. Where that thread itself cannot run, because another one holds Python's lock and
    hangs, the interpreter prints the stacks, and an alarm ends this host: a death, after which the run starts again.
    """
    if not seconds:
        yield
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(min(seconds / 10, 5)):
            faulthandler.dump_traceback_later(seconds + _GRACE_S, file=2)
            signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_S + _PRINTING_S)
            if time.monotonic() - hosts.since > seconds:
                hosts.hang(seconds)

    hosts.at(*hosts.progress)
    watcher = threading.Thread(target=look, name="watchdog", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
