"""This host among those of its run: comparing, telling what it does, ending together."""

import socket
import time
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import NoReturn, Self

import jax

from lightning_jax.errors import UserError
from lightning_jax.hosts.ending import MISTAKE, RESTART, STOPPED, end_process
from lightning_jax.hosts.hub import FAREWELL_S, Hub
from lightning_jax.hosts.line import Line
from lightning_jax.hosts.progress import STARTING, Progress

_CULPRIT_S = 10.0  # an error may come from a host that is gone: so long for the news of it


class Hosts:
    """The hosts of a run, this one among them; without arguments, the only one.

    As a context: all hosts end together. An error that leaves it ends this process and all others, with code 2 and its
    lines if it is the user's to mend, else with RESTART. So does a host that is gone or was not heard of for a while.

    Attributes:
      index: of this host.
      names: of the machines of all hosts.
      word: a random one that all hosts have heard.
      progress, since: what this host does, and since when by time.monotonic().
    """

    def __init__(self, index: int = 0, line: Line | None = None, hub: Hub | None = None):
        self.index, self._line, self._hub = index, line, hub
        self.names, self.word = (line.names, line.word) if line else ((socket.gethostname(),), "")
        self.at(*STARTING)
        if line:
            line.listen(lambda: self.progress)

    @property
    def count(self) -> int:
        return len(self.names)

    def at(self, step: int, doing: str, waits: bool = False) -> None:
        """Notes what this host begins to do now.

        Args:
          waits: for its devices, and these perhaps for other hosts.
        """
        self.progress, self.since = Progress(step, doing, waits), time.monotonic()

    def agree(self, topic: str, facts: Mapping[str, str], *, timeout: float | None = None) -> None:
        """Returns when all hosts have told the same facts.

        Args:
          topic: what an error calls them.
          timeout: seconds between the first host and the last; None where a host may take however long.

        Raises:
          UserError: a line for each difference, naming the host.
        """
        if self._line and (problems := self._line.compare(topic, facts, timeout)):
            raise UserError("\n".join(problems))

    def hang(self, seconds: float) -> NoReturn:
        """Ends all hosts, each printing its stacks, because this one has done nothing for so long."""
        if self._line:
            self._line.tell({"progress": self.progress})
            self._line.tell({"hangs": seconds})
            time.sleep(FAREWELL_S)  # host 0 knows who is behind, and says so
        end_process(f"nothing was done for {seconds:.0f} s: {self.progress}", RESTART, stacks=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._line:
            return
        if error is None:
            self._line.done()
            jax.distributed.shutdown()
            return
        match error:
            case UserError():
                reason, code = str(error), MISTAKE
            case KeyboardInterrupt():
                reason, code = "stopped", STOPPED
            case _:
                time.sleep(_CULPRIT_S)
                traceback.print_exception(error)
                reason, code = traceback.format_exception_only(error)[-1].strip(), RESTART
        self._line.tell({"leaves": reason, "code": code}, last=True)
        if self._hub:
            self._hub.wait_for_others()
        end_process(reason, code)
