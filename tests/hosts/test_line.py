"""Hosts that are threads of this process: who is missing, differs, is gone, frozen or hangs is named to all others."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_jax.errors import UserError
from lightning_jax.hosts import MISTAKE, RESTART, Hosts, HostsError, check_shared
from lightning_jax.hosts.hub import Hub
from lightning_jax.hosts.line import Line
from lightning_jax.hosts.place import Place
from lightning_jax.launch import reserved_port

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

NAMES = "abcd"


@pytest.fixture
def ended(monkeypatch) -> list[tuple[str, int, bool]]:
    """What each process would have ended with; here only the thread ends."""
    ends = []

    def end(reason, code, *, stacks=False):
        ends.append((reason, code, stacks))
        raise SystemExit

    for module in ("line", "hosts"):
        monkeypatch.setattr(f"lightning_jax.hosts.{module}.end_process", end)
    monkeypatch.setattr("lightning_jax.hosts.line.BEAT_S", 0.02)
    monkeypatch.setattr("lightning_jax.hosts.hub.BEAT_S", 0.02)
    monkeypatch.setattr("lightning_jax.hosts.hub.FAREWELL_S", 0.1)
    monkeypatch.setattr("lightning_jax.hosts.hub._HEARING_S", 0.1)
    return ends


@pytest.fixture
def port():
    with reserved_port() as port:
        yield port


def lines(port: int, count: int, indices, timeout=20.0) -> list:
    """The connections of hosts that come at the same time, or why they have none."""

    def come(index):
        try:
            return Line(Place(f"localhost:{port}", count, index, None), NAMES[index], timeout)
        except (UserError, HostsError) as error:
            return error

    with ThreadPoolExecutor(len(indices)) as pool:
        return list(pool.map(come, indices))


@pytest.fixture
def hosts(port, ended):
    """Three that have come."""
    hub = Hub(port, 3, 20.0)
    hosts = [Hosts(index, line, hub if index == 0 else None) for index, line in enumerate(lines(port, 3, range(3)))]
    yield hosts
    for host in hosts:  # or their threads would end the process of the tests
        cut_off(host, told=True)


def cut_off(host: Hosts, told: bool = False) -> None:
    host._line._leaving |= told
    with contextlib.suppress(OSError):
        host._line._socket.shutdown(socket.SHUT_RDWR)


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def agree(hosts, facts, timeout=None) -> list[str]:
    """What each host is told; facts by host."""

    def tell(index):
        try:
            hosts[index].agree("what to run", facts[index], timeout=timeout)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(tell, range(len(hosts))))


def test_hosts_that_came_know_one_another(hosts, ended):
    assert [each.names for each in hosts] == [("a", "b", "c")] * 3
    assert len({each.word for each in hosts}) == 1
    assert hosts[0].word
    assert not ended


def test_the_hosts_that_did_not_come_are_named(port, ended):
    hub = Hub(port, 4, 0.5)
    for error in lines(port, 4, [0, 2]):
        assert isinstance(error, HostsError)
        assert str(error) == "hosts 1, 3 of 4 did not come within 0 s; here: host 0 (a), host 2 (c)"
    hub.wait_for_others()


def test_a_host_0_that_does_not_come_is_named(port):
    (error,) = lines(port, 2, [1], timeout=0.2)
    assert isinstance(error, HostsError)
    assert str(error) == f"host 0 did not answer at localhost:{port} within 0 s: Connection refused"


def test_a_host_that_is_started_twice_or_counts_otherwise_is_named(port, ended):
    hub = Hub(port, 3, 20.0)
    for error in lines(port, 3, [0, 0]):
        assert isinstance(error, UserError)
        assert str(error) == "a and a both say that they are host 0"
    hub.wait_for_others()
    with reserved_port() as other:
        hub = Hub(other, 3, 20.0)
        (error,) = lines(other, 2, [1])
        assert str(error) == "b says that there are 2 hosts, host 0 that there are 3"


def test_whoever_else_calls_is_not_heard(port, ended):
    hub = Hub(port, 2, 20.0)
    for word in (b"GET / HTTP/1.1\r\n", b'{"host": "x"}\n', b'{"host": 9, "of": 2, "name": "x"}\n', b"[]\n", b""):
        with socket.create_connection(("localhost", port)) as other:
            other.sendall(word)
    first, second = lines(port, 2, range(2))
    assert first.names == second.names == ("a", "b")
    del hub


def test_a_port_in_use_is_a_line(port):
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match=f"port {port} of this machine: Address"),
    ):
        Hub(port, 2, 1.0)


def test_equal_facts_agree_and_the_host_that_differs_is_named_to_all(hosts, ended):
    same = {"config.seed": "0", "version of jax": "0.10.2"}
    assert agree(hosts, [same] * 3) == [""] * 3
    line = "host 1 (b) differs: config.seed is 7, and 0 elsewhere"
    assert agree(hosts, [same, same | {"config.seed": "7"}, same]) == [line] * 3
    line = "host 2 (c) differs: version of jax is missing, and 0.10.2 elsewhere"
    assert agree(hosts, [same, same, {"config.seed": "0"}]) == [line] * 3
    assert not ended


def test_a_host_that_does_not_come_to_the_comparison_is_named(hosts, ended):
    for host in hosts[:2]:
        host._line.tell({"topic": "what to run", "facts": {}, "timeout": 0.1})
    wait_for(lambda: len(ended) == 3)
    assert set(ended) == {("host 2 (c) did not tell what to run within 0 s", RESTART, False)}


def test_a_host_that_is_gone_is_named_to_all_others(hosts, ended):
    cut_off(hosts[1])
    wait_for(lambda: len(ended) == 3)
    reason = "host 1 (b) is gone: it was killed, or its machine failed"
    assert (
        sorted(ended)
        == [("host 0 (a) is gone: it was killed, or its machine failed", RESTART, False)]
        + [(reason, RESTART, False)] * 2
    )  # the one that was cut off misses host 0


def test_a_frozen_host_is_named(hosts, ended, monkeypatch):
    monkeypatch.setattr("lightning_jax.hosts.hub.SILENCE_S", 3.0)
    hosts[2]._line._lock.acquire()  # it beats no more
    wait_for(lambda: len(ended) == 3)
    assert set(ended) == {("host 2 (c) was not heard of for 3 s: frozen, or cut off", RESTART, False)}


def test_a_host_0_that_freezes_is_named(request, ended, monkeypatch):
    monkeypatch.setattr("lightning_jax.hosts.line.SILENCE_S", 3.0)
    hosts = request.getfixturevalue("hosts")  # which listen so long from their beginning
    hosts[0]._hub._loop.call_soon_threadsafe(time.sleep, 8)
    wait_for(lambda: len(ended) == 3)
    assert set(ended) == {("host 0 (a) was not heard of for 3 s: frozen, or cut off", RESTART, False)}


@pytest.mark.parametrize(
    ("error", "told", "code"),
    [
        (UserError("no such file: x"), "no such file: x", MISTAKE),
        (OSError("disk"), "OSError: disk", RESTART),
        (KeyboardInterrupt(), "stopped", 130),
    ],
)
def test_an_error_on_one_host_ends_all_with_its_reason_and_code(hosts, ended, monkeypatch, error, told, code):
    monkeypatch.setattr("lightning_jax.hosts.hosts._CULPRIT_S", 0.0)
    with pytest.raises(SystemExit), hosts[1]:
        raise error
    wait_for(lambda: len(ended) == 3)
    assert sorted(ended) == sorted([(told, code, False)] + [(f"host 1 (b) stopped: {told}", code, False)] * 2)


def test_hosts_that_are_done_may_leave_one_after_the_other(hosts, ended, monkeypatch):
    left = threading.Barrier(3)
    monkeypatch.setattr("jax.distributed.shutdown", left.wait)

    def leave(host):
        with host:
            pass
        cut_off(host, told=True)  # the process would have ended

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(leave, hosts))
    time.sleep(0.1)
    assert not ended


def test_host_0_may_be_gone_while_others_are_still_ending(hosts, ended, monkeypatch):
    monkeypatch.setattr("jax.distributed.shutdown", lambda: None)
    others_leave = threading.Event()

    def leave(host):
        with host:
            pass
        if host.index == 0:  # the process ends, and so does the hub in it
            hub = host._hub
            for connected in list(hub._hosts.values()):
                hub._loop.call_soon_threadsafe(connected.writer.close)
            wait_for(lambda: not hub._hosts)
            others_leave.set()
        assert others_leave.wait(20)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(leave, hosts))
    time.sleep(0.2)
    assert not ended


def test_a_host_that_is_gone_before_it_is_done_is_named_to_those_that_are(hosts, ended, monkeypatch):
    shut_down = []
    monkeypatch.setattr("jax.distributed.shutdown", lambda: shut_down.append(True))

    def leave(host):
        with host:
            pass

    with ThreadPoolExecutor(2) as pool:
        for host in hosts[:2]:
            pool.submit(leave, host)
        cut_off(hosts[2])
        wait_for(lambda: len(ended) == 3)
        assert not shut_down
        for host in hosts[:2]:  # of which only a thread has ended here
            host._line._over.set()
    assert ended.count(("host 2 (c) is gone: it was killed, or its machine failed", RESTART, False)) == 2


def test_hosts_that_share_a_folder_see_it_and_the_one_that_does_not_is_named(hosts, ended, monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_jax.hosts.shared_folder._WAIT_S", 0.3)

    def check(host):
        other = tmp_path / "elsewhere" if host.index == 2 else tmp_path / "here"
        try:
            monkeypatch.setattr(Hosts, "agree", same_name)
            check_shared(other, host)
        except UserError as error:
            return str(error)

    tell = Hosts.agree

    def same_name(self, topic, facts, **options):
        tell(self, topic, dict(zip(["the folder runs/x"], facts.values(), strict=True)), **options)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(check, hosts))
    line = "host 2 (c) differs: the folder runs/x is another, or one that host 0 does not share, and the same elsewhere"
    assert found == [line] * 3
    assert list((tmp_path / "here").iterdir()) == []
