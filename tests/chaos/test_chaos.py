"""`make chaos` in short, and what it is made of: the plan, the proxy, the witness."""

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from tests.chaos import plan, proxy
from tests.chaos.plan import Subject
from tests.chaos.proxy import Proxy
from tests.chaos.run import Storm, Witness, main, tell
from tests.chaos.shells import available
from tests.players.player import OrderFailed
from tests.waiting import PATIENCE, wait_until
from twin_device.hub.faults import KINDS

EVERYBODY = [Subject("a"), Subject("b", strict=True), Subject("c", gentle=True)]


def test_a_short_run(capsys: pytest.CaptureFixture[str]) -> None:
    shells = available()
    arguments = ["--clients", "10", "--boards", "2", "--storms", "2", "--faults", "80", "--length", "4"]
    status = main(["--seed", "6", *arguments])
    out, _ = capsys.readouterr()
    assert status == 0, out
    assert f"seed 6, 10 clients ({', '.join(sorted(shells))})" in out
    assert out.splitlines()[-1].endswith("| **0** |")


# ---------------------------------------------------------------------- the plan


def test_a_seed_gives_the_same_plan_and_another_one_another() -> None:
    def plans(seed: int) -> Any:
        return [plan.storm(seed, number, EVERYBODY, 50, 5.0) for number in (1, 2)]

    assert plans(1) == plans(1) != plans(2)
    for storm in plans(1):
        assert sum(action.is_fault for action in storm) == 50
        assert [action.at for action in storm] == sorted(action.at for action in storm)


def test_everything_that_can_break_does() -> None:
    actions = [action for number in (1, 2) for action in plan.storm(1, number, EVERYBODY, 1000, 50.0)]
    met: dict[str, set[str]] = {}
    for action in actions:
        met.setdefault(action.what, set()).add(action.kind)
    assert met["link"] == proxy.KINDS.keys()
    assert met["hub"] == KINDS.keys()
    assert met["world"] == {"killed", "killed, no sessions", "away", "disabled"}
    assert met["desired"] == {"patch", "replace", "recreate"}
    # A link's half_open is a reset after a while, the hub's is no answer to CONNECT.
    rest = [action for action in actions if action.what != "link"]
    of = {name: {action.kind for action in rest if action.device == name} for name in "abc"}
    assert not of["b"] & plan._RESTORING
    assert not of["c"] & plan._SLOW


# ---------------------------------------------------------------------- the witness


def ended(error: Exception | None = None) -> "Future[Any]":
    done: Future[Any] = Future()
    if error is None:
        done.set_result(2)
    else:
        done.set_exception(error)
    return done


RIGHT = {"state": "synchronised", "desired": {"d": 1}, "reported": {"r": 1}, "statistics": {}}
HUB = {"desired": {"d": 1}, "reported": {"r": 1}}


def watched(strict: bool = False, report: "Future[Any] | None" = None) -> Witness:
    witness = Witness(Subject("a", strict=strict), "threads")
    told(witness, {"d": 1}, {"d": 1}, 1)
    witness.reports({"r": 1}, report or ended())
    return witness


def told(witness: Witness, patch: Any, desired: Any, version: int) -> None:
    event = {"event": "desired", "patch": patch, "desired": desired, "version": version, "connection": 1}
    witness.told(event)


def test_a_client_that_is_right_breaks_no_promise() -> None:
    witness = watched()
    assert witness.wrong(HUB, RIGHT) is None
    assert witness.broken == []


@pytest.mark.parametrize(
    ("hub", "client", "named"),
    [
        ({}, {"state": "retrieving"}, "synchronised"),
        ({}, {"desired": {}}, "desired"),
        ({"desired": {"d": 2}}, {"desired": {"d": 2}}, "handler"),
        ({"reported": {}}, {"reported": {}}, "reported: the hub's"),
        ({}, {"reported": {}}, "reported: the client's"),
    ],
)
def test_what_is_not_right_is_named(hub: Any, client: Any, named: str) -> None:
    wrong = watched().wrong({**HUB, **hub}, {**RIGHT, **client})
    assert wrong is not None
    assert wrong.startswith(named)


def test_a_report_without_an_end_is_named() -> None:
    wrong = watched(report=Future()).wrong(HUB, RIGHT)
    assert wrong is not None
    assert wrong.startswith("answers")


def test_a_refusal_is_a_promise_broken_unless_the_hub_was_meant_to() -> None:
    refusal = OrderFailed("ReportRejected: status 400")
    strict = watched(strict=True, report=ended(refusal))
    assert strict.wrong({**HUB, "reported": {}}, {**RIGHT, "reported": {}}) is None
    assert strict.broken == []
    other = watched(report=ended(refusal))
    other.count_answers()
    assert other.broken == ['answers: {"r": 1} ended in ReportRejected: status 400']


