"""What is fuzzed, and what must hold of any bytes: a target raises only if a promise is broken."""

import contextlib
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.vm import board_mqtt
from twin_device.core import settings, topics, twin
from twin_device.core.credentials import from_connection_string
from twin_device.core.errors import LocalError, PatchError, RemoteError, TwinError
from twin_device.core.patch import check, compose, diff, dumps, loads, merge, same, size
from twin_device.core.stream import reader
from twin_device.store import _WHOLE, _decode

_VECTORS = Path(__file__).parents[1] / "vectors"


_KEY = "MDEyMzQ1Njc4OWFiY2RlZg=="


class Broken(Exception):
    """A promise is broken; the input is a crasher."""


class Target(NamedTuple):
    """run: takes one input. seeds: to start from. words: that are worth putting in."""

    run: Callable[[bytes], None]
    seeds: list[bytes]
    words: list[bytes]


def demand(held: object, promise: str) -> None:
    if not held:
        raise Broken(promise)


# ---------------------------------------------------------------------- topics and connection strings


def topic(data: bytes) -> None:
    where = topics.parse(data.decode("utf-8", "replace"))
    if where is None:
        return
    demand(where.kind in (topics.RETRIEVE, topics.REPORT, topics.RESPONSE, topics.DESIRED), "a kind")
    demand((where.status is None) == (where.kind != topics.RESPONSE), "a status where there is one")
    demand(where.status is None or 0 <= where.status <= 999, "three digits")
    for number in (where.version, where.retry_after):
        demand(number is None or (type(number) is int and number >= 0), "an integer")


