"""Who the hub lets in: a table of CONNECTs, all refused with CONNACK 5, and a table of those it accepts."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hub_wire import KEY, OTHER_KEY, Wire, connect, signature, token, user
from twin_device.hub import LocalHub
from twin_device.hub.registry import Refused

OWNER_KEY = "b3duZXItb3duZXItb3duZXItb3duZXI="
SECONDARY_KEY = "c2Vjb25kYXJ5LXNlY29uZGFyeQ=="
SPECIAL = "a-b:c.d%e_f#g*h?i!j(k)l,m=n@o;p$q'r+s"
VECTOR = (
    "SharedAccessSignature sr=myhub.azure-devices.net%2Fdevices%2Fdev-1"
    "&sig=Q24ahLH4tHeubVhDv5kUKA2xiVvnqPFhqSD%2FqIjCq3I%3D&se=1893456000"
)
MODULE_VECTOR = (
    "SharedAccessSignature sr=myhub.azure-devices.net%2Fdevices%2Fdev-1%2Fmodules%2Fmod-1"
    "&sig=ThNvC0Z0Qv8Ro2lRz6AhWWJmSoPWo7HVNfOD3FbgcCc%3D&se=1893456000"
)


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    names = ("localhost", "myhub.azure-devices.net")
    with LocalHub(mqtts_port=None, mqtt_port=0, host_names=names, owner_key=OWNER_KEY) as hub:
        for name in ("dev", "other", "Dev2", "dev/mod", "dev/other", "dev-1", "dev-1/mod-1", SPECIAL):
            hub.create_device(name, KEY)
        hub.create_device("off", KEY).disable()
        hub.create_device("parent/mod", KEY)
        hub.device("parent").disable()
        hub.create_device("off-mod/mod", KEY).disable()
        hub._registry.identities["dev"].secondary_key = SECONDARY_KEY
        hub._registry.identities["other"].primary_key = OTHER_KEY
        hub._registry.identities["dev/other"].primary_key = OTHER_KEY
        yield hub


@dataclass
class Row:
    why: str
    client_id: str | bytes | None = "dev"
    user_name: str | bytes | None = None
    password: str | bytes | None = None
    options: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    def packet(self) -> bytes:
        name = self.client_id if isinstance(self.client_id, str) else "dev"
        user_name = user(name) if self.user_name is None else self.user_name
        password = token(name) if self.password is None else self.password
        return connect(self.client_id or "", user_name, password, **(self.options or {}))


def enc(*parts: str) -> str:
    return "%2F".join(parts)


NOW = int(time.time())
GOOD_SE = NOW + 600
SR = enc("localhost", "devices", "dev")
SIG = signature(SR, str(GOOD_SE), KEY)
LOWER = re.sub("%..", lambda found: found[0].lower(), quote(SIG, safe=""))
PREFIX = "SharedAccessSignature "

REFUSED = [
    # ------------------------------------------------------------ keys and signatures
    Row("a wrong key", password=token(key=OTHER_KEY)),
    Row("the key of another device", password=token(key=OTHER_KEY)),
    Row("another device's own good token", password=token("other", OTHER_KEY)),
    Row("the key as the password", password=KEY),
    Row("an empty signature", password=f"{PREFIX}sr={SR}&sig=&se={GOOD_SE}"),
    Row("a signature cut short", password=f"{PREFIX}sr={SR}&sig={SIG[:-2]}&se={GOOD_SE}"),
    Row("a signature that is no base64", password=f"{PREFIX}sr={SR}&sig=%ff%fe**&se={GOOD_SE}"),
    Row("a signature with a blank behind", password=f"{PREFIX}sr={SR}&sig={SIG}%20&se={GOOD_SE}"),
    Row(
        "signed without the line feed",
        password=f"{PREFIX}sr={SR}&sig={signature(SR + 'x', '', KEY)}&se={GOOD_SE}",
    ),
    # ------------------------------------------------------------ expiry
    Row("expired an hour ago", password=token(expiry=NOW - 3600)),
    Row("expired a second ago", password=token(expiry=NOW - 1)),
    Row("expiry 0", password=token(expiry=0)),
    Row("expiry negative", password=token(expiry=-5)),
    Row("expiry no number", password=token(expiry="tomorrow")),
    Row("expiry empty", password=token(expiry="")),
    Row("expiry with a fraction", password=token(expiry=f"{GOOD_SE}.5")),
    Row("expiry with a sign", password=token(expiry=f"+{GOOD_SE}")),
    Row("expiry in other digits", password=token(expiry="".join(chr(0x660 + int(c)) for c in str(GOOD_SE)))),
    Row("expiry superscript", password=token(expiry=f"{GOOD_SE}²")),
    Row("expiry changed after signing", password=f"{PREFIX}sr={SR}&sig={SIG}&se={GOOD_SE + 1}"),
    # ------------------------------------------------------------ resource
    Row("another host", password=token(resource=enc("example.com", "devices", "dev"))),
    Row("a host that begins alike", password=token(resource=enc("localhost.example.com", "devices", "dev"))),
    Row("another device", password=token(resource=enc("localhost", "devices", "other"))),
    Row("a device whose id begins alike", password=token(resource=enc("localhost", "devices", "de"))),
    Row("a device whose id is longer", password=token(resource=enc("localhost", "devices", "dev1"))),
    Row("device id in other case", password=token(resource=enc("localhost", "devices", "DEV"))),
    Row(
        "a module of the device",
        password=token(resource=enc("localhost", "devices", "dev", "modules", "mod")),
    ),
    Row("half a path segment", password=token(resource=enc("localhost", "dev"))),
    Row("an empty resource", password=token(resource="")),
    Row("resource encoded three times", password=token(resource="localhost%25252Fdevices%25252Fdev")),
    Row(
        "resource changed after signing",
        password=f"{PREFIX}sr=localhost%2fdevices%2fdev&sig={SIG}&se={GOOD_SE}",
    ),
    # ------------------------------------------------------------ the token's form
    Row("an empty password", password=""),
    Row("no token", password="secret"),
    Row("prefix only", password="SharedAccessSignature"),
    Row("prefix and blank only", password=PREFIX),
    Row("another prefix", password=token().replace("Shared", "shared", 1)),
    Row("two blanks", password=token().replace(" ", "  ")),
    Row("no blank", password=token().replace(" ", "")),
    Row("no sr", password=token(order="sig se")),
    Row("no sig", password=token(order="sr se")),
    Row("no se", password=token(order="sr sig")),
    Row("field names in upper case", password=token().replace("sr=", "SR=")),
    Row("bytes that are not UTF-8", password=b"SharedAccessSignature sr=\xff\xfe&sig=\xff&se=1"),
    Row("U+0000 in the password", password=token() + "\0"),
    # ------------------------------------------------------------ policies
    Row("policy service", password=token(key=OWNER_KEY, policy="service")),
    Row("policy registryRead", password=token(key=OWNER_KEY, policy="registryRead")),
    Row("policy registryReadWrite", password=token(key=OWNER_KEY, policy="registryReadWrite")),
    Row("an unknown policy", password=token(key=OWNER_KEY, policy="admin")),
    Row("policy in other case", password=token(key=OWNER_KEY, policy="Device")),
    Row("a policy named, the device's key used", password=token(policy="device")),
    Row("the policy's key without its name", password=token(key=OWNER_KEY)),
    Row("a policy token for another device", password=token("other", OWNER_KEY, policy="device")),
    # ------------------------------------------------------------ identities
    Row("an unknown device", "nobody"),
    Row("an unknown module", "dev/nobody"),
    Row("a module of an unknown device", "nobody/mod"),
    Row("device id in other case than registered", "DEV"),
    Row("a disabled device", "off"),
    Row("a disabled device with a policy token", "off", password=token("off", OWNER_KEY, policy="device")),
    Row("a module of a disabled device", "parent/mod"),
    Row("a disabled module", "off-mod/mod"),
    Row("a module with its device's key", "dev/other"),
    Row("a module with another module's token", "dev/mod", password=token("dev/other", OTHER_KEY)),
    # ------------------------------------------------------------ client id and user name
    Row("client id of another", "other", user("dev"), token("dev")),
    Row("user name of another", "dev", user("other"), token("dev")),
    Row("client id in other case", "Dev", user("dev"), token("dev")),
    Row("an empty client id", "", user("dev"), token("dev")),
    Row("device id for a module's user name", "dev", user("dev/mod"), token("dev/mod")),
    Row("module's client id for a device's user name", "dev/mod", user("dev"), token("dev")),
    Row("another host in the user name", user_name=user(host="example.com")),
    Row("no host", user_name="dev/?api-version=2021-04-12"),
    Row("an empty host", user_name="/dev/?api-version=2021-04-12"),
    Row("an empty user name", user_name=""),
    Row("only the host", user_name="localhost"),
    Row("an empty device", user_name="localhost//?api-version=2021-04-12"),
    Row("an empty module", user_name="localhost/dev//?api-version=2021-04-12"),
    Row("a segment too many", user_name="localhost/dev/mod/x/?api-version=2021-04-12"),
    Row("parameters behind the id without a slash", user_name="localhost/dev?api-version=2021-04-12"),
    Row("device id percent-encoded in the user name", user_name="localhost/%64ev/?api-version=2021-04-12"),
    Row("a slash in a parameter", user_name="localhost/dev/?api-version=2021-04-12&DeviceClientType=a/b"),
    Row("a will for another topic", options={"will": ("anything", b"")}),
    Row("a will for another device", options={"will": ("devices/other/messages/events/", b"")}),
    Row("a will with a malformed property bag", options={"will": ("devices/dev/messages/events/a=b c", b"")}),
]

ACCEPTED = [
    Row("the primary key"),
    Row("the secondary key", password=token(key=SECONDARY_KEY)),
    Row("field order sr sig se"),
    Row("field order se sig sr", password=token(order="se sig sr")),
    Row("field order sr se sig", password=token(order="sr se sig")),
    Row("skn first", password=token(key=OWNER_KEY, policy="device", order="skn sr sig se")),
    Row("an empty skn", password=token(policy="")),
    Row("an unknown field", password=token() + "&x=y"),
    Row("lower-case hex", password=token(resource=SR.replace("%2F", "%2f"))),
    Row("lower-case hex in the signature", password=f"{PREFIX}sr={SR}&sig={LOWER}&se={GOOD_SE}"),
    Row("signature not encoded", password=f"{PREFIX}sr={SR}&sig={SIG}&se={GOOD_SE}"),
    Row("resource not encoded", password=token(resource="localhost/devices/dev")),
    Row("resource with a slash behind", password=token(resource=SR + "%2F")),
    Row("port in the resource", password=token(resource="localhost%3A18443%2Fdevices%2Fdev")),
    Row(
        "host in upper case",
        user_name=user(host="LOCALHOST"),
        password=token(resource=enc("LocalHost", "devices", "dev")),
    ),
    Row("port in the user name", user_name=user(host="localhost:8883")),
    Row(
        "the hub's other name",
        user_name=user(host="myhub.azure-devices.net"),
        password=token(resource=enc("myhub.azure-devices.net", "devices", "dev")),
    ),
    Row("one name in the user name, the other in the token", user_name=user(host="myhub.azure-devices.net")),
    Row("resource is the hub", password=token(resource="localhost")),
    Row("resource is all devices", password=token(resource=enc("localhost", "devices"))),
    Row("expiry in milliseconds", password=token(expiry=GOOD_SE * 1000)),
    Row("expiry far away", password=token(expiry=253402300799)),
    Row("policy device for the hub", password=token(key=OWNER_KEY, policy="device", resource="localhost")),
    Row("policy device for this device", password=token(key=OWNER_KEY, policy="device")),
    Row("policy iothubowner", password=token(key=OWNER_KEY, policy="iothubowner", resource="localhost")),
    Row("a module", "dev/mod"),
    Row(
        "a module with a policy token for its device",
        "dev/mod",
        password=token("dev", OWNER_KEY, policy="device"),
    ),
    Row(
        "a module whose key is another than its device's", "dev/other", password=token("dev/other", OTHER_KEY)
    ),
    Row("user name with api-version but no question mark", user_name=user(tail="/api-version=2016-11-14")),
    Row("user name without parameters", user_name=user(tail="/?")),
    Row("user name with nothing behind the slash", user_name=user(tail="/")),
    Row("user name without a slash behind", user_name=user(tail="")),
    Row(
        "user name with more parameters",
        user_name=user(tail="/?api-version=2021-04-12&DeviceClientType=x%2F2&model-id=dtmi%3Aa%3Bb%3B1&x"),
    ),
    Row(
        "user name with the same parameter twice",
        user_name=user(tail="/?api-version=2021-04-12&api-version=x"),
    ),
    Row("an id with every special character, encoded once", SPECIAL),
    Row(
        "an id with every special character, encoded twice",
        SPECIAL,
        password=token(resource=enc("localhost", "devices", "".join(f"%25{ord(c):02X}" for c in SPECIAL))),
    ),
    Row("a will for the telemetry topic", options={"will": ("devices/dev/messages/events/", b"gone")}),
    Row("a will with properties", options={"will": ("devices/dev/messages/events/a=b%20c", b"gone")}),
    Row("the published vector for a device", "dev-1", user("dev-1", "myhub.azure-devices.net"), VECTOR),
    Row(
        "the published vector for a module",
        "dev-1/mod-1",
        user("dev-1/mod-1", "myhub.azure-devices.net"),
        MODULE_VECTOR,
    ),
]


@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_refused(hub: LocalHub, row: Row) -> None:
    before = [device.connections for device in hub.devices]
    with Wire(hub.mqtt_port) as wire:
        assert wire.send(row.packet()).rest() == b"\x20\x02\x00\x05"
    assert before == [device.connections for device in hub.devices]


@pytest.mark.parametrize("row", ACCEPTED, ids=str)
def test_accepted(hub: LocalHub, row: Row) -> None:
    with Wire(hub.mqtt_port) as wire:
        assert wire.send(row.packet()).packet() == (0x20, b"\0\0")
        wire.nothing_waits()
        assert hub.device(str(row.client_id)).connected


def connack(hub: LocalHub, packet: bytes) -> int:
    with Wire(hub.mqtt_port) as wire:
        first, body = wire.send(packet).packet()
        assert (first, body[0]) == (0x20, 0)
        return body[1]


def test_user_name_is_optional_in_mqtt_but_not_here(hub: LocalHub) -> None:
    assert connack(hub, connect("dev")) == 5
    assert connack(hub, connect("dev", user("dev"))) == 5


def hex_digits(signed: str) -> set[int]:
    """Where the percent-encoded signature has hex digits: %2F and %2f are the same."""
    begin, end = signed.index("sig=") + 4, signed.index("&se=")
    return {begin + m.start() + digit for m in re.finditer("%..", signed[begin:end]) for digit in (1, 2)}


HEX = hex_digits(VECTOR)
OWNER_VECTOR = token("dev-1", OWNER_KEY, policy="device", expiry=1893456000)


@pytest.mark.parametrize("signed", [VECTOR, OWNER_VECTOR], ids=["device", "policy"])
def test_one_changed_bit_anywhere_is_refused(hub: LocalHub, signed: str) -> None:
    digits = hex_digits(signed)
    accepted = []
    assert hub._registry.authenticate("dev-1", user("dev-1"), signed, time.time()).expiry == 1893456000
    for at in range(len(signed)):
        for bit in range(7):
            changed = signed[:at] + chr(ord(signed[at]) ^ 1 << bit) + signed[at + 1 :]
            if at in digits and changed.lower() == signed.lower():
                continue
            try:
                hub._registry.authenticate("dev-1", user("dev-1"), changed, time.time())
            except Refused:
                continue
            accepted.append(changed)
    assert accepted == []


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_token_is_refused_on_the_wire(hub: LocalHub, data: st.DataObject) -> None:
    good = VECTOR.encode()
    at = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != good[at]))
    if at in HEX and bytes((byte,)).upper() == bytes((good[at],)).upper():
        return
    changed = good[:at] + bytes((byte,)) + good[at + 1 :]
    assert connack(hub, connect("dev-1", user("dev-1", "myhub.azure-devices.net"), changed)) == 5


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_nonsense_is_refused(hub: LocalHub, client_id: str, user_name: str, password: str) -> None:
    client_id, user_name = (one.replace("\0", "") for one in (client_id, user_name))
    assert connack(hub, connect(client_id, user_name, password)) == 5


def test_a_disabled_device_may_be_told_that_the_server_is_unavailable() -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0, disabled_code=3) as hub:
        hub.create_device("dev", KEY).disable()
        hub.create_device("parent/mod", KEY)
        hub.device("parent").disable()
        for name, code in (("dev", 3), ("parent/mod", 3), ("nobody", 5)):
            assert connack(hub, connect(name, user(name), token(name))) == code
