"""All hosts must see one folder: checkpoints are written by all of them and made whole by host 0."""

import os
import time
from pathlib import Path

from lightning_jax.hosts.hosts import Hosts

_WAIT_S = 60.0  # network file systems remember for a while that something is not there


def check_shared(folder: Path, hosts: Hosts) -> None:
    """Returns when every host has seen in `folder` (made if missing) what host 0 left there.

    Raises:
      UserError: a line for each host that does not see it.
    """
    if hosts.count == 1:
        return
    mark = folder / f".seen_by_all_{hosts.word}"
    try:
        if hosts.index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        end = time.monotonic() + _WAIT_S
        while not mark.exists() and time.monotonic() < end:
            time.sleep(0.2)
        seen = "the same" if mark.exists() else "another, or one that host 0 does not share"
        hosts.agree("the folder", {f"the folder {os.fspath(folder)}": seen}, timeout=2 * _WAIT_S)
    finally:
        if hosts.index == 0:
            mark.unlink(missing_ok=True)