def connection_string(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        credentials = from_connection_string(text)
    except LocalError as error:
        demand(_KEY[:8] not in str(error) and _KEY[8:16] not in str(error), "no key in an error")
        return
    credentials.user_name("a product", "dtmi:a;1")
    credentials.password(2_000_000_000)
    named = credentials.host + credentials.client_id
    demand(_KEY[:8] not in repr(credentials) or _KEY[:8] in named, "no key in a repr")


# ---------------------------------------------------------------------- documents


def _parsed(data: bytes) -> Any:
    with contextlib.suppress(ValueError, RuntimeError):
        return loads(data)
    return None


def patch(data: bytes) -> None:
    documents = [_parsed(line) for line in data.split(b"\n")[:3]]
    if not documents or not all(isinstance(one, dict) for one in documents):
        return
    base, first, second = (documents * 3)[:3]
    for one in documents:
        with contextlib.suppress(PatchError):
            check(one)
            demand(size(one) <= check(one), "a bound of the size")
    base = merge({}, base)
    whole = merge(base, first)
    demand(same(merge(base, diff(base, whole)), whole), "merge undoes diff")
    both = merge(whole, second)
    joined = compose(first, second)
    if joined is not None:
        demand(same(merge(base, joined), both), "a composed patch does what both do")
    joined = compose(first, second, base)
    demand(joined is not None and same(merge(base, joined), both), "with a base there is always one")


_STATES = (twin.OFFLINE, twin.SUBSCRIBING, twin.RETRIEVING, twin.SYNCHRONISED)
_BREAK = b"\xff"  # no UTF-8 has it: it parts the messages


def messages(data: bytes) -> None:
    """The core and its settings, given messages of the hub and reports of the app, with time in between."""
    machine = twin.Twin(timeout=1000, request_id=0)
    pattern = settings.Settings(machine)
    pattern.declare("a")
    pattern.declare("b", settings.PNP)
    now = 0
    applying: list[str] = []

    def perform(outputs: list[Any]) -> None:
        for output in [*outputs, *pattern.observe(outputs, now)]:
            kind = type(output)
            if kind is settings.Apply:
                applying.append(output.name)
            elif kind is twin.DesiredChanged:
                demand(isinstance(output.patch, dict) and output.desired is machine.desired, "a change")
            elif kind is twin.Failed:
                demand(
                    isinstance(output.error, TwinError) and len(str(output.error)) < 4096, "an error of ours"
                )

    perform(machine.start(now))
    for message in data.split(_BREAK)[:40]:
        kind, payload = message[:1], message[1:]
        now += 250
        request_id = str(machine._request)
        if kind == b"c":
            if machine._connect_at is not None:
                # It connects when it has said so.
                now = max(now, machine._connect_at)
                perform(machine.tick(now, 0.5))
            perform(machine.connected(now, 0.5, 60_000))
            perform(machine.subscribed(tuple(payload[:2] or b"\0\0"), now, 0.5))
        elif kind == b"x":
            perform(machine.disconnected(now, 0.5, RemoteError("lost")))
        elif kind == b"t":
            now += 2000
            perform(machine.tick(now, 0.5))
        elif kind == b"r":
            report = _parsed(payload)
            with contextlib.suppress(LocalError):
                perform(machine.report(report, now, always=len(payload) % 5 == 0)[1])
        elif kind == b"q":
            perform(machine.ask(now)[1])
        elif kind == b"e" and applying:
            perform(pattern.applied(applying.pop(), payload.decode("utf-8", "replace") or None, now))
        elif kind == b"d":
            perform(machine.message_received(topics._DESIRED_PATH + "/?$version=2", payload, now, 0.5))
        elif kind in b"0123456789" and kind:
            status = {b"2": "200", b"4": "429", b"5": "500"}.get(kind, "40" + kind.decode())
            where = f"$iothub/twin/res/{status}/?$rid={request_id}&$version={len(payload)}"
            perform(machine.message_received(where, payload, now, 0.5))
        else:
            where, _, payload = message.partition(b"\n")
            perform(machine.message_received(where.decode("utf-8", "replace"), payload, now, 0.5))
        demand(machine.state in _STATES, "a state")
        demand(machine.deadline is None or type(machine.deadline) is int, "a deadline")
        demand(same(merge({}, machine.desired), machine.desired), "no null in desired")
        demand(not [key for key in machine.desired if key.startswith("$")], "no key with $ in desired")
        demand(len(getattr(machine, "_kept", ())) <= 64 and len(machine._queue) <= 1200, "bounds")
        dumps(machine.target)


def stream(data: bytes) -> None:
    """The push parser against json.loads, however the payload is cut."""
    cut, payload = data[:1], data[1:]

    def read(size: int) -> Any:
        reading: Any = reader(twin=bool(cut and cut[0] & 64), reported=bool(cut and cut[0] & 128))
        document = next(reading)
        try:
            for at in range(0, len(payload), size):
                document = reading.send(payload[at : at + size])
            return document
        except ValueError:
            return None

    found = read(1 + (cut[0] & 63 if cut else 0))
    # Of what is skipped hardly anything is looked at: whether damage there is seen is up to the cut.
    skips = bool(cut and cut[0] & 192) or b"$" in payload or b"\\u" in payload
    if not skips or _parsed(payload) is not None:
        demand(repr(found) == repr(read(1)) == repr(read(1 << 20)), "the same in every cut")
    # What is skipped is hardly looked at, and long tokens are refused; see stream.py.
    if (cut and cut[0] & 192) or b"$" in payload or b"\\u" in payload or len(payload) > 400:
        return
    expected = _parsed(payload)
    if not isinstance(expected, dict):
        expected = None
    if b"\\" in payload and found is None:
        return
    demand(repr(found) == repr(expected), f"as json.loads: {found!r}, {expected!r}")


# ---------------------------------------------------------------------- files and packets


def store_file(data: bytes) -> None:
    """A store's file, as it is; or after an "=", as the body of one whose checksum is right."""
    if data[:1] == b"=":
        data = _WHOLE % (hashlib.sha256(data[1:]).hexdigest().encode(), data[1:])
    try:
        _, kept = _decode(data)
    except ValueError as error:
        demand(str(error).startswith("is "), "an error that says what the file is")
        return
    machine = twin.Twin(desired=kept.desired, reported=kept.reported, reports=kept.reports)
    machine.start(0)
    demand(machine.unanswered == kept.reports, "what was kept is there")


_mqtt = board_mqtt()


class _Owner:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def packet(self, kind: int, body: bytes) -> None:
        self.seen.append((kind, body))

    def began(self, name: str, identifier: int | None) -> None:
        self.seen.append([name, identifier, 0])

    def chunk(self, data: memoryview) -> None:
        demand(0 < len(data) <= 64, "pieces no larger than the buffer")
        self.seen[-1][2] += len(data)

    def ended(self) -> None:
        self.seen.append(None)


def board_packets(data: bytes) -> None:
    """The board's receiver: whatever comes is read or refused, and alike in any pieces."""
    outcomes = []
    for step in (1, 1 + len(data) % 63, 64):
        owner = _Owner()
        receiver = _mqtt.Receiver(owner, 64)
        error = ""
        try:
            for at in range(0, len(data), step):
                piece = data[at : at + step]
                receiver.buffer[: len(piece)] = piece
                receiver.received(len(piece))
        except RemoteError as refusal:
            error = str(refusal)
        demand(len(receiver._head) <= 2048, "no more kept than a topic")
        outcomes.append((owner.seen, error))
    demand(outcomes[0] == outcomes[1] == outcomes[2], "the same in every cut")


# ---------------------------------------------------------------------- all of them

_JSON = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"null",
    b"true",
    b"1e999",
    b"-0",
    b"\\ud800",
    b"\\u0000",
    b"\n",
]
_TWIN = b'{"desired":{"a":{"n":1},"b":[1,"x"],"$version":4},"reported":{"a":null,"c":2.5,"$version":7}}'
_STORE = (
    b'{"host":"h","device":"d","desired":{"a":1},"reported":null,'
    b'"reports":[{"patch":{"b":null},"version":7,"alone":true}]}'
)
_STRING = b"HostName=plant.azure-devices.net;DeviceId=dev-1;SharedAccessKey=" + _KEY.encode()


