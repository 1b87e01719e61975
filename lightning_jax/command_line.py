"""What the commands share: their arguments, what they say, and one clear line for a user's mistake."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax

from lightning_jax.config import ConfigError, RunConfig, nearest_name
from lightning_jax.config_reader import load_config
from lightning_jax.errors import UserError
from lightning_jax.hosts import MISTAKE, RESTART, STOPPED, Hosts, HostsError
from lightning_jax.parallel import MeshConfig
from lightning_jax.parallel.config import AXES

NO_READER = 141  # what shells expect of a command whose reader had enough

THREADS_PER_VIRTUAL_DEVICE = 4

GENERATION_AXES = tuple(axis for axis in AXES if axis != "sequence")  # it goes on a token after the other

Context = TypeVar("Context")


class Parser(argparse.ArgumentParser):
    """Arguments of a command, which have no other names; each mistake is a line, as those that are found later are."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The options; ends the process where there are mistakes."""
        known, rest = self.parse_known_args(arguments)
        if rest:
            self.error("\n".join(_unknown(self, rest)))
        return known

    def error(self, message: str) -> NoReturn:
        self.exit(_tell(message.splitlines()))


def finish(command: Callable[[], int], *, stopped: str) -> int:
    """The exit code of a command; a mistake, Ctrl-C and an output that nobody reads any more give no traceback.

    Args:
        stopped: what to say after Ctrl-C.
    """
    _give_threads_to_virtual_devices()
    try:
        return command()
    except UserError as error:
        return _tell(str(error).splitlines())
    except HostsError as error:
        return _tell([str(error)], RESTART)
    except KeyboardInterrupt:
        say(stopped)
        return STOPPED
    except BrokenPipeError:
        _close_output()
        return NO_READER


def say(line: str) -> None:
    """A line about what goes on, on standard error; of several processes the first one speaks."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


def show(text: str, end: str = "\n") -> None:
    """A result, on standard output at once; of several processes the first one shows it.

    Raises:
        UserError: it cannot be written.
        BrokenPipeError: nobody reads it.
    """
    if jax.process_index() != 0:
        return
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _close_output()
        raise UserError(f"standard output: {error.strerror}") from None


def run_command(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace, RunConfig], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Reads the arguments, loads the config, runs `command` and returns the exit code.

    Whatever is the user's to mend is told on standard error without a traceback.
    """
    return run_command_in(
        contextlib.nullcontext, parser, lambda options, config, _: command(options, config), arguments
    )


def run_command_in(
    context: Callable[[argparse.Namespace], contextlib.AbstractContextManager[Context]],
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace, RunConfig, Context], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """`run_command` in a context that is entered before the config is loaded, which may look at the devices.

    Args:
        context: made from the options; `command` gets what it enters.
    """
    parser.add_argument("--config", required=True, metavar="FILE.py[:SIZE]", help="a file that defines get_config")
    parser.epilog = "--config.SECTION.FIELD=VALUE overrides any field of the config."
    known, rest = parser.parse_known_args(arguments)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    problems = _unknown(parser, [argument for argument in rest if argument not in overrides])
    _give_threads_to_virtual_devices()
    try:
        with context(known) as entered:
            try:
                config = load_config(known.config, [override.removeprefix("--config.") for override in overrides])
            except ConfigError as error:
                raise ConfigError(problems + list(error.problems)) from None
            if problems:
                raise ConfigError(problems)
            return command(known, config, entered)
    except UserError as error:
        return _tell(str(error).splitlines())
    except HostsError as error:
        return _tell([str(error)], RESTART)


def add_mesh_option(parser: argparse.ArgumentParser) -> None:
    """Of a command that generates."""
    parser.add_argument(
        "--mesh", default="", metavar="AXIS=DEVICES,...", help=f"{', '.join(GENERATION_AXES)}; one may be -1"
    )


def mesh_option(text: str, hosts: Hosts, problems: list[str]) -> MeshConfig | None:
    """The mesh that `--mesh=data=2,tensor=4` describes, None for an empty text; adds what is wrong to `problems`."""
    if not text:
        if hosts.count > 1:
            problems.append(f"--mesh: it must say how {hosts.count} hosts share the model, as --mesh=fsdp=-1 does")
        return None
    axes = dict(part.partition("=")[::2] for part in text.split(","))
    if not set(axes) <= set(GENERATION_AXES) or not all(size.removeprefix("-").isdigit() for size in axes.values()):
        problems.append(f"--mesh={text}: not of the form data=2,tensor=4; axes: {', '.join(GENERATION_AXES)}")
        return None
    mesh = MeshConfig.of(**{axis: int(size) for axis, size in axes.items()})
    problems += [f"--mesh: {problem}" for problem in mesh.problems()]
    return mesh


def _unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    flags = [option for action in parser._actions for option in action.option_strings]
    return [
        f"{argument}: unknown argument; {nearest_name(argument.partition('=')[0], flags)}" for argument in arguments
    ]


def _give_threads_to_virtual_devices() -> None:
    """XLA runs independent collectives of a program in any order, and on a CPU each blocks a thread until the other
    devices have come: with a thread per device, all can wait for one another for ever."""
    virtual = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if virtual:
        os.environ.setdefault("NPROC", str(THREADS_PER_VIRTUAL_DEVICE * int(virtual[1])))


def _close_output() -> None:
    """Python would try to write what is left once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(problems: Sequence[str], code: int = MISTAKE) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return code
