"""TwinClient against the local hub, on real sockets with TLS and real paho."""

import errno
import json
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from pytest_mock import MockerFixture

import twin_device
from tests.app import App
from tests.waiting import PATIENCE, wait_until
from twin_device import (
    ConnectRefused,
    LocalError,
    NotConnected,
    PatchError,
    ReportRejected,
    ReportTimeout,
    RetrieveTimeout,
    TwinClient,
    shell,
)
from twin_device import client as client_module
from twin_device.core.errors import StoreError
from twin_device.hub import Device, LocalHub

MakeApp = Callable[..., App]
KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


def reported_patches(device: Device) -> list[dict[str, Any]]:
    return [
        json.loads(packet.payload)
        for packet in device.packets
        if packet.direction == "in"
        and (packet.topic or "").startswith("$iothub/twin/PATCH/properties/reported/")
    ]


# ---------------------------------------------------------------------- the way in


def test_the_first_twin_takes_six_packets_in_the_only_right_order(device: Device, app: App) -> None:
    packets = device.packets
    assert [(packet.direction, packet.kind) for packet in packets] == [
        ("in", "CONNECT"),
        ("out", "CONNACK"),
        ("in", "SUBSCRIBE"),
        ("out", "SUBACK"),
        ("in", "PUBLISH"),
        ("out", "PUBLISH"),
    ]
    assert packets[4].topic.startswith("$iothub/twin/GET/?$rid=")
    assert packets[4].qos == 0
    assert packets[4].payload == b""


def test_the_first_document_is_one_patch_of_everything(make_app: MakeApp, device: Device) -> None:
    app = make_app(device)
    with app.client as client:
        assert client.state == "synchronised"
        assert app.next_patch() == {"telemetryInterval": 30}
        assert client.desired == {"telemetryInterval": 30}
        assert (client.desired_version, client.reported_version) == (1, 1)


def test_desired_patches_arrive_whole_and_in_order(device: Device, app: App) -> None:
    patches: list[dict[str, Any]] = [
        {"a": {"b": 1}},
        {"a": {"c": [1, 2]}},
        {"a": {"b": None}},
        {"telemetryInterval": None},
    ]
    for patch in patches:
        device.patch_desired(patch)
    assert [app.next_patch() for _ in patches] == patches
    assert app.client.desired == {"a": {"c": [1, 2]}} == device.desired


def test_what_changed_while_offline_is_one_exact_difference(
    local_hub: LocalHub, device: Device, app: App
) -> None:
    device.patch_desired({"gone": 1, "kept": {"x": 1, "y": 2}})
    app.next_patch()
    local_hub.stop_listening()
    app.await_state("offline")
    device.patch_desired({"gone": None})
    device.patch_desired({"telemetryInterval": 99})
    device.replace_desired({"kept": {"x": 1}, "telemetryInterval": 5})
    local_hub.listen_again()
    assert app.next_patch() == {"gone": None, "kept": {"y": None}, "telemetryInterval": 5}
    app.await_state("synchronised")
    assert app.changes.empty()


def test_a_module_has_a_twin_of_its_own(local_hub: LocalHub, make_app: MakeApp) -> None:
    module = local_hub.create_device("gateway-7/thermostat", desired={"set": 21})
    app = make_app(module)
    with app.client as client:
        assert app.next_patch() == {"set": 21}
        client.report({"measured": 20.5})
    assert module.reported == {"measured": 20.5}
    assert local_hub.device("gateway-7").reported == {}


def test_a_gateway_host_name_is_dialled_and_the_hubs_name_signed(make_app: MakeApp) -> None:
    with LocalHub(host_names=("plant.azure-devices.net",)) as hub:
        device = hub.create_device("dev-1", key=KEY)
        text = (
            f"HostName=plant.azure-devices.net;DeviceId=dev-1;SharedAccessKey={KEY};"
            f"GatewayHostName=localhost:{hub.mqtts_port}"
        )
        with TwinClient.from_connection_string(text, ca_file=hub.ca_file, timeout=PATIENCE) as client:
            assert client.report({"a": 1}) == 2
        assert device.reported == {"a": 1}


# ---------------------------------------------------------------------- reporting and retrieving


def test_a_report_waits_for_the_answer_and_gives_the_version(device: Device, app: App) -> None:
    assert app.client.report({"batteryLevel": 55}) == 2
    assert app.client.report({"batteryLevel": None, "uptime": 1}) == 3
    assert device.reported == {"uptime": 1} == app.client.reported


def test_fifty_reports_while_one_is_in_flight_are_one_more_patch(
    local_hub: LocalHub, device: Device, app: App
) -> None:
    fault = local_hub.fault("answer_late", operation="report", seconds_late=0.3, times=1)
    first = app.client.report({"n": -1}, wait=False)
    others = [app.client.report({"n": n, f"k{n % 7}": n}, wait=False) for n in range(50)]
    assert first.wait() == 2
    assert {report.wait() for report in others} == {3}
    assert fault.hits == 1
    assert len(reported_patches(device)) == 2
    assert device.reported == {
        "n": 49,
        **{f"k{k}": max(n for n in range(50) if n % 7 == k) for k in range(7)},
    }


def test_fifty_reports_at_once_are_two_patches_at_most(device: Device, app: App) -> None:
    for burst in range(20):
        device.clear_packets()
        reports = [app.client.report({"n": n, "burst": burst}, wait=False) for n in range(50)]
        for report in reports:
            report.wait()
        assert len(reported_patches(device)) <= 2
        assert device.reported == {"n": 49, "burst": burst}


def test_a_burst_that_nobody_waits_for_arrives(device: Device, app: App) -> None:
    for n in range(50):
        app.client.report({"n": n}, wait=False)
    device.wait_for({"n": 49}, PATIENCE)


def test_reports_made_offline_leave_as_one_patch(local_hub: LocalHub, device: Device, app: App) -> None:
    local_hub.stop_listening()
    app.await_state("offline")
    device.clear_packets()
    reports = [app.client.report({"n": n}, wait=False) for n in range(50)]
    local_hub.listen_again()
    for report in reports:
        report.wait()
    assert reported_patches(device) == [{"n": 49}]


