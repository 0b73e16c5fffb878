"""The fault table: what the hub does wrong, and what the app must see of it.

Every row starts from a connected client, unless its fault is set before connecting; whatever happens, at the
end the client is synchronised and both sides hold the same documents.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.app import App
from tests.waiting import PATIENCE, wait_until
from twin_device import ConnectRefused, ReportRejected, ReportTimeout
from twin_device.hub import Device, LocalHub

# A request is given up after a third of this.
TIMEOUT = 1.5


@dataclass
class Row:
    sees: str
    fault: dict[str, Any]
    act: Callable[[App, Device], Any]
    # What the statistics must have grown by, and at least by.
    exactly: dict[str, int] = field(default_factory=dict)
    at_least: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.fault['kind']}: {self.sees}".replace(" ", "-")


def report(app: App, device: Device) -> None:
    version = app.client.report({"batteryLevel": 55}, timeout=PATIENCE)
    assert version == device.reported_version
    assert device.reported["batteryLevel"] == 55


def retrieve(app: App, device: Device) -> None:
    twin = app.client.retrieve(timeout=PATIENCE)
    assert twin == {"desired": device.desired, "reported": device.reported}


def one_patch(app: App, device: Device) -> None:
    device.patch_desired({"telemetryInterval": 15})
    assert app.next_patch() == {"telemetryInterval": 15}


def two_patches(app: App, device: Device) -> None:
    """What the handler is given must lead to the hub's document, and never go back on the way."""
    device.patch_desired({"telemetryInterval": 1, "first": True})
    device.patch_desired({"telemetryInterval": 2, "second": True})
    intervals = []
    while True:
        _, desired = app.changes.get(timeout=PATIENCE)
        intervals.append(desired["telemetryInterval"])
        if desired == device.desired:
            break
    assert intervals in ([1, 2], [2])
    assert app.changes.empty()


def reconnect(app: App, device: Device) -> None:
    device.disconnect()
    app.await_state("offline")
    app.await_state("synchronised")
    one_patch(app, device)
    report(app, device)


ROWS = [
    Row(
        "a report is accepted all the same",
        {"kind": "answer_lost", "operation": "report", "times": 1},
        report,
        exactly={"connects": 0},
        at_least={"reports": 1},
    ),
    Row(
        "a retrieve is answered all the same",
        {"kind": "answer_lost", "operation": "retrieve", "times": 1},
        retrieve,
        exactly={"retrieves": 2, "connects": 0},
    ),
    Row(
        "two losses in a row cost a new connection, the report arrives",
        {"kind": "answer_lost", "operation": "report", "times": 2},
        report,
        exactly={"connects": 1},
    ),
    Row(
        "two losses in a row cost a new connection, the retrieve is answered",
        {"kind": "answer_lost", "operation": "retrieve", "times": 2},
        retrieve,
        exactly={"connects": 1},
    ),
    Row(
        "a report just takes longer",
        {"kind": "answer_late", "seconds_late": 0.2, "times": 1},
        report,
        exactly={"reports": 1, "ignored": 0},
    ),
    Row(
        "an answer after it was given up is ignored",
        {"kind": "answer_late", "operation": "report", "seconds_late": TIMEOUT / 3 + 0.2, "times": 1},
        report,
        exactly={"connects": 0},
    ),
    Row(
        "the second answer to a report is ignored",
        {"kind": "answer_doubled", "operation": "report", "times": 1},
        lambda app, device: (report(app, device), retrieve(app, device)),
        exactly={"ignored": 1},
    ),
    Row(
        "the second answer to a retrieve is ignored",
        {"kind": "answer_doubled", "operation": "retrieve", "times": 1},
        lambda app, device: (retrieve(app, device), report(app, device)),
        exactly={"ignored": 1},
    ),
    Row(
        "a throttled report is sent again, slower",
        {"kind": "answer_status", "operation": "report", "status": 429, "times": 2},
        report,
        exactly={"throttled": 2, "reports": 3},
    ),
    Row(
        "a report that fails inside the hub is sent again",
        {"kind": "answer_status", "operation": "report", "status": 500, "times": 1},
        report,
        exactly={"throttled": 1, "reports": 2},
    ),
    Row(
        "a throttled retrieve is sent again, slower",
        {"kind": "answer_status", "operation": "retrieve", "status": 429, "times": 2},
        retrieve,
        exactly={"throttled": 2, "retrieves": 3},
    ),
    Row(
        "a missed notification is noticed at the next one and made up for",
        {"kind": "notification_lost", "times": 1},
        two_patches,
        exactly={"gaps": 1, "retrieves": 1},
    ),
    Row(
        "a doubled notification is discarded",
        {"kind": "notification_doubled", "times": 1},
        lambda app, device: (one_patch(app, device), report(app, device)),
        exactly={"stale": 1, "retrieves": 0},
    ),
    Row(
        "a stale notification is discarded",
        {"kind": "notification_stale", "times": 2},
        lambda app, device: (two_patches(app, device), report(app, device)),
        at_least={"stale": 1},
    ),
    Row(
        "notifications out of order are put right",
        {"kind": "notification_reordered", "times": 1},
        two_patches,
        at_least={"gaps": 1, "stale": 1},
    ),
    Row(
        "a late notification arrives late",
        {"kind": "notification_late", "seconds_late": 0.2, "times": 1},
        one_patch,
        exactly={"retrieves": 0},
    ),
    Row(
        "two writes in one notification are a gap that is made up for",
        {"kind": "notification_coalesced", "times": 1},
        two_patches,
        exactly={"gaps": 1},
    ),
    Row(
        "a connection after the hub forgot the session hears everything",
        {"kind": "session_forgotten", "times": 1},
        reconnect,
        exactly={"connects": 1},
    ),
    Row(
        "a connection cut in the middle of an answer is made again",
        {"kind": "cut_in_packet", "operation": "report", "times": 1},
        report,
        exactly={"connects": 1},
    ),
    Row(
        "a connection cut in the middle of the document is made again",
        {"kind": "cut_in_packet", "operation": "retrieve", "times": 1},
        retrieve,
        exactly={"connects": 1},
    ),
    Row(
        "a hub that hangs up on a report gets it again",
        {"kind": "disconnect", "operation": "report", "times": 1},
        report,
        exactly={"connects": 1},
    ),
    Row(
        "a server that is unavailable is tried again",
        {"kind": "connack_refused", "code": 3, "times": 1},
        reconnect,
        exactly={"connects": 1},
    ),
    Row(
        "a slow CONNACK is waited for",
        {"kind": "connack_slow", "times": 1},
        reconnect,
        exactly={"connects": 1},
    ),
    Row(
        "a late SUBACK is waited for, or asked for again",
        {"kind": "suback_late", "times": 1},
        reconnect,
        exactly={"connects": 1},
    ),
]


