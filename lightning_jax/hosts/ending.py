"""How a process that is one of several hosts ends: at once, with a line that says why and a code on what to do next."""

import faulthandler
import os
import sys
import threading
from typing import NoReturn

MISTAKE = 2  # the user has to change something
RESTART = 75  # EX_TEMPFAIL: a host failed or hangs, nothing is wrong with the run itself
STOPPED = 130  # what shells expect of a process that Ctrl-C ended

_ending = threading.Lock()


class HostsError(RuntimeError):
    """Hosts did not come together in time, through no fault of the user's."""


def end_process(reason: str, code: int, *, stacks: bool = False) -> NoReturn:
    """Ends this process without waiting for threads or devices: some may hang, or wait for a host that is gone.

    Args:
      reason: a line or more, for standard error.
      stacks: print first what every thread is doing.
    """
    _ending.acquire()  # for ever: the first reason is the one that counts
    if stacks:
        faulthandler.dump_traceback(2)
    sys.stdout.flush()
    for line in reason.splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)
