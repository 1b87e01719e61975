"""What the commands share: reading `--config` with its overrides, and one clear line for a user's mistake."""

import argparse
import sys
from collections.abc import Callable, Sequence

from lightning_jax.config import ConfigError, RunConfig, load_config, nearest_name
from lightning_jax.errors import UserError
from lightning_jax.parallel import MeshConfig
from lightning_jax.parallel.config import AXES

USAGE_ERROR = 2


def run_command(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace, RunConfig], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Reads the arguments, loads the config, runs `command` and returns the exit code.

    Whatever is the user's to mend is told on standard error without a traceback.
    """
    parser.add_argument("--config", required=True, metavar="FILE.py[:SIZE]", help="a file that defines get_config")
    parser.epilog = "--config.SECTION.FIELD=VALUE overrides any field of the config."
    known, rest = parser.parse_known_args(arguments)
    flags = [option for action in parser._actions for option in action.option_strings]
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    problems = [
        f"{argument}: unknown argument; {nearest_name(argument, flags)}"
        for argument in rest
        if argument not in overrides
    ]
    try:
        config = load_config(known.config, [override.removeprefix("--config.") for override in overrides])
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        return _tell(problems)
    try:
        return command(known, config)
    except UserError as error:
        return _tell(str(error).splitlines())


def mesh_option(text: str, problems: list[str]) -> MeshConfig | None:
    """The mesh that `--mesh=data=2,tensor=4` describes, None for an empty text; adds what is wrong to `problems`."""
    if not text:
        return None
    axes = dict(part.partition("=")[::2] for part in text.split(","))
    known = [axis for axis in AXES if axis != "sequence"]  # these commands generate, a token after the other
    if not set(axes) <= set(known) or not all(size.removeprefix("-").isdigit() for size in axes.values()):
        problems.append(f"--mesh={text}: not of the form data=2,tensor=4; axes: {', '.join(known)}")
        return None
    mesh = MeshConfig.of(**{axis: int(size) for axis, size in axes.items()})
    problems += [f"--mesh: {problem}" for problem in mesh.problems()]
    return mesh


def _tell(problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return USAGE_ERROR
