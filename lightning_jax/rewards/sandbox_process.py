"""What runs inside the sandbox: it sets limits that nobody can raise again, says so, and runs what it is given.

Nothing but the standard library is here, and nothing of the project can be imported. Of unit tests there are two
sides, in two sandboxes: one has the code under test, the other the tests, and only plain values cross. So no
code can read its tests, replace what compares, return an object that equals everything, or end with exit code 0.
"""

import builtins
import json
import os
import resource
import sys
from typing import Any

LONGEST_VALUE = 2**22  # characters of an encoded value
KINDS = {"tuple": tuple, "set": set, "frozenset": frozenset, "list": list}


class Failure(Exception):
    """The code under test gave no value that can be compared."""


def encode(value: Any) -> Any:
    """Plain data as JSON: containers as [kind, items], so that a tuple is no list at the other side."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is dict:
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    if kind.__name__ in KINDS and kind is KINDS[kind.__name__]:
        return [kind.__name__, [encode(item) for item in value]]
    raise Failure(f"a {kind.__name__} is not plain data")


def decode(value: Any) -> Any:
    match value:
        case ["complex", real, imaginary]:
            return complex(real, imaginary)
        case ["bytes", digits]:
            return bytes.fromhex(digits)
        case ["dict", items]:
            return {decode(key): decode(item) for key, item in items}
        case [kind, items]:
            return KINDS[kind](map(decode, items))
    return value


def take(fd: int) -> int:
    """What standard input or output was, at another number; in its place there is nothing."""
    taken, nothing = os.dup(fd), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, fd)
    os.close(nothing)
    return taken


def run_program(source: str) -> None:
    """A program with standard input and output."""
    exec(compile(source, "main.py", "exec"), {"__name__": "__main__"})


def serve_function(source: str, name: str) -> None:
    """Calls the function for each line of arguments; prints of it go nowhere."""
    requests, answers = os.fdopen(take(0), encoding="utf-8"), os.fdopen(take(1), "w", encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "solution"}
    problem = None
    try:
        exec(compile(source, "main.py", "exec"), namespace)
    except BaseException as error:
        problem = error
    for line in requests:
        try:
            if problem:
                raise problem
            answer = {"value": encode(namespace[name](*decode(json.loads(line))))}
        except BaseException as error:  # SystemExit and KeyboardInterrupt are answers too
            answer = {"error": type(error).__name__, "message": str(error)[:200]}
        print(json.dumps(answer), file=answers, flush=True)


def run_tests(source: str, test: str, name: str, calls_fd: int) -> dict[str, Any]:
    """Runs tests on a function that is elsewhere: `check(candidate)` as in HumanEval, or asserts that use its name."""
    requests, answers = os.fdopen(calls_fd, "w", encoding="utf-8"), os.fdopen(take(0), encoding="utf-8")

    def candidate(*arguments: Any) -> Any:
        try:
            print(json.dumps(encode(arguments)), file=requests, flush=True)
            line = answers.readline(LONGEST_VALUE)
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise Failure("ended, or returned too much" if line else "ended early")
        answer = json.loads(line)
        if "value" in answer:
            return decode(answer["value"])
        kind = getattr(builtins, answer["error"], None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(answer["message"])
        raise Failure(f"{answer['error']}: {answer['message']}")

    namespace: dict[str, Any] = {"__name__": "tests"}
    exec(compile(source, "prompt.py", "exec"), namespace)
    namespace |= {name: candidate, "candidate": candidate}
    try:
        exec(compile(test, "test.py", "exec"), namespace)
        if "check" in namespace:
            namespace["check"](candidate)
    except BaseException as error:
        trace, line = error.__traceback__, 0
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "test.py" else line
            trace = trace.tb_next
        return {"passed": False, "reason": f"test line {line}: {type(error).__name__}: {error}"[:300]}
    return {"passed": True, "reason": "all tests pass"}


def main(job_fd: int) -> None:
    with open(job_fd, encoding="utf-8") as file:
        job = json.load(file)
    for name, limits in job["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(limits))
    sys.set_int_max_str_digits(0)
    os.write(job["ready_fd"], b"!")
    os.close(job["ready_fd"])
    match job["role"]:
        case "program":
            run_program(job["source"])
        case "function":
            serve_function(job["source"], job["name"])
        case "tests":
            verdict_fd = take(1)
            verdict = run_tests(job["source"], job["test"], job["name"], job["calls_fd"])
            os.write(verdict_fd, json.dumps(verdict).encode())
            os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
