"""Events: what the hub tells, in Python and as server-sent events over HTTP, and our own requests."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import unquote

import pytest

from tests.hub_backend import KEY, Backend, token
from tests.hub_wire import DISCONNECT, RES, Closed, Wire, online, publish
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import Device, Event, LocalHub
from twin_device.hub.events import MAX_WAITING, SOURCES, Publisher
from twin_device.hub.faults import KINDS

REPORT = "$iothub/twin/PATCH/properties/reported/?$rid=1"


@pytest.fixture
def device(local_hub: LocalHub) -> Device:
    return local_hub.create_device("dev", KEY, desired={"a": 1}, tags={"site": "A"})


@pytest.fixture
def wire(local_hub: LocalHub, device: Device) -> Iterator[Wire]:
    with online(local_hub.mqtts_port, ca_file=local_hub.ca_file) as wire:
        yield wire


def shown(event: Event) -> tuple[str, str, Any]:
    """What an event is about, without its times."""
    return event.source, event.properties.get("opType", ""), without_times(event.body)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key != "$lastUpdated"}
    return value


# ---------------------------------------------------------------------- what is told


def test_a_report_is_told_as_what_it_changed(local_hub: LocalHub, device: Device, wire: Wire) -> None:
    wire.ask(REPORT, b'{"battery": 55, "old": 1}')
    with local_hub.events("twinChangeEvents") as events:
        wire.ask(REPORT, b'{"battery": 54, "old": null, "deep": {"x": [1]}}')
        event = next(events)
    assert event.properties | {"operationTimestamp": ""} == {
        "hubName": "localhost",
        "deviceId": "dev",
        "operationTimestamp": "",
        "iothub-message-schema": "twinChangeNotification",
        "opType": "updateTwin",
    }
    assert event.system["iothub-message-source"] == event.source == "twinChangeEvents"
    assert event.system["content-type"] == "application/json"
    assert event.device == "dev"
    assert abs(event.time - time.time()) < PATIENCE
    assert without_times(event.body) == {
        "version": 4,
        "properties": {
            "reported": {
                "battery": 54,
                "old": None,
                "deep": {"x": [1]},
                "$metadata": {"battery": {}, "deep": {"x": {}}},
                "$version": 3,
            }
        },
    }
    stamp = event.body["properties"]["reported"]["$metadata"]["deep"]["x"]["$lastUpdated"]
    assert stamp == device.twin["properties"]["reported"]["$metadata"]["deep"]["x"]["$lastUpdated"]


def test_a_refused_report_is_not_told(local_hub: LocalHub, device: Device, wire: Wire) -> None:
    with local_hub.events("twinChangeEvents") as events:
        assert "/400/" in wire.ask(REPORT, b'{"a b": 1}').topic
        wire.ask(REPORT, b'{"good": 1}')
        assert next(events).body["version"] == 3


def test_the_back_ends_writes_are_told(local_hub: LocalHub, device: Device) -> None:
    with local_hub.events() as events:
        device.patch_desired({"a": None, "b": {"c": 2}})
        device.patch_tags({"floor": 3, "site": None})
        device.replace_desired({"n": 1})
        # The same value is told, too: nobody compares.
        device.patch_desired({"n": 1})
        patched, tagged, replaced, again = (next(events) for _ in range(4))
    version = {"$lastUpdatedVersion": 2}
    assert shown(patched) == (
        "twinChangeEvents",
        "updateTwin",
        {
            "version": 3,
            "properties": {
                "desired": {
                    "a": None,
                    "b": {"c": 2},
                    "$metadata": {**version, "b": {**version, "c": version}},
                    "$version": 2,
                }
            },
        },
    )
    assert shown(tagged)[1:] == ("updateTwin", {"version": 4, "tags": {"floor": 3, "site": None}})
    assert replaced.properties["opType"] == "replaceTwin"
    assert replaced.body["tags"] == {"floor": 3}
    assert replaced.body["properties"]["desired"]["n"] == 1
    assert (replaced.body["deviceId"], replaced.body["version"]) == ("dev", 5)
    assert again.body["properties"]["desired"]["$version"] == 4
    sequence = [event.sequence for event in (patched, tagged, replaced, again)]
    assert sequence == sorted(set(sequence))


def test_life_and_connections_are_told(local_hub: LocalHub) -> None:
    with local_hub.events() as events:
        module = local_hub.create_device("dev/m", KEY)
        with online(local_hub.mqtts_port, "dev/m", KEY, RES, ca_file=local_hub.ca_file) as wire:
            wire.send(DISCONNECT)
            seen = [next(events) for _ in range(4)]
        local_hub.device("dev").delete()
        seen += [next(events) for _ in range(2)]
    assert [(event.device, event.source, event.properties["opType"]) for event in seen] == [
        ("dev", "deviceLifecycleEvents", "createDeviceIdentity"),
        ("dev/m", "deviceLifecycleEvents", "createDeviceIdentity"),
        ("dev/m", "deviceConnectionStateEvents", "deviceConnected"),
        ("dev/m", "deviceConnectionStateEvents", "deviceDisconnected"),
        ("dev", "deviceLifecycleEvents", "deleteDeviceIdentity"),
        ("dev/m", "deviceLifecycleEvents", "deleteDeviceIdentity"),
    ]
    for event in seen[1:4]:
        assert (event.properties["deviceId"], event.properties["moduleId"]) == ("dev", "m")
        assert event.system["iothub-connection-module-id"] == "m"
    assert (seen[1].body["moduleId"], seen[1].body["version"]) == (module.id.partition("/")[2], 2)
    numbers = [event.body["sequenceNumber"] for event in seen[2:4]]
    assert [len(number) for number in numbers] == [64, 64]
    assert numbers == sorted(set(numbers))


def test_telemetry_is_told(local_hub: LocalHub, device: Device, wire: Wire) -> None:
    with local_hub.events("Telemetry") as events:
        wire.send(publish("devices/dev/messages/events/%24.ct=text%2Fplain&kind=a%20b", b"hello \xff"))
        event = next(events)
    assert (event.source, event.body, event.properties) == ("Telemetry", "hello \ufffd", {"kind": "a b"})
    assert event.system["content-type"] == "text/plain"


def test_packets_are_told_when_asked_for(local_hub: LocalHub, device: Device) -> None:
    port, ca_file = local_hub.mqtts_port, local_hub.ca_file
    with local_hub.events("packets", device=device) as events, online(port, ca_file=ca_file) as wire:
        wire.ask(REPORT, json.dumps({"text": "x" * 4000, "more": "y" * 3000}).encode())
        seen = [next(events).body for _ in range(6)]
    assert [(one["direction"], one["kind"]) for one in seen] == [
        ("in", "CONNECT"),
        ("out", "CONNACK"),
        ("in", "SUBSCRIBE"),
        ("out", "SUBACK"),
        ("in", "PUBLISH"),
        ("out", "PUBLISH"),
    ]
    assert (seen[4]["topic"], seen[4]["size"], len(seen[4]["payload"])) == (REPORT, 7024, 4096)
    assert seen[5]["payload"] == ""
    assert "SharedAccessSignature" not in json.dumps(seen)


def test_faults_are_told(local_hub: LocalHub, device: Device, wire: Wire) -> None:
    with local_hub.events("faults") as events:
        local_hub.fault("answer_doubled", times=1)
        assert [(one["kind"], one["hits"]) for one in next(events).body] == [("answer_doubled", 0)]
        wire.ask(REPORT, b"{}")
        # Used up with its first hit.
        assert next(events).body == []
        fault = local_hub.fault("quota")
        assert next(events).body == [fault.as_dict()]
        local_hub.clear_faults()
        assert next(events).body == []


# ---------------------------------------------------------------------- listening


def test_only_what_was_asked_for(local_hub: LocalHub, device: Device) -> None:
    local_hub.create_device("other")
    with local_hub.events("twinChangeEvents", device="other") as events:
        device.patch_desired({"a": 2})
        local_hub.device("other").patch_desired({"a": 3})
        assert (next(events).device, events.lost) == ("other", 0)
    with pytest.raises(ValueError, match=r"no events 'tweets'; there are twinChangeEvents, "):
        local_hub.events("tweets")


def test_waiting_for_an_event_ends(local_hub: LocalHub) -> None:
    with local_hub.events(timeout=0.05) as events, pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        next(events)


def test_an_iteration_ends_when_it_is_closed(local_hub: LocalHub, device: Device) -> None:
    events = local_hub.events(timeout=PATIENCE)
    seen: list[Event] = []
    thread = threading.Thread(target=lambda: seen.extend(events))
    thread.start()
    device.patch_desired({"a": 2})
    wait_until(lambda: seen, "the event")
    events.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    device.patch_desired({"a": 3})
    assert (len(seen), list(events)) == (1, [])


def test_nobody_who_listens_costs_nothing(local_hub: LocalHub, device: Device) -> None:
    publisher = local_hub._endpoint.events
    assert not any(publisher.wants(source) for source in SOURCES)
    with local_hub.events("faults"), local_hub.events():
        assert [source for source in SOURCES if publisher.wants(source)] == [
            source for source in SOURCES if source != "packets"
        ]
    assert not any(publisher.wants(source) for source in SOURCES)


def test_a_slow_listener_loses_the_oldest_and_is_told() -> None:
    publisher = Publisher("hub")
    woken: list[int] = []
    slow = publisher.subscribe(["Telemetry"], None, lambda: woken.append(1))
    quick = publisher.subscribe(["Telemetry"], None, lambda: None)
    for number in range(MAX_WAITING + 3):
        publisher.publish("Telemetry", "d", {}, {}, number)
        assert quick.take() is not None
    assert (len(woken), slow.take_lost(), slow.take_lost(), quick.take_lost()) == (MAX_WAITING + 3, 3, 0, 0)
    first = slow.take()
    assert first is not None
    assert first.body == 3
    publisher.unsubscribe(slow)
    publisher.unsubscribe(slow)


# ---------------------------------------------------------------------- over HTTP


class Stream:
    """The stream of events, read line by line."""

    def __init__(self, hub: LocalHub, query: str = "", **headers: str) -> None:
        self._connection = http.client.HTTPConnection("localhost", hub.http_port or 0, timeout=PATIENCE)
        self._connection.request(
            "GET", f"/local/events{query}", headers={"Authorization": token(), **headers}
        )
        self.response = self._connection.getresponse()

    def record(self) -> dict[str, str]:
        """The next event's fields; a comment is a field without a name."""
        fields = {}
        while True:
            line = self.response.readline().decode()
            if line in ("\n", ""):
                return fields
            name, _, value = line.rstrip("\n").partition(": ")
            fields[name] = value

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def plain() -> Iterator[LocalHub]:
    with LocalHub(None, mqtt_port=0, http_port=0, owner_key=KEY) as hub:
        yield hub


