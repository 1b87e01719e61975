"""How a benchmark puts its result on record: NAME.json with every figure, NAME.md with a table made from it."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LOAD_AT_START = os.getloadavg()[0]  # read on import: later the benchmark itself is part of the load


def write(
    name: str,
    lines: Sequence[str],
    figures: Mapping[str, Any],
    versions: Mapping[str, Mapping[str, str]] | None = None,
    *,
    cores: int | None = None,
    interpreter: str | None = None,
    folder: Path | None = RESULTS,
    show: bool = True,
) -> None:
    """Writes NAME.md and NAME.json and prints the former.

    Args:
      lines: of Markdown, beginning with the title; what was run where goes below it.
      figures: everything measured, as JSON holds it.
      versions: of the packages of each side (see `package_versions`); those of ours if not given.
      cores: how many were used; all if not given.
      interpreter: an argument of the command that is shown as PYTHON, since where it lies is this machine's affair.
      folder: for the two files; None only prints.
      show: whether to print.
    """
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(cores),
        "load_average_at_start": round(LOAD_AT_START, 1),
        "versions": versions or {"lightning_jax": package_versions("jax", "flax", "numpy")},
        "command": command(interpreter),
    }
    facts = [
        f"- Date: {about['date']}",
        f"- Machine: {about['machine']}; load average at the start {about['load_average_at_start']}",
    ]
    for side, packages in about["versions"].items():
        facts.append(f"- Versions ({side}): " + ", ".join(f"{each} {version}" for each, version in packages.items()))
    facts.append(f"- Command: `{about['command']}`")
    text = "\n".join([lines[0], "", *facts, *lines[1:], ""])
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps({**about, **figures}, indent=1) + "\n", encoding="utf-8")
    if show:
        print(text)


def package_versions(*packages: str, where_installed: Sequence[str] = ()) -> dict[str, str]:
    """Of Python, of packages of this interpreter, and of those others that it has."""
    installed = {each.name for each in importlib.metadata.distributions()} if where_installed else ()
    named = [*packages, *(each for each in where_installed if each in installed)]
    return {"python": platform.python_version()} | {each: importlib.metadata.version(each) for each in named}


def machine(cores: int | None = None) -> str:
    """Processor, cores used of cores present, and operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    present = os.cpu_count()
    return f"{processor}, {cores or present} of {present} cores, {platform.system()} {platform.machine()}"


def command(interpreter: str | None = None) -> str:
    """What this process was started with, as one writes it at the root of the repository."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for argument in sys.argv[1:]:
        option, equals, value = argument.rpartition("=")
        words.append(f"{option}{equals}PYTHON" if value == interpreter else argument)
    return shlex.join(words)