def settle(app: App, device: Device) -> None:
    wait_until(lambda: app.client.state == "synchronised", "the client is synchronised")
    app.client.report({"settled": True}, timeout=PATIENCE)
    twin = app.client.retrieve(timeout=PATIENCE)
    assert twin["desired"] == device.desired == app.client.desired
    assert twin["reported"] == device.reported == app.client.reported


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_connected_app(row: Row, local_hub: LocalHub, device: Device, make_app: Callable[..., App]) -> None:
    app = make_app(device, timeout=TIMEOUT)
    app.client.connect()
    app.next_patch()
    before = app.client.statistics
    fault = local_hub.fault(**row.fault)
    row.act(app, device)
    grown = {
        name: count - before[name] for name, count in app.client.statistics.items() if name != "last_error"
    }
    assert fault.hits >= 1
    fault.clear()
    assert {name: grown[name] for name in row.exactly} == row.exactly
    assert all(grown[name] >= least for name, least in row.at_least.items()), grown
    settle(app, device)
    assert app.errors.empty()


WHILE_CONNECTING = [
    {"kind": "answer_lost", "operation": "retrieve", "times": 1},
    {"kind": "answer_lost", "operation": "retrieve", "times": 2},
    {"kind": "answer_status", "operation": "retrieve", "status": 429, "times": 2},
    {"kind": "answer_status", "operation": "retrieve", "status": 503, "times": 1},
    {"kind": "cut_in_packet", "operation": "retrieve", "times": 1},
    {"kind": "connack_refused", "code": 3, "times": 1},
    {"kind": "connack_slow", "times": 1},
    {"kind": "suback_late", "times": 1},
    {"kind": "answer_doubled", "operation": "retrieve", "times": 1},
]


@pytest.mark.parametrize("fault", WHILE_CONNECTING, ids=lambda fault: "-".join(map(str, fault.values())))
def test_an_app_that_connects(
    fault: dict[str, Any], local_hub: LocalHub, device: Device, make_app: Callable[..., App]
) -> None:
    set_fault = local_hub.fault(**fault)
    app = make_app(device, timeout=TIMEOUT)
    app.client.connect(timeout=PATIENCE)
    assert app.next_patch() == {"telemetryInterval": 30}
    assert set_fault.hits >= 1
    settle(app, device)
    assert app.changes.empty()


