"""Host 0's part of the line between hosts: it hears every host, and tells all of them what concerns all.

A message is a line of JSON. From a host: {"host", "of", "name"} as it comes, then {"topic", "facts", "timeout"},
{"progress"}, {"hangs"}, {"leaves", "code"}, and {"done"} before it ends in order. To all: {"here"}, {"topic",
"problems"}, {"beat"}, and once either {"end", "code", "stacks"}, on which each of them ends, or {"over"} when all are
done, behind which nobody misses anybody.

Who can reach the port can end the run, as with JAX's own; a run belongs into a network of its own.
"""

import asyncio
import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_jax.errors import UserError
from lightning_jax.hosts.agreement import disagreements
from lightning_jax.hosts.ending import MISTAKE, RESTART
from lightning_jax.hosts.progress import Progress, who_hangs

BEAT_S = 5.0
SILENCE_S = 45.0  # a host that is not heard of for so long is frozen, or cut off

FAREWELL_S = 5.0  # for hosts to hear why it ends
_HEARING_S = 1.0

MAX_LINE = 2**26  # bytes of a message; a config and the hashes of all files take 50 KB


@dataclass
class _Host:
    name: str
    writer: asyncio.StreamWriter
    heard: float
    progress: Progress | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # by topic


class Hub:
    """Listens on a port until all hosts have come, from then on to them alone; all in a thread of its own.

    Args:
      join_timeout: seconds; by then all have come, or those that have are told who has not.

    Raises:
      UserError: the port is not free.
    """

    def __init__(self, port: int, count: int, join_timeout: float):
        self._count = count
        self._hosts: dict[int, _Host] = {}
        self._names: dict[int, str] = {}  # also of those that are gone
        self._done: set[int] = set()  # those as well
        self._timers: dict[str, asyncio.TimerHandle] = {}  # by topic that not all hosts have told yet
        self._ended = False
        dual = socket.has_dualstack_ipv6()
        try:
            listener = socket.create_server(
                ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=count
            )
        except OSError as error:
            raise UserError(f"--coordinator_address: port {port} of this machine: {error.strerror}") from None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="hub", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._meet(listener, join_timeout), self._loop)

    def wait_for_others(self) -> None:
        """Returns when all other hosts have heard the end and are gone, or after a few seconds."""
        end = time.monotonic() + FAREWELL_S
        while len(self._hosts) > 1 and time.monotonic() < end:
            time.sleep(0.05)

    async def _meet(self, listener: socket.socket, timeout: float) -> None:
        self._all_here = asyncio.Event()
        server = await asyncio.start_server(self._attend, sock=listener, limit=MAX_LINE)
        try:
            await asyncio.wait_for(self._all_here.wait(), timeout)
        except TimeoutError:
            missing = [index for index in range(self._count) if index not in self._hosts]
            self._end(
                f"{listed(missing)} of {self._count} did not come within {timeout:.0f} s; "
                f"here: {', '.join(map(self._called, sorted(self._hosts)))}",
                RESTART,
            )
            return
        finally:
            server.close()  # JAX's coordination service takes the port now
        self._tell({"here": [self._names[index] for index in range(self._count)], "word": secrets.token_hex(8)})
        while not self._ended:
            await asyncio.sleep(BEAT_S)
            self._tell({"beat": True})
            for index, host in self._hosts.items():
                if index not in self._done and time.monotonic() - host.heard > SILENCE_S:
                    self._end(
                        f"{self._called(index)} was not heard of for {SILENCE_S:.0f} s: frozen, or cut off", RESTART
                    )

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hears one host from its first word to its last."""
        try:
            hello = json.loads(await reader.readline())
            index, count, name = hello["host"], hello["of"], hello["name"]
            known = index in range(self._count) or count != self._count
        except (ValueError, KeyError, TypeError, ConnectionError):
            known = False
        if not known:  # no host of ours
            writer.close()
            return
        if index in self._hosts or count != self._count:
            problem = f"{name} and {self._names.get(index)} both say that they are host {index}"
            if count != self._count:
                problem = f"{name} says that there are {count} hosts, host 0 that there are {self._count}"
            writer.write(_line({"end": problem, "code": MISTAKE, "stacks": False}))
            self._end(problem, MISTAKE)
            return
        host = self._hosts[index] = _Host(name, writer, time.monotonic())
        self._names[index] = name
        if len(self._hosts) == self._count:
            self._all_here.set()
        with contextlib.suppress(ConnectionError, ValueError):
            while line := await reader.readline():
                host.heard = time.monotonic()
                self._hear(index, host, json.loads(line))
        del self._hosts[index]
        if index not in self._done and self._all_here.is_set():  # before, it may come again
            self._end(f"{self._called(index)} is gone: it was killed, or its machine failed", RESTART)

    def _hear(self, index: int, host: _Host, message: Mapping[str, Any]) -> None:
        if "progress" in message:
            host.progress = Progress(*message["progress"])
        if "topic" in message:
            host.facts[message["topic"]] = message["facts"]
            self._compare(message["topic"], message["timeout"])
        if "hangs" in message:
            progress = {self._called(index): host.progress for index, host in sorted(self._hosts.items())}
            self._end(who_hangs(progress, message["hangs"]), RESTART, stacks=True)
        if "leaves" in message:
            self._done.add(index)
            self._end(f"{self._called(index)} stopped: {message['leaves']}", message["code"])
        if "done" in message:
            self._done.add(index)
            if len(self._done) == self._count:
                self._tell({"over": True})

    def _compare(self, topic: str, timeout: float | None) -> None:
        """Tells the hosts where they differ, as soon as all have told; the first to tell sets the clock."""
        told = {index: host.facts[topic] for index, host in sorted(self._hosts.items()) if topic in host.facts}
        if len(told) == self._count:
            if timer := self._timers.pop(topic, None):
                timer.cancel()
            for host in self._hosts.values():
                del host.facts[topic]
            self._tell({"topic": topic, "problems": disagreements(told, self._names)})
        elif len(told) == 1 and timeout is not None:
            self._timers[topic] = self._loop.call_later(timeout, self._name_missing, topic, timeout)

    def _name_missing(self, topic: str, timeout: float) -> None:
        missing = [index for index, host in sorted(self._hosts.items()) if topic not in host.facts]
        self._end(f"{', '.join(map(self._called, missing))} did not tell {topic} within {timeout:.0f} s", RESTART)

    def _end(self, line: str, code: int, *, stacks: bool = False) -> None:
        """The first reason is what all hosts are told; what follows is a consequence of it."""
        if not self._ended:
            self._ended = True
            end = _line({"end": line, "code": code, "stacks": stacks})
            for index, host in self._hosts.items():
                # With host 0 this hub ends, so it is told when the others have heard.
                self._loop.call_later(0 if index else _HEARING_S, host.writer.write, end)

    def _tell(self, message: Mapping[str, Any]) -> None:
        for host in self._hosts.values():
            host.writer.write(_line(message))

    def _called(self, index: int) -> str:
        return f"host {index} ({self._names[index]})"


def listed(indices: list[int]) -> str:
    """ "host 3" or "hosts 1, 3"."""
    return f"host{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
