"""One run per folder: an exclusive lock that ends with the process, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lightning_jax.errors import UserError

LOCK = "run.lock"

_held: set[int] = set()  # descriptors of the locks this process holds


class RunLockError(UserError):
    """Another process runs in the same folder."""


@contextmanager
def run_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Holds `folder` (made if missing) for this process; of several hosts, process 0 alone should take it.

    The kernel releases the lock when the process ends, by SIGKILL too, so nothing is left to clean up.

    Raises:
        RunLockError: another process holds it; the line names its process, host and start.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            raise RunLockError(f"{folder} is in use by {holder}; stop that run or choose another folder") from None
        # A forked child, such as a data worker, would otherwise keep the lock when it outlives this process.
        os.register_at_fork(after_in_child=_close_held)
        started = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode())
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


def _close_held() -> None:
    while _held:
        os.close(_held.pop())