def test_the_stream(plain: LocalHub) -> None:
    with closing(Stream(plain, "?source=twinChangeEvents&source=deviceLifecycleEvents")) as stream:
        assert stream.response.status == 200
        assert stream.response.headers["Content-Type"] == "text/event-stream"
        assert stream.record() == {"": "listening"}
        device = plain.create_device("dev", KEY)
        device.patch_desired({"text": "line\nbreak \u2028 é"})
        created, patched = stream.record(), stream.record()
    assert (created["event"], created["id"]) == ("deviceLifecycleEvents", "1")
    data = json.loads(patched["data"])
    assert (patched["event"], patched["id"]) == ("twinChangeEvents", str(data["sequence"]))
    assert data["device"] == "dev"
    assert data["properties"]["opType"] == "updateTwin"
    assert data["body"]["properties"]["desired"]["text"] == "line\nbreak \u2028 é"


def test_the_stream_of_one_device(plain: LocalHub) -> None:
    plain.create_device("a/m")
    plain.create_device("b")
    with closing(Stream(plain, "?deviceId=a%2Fm")) as stream:
        stream.record()
        plain.device("b").patch_desired({"x": 1})
        plain.device("a/m").patch_desired({"x": 2})
        assert json.loads(stream.record()["data"])["device"] == "a/m"


