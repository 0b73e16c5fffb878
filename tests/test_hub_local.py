"""The hub from the side of who writes tests with it: LocalHub, Device, the fixture, the certificates."""

import functools
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

import twin_device.hub
from tests.hub_wire import DISCONNECT, KEY, PINGREQ, REPORT, RES, Wire, online, publish, token, user
from twin_device.hub import LocalHub

ID_CHARACTERS = "azAZ09-:.+%_#*?!(),=@;$'"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(mqtts_port=None, mqtt_port=0) as hub:
        yield hub


# ---------------------------------------------------------------------- arguments


def test_the_public_names() -> None:
    assert twin_device.hub.__all__ == sorted(twin_device.hub.__all__)
    assert all(getattr(twin_device.hub, name) for name in twin_device.hub.__all__)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer_quality": 1}, "no setting 'answer_quality'"),
        ({"answer_qos": "1"}, "answer_qos is 'always-0' or 'granted'"),
        ({"error_body": "xml"}, "error_body is 'json' or 'empty'"),
        ({"size_code": 418}, "size_code is 403100, 400004 or 413001"),
        ({"size_rule": "bytes"}, "size_rule is 'values' or 'text'"),
        ({"hash_in_keys": "yes"}, "hash_in_keys is True or False"),
        ({"disabled_code": 4}, "disabled_code is 5 or 3"),
        ({"retrieve_body": "tags"}, "retrieve_body is 'sections' or 'properties'"),
        ({"retain_property": "retain"}, "retain_property is 'mqtt-retain' or 'x-opt-retain'"),
        ({"token_grace": -1}, "token_grace is a number from 0 up"),
        ({"connect_within": "1"}, "connect_within is a number"),
        ({"connect_within": float("nan")}, "connect_within is a number"),
        ({"throttle": 100}, "throttle is two numbers or None"),
        ({"throttle": (1, 2, 3)}, "throttle is two numbers or None"),
        ({"throttle": (1, -2)}, "is a number from 0 up, not -2"),
        ({"session_lifetime": -1}, "session_lifetime is a number from 0 up"),
        ({"host_names": ()}, "at least one host name"),
        ({"host_names": ("",)}, "at least one host name"),
        ({"owner_key": "no base64"}, "a key is not base64"),
    ],
    ids=str,
)
def test_what_no_hub_is_made_of(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalHub(**arguments)


def test_a_hub_that_does_not_run() -> None:
    hub = LocalHub(mqtts_port=None, mqtt_port=0)
    device = hub.create_device("dev", KEY, desired={"a": 1})
    assert (device.patch_desired({"b": 2}), device.desired) == (2, {"a": 1, "b": 2})
    assert not device.connected
    assert hub.mqtt_port is hub.mqtts_port is None
    with pytest.raises(RuntimeError):
        _ = hub.ca_file
    with pytest.raises(RuntimeError):
        _ = device.plaintext_connection_string
    hub.close()
    hub.start()
    with pytest.raises(RuntimeError, match="runs already"):
        hub.start()
    with online(hub.mqtt_port) as wire:
        wire.nothing_waits()
    with pytest.raises(RuntimeError):
        _ = hub.ca_file
    hub.close()
    assert (device.desired, device.connections) == ({"a": 1, "b": 2}, 1)


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("device_id", "key"),
    [
        ("", None),
        ("a b", None),
        ("a/b/c", None),
        ("/a", None),
        ("a/", None),
        ("a/b c", None),
        ("a b/c", None),
        ("ä", None),
        ("a\n", None),
        ("x" * 129, None),
        ("new", "no base64"),
        ("new", "AAA"),
        ("new/mod", "no base64"),
        ("dev", None),
        ("dev/mod", None),
    ],
)
def test_what_no_device_is_made_of(hub: LocalHub, device_id: str, key: str | None) -> None:
    hub.create_device("dev/mod", KEY)
    before = [one.id for one in hub.devices]
    with pytest.raises(ValueError, match=r"."):
        hub.create_device(device_id, key)
    assert [one.id for one in hub.devices] == before == ["dev", "dev/mod"]


@pytest.mark.parametrize("device_id", [ID_CHARACTERS, "x" * 128, f"{'d' * 128}/{'m' * 128}"])
def test_ids_at_their_limits(hub: LocalHub, device_id: str) -> None:
    hub.create_device(device_id, KEY)
    with online(hub.mqtt_port, device_id) as wire:
        wire.ask(REPORT + "1", b'{"a":1}')
    assert hub.device(device_id).reported == {"a": 1}


