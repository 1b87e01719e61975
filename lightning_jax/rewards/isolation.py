"""How a process is cut off from this machine by bubblewrap, and whether that can be had here."""

import functools
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from lightning_jax.errors import UserError
from lightning_jax.rewards.system_calls import ARCHITECTURES

WAYS_OUT = (
    "apt install bubblewrap (0.8 or newer; Debian 12, Ubuntu 24.04), or run code without isolation by "
    "Sandbox(unsafe=True), in a config rewards.unsafe_code=true"
)
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


def require_isolation() -> None:
    """Raises UserError, which says what is missing and how it can be had."""
    problem = None
    if platform.machine() not in ARCHITECTURES or sys.platform != "linux":
        problem = f"it is for Linux on {' and '.join(ARCHITECTURES)}"
    elif (bwrap := shutil.which("bwrap")) is None:
        problem = "bwrap is not installed"
    elif _version(subprocess.run([bwrap, "--version"], capture_output=True, text=True).stdout) < (0, 8):
        problem = "bwrap is older than 0.8"
    elif _version(platform.release()) < (5, 14):
        # Before, the kernel counted a user's processes over all namespaces, and workers took them from each other.
        problem = "it needs Linux 5.14"
    elif os.getuid() == 0 and shutil.which("setpriv") is None:
        problem = "setpriv is not installed (apt install util-linux)"
    elif interpreter() is None:
        problem = "there is no Python outside a home folder (apt install python3)"
    if problem:
        raise UserError(f"no sandbox for generated code: {problem}; {WAYS_OUT}")


def bwrap_command(python: Path, uid: int, disk: int, seccomp_fd: int) -> list[str]:
    """What to put before a command. The order matters: what is mounted is made read-only after.

    Args:
        python: of `interpreter`.
        uid: of the user that root becomes; anyone else stays who he is, in a namespace of his own.
        disk: bytes of /tmp, the only place where anything can be written.
        seccomp_fd: a file with the filter of system calls.
    """
    # Not by Python's subprocess, which then copies the page tables of this process: a trainer's are large.
    command = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"] if os.getuid() == 0 else []
    command += [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--disable-userns"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/lib", "/lib64", "/sbin"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]  # where libpython is, for some builds
    if not python.is_relative_to("/usr"):
        command += ["--ro-bind", str(python.parents[1]), str(python.parents[1])]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--size"]
    command += [str(disk), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*command, "--seccomp", str(seccomp_fd)]


@functools.cache
def interpreter() -> Path | None:
    """A Python with its standard library that any user can run: this one without its virtual environment, if it is
    not in a home folder, else the system's; None where there is neither."""
    for candidate in (Path(sys._base_executable).resolve(), Path("/usr/bin/python3").resolve()):  # type: ignore[attr-defined]
        if candidate.exists() and all(folder.stat().st_mode & stat.S_IXOTH for folder in candidate.parents):
            return candidate
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
