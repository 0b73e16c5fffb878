"""The twin's rules, as tables: what is stored, what is refused with which code, what the device is told."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.hub_wire import (
    DESIRED,
    GET,
    KEY,
    PINGREQ,
    REPORT,
    RES,
    Publish,
    Wire,
    connect,
    online,
    publish,
    token,
    user,
)
from twin_device.hub import Device, LocalHub, twins

EMPTY = b'{"desired":{"$version":1},"reported":{"$version":1}}'


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub(mqtts_port=None, mqtt_port=0) as hub:
        yield hub


@pytest.fixture(autouse=True)
def _no_devices_are_left(hub: LocalHub) -> Iterator[None]:
    yield
    for device in hub.devices:
        if "/" not in device.id:
            device.delete()


@pytest.fixture
def device(hub: LocalHub) -> Device:
    return hub.create_device("dev", KEY)


@pytest.fixture
def wire(hub: LocalHub, device: Device) -> Iterator[Wire]:
    with online(hub.mqtt_port) as wire:
        yield wire


def dumps(document: Any) -> bytes:
    return json.dumps(document).encode()


def report(wire: Wire, document: Any, tail: str = "") -> Publish:
    payload = document if isinstance(document, bytes) else dumps(document)
    return wire.ask(REPORT + "r" + tail, payload)


def nested(depth: int, innermost: Any = 1) -> Any:
    """That many objects in each other, the section itself not counted."""
    value = innermost
    for _ in range(depth + 1):
        value = {"l": value}
    return value


def of_size(size: int) -> dict[str, str]:
    """A document of so many bytes, in strings of 4,096 bytes at most, as the hub counts them."""
    document = {}
    while size:
        part = min(size, 4090)
        part = size - 100 if 0 < size - part < 10 else part
        name = f"{len(document):02d}"
        document[name] = "x" * (part - len(name))
        size -= part
    return document


# ---------------------------------------------------------------------- retrieve


def test_the_twin_of_a_new_identity(wire: Wire) -> None:
    assert wire.ask(GET + "1") == Publish("$iothub/twin/res/200/?$rid=1", EMPTY)


def test_the_twin_has_both_sections_and_nothing_else(wire: Wire, device: Device) -> None:
    device.patch_tags({"secret": "tag"})
    device.patch_desired({"a": {"b": [1, "ä", 1.5, True, {}]}})
    wire.message()
    report(wire, {"z": 1, "c": "\u4e2d"})
    assert (
        wire.ask(GET + "1").payload
        == (
            '{"desired":{"a":{"b":[1,"ä",1.5,true,{}]},"$version":2},'
            '"reported":{"z":1,"c":"\u4e2d","$version":2}}'
        ).encode()
    )


@pytest.mark.parametrize("payload", [b"", b" ", b"{}", b"null", b"\xff\0not json", b"x" * 100_000])
@pytest.mark.parametrize("topic", ["$iothub/twin/GET/?$rid=1", "$iothub/twin/GET?$rid=1"])
def test_the_payload_of_a_retrieve_does_not_matter(wire: Wire, topic: str, payload: bytes) -> None:
    assert wire.ask(topic, payload) == Publish("$iothub/twin/res/200/?$rid=1", EMPTY)


RIDS = {
    "a number": "1",
    "a UUID": "efc34c73-79ce-4054-9985-0cdf40a3c794",
    "every legal character that a topic may have": "aZ09-:.%_*?!(),=@;$'",
    "percent-encoded": "a%20b%26%2fc%2F",
    "percent signs that encode nothing": "%%zz%",
    "a blank": "a b",
    "a slash": "a/b/?c",
    "equals signs": "=a=b=",
    "not ASCII": "\u00e4\u4e2d\U0001f600",
    "long": "r" * 60_000,
}


@pytest.mark.parametrize("rid", RIDS.values(), ids=RIDS.keys())
def test_rid_comes_back_byte_for_byte(wire: Wire, rid: str) -> None:
    assert wire.ask(GET + rid).topic == "$iothub/twin/res/200/?$rid=" + rid
    assert wire.ask(REPORT + rid, b"{}") == Publish(f"$iothub/twin/res/204/?$rid={rid}&$version=2", b"")
    assert wire.ask(REPORT + rid, b"x").topic == "$iothub/twin/res/400/?$rid=" + rid


@pytest.mark.parametrize(
    "query",
    [
        "$rid=1",
        "$rid=1&x=y",
        "x=y&$rid=1",
        "x&$rid=1",
        "&$rid=1",
        "$rid=1&$rid=2",
        "%24rid=1",
        "$rid=1&$version=7",
    ],
)
def test_a_query_is_a_list_of_names_and_values(wire: Wire, query: str) -> None:
    assert wire.ask("$iothub/twin/GET/?" + query).topic == "$iothub/twin/res/200/?$rid=1"


# ---------------------------------------------------------------------- reported: what is stored


MERGES: dict[str, tuple[Any, Any, Any]] = {
    "a value is added": ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    "a value is replaced": ({"a": 1}, {"a": "x"}, {"a": "x"}),
    "null removes": ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
    "null of what is not there": ({"a": 1}, {"b": None}, {"a": 1}),
    "nothing": ({"a": 1}, {}, {"a": 1}),
    "the same value": ({"a": 1}, {"a": 1}, {"a": 1}),
    "objects merge": ({"o": {"a": 1, "b": 2}}, {"o": {"b": 3, "c": 4}}, {"o": {"a": 1, "b": 3, "c": 4}}),
    "null inside an object": ({"o": {"a": 1, "b": 2}}, {"o": {"a": None}}, {"o": {"b": 2}}),
    "the last member goes, its object stays": ({"o": {"a": 1}}, {"o": {"a": None}}, {"o": {}}),
    "null inside what is not there": ({}, {"p": {"q": None}}, {"p": {}}),
    "null inside what is not there, twice": ({"p": {}}, {"p": {"q": None}}, {"p": {}}),
    "nulls deeper in what is not there": ({}, {"p": {"q": {"r": None}, "s": 1}}, {"p": {"q": {}, "s": 1}}),
    "null inside a scalar": ({"p": 1}, {"p": {"q": None}}, {"p": {}}),
    "an empty object over a full one": ({"o": {"a": 1}}, {"o": {}}, {"o": {"a": 1}}),
    "an empty object over a scalar": ({"o": 1}, {"o": {}}, {"o": {}}),
    "an object becomes a scalar": ({"o": {"a": 1}}, {"o": 1}, {"o": 1}),
    "a scalar becomes an object": ({"o": 1}, {"o": {"a": 1}}, {"o": {"a": 1}}),
    "an object goes whole": ({"o": {"a": {"b": 1}}, "x": 1}, {"o": None}, {"x": 1}),
    "arrays are replaced": ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
    "an array becomes an object": ({"a": [1]}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    "an object becomes an array": ({"a": {"b": 1}}, {"a": [{"b": 1}]}, {"a": [{"b": 1}]}),
    "an empty array": ({}, {"a": []}, {"a": []}),
    "a sibling survives a nested null": ({"k": {"x": 1, "y": 2}}, {"k": {"y": None}}, {"k": {"x": 1}}),
    "keys are case-sensitive": ({"a": 1}, {"A": 2}, {"a": 1, "A": 2}),
    "false and 0 and empty text are values": (
        {},
        {"a": False, "b": 0, "c": ""},
        {"a": False, "b": 0, "c": ""},
    ),
}


@pytest.mark.parametrize(("before", "patch", "after"), MERGES.values(), ids=MERGES.keys())
def test_reports_merge(wire: Wire, device: Device, before: Any, patch: Any, after: Any) -> None:
    report(wire, before)
    # Every accepted patch counts, also one that changes nothing.
    assert report(wire, patch) == Publish("$iothub/twin/res/204/?$rid=r&$version=3", b"")
    assert device.reported == after
    assert device.reported_version == 3
    whole = wire.ask(GET + "1").payload
    assert json.loads(whole) == {"desired": {"$version": 1}, "reported": {**after, "$version": 3}}
    wire.nothing_waits()


STORED: dict[str, Any] = {
    "the largest integer": {"a": 2**52 - 1},
    "the smallest integer": {"a": -(2**52)},
    "a large number with a fraction": {"a": 1.5e300},
    "a tiny number": {"a": -1e-300},
    "a string of 4096 bytes": {"a": "x" * 4096},
    "a string of 4096 bytes that are not ASCII": {"a": "\u00e4" * 2048},
    "a string with control characters": {"a": "\0\x01\x7f\x9f\n"},
    "a string with an emoji": {"a": "\U0001f600"},
    "a key of 1024 bytes": {"k" * 1024: 1},
    "a key of 1024 bytes that are not ASCII": {"\u00e4" * 512: 1},
    "a key with every other character": {"!\"%&'()*+,-/:;<=>?@[\\]^_`{|}~\u00a0\u00ad\U0001f600": 1},
    "an empty key": {"": 1},
    "keys that look like others": {"version": 1, "__proto__": 2, "null": 3},
    "ten levels of objects": nested(10),
    "nine levels of objects and an array": nested(9, [1]),
    "ten levels of arrays": {"a": [[[[[[[[[[1]]]]]]]]]]},
    "ten levels, the last one empty": nested(9, {}),
    "an array of all kinds": {"a": [1, "x", True, 1.5, {"b": []}, []]},
    "32768 bytes": of_size(32768),
    "32768 bytes and control characters, which do not count": {
        **of_size(32768 - 6),
        "a": "\0\n\x7f\u0085" + "x" * 5,
    },
    "a thousand numbers of 8 bytes": {"n" * 16: {f"{n:03d}": 10**15 + n for n in range(1000)}},
}


@pytest.mark.parametrize("document", STORED.values(), ids=STORED.keys())
def test_what_is_within_the_limits_is_stored(wire: Wire, device: Device, document: Any) -> None:
    answer = report(wire, document)
    assert answer.topic == "$iothub/twin/res/204/?$rid=r&$version=2", answer.payload
    assert device.reported == document
    assert device.patch_desired(document) == 2
    told = json.loads(wire.message().payload)
    assert told.pop("$version") == 2
    assert told == document == device.desired


# ---------------------------------------------------------------------- reported: what is refused


BAD_JSON: dict[str, bytes] = {
    "empty": b"",
    "a blank": b" ",
    "no JSON": b"hello",
    "JSON that ends early": b'{"a":',
    "JSON and more": b'{"a":1}{"b":2}',
    "single quotes": b"{'a':1}",
    "a trailing comma": b'{"a":1,}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":-Infinity}',
    "a number that is too large for a double": b'{"a":1e999}',
    "Latin-1": b'{"a":"\xe4"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "UTF-8 with a mark": b'\xef\xbb\xbf{"a":1}',
    "a surrogate in UTF-8": b'{"a":"\xed\xa0\x80"}',
    "half a surrogate pair, escaped": b'{"a":"\\ud800"}',
    "half a surrogate pair, escaped, in a key": b'{"\\udc00":1}',
    "a raw line feed in a string": b'{"a":"\n"}',
    "an integer of five thousand digits": b'{"a":' + b"1" * 5000 + b"}",
    "brackets without end": b'{"a":' + b"[" * 100_000,
    "a member twice": b'{"a":1,"a":1}',
    "a member twice, in an array": b'{"a":[{"b":1,"b":2}]}',
    "an array": b"[]",
    "a string": b'"a"',
    "a number": b"1",
    "null": b"null",
    "true": b"true",
}
BAD_VALUES: dict[str, Any] = {
    "an integer too large": {"a": 2**52},
    "an integer too small": {"a": -(2**52) - 1},
    "an integer as seen in the service's tests": {"a": 5283920058631410000},
    "an integer too large in an array": {"a": [2**52]},
    "a string of 4097 bytes": {"a": "x" * 4097},
    "a string of 4096 characters and more bytes": {"a": "x" * 4095 + "\u00e4"},
    "a string of 4097 bytes in an array": {"a": ["x" * 4097]},
    "null in an array": {"a": [None]},
    "null in an object in an array": {"a": [{"b": None}]},
    "null in an array in an array": {"a": [[None]]},
    "eleven levels of objects": nested(11),
    "ten levels of objects and an array": nested(10, [1]),
    "ten levels of objects and an empty object": nested(10, {}),
    "eleven levels of arrays": {"a": [[[[[[[[[[[1]]]]]]]]]]]},
    "objects and arrays, eleven levels": {
        "a": [{"b": [{"c": [{"d": [{"e": [{"f": 1}]}]}]}]}, {"g": nested(9)}]
    },
    "a key of 1025 bytes": {"k" * 1025: 1},
    "a key of 1024 characters and more bytes": {"k" * 1023 + "\u00e4": 1},
    "a key with a dollar sign": {"a$": 1},
    "a key with a dot": {"a.b": 1},
    "a key with a blank": {"a b": 1},
    "a key with a number sign": {"a#": 1},
    "a key with a line feed": {"a\n": 1},
    "a key with U+0000": {"\0": 1},
    "a key with U+001F": {"\x1f": 1},
    "a key with U+007F": {"\x7f": 1},
    "a key with U+0080": {"\x80": 1},
    "a key with U+009F": {"\x9f": 1},
    "the version, echoed": {"$version": 1},
    "the metadata, echoed": {"$metadata": {}},
    "a dollar sign in a nested key": {"o": {"$guid": 1}},
    "a bad key in an object in an array": {"a": [{"b.c": 1}]},
    "a bad key with null": {"a.b": None},
    "a bad key under what null removes": {"o": {"p": None, "q r": None}},
}


def test_refused(wire: Wire, device: Device) -> None:
    """One connection and one twin for all, which must be as good as new behind every one of them."""
    report(wire, {"good": {"before": 1}})
    cases = [(name, payload, 400006) for name, payload in BAD_JSON.items()]
    cases += [(name, dumps(document), 400004) for name, document in BAD_VALUES.items()]
    for name, payload, code in cases:
        answer = report(wire, payload)
        assert answer.topic == "$iothub/twin/res/400/?$rid=r", name
        assert json.loads(answer.payload)["errorCode"] == code, name
    assert device.reported == {"good": {"before": 1}}
    assert device.reported_version == 2
    wire.nothing_waits()


@pytest.mark.parametrize("document", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_refused_reports_change_nothing(wire: Wire, device: Device, document: Any) -> None:
    report(wire, {"good": {"before": 1}})
    answer = report(wire, {"good": {"before": 2, "after": 3}, "first": True, **document, "last": True})
    assert answer.topic == "$iothub/twin/res/400/?$rid=r"
    assert json.loads(answer.payload)["errorCode"] == 400004
    assert device.reported == {"good": {"before": 1}}
    # Refused to the back end as well, for both of what it may write.
    for write in (device.patch_desired, device.replace_desired, device.patch_tags):
        if document.keys() & {"$version", "$metadata"} and write != device.patch_tags:
            continue  # a whole twin sent back: not written, see below
        with pytest.raises(ValueError, match=r"."):
            write({"first": True, **document})
    with pytest.raises(ValueError, match=r"."):
        device._hub.create_device("new", desired=document)
    assert (device.desired, device.twin["tags"], device.desired_version) == ({}, {}, 1)
    assert "new" not in [one.id for one in device._hub.devices]
    wire.nothing_waits()


def test_the_size_is_that_of_the_result(wire: Wire, device: Device) -> None:
    assert "/204/" in report(wire, of_size(32768)).topic
    for patch in ({"a": 1}, {"b": ""}, {"00": device.reported["00"] + "y"}, {"o": {}}, {"t": True}):
        answer = report(wire, patch)
        assert answer.topic == "$iothub/twin/res/403/?$rid=r", patch
        error = json.loads(answer.payload)
        assert error["errorCode"] == 403100
        assert error["message"] == "'Properties.Reported' size should be less than 32768 bytes."
    assert device.reported == of_size(32768)
    # What goes makes room in the same patch.
    assert "/204/" in report(wire, {"00": None, "a": 1}).topic


COUNTED: list[tuple[Any, int]] = [
    ({"abc": "de"}, 5),
    ({"\u00e4": "\u00e4"}, 4),
    ({"a": 1}, 9),
    ({"a": 123456.5}, 9),
    ({"a": True}, 5),
    ({"a": {}}, 1),
    ({"a": {"bc": "d"}}, 4),
    ({"a": [1, "xy", False, {"b": 1}]}, 24),
    ({"a": "x\0\n\x7f\u0085y"}, 3),
]


@pytest.mark.parametrize(("document", "size"), COUNTED, ids=str)
@pytest.mark.parametrize("extra", [0, 1])
def test_what_counts_as_a_byte(wire: Wire, device: Device, document: Any, size: int, extra: int) -> None:
    rest = of_size(32768 - size + extra)
    status = "403" if extra else "204"
    assert f"/{status}/" in report(wire, {**rest, **document}).topic
    if extra:
        with pytest.raises(ValueError, match=r"'Properties\.Desired' size should be less than 32768 bytes"):
            device.patch_desired({**rest, **document})
    else:
        device.patch_desired({**rest, **document})


def test_tags_are_smaller(device: Device) -> None:
    device.patch_tags(of_size(8192))
    with pytest.raises(ValueError, match="8192"):
        device.patch_tags({"a": 1})
    assert device.twin["tags"] == of_size(8192)


def test_what_a_device_is_created_with_has_the_same_limits(hub: LocalHub) -> None:
    for options in ({"desired": of_size(32769)}, {"tags": of_size(8193)}, {"desired": {"a": None}}):
        with pytest.raises(ValueError, match=r"."):
            hub.create_device("new", **options)  # type: ignore[arg-type]  # one of two
        with pytest.raises(KeyError):
            hub.device("new")
    hub.create_device("new", desired=of_size(32768), tags=of_size(8192)).delete()


# ---------------------------------------------------------------------- reported: conditions and answers


def test_a_condition_on_the_version(wire: Wire, device: Device) -> None:
    report(wire, {"a": 1})
    for version in (0, 1, 3, 10**18):
        answer = report(wire, {"a": 2}, f"&$version={version}")
        assert answer.topic == "$iothub/twin/res/412/?$rid=r"
        assert json.loads(answer.payload)["errorCode"] == 412001
    assert device.reported == {"a": 1}
    assert report(wire, {"a": 2}, "&$version=2").topic == "$iothub/twin/res/204/?$rid=r&$version=3"
    assert wire.ask("$iothub/twin/PATCH/properties/reported/?$version=3&$rid=q", b"{}").topic.startswith(
        "$iothub/twin/res/204/?$rid=q"
    )
    assert report(wire, b"no json", "&$version=1").topic == "$iothub/twin/res/400/?$rid=r"


@pytest.mark.parametrize("query", ["", "$rid=", "x=y", "$version=1"])
def test_a_report_without_rid_is_done_and_not_answered(wire: Wire, device: Device, query: str) -> None:
    wire.send(publish("$iothub/twin/PATCH/properties/reported/?" + query, b'{"a":1}')).nothing_waits()
    wire.send(publish("$iothub/twin/PATCH/properties/reported/?" + query, b"no json")).nothing_waits()
    assert device.reported == {"a": 1}


@pytest.mark.parametrize("filters", [(), (DESIRED,)])
def test_who_is_not_subscribed_is_not_answered(
    hub: LocalHub, device: Device, filters: tuple[str, ...]
) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.connect()
        if filters:
            wire.subscribe(*filters)
        wire.send(publish(REPORT + "1", b'{"a":1}'), publish(GET + "2"), publish(REPORT + "3", b"x"))
        wire.nothing_waits()
        assert device.reported == {"a": 1}


def test_puback_and_answer_of_qos_1(wire: Wire) -> None:
    wire.send(publish(REPORT + "1", b"{}", qos=1, packet_id=9), publish(GET + "2", qos=1, packet_id=9))
    assert wire.packet() == (0x40, b"\0\x09")
    assert wire.message().topic == "$iothub/twin/res/204/?$rid=1&$version=2"
    assert wire.packet() == (0x40, b"\0\x09")
    assert wire.message().topic == "$iothub/twin/res/200/?$rid=2"
    # A refused one is received all the same.
    wire.send(publish(REPORT + "3", b"no json", qos=1, packet_id=10))
    assert wire.packet() == (0x40, b"\0\x0a")
    assert wire.message().topic == "$iothub/twin/res/400/?$rid=3"


@pytest.mark.parametrize("tail", ["", "/", "/?", "/?DeviceClientType=x", "/?api-version=", "/?x=api-version"])
def test_without_api_version_reports_are_refused(hub: LocalHub, device: Device, tail: str) -> None:
    with Wire(hub.mqtt_port) as wire:
        wire.send(connect("dev", user(tail=tail), token()))
        assert wire.packet() == (0x20, b"\0\0")
        wire.subscribe(RES)
        assert wire.ask(GET + "1").payload == EMPTY
        answer = report(wire, {"a": 1})
        assert answer.topic == "$iothub/twin/res/400/?$rid=r"
        assert isinstance(json.loads(answer.payload)["errorCode"], int)
    assert device.reported_version == 1


def test_the_body_of_an_error(wire: Wire) -> None:
    body = json.loads(report(wire, b"x").payload)
    assert list(body) == ["errorCode", "trackingId", "message", "timestampUtc"]
    assert type(body["errorCode"]) is int
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", body["timestampUtc"])
    assert "TimeStamp:" in body["trackingId"]
    assert body["message"]


# 32,768 bytes of text, punctuation and all; the documented formula does not count that.
TEXT_OF_32768 = {"a": 1, **{f"k{n}": "x" * 4000 for n in range(8)}, "z": "x" * 690}
SETTINGS: list[tuple[dict[str, Any], Any, str, int | None]] = [
    ({"error_body": "empty"}, b"no json", "400", None),
    ({"error_body": "empty"}, of_size(32769), "403", None),
    ({"size_code": 400004}, of_size(32769), "400", 400004),
    ({"size_code": 413001}, of_size(32769), "413", 413001),
    ({}, of_size(32769), "403", 403100),
    ({}, b'{"a#b": 1}', "400", 400004),
    ({"size_rule": "text"}, TEXT_OF_32768, "204", None),
    ({"size_rule": "text"}, {**TEXT_OF_32768, "a": 10}, "403", 403100),
    ({"size_rule": "text", "size_code": 413001}, {**TEXT_OF_32768, "a": 10}, "413", 413001),
    ({"hash_in_keys": True}, {"a#b": {"#": 1}}, "204", None),
    ({"hash_in_keys": True}, {"a#b": {"$": 1}}, "400", 400004),
]


@pytest.mark.parametrize(("settings", "document", "status", "code"), SETTINGS)
def test_what_sources_do_not_agree_on(
    settings: dict[str, Any], document: Any, status: str, code: int | None
) -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0, **settings) as hub:
        hub.create_device("dev", KEY)
        with online(hub.mqtt_port) as wire:
            answer = report(wire, document)
    tail = "&$version=2" if status == "204" else ""
    assert answer.topic == f"$iothub/twin/res/{status}/?$rid=r{tail}"
    assert (answer.payload == b"") if code is None else (json.loads(answer.payload)["errorCode"] == code)


def test_a_hash_in_a_key_is_taken_where_the_hub_is_set_to() -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0, hash_in_keys=True) as hub:
        device = hub.create_device("dev", KEY)
        with online(hub.mqtt_port) as wire:
            report(wire, b'{"a#b": 1}')
        assert device.reported == {"a#b": 1}


def test_the_back_end_is_held_to_the_same_rules() -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0, hash_in_keys=True, size_rule="text") as hub:
        device = hub.create_device("dev", KEY, desired={"#": 1}, tags={"#": 1})
        assert device.patch_desired({"a#": 1}) == 2
        assert device.replace_desired({"b#": TEXT_OF_32768["k0"]}) == 3
        device.patch_tags({"a#": 1})
        for write in (device.patch_desired, device.replace_desired):
            with pytest.raises(ValueError, match="32768"):
                write({**TEXT_OF_32768, "a": 10})
        with pytest.raises(ValueError, match="32768"):
            hub.create_device("big", desired={**TEXT_OF_32768, "a": 10})
        younger = hub.snapshot()
        for start_over in (device.recreate, lambda: hub.fail_over({}), lambda: hub.fail_over(younger)):
            start_over()
            device.patch_desired({"c#": 1})


def test_a_retrieve_with_properties_around_the_sections() -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0, retrieve_body="properties") as hub:
        hub.create_device("dev", KEY, desired={"a": 1})
        with online(hub.mqtt_port) as wire:
            body = json.loads(wire.ask(GET + "1").payload)
    assert body == {"properties": {"desired": {"a": 1, "$version": 1}, "reported": {"$version": 1}}}


# ---------------------------------------------------------------------- desired


# The document before, the back end's patch, what the device is told (None: nothing), the document after.
PATCHES: dict[str, tuple[Any, Any, Any, Any]] = {
    "a new value": ({"a": 1}, {"b": 2}, {"b": 2}, {"a": 1, "b": 2}),
    "an equal value": ({"a": 1}, {"a": 1}, {"a": 1}, {"a": 1}),
    "an equal object": ({"o": {"a": 1}}, {"o": {"a": 1}}, {"o": {"a": 1}}, {"o": {"a": 1}}),
    "an equal array": ({"a": [1]}, {"a": [1]}, {"a": [1]}, {"a": [1]}),
    "null of what is there": ({"a": 1, "b": 2}, {"a": None}, {"a": None}, {"b": 2}),
    "null of what is not there": ({"a": 1}, {"b": None}, None, {"a": 1}),
    "nested null of what is not there": ({"o": {}}, {"o": {"b": None}}, None, {"o": {}}),
    "null inside what is not there": ({}, {"o": {"b": None}}, {"o": {"b": None}}, {"o": {}}),
    "null inside a scalar": ({"o": 1}, {"o": {"b": None}}, {"o": {"b": None}}, {"o": {}}),
    "nested null of what is there": ({"o": {"b": 1}}, {"o": {"b": None}}, {"o": {"b": None}}, {"o": {}}),
    "nulls of what is and is not there": ({"a": 1}, {"a": None, "b": None}, {"a": None, "b": None}, {}),
    "nothing": ({"a": 1}, {}, None, {"a": 1}),
    "an empty object over an empty one": ({"o": {}}, {"o": {}}, None, {"o": {}}),
    "an empty object over a full one": ({"o": {"a": 1}}, {"o": {}}, None, {"o": {"a": 1}}),
    "an empty object that is new": ({}, {"o": {}}, {"o": {}}, {"o": {}}),
    "a whole twin's section sent back": (
        {"a": 1},
        {"a": 2, "$version": 77, "$metadata": {"$lastUpdated": "x", "a": {}}},
        {"a": 2},
        {"a": 2},
    ),
    "only the hub's own": ({"a": 1}, {"$version": 77}, None, {"a": 1}),
}
PUTS: dict[str, tuple[Any, Any, Any]] = {
    "as observed": ({"a": 1, "b": 2}, {"a": 1, "c": 100}, {"b": None, "a": 1, "c": 100}),
    "the same document": ({"a": 1}, {"a": 1}, {"a": 1}),
    "nothing is left": ({"a": 1, "o": {"b": 1}}, {}, {"a": None, "o": None}),
    "from nothing": ({}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    "inside objects": (
        {"o": {"a": 1, "p": {"x": 1, "y": 2}}},
        {"o": {"p": {"y": 2, "z": 3}, "q": 1}},
        {"o": {"a": None, "p": {"x": None, "y": 2, "z": 3}, "q": 1}},
    ),
    "an object becomes a scalar": ({"o": {"a": 1}}, {"o": 1}, {"o": 1}),
    "a scalar becomes an object": ({"o": 1}, {"o": {"a": 1}}, {"o": {"a": 1}}),
    "an array": ({"a": [1, 2]}, {"a": [{"b": 1}]}, {"a": [{"b": 1}]}),
    "an object becomes empty": ({"o": {"a": 1}}, {"o": {}}, {"o": {"a": None}}),
}


def told(wire: Wire, version: int) -> Any:
    """The next notification, whose topic and body agree on this version."""
    got = wire.message()
    assert got[0] == f"$iothub/twin/PATCH/properties/desired/?$version={version}"
    assert got[2:] == (0, False, False, 0)
    body = json.loads(got.payload)
    assert list(body)[-1] == "$version"
    assert body.pop("$version") == version
    return body


def service_version(device: Device) -> tuple[str, int, int, int]:
    twin = device.twin
    properties = twin["properties"]
    return (
        twin["etag"],
        twin["version"],
        properties["desired"]["$version"],
        properties["reported"]["$version"],
    )


@pytest.mark.parametrize(("before", "patch", "shown", "after"), PATCHES.values(), ids=PATCHES.keys())
def test_patches_of_the_back_end(hub: LocalHub, before: Any, patch: Any, shown: Any, after: Any) -> None:
    device = hub.create_device("new", KEY, desired=before)
    kept = json.dumps(patch)
    with online(hub.mqtt_port, "new") as wire:
        version = device.patch_desired(patch)
        if shown is None:
            wire.nothing_waits()
            assert version == 1
        else:
            assert told(wire, 2) == shown
            assert version == 2
        assert device.desired == after
        assert json.loads(wire.ask(GET + "1").payload)["desired"] == {**after, "$version": version}
    assert json.dumps(patch) == kept


@pytest.mark.parametrize(("before", "document", "shown"), PUTS.values(), ids=PUTS.keys())
def test_replacements_by_the_back_end(hub: LocalHub, before: Any, document: Any, shown: Any) -> None:
    device = hub.create_device("new", KEY, desired=before)
    with online(hub.mqtt_port, "new") as wire:
        assert device.replace_desired(document) == 2
        assert told(wire, 2) == shown
    assert device.desired == document


def test_a_replacement_holds_no_nulls(device: Device) -> None:
    for document in ({"a": None}, {"o": {"a": None}}):
        with pytest.raises(ValueError, match="cannot be null"):
            device.replace_desired(document)
    with pytest.raises(ValueError, match="32768"):
        device.replace_desired(of_size(32769))
    assert device.desired_version == 1


@pytest.mark.parametrize(
    "document", [None, 1, "x", [], {"a": {1, 2}}, {"a": (1,)}, {1: 2}, {"a": float("nan")}]
)
def test_what_is_no_document_of_json(device: Device, document: Any) -> None:
    for write in (device.patch_desired, device.replace_desired, device.patch_tags):
        with pytest.raises(ValueError, match=r"."):
            write(document)
    assert service_version(device) == ("AAAAAAAAAAE=", 2, 1, 1)


def test_a_document_that_nests_without_end_is_refused_like_any_other(device: Device) -> None:
    document: dict[str, Any] = {}
    for _ in range(100_000):
        document = {"a": document}
    itself: dict[str, Any] = {}
    itself["a"] = itself
    for one in (document, itself):
        for write in (device.patch_desired, device.replace_desired, device.patch_tags):
            with pytest.raises(ValueError, match="nest deeper"):
                write(one)
    assert service_version(device) == ("AAAAAAAAAAE=", 2, 1, 1)


def test_documents_are_the_hubs_own(device: Device) -> None:
    mine: dict[str, Any] = {"o": {"a": [1]}}
    device.patch_desired(mine)
    device.patch_tags(mine)
    mine["o"]["a"].append(2)
    device.desired["o"]["a"].append(3)
    device.twin["tags"]["o"]["a"].append(4)
    device.twin["properties"]["desired"]["o"].clear()
    assert device.desired == device.twin["tags"] == {"o": {"a": [1]}}


def test_tags_are_not_the_devices_business(wire: Wire, device: Device) -> None:
    device.patch_tags({"site": {"floor": 1, "room": 2}})
    device.patch_tags({"site": {"room": None}})
    wire.nothing_waits()
    assert device.twin["tags"] == {"site": {"floor": 1}}
    assert service_version(device) == ("AAAAAAAAAAM=", 4, 1, 1)
    assert wire.ask(GET + "1").payload == EMPTY


def test_the_arithmetic_of_versions(wire: Wire, device: Device) -> None:
    assert service_version(device) == ("AAAAAAAAAAE=", 2, 1, 1)
    device.patch_desired({"a": 1})
    assert service_version(device) == ("AAAAAAAAAAI=", 3, 2, 1)
    wire.message()
    report(wire, {"a": 1})
    assert service_version(device) == ("AAAAAAAAAAI=", 4, 2, 2)
    device.patch_tags({"t": 1})
    assert service_version(device) == ("AAAAAAAAAAM=", 5, 2, 2)
    device.replace_desired({"b": 1})
    assert service_version(device) == ("AAAAAAAAAAQ=", 6, 3, 2)
    wire.message()
    report(wire, b"refused")
    assert service_version(device) == ("AAAAAAAAAAQ=", 6, 3, 2)
    for _ in range(18):
        device.patch_desired({"a": 1})
    assert service_version(device) == ("AAAAAAAAABY=", 24, 21, 2)  # as in a public dump


STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z"


def shape(metadata: Any) -> Any:
    """Metadata with its times checked and left out."""
    assert re.fullmatch(STAMP, metadata["$lastUpdated"])
    return {
        key: value if key.startswith("$") else shape(value)
        for key, value in metadata.items()
        if key != "$lastUpdated"
    }


def test_metadata(hub: LocalHub) -> None:
    device = hub.create_device("new", KEY, desired={"a": 1, "o": {"x": 1, "y": [1, {"z": 1}]}})
    properties = device.twin["properties"]
    assert shape(properties["desired"]["$metadata"]) == {"a": {}, "o": {"x": {}, "y": {}}}
    assert shape(properties["reported"]["$metadata"]) == {}
    before = properties["desired"]["$metadata"]
    device.patch_desired({"o": {"x": 2, "y": None}, "n": {"m": 1}})
    after = device.twin["properties"]["desired"]["$metadata"]
    two = {"$lastUpdatedVersion": 2}
    assert shape(after) == {**two, "a": {}, "o": {**two, "x": two}, "n": {**two, "m": two}}
    assert after["a"] == before["a"]
    assert after["o"]["x"]["$lastUpdated"] >= before["o"]["x"]["$lastUpdated"]
    assert after["$lastUpdated"] == after["o"]["$lastUpdated"] == after["o"]["x"]["$lastUpdated"]
    # A scalar has no children's metadata, a replaced document none of what is gone.
    device.patch_desired({"o": 1, "n": {"m": {"deep": 1}}})
    three = {"$lastUpdatedVersion": 3}
    assert shape(device.twin["properties"]["desired"]["$metadata"]) == {
        **three,
        "a": {},
        "o": three,
        "n": {**three, "m": {**three, "deep": three}},
    }
    device.replace_desired({"o": {"p": 1}})
    four = {"$lastUpdatedVersion": 4}
    assert shape(device.twin["properties"]["desired"]["$metadata"]) == {**four, "o": {**four, "p": four}}
    with online(hub.mqtt_port, "new") as wire:
        report(wire, {"a": {"b": 1}, "c": None})
        report(wire, {"a": {"d": 1}, "e": 1})
        assert shape(device.twin["properties"]["reported"]["$metadata"]) == {"a": {"b": {}, "d": {}}, "e": {}}


def test_the_whole_twin_as_the_back_end_sees_it(hub: LocalHub) -> None:
    module = hub.create_device("new/mod", KEY, tags={"t": 1})
    twin = module.twin
    assert (twin["deviceId"], twin["moduleId"], twin["status"]) == ("new", "mod", "enabled")
    assert (twin["connectionState"], twin["modelId"], twin["tags"]) == ("Disconnected", "", {"t": 1})
    with Wire(hub.mqtt_port) as wire:
        name = user("new/mod", tail="/?api-version=2021-04-12&model-id=dtmi%3Acom%3Ax%3B1")
        assert wire.send(connect("new/mod", name, token("new/mod"))).packet() == (0x20, b"\0\0")
        twin = module.twin
        assert (twin["connectionState"], twin["modelId"]) == ("Connected", "dtmi:com:x;1")
    device = hub.device("new")
    assert "moduleId" not in device.twin
    device.disable()
    assert device.twin["status"] == "disabled"
    json.dumps(device.twin)
    hub.device("new").delete()
    for gone in (device, module):
        with pytest.raises(KeyError):
            _ = gone.twin


# ---------------------------------------------------------------------- two patches in one


KEYS = st.sampled_from("abc")
LEAVES = st.sampled_from([None, 1, "x", [1]])
ANY_PATCH = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=3),
    lambda inner: st.dictionaries(KEYS, inner | LEAVES, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(before=ANY_PATCH, first=ANY_PATCH, second=ANY_PATCH)
@example({"a": {"b": 1}}, {"a": None}, {"a": {"c": 2}})
@example({"a": {"b": 1}}, {"a": 5}, {"a": {"c": 2}})
@example({"a": {"b": {"c": 1}}}, {"a": {"b": None}}, {"a": {"b": {"d": 1}}})
@example({"a": {"b": 1}}, {"a": None}, {"a": {}})
@example({"a": {"b": {"c": 1}}}, {"a": None}, {"a": {"b": {"d": 1}}})
def test_a_joined_patch_does_what_both_do(before: Any, first: Any, second: Any) -> None:
    before = twins.merged({}, before)  # a document has no nulls
    both = twins.merged(twins.merged(before, first), second)
    assert twins.merged(before, twins.joined(before, first, second)) == both


# ---------------------------------------------------------------------- the size of what is reported

LARGE = st.sampled_from([None, "", "x" * 3700, "x" * 4096])
LARGE_PATCH = st.dictionaries(
    st.sampled_from("abcdef"), LARGE | st.dictionaries(KEYS, LARGE, min_size=2), min_size=3
)


@pytest.mark.parametrize("rule", ["values", "text"])
@settings(deadline=None)
@given(patches=st.lists(LARGE_PATCH, max_size=12))
def test_reports_are_refused_exactly_when_the_document_would_be_too_large(rule: str, patches: Any) -> None:
    twin = twins.Twin(rules=twins.Rules(size_rule=rule))
    held: twins.Document = {}
    for patch in patches:
        result = twins.merged(held, patch)
        size = len(twins.encode(result)) if rule == "text" else twins.size(result)
        if size > twins.MAX_SECTION:
            with pytest.raises(twins.Invalid, match="size should be less"):
                twin.patch_reported(twins.encode(patch), None)
        else:
            twin.patch_reported(twins.encode(patch), None)
            held = result
        assert twin.reported == held


# ---------------------------------------------------------------------- starting over


def test_recreate_starts_over(hub: LocalHub, device: Device) -> None:
    device.patch_desired({"a": 1})
    device.patch_tags({"t": 1})
    with online(hub.mqtt_port, clean=False) as wire:
        report(wire, {"a": 1})
        device.recreate()
        assert wire.rest() == b""
    assert service_version(device) == ("AAAAAAAAAAE=", 2, 1, 1)
    with Wire(hub.mqtt_port) as wire:
        assert wire.connect(clean=False) == 0  # with the same key
        wire.subscribe(RES)
        assert wire.ask(GET + "1").payload == EMPTY


def test_fail_over_restores_what_was(hub: LocalHub, device: Device) -> None:
    young, old = hub.create_device("young", KEY), hub.create_device("old", KEY)
    young.delete()
    device.patch_desired({"a": 1})
    snapshot = hub.snapshot()
    young = hub.create_device("young", KEY, desired={"b": 1})
    device.patch_desired({"a": 2})
    old.delete()
    with online(hub.mqtt_port) as wire, online(hub.mqtt_port, "young") as other:
        report(wire, {"lost": True})
        hub.fail_over(snapshot)
        assert wire.rest() == other.rest() == b""
    for _ in range(2):  # a snapshot may be used again
        assert (device.desired, device.desired_version, device.reported) == ({"a": 1}, 2, {})
        assert (young.desired, young.desired_version) == ({}, 1)
        assert device.patch_desired({"a": 3}) == 3
        hub.fail_over(snapshot)
    with pytest.raises(KeyError):
        hub.device("old")


# ---------------------------------------------------------------------- throttling


def statuses(wire: Wire, topic: str, count: int) -> list[str]:
    wire.send(b"".join(publish(f"{topic}{number}", b"{}") for number in range(count)))
    return [wire.message().topic.split("/")[3] for _ in range(count)]


def test_the_hub_throttles_reads_and_updates_apart() -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0, throttle=(5, 3)) as hub:
        device = hub.create_device("dev", KEY)
        hub.create_device("other", KEY)
        with online(hub.mqtt_port) as wire, online(hub.mqtt_port, "other") as other:
            assert statuses(wire, REPORT, 4) == ["204"] * 3 + ["429"]
            # For the whole hub.
            answer = other.ask(REPORT + "x", b"{}")
            assert answer.topic == "$iothub/twin/res/429/?$rid=x"
            assert json.loads(answer.payload)["errorCode"] == 429001
            assert statuses(wire, GET, 6) == ["200"] * 5 + ["429"]
            # The bucket fills again.
            tries = 0
            while statuses(wire, REPORT, 1) != ["204"]:
                tries += 1
                assert tries < 100_000
            assert device.reported_version == 5


def test_less_than_one_a_second_is_one_at_first() -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0, throttle=(0.01, 0)) as hub:
        hub.create_device("dev", KEY)
        with online(hub.mqtt_port) as wire:
            assert statuses(wire, GET, 2) == ["200", "429"]
            assert statuses(wire, REPORT, 1) == ["429"]


def test_without_a_throttle_anything_goes(wire: Wire) -> None:
    assert statuses(wire, REPORT, 500) == ["204"] * 500
    assert wire.send(PINGREQ).packet() == (0xD0, b"")