def _published(quality: int = 0) -> bytes:
    return b"".join(_mqtt.publish("$iothub/twin/res/200/?$rid=1", _TWIN, quality or None))


PACKETS = [
    b"\x20\2\0\0",
    b"\x20\2\0\0\x90\5\0\1\0\0\0" + _published(),
    _published(1),
    b"".join(_mqtt.publish(topics._DESIRED_PATH + "/?$version=5", b'{"a":null,"$version":5}')),
    b"".join(_mqtt.publish(topics._DESIRED_PATH + "/?$version=9", b"{")) * 3,
    b"\xd0\0" * 5,
    b"\x40\2\0\1\x62\2\0\1",
    b"\x30\xff\xff\xff\x7f",
]
TARGETS: dict[str, Target] = {
    "topics": Target(
        topic,
        [
            b"$iothub/twin/res/200/?$rid=12&$version=3",
            b"$iothub/twin/PATCH/properties/desired/?$version=4",
            b"$iothub/twin/res/429/?%24rid=1&retry-after=5",
        ],
        [b"$rid=", b"$version=", b"&", b"%24", b"%", b"/?", b"\xc2\xb2"],
    ),
    "connection strings": Target(
        connection_string,
        [
            _STRING,
            _STRING + b";GatewayHostName=localhost:8883;ModuleId=m",
            b"HostName=h:1;DeviceId=d;x509=true",
        ],
        [b";", b"=", b"HostName=", b"ModuleId=", b"SharedAccessKeyName=p", b"SharedAccessSignature=sr=a"],
    ),
    "patches": Target(
        patch,
        [b'{"a":{"b":1}}\n{"a":null}\n{"a":{"c":[1,{"x":null}]}}', b'{"a":1,"b":{}}\n{"b":{"c":true}}'],
        _JSON,
    ),
    "messages": Target(
        messages,
        [
            _BREAK.join(
                [b"c", b"2" + _TWIN, b'd{"a":{"n":2},"$version":5}', b'r{"d":{"e":1}}', b"2", b"x", b"c"]
            ),
            _BREAK.join([b"c", b"4", b"t", b"2" + _TWIN, b"e", b"eno", b'r{"x":null}', b"4{}", b"t", b"t"]),
            _BREAK.join(
                [b"c", b'd{"z":1,"$version":9}', b"2" + _TWIN, b"q", b"t", b"2" + _TWIN, b'0{"errorCode":1}']
            ),
        ],
        [*_JSON, *(_BREAK + one for one in (b"c", b"2", b"4", b"5", b"d{}", b"x", b"t", b"r{}", b"q", b"e"))],
    ),
    "stream": Target(
        stream,
        [b"\3" + _TWIN, b"\x43" + _TWIN, b'\1{"a":[1,-2.5e3,"\xc3\xa9",{}],"b":"\\n"}', b"\x07{}"],
        _JSON,
    ),
    "store files": Target(
        store_file, [_WHOLE % (hashlib.sha256(_STORE).hexdigest().encode(), _STORE), b"=" + _STORE], _JSON
    ),
    "board packets": Target(
        board_packets, PACKETS, [b"\x30", b"\x32", b"\x90", b"\xd0\0", b"\xff\xff\xff\x7f"]
    ),
}
for _row in json.loads((_VECTORS / "json.json").read_text("utf-8")):
    # What the tests of both runtimes found worth trying.
    TARGETS["stream"].seeds.append(b"\5" + _row.get("payload", "{}").encode())


# ---------------------------------------------------------------------- inputs

_BYTES = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b'"',
    b"$",
    b"/",
    b"9" * 20,
    b" " * 100,
    b"\xed\xa0\x80",
    b"\xf0\x9f\x98\x80",
]


def mutated(target: Target, chance: random.Random, most: int = 4096) -> bytes:
    """A seed of the target with a few changes; the same chance gives the same bytes."""
    if chance.random() < 0.03:
        return chance.randbytes(chance.randrange(200))
    data = bytearray(chance.choice(target.seeds))
    for _ in range(1 + int(chance.expovariate(0.4))):
        at = chance.randrange(len(data) + 1)
        to = min(len(data), at + int(chance.expovariate(0.1)) + 1)
        kind = chance.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at:at] = chance.choice(_BYTES)
        elif kind == 2:
            data[at:at] = chance.choice(target.words)
        elif kind == 3:
            del data[at:to]
        elif kind == 4:
            data[at:at] = data[at:to] * chance.choice([1, 1, 2, 30])
        elif kind == 5:
            other = chance.choice(target.seeds)
            data[at:to] = other[chance.randrange(len(other) + 1) :]
        elif at < len(data):
            data[at] = chance.randrange(256)
    return bytes(data[:most])