def test_a_stream_ends_with_its_hub_at_once(plain: LocalHub) -> None:
    with closing(Stream(plain)) as stream:
        stream.record()
        begun = time.monotonic()
        plain.close()
        assert stream.record() == {}
        assert time.monotonic() - begun < 0.9  # aiohttp would wait a second for it


def test_a_listener_that_goes_is_forgotten(plain: LocalHub) -> None:
    stream = Stream(plain)
    stream.record()
    publisher = plain._endpoint.events
    assert publisher.wants("faults")
    stream.response.close()
    stream.close()
    # Nothing happens that could be told to it.
    wait_until(lambda: not publisher.wants("faults"), "the stream is forgotten")


def test_streams_have_a_limit(plain: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twin_device.hub.console._MAX_STREAMS", 1)
    with closing(Stream(plain)) as stream:
        stream.record()
        with closing(Stream(plain)) as second:
            assert second.response.status == 503
            assert second.response.headers["iothub-errorcode"] == "ServiceUnavailable"


def test_a_quiet_stream_says_that_it_is_there(plain: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twin_device.hub.console._HEARTBEAT", 0.01)
    with closing(Stream(plain)) as stream:
        assert [stream.record() for _ in range(3)] == [{"": "listening"}, *[{"": "still here"}] * 2]


def test_a_listener_that_does_not_read_holds_nobody_up(plain: LocalHub) -> None:
    """Its events are bounded, and it is told what it missed when it reads again."""
    device = plain.create_device("dev", KEY)
    with socket.create_connection(("localhost", plain.http_port or 0), PATIENCE) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        deaf.sendall(
            b"GET /local/events?source=packets HTTP/1.1\r\nHost: localhost\r\nAuthorization: %b\r\n\r\n"
            % token().encode()
        )
        seen = b""
        while b"listening" not in seen:
            seen += deaf.recv(4096)
        with online(plain.mqtt_port) as wire:
            topic = "devices/dev/messages/events/"
            for _ in range(80):
                wire.send(*[publish(topic, b"x" * 2000) for _ in range(200)])
            wire.nothing_waits()
        assert len(device.telemetry) == 1000
        subscription = plain._endpoint.events._subscriptions[0]
        assert len(subscription._waiting) <= MAX_WAITING
        seen = b""
        while b"event: lost" not in seen:
            more = deaf.recv(65536)
            assert more, "the stream ended"
            seen = seen[-20:] + more


# ---------------------------------------------------------------------- our other requests


def test_who_may_ask(backend: Backend) -> None:
    backend.hub.create_device("dev")
    for method, path in (
        ("GET", "/local/devices"),
        ("GET", "/local/events"),
        ("GET", "/local/packets?deviceId=dev"),
        ("GET", "/local/faults"),
        ("POST", "/local/faults"),
        ("DELETE", "/local/faults"),
        ("DELETE", "/local/faults/1"),
        ("DELETE", "/local/sessions"),
        ("DELETE", "/local/connections/dev"),
    ):
        for policy in ("registryReadWrite", "device"):
            assert backend.ask(method, path, authorization=token(policy=policy)).status == 401
        assert backend.ask(method, path, authorization="none").status == 401
    assert backend.ask("GET", "/local/events?source=tweets").status == 400


def test_every_identitys_state_in_one_request(backend: Backend) -> None:
    hub = backend.hub
    hub.create_device("dev/m", KEY)
    hub.create_device("other").disable()
    with online(hub.mqtts_port, "dev/m", KEY, RES, ca_file=hub.ca_file):
        found = backend.ask("GET", "/local/devices").body
    assert sorted(found, key=lambda one: str(one["id"])) == [
        {"id": "dev", "connected": False, "enabled": True},
        {"id": "dev/m", "connected": True, "enabled": True},
        {"id": "other", "connected": False, "enabled": False},
    ]


def test_faults_over_http(backend: Backend) -> None:
    found = backend.ask("GET", "/local/faults").body
    assert found["kinds"].keys() == KINDS.keys()
    assert found["kinds"]["answer_late"] == {
        "text": KINDS["answer_late"].text,
        "parameters": {"seconds_late": 1.0},
        "ofOperations": True,
    }
    assert found["active"] == []
    wanted = {
        "kind": "answer_status",
        "device": "dev",
        "operation": "report",
        "times": 3,
        "seconds": 60,
        "parameters": {"status": 503},
    }
    made = backend.ask("POST", "/local/faults", wanted)
    assert made.status == 200
    assert made.body == {
        **wanted,
        "parameters": {"status": 503, "error_code": None, "body": None},
        "hits": 0,
        "id": made.body["id"],
    }
    other = backend.ask("POST", "/local/faults", {"kind": "quota"}).body
    assert backend.ask("GET", "/local/faults").body["active"] == [made.body, other]
    assert [fault.kind for fault in backend.hub.faults] == ["answer_status", "quota"]
    assert backend.ask("DELETE", f"/local/faults/{made.body['id']}").status == 204
    gone = backend.ask("DELETE", f"/local/faults/{made.body['id']}")
    assert (gone.status, gone.code) == (404, "FaultNotFound")
    assert [fault.kind for fault in backend.hub.faults] == ["quota"]
    assert backend.ask("DELETE", "/local/faults").status == 204
    assert backend.hub.faults == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        [],
        {},
        {"kind": "nonsense"},
        {"kind": []},
        {"kind": "quota", "parameters": {"x": 1}},
        {"kind": "quota", "parameters": 5},
        {"kind": "quota", "times": "often"},
        {"kind": "quota", "device": 5},
        {"kind": "quota", "operation": []},
        {"kind": "answer_late", "parameters": {"seconds_late": "long"}},
        {"kind": "quota", "more": 1},
        {"kind": "quota", "seconds": 1e400},
    ],
    ids=lambda body: f"{body!r:.50}",
)
def test_what_is_no_fault(backend: Backend, body: Any) -> None:
    answer = backend.ask("POST", "/local/faults", body)
    assert (answer.status, answer.code) == (400, "ArgumentInvalid")
    assert "No fault was set" in answer.body["Message"] or "deeply" in answer.body["Message"]
    assert backend.hub.faults == []


