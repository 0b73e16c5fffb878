"""What importing the hub costs: pytest imports the plugin, and this package with it, in every run."""

import subprocess
import sys

import pytest

HEAVY = {"OpenSSL", "aiohttp", "asyncio", "cryptography", "paho", "ssl", "trustme", "urllib"}


def imported(program: str) -> set[str]:
    """The heavy packages that a program imports beyond what pytest has imported anyway."""
    code = (
        f"import sys, pytest\nfor name in {HEAVY!r}: sys.modules.pop(name, None)\n{program}\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60, check=True
    )
    return HEAVY & set(done.stdout.split())


def test_the_plugin_imports_nothing_heavy() -> None:
    assert imported("import twin_device.hub.fixtures") == imported("import twin_device")


def test_who_asks_for_a_hub_gets_one_and_no_client() -> None:
    got = imported("from twin_device.hub import Device, Fault, LocalHub, Packet, Telemetry")
    assert {"asyncio", "ssl"} <= got
    assert not got & {"OpenSSL", "aiohttp", "cryptography", "paho", "trustme"}


def test_a_name_that_there_is_not() -> None:
    import twin_device.hub

    with pytest.raises(AttributeError, match=r"twin_device\.hub.*'Hub'"):
        _ = twin_device.hub.Hub