def test_what_a_program_says_of_a_task_that_has_ended_is_named() -> None:
    witness = watched()
    witness.told({"event": "said", "client": "a", "text": "Traceback"})
    assert witness.broken == ["program: it says 'Traceback'"]


def test_a_patch_that_does_not_lead_to_its_document_and_an_older_version_are_named() -> None:
    witness = watched()
    told(witness, {"e": 2}, {"e": 2}, 2)
    told(witness, {"e": 3}, {"e": 3}, 1)
    assert [one.partition(":")[0] for one in witness.broken] == ["handler", "versions"]


def test_a_broken_promise_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"kinds": {}, "statistics": {}, "shells": ["threads"]}
    storm = Storm(1, 2, 2, 3, 4, 0.5, 1)
    assert tell(1, 1, [storm], summary) == 0
    storm.broken.append("a: desired")
    assert tell(1, 1, [storm], summary) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "| **all** | 2 | 2 | 3 | 4 | 0.5 s | **1** |"


# ---------------------------------------------------------------------- the proxy


class Links:
    """A proxy with one link to a server that says everything back."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.proxy = Proxy(self._server.getsockname()[1])
        self.port = self.proxy.listen("a")
        self._sockets: list[socket.socket] = []

    def _serve(self) -> None:
        while True:
            try:
                one, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(one,)).start()

    def _echo(self, one: socket.socket) -> None:
        with one:
            try:
                while data := one.recv(4096):
                    one.sendall(data)
            except OSError:
                pass

    def dial(self) -> socket.socket:
        one = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        self._sockets.append(one)
        return one

    def close(self) -> None:
        for one in self._sockets:
            one.close()
        self.proxy.close()
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()


@pytest.fixture
def links() -> Iterator[Links]:
    links = Links()
    yield links
    links.close()


def said_back(one: socket.socket, data: bytes = b"hello") -> bytes:
    one.sendall(data)
    got = b""
    while len(got) < len(data):
        more = one.recv(100)
        if not more:
            break
        got += more
    return got


def reset(one: socket.socket) -> bytes:
    """What comes before the reset."""
    got = b""
    while True:
        try:
            more = one.recv(100)
        except ConnectionResetError:
            return got
        assert more, "an orderly end"
        got += more


def fin(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "fin", 0, 0)
    assert one.recv(1) == b""


def rst(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "rst", 0, 0)
    assert reset(one) == b""


def cut_up(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "cut_up", 0, 2)
    one.sendall(b"hello")
    assert b"he".startswith(reset(one))


def cut_down(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "cut_down", 0, 2)
    one.sendall(b"hello")
    assert b"he".startswith(reset(one))


def half_open(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "half_open", 0.3, 0)
    began = time.monotonic()
    one.sendall(b"hello")
    assert said_back(links.dial()) == b"hello"
    assert reset(one) == b""
    assert time.monotonic() - began > 0.2


def delay(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "delay", 5, 0)
    began = time.monotonic()
    assert said_back(one) == b"hello"
    assert time.monotonic() - began > 0.5


def trickle(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "trickle", 5, 0)
    one.sendall(b"hello")
    assert [one.recv(100) for _ in range(5)] == [b"h", b"e", b"l", b"l", b"o"]


def refuse(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "refuse", 60, 0)
    assert reset(one) == b""
    with pytest.raises(ConnectionRefusedError):
        links.dial()


def hang_connect(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "hang_connect", 60, 0)
    assert reset(one) == b""
    with socket.socket() as other:
        other.settimeout(0.3)
        assert other.connect_ex(("127.0.0.1", links.port)) == errno.EAGAIN


def hang_handshake(links: Links, one: socket.socket) -> None:
    links.proxy.act("a", "hang_handshake", 0.3, 0)
    other = links.dial()
    other.sendall(b"hello")
    assert said_back(one) == b"hello"
    assert reset(other) == b""


BREAKS: dict[str, Callable[[Links, socket.socket], None]] = {
    check.__name__: check
    for check in (fin, rst, cut_up, cut_down, half_open, delay, trickle, refuse, hang_connect, hang_handshake)
}


@pytest.mark.parametrize("kind", proxy.KINDS)
def test_a_link_breaks_and_heals(links: Links, kind: str) -> None:
    one = links.dial()
    assert said_back(one) == b"hello"
    BREAKS[kind](links, one)
    assert links.proxy.hits == {kind: 1}
    links.proxy.heal()
    assert said_back(wait_until(links.dial, "the link is whole"), b"again") == b"again"
