"""What a hub that means harm can do to a client: nothing that lasts. Both shells, real sockets."""

import itertools
import json
import logging
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from pytest_mock import MockerFixture

from tests.aio_app import BlockingClient, LoopThread
from tests.app import App
from tests.hostile import DOCUMENT, HostileHub, notification, publish, resident
from tests.merge_patch import merged
from tests.waiting import PATIENCE, wait_until
from twin_device import RemoteError, TwinClient, TwinError, aio
from twin_device import client as client_module
from twin_device.core import twin
from twin_device.shell import _MAX_BYTES, _MAX_CHANGES, _MAX_OTHERS, Pending

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    # pytest keeps every record, and memory is measured here.
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(params=["threads", "asyncio"])
def make(request: pytest.FixtureRequest, mocker: MockerFixture) -> Iterator[Callable[..., App]]:
    """make(hub, **options): an App of a client of that hub, in each shell; not connected yet."""
    # Chance spreads retries in time; here it keeps them short.
    for shell in (aio, client_module):
        chance = SimpleNamespace(random=lambda: 0.02, randrange=random.randrange)
        mocker.patch.object(shell, "random", chance)
    loop = LoopThread() if request.param == "asyncio" else None
    clients: list[Any] = []

    def made(hub: HostileHub, **options: Any) -> App:
        options = {"key": b"key", "tls": False, "timeout": 3, **options}
        kind: Any = TwinClient if loop is None else aio.TwinClient
        client = kind(f"127.0.0.1:{hub.port}", "dev-1", **options)
        clients.append(client if loop is None else BlockingClient(loop, client))
        return App(clients[-1])

    yield made
    for client in clients:
        client.close()
    if loop is not None:
        assert loop.close() == set()


def patches(payload: bytes) -> Iterator[bytes]:
    """Notifications of the next versions, without end."""
    for version in itertools.count(2):
        yield notification(version, payload)


def growing() -> Iterator[bytes]:
    """Patches that are small enough, of a document that is not."""
    for version in itertools.count(2):
        yield notification(version, json.dumps({f"k{version}": "x" * 60_000}).encode())


# what the hub sends once the client is synchronised, and the words of the error
ATTACKS: list[tuple[str, Callable[[], Iterable[bytes]], str]] = [
    ("256 MB announced", lambda: [b"\x30\xff\xff\xff\x7f", *[bytes(65536)] * 4000], "of 268435455 bytes"),
    ("256 MB that are no message", lambda: [b"\x90\xff\xff\xff\x7f"], "type 9 with 268435455 bytes"),
    ("2 MB announced", lambda: [publish("t", bytes(2 * MEGABYTE))], "a packet of 2097155 bytes"),
    ("a length of five bytes", lambda: [b"\x30\xff\xff\xff\xff\1"], "the hub sent"),
    ("no MQTT", lambda: [b"HTTP/1.1 400 Bad Request\r\n\r\n"], "the hub sent"),
    ("a topic without end", lambda: [b"\x30\4\xff\xffab"], "the hub sent"),
    ("a client's packet", lambda: [b"\xc0\0"], "a packet of type 12"),
    ("QoS 2", lambda: [publish("t", b"x", 2)], "a message with QoS 2"),
    ("a long SUBACK", lambda: [b"\x90\xe8\7" + bytes(1000)], "a packet of type 9 with 1000 bytes"),
    ("endless tiny packets", lambda: itertools.repeat(b"\xd0\0" * 1000), "10000 packets in"),
    ("endless foreign messages", lambda: itertools.repeat(publish("t", b"") * 1000), "10000 packets in"),
    ("endless stale ones", lambda: itertools.repeat(notification(1, b"{}") * 1000), "10000 packets in"),
    ("endless nonsense", lambda: itertools.repeat(notification(2, b"{") * 1000), "10000 packets in"),
    ("a document that grows", growing, "desired properties of "),
]  # fmt: skip  # a table reads better whole


@pytest.mark.parametrize(("attack", "words"), [row[1:] for row in ATTACKS], ids=[row[0] for row in ATTACKS])
def test_a_hub_that_breaks_the_protocol_is_left_named_and_dialled_again(
    make: Callable[..., App], attack: Callable[[], Iterable[bytes]], words: str
) -> None:
    with HostileHub(attack) as hub:
        app = make(hub)
        before = resident()
        # It may be over before connect() could see that it was synchronised.
        app.client.connect(wait=False)
        error = app.next_error()
        while "the connection was lost" not in str(error):
            error = app.next_error()
        assert isinstance(error, RemoteError)
        assert words in str(error)
        assert len(str(error)) < 200
        assert resident() - before < 60 * MEGABYTE
        # It is no hub for this connection only: the next one may be sound.
        hub.attack = lambda: ()
        wait_until(lambda: app.client.state == "synchronised" and hub.connections > 1, "a new connection")
        assert app.client.report({"a": 1}, timeout=PATIENCE) is not None