def test_hanging_handshakes_end_when_their_fault_is_cleared(backend: Backend) -> None:
    hub = backend.hub
    made = backend.ask("POST", "/local/faults", {"kind": "hanging_tls"}).body
    with socket.create_connection(("localhost", hub.mqtts_port or 0), PATIENCE) as raw:
        wait_until(lambda: hub.faults[0].hits, "it hangs")
        backend.ask("DELETE", f"/local/faults/{made['id']}")
        assert raw.recv(1) == b""


def test_packets_sessions_and_connections_over_http(backend: Backend) -> None:
    hub = backend.hub
    device = hub.create_device("dev/m", KEY)
    with online(hub.mqtts_port, "dev/m", KEY, RES, ca_file=hub.ca_file, clean=False) as wire:
        packets = backend.ask("GET", "/local/packets?deviceId=dev%2Fm").body
        assert [one["kind"] for one in packets] == ["CONNECT", "CONNACK", "SUBSCRIBE", "SUBACK"]
        assert packets[2]["topic"] == RES
        assert packets[0]["time"] <= packets[3]["time"] <= time.time()
        assert backend.ask("DELETE", "/local/sessions").status == 204
        wire.send(publish("$iothub/twin/GET/?$rid=1"))
        wire.nothing_waits()
        assert backend.ask("DELETE", "/local/connections/dev%2Fm").status == 204
        with pytest.raises(Closed):
            wire.packet()
    wait_until(lambda: not device.connected, "it is gone")
    for method, path in (("GET", "packets?deviceId=nobody"), ("DELETE", "connections/nobody")):
        assert backend.ask(method, f"/local/{path}").code == "DeviceNotFound"


