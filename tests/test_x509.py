"""Client and hub prove to each other who they are, by certificates; what fails is named and not tried hot."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.waiting import PATIENCE, wait_until
from twin_device import ConnectRefused, LocalError
from twin_device import TwinClient as ThreadClient
from twin_device.aio import TwinClient as AsyncClient
from twin_device.hub import LocalHub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[LocalHub]:
    with LocalHub(certificates=folder / "hub") as hub:
        yield hub


def files(hub: LocalHub, folder: Path, **options: Any) -> tuple[str, str]:
    made = hub.make_certificate(options.pop("identity", "door"), folder, **options)
    return made.certificate_file, made.key_file


async def _report(client: AsyncClient) -> Any:
    try:
        await client.connect()
        return await client.report({"a": 1})
    finally:
        await client.close()


def report(kind: Any, host: str, device: str, **options: Any) -> Any:
    """Connect, report, close, on either shell."""
    device_id, _, module_id = device.partition("/")
    options = {"module_id": module_id or None, "timeout": PATIENCE, **options}
    if kind is AsyncClient:

        async def run() -> Any:
            return await _report(AsyncClient(host, device_id, **options))

        return asyncio.run(run())
    with ThreadClient(host, device_id, **options) as client:
        return client.report({"a": 1})


SHELLS = pytest.mark.parametrize("kind", [ThreadClient, AsyncClient], ids=["threads", "asyncio"])


@SHELLS
@pytest.mark.parametrize("how", ["thumbprint", "authority", "one between", "context"])
@pytest.mark.parametrize("identity", ["front", "front/camera"])
def test_a_certificate_connects(hub: LocalHub, tmp_path: Path, kind: Any, how: str, identity: str) -> None:
    signs_itself = how in ("thumbprint", "context")
    pair = files(
        hub, tmp_path, identity=identity, self_signed=signs_itself, intermediate=how == "one between"
    )
    device = hub.create_device(
        identity, certificate=pair[0] if signs_itself else None, authority=not signs_itself
    )
    try:
        shown: dict[str, Any] = {"certificate": pair, "ca_file": hub.ca_file}
        if how == "context":
            context = ssl.create_default_context(cafile=hub.ca_file)
            context.load_cert_chain(*pair)
            shown = {"certificate": context}
        assert report(kind, f"localhost:{hub.mqtts_port}", identity, **shown) == 2
        assert device.reported == {"a": 1}
    finally:
        hub.device("front").delete()


def case(how: str, hub: LocalHub, folder: Path) -> tuple[str, dict[str, Any]]:
    """Host and options of a client in which one thing is wrong."""
    host, ca_file = f"localhost:{hub.mqtts_port}", hub.ca_file
    pair = files(hub, folder)
    if how == "the hub's CA is unknown":
        with LocalHub(certificates=folder / "stranger") as stranger:
            ca_file = str(folder / "stranger" / "ca.pem")
            assert stranger.ca_file == ca_file
    elif how == "the device's CA is unknown":
        pair = files(LocalHub(), folder)
    elif how == "another device's certificate":
        pair = files(hub, folder, common_name="window")
    elif how == "the device's has expired":
        pair = files(hub, folder, starts=-7200.0, ends=-60.0)
    return host, {"ca_file": ca_file, "certificate": pair}


WRONG = [
    ("the hub's CA is unknown", r"certificate of localhost:\d+ is not to be trusted: .*issuer"),
    ("the device's CA is unknown", "refuse"),
    ("another device's certificate", "refuse"),
    ("the device's has expired", r"'.*door\.pem' is not valid: certificate has expired"),
]


@SHELLS
@pytest.mark.parametrize(("how", "message"), WRONG)
def test_what_is_wrong_is_named_and_not_tried_hot(
    hub: LocalHub, tmp_path: Path, kind: Any, how: str, message: str
) -> None:
    device = hub.create_device("door", authority=True)
    try:
        host, options = case(how, hub, tmp_path)
        with pytest.raises(ConnectRefused, match=message) as raised:
            report(kind, host, "door", **options)
        assert not raised.value.can_retry
        assert device.connections == 0
    finally:
        device.delete()


@SHELLS
def test_a_hub_of_another_name_is_refused(tmp_path: Path, kind: Any) -> None:
    ca, folder = trustme.CA(), tmp_path / "hub"
    folder.mkdir()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    ca.issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(
        str(folder / "server.pem")
    )
    with LocalHub(certificates=folder) as hub:
        pair = files(hub, tmp_path)
        device = hub.create_device("door", authority=True)
        with pytest.raises(ConnectRefused, match=r"not to be trusted: .*not valid for 'localhost'") as raised:
            report(kind, f"localhost:{hub.mqtts_port}", "door", certificate=pair, ca_file=hub.ca_file)
        assert not raised.value.can_retry
        assert device.connections == 0


@SHELLS
@pytest.mark.parametrize(
    ("missing", "message"),
    [(0, r"certificate file '.*door\.pem' cannot be read"), (1, r"key file '.*\.key.*' cannot be read")],
)
def test_a_missing_file_is_named_before_anything_is_dialled(
    hub: LocalHub, tmp_path: Path, kind: Any, missing: int, message: str
) -> None:
    pair = files(hub, tmp_path)
    Path(pair[missing]).unlink()
    with pytest.raises(LocalError, match=message):
        report(kind, f"localhost:{hub.mqtts_port}", "door", certificate=pair, ca_file=hub.ca_file)


def test_a_certificate_has_no_token_to_renew_and_a_new_file_counts(hub: LocalHub, tmp_path: Path) -> None:
    device = hub.create_device("door", authority=True)
    pair = files(hub, tmp_path)
    errors: list[Exception] = []
    told = threading.Event()
    client = ThreadClient(
        f"localhost:{hub.mqtts_port}", "door", certificate=pair, ca_file=hub.ca_file, token_lifetime=1
    )
    client.on_error(lambda error: (errors.append(error), told.set()))
    with client:
        assert not told.wait(1.2)
        assert client.statistics["connects"] == 1
        # Replaced by one that has expired: named at the next dial.
        files(hub, tmp_path, starts=-7200.0, ends=-60.0)
        device.disconnect()
        assert told.wait(PATIENCE)
        assert "has expired" in str(errors[0])
        connections = device.connections
        wait_until(lambda: client.state == "offline", "it waits")
        assert device.connections == connections
    device.delete()
