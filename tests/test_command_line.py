"""What every command makes of its arguments, of Ctrl-C, and of an output that nobody reads."""

import subprocess
import sys

import pytest

from lightning_jax.command_line import Parser, finish
from lightning_jax.errors import UserError


def parser():
    parser = Parser(prog="test")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--temperature", type=float)
    return parser


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["--tempratur=1", "-x"], ["--tempratur=1: unknown argument; did you mean '--temperature'?", "-x: unknown"]),
        (["--token=1"], ["--token=1: unknown argument; did you mean '--tokens'?"]),  # no abbreviations
        (["--tokens=many"], ["argument --tokens: invalid int value: 'many'"]),
    ],
)
def test_each_mistake_in_the_arguments_is_a_line(capsys, arguments, lines):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    for line, expected in zip(output.err.splitlines(), lines, strict=True):
        assert line.startswith(f"error: {expected}")


def raising(error):
    def command():
        raise error

    return command


def test_a_command_ends_without_a_traceback(capsys):
    assert finish(lambda: 7, stopped="stopped") == 7
    assert finish(raising(UserError("one\ntwo")), stopped="stopped") == 2
    assert finish(raising(KeyboardInterrupt()), stopped="stopped; it goes on") == 130
    assert capsys.readouterr().err == "error: one\nerror: two\nstopped; it goes on\n"


SHOW = """
import sys
from lightning_jax.command_line import finish, show
sys.exit(finish(lambda: [show("text" * 30_000) for _ in range(9)] and 0, stopped=""))
"""


@pytest.mark.parametrize(
    ("shell", "errors"),
    [("{} | true; exit ${{PIPESTATUS[0]}}", (141, "")), ("{} > /dev/full", (2, "error: standard output: No space"))],
)
def test_an_output_that_takes_no_more_ends_the_command_quietly(shell, errors):
    command = shell.format(f"{sys.executable} -c '{SHOW}'")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    code, message = errors
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == bool(message)