def test_the_page_needs_no_token_and_allows_nothing_foreign(plain: LocalHub) -> None:
    url = plain.page_url
    assert url is not None
    assert url.startswith(f"http://localhost:{plain.http_port}/#SharedAccessSignature%20sr%3Dlocalhost")
    with closing(http.client.HTTPConnection("localhost", plain.http_port or 0, timeout=PATIENCE)) as asked:
        for path, kind in (("/", "html"), ("/page/page.js", "javascript"), ("/page/page.css", "css")):
            asked.request("GET", path)
            answer = asked.getresponse()
            answer.read()
            assert (answer.status, answer.headers["Content-Type"]) == (200, f"text/{kind}; charset=utf-8")
            assert answer.headers["Content-Security-Policy"].startswith(
                "default-src 'none'; script-src 'self'"
            )
        for path in ("/page/", "/page/../service.py", "/page/%2e%2e%2fservice.py", "/page/service.py"):
            asked.request("GET", path)
            answer = asked.getresponse()
            answer.read()
            assert answer.status == 404


def test_the_pages_token_is_the_owners(plain: LocalHub) -> None:
    plain.create_device("dev")
    sent = unquote((plain.page_url or "").partition("#")[2])
    with closing(http.client.HTTPConnection("localhost", plain.http_port or 0, timeout=PATIENCE)) as asked:
        asked.request("GET", "/devices", headers={"Authorization": sent})
        assert [one["deviceId"] for one in json.loads(asked.getresponse().read())] == ["dev"]


def test_without_http_there_is_no_page() -> None:
    with LocalHub(None) as hub:
        assert hub.page_url is None
