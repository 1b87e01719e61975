"""A process that answers lines of JSON with lines of JSON, and is killed when it takes too long.

For work that may loop, exhaust memory or crash: what goes wrong there is an exception here.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self


class ProcessTimeout(Exception):
    """No answer in time; the process is dead."""


class ProcessEnded(Exception):
    """The process died before it answered; the message is its last line of errors, or its exit code.

    Attributes:
        exit_code: minus the signal's number where a signal ended it.
    """

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.exit_code = exit_code


class JSONProcess:
    """A Python script in a process of its own, which ends with `close` or the `with` block.

    Args:
        script: reads requests from standard input and prints an answer to each.
        arguments: of the script.
    """

    def __init__(self, script: Path, *arguments: str):
        self._process = subprocess.Popen(
            # -P: the script's folder must not stand in for the standard library's modules.
            [sys.executable, "-P", str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to a request.

        Raises:
            ProcessTimeout: not within so many seconds.
            ProcessEnded: the process came to an end instead.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if late.is_set():
            raise ProcessTimeout
        if not line.endswith(b"\n"):
            errors = process.stderr.read().decode(errors="replace").strip().splitlines()
            exit_code = process.wait()
            raise ProcessEnded(errors[-1] if errors else f"exit code {exit_code}", exit_code)
        return json.loads(line)