def test_keys_are_made(hub: LocalHub) -> None:
    keys = {hub.create_device(f"dev-{n}").plaintext_connection_string.rpartition("Key=")[2] for n in range(9)}
    assert len(keys) == 9
    with online(hub.mqtt_port, "dev-0", hub._registry.identities["dev-0"].primary_key) as wire:
        wire.nothing_waits()


def test_connection_strings(hub: LocalHub, tmp_path: Path) -> None:
    device, module = hub.create_device("dev", KEY), hub.create_device("dev/mod", KEY)
    host = f"HostName=localhost:{hub.mqtt_port}"
    assert device.plaintext_connection_string == f"{host};DeviceId=dev;SharedAccessKey={KEY}"
    assert module.plaintext_connection_string == f"{host};DeviceId=dev;ModuleId=mod;SharedAccessKey={KEY}"
    with pytest.raises(RuntimeError):
        _ = device.connection_string
    with LocalHub(host_names=("My.Hub", "localhost"), owner_key=KEY, certificates=tmp_path) as secure:
        device = secure.create_device("dev", KEY)
        host = f"HostName=my.hub:{secure.mqtts_port}"
        assert device.connection_string == f"{host};DeviceId=dev;SharedAccessKey={KEY}"
        assert secure.service_connection_string == (
            f"HostName=my.hub;SharedAccessKeyName=iothubowner;SharedAccessKey={KEY}"
        )
        with online(secure.mqtts_port, ca_file=secure.ca_file) as wire:
            wire.nothing_waits()
        secure._ports["mqtts"] = 8883
        assert device.connection_string == f"HostName=my.hub;DeviceId=dev;SharedAccessKey={KEY}"


def test_deleting_a_device_deletes_its_modules(hub: LocalHub) -> None:
    for name in ("dev/one", "dev/two", "dev2/one"):
        hub.create_device(name)
    hub.device("dev/two").delete()
    assert [one.id for one in hub.devices] == ["dev", "dev/one", "dev2", "dev2/one"]
    hub.device("dev").delete()
    assert [one.id for one in hub.devices] == ["dev2", "dev2/one"]
    with pytest.raises(KeyError):
        hub.device("dev/one")
    device = hub.device("dev2")
    device.delete()
    for act in (device.delete, device.disable, device.recreate, lambda: device.patch_desired({})):
        with pytest.raises(KeyError):
            act()


# ---------------------------------------------------------------------- wait_for

CONTAINED = [
    ({}, True),
    ({"a": 1}, True),
    ({"a": 2}, False),
    ({"a": True}, False),
    ({"a": 1, "o": {"x": 1}}, True),
    ({"o": {"x": 1, "y": [1, 2]}}, True),
    ({"o": {"y": [1]}}, False),
    ({"o": {}}, True),
    ({"o": {"z": None}}, True),
    ({"o": {"x": None}}, False),
    ({"z": None}, True),
    ({"a": None}, False),
    ({"z": {}}, False),
    ({"z": {"y": None}}, False),
    ({"a": {}}, False),
    ({"t": True}, True),
    ({"t": 1}, False),
    ({"f": 1}, True),
]


@pytest.mark.parametrize(("wanted", "there"), CONTAINED, ids=str)
def test_what_contains_means(hub: LocalHub, wanted: Any, there: bool) -> None:
    device = hub.create_device("dev", KEY)
    reported = {"a": 1, "o": {"x": 1, "y": [1, 2]}, "t": True, "f": 1.0}
    with online(hub.mqtt_port) as wire:
        wire.ask(REPORT + "1", json.dumps(reported).encode())
    if there:
        assert device.wait_for(wanted, 0) == reported
    else:
        with pytest.raises(TimeoutError):
            device.wait_for(wanted, 0)


def test_waiting(hub: LocalHub) -> None:
    device = hub.create_device("dev", KEY)
    found: list[Any] = []
    waiter = threading.Thread(target=lambda: found.append(device.wait_for({"a": 1, "b": 2})))
    waiter.start()
    with online(hub.mqtt_port) as wire:
        wire.ask(REPORT + "1", b'{"a":1}')
        assert waiter.is_alive()
        wire.ask(REPORT + "2", b'{"b":2,"c":3}')
        waiter.join(10)
    assert found == [{"a": 1, "b": 2, "c": 3}]


