"""A host's connection to host 0, over which all hosts hear of one another."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from lightning_jax.errors import UserError
from lightning_jax.hosts.ending import MISTAKE, RESTART, HostsError, end_process
from lightning_jax.hosts.hub import BEAT_S, SILENCE_S
from lightning_jax.hosts.place import Place
from lightning_jax.hosts.progress import Progress


class Line:
    """Connects to host 0, which may start later, and waits until it says that all hosts have come.

    Attributes:
      names: of the machines of all hosts.
      word: a random one that all hosts have heard.

    Raises:
      HostsError: host 0 or another one did not come within `timeout` seconds.
      UserError: hosts contradict each other on who they are.
    """

    def __init__(self, place: Place, name: str, timeout: float):
        server, _, port = place.address.rpartition(":")
        end = time.monotonic() + timeout
        while True:
            try:
                self._socket = socket.create_connection((server.strip("[]"), int(port)), timeout=10)
                self._lines = self._socket.makefile("r", encoding="utf-8")
                self._socket.settimeout(timeout + SILENCE_S)  # host 0 may have begun to wait later
                self._send({"host": place.index, "of": place.count, "name": name})
                answer = json.loads(self._lines.readline())
                break
            except (OSError, ValueError) as error:  # not there yet, or still the host 0 of a run that ends
                if time.monotonic() > end:
                    reason = error.strerror if isinstance(error, OSError) and error.strerror else "no answer of ours"
                    raise HostsError(
                        f"host 0 did not answer at {place.address} within {timeout:.0f} s: {reason}"
                    ) from None
                time.sleep(0.5)
        if "end" in answer:
            raise (UserError if answer["code"] == MISTAKE else HostsError)(answer["end"])
        self.names, self.word = tuple(answer["here"]), answer["word"]
        self._verdicts: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self._lock = threading.Lock()
        self._leaving = False
        self._over = threading.Event()

    def listen(self, progress: Callable[[], Progress]) -> None:
        """From now on this process ends when host 0 says so, or is gone; and host 0 hears of this host's progress."""
        self._socket.settimeout(SILENCE_S)
        threading.Thread(target=self._listen, name="hosts: listening", daemon=True).start()
        threading.Thread(target=self._beat, args=(progress,), name="hosts: beating", daemon=True).start()

    def tell(self, message: Mapping[str, Any], *, last: bool = False) -> None:
        """Tells host 0 something; with `last`, whatever it says from now on does not matter here."""
        self._leaving |= last
        # Where host 0 is gone, the listening thread ends the process.
        with self._lock, contextlib.suppress(OSError):
            self._send(message)

    def done(self) -> None:
        """Returns when all hosts are done; none of them is missed from now on."""
        self.tell({"done": True})
        self._over.wait()

    def compare(self, topic: str, facts: Mapping[str, str], timeout: float | None) -> list[str]:
        """The differences that host 0 finds when all hosts have told their facts, a line for each."""
        self.tell({"topic": topic, "facts": facts, "timeout": timeout})
        verdict = self._verdicts.get()
        assert verdict["topic"] == topic, verdict
        return verdict["problems"]

    def _send(self, message: Mapping[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _beat(self, progress: Callable[[], Progress]) -> None:
        while not self._leaving:
            self.tell({"progress": progress()})
            time.sleep(BEAT_S)

    def _listen(self) -> None:
        reason = "is gone: it was killed, or its machine failed"
        try:
            for line in self._lines:
                message = json.loads(line)
                if "end" in message and not self._leaving:
                    end_process(message["end"], message["code"], stacks=message["stacks"])
                if "topic" in message:
                    self._verdicts.put(message)
                if "over" in message:
                    self._leaving = True
                    self._over.set()
        except TimeoutError:
            reason = f"was not heard of for {SILENCE_S:.0f} s: frozen, or cut off"
        except (OSError, ValueError):
            pass
        if not self._leaving:
            end_process(f"host 0 ({self.names[0]}) {reason}", RESTART)
