"""The hub's HTTP side among those who misbehave: any bytes, slow ones, many of them, and what they cost."""

import contextlib
import json
import logging
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hub_backend import KEY, Answer, Backend, token
from tests.hub_wire import online
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import LocalHub

# The hub's own errors are looked for over all examples: that the fixture is not made anew for each is meant.
once = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

ROUTES = [
    ("GET", "/devices"),
    ("POST", "/devices"),
    ("POST", "/devices/query"),
    ("GET", "/devices/a"),
    ("PUT", "/devices/new"),
    ("PUT", "/devices/a"),
    ("DELETE", "/devices/new"),
    ("GET", "/devices/a/modules"),
    ("PUT", "/devices/a/modules/m"),
    ("GET", "/twins/a"),
    ("PATCH", "/twins/a"),
    ("PUT", "/twins/a"),
    ("PATCH", "/twins/a/modules/m"),
    ("POST", "/twins/a/methods"),
    ("PUT", "/jobs/v2/j"),
    ("GET", "/jobs/v2/j"),
    ("POST", "/jobs/v2/j/cancel"),
    ("GET", "/jobs/v2/query"),
    ("GET", "/local/packets"),
    ("GET", "/local/faults"),
    ("POST", "/local/faults"),
    ("DELETE", "/local/faults"),
    ("DELETE", "/local/connections/a"),
]
# Words that requests have, in places where they do not belong.
WORDS = st.sampled_from(
    [
        *("deviceId", "moduleId", "id", "importMode", "create", "updateTwin", "status", "enabled", "tags"),
        *("properties", "desired", "reported", "$version", "$metadata", "etag", "authentication", "sas"),
        *("symmetricKey", "primaryKey", "secondaryKey", "x509Thumbprint", "primaryThumbprint", "query"),
        *("SELECT * FROM devices", "SELECT COUNT() AS n FROM devices.jobs", "type", "scheduleUpdateTwin"),
        *("scheduleDeviceMethod", "queryCondition", "*", "updateTwin", "cloudToDeviceMethod", "methodName"),
        *("payload", "startTime", "2026-11-21T00:00:00Z", "maxExecutionTimeInSeconds", "jobId", "kind"),
        *("quota", "parameters", "times", "seconds", "device", "operation", "a", "a.b", "", "\ud800", "\0"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | WORDS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=6)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    certificates = tmp_path_factory.mktemp("certificates")
    with LocalHub(https_port=0, http_port=0, owner_key=KEY, certificates=certificates) as hub:
        hub.create_device("a", KEY, desired={"secret": "of a"})
        # Whom no request names.
        hub.create_device("bystander", KEY)
        yield hub


@pytest.fixture(scope="module")
def asked(served: LocalHub) -> Iterator[Backend]:
    backend = Backend(served)
    yield backend
    backend.connection.close()


@pytest.fixture
def no_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The hub met no error of its own: it logs them, and answers with 500."""
    yield
    records = caplog.get_records("call")
    assert [one for one in records if one.levelno >= logging.ERROR and one.name != "asyncio"] == []


def alive(hub: LocalHub) -> None:
    with contextlib.closing(Backend(hub).connection) as connection:
        connection.request("GET", "/twins/a", headers={"Authorization": token()})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["deviceId"]) == (200, "a")


def dial(hub: LocalHub, secure: bool = False) -> socket.socket:
    port = hub.https_port if secure else hub.http_port
    assert port is not None
    raw = socket.create_connection(("127.0.0.1", port), PATIENCE)
    if not secure:
        return raw
    return ssl.create_default_context(cafile=hub.ca_file).wrap_socket(raw, server_hostname="localhost")


def said(raw: socket.socket) -> bytes:
    """All that comes until the hub ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while more := raw.recv(65536):
            data += more
    return data


# ---------------------------------------------------------------------- any bytes


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes(served: LocalHub, data: bytes) -> None:
    with dial(served) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(data + b"\r\n\r\n")
            raw.shutdown(socket.SHUT_WR)
        heads = said(raw).split(b"\r\n", 1)[0]
    # Not HTTP, or a request without a token for something that everybody may see.
    assert heads == b"" or heads.split(b" ")[1] in (b"400", b"401", b"404", b"405", b"200"), heads
    alive(served)


REQUEST = (
    b"PATCH /twins/a?api-version=2021-04-12 HTTP/1.1\r\nHost: localhost\r\nAuthorization: %b\r\n"
    b'Content-Type: application/json\r\nContent-Length: 17\r\nConnection: close\r\n\r\n{"tags": {"x": 1}}'
)


@settings(once, max_examples=300)
@given(changes=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_request(served: LocalHub, no_errors: None, changes: list[tuple[int, int]]) -> None:
    request = bytearray(REQUEST % token().encode())
    for at, byte in changes:
        request[at % len(request)] = byte
    with dial(served) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(request)
            raw.shutdown(socket.SHUT_WR)
        answer = said(raw)
    assert b" 500 " not in answer.split(b"\r\n", 1)[0], answer
    assert b"of a" not in answer or answer.startswith(b"HTTP/1.1 200"), answer


def test_a_request_that_cannot_be_read_is_logged_without_what_stands_in_it(
    served: LocalHub, no_errors: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    with dial(served) as raw:
        raw.sendall(REQUEST.replace(b"Authorization", b"Author\xb5ization") % token().encode())
        assert b" 400 Bad Request" in said(raw)
    assert "Error handling request from 127.0.0.1: " in caplog.text
    # conftest.py would have found it, too.
    assert "sig" not in caplog.text


# ---------------------------------------------------------------------- any JSON


@settings(once, max_examples=400)
@given(
    route=st.sampled_from(ROUTES), body=JSON, if_match=st.sampled_from([None, "*", '"x"', "", "AAAAAAAAAAE="])
)
def test_any_json_is_taken_or_refused_and_never_an_error_of_the_hub(
    asked: Backend, no_errors: None, route: tuple[str, str], body: Any, if_match: str | None
) -> None:
    headers = {} if if_match is None else {"If_Match": if_match}
    payload = json.dumps(body).encode()
    answer = asked.ask(*route, None if route[0] == "GET" else payload, **headers)
    assert answer.status < 500, (answer.status, answer.body)
    if answer.status >= 400 and not (route[1] == "/devices" and "errors" in answer.body):
        assert answer.code not in ("", "None")
        assert answer.body["Message"]
    asked.ask("DELETE", "/local/faults")
    assert asked.ask("GET", "/twins/a").body["deviceId"] == "a"


@settings(once, max_examples=100)
@given(
    path=st.text(st.sampled_from("/abdevicstwn%2F.?&=#0-~é\0 "), max_size=40),
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"]),
)
def test_any_path(served: LocalHub, no_errors: None, path: str, method: str) -> None:
    line = f"{method} /{path} HTTP/1.1\r\n".encode()
    with dial(served) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(
                line + b"Host: x\r\nConnection: close\r\nAuthorization: %b\r\n\r\n" % token().encode()
            )
        answer = said(raw).split(b"\r\n", 1)[0]
    assert answer == b"" or int(answer.split(b" ")[1]) < 500, answer


@settings(max_examples=60, deadline=None)
@given(route=st.sampled_from(ROUTES), body=JSON)
def test_who_may_nothing_learns_nothing(asked: Backend, route: tuple[str, str], body: Any) -> None:
    """A device's policy, a token of another hub, none: whatever is asked."""
    before = asked.ask("GET", "/twins/a").body
    payload = None if route[0] == "GET" else json.dumps(body).encode()
    for authorization in (token(policy="device"), token("elsewhere"), token("localhost/devices/b"), "x"):
        answer = asked.ask(*route, payload, authorization=authorization, If_Match="*")
        assert (answer.status, answer.code) == (401, "IotHubUnauthorizedAccess")
        assert "of a" not in json.dumps(answer.body)
    assert asked.ask("GET", "/twins/a").body == before


@pytest.mark.parametrize(
    "header",
    [
        "x-ms-max-item-count: " + "9" * 5000,
        "x-ms-max-item-count: 0",
        "x-ms-max-item-count: ²",
        "x-ms-continuation: " + "A" * 5000,
        "x-ms-continuation: ++++",
        "x-ms-continuation: é",
        "If-Match: " + "A" * 5000,
    ],
    ids=lambda header: f"{header:.30}",
)
def test_headers_that_are_nonsense(served: LocalHub, no_errors: None, header: str) -> None:
    body = b'{"query": "SELECT * FROM devices"}'
    head = f"POST /devices/query HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n".encode()
    head += b"Authorization: %b\r\nContent-Length: %d\r\n\r\n" % (token().encode(), len(body))
    with dial(served) as raw:
        raw.sendall(head + body)
        status = int(said(raw).split(b" ", 2)[1])
    assert status == (200 if header.startswith("If-Match") else 400)


# ---------------------------------------------------------------------- slow ones and many


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twin_device.hub.guard.REQUEST_WITHIN", 0.2)
    monkeypatch.setattr("twin_device.hub.guard.WRITE_WITHIN", 0.2)
    monkeypatch.setattr("twin_device.hub.service._BODY_WITHIN", 0.2)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("start", [b"", b"GET /dev", b"GET /devices HTTP/1.1\r\nHost: x\r\n"])
def test_who_asks_nothing_is_ended(served: LocalHub, impatient: None, secure: bool, start: bytes) -> None:
    with dial(served, secure) as raw:
        raw.sendall(start)
        began = time.monotonic()
        assert said(raw) == b""
        assert 0.1 < time.monotonic() - began < PATIENCE


def test_a_header_a_moment_is_no_request(served: LocalHub, impatient: None) -> None:
    """Slow-loris: every header comes in time, the request never."""
    with dial(served) as raw:
        raw.sendall(b"GET /devices HTTP/1.1\r\n")
        raw.settimeout(0.02)
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                raw.sendall(b"X-Header: 1\r\n")
                with contextlib.suppress(TimeoutError):
                    assert raw.recv(1) == b""
                    break
    assert time.monotonic() < deadline


def test_a_body_that_does_not_come(served: LocalHub, impatient: None) -> None:
    with dial(served) as raw:
        raw.sendall(
            b"PATCH /twins/a HTTP/1.1\r\nHost: x\r\nAuthorization: %b\r\nContent-Length: 100\r\n"
            b'Connection: close\r\n\r\n{"tags"' % token().encode()
        )
        assert said(raw).startswith(b"HTTP/1.1 408 ")


def test_who_does_not_read_is_ended(served: LocalHub, impatient: None) -> None:
    for number in range(60):
        with contextlib.suppress(ValueError):
            served.create_device(f"big{number}", desired={f"k{n}": "x" * 4000 for n in range(8)})
    query = b'{"query": "SELECT * FROM devices"}'
    request = (
        b"POST /devices/query HTTP/1.1\r\nHost: x\r\nAuthorization: %b\r\nContent-Length: %d\r\n\r\n%b"
        % (token().encode(), len(query), query)
    )
    open_before = len(served._guards._guards)
    with dial(served) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(ConnectionError):
            raw.sendall(request * 10)
        wait_until(lambda: len(served._guards._guards) > open_before, "it is there")
        wait_until(lambda: len(served._guards._guards) == open_before, "its connection is ended")
    alive(served)


def test_a_busy_connection_stays_longer_than_a_first_request_may_take(
    served: LocalHub, impatient: None
) -> None:
    """The limit is for the first request; between later ones keep-alive counts."""
    with dial(served) as raw:
        for _ in range(4):
            raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert raw.recv(15) == b"HTTP/1.1 200 OK"
            raw.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                while True:
                    assert raw.recv(65536)
            raw.settimeout(PATIENCE)


@pytest.mark.parametrize("secure", [False, True])
def test_a_flood_of_connections_is_bounded_and_locks_nobody_out(
    served: LocalHub, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    monkeypatch.setattr("twin_device.hub.guard.MAX_CONNECTIONS", 20)
    with contextlib.ExitStack() as stack:
        flood = [stack.enter_context(dial(served, secure)) for _ in range(60)]
        newest = flood[-1].getsockname()[1]
        # The hub takes them later than they are made, and from another listener it may take others first.
        wait_until(
            lambda: newest in {one.get_extra_info("peername")[1] for one in list(served._guards._guards)},
            "all have come",
        )
        alive(served)
        wait_until(lambda: len(served._guards._guards) <= 20, "the oldest are gone")
        assert said(flood[0]) == b""
        flood[-1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert flood[-1].recv(15) == b"HTTP/1.1 200 OK"


def test_handshakes_that_are_never_begun_are_bounded(
    served: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twin_device.hub.local._MAX_GREETING", 20)
    assert served.mqtts_port is not None
    with contextlib.ExitStack() as stack:
        for port in (served.https_port, served.mqtts_port):
            for _ in range(40):
                stack.enter_context(socket.create_connection(("127.0.0.1", port or 0), PATIENCE))
        wait_until(lambda: len(served._greeting) <= 20, "the oldest are gone")
        alive(served)
        online(served.mqtts_port, "bystander", ca_file=served.ca_file).close()


def test_strangers_on_mqtt_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twin_device.hub.mqtt._MAX_STRANGERS", 20)
    with LocalHub(None, mqtt_port=0) as hub, contextlib.ExitStack() as stack:
        hub.create_device("dev", KEY)
        known = stack.enter_context(online(hub.mqtt_port))
        for _ in range(60):
            stack.enter_context(socket.create_connection(("127.0.0.1", hub.mqtt_port or 0), PATIENCE))
        wait_until(lambda: len(hub._endpoint.open) <= 21, "the oldest are gone")
        known.nothing_waits()
        stack.enter_context(online(hub.mqtt_port)).nothing_waits()


def test_a_crowd_of_requests_at_once(served: LocalHub) -> None:
    """Updates of one twin from many connections: each is one step of its version."""
    device = served.create_device("crowded")

    def update(number: int) -> list[Answer]:
        backend = Backend(served)
        try:
            return [
                backend.ask("PATCH", "/twins/crowded", {"properties": {"desired": {f"k{number}": step}}})
                for step in range(20)
            ]
        finally:
            backend.connection.close()

    with ThreadPoolExecutor(10) as pool:
        answers = [answer for answers in pool.map(update, range(10)) for answer in answers]
    assert {answer.status for answer in answers} == {200}
    assert device.desired_version == 201
    assert device.desired == {f"k{number}": 19 for number in range(10)}


def test_a_body_that_is_too_large_is_refused_before_it_is_there(served: LocalHub) -> None:
    with dial(served) as raw:
        raw.sendall(
            b"PATCH /twins/a HTTP/1.1\r\nHost: x\r\nAuthorization: %b\r\nContent-Length: 10000000\r\n"
            b"Connection: close\r\n\r\n" % token().encode()
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(30):
                raw.sendall(b"x" * 65536)
        answer = said(raw)
    assert answer.startswith(b"HTTP/1.1 413 ") or answer == b""
    alive(served)


def test_certificates_and_data_are_no_pages(served: LocalHub, tmp_path: Path) -> None:
    for path in (b"/page/server.pem", b"/page/..%2f..%2f..%2fetc%2fpasswd", b"//etc/passwd", b"/page/%00"):
        with dial(served) as raw:
            raw.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path)
            assert said(raw).split(b" ")[1] in (b"400", b"404")
