"""Devices that connect to the hub with certificates: who is let in, and what it takes to ask for one."""

import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.hub_backend import Backend
from tests.hub_wire import (
    DESIRED,
    GET,
    KEY,
    REPORT,
    RES,
    Closed,
    Wire,
    connect,
    tls_in_pieces,
    token,
    user,
)
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import LocalHub
from twin_device.hub.registry import Refused
from twin_device.hub.tls import Secured
from twin_device.hub.x509 import Issuer, Shown

ACCEPTED, REFUSED = (0x20, b"\0\0"), (0x20, b"\0\5")
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


class Certificates:
    """Made once, by name; a stranger is another hub."""

    def __init__(self, hub: LocalHub, folder: Path) -> None:
        stranger = LocalHub()

        def make(name: str, by: LocalHub = hub, identity: str = "signed", **options: Any) -> Any:
            return by.make_certificate(identity, folder / name, **options)

        self.made = {
            "own": make("own", self_signed=True, identity="own"),
            "own, another's name": make("elsewhere", self_signed=True, identity="own", common_name="x"),
            "old": make("old", self_signed=True, identity="old", starts=-7200.0, ends=-60.0),
            "early": make("early", self_signed=True, identity="early", starts=60.0),
            "signed": make("signed"),
            "signed by one between": make("between", intermediate=True),
            "signed, for the module": make("module", identity="signed/mod"),
            "signed, for another": make("another", common_name="other"),
            "signed, in capitals": make("capitals", common_name="SIGNED"),
            "signed, expired": make("expired", starts=-7200.0, ends=-60.0),
            "signed, not yet valid": make("not-yet", starts=3600.0),
            "signed by a stranger": make("strange", by=stranger),
            "signed itself": make("self", self_signed=True),
        }

    def __getitem__(self, name: str) -> Any:
        return self.made[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[LocalHub]:
    with LocalHub(0, https_port=0, owner_key=KEY, certificates=folder / "hub") as hub:
        yield hub


@pytest.fixture(scope="module")
def certificates(hub: LocalHub, folder: Path) -> Certificates:
    made = Certificates(hub, folder)
    for name in ("own", "old", "early"):
        hub.create_device(name, certificate=made[name].certificate_file)
    hub.create_device("other-name", certificate=made["own, another's name"].thumbprint)
    hub.create_device("second", certificate=("AB" * 20, sha1(made["own"].certificate_file).lower()))
    hub.create_device("own/mod", certificate=made["own"].thumbprint.lower())
    hub.create_device("signed", authority=True)
    hub.create_device("signed/mod", authority=True)
    hub.create_device("off", certificate=made["own"].thumbprint).disable()
    hub.create_device("with-key", KEY)
    hub.create_device("none")
    hub._registry.identities["none"].authentication = "none"
    return made


def sha1(path: str) -> str:
    return x509.load_pem_x509_certificate(Path(path).read_bytes()).fingerprint(hashes.SHA1()).hex()


def client_context(hub: LocalHub, made: Any = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=hub.ca_file)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if made is not None:
        context.load_cert_chain(made.certificate_file, made.key_file)
    return context


def dialled(hub: LocalHub, made: Any = None, version: ssl.TLSVersion | None = None) -> Wire:
    """A connection that shows a certificate, or none."""
    wire = Wire(hub.mqtts_port)
    try:
        wire.socket = client_context(hub, made, version).wrap_socket(wire.socket, server_hostname="localhost")
    except BaseException:
        wire.close()
        raise
    return wire


def answer(hub: LocalHub, name: str, made: Any = None, password: str | None = None) -> tuple[int, bytes]:
    """What a CONNECT gets."""
    with dialled(hub, made) as wire:
        return wire.send(connect(name, user(name), password)).packet()


# ---------------------------------------------------------------------- who is let in


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("own", "own"),
        ("other-name", "own, another's name"),
        ("second", "own"),
        ("own/mod", "own"),
        ("signed", "signed"),
        ("signed", "signed by one between"),
        ("signed/mod", "signed, for the module"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_accepted(
    hub: LocalHub, certificates: Certificates, name: str, shown: str, version: ssl.TLSVersion
) -> None:
    with dialled(hub, certificates[shown], version) as wire:
        assert wire.send(connect(name, user(name))).packet() == ACCEPTED
        wire.subscribe(RES, DESIRED)
        assert wire.ask(f"{GET}1").topic == "$iothub/twin/res/200/?$rid=1"
        hub.device(name).patch_desired({"a": 1})
        assert b'"a":1' in wire.message().payload


REASONS = [
    ("own", None, None, "none is shown"),
    ("own", "own, another's name", None, "thumbprint"),
    ("own", "signed", None, "thumbprint"),
    ("old", "old", None, "has expired"),
    ("early", "early", None, "not valid yet"),
    ("off", "own", None, "disabled"),
    ("signed", None, None, "none is shown"),
    ("signed", "signed, expired", None, "has expired"),
    ("signed", "signed, not yet valid", None, "not valid yet"),
    ("signed", "signed, for another", None, "common name is 'other'"),
    ("signed", "signed, in capitals", None, "common name is 'SIGNED'"),
    ("signed", "signed, for the module", None, "common name is 'signed/mod'"),
    ("signed/mod", "signed", None, "common name is 'signed'"),
    ("signed", "signed by a stranger", None, "no CA for devices vouches"),
    ("signed", "signed itself", None, "no CA for devices vouches"),
    ("signed", "own", None, "no CA for devices vouches"),
    ("own", "own", "token", "there is a password"),
    ("own", None, "token", "there is a password"),
    ("signed", "signed", "nonsense", "there is a password"),
    ("with-key", "own", None, "connects with a key"),
    ("with-key", "signed", "", "connects with a key"),
    ("with-key", None, None, "no shared access signature"),
    ("none", "own", None, "does not connect"),
    ("unknown", "signed", None, "no such identity"),
]


@pytest.mark.parametrize(("name", "shown", "password", "why"), REASONS)
def test_refused(
    hub: LocalHub,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
    name: str,
    shown: str | None,
    password: str | None,
    why: str,
) -> None:
    caplog.set_level("INFO", "twin_device.hub")
    if password == "token":
        password = token(name, hub.device(name).keys[0])
    made = None if shown is None else certificates[shown]
    assert answer(hub, name, made, password) == REFUSED
    wait_until(lambda: why in caplog.text, f"the log tells {why!r}")


def test_a_key_connects_whatever_certificate_is_shown(hub: LocalHub, certificates: Certificates) -> None:
    for made in (None, certificates["own"], certificates["signed by a stranger"]):
        assert answer(hub, "with-key", made, token("with-key")) == ACCEPTED


def test_the_hubs_clock_counts(hub: LocalHub, certificates: Certificates) -> None:
    for offset, code in ((2 * 86400.0, REFUSED), (-7200.0, REFUSED), (60.0, ACCEPTED)):
        for name in ("own", "signed"):
            hub.fault("clock_skew", device=name, times=1, offset=offset)
            assert answer(hub, name, certificates[name]) == code


def test_a_ca_has_its_time_too(hub: LocalHub, tmp_path: Path) -> None:
    years = 365 * 86400.0
    made = hub.make_certificate("signed", tmp_path, starts=-9 * years, ends=9 * years)
    (leaf,) = ders(made.certificate_file)
    authorities = hub._registry.authorities
    assert authorities is not None
    now = time.time()
    authorities.check(Shown(leaf), now)
    for then in (now - 8 * years, now + 8 * years):
        Shown(leaf).check_time(then)
        with pytest.raises(Refused, match="no CA for devices"):
            authorities.check(Shown(leaf), then)


def test_a_certificate_of_another_thumbprint_from_now_on(hub: LocalHub, folder: Path) -> None:
    old, new = (hub.make_certificate("renewed", folder / one, self_signed=True) for one in ("r1", "r2"))
    device = hub.create_device("renewed", certificate=(old.certificate_file, new.thumbprint))
    assert answer(hub, "renewed", old) == answer(hub, "renewed", new) == ACCEPTED
    device.recreate()
    assert answer(hub, "renewed", new) == ACCEPTED
    device.delete()
    hub.create_device("renewed", certificate=Path(new.certificate_file))
    assert answer(hub, "renewed", old) == REFUSED
    assert answer(hub, "renewed", new) == ACCEPTED


def test_a_cas_file_for_devices(hub: LocalHub, certificates: Certificates, folder: Path) -> None:
    # One between a root and the device is enough to be trusted, too.
    root = Issuer("root")
    between = folder / "between.pem"
    chain = x509.load_pem_x509_certificates(
        Path(certificates["signed by one between"].certificate_file).read_bytes()
    )
    between.write_bytes(pem(chain[1]))
    unrelated = folder / "unrelated.pem"
    unrelated.write_bytes(pem(root.certificate))
    for files, signed, signed_by_one_between in (
        (certificates["signed"].ca_file, ACCEPTED, ACCEPTED),
        ((unrelated, between), REFUSED, ACCEPTED),
        (unrelated, REFUSED, REFUSED),
    ):
        with LocalHub(0, certificates=folder / "hub", device_ca=files) as other:
            other.create_device("signed", authority=True)
            assert answer(other, "signed", certificates["signed"]) == signed
            assert answer(other, "signed", certificates["signed by one between"]) == signed_by_one_between


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def test_without_the_one_between_nothing_vouches(
    hub: LocalHub, certificates: Certificates, folder: Path
) -> None:
    made = certificates["signed by one between"]
    alone = folder / "alone.pem"
    whole = x509.load_pem_x509_certificates(Path(made.certificate_file).read_bytes())
    assert len(whole) == 2
    alone.write_bytes(pem(whole[0]))
    assert answer(hub, "signed", made._replace(certificate_file=str(alone))) == REFUSED


def test_paho_with_a_certificate(hub: LocalHub, certificates: Certificates) -> None:
    for name in ("own", "signed/mod"):
        made = certificates["own" if name == "own" else "signed, for the module"]
        got = threading.Event()
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=name)
        client.username_pw_set(user(name))
        client.tls_set(hub.ca_file, made.certificate_file, made.key_file)
        client.on_connect = lambda client, *_: client.subscribe(RES)
        client.on_subscribe = lambda client, *_: client.publish(f"{GET}1")
        client.on_message = lambda *_, got=got: got.set()
        client.connect("localhost", hub.mqtts_port or 0)
        client.loop_start()
        try:
            assert got.wait(PATIENCE)
        finally:
            client.disconnect()
            client.loop_stop()


# ---------------------------------------------------------------------- what back ends see


@pytest.fixture
def backend(hub: LocalHub) -> Iterator[Backend]:
    backend = Backend(hub)
    yield backend
    backend.connection.close()


def self_signed(*thumbprints: str) -> dict[str, Any]:
    shown = dict(zip(("primaryThumbprint", "secondaryThumbprint"), thumbprints, strict=False))
    return {"type": "selfSigned", "x509Thumbprint": shown}


def test_identities_by_rest(hub: LocalHub, certificates: Certificates, backend: Backend) -> None:
    thumbprint = certificates["own"].thumbprint
    body = {"deviceId": "rest", "authentication": self_signed(thumbprint)}
    made = backend.ask("PUT", "/devices/rest", body)
    assert made.status == 200
    assert made.body["authentication"] == {
        "type": "selfSigned",
        "symmetricKey": {"primaryKey": None, "secondaryKey": None},
        "x509Thumbprint": {"primaryThumbprint": thumbprint, "secondaryThumbprint": None},
    }
    assert answer(hub, "rest", certificates["own"]) == ACCEPTED
    signed = {"deviceId": "rest", "moduleId": "m", "authentication": {"type": "certificateAuthority"}}
    assert backend.ask("PUT", "/devices/rest/modules/m", signed).status == 200
    twin = backend.ask("GET", "/twins/rest").body
    assert (twin["authenticationType"], twin["x509Thumbprint"]["primaryThumbprint"]) == (
        "selfSigned",
        thumbprint,
    )
    assert backend.ask("GET", "/twins/rest/modules/m").body["authenticationType"] == "certificateAuthority"
    text = f"SELECT deviceId FROM devices WHERE x509Thumbprint.primaryThumbprint = '{thumbprint}'"
    assert backend.ask("POST", "/devices/query", {"query": text}).body[-1] == {"deviceId": "rest"}
    # To a key and back: what counts is how the identity is now.
    assert backend.ask("PUT", "/devices/rest", {"deviceId": "rest"}, if_match="*").status == 200
    assert answer(hub, "rest", certificates["own"]) == REFUSED
    assert backend.ask("PUT", "/devices/rest", body, if_match="*").status == 200
    assert answer(hub, "rest", certificates["own"]) == ACCEPTED


def test_identities_in_bulk(hub: LocalHub, certificates: Certificates, backend: Backend) -> None:
    items = [
        {"id": "bulk", "authentication": self_signed("AB" * 32, certificates["own"].thumbprint.lower())},
        {"id": "bulk", "moduleId": "m", "authentication": {"type": "certificateAuthority"}},
    ]
    assert backend.ask("POST", "/devices", items).body["isSuccessful"]
    assert answer(hub, "bulk", certificates["own"]) == ACCEPTED
    assert hub.device("bulk/m").twin["authenticationType"] == "certificateAuthority"


@pytest.mark.parametrize(
    "thumbprints", [(), ("",), ("AB" * 19,), ("AB" * 21,), ("XY" * 20,), ("AB" * 20 + "\n",)]
)
def test_bad_thumbprints_are_refused(backend: Backend, thumbprints: tuple[str, ...]) -> None:
    done = backend.ask(
        "PUT", "/devices/bad", {"deviceId": "bad", "authentication": self_signed(*thumbprints)}
    )
    assert (done.status, done.code) == (400, "ArgumentInvalid")
    assert backend.ask("GET", "/devices/bad").status == 404


def test_they_come_back_from_the_data_folder(
    certificates: Certificates, folder: Path, tmp_path: Path
) -> None:
    ca = certificates["signed"].ca_file
    with LocalHub(0, certificates=folder / "hub", data=tmp_path, device_ca=ca) as first:
        first.create_device("own", certificate=certificates["own"].certificate_file)
        first.create_device("signed", authority=True)
        kept = [first.device(name).twin for name in ("own", "signed")]
    with LocalHub(0, certificates=folder / "hub", data=tmp_path, device_ca=ca) as second:
        assert [second.device(name).twin for name in ("own", "signed")] == kept
        for name in ("own", "signed"):
            assert answer(second, name, certificates[name]) == ACCEPTED


def test_a_connection_string_has_no_key(hub: LocalHub, certificates: Certificates) -> None:
    host = f"HostName=localhost:{hub.mqtts_port}"
    assert hub.device("own").connection_string == f"{host};DeviceId=own;x509=true"
    assert hub.device("signed/mod").connection_string == f"{host};DeviceId=signed;ModuleId=mod;x509=true"


# ---------------------------------------------------------------------- what it takes to ask


def test_only_who_needs_it_is_asked(folder: Path, certificates: Certificates, monkeypatch: Any) -> None:
    contexts = []
    begin = Secured.__init__

    def noted(self: Secured, context: Any, *arguments: Any) -> None:
        contexts.append(type(context).__name__)
        begin(self, context, *arguments)

    monkeypatch.setattr(Secured, "__init__", noted)
    with LocalHub(0, certificates=folder / "hub") as hub:
        hub.create_device("dev", KEY)
        assert answer(hub, "dev", None, token()) == ACCEPTED
        device = hub.create_device("own", certificate=certificates["own"].thumbprint)
        assert answer(hub, "dev", None, token()) == ACCEPTED
        device.delete()
        assert answer(hub, "dev", None, token()) == ACCEPTED
    assert contexts == ["SSLContext", "Asking", "SSLContext"]


def test_without_pyopenssl_devices_with_keys_go_on(
    folder: Path,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with LocalHub(0, certificates=folder / "hub") as hub:
        hub.create_device("dev", KEY)
        hub.create_device("own", certificate=certificates["own"].thumbprint)
        monkeypatch.setitem(sys.modules, "twin_device.hub.x509", None)
        assert answer(hub, "dev", None, token()) == ACCEPTED
        assert answer(hub, "own", certificates["own"]) == REFUSED
    assert caplog.text.count("pip install 'twin-device[hub]'") == 1


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_the_hub_says_goodbye(hub: LocalHub, certificates: Certificates, version: ssl.TLSVersion) -> None:
    context = client_context(hub, None, version)
    raw = socket.create_connection(("127.0.0.1", hub.mqtts_port or 0), PATIENCE)
    with context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False) as wire:
        assert wire.version() == version.name.replace("_", ".")
        wire.sendall(connect("own", user("own")))
        assert wire.recv(4) == b"\x20\2\0\5"
        assert wire.recv(1) == b""
    wait_until(lambda: not hub._endpoint.open, "the connection has ended")


def test_a_goodbye_of_the_device_ends_its_connection(hub: LocalHub, certificates: Certificates) -> None:
    with dialled(hub, certificates["own"]) as wire:
        assert wire.send(connect("own", user("own"))).packet() == ACCEPTED
        assert isinstance(wire.socket, ssl.SSLSocket)
        wire.socket.unwrap().close()
    wait_until(lambda: not hub.device("own").connected, "the connection has ended")


def test_large_packets_both_ways(hub: LocalHub, certificates: Certificates) -> None:
    document = b'{"values":["%b"]}' % b'","'.join([b"x" * 4000] * 7)
    with dialled(hub, certificates["signed"]) as wire:
        assert wire.send(connect("signed", user("signed"))).packet() == ACCEPTED
        wire.subscribe(RES)
        assert "res/204/" in wire.ask(f"{REPORT}1", document).topic
        assert document[:-1] in wire.ask(f"{GET}2").payload


def test_the_newer_connection_wins_and_patience_has_no_end(hub: LocalHub, certificates: Certificates) -> None:
    with dialled(hub, certificates["own"]) as older:
        assert older.send(connect("own", user("own"))).packet() == ACCEPTED
        with dialled(hub, certificates["own"]) as newer:
            assert newer.send(connect("own", user("own"))).packet() == ACCEPTED
            with pytest.raises(Closed):
                older.packet()
            newer.nothing_waits()


def test_a_handshake_may_come_in_pieces(hub: LocalHub, certificates: Certificates) -> None:
    context = client_context(hub, certificates["signed by one between"])
    with tls_in_pieces(hub.mqtts_port or 0, context, 7) as do:
        do("do_handshake")
        do("write", connect("signed", user("signed")))
        assert do("read", 100) == b"\x20\2\0\0"


GOODBYE = b"\x15\3\3\0\2\1\0"


class Spoiled(NamedTuple):
    """What goes wrong in a handshake: in this flight of the client's one byte is another; it is cut off."""

    version: ssl.TLSVersion
    flight: int
    at: int
    byte: int
    cut: int


def shake_hands(hub: LocalHub, made: Any, spoiled: Spoiled) -> None:
    """As far as it goes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = client_context(hub, made, spoiled.version)
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", hub.mqtts_port or 0), PATIENCE) as raw:
        for flight in range(5):
            try:
                tls.do_handshake()
                tls.write(connect("own", user("own")))
            except ssl.SSLWantReadError:
                pass
            sent = bytearray(outgoing.read())
            if flight == spoiled.flight and sent:
                sent[spoiled.at % len(sent)] = spoiled.byte
                raw.sendall(sent[: spoiled.cut] or GOODBYE)
                # Else the hub could wait for more, and so would we.
                raw.shutdown(socket.SHUT_WR)
            else:
                raw.sendall(sent)
            data = raw.recv(65536)
            if not data:
                return
            incoming.write(data)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spoiled=st.builds(
        Spoiled,
        st.sampled_from(VERSIONS),
        st.integers(0, 1),
        st.integers(0, 3000),
        st.integers(0, 255),
        st.one_of(st.just(1 << 20), st.integers(1, 2000)),
    )
)
@example(spoiled=Spoiled(ssl.TLSVersion.TLSv1_2, 1, 60, 0xFF, 1 << 20))  # amid the certificate
@example(spoiled=Spoiled(ssl.TLSVersion.TLSv1_2, 1, 0, 0, 0))  # a goodbye in its place
def test_no_handshake_takes_the_hub_down(
    hub: LocalHub, certificates: Certificates, spoiled: Spoiled, caplog: pytest.LogCaptureFixture
) -> None:
    with suppress(OSError):  # the hub has had enough
        shake_hands(hub, certificates["signed by one between"], spoiled)
    assert answer(hub, "own", certificates["own"]) == ACCEPTED
    assert "rror of the hub" not in caplog.text
    assert "Traceback" not in caplog.text


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(min_size=1, max_size=400))
@example(noise=GOODBYE)
@example(noise=b"\x16\3\1\xff\xff\1\xff\xff\xff" + bytes(70_000))
def test_nor_does_what_is_none(
    hub: LocalHub, certificates: Certificates, noise: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        suppress(OSError),
        socket.create_connection(("127.0.0.1", hub.mqtts_port or 0), PATIENCE) as raw,
    ):
        raw.sendall(noise)
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(65536):
            pass
    assert answer(hub, "own", certificates["own"]) == ACCEPTED
    assert "Traceback" not in caplog.text


def test_a_connection_costs_little_memory(hub: LocalHub, certificates: Certificates) -> None:
    names = [f"memory{number}" for number in range(20)]
    for name in names:
        hub.create_device(name, certificate=certificates["own"].thumbprint)
    context = client_context(hub, certificates["own"])

    def one(stack: ExitStack) -> Wire:
        wire = stack.enter_context(Wire(hub.mqtts_port))
        wire.socket = context.wrap_socket(wire.socket, server_hostname="localhost")
        return wire

    with ExitStack() as stack:
        one(stack)
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for name in names:
            assert one(stack).send(connect(name, user(name))).packet() == ACCEPTED
        after, _ = tracemalloc.get_traced_memory()
    # Of Python's memory, the test's own side included; OpenSSL's is not seen.
    assert (after - before) / len(names) < 64 * 1024


# ---------------------------------------------------------------------- what strangers show


@given(
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 500)),
)
def test_whatever_is_shown_is_refused_with_a_reason(
    hub: LocalHub, certificates: Certificates, changes: list[tuple[int, int]], cut: int | None
) -> None:
    whole = ders(certificates["signed by one between"].certificate_file)
    for number in range(len(whole)):
        spoiled = bytearray(whole[number])
        for at, byte in changes:
            spoiled[at % len(spoiled)] = byte
        if bytes(spoiled[:cut]) == whole[number]:
            continue
        leaf, *chain = (*whole[:number], bytes(spoiled[:cut]), *whole[number + 1 :])
        authorities = hub._registry.authorities
        assert authorities is not None
        with pytest.raises(Refused):
            authorities.check(Shown(leaf, tuple(chain)), time.time())
        stranger = Shown(leaf)
        with suppress(Refused):
            stranger.check_time(time.time())
        with suppress(Refused):
            stranger.check_name("signed")


def ders(path: str) -> list[bytes]:
    found = x509.load_pem_x509_certificates(Path(path).read_bytes())
    return [one.public_bytes(Encoding.DER) for one in found]


# ---------------------------------------------------------------------- arguments


def test_keys_are_for_their_owner_alone(hub: LocalHub, tmp_path: Path) -> None:
    made = hub.make_certificate("a/b*c", tmp_path / "new", self_signed=True)
    again = hub.make_certificate("a/b*c", tmp_path / "new", self_signed=True)
    assert made.key_file == again.key_file
    assert made.thumbprint != again.thumbprint
    assert stat.S_IMODE(Path(made.key_file).stat().st_mode) & 0o077 == 0 or sys.platform == "win32"
    client_context(hub, again)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a%2Fb%2Ac.pem", "a%2Fb%2Ac.key.pem"}


def test_bad_arguments_are_named(hub: LocalHub, certificates: Certificates, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    leaf = certificates["signed"].certificate_file
    for wrong, why in (
        ({"certificate": "AB" * 19}, "no thumbprint of 40 or 64"),
        ({"certificate": tmp_path / "missing.pem"}, r"missing\.pem.*No such file"),
        ({"certificate": empty}, "holds no certificate in PEM"),
        ({"certificate": certificates["signed"].key_file}, "holds no certificate in PEM"),
        ({"certificate": ("AB" * 20,)}, "one or two certificates, not 1"),
        ({"certificate": "AB" * 20, "key": KEY}, "one of key, certificate and authority"),
        ({"authority": True, "key": KEY}, "one of key, certificate and authority"),
    ):
        with pytest.raises(ValueError, match=why):
            hub.create_device("wrong", **wrong)  # type: ignore[arg-type]  # as said
        assert "wrong" not in hub._registry.identities
    for path, why in ((empty, "no certificate"), (leaf, "of no CA"), (tmp_path / "x", "cannot be read")):
        with pytest.raises(ValueError, match=why):
            LocalHub(device_ca=path)
    with pytest.raises(ValueError, match="64"):
        hub.make_certificate("x" * 65, tmp_path)
    with pytest.raises(ValueError, match="date"):
        hub.make_certificate("x", tmp_path, ends=-7200.0)


# ---------------------------------------------------------------------- the command


def back_end(hub: LocalHub, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "twin_device.cli", "hub", "device", *arguments]
    text = hub.service_connection_string
    return subprocess.run(
        [*command, "--ca-file", hub.ca_file, "--connection-string", text],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def test_devices_by_command(hub: LocalHub, certificates: Certificates) -> None:
    own = certificates["own"]
    for name, options, text in (
        ("cli-1", ["--thumbprint", own.thumbprint], "DeviceId=cli-1"),
        ("cli-1/m", ["--thumbprint", "AB" * 20, "--thumbprint", own.thumbprint], "DeviceId=cli-1;ModuleId=m"),
        ("cli-2", ["--x509-certificate", own.certificate_file], "DeviceId=cli-2"),
        ("signed-by-cli", ["--ca-signed"], "DeviceId=signed-by-cli"),
    ):
        done = back_end(hub, "create", name, *options)
        assert (done.returncode, done.stdout) == (0, f"HostName=localhost;{text};x509=true\n"), done.stderr
        if name.startswith("cli"):
            assert answer(hub, name, own) == ACCEPTED
    assert hub.device("signed-by-cli").twin["authenticationType"] == "certificateAuthority"


def test_wrong_use_of_the_command(hub: LocalHub, certificates: Certificates) -> None:
    key_file = certificates["own"].key_file
    for options, status, why in (
        (["--x509-certificate", key_file], 2, f"{key_file} holds no certificate in PEM"),
        (["--x509-certificate", "missing"], 2, "missing cannot be read: No such file"),
        (["--thumbprint", "AB"], 1, "A thumbprint is 40 or 64 hexadecimal digits"),
        (["--thumbprint", "AB" * 20] * 3, 2, "two certificates at most, not 3"),
        (["--ca-signed", "--key", KEY], 2, "not allowed with"),
    ):
        done = back_end(hub, "create", "cli-wrong", *options)
        assert (done.returncode, done.stdout) == (status, "")
        assert why in done.stderr
