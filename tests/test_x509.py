"""Clients with X.509 certificates against the local hub, on both shells."""

import queue
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.aio_app import BlockingClient, LoopThread
from tests.waiting import PATIENCE, wait_until
from twin_device import ConnectRefused, LocalError, TwinClient
from twin_device.aio import TwinClient as AsyncClient
from twin_device.hub import LocalHub

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        yield hub


@pytest.fixture(params=["threads", "asyncio"])
def make(request: pytest.FixtureRequest, hub: LocalHub) -> Iterator[Make]:
    """make(device_id, certificate, **options): a client that is not connected yet."""
    made: list[Any] = []
    loop = LoopThread() if request.param == "asyncio" else None

    def make(name: str, certificate: Any, **options: Any) -> Any:
        device, _, module = name.partition("/")
        text = f"HostName=localhost:{hub.mqtts_port};DeviceId={device};x509=true"
        if module:
            text += f";ModuleId={module}"
        if not isinstance(certificate, ssl.SSLContext):
            options = {"ca_file": hub.ca_file, **options}
        options = {"certificate": certificate, "timeout": PATIENCE, **options}
        if loop is None:
            made.append(TwinClient.from_connection_string(text, **options))
        else:
            made.append(BlockingClient(loop, AsyncClient.from_connection_string(text, **options)))
        return made[-1]

    yield make
    for client in made:
        client.close()
    if loop is not None:
        assert loop.close() == set()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A device of the test's own."""
    return f"dev-{abs(hash(request.node.name)) % 10**8}"


def test_a_device_that_signed_its_own(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    device = hub.create_device(name, certificate=found.thumbprint, desired={"a": 1})
    with make(name, (found.certificate_file, found.key_file)) as client:
        assert client.desired == {"a": 1}
        assert client.report({"b": 2}) == 2
    assert device.reported == {"b": 2}


@pytest.mark.parametrize("intermediate", [False, True])
def test_a_device_whose_certificate_a_ca_has_signed(
    hub: LocalHub, make: Make, tmp_path: Path, name: str, intermediate: bool
) -> None:
    found = hub.make_certificate(name, tmp_path, intermediate=intermediate)
    hub.create_device(name, authority=True)
    with make(name, (found.certificate_file, found.key_file)) as client:
        assert client.report({"b": 2}) == 2


def test_a_module(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    module = hub.create_device(f"{name}/mod", certificate=found.thumbprint)
    with make(f"{name}/mod", (found.certificate_file, found.key_file)) as client:
        client.report({"b": 2})
    assert module.reported == {"b": 2}


def test_a_context_of_ones_own(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    hub.create_device(name, certificate=found.thumbprint)
    context = ssl.create_default_context(cafile=hub.ca_file)
    context.load_cert_chain(found.certificate_file, found.key_file)
    with make(name, context) as client:
        assert client.report({"b": 2}) == 2


def test_nothing_is_renewed(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    device = hub.create_device(name, certificate=found.thumbprint)
    # With a key this connection would end after a second.
    with make(name, (found.certificate_file, found.key_file), token_lifetime=1) as client:
        end = time.monotonic() + 1.5
        wait_until(lambda: time.monotonic() > end, "more than its time")
        assert client.state == "synchronised"
    assert device.connections == 1


def refused(client: Any, message: str) -> ConnectRefused:
    with pytest.raises(ConnectRefused, match=message) as raised:
        client.connect()
    return raised.value


def test_a_certificate_that_the_hub_does_not_know(
    hub: LocalHub, make: Make, tmp_path: Path, name: str
) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    hub.create_device(name, certificate="AB" * 20)
    error = refused(make(name, (found.certificate_file, found.key_file)), "certificate and its thumbprint")
    assert not error.can_retry


def test_a_ca_that_the_hub_does_not_know(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    found = LocalHub().make_certificate(name, tmp_path)
    device = hub.create_device(name, authority=True)
    client = make(name, (found.certificate_file, found.key_file))
    assert not refused(client, "certificate").can_retry
    assert device.connections == 0


def test_a_hub_that_another_ca_has_signed(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    hub.create_device(name, certificate=found.thumbprint)
    client = make(name, (found.certificate_file, found.key_file), ca_file=found.certificate_file)
    error = refused(client, "certificate of localhost:.* is not to be trusted")
    assert not error.can_retry


def test_one_that_has_expired_is_named_before_anything_is_sent(
    hub: LocalHub, make: Make, tmp_path: Path, name: str
) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True, ends=-60.0)
    device = hub.create_device(name, certificate=found.thumbprint)
    error = refused(
        make(name, (found.certificate_file, found.key_file)), f"{name}.*is not valid: certificate has expired"
    )
    assert not error.can_retry
    assert device.connections == 0


def test_a_key_that_is_missing(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    with pytest.raises(LocalError, match=r"key file '.*none.key' cannot be read"):
        make(name, (found.certificate_file, str(tmp_path / "none.key"))).connect()


def test_a_renewed_certificate_needs_no_restart(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    old = hub.make_certificate(name, tmp_path / "old", self_signed=True)
    new = hub.make_certificate(name, tmp_path / "new", self_signed=True)
    device = hub.create_device(name, certificate=(old.thumbprint, new.thumbprint))
    pair = (str(tmp_path / "device.pem"), str(tmp_path / "device.key"))

    def install(found: Any) -> None:
        shutil.copy(found.certificate_file, pair[0])
        shutil.copy(found.key_file, pair[1])

    install(old)
    with make(name, pair) as client:
        client.report({"a": 1})
        install(new)
        device.disconnect()
        wait_until(lambda: device.connections == 2 and client.state == "synchronised", "it is back")
        client.report({"a": 2})
    assert device.reported == {"a": 2}


def test_a_certificate_for_an_identity_with_a_key(
    hub: LocalHub, make: Make, tmp_path: Path, name: str
) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    hub.create_device(name)
    assert not refused(make(name, (found.certificate_file, found.key_file)), "credentials").can_retry


def test_a_refused_certificate_is_not_tried_hot(hub: LocalHub, make: Make, tmp_path: Path, name: str) -> None:
    found = hub.make_certificate(name, tmp_path, self_signed=True)
    hub.create_device(name, certificate="AB" * 20)
    client = make(name, (found.certificate_file, found.key_file))
    errors: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    client.on_error(errors.put)
    client.connect(wait=False)
    assert isinstance(errors.get(timeout=PATIENCE), ConnectRefused)
    end = time.monotonic() + 1
    with pytest.raises(queue.Empty):
        errors.get(timeout=end - time.monotonic())
