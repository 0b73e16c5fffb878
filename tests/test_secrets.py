"""No key and no signature in any log: conftest.py reads all that the whole suite makes the package log."""

import logging

import pytest

from tests.conftest import _Watch
from tests.waiting import PATIENCE
from twin_device import TwinClient
from twin_device.hub import Device, LocalHub

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.mark.parametrize(
    "text",
    [
        f"the key is {KEY}",
        f"HostName=h;DeviceId=d;SharedAccessKey={KEY}",
        "SharedAccessKey=c2hvcnRrZXk=",
        "SharedAccessSignature sr=h&sig=Q24ahLH4tHeubVhDv5kUKA2xiVvnqPFhqSD%2FqI&se=1",
    ],
)
def test_what_is_logged_is_read(watch: _Watch, text: str) -> None:
    logging.getLogger("twin_device.somewhere").debug("connecting: %s", text)
    assert len(watch.found) == 1
    watch.found.clear()


def test_what_is_no_secret_may_be_logged(watch: _Watch) -> None:
    logging.getLogger("twin_device").debug("sensor-temp-042 -> $iothub/twin/GET/?$rid=1 SharedAccessKey=...")
    assert watch.found == []


def test_a_device_and_its_hub_log_and_are_read(watch: _Watch, local_hub: LocalHub, device: Device) -> None:
    seen = watch.seen
    with TwinClient.from_connection_string(
        device.connection_string, ca_file=local_hub.ca_file, timeout=PATIENCE
    ) as client:
        client.report({"a": 1})
    assert watch.seen > seen + 4
