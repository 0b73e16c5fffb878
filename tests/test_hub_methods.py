"""Direct methods: the back end asks, the device answers, and what happens when it does not."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.hub_backend import Backend
from tests.hub_wire import KEY, METHODS, Closed, Wire, online, publish, subscribe
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import Device, LocalHub


@pytest.fixture
def device(local_hub: LocalHub) -> Device:
    return local_hub.create_device("dev", KEY)


@pytest.fixture
def wire(local_hub: LocalHub, device: Device) -> Iterator[Wire]:
    with online(local_hub.mqtts_port, "dev", KEY, METHODS, ca_file=local_hub.ca_file) as wire:
        yield wire


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def asked(wire: Wire, name: str = "reboot") -> tuple[str, Any]:
    """The $rid and payload of a direct method that the device is asked for."""
    message = wire.message()
    head, _, request_id = message.topic.partition("/?$rid=")
    assert (head, message.qos) == (f"$iothub/methods/POST/{name}", 0)
    return request_id, json.loads(message.payload) if message.payload else None


def answer(request_id: str, status: int = 200, payload: bytes = b"{}") -> bytes:
    return publish(f"$iothub/methods/res/{status}/?$rid={request_id}", payload)


def test_there_and_back(device: Device, wire: Wire, pool: ThreadPoolExecutor) -> None:
    call = pool.submit(device.invoke_method, "reboot", {"delay": 3})
    request_id, payload = asked(wire)
    assert payload == {"delay": 3}
    wire.send(answer(request_id, 207, b'{"done": true}'))
    assert call.result(PATIENCE) == (207, {"done": True})


@pytest.mark.parametrize(
    ("payload", "expected"), [(b"", None), (b"null", None), (b"[1, 2]", [1, 2]), (b'"x"', "x"), (b" ", None)]
)
def test_an_answer_is_any_json_or_nothing(
    device: Device, wire: Wire, pool: ThreadPoolExecutor, payload: bytes, expected: Any
) -> None:
    call = pool.submit(device.invoke_method, "reboot")
    wire.send(answer(asked(wire)[0], 200, payload))
    assert call.result(PATIENCE) == (200, expected)


def test_answers_find_their_calls_in_any_order(device: Device, wire: Wire, pool: ThreadPoolExecutor) -> None:
    calls: dict[str, Future[Any]] = {}
    for number in range(5):
        call = pool.submit(device.invoke_method, "reboot", number)
        request_id, payload = asked(wire)
        assert payload == number
        calls[request_id] = call
    for request_id in reversed(calls):
        wire.send(answer(request_id, 200, json.dumps(request_id).encode()))
    for request_id, call in calls.items():
        assert call.result(PATIENCE) == (200, request_id)


def test_no_answer_in_time_and_a_late_one(device: Device, wire: Wire, pool: ThreadPoolExecutor) -> None:
    call = pool.submit(device.invoke_method, "reboot", timeout=0.05)
    request_id, _ = asked(wire)
    with pytest.raises(TimeoutError, match="dev: Timed out"):
        call.result(PATIENCE)
    wire.send(answer(request_id), answer("nobody asked"))
    wire.nothing_waits()


def test_a_device_that_is_away(local_hub: LocalHub, device: Device) -> None:
    with pytest.raises(ConnectionError, match="isn't online"):
        device.invoke_method("reboot")
    with pytest.raises(ConnectionError, match="isn't online"):
        device.invoke_method("reboot", connect_timeout=0.05)
    # It is there, but takes no methods.
    with online(local_hub.mqtts_port, ca_file=local_hub.ca_file), pytest.raises(ConnectionError):
        device.invoke_method("reboot")


def test_a_call_can_wait_for_the_device(
    local_hub: LocalHub, device: Device, pool: ThreadPoolExecutor
) -> None:
    call = pool.submit(device.invoke_method, "reboot", connect_timeout=PATIENCE)
    with online(local_hub.mqtts_port, "dev", KEY, METHODS, ca_file=local_hub.ca_file) as wire:
        wire.send(answer(asked(wire)[0]))
        assert call.result(PATIENCE) == (200, {})


def test_a_call_can_wait_for_a_session_that_is_kept(
    local_hub: LocalHub, device: Device, pool: ThreadPoolExecutor
) -> None:
    port, ca_file = local_hub.mqtts_port, local_hub.ca_file
    with online(port, "dev", KEY, METHODS, ca_file=ca_file, clean=False):
        pass
    wait_until(lambda: not device.connected, "the device is gone")
    call = pool.submit(device.invoke_method, "reboot", connect_timeout=PATIENCE)
    with Wire(port, ca_file) as wire:
        assert wire.connect(clean=False) == 1
        wire.send(answer(asked(wire)[0]))
        assert call.result(PATIENCE) == (200, {})


def test_a_connection_that_ends_ends_the_call(device: Device, wire: Wire, pool: ThreadPoolExecutor) -> None:
    call = pool.submit(device.invoke_method, "reboot")
    asked(wire)
    wire.close()
    with pytest.raises(ConnectionError, match="closed its connection"):
        call.result(PATIENCE)


def test_nobody_answers_for_another(
    local_hub: LocalHub, device: Device, wire: Wire, pool: ThreadPoolExecutor
) -> None:
    local_hub.create_device("thief", KEY)
    call = pool.submit(device.invoke_method, "reboot")
    request_id, _ = asked(wire)
    with online(local_hub.mqtts_port, "thief", KEY, METHODS, ca_file=local_hub.ca_file) as thief:
        thief.send(answer(request_id, 200, b'"forged"'))
        thief.nothing_waits()
    wire.send(answer(request_id, 200, b'"true"'))
    assert call.result(PATIENCE) == (200, "true")


def test_a_name_arrives_percent_encoded(device: Device, wire: Wire, pool: ThreadPoolExecutor) -> None:
    call = pool.submit(device.invoke_method, "get%#x+y")
    wire.send(answer(asked(wire, "get%25%23x%2By")[0]))
    assert call.result(PATIENCE)[0] == 200


@pytest.mark.parametrize("topic", ["res/", "res/x/", "res/200x", "res//", "res/200/extra/", "res"])
def test_an_answer_that_is_none_ends_the_connection(device: Device, wire: Wire, topic: str) -> None:
    wire.send(publish(f"$iothub/methods/{topic}?$rid=1", b"{}"))
    with pytest.raises(Closed):
        wire.nothing_waits()


def test_an_answer_that_is_not_json(device: Device, wire: Wire, pool: ThreadPoolExecutor) -> None:
    call = pool.submit(device.invoke_method, "reboot")
    wire.send(answer(asked(wire)[0], 200, b"{oops"))
    with pytest.raises(ValueError, match="not JSON"):
        call.result(PATIENCE)


def test_a_payload_has_a_limit(device: Device, wire: Wire, pool: ThreadPoolExecutor) -> None:
    with pytest.raises(ValueError, match="128 KB"):
        device.invoke_method("reboot", "x" * 128 * 1024)
    call = pool.submit(device.invoke_method, "reboot")
    wire.send(answer(asked(wire)[0], 200, b'"' + b"x" * 128 * 1024 + b'"'))
    with pytest.raises(ConnectionError):
        call.result(PATIENCE)


def test_a_call_is_not_one_of_the_hubs_memory(local_hub: LocalHub, device: Device, wire: Wire) -> None:
    for _ in range(3):
        with pytest.raises(TimeoutError):
            device.invoke_method("reboot", timeout=0.01)
    endpoint = local_hub._endpoint
    assert (endpoint._calls, endpoint._arrivals) == ({}, {})


# ---------------------------------------------------------------------- over REST


def test_over_rest(backend: Backend, pool: ThreadPoolExecutor) -> None:
    hub = backend.hub
    hub.create_device("dev/m", KEY)
    body = {"methodName": "reboot", "payload": {"delay": 3}, "responseTimeoutInSeconds": 30}
    for name, path in (("dev", "/twins/dev/methods"), ("dev/m", "/twins/dev/modules/m/methods")):
        key = hub.device(name).keys[0]
        with online(hub.mqtts_port, name, key, METHODS, ca_file=hub.ca_file) as wire:
            call = pool.submit(backend.ask, "POST", path, body)
            request_id, payload = asked(wire)
            assert payload == {"delay": 3}
            wire.send(answer(request_id, 501, b'{"why": "no such method"}'))
            found = call.result(PATIENCE)
            assert (found.status, found.body) == (
                200,
                {"status": 501, "payload": {"why": "no such method"}},
            )


def test_without_a_payload_the_device_gets_none(backend: Backend, pool: ThreadPoolExecutor) -> None:
    hub = backend.hub
    hub.create_device("dev", KEY)
    with online(hub.mqtts_port, "dev", KEY, METHODS, ca_file=hub.ca_file) as wire:
        call = pool.submit(backend.ask, "POST", "/twins/dev/methods", {"methodName": "reboot"})
        message = wire.message()
        assert message.payload == b""
        wire.send(answer(message.topic.partition("$rid=")[2]))
        assert call.result(PATIENCE).status == 200


METHOD: dict[str, Any] = {"methodName": "reboot"}
REFUSED: list[tuple[Any, int, str]] = [
    (METHOD, 404, "DeviceNotOnline"),
    ({}, 400, "ArgumentInvalid"),
    ({"methodName": ""}, 400, "ArgumentInvalid"),
    ({"methodName": "two words"}, 400, "ArgumentInvalid"),
    ({"methodName": "a/b"}, 400, "ArgumentInvalid"),
    ({"methodName": "é"}, 400, "ArgumentInvalid"),
    ({"methodName": "x" * 129}, 400, "ArgumentInvalid"),
    ({"methodName": 5}, 400, "ArgumentInvalid"),
    ({**METHOD, "responseTimeoutInSeconds": 1}, 400, "ArgumentInvalid"),
    ({**METHOD, "responseTimeoutInSeconds": 3601}, 400, "ArgumentInvalid"),
    ({**METHOD, "responseTimeoutInSeconds": "30"}, 400, "ArgumentInvalid"),
    ({**METHOD, "responseTimeoutInSeconds": True}, 400, "ArgumentInvalid"),
    ({**METHOD, "connectTimeoutInSeconds": -1}, 400, "ArgumentInvalid"),
    (b'{"methodName": "reboot", "payload": "\\ud800"}', 400, "IotHubFormatError"),
    ({**METHOD, "payload": "x" * 128 * 1024}, 413, "MessageTooLarge"),
    ([METHOD], 400, "IotHubFormatError"),
]


@pytest.mark.parametrize(("body", "status", "code"), REFUSED, ids=lambda value: f"{value!r:.60}")
def test_what_is_refused(backend: Backend, body: Any, status: int, code: str) -> None:
    backend.hub.create_device("dev")
    found = backend.ask("POST", "/twins/dev/methods", body)
    assert (found.status, found.code) == (status, code)
    assert backend.ask("POST", "/twins/nobody/methods", METHOD).code == "DeviceNotFound"
    assert backend.ask("POST", "/twins/dev/modules/m/methods", METHOD).code == "ModuleNotFound"


def test_too_many_at_once(backend: Backend) -> None:
    hub = backend.hub
    device = hub.create_device("dev", KEY)
    with online(hub.mqtts_port, "dev", KEY, METHODS, ca_file=hub.ca_file) as wire:
        with ThreadPoolExecutor(100) as pool:
            calls = [pool.submit(device.invoke_method, "reboot") for _ in range(100)]
            ids = [asked(wire)[0] for _ in calls]
            found = backend.ask("POST", "/twins/dev/methods", METHOD)
            assert (found.status, found.code) == (403, "DeviceMaximumInflightMethodExceeded")
            wire.send(*(answer(one) for one in ids))
            assert {call.result(PATIENCE)[0] for call in calls} == {200}
        # An unsubscribed device takes none.
        wire.unsubscribe(METHODS)
        assert backend.ask("POST", "/twins/dev/methods", METHOD).code == "DeviceNotOnline"
        wire.send(subscribe((METHODS, 0)))