@pytest.mark.parametrize(
    ("fault", "message", "can_retry"),
    [
        ({"kind": "suback_refused"}, "refused a subscription", False),
        ({"kind": "connack_refused", "code": 5}, "credentials", False),
        ({"kind": "connack_refused", "code": 4}, "credentials", False),
        ({"kind": "clock_skew", "offset": 7200}, "clock", False),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_an_app_that_is_refused_is_told_at_once(
    fault: dict[str, Any],
    message: str,
    can_retry: bool,
    local_hub: LocalHub,
    device: Device,
    make_app: Callable[..., App],
) -> None:
    local_hub.fault(**fault)
    app = make_app(device)
    with pytest.raises(ConnectRefused, match=message) as raised:
        app.client.connect()
    assert raised.value.can_retry is can_retry


@pytest.mark.parametrize("status", [400, 403, 413])
def test_a_refused_report_is_told_and_holds_nothing_up(
    local_hub: LocalHub, device: Device, app: App, status: int
) -> None:
    local_hub.fault("answer_status", operation="report", status=status, error_code=status * 1000 + 4, times=1)
    with pytest.raises(ReportRejected) as raised:
        app.client.report({"bad": 1})
    assert (raised.value.status, raised.value.error_code) == (status, status * 1000 + 4)
    assert raised.value.tracking_id
    assert app.client.report({"good": 1}) == 2
    assert device.reported == {"good": 1} == app.client.reported


def test_a_refused_report_that_nobody_waits_for_goes_to_the_error_handler(
    local_hub: LocalHub, device: Device, app: App
) -> None:
    local_hub.fault("answer_status", operation="report", status=400, body="empty", times=1)
    app.client.report({"bad": 1}, wait=False)
    error = app.next_error()
    assert isinstance(error, ReportRejected)
    assert (error.status, error.error_code) == (400, None)


def test_a_used_up_quota_is_waited_out_slowly(local_hub: LocalHub, device: Device, app: App) -> None:
    fault = local_hub.fault("quota")
    with pytest.raises(ReportTimeout):
        app.client.report({"a": 1}, timeout=0.5)
    assert fault.hits == 1
    assert app.client.statistics["throttled"] == 1
    assert app.client.state == "synchronised"
    # Without this, closing waits for the report.
    app.client.disconnect()


def test_a_twin_deleted_and_created_again_starts_over(local_hub: LocalHub, device: Device, app: App) -> None:
    app.client.report({"firmwareVersion": "2.2.0"})
    for value in range(5):
        device.patch_desired({"telemetryInterval": value})
        app.next_patch()
    device.recreate()
    app.await_state("offline")
    assert app.next_patch() == {"telemetryInterval": None}
    app.await_state("synchronised")
    # The versions are low again, and nothing is taken for stale because of it.
    assert app.client.desired_version == 1
    device.patch_desired({"telemetryInterval": 7})
    assert app.next_patch() == {"telemetryInterval": 7}
    device.wait_for({"firmwareVersion": "2.2.0"}, PATIENCE)


def test_a_failover_to_an_older_snapshot_is_made_up_for(
    local_hub: LocalHub, device: Device, app: App
) -> None:
    app.client.report({"a": 1})
    snapshot = local_hub.snapshot()
    app.client.report({"a": 2, "b": {"c": 3}})
    device.patch_desired({"telemetryInterval": 15, "new": True})
    app.next_patch()
    local_hub.fail_over(snapshot)
    assert app.next_patch() == {"telemetryInterval": 30, "new": None}
    # What the hub had accepted and lost is reported again.
    device.wait_for({"a": 2, "b": {"c": 3}}, PATIENCE)
    settle(app, device)


def test_a_hub_that_went_away_for_a_while(local_hub: LocalHub, device: Device, app: App) -> None:
    local_hub.stop_listening()
    app.await_state("offline")
    local_hub.forget_sessions()
    device.patch_desired({"meanwhile": 1})
    report = app.client.report({"also": "meanwhile"}, wait=False)
    local_hub.listen_again()
    assert app.next_patch() == {"meanwhile": 1}
    report.wait()
    one_patch(app, device)
    settle(app, device)


def test_notifications_made_up_by_a_broken_hub(local_hub: LocalHub, device: Device, app: App) -> None:
    """Rubbish makes the client look at the document again; it never reaches the handler."""
    topic = "$iothub/twin/PATCH/properties/desired/?$version=2"
    device.send_raw(topic, b"\xff\xfe")
    device.send_raw(topic, b"[1, 2]")
    device.send_raw(topic, b'{"a": NaN, "$version": 2}')
    device.send_raw(topic, b'{"a":' * 5000 + b"1" + b"}" * 5000)
    device.send_raw(topic, json.dumps({"a": 1, "$version": "two"}).encode())
    device.send_raw("$iothub/twin/res/200/?$rid=unheard-of", b"{}")
    device.send_raw("a/foreign/topic", b"{}")
    device.notify({"telemetryInterval": 0}, 1_000_000)
    device.patch_desired({"telemetryInterval": 15})
    assert app.next_patch() == {"telemetryInterval": 15}
    settle(app, device)
    assert app.client.statistics["retrieves"] < 12


def test_the_bodys_version_counts_and_the_topics_stands_in(device: Device, app: App) -> None:
    device.notify({"old": True}, 1, topic_version=2)
    device.send_raw("$iothub/twin/PATCH/properties/desired/?$version=2", b'{"telemetryInterval": 1}')
    assert app.next_patch() == {"telemetryInterval": 1}
    assert app.client.statistics["stale"] == 1
    assert app.client.statistics["gaps"] == 0