DEEP = b'{"a":' * 50_000
# a retrieved document that is none, or a notification
DOCUMENTS: list[tuple[str, bytes]] = [
    ("nested without end", DEEP),
    ("nested arrays", b'{"desired":' + b"[" * 200_000),
    ("nested and whole", b'{"a":' * 40_000 + b"1" + b"}" * 40_000),
    ("a number of 200,000 digits", b'{"desired":{"a":' + b"1" * 200_000 + b"}}"),
    ("a string of 200,000 bytes", b'{"desired":"' + b"x" * 200_000 + b'"}'),
    ("80,000 lists", b'{"desired":[' + b"[]," * 80_000 + b"[]]}"),
    ("surrogates", b'{"desired":{"a":"' + b"\\ud800" * 40_000 + b'"}}'),
    ("no UTF-8", b'{"\xff":1}'),
    ("NaN", b'{"desired":{"a":NaN,"$version":1},"reported":{}}'),
]


@pytest.mark.parametrize("payload", [row[1] for row in DOCUMENTS], ids=[row[0] for row in DOCUMENTS])
def test_a_payload_that_no_hub_sends_is_named_and_asked_for_again(
    make: Callable[..., App], payload: bytes
) -> None:
    with HostileHub(lambda: [notification(2, payload)] if payload[:4] == DEEP[:4] else ()) as hub:
        if payload[:4] != DEEP[:4]:
            hub.document = payload
        app = make(hub)
        before = resident()
        app.client.connect(wait=False)
        error = app.next_error()
        assert isinstance(error, RemoteError)
        assert "is no JSON object" in str(error)
        hub.document = json.dumps({**DOCUMENT, "desired": {"sound": 1, "$version": 2}}).encode()
        wait_until(lambda: app.client.desired == {"sound": 1}, "the sound document")
        assert resident() - before < 100 * MEGABYTE