def test_reports_made_before_the_first_connection_are_sent_after_it(
    make_app: MakeApp, device: Device
) -> None:
    app = make_app(device)
    report = app.client.report({"early": {"a": 1}}, wait=False)
    app.client.report({"early": None}, wait=False)
    app.client.report({"early": {"b": 2}}, wait=False)
    app.client.connect()
    assert report.wait() == 2
    device.wait_for({"early": {"b": 2, "a": None}})


def test_a_report_that_changes_nothing_is_answered_without_traffic(device: Device, app: App) -> None:
    app.client.report({"a": {"b": 1}})
    assert app.client.report({"a": {"b": 1}, "never": None}) == 2
    assert len(reported_patches(device)) == 1
    assert app.client.report({"a": {"b": 1}}, always=True) == 3
    assert len(reported_patches(device)) == 2


def test_a_condition_that_does_not_hold_is_a_412(device: Device, app: App) -> None:
    version = app.client.report({"a": 1})
    assert app.client.report({"a": 2}, version=version) == version + 1
    with pytest.raises(ReportRejected) as raised:
        app.client.report({"a": 3}, version=version)
    assert raised.value.status == 412
    assert device.reported == {"a": 2} == app.client.reported


def test_an_invalid_patch_names_its_path_and_changes_nothing(device: Device, app: App) -> None:
    app.client.report({"a": 1})
    with pytest.raises(PatchError, match=r"b\.c\[1\]") as raised:
        app.client.report({"a": 2, "b": {"c": [1, None]}})
    assert raised.value.path == "b.c[1]"
    assert app.client.report({"z": 1}) == 3
    assert device.reported == {"a": 1, "z": 1}


def test_a_patch_that_the_app_changes_afterwards_is_sent_as_it_was(device: Device, app: App) -> None:
    patch: dict[str, Any] = {"list": [{"x": 1}]}
    report = app.client.report(patch, wait=False)
    patch["list"][0]["x"] = 2
    report.wait()
    assert device.reported == {"list": [{"x": 1}]}


def test_retrieve_asks_the_hub_now(device: Device, app: App) -> None:
    app.client.report({"a": 1})
    assert app.client.retrieve() == {"desired": {"telemetryInterval": 30}, "reported": {"a": 1}}
    assert app.client.statistics["retrieves"] == 2


def test_a_wait_ends_in_time_and_the_report_still_arrives(
    local_hub: LocalHub, device: Device, app: App
) -> None:
    local_hub.fault("answer_lost", times=2)
    with pytest.raises(ReportTimeout, match="still on its way"):
        app.client.report({"a": 1}, timeout=0.05)
    with pytest.raises(RetrieveTimeout):
        app.client.retrieve(timeout=0.05)
    device.wait_for({"a": 1})


def test_what_is_gathered_outlives_a_disconnect(make_app: MakeApp, device: Device) -> None:
    app = make_app(device)
    app.client.connect()
    app.client.disconnect()
    assert app.client.state == "offline"
    report = app.client.report({"later": 1}, wait=False)
    app.client.connect()
    assert report.wait() == 2
    assert device.reported == {"later": 1}


def test_close_waits_for_the_reports_on_their_way(local_hub: LocalHub, device: Device, app: App) -> None:
    local_hub.fault("answer_late", operation="report", seconds_late=0.2, times=1)
    report = app.client.report({"last": "words"}, wait=False)
    app.client.close()
    assert report.wait() == 2


def test_every_call_on_a_closed_or_unconnected_client_says_so(make_app: MakeApp, device: Device) -> None:
    client = make_app(device).client
    for call in (lambda: client.report({"a": 1}), client.retrieve):
        with pytest.raises(NotConnected, match="connect"):
            call()
    report = client.report({"a": 1}, wait=False)
    client.close()
    for call in (
        lambda: client.report({"a": 1}),
        lambda: client.report({}, wait=False),
        client.retrieve,
        client.connect,
    ):
        with pytest.raises(NotConnected):
            call()
    with pytest.raises(NotConnected):
        report.wait()
    assert device.reported == {}


# ---------------------------------------------------------------------- handlers


def test_handlers_may_raise_and_everything_goes_on(device: Device, app: App) -> None:
    @app.client.on_desired
    def broken(patch: dict[str, Any], desired: dict[str, Any]) -> None:
        raise KeyError("a bug of the app")

    device.patch_desired({"a": 1})
    device.patch_desired({"a": 2})
    assert [app.next_patch(), app.next_patch()] == [{"a": 1}, {"a": 2}]
    assert [type(app.next_error()), type(app.next_error())] == [KeyError, KeyError]
    assert app.client.report({"still": "alive"}) == 2


def test_an_error_handler_may_raise_too(device: Device, app: App, caplog: pytest.LogCaptureFixture) -> None:
    @app.client.on_error
    def broken(error: Exception) -> None:
        raise ValueError("even here")

    @app.client.on_desired
    def broken_too(patch: dict[str, Any], desired: dict[str, Any]) -> None:
        raise KeyError("a bug of the app")

    device.patch_desired({"a": 1})
    app.next_error()
    device.patch_desired({"a": 2})
    app.next_error()
    assert "an error handler raised" in caplog.text


def test_a_handler_may_call_the_blocking_methods(make_app: MakeApp, device: Device) -> None:
    app = make_app(device)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @app.client.on_desired
    def answer(patch: dict[str, Any], desired: dict[str, Any]) -> None:
        results.put(app.client.report({"got": patch}))
        results.put(app.client.retrieve()["reported"])

    app.client.connect()
    assert results.get(timeout=PATIENCE) == 2
    assert results.get(timeout=PATIENCE) == {"got": {"telemetryInterval": 30}}


def test_a_handler_that_blocks_holds_up_handlers_only(device: Device, app: App) -> None:
    release = threading.Event()
    app.client.on_desired(lambda patch, desired: release.wait(PATIENCE))
    device.patch_desired({"a": 1})
    device.patch_desired({"a": 2})
    assert app.next_patch() == {"a": 1}
    assert app.client.report({"meanwhile": True}) == 2
    assert app.client.retrieve()["desired"] == {"telemetryInterval": 30, "a": 2}
    assert app.changes.empty()
    release.set()
    assert app.next_patch() == {"a": 2}