def kinds(device: Any) -> list[str]:
    return [packet.kind for packet in device.packets]


# What a device does, and what the back end then waits for.
CONDITIONS: list[tuple[bytes, Any]] = [
    (PINGREQ, lambda device: "PINGREQ" in kinds(device)),
    (b"\xa2\x08\0\1\0\4hell", lambda device: "UNSUBACK" in kinds(device)),
    (publish("devices/dev/messages/events/", b"x"), lambda device: device.telemetry),
    (publish(REPORT + "1", b"{}"), lambda device: device.reported_version == 2),
    (DISCONNECT, lambda device: not device.connected),
    (b"\0\0", lambda device: device.twin["connectionState"] == "Disconnected"),
]


@pytest.mark.parametrize(("packet", "condition"), CONDITIONS)
def test_anything_that_happens_wakes_who_waits(hub: LocalHub, packet: bytes, condition: Any) -> None:
    device = hub.create_device("dev", KEY)
    with online(hub.mqtt_port) as wire:
        began = time.monotonic()
        threading.Timer(0.05, wire.send, (packet,)).start()
        assert device.wait_for(condition, timeout=30)
        assert time.monotonic() - began < 10


def test_back_end_changes_wake_who_waits(hub: LocalHub) -> None:
    device = hub.create_device("dev", KEY)
    changes = [
        (lambda: device.patch_desired({"a": 1}), lambda device: device.desired),
        (lambda: device.patch_tags({"a": 1}), lambda device: device.twin["tags"]),
        (lambda: device.disable(), lambda device: device.twin["status"] == "disabled"),
        (lambda: device.enable(), lambda device: device.twin["status"] == "enabled"),
        (lambda: device.recreate(), lambda device: not device.desired),
    ]
    for change, condition in changes:
        threading.Timer(0.02, change).start()
        began = time.monotonic()
        assert device.wait_for(condition, timeout=30)
        assert time.monotonic() - began < 10


def test_waiting_has_an_end(hub: LocalHub) -> None:
    device = hub.create_device("dev", KEY)

    def never(_device: Any) -> bool:
        return False

    with online(hub.mqtt_port) as wire:
        wire.ask(REPORT + "1", b'{"a":1}')
        cases = [
            ({"a": 2}, 'dev: waited 0.05 s for {"a": 2}; reported is {"a": 1}, connected'),
            (never, "for never; reported"),
            (functools.partial(never), "for functools.partial("),
        ]
        for condition, message in cases:
            with pytest.raises(TimeoutError) as caught:
                device.wait_for(condition, timeout=0.05)
            assert message in str(caught.value)
        # Also while things go on and on.
        stop = threading.Event()

        def chatter() -> None:
            while not stop.is_set():
                wire.send(PINGREQ).packet()

        talker = threading.Thread(target=chatter)
        talker.start()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            device.wait_for(never, timeout=0.1)
        assert time.monotonic() - began < 5
        stop.set()
        talker.join()


# ---------------------------------------------------------------------- certificates


def handshake(hub: LocalHub, ca_file: str, name: str = "localhost") -> None:
    context = ssl.create_default_context(cafile=ca_file)
    with (
        socket.create_connection(("127.0.0.1", hub.mqtts_port or 0), 10) as raw,
        context.wrap_socket(raw, server_hostname=name),
    ):
        pass


