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


def write(
    name: str, lines: Sequence[str], figures: Mapping[str, Any], packages: Sequence[str] = ("jax", "flax", "numpy")
) -> None:
    """Writes results/NAME.md and .json and prints the former.

    Args:
      lines: of Markdown, beginning with the title; what was run where goes below it.
      figures: everything measured, as JSON holds it.
      packages: whose versions matter.
    """
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {each: importlib.metadata.version(each) for each in packages},
        "command": shlex.join(["python", str(Path(sys.argv[0])), *sys.argv[1:]]),
    }
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    facts = [f"- Date: {about['date']}", f"- Machine: {about['machine']}", f"- Versions: {versions}"]
    facts.append(f"- Command: `{about['command']}`")
    text = "\n".join([lines[0], "", *facts, *lines[1:], ""])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, **figures}, indent=1) + "\n", encoding="utf-8")
    print(text)


def machine() -> str:
    """Processor, cores and operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
