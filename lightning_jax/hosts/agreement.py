"""What all hosts of a run must have in common, and the lines that name the one that differs."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import lightning_jax
import pallas_kernels
from lightning_jax.metrics.provenance import versions

# What of the environment changes the compiled program.
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_PLATFORMS")
_MOST_LINES = 8


def run_facts(config: Any | None, options: Mapping[str, Any]) -> dict[str, str]:
    """The config, the code, the versions and the devices of this host, by name.

    Args:
      config: a dataclass; None for a command without one.
      options: of the command line.
    """
    facts = {f"--{name}": str(value) for name, value in options.items()}
    facts |= _flat("config", dataclasses.asdict(config)) if config else {}
    facts |= {f"version of {name}": version for name, version in versions().items()}
    facts |= {name: os.environ.get(name, "") for name in _VARIABLES}
    facts |= {"devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"}
    for package in (lightning_jax, pallas_kernels):
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            facts[f"{package.__name__}/{path.relative_to(folder)}"] = f"version {digest[:12]}"
    return facts


def disagreements(facts: Mapping[int, Mapping[str, str]], names: Mapping[int, str]) -> list[str]:
    """A line for each host and fact by which it differs from most, or from host 0 where there is no majority.

    Args:
      facts: by host.
    """
    lines = []
    for fact in sorted(set().union(*facts.values())):
        values = {index: told.get(fact) for index, told in facts.items()}
        counts = Counter(values.values())
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        for index, value in values.items():
            if value != usual:
                there, elsewhere = _short(value), _short(usual)
                lines.append(f"host {index} ({names[index]}) differs: {fact} is {there}, and {elsewhere} elsewhere")
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} further differences"]
    return lines


def _flat(path: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {path: json.dumps(value)}
    return {name: each for key, part in value.items() for name, each in _flat(f"{path}.{key}", part).items()}


def _short(value: str | None) -> str:
    if value is None:
        return "missing"
    return value if len(value) <= 80 else f"{value[:77]}..."