def test_certificates_are_made_once_and_used_again(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    names = ("hub.example", "*.azure-devices.net")
    with LocalHub(certificates=folder, host_names=names) as hub:
        assert hub.ca_file == str(folder / "ca.pem")
        for name in ("localhost", "127.0.0.1", "::1", "hub.example", "my.azure-devices.net"):
            handshake(hub, hub.ca_file, name)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made.keys() == {"ca.der", "ca.pem", "server.pem"}
    assert (folder / "server.pem").stat().st_mode & 0o077 == 0
    assert b"PRIVATE KEY" not in made["ca.pem"]
    with LocalHub(certificates=str(folder)) as hub:
        handshake(hub, hub.ca_file)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made


def test_certificates_of_ones_own(tmp_path: Path) -> None:
    authority = trustme.CA()
    server = authority.issue_cert("my.own.name")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    with LocalHub(certificates=tmp_path) as hub:
        handshake(hub, hub.ca_file, "my.own.name")
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(hub, hub.ca_file, "localhost")


@pytest.mark.parametrize(("there", "missing"), [("ca.pem", "server.pem"), ("server.pem", "ca.pem")])
def test_half_of_the_certificates(tmp_path: Path, there: str, missing: str) -> None:
    (tmp_path / there).write_text("kept")
    hub = LocalHub(certificates=tmp_path)
    with pytest.raises(ValueError, match=f"has {there} but no {missing}"):
        hub.start()
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "kept"
    hub.close()


def encrypted() -> bytes:
    server = trustme.CA().issue_cert("localhost")
    key = serialization.load_pem_private_key(server.private_key_pem.bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, secret) + server.cert_chain_pems[0].bytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", trustme.CA().cert_pem.bytes(), encrypted()],
    ids=["nothing", "no PEM", "no key", "a key with a pass phrase"],
)
def test_a_server_pem_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ca.pem").write_bytes(trustme.CA().cert_pem.bytes())
    (tmp_path / "server.pem").write_bytes(content)
    with pytest.raises(ValueError, match=r"server\.pem is no certificate with its key in PEM"):
        LocalHub(certificates=tmp_path).start()


# ---------------------------------------------------------------------- the fixture

APP_TEST = """
import socket
from pathlib import Path

def test_one(local_hub):
    device = local_hub.create_device("sensor-temp-042", desired={"telemetryInterval": 30})
    assert device.connection_string.startswith(f"HostName=localhost:{local_hub.mqtts_port};")
    assert device.twin["properties"]["desired"]["telemetryInterval"] == 30
    socket.create_connection(("127.0.0.1", local_hub.mqtts_port)).close()
    assert local_hub.mqtt_port is None
    test_one.ca = Path(local_hub.ca_file).read_text()

def test_another_hub_with_the_same_certificates(local_hub):
    assert local_hub.devices == []
    assert Path(local_hub.ca_file).read_text() == test_one.ca
"""
WITHOUT_TRUSTME = """
import sys
sys.modules["trustme"] = None
"""


def run_pytest(folder: Path, *arguments: str, conftest: str = "") -> "subprocess.CompletedProcess[str]":
    (folder / "test_app.py").write_text(APP_TEST)
    (folder / "conftest.py").write_text(conftest)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *arguments],
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
        timeout=60,
    )


def test_the_fixture_of_an_app(tmp_path: Path) -> None:
    done = run_pytest(tmp_path)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_fixture_without_trustme(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, conftest=WITHOUT_TRUSTME)
    assert done.returncode == 1
    assert "the fixture local_hub needs trustme: pip install 'twin-device[hub]'" in done.stdout
    assert "Traceback" not in done.stdout
    assert "2 errors" in done.stdout


def test_a_suite_that_does_not_ask_for_the_fixture_gets_no_trustme(tmp_path: Path) -> None:
    code = "import sys, twin_device.hub.fixtures, twin_device.hub\nsys.exit('trustme' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_without_trustme_there_is_plaintext_and_ones_own_certificates(tmp_path: Path) -> None:
    with LocalHub(certificates=tmp_path):
        pass
    code = f"""
import sys
sys.modules["trustme"] = None
from twin_device.hub import LocalHub
with LocalHub(mqtts_port=None, mqtt_port=0) as hub, LocalHub(certificates={str(tmp_path)!r}):
    pass
try:
    LocalHub().start()
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, encoding="utf-8")
    assert (done.stdout, done.stderr) == ("trustme\n", "")


def test_a_program_that_forgets_to_close_still_ends() -> None:
    code = (
        "from twin_device.hub import LocalHub\nLocalHub(mqtts_port=None, mqtt_port=0).start()\nprint('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=30)
    assert (done.returncode, done.stdout) == (0, "end\n")


def test_a_refused_connection_leaves_the_device_alone(hub: LocalHub) -> None:
    device = hub.create_device("dev", KEY)
    with Wire(hub.mqtt_port) as wire:
        wire.connect(password=token())
        wire.subscribe(RES)
        device.disable()
        device.enable()
        assert wire.rest() == b""
    assert user() == "localhost/dev/?api-version=2021-04-12"
    assert device.connections == 1