def test_a_flood_of_notifications_stays_in_bounds_and_holds_nothing_up(make: Callable[..., App]) -> None:
    """As many as the sockets carry, while a handler hangs: no memory, no hang, and nothing is lost."""
    total = 20_000
    flood = [
        b"".join(
            notification(version, json.dumps({f"k{version % 50}": {"n": version}}).encode())
            for version in range(start, start + 1000)
        )
        for start in range(2, 2 + total, 1000)
    ]
    last = {"interval": 30, **{f"k{n % 50}": {"n": n} for n in range(total - 48, total + 2)}}
    with HostileHub(lambda: flood) as hub:
        app = make(hub, timeout=30)
        release = threading.Event()
        seen: dict[str, Any] = {}
        calls = 0

        def slow(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            nonlocal seen, calls
            if not calls:
                # In asyncio nothing may block; there the handlers before it are slow enough.
                release.wait(PATIENCE if app.client.__class__ is TwinClient else 0.01)
            calls += 1
            seen = merged(seen, patch)
            assert seen == desired

        app.client.on_desired(slow)
        before = resident()
        app.client.connect()
        assert app.client.report({"alive": 1}, timeout=PATIENCE) is not None
        wait_until(lambda: app.client.desired_version == total + 1, "the flood was read")
        assert len(getattr(app.client, "inner", app.client)._events) <= 2 * _MAX_CHANGES
        assert resident() - before < 40 * MEGABYTE
        release.set()
        wait_until(lambda: seen == last, "the newest properties")
        assert app.client.desired == last
        assert calls < total
        assert hub.connections == 1


def test_answers_that_the_hub_does_not_read_are_not_gathered_without_end(make: Callable[..., App]) -> None:
    flood = publish("$iothub/twin/PATCH/properties/desired/?$version=x", b"{}", 1) * 1000
    with HostileHub(lambda: itertools.repeat(flood), reads=False) as hub:
        app = make(hub)
        before = resident()
        app.client.connect(wait=False)
        # Whichever of the two bounds is met first.
        while "the hub sent" not in str(app.next_error()):
            pass
        assert resident() - before < 60 * MEGABYTE


@pytest.mark.parametrize("data", [b"\xd0\0" * 5000, b"\x20\2\0\0" * 50_000, b"\0" * 5000, b"\xff" * 5000])
def test_what_comes_in_place_of_a_handshake_ends_in_an_error(make: Callable[..., App], data: bytes) -> None:
    with HostileHub(before=lambda: itertools.repeat(data)) as hub:
        app = make(hub, timeout=0.5)
        with pytest.raises(TwinError, match="not synchronised"):
            app.client.connect()
        assert app.client.state == "offline"


def test_one_clients_flood_leaves_its_neighbour_in_the_loop_its_turn() -> None:
    flood = b"".join(notification(version, b'{"a":%d}' % version) for version in range(2, 30_000))
    loop = LoopThread()
    try:
        with HostileHub(lambda: [flood]) as hostile, HostileHub() as sound:
            flooded, other = (
                aio.TwinClient(f"127.0.0.1:{hub.port}", "dev-1", key=b"key", tls=False, timeout=5)
                for hub in (hostile, sound)
            )
            loop.call(other.connect())
            loop.call(flooded.connect())
            for number in range(20):
                loop.call(other.report({"n": number}, timeout=PATIENCE))
            assert len(sound.reports) == 20
            loop.call(flooded.close())
            loop.call(other.close())
    finally:
        assert loop.close() == set()


# ---------------------------------------------------------------------- what waits for handlers


def changes(count: int, given: dict[str, Any]) -> Iterator[twin.DesiredChanged]:
    """Changes one after the other, of which merge patches cannot be joined."""
    desired = given
    for number in range(count):
        key = f"k{number % 5}"
        patch: dict[str, Any] = {key: (None, {"a": {"x": number}}, {"a": {"y": number}}, 7)[number % 4]}
        desired = merged(desired, patch)
        yield twin.DesiredChanged(patch, desired)


@pytest.mark.parametrize("taken", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("count", [1, 2, 64, 65, 66, 1001])
def test_changes_that_wait_too_long_join_into_one_exact_patch(taken: int, count: int) -> None:
    given = {"k0": {"b": 1}, "k9": 1}
    pending = Pending(given)
    shown: dict[str, Any] = given
    source = list(changes(count, given))
    for number, change in enumerate(source):
        pending.put(change)
        if number < taken:
            patch, desired = pending.take()
            assert patch == change.patch
            shown = merged(shown, patch)
            assert shown == desired
    assert len(pending) <= _MAX_CHANGES
    while pending:
        patch, desired = pending.take()
        shown = merged(shown, patch)
        assert shown == desired
    assert shown == source[-1].desired


def test_large_changes_are_joined_sooner() -> None:
    pending = Pending({})
    desired: dict[str, Any] = {}
    for number in range(100):
        patch = {f"k{number % 3}": "x" * 100_000}
        desired = merged(desired, patch)
        pending.put(twin.DesiredChanged(patch, desired))
    assert len(pending) * 200_000 < 3 * _MAX_BYTES


def test_a_change_that_was_taken_back_is_none() -> None:
    pending = Pending({})
    documents = itertools.cycle([{"a": 1}, {}])
    for _ in range(2 * _MAX_CHANGES + 1):
        desired = next(documents)
        pending.put(twin.DesiredChanged({"a": desired.get("a")}, desired))
    last = [pending.take() for _ in range(len(pending))][-1]
    assert last == ({}, {"a": 1})


def test_states_and_errors_that_wait_have_a_bound_too() -> None:
    pending = Pending({})
    for number in range(2 * _MAX_OTHERS):
        pending.put(twin.StateChanged(number, number + 1))
        pending.put(twin.Failed(number))
        pending.put(twin.Reported(number, None, None))
    events = [pending.take() for _ in range(len(pending))]
    assert len(events) == 2 * _MAX_OTHERS + 1
    states = [event for event in events if type(event) is twin.StateChanged]
    assert all(one.new == other.old for one, other in itertools.pairwise(states))
    assert states[-1].new == 2 * _MAX_OTHERS
    assert twin.Failed(2 * _MAX_OTHERS - 1) in events
    with pytest.raises(IndexError):
        pending.take()


def test_whoever_waits_for_an_event_is_woken() -> None:
    ready: queue.SimpleQueue[None] = queue.SimpleQueue()
    pending = Pending({}, ready)
    for _ in range(5):
        pending.put(twin.Failed(1))
    assert ready.qsize() == 1


def test_more_bytes_of_notifications_than_a_message_are_not_kept_for_the_document() -> None:
    machine = twin.Twin()
    machine.start(0)
    machine.connected(0, 0.0)
    for version in range(2, 30):
        payload = json.dumps({f"k{version}": "x" * 30_000}).encode()
        machine.message_received(
            f"$iothub/twin/PATCH/properties/desired/?$version={version}", payload, 0, 0.0
        )
    assert sum(sys.getsizeof(kept.patch[key]) for kept in machine._kept for key in kept.patch) < 300_000
