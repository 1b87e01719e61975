"""What hosts are doing, and which of them keeps the others waiting."""

from collections.abc import Mapping
from typing import NamedTuple


class Progress(NamedTuple):
    """What a host is doing."""

    step: int
    doing: str  # "reading its batch"
    waits: bool  # for its devices, which may wait for other hosts

    def __str__(self) -> str:
        return f"{self.doing} at step {self.step:,}"


STARTING = Progress(0, "starting", False)


def who_hangs(hosts: Mapping[str, Progress | None], seconds: float) -> str:
    """A line on why nothing was done for so long.

    Hosts that compute together wait for the slowest: whoever does something else, or is at an earlier step, is behind.
    """
    by_progress: dict[Progress, list[str]] = {}
    for name, progress in hosts.items():
        by_progress.setdefault(progress or STARTING, []).append(name)
    (behind, culprits), *others = sorted(by_progress.items(), key=lambda group: (group[0].waits, group[0].step))
    line = f"nothing was done for {seconds:.0f} s: {', '.join(culprits)}, {behind}"
    if not others and behind.waits and len(culprits) > 1:
        return f"{line}; no host is behind, so a device or the network between them hangs"
    return "; ".join([line, *(f"{', '.join(names)}, {progress}" for progress, names in others)])
