"""run.json: what was run where. One entry per session, that is per start of the run's process, and facts about the run.

Facts that the report knows (all optional; any others are shown as they are):
  title            of the run
  total_steps
  flops_convention name of the FLOPs count behind the MFU
  unigram_entropy  {corpus: nats per token}, the loss of the best model that ignores context
  stages           list of mappings, one per stage
"""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lightning_jax.files import replace_text

RUN_FILE = "run.json"

_PACKAGES = ("lightning_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")
_PACKAGES += ("jax-cuda13-plugin", "jax-cuda12-plugin")


def record_session(
    folder: str | os.PathLike[str], facts: Mapping[str, Any], *, first_step: int, devices: Sequence[jax.Device]
) -> None:
    """Adds this session to run.json and brings its facts up to date; on processes other than 0 it does nothing.

    Args:
      folder: of the run.
      facts: about the run, replacing those of earlier sessions; what JSON can hold.
      first_step: the session's first step.
      devices: that the run computes on.
    """
    if jax.process_index() != 0:
        return
    path = Path(folder) / RUN_FILE
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": first_step,
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "processes": jax.process_count(),
        "host": platform.node(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "commit": _commit(),
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "sessions": [*sessions, session]}, indent=2, ensure_ascii=False)
    replace_text(path, text + "\n")


def versions() -> dict[str, str]:
    """Of Python and of the packages on which the bits of a run depend."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
            continue
    return versions


def _commit() -> str | None:
    """The commit this package was checked out from, "-dirty" where files were changed; None where it was installed."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # An environment that lies inside somebody's repository is not that repository.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