def test_what_a_handler_does_to_its_documents_is_its_own_affair(device: Device, app: App) -> None:
    @app.client.on_desired
    def vandal(patch: dict[str, Any], desired: dict[str, Any]) -> None:
        desired.clear()
        patch["deep"]["list"].append("mine")

    device.patch_desired({"deep": {"list": [1]}})
    app.next_patch()
    device.patch_desired({"deep": {"list": [2]}})
    app.next_patch()
    assert app.client.desired == {"telemetryInterval": 30, "deep": {"list": [2]}}


def test_a_handler_may_close_the_client(device: Device, app: App) -> None:
    app.client.on_desired(lambda patch, desired: app.client.close())
    device.patch_desired({"a": 1})
    wait_until(lambda: not twin_threads(), "the client's threads end")
    assert app.client.state == "offline"


def test_a_handler_may_reconnect_the_client(device: Device, app: App) -> None:
    done = threading.Event()

    @app.client.on_desired
    def reconnect(patch: dict[str, Any], desired: dict[str, Any]) -> None:
        if patch == {"reconnect": True}:
            app.client.disconnect()
            app.client.connect()
            done.set()

    device.patch_desired({"reconnect": True})
    assert done.wait(PATIENCE)
    device.patch_desired({"after": True})
    assert app.next_patch() == {"reconnect": True}
    assert app.next_patch() == {"after": True}
    assert len(twin_threads()) == 2


# ---------------------------------------------------------------------- settings


def test_a_setting_goes_through_pending_to_success_and_failure(device: Device, app: App) -> None:
    applied = []

    @app.client.setting("telemetryConfig")
    def apply(value: dict[str, Any]) -> None:
        if value["sendFrequency"] == "0s":
            raise ValueError("too often")
        applied.append(value)

    good = {"configId": "1", "sendFrequency": "5m"}
    device.patch_desired({"telemetryConfig": good})
    device.wait_for({"telemetryConfig": {**good, "status": "Success", "pendingConfig": None}})
    assert reported_patches(device)[0] == {"telemetryConfig": {"status": "Pending", "pendingConfig": good}}
    device.patch_desired({"telemetryConfig": {"configId": "2", "sendFrequency": "0s"}})
    device.wait_for(
        {"telemetryConfig": {**good, "status": "Failed", "reason": "too often", "pendingConfig": None}}
    )
    assert applied == [good]
    assert isinstance(app.next_error(), ValueError)


def test_a_setting_that_is_applied_is_not_applied_again(make_app: MakeApp, device: Device) -> None:
    calls: queue.SimpleQueue[int] = queue.SimpleQueue()
    for _ in range(2):
        # The second client is the device after a reboot: all it knows is what the hub tells.
        app = make_app(device)
        app.client.setting("telemetryInterval", shape="pnp")(calls.put)
        app.client.connect()
        device.wait_for({"telemetryInterval": {"value": 30, "ac": 200}})
        app.client.retrieve()
        app.client.close()
    assert calls.get(timeout=PATIENCE) == 30
    assert calls.empty()


def test_a_setting_declared_late_is_looked_at_at_once(device: Device, app: App) -> None:
    app.client.setting("telemetryInterval")(lambda value: None)
    device.wait_for({"telemetryInterval": {"value": 30, "status": "Success"}})


# ---------------------------------------------------------------------- threads and ends


def twin_threads() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if re.match("twin-(network|dispatcher)-", thread.name)
    ]


def test_a_client_has_at_most_two_threads_and_leaves_none(make_app: MakeApp, device: Device) -> None:
    app = make_app(device)
    assert twin_threads() == []
    app.client.connect()
    assert len(twin_threads()) == 2
    app.client.close()
    assert twin_threads() == []
    app.client.close()


