"""Where what is prepared is kept, and one process at a time may work on."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lightning_jax.input_pipeline.config import DataConfig
from lightning_jax.input_pipeline.errors import DataError

logger = logging.getLogger(__name__)


def cache_folder(config: DataConfig) -> Path:
    """Where token stores and trained tokenizers are kept."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_jax"


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lets one process at a time work on `path`; the kernel frees the lock of a process that dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(f"data.cache_dir: {path.parent}: {error.strerror}; name a folder to write to") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is preparing it; waiting", path.name)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
