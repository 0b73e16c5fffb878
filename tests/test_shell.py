"""What client.py and aio.py have from shell.py: options, and what a client without a connection says."""

import inspect
import re
from typing import Any

import pytest

from twin_device import LocalError, TwinClient, aio

KEY = b"0123456789abcdef0123456789abcdef"

pytestmark = pytest.mark.parametrize("shell", [TwinClient, aio.TwinClient], ids=["threads", "asyncio"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_alive": 0}, "keep_alive"),
        ({"keep_alive": 1178}, "keep_alive"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"token_lifetime": -1}, "token_lifetime"),
        ({"port": 65536}, "port"),
        ({"key": "not base64!"}, "SharedAccessKey"),
        ({"device_id": "a b"}, "DeviceId"),
        ({"host": "https://hub"}, "HostName"),
    ],
)
def test_bad_options_are_refused_by_name(shell: Any, options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"host": "localhost", "device_id": "dev-1", "key": KEY, **options}
    with pytest.raises(LocalError, match=message):
        shell(**arguments)


@pytest.mark.parametrize(
    ("host", "options", "port"),
    [
        ("myhub.azure-devices.net", {}, 8883),
        ("localhost:18883", {}, 18883),
        ("localhost", {"tls": False}, 1883),
        ("localhost", {"port": 443}, 443),
    ],
)
def test_the_port_that_is_dialled(shell: Any, host: str, options: dict[str, Any], port: int) -> None:
    client = shell(host, "dev-1", key=KEY, **options)
    assert repr(client) == f"<TwinClient dev-1 at {host.partition(':')[0]}:{port}, offline>"


def test_help_tells_every_option(shell: Any) -> None:
    told = inspect.getdoc(shell.__init__) or ""
    for name in inspect.signature(shell).parameters:
        assert re.search(rf"\b{name}\b", told), name