@pytest.mark.parametrize("interrupted", ["twin-network", "twin-dispatcher"])
def test_an_interrupt_while_the_threads_start_leaves_a_client_that_works(
    mocker: MockerFixture, make_app: MakeApp, device: Device, interrupted: str
) -> None:
    app = make_app(device)
    start = threading.Thread.start

    def interrupt(thread: threading.Thread) -> None:
        if thread.name.startswith(interrupted):
            raise KeyboardInterrupt
        start(thread)

    mocker.patch.object(threading.Thread, "start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        app.client.connect()
    assert twin_threads() == []
    mocker.stopall()
    app.client.connect()
    assert app.next_patch() == {"telemetryInterval": 30}


def test_connections_and_files_do_not_pile_up(make_app: MakeApp, device: Device) -> None:
    app = make_app(device)
    app.client.connect()
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(10):
        app.client.disconnect()
        app.client.connect()
    after = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    assert after - before < 10


def test_two_clients_with_one_identity_do_not_fight_hot(make_app: MakeApp, device: Device) -> None:
    one, other = make_app(device), make_app(device)
    one.client.connect()
    other.client.connect(wait=False)
    one.await_state("offline")
    device.wait_for(lambda device: device.connections >= 4, PATIENCE)
    other.client.close()
    # Left alone, it comes back by itself and misses nothing.
    device.patch_desired({"alone": True})
    wait_until(lambda: one.client.desired.get("alone"), "the one that is left catches up")
    # Thrown out again and again, each waits longer on average: far from a connection a millisecond.
    assert device.connections < 40


def test_a_fight_for_one_identity_is_told_once(make_app: MakeApp, device: Device) -> None:
    one, other = make_app(device), make_app(device)
    one.client.connect()
    other.client.connect(wait=False)
    error = one.next_error()
    other.client.close()
    assert isinstance(error, ConnectRefused)
    assert "does another client use this identity?" in str(error)
    assert error.can_retry
    wait_until(lambda: one.client.state == "synchronised", "the one that is left comes back")
    assert one.errors.empty()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_forever_ends_at_a_signal(local_hub: LocalHub, device: Device, number: signal.Signals) -> None:
    # The report tells that the signals are caught: run_forever does that before it waits.
    program = f"""
import signal, time
from twin_device import TwinClient
client = TwinClient.from_connection_string({device.connection_string!r}, ca_file={str(local_hub.ca_file)!r})
@client.on_desired
def changed(patch, desired):
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        time.sleep(0.01)
    client.report({{"running": True}})
with client:
    client.run_forever()
print("the end")
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        device.wait_for({"running": True}, PATIENCE)
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (0, "the end\n")


def test_run_forever_ends_when_the_client_is_closed(app: App) -> None:
    ended = threading.Thread(target=app.client.run_forever)
    ended.start()
    app.client.close()
    ended.join(PATIENCE)
    assert not ended.is_alive()


def test_run_forever_is_over_if_a_handler_has_closed_the_client(device: Device, app: App) -> None:
    app.client.on_desired(lambda patch, desired: app.client.close())
    device.patch_desired({"n": 1})
    wait_until(lambda: app.client._closed, "the handler closes it")
    app.client.run_forever()


# ---------------------------------------------------------------------- refused, and nobody there


def test_a_wrong_key_is_told_at_once_and_leaves_nothing(local_hub: LocalHub, device: Device) -> None:
    text = device.connection_string.rpartition("SharedAccessKey=")[0] + "SharedAccessKey=" + KEY
    client = TwinClient.from_connection_string(text, ca_file=local_hub.ca_file, timeout=PATIENCE)
    with pytest.raises(ConnectRefused, match="key and the clock") as raised:
        client.connect()
    assert not raised.value.can_retry
    assert twin_threads() == []
    assert device.connections == 0


def test_a_key_that_becomes_right_is_tried_again_by_hand(local_hub: LocalHub, device: Device) -> None:
    device.disable()
    client = TwinClient.from_connection_string(
        device.connection_string, ca_file=local_hub.ca_file, timeout=PATIENCE
    )
    with pytest.raises(ConnectRefused):
        client.connect()
    device.enable()
    with client:
        assert client.report({"a": 1}) == 2


def test_a_clock_that_cannot_be_right_is_named(
    local_hub: LocalHub, device: Device, mocker: MockerFixture
) -> None:
    early = SimpleNamespace(**{**vars(time), "time": lambda: 1.5e9, "gmtime": lambda: time.gmtime(1.5e9)})
    mocker.patch.object(shell, "time", early)
    client = TwinClient.from_connection_string(
        device.connection_string, ca_file=local_hub.ca_file, timeout=PATIENCE
    )
    with pytest.raises(ConnectRefused, match="clock is not set, it says 2017-07-14, before") as raised:
        client.connect()
    assert not raised.value.can_retry
    assert device.connections == 0


def test_an_unknown_ca_is_told_at_once(device: Device) -> None:
    client = TwinClient.from_connection_string(device.connection_string, timeout=PATIENCE)
    with pytest.raises(ConnectRefused, match=r"certificate .* not to be trusted") as raised:
        client.connect()
    assert not raised.value.can_retry
    assert twin_threads() == []


def test_a_wrong_host_name_is_told_at_once(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "server.pem")
    )
    with LocalHub(certificates=tmp_path) as hub:
        device = hub.create_device("dev-1")
        client = TwinClient.from_connection_string(device.connection_string, ca_file=hub.ca_file)
        with pytest.raises(ConnectRefused, match="not to be trusted: Hostname mismatch") as raised:
            client.connect()
    assert not raised.value.can_retry
    assert device.connections == 0


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("no certificate", "no certificate in PEM form")]
)
def test_a_bad_ca_file_is_named(device: Device, tmp_path: Any, content: str | None, message: str) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    client = TwinClient.from_connection_string(device.connection_string, ca_file=path)
    with pytest.raises(LocalError, match=message):
        client.connect()
    assert twin_threads() == []


def test_nobody_there_is_told_in_time(local_hub: LocalHub, device: Device) -> None:
    local_hub.stop_listening()
    client = TwinClient.from_connection_string(device.connection_string, ca_file=local_hub.ca_file)
    started = time.monotonic()
    with pytest.raises(ConnectRefused, match="cannot connect to localhost") as raised:
        client.connect(timeout=0.3)
    assert raised.value.can_retry
    assert time.monotonic() - started < PATIENCE
    assert twin_threads() == []


@pytest.mark.parametrize("fault", ["half_open", "hanging_tls"])
def test_a_hub_that_never_answers_does_not_hold_the_app(
    local_hub: LocalHub, device: Device, fault: str
) -> None:
    local_hub.fault(fault)
    client = TwinClient.from_connection_string(device.connection_string, ca_file=local_hub.ca_file)
    started = time.monotonic()
    with pytest.raises(ConnectRefused):
        client.connect(timeout=0.3)
    # Long before the deadline of the handshake itself (20 s).
    assert time.monotonic() - started < PATIENCE
    assert twin_threads() == []


def test_a_client_started_without_a_hub_finds_it_later(
    local_hub: LocalHub, make_app: MakeApp, device: Device
) -> None:
    local_hub.stop_listening()
    app = make_app(device)
    app.client.connect(wait=False)
    report = app.client.report({"patient": True}, wait=False)
    wait_until(lambda: app.client.statistics["last_error"], "a first attempt fails")
    local_hub.listen_again()
    assert report.wait() == 2


def test_the_token_is_replaced_before_it_expires(
    local_hub: LocalHub, make_app: MakeApp, device: Device
) -> None:
    app = make_app(device, token_lifetime=2.0)
    app.client.connect()
    count = 0
    while device.connections < 2:
        count += 1
        app.client.report({"count": count})
    assert app.client.report({"last": True}) is not None
    assert device.reported == {"count": count, "last": True}
    assert app.errors.empty()


# ---------------------------------------------------------------------- options, secrets, costs


def test_plaintext_works_where_it_is_asked_for() -> None:
    with LocalHub(mqtts_port=None, mqtt_port=0) as hub:
        device = hub.create_device("dev-1")
        with TwinClient.from_connection_string(
            device.plaintext_connection_string, tls=False, timeout=PATIENCE
        ) as client:
            assert client.report({"a": 1}) == 2


@pytest.mark.parametrize(
    ("host", "warned"), [("localhost", False), ("127.0.0.1", False), ("hub.example", True)]
)
def test_plaintext_off_loopback_is_warned_about(
    mocker: MockerFixture, caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    # The network is cut off: only the warning is of interest.
    mocker.patch.object(client_module, "_Network")
    client = TwinClient(host, "dev-1", key=KEY, tls=False)
    client.connect(wait=False)
    assert ("plaintext" in caplog.text) is warned
    client.disconnect()


def test_no_secret_reaches_a_log_or_a_repr(
    make_app: MakeApp, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    app = make_app(device)
    with app.client as client:
        client.report({"a": 1})
        shown = repr(client) + repr(vars(client)) + caplog.text
    key = device.connection_string.rpartition("SharedAccessKey=")[2]
    assert "$iothub/twin/PATCH/properties/reported" in caplog.text
    assert key not in shown
    assert "sig=" not in shown
    assert "SharedAccessSignature" not in shown


def test_info_logging_is_quiet_enough_to_leave_on(
    make_app: MakeApp, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="twin_device.client")
    app = make_app(device)
    with app.client as client:
        for n in range(20):
            client.report({"n": n})
    ours = [record for record in caplog.records if record.name == "twin_device.client"]
    assert len(ours) <= 3


def test_the_statistics_are_a_snapshot(device: Device, app: App) -> None:
    before = app.client.statistics
    app.client.report({"a": 1})
    assert before["reports"] == 0
    assert app.client.statistics == {
        "connects": 1,
        "retrieves": 1,
        "notifications": 0,
        "stale": 0,
        "gaps": 0,
        "reports": 1,
        "coalesced": 0,
        "rejected": 0,
        "throttled": 0,
        "ignored": 0,
        "last_error": None,
    }


def test_a_desired_patch_takes_at_most_fifteen_calls_to_the_handler(
    make_app: MakeApp, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted from paho's on_message to the first line of the handler, over both threads."""
    # What the suite has logged at DEBUG is not on the way.
    caplog.set_level(logging.INFO, "twin_device.client")
    package = os.path.dirname(twin_device.__file__)
    calls: list[str] = []
    counting = threading.Event()
    handled = threading.Event()

    def profile(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            if frame.f_code.co_name == "_on_message":
                counting.set()
            if counting.is_set() and not handled.is_set():
                calls.append(frame.f_code.co_name)

    app = make_app(device)
    threading.setprofile(profile)
    try:
        app.client.connect()
    finally:
        threading.setprofile(None)
    app.next_patch()
    app.client.retrieve()
    counting.clear()
    calls.clear()

    app.client._on_desired.insert(0, lambda patch, desired: handled.set())
    patch = {
        "telemetryInterval": 15,
        "temperatureThreshold": {"min": 20.0, "max": 26.0},
        "loggingLevel": "info",
    }
    device.patch_desired(patch)
    assert app.next_patch() == patch
    # Once the change waits for the dispatcher, the network thread goes its own way.
    network = [name for name in calls[: calls.index("put") + 1] if name not in ("_read", "client_id")]
    way = network + [name for name in calls if name in ("take", "_copied")]
    assert "message_received" in way
    assert len(way) <= 15, " ".join(way)


@pytest.mark.parametrize("statement", ["import twin_device", "from twin_device import TwinClient"])
def test_importing_brings_in_nothing_that_a_device_does_not_need(statement: str) -> None:
    program = statement + "; import sys; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    unwanted = {"asyncio", "argparse", "twin_device.hub", "twin_device.cli", "twin_device.demo", "trustme"}
    assert unwanted.isdisjoint(found)
    assert ("paho.mqtt.client" in found) is ("TwinClient" in statement)


def test_the_public_names_are_few_and_all_there() -> None:
    assert twin_device.__all__ == sorted(twin_device.__all__)
    for name in twin_device.__all__:
        assert getattr(twin_device, name).__module__.startswith("twin_device.")
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = twin_device.nothing_of_the_kind


def test_an_answer_split_into_single_bytes_is_still_one_answer(device: Device, app: App) -> None:
    # 32 KB in one notification: more than one TLS record, many reads.
    big = {f"key{n}": "x" * 900 for n in range(30)}
    device.patch_desired(big)
    assert app.next_patch() == big
    assert app.client.desired == device.desired


def test_a_name_without_an_address_is_told(mocker: MockerFixture) -> None:
    mocker.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror(-2, "Name or service not known"))
    client = TwinClient("no-such-hub.example", "dev-1", key=KEY)
    with pytest.raises(ConnectRefused, match="Name or service not known"):
        client.connect(timeout=0.2)


# ---------------------------------------------------------------------- a store (rule 7)


def store_in(folder: Path) -> Path:
    return folder / "twin.json"


def as_it_is_now(path: Path) -> Path:
    """What a power cut at this moment would leave of the store, in a place of its own."""
    copy = Path(tempfile.mkdtemp(dir=path.parent)) / path.name
    if path.exists():
        copy.write_bytes(path.read_bytes())
    return copy


def kept_reports(path: Path) -> dict[str, Any]:
    """The target that a store's file holds, by hand."""
    content = json.loads(path.read_bytes())["content"]
    target: dict[str, Any] = content["reported"] or {}
    for report in content["reports"]:
        target.update(report["patch"])
    return target


REPLACED = {"a": {"x": None, "y": None, "z": 1}, "t": None}

# what a back end does while the device is off, the one patch that the handler gets after it
WHILE_OFF: list[tuple[str, Callable[[Device], object], dict[str, Any] | None]] = [
    ("nothing", lambda device: None, None),
    ("add", lambda device: device.patch_desired({"new": [1]}), {"new": [1]}),
    ("change", lambda device: device.patch_desired({"a": {"x": 2}}), {"a": {"x": 2}}),
    ("delete", lambda device: device.patch_desired({"a": {"x": None}}), {"a": {"x": None}}),
    ("there and back", lambda device: [device.patch_desired({"t": n}) for n in (9, 1)], None),
    ("replace", lambda device: device.replace_desired({"a": {"z": 1}}), REPLACED),
    ("many", lambda device: [device.patch_desired({"t": n}) for n in range(50)], {"t": 49}),
]  # fmt: skip  # a table reads better whole


@pytest.mark.parametrize(
    ("change", "patch"), [row[1:] for row in WHILE_OFF], ids=[row[0] for row in WHILE_OFF]
)
def test_7_after_a_restart_the_handler_gets_exactly_the_difference(
    local_hub: LocalHub,
    make_app: MakeApp,
    tmp_path: Path,
    change: Callable[[Device], object],
    patch: dict[str, Any] | None,
) -> None:
    before = {"a": {"x": 1, "y": 1}, "t": 1}
    device = local_hub.create_device("dev-1", desired=before)
    first = make_app(device, store=store_in(tmp_path))
    with first.client:
        assert first.next_patch() == before
    change(device)
    second = make_app(device, store=str(store_in(tmp_path)))
    # Known before there is any connection.
    assert (second.client.state, second.client.desired) == ("offline", before)
    assert second.client.desired_version is None
    with second.client as client:
        client.retrieve()
        assert client.desired == device.desired
    given = [] if second.changes.empty() else [second.next_patch()]
    assert given == ([] if patch is None else [patch])
    assert second.changes.empty()
    # And what was given is kept in turn.
    third = make_app(device, store=store_in(tmp_path))
    assert third.client.desired == device.desired


def test_7_a_twin_that_was_created_again_starts_its_versions_over(
    local_hub: LocalHub, make_app: MakeApp, tmp_path: Path
) -> None:
    device = local_hub.create_device("dev-1", desired={"t": 1, "old": True})
    empty = local_hub.snapshot()
    first = make_app(device, store=store_in(tmp_path))
    with first.client as client:
        for n in range(5):
            device.patch_desired({"t": n + 10})
        client.report({"a": {"b": 1}, "c": 1})
        client.report({"c": None})
        wait_until(lambda: first.client.desired["t"] == 14, "the last notification")
    local_hub.fail_over(empty)
    device.replace_desired({"t": 3})
    assert device.desired_version < 5
    second = make_app(device, store=store_in(tmp_path))
    with second.client as client:
        assert second.next_patch() == {"t": 3, "old": None}
        device.wait_for({"a": {"b": 1}})
        assert client.desired == {"t": 3}
    assert device.reported == {"a": {"b": 1}}


@pytest.mark.parametrize("end", ["cut", "closed"])
def test_7_what_was_accepted_offline_is_delivered_by_the_next_run(
    make_app: MakeApp, device: Device, tmp_path: Path, end: str
) -> None:
    path = store_in(tmp_path)
    first = make_app(device, store=path)
    first.client.report({"a": {"b": 1}, "gone": 1}, wait=False)
    # It is in the file before report() returns.
    assert kept_reports(path) == {"a": {"b": 1}, "gone": 1}
    first.client.report({"gone": None}, wait=False)
    report = first.client.report({"c": True}, wait=False)
    left = as_it_is_now(path)
    first.client.close()
    with pytest.raises(NotConnected):
        report.wait()
    if end == "closed":
        left = path
    for _ in range(2):
        app = make_app(device, store=left)
        with app.client:
            device.wait_for({"a": {"b": 1}, "c": True})
        assert device.reported == {"a": {"b": 1}, "c": True}
        assert app.errors.empty()
    # The third run found the hub as it wants it.
    assert reported_patches(device) == [{"a": {"b": 1}, "c": True}]


def test_7_a_report_cut_off_on_its_way_is_brought_to_an_end(
    local_hub: LocalHub, make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    app = make_app(device, store=path)
    app.client.connect()
    assert app.client.report({"mode": "a", "n": 0}) == 2
    local_hub.stop_listening()
    app.await_state("offline")
    app.client.report({"mode": "b"}, wait=False)
    app.client.report({"mode": "c"}, wait=False, version=2)
    app.client.report({"n": 1}, wait=False, always=True)
    cut = as_it_is_now(path)
    app.client.close()
    local_hub.listen_again()
    again = make_app(device, store=cut)
    again.client.connect()
    # The one that was bound to a version that is gone is refused, and nobody waits for it any more.
    error = again.next_error()
    assert isinstance(error, ReportRejected)
    assert error.status == 412
    device.wait_for({"mode": "b", "n": 1})
    assert device.reported_version == 4


def test_7_a_conditional_report_whose_answer_was_cut_off_is_no_error(
    make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    app = make_app(device, store=path)
    app.client.report({"n": 1}, wait=False, version=1)
    cut = as_it_is_now(path)
    app.client.connect()
    device.wait_for({"n": 1})
    app.client.close()
    again = make_app(device, store=cut)
    with again.client as client:
        assert client.report({"m": 1}) == 3
    assert again.errors.empty()
    assert device.reported == {"n": 1, "m": 1}


def test_7_what_the_hub_refused_does_not_come_again(
    local_hub: LocalHub, make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    app = make_app(device, store=path)
    with app.client as client:
        client.report({"good": 1})
        local_hub.fault("answer_status", operation="report", status=400, times=1)
        with pytest.raises(ReportRejected):
            client.report({"bad": 1})
        wait_until(lambda: kept_reports(path) == {"good": 1}, "the refused report to leave the store")


def test_7_an_answered_report_that_went_alone_does_not_come_again(
    make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    app = make_app(device, store=path)
    app.client.connect()
    for n, options in enumerate([{"version": 1}, {"always": True}], 2):
        assert app.client.report({"a": 1}, **options) == n
        wait_until(lambda: json.loads(path.read_bytes())["content"]["reports"] == [], "it to leave the store")


def test_7_the_end_of_a_report_of_an_earlier_run_is_noticed(
    local_hub: LocalHub, make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    first = make_app(device, store=path)
    first.client.report({"a": 1}, wait=False, version=1)
    first.client.close()
    local_hub.fault("answer_late", operation="report", times=2, seconds_late=0.3)
    second = make_app(device, store=path)
    second.client.connect()
    wait_until(lambda: json.loads(path.read_bytes())["content"]["reports"] == [], "it to leave the store")
    second.client.close()
    other = store_in(tmp_path).with_name("other.json")
    third = make_app(device, store=other)
    third.client.report({"b": 1}, wait=False)
    third.client.close()
    fourth = make_app(device, store=other)
    fourth.client.connect()
    before = time.monotonic()
    # Waits for the answer, and no longer.
    fourth.client.close()
    assert time.monotonic() - before < 3
    assert device.reported == {"a": 1, "b": 1}


def test_7_a_call_that_was_cut_short_is_made_again(make_app: MakeApp, device: Device, tmp_path: Path) -> None:
    path = store_in(tmp_path)
    app = make_app(device, store=path)
    cuts: queue.SimpleQueue[Path] = queue.SimpleQueue()
    app.client.on_desired(lambda patch, desired: cuts.put(as_it_is_now(path)))
    app.client.connect()
    inside = cuts.get(timeout=PATIENCE)
    wait_until(lambda: path.exists() and b"30" in path.read_bytes(), "the call to be kept")
    after = as_it_is_now(path)
    app.client.close()
    assert make_app(device, store=after).client.desired == {"telemetryInterval": 30}
    again = make_app(device, store=inside)
    assert again.client.desired == {}
    again.client.connect()
    assert again.next_patch() == {"telemetryInterval": 30}


def test_7_a_handler_that_raises_has_been_given_the_patch(
    make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    app = make_app(device, store=store_in(tmp_path))

    @app.client.on_desired
    def broken(patch: Any, desired: Any) -> None:
        raise RuntimeError("broken")

    with app.client:
        app.next_error()
    assert make_app(device, store=store_in(tmp_path)).client.desired == {"telemetryInterval": 30}


@pytest.mark.parametrize("twice", [False, True], ids=["in the handler", "elsewhere too"])
def test_7_a_handler_that_closes_the_client_is_not_called_again(
    make_app: MakeApp, device: Device, tmp_path: Path, twice: bool
) -> None:
    path = store_in(tmp_path)
    app = make_app(device, store=path)
    inside, go_on = threading.Event(), threading.Event()

    @app.client.on_desired
    def reboot(patch: Any, desired: Any) -> None:
        app.client.report({"left": 1}, wait=False)
        app.client.close()
        inside.set()
        assert go_on.wait(PATIENCE)

    app.client.connect(wait=False)
    assert inside.wait(PATIENCE)
    if twice:
        closing = threading.Thread(target=app.client.close)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive(), "it waits for the handler"
        go_on.set()
        closing.join(PATIENCE)
        again = make_app(device, store=path)
    else:
        with pytest.raises(LocalError, match="is used by another client"):
            make_app(device, store=path)
        go_on.set()
        wait_until(lambda: not twin_threads(), "the handler's thread to end")
        again = make_app(device, store=path)
    assert again.client.desired == {"telemetryInterval": 30}
    assert kept_reports(path) == {"left": 1}


def test_7_settings_go_on_where_the_power_went(make_app: MakeApp, device: Device, tmp_path: Path) -> None:
    device.replace_desired({"done": {"x": 1}, "slow": 5})
    path = store_in(tmp_path)
    applied: list[tuple[str, Any]] = []
    cuts: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def start(store: Path, cut: bool) -> App:
        app = make_app(device, store=store)

        @app.client.setting("done")
        def done(value: Any) -> None:
            applied.append(("done", value))

        @app.client.setting("slow")
        def slow(value: Any) -> None:
            applied.append(("slow", value))
            if cut:
                device.wait_for({"slow": {"status": "Pending"}})
                cuts.put(as_it_is_now(store))

        app.client.connect()
        return app

    first = start(path, True)
    left = cuts.get(timeout=PATIENCE)
    first.client.disconnect()
    first.client.close()
    # The hub as the power cut would have left it: the success was never reported.
    assert applied == [("done", {"x": 1}), ("slow", 5)]
    applied.clear()
    second = start(left, False)
    device.wait_for({"slow": {"status": "Success", "value": 5}, "done": {"x": 1, "status": "Success"}})
    second.client.close()
    assert applied == [("slow", 5)]
    # A restart with nothing pending applies nothing.
    applied.clear()
    third = start(left, False)
    third.client.retrieve()
    third.client.close()
    assert applied == []


def test_7_a_restart_that_changes_nothing_writes_nothing(
    make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    with make_app(device, store=path).client as client:
        client.report({"a": 1})
    before = path.stat()
    with make_app(device, store=path).client as client:
        client.report({"a": 1})
        client.retrieve()
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert reported_patches(device) == [{"a": 1}]


def test_7_a_report_costs_one_write_and_its_answer_none(
    make_app: MakeApp, device: Device, tmp_path: Path, mocker: MockerFixture
) -> None:
    replaced = mocker.spy(os, "replace")
    app = make_app(device, store=store_in(tmp_path))
    with app.client as client:
        app.next_patch()
        wait_until(lambda: store_in(tmp_path).exists(), "the first document to be kept")
        wait_until(lambda: not client._events, "the dispatcher to be done")
        client.retrieve()
        before = replaced.call_count
        for n in range(5):
            client.report({"n": n})
            client.report({"n": n})  # changes nothing
        client.retrieve()
    assert replaced.call_count - before == 5


def test_7_a_disk_that_is_full_is_told_once_and_written_later(
    make_app: MakeApp, device: Device, tmp_path: Path, mocker: MockerFixture
) -> None:
    path = store_in(tmp_path)
    app = make_app(device, store=path)
    full = mocker.patch("os.replace", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    app.client.connect()
    assert app.next_patch() == {"telemetryInterval": 30}
    for n in range(3):
        assert app.client.report({"n": n}) == n + 2
    assert app.client.report({"m": 1}, wait=False).wait() == 5
    error = app.next_error()
    assert isinstance(error, StoreError)
    assert f"{path} cannot be written: No space left on device" in str(error)
    mocker.stop(full)
    app.client.report({"n": 9})
    assert kept_reports(path) == {"n": 9, "m": 1}
    assert app.errors.empty()


def test_7_a_damaged_store_is_told_and_the_client_starts_without(
    make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    path.write_text("{}")
    app = make_app(device, store=path)
    assert app.client.desired == {}
    app.client.connect()
    assert app.next_patch() == {"telemetryInterval": 30}
    error = app.next_error()
    assert isinstance(error, StoreError)
    assert f"{path} is no store of twin_device; it is now {path}.corrupt" in str(error)


def test_7_a_store_has_one_client_until_it_is_closed(
    local_hub: LocalHub, make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    other = local_hub.create_device("dev-2")
    first = make_app(device, store=path)
    with pytest.raises(LocalError, match="is used by another client"):
        make_app(device, store=path)
    with first.client:
        first.next_patch()
    with pytest.raises(
        LocalError, match="belongs to sensor-temp-042 at localhost, not to dev-2 at localhost"
    ):
        make_app(other, store=path)
    make_app(device, store=path).client.connect()


def test_7_a_with_that_fails_gives_the_file_back(
    local_hub: LocalHub, make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    device.disable()
    app = make_app(device, store=store_in(tmp_path))
    with pytest.raises(ConnectRefused), app.client:
        pass
    device.enable()
    with make_app(device, store=store_in(tmp_path)).client as client:
        assert client.report({"a": 1}) == 2


def test_7_a_store_that_cannot_be_is_refused_before_any_connection(
    make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    with pytest.raises(LocalError, match="there is no folder"):
        make_app(device, store=tmp_path / "nowhere" / "twin.json")
    assert device.connections == 0


def test_7_no_secret_is_kept(make_app: MakeApp, device: Device, tmp_path: Path) -> None:
    app = make_app(device, store=store_in(tmp_path))
    with app.client as client:
        client.report({"a": 1})
    key = device.connection_string.rpartition("SharedAccessKey=")[2]
    files = list(tmp_path.iterdir())
    assert store_in(tmp_path) in files
    for text in [file.read_text() for file in files]:
        assert key not in text
        assert "sig=" not in text
    assert "sensor-temp-042" in store_in(tmp_path).read_text()


def test_7_the_store_is_brought_in_only_where_it_is_asked_for() -> None:
    program = (
        "from twin_device import TwinClient; import sys\n"
        "TwinClient('h.azure-devices.net', 'd', key='AAAA')\n"
        "print('twin_device.store' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


REPORTER = """
import itertools, os, sys, threading
from twin_device import TwinClient
client = TwinClient.from_connection_string(sys.argv[1], ca_file=sys.argv[2], store=sys.argv[3], timeout=10)
client.connect()
def run(name):
    for n in itertools.count(1):
        client.report({name: n}, wait=n % 5 == 0)
        os.write(1, f"{name} {n}\\n".encode())  # whole, whoever else writes
for name in "abcd":
    threading.Thread(target=run, args=(name,), daemon=True).start()
threading.Event().wait(60)
"""


def test_7_kill_9_during_many_reports_loses_none_that_was_accepted(
    local_hub: LocalHub, make_app: MakeApp, device: Device, tmp_path: Path
) -> None:
    path = store_in(tmp_path)
    for round_ in range(3):
        told: dict[str, int] = {}
        command = [sys.executable, "-c", REPORTER, device.connection_string, local_hub.ca_file, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(250 + 100 * round_)]
            process.kill()
            lines += process.stdout.read().splitlines()
        for line in lines:
            name, number = line.split()
            told[name] = int(number)
        kept = kept_reports(path)
        for name, last in told.items():
            assert last <= kept[name] <= last + 1
        app = make_app(device, store=path)
        with app.client:
            device.wait_for(kept)
        assert device.reported == kept
        assert app.errors.empty()


# ---------------------------------------------------------------------- the stream

CONNACK = b"\x20\x02\x00\x00"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (CONNACK + b"\x30\xff\xff\xff\x7f", "a packet of 268435455 bytes"),
        (CONNACK + b"\x30\xff\xff\xff\xff\x01", "more than four bytes"),
        (CONNACK + b"\x30\x07\x00\x09short", "ends in its topic"),
        (CONNACK + b"\x30\x00", "ends in its topic"),
        (CONNACK[:3], "closed"),
    ],
)
def test_a_hub_that_breaks_mqtt_costs_a_connection(said: bytes, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        client = TwinClient(f"127.0.0.1:{listener.getsockname()[1]}", "dev-1", key=KEY, tls=False)
        try:
            client.connect(wait=False)
            with listener.accept()[0] as one:
                one.sendall(said)
                if why == "closed":
                    one.shutdown(socket.SHUT_WR)
                wait_until(lambda: client.statistics["last_error"], "it is noticed")
            assert why in client.statistics["last_error"]
            assert client.state == "offline"
        finally:
            client.close()


def test_what_a_full_socket_does_not_take_is_written_later_and_in_order() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(PATIENCE)
        stream = client_module._Stream(ours)
        sent = 0
        while not stream.rest:
            stream.publish("a/topic", b"%05d" % sent + bytes(30000))
            sent += 1
        with pytest.raises(BlockingIOError):
            stream.send(b"\xd0\x00")
        stream.publish("a/topic", b"%05d" % sent + bytes(200))
        read = b""
        while stream.rest:
            read += theirs.recv(1 << 20)
            stream.flush()
        assert stream.send(b"\xd0\x00") == 2
        while not read.endswith(b"\xd0\x00"):
            read += theirs.recv(1 << 20)
        reader = client_module._Stream(theirs)
        reader._in += read
        bodies = []
        while packet := reader.next():
            if not packet[0]:
                break
            bodies.append(packet[1])
        assert bodies == [b"\x00\x07a/topic%05d" % n + bytes(30000) for n in range(sent)] + [
            b"\x00\x07a/topic%05d" % sent + bytes(200)
        ]


def test_a_write_that_fails_is_kept_for_the_network_thread() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        stream = client_module._Stream(ours)
        stream.publish("a/topic", b"{}")
        assert isinstance(stream.error, BrokenPipeError)
        assert stream.rest == b""
