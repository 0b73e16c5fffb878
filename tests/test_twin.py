"""The state machine against its rules, one by one; then against a hub that misbehaves.

The numbers are those of the rules: 1 synchronising, 2 desired notifications, 3 reporting, 4 time.
"""

import copy
import heapq
import itertools
import json
import os
import random
import re
import sys

import pytest

from twin_device.core import twin as machine
from twin_device.core.errors import (
    ConnectRefused,
    LocalError,
    NotConnected,
    PatchError,
    RemoteError,
    ReportRejected,
    RetrieveRejected,
)
from twin_device.core.stream import reader
from twin_device.core.twin import (
    OFFLINE,
    RETRIEVING,
    SUBSCRIBING,
    SYNCHRONISED,
    Connect,
    DesiredChanged,
    Disconnect,
    Failed,
    Publish,
    Reported,
    Retrieved,
    StateChanged,
    Subscribe,
    Twin,
)
from twin_device.store import Kept, _is_unchanged

SECOND = 1000
MINUTE = 60 * SECOND
TIMEOUT = 20 * SECOND
FILTERS = ("$iothub/twin/res/#", "$iothub/twin/PATCH/properties/desired/#")


def apply(document, patch):
    """The hub's merge (RFC 7396), in words of its own."""
    result = {key: value for key, value in document.items() if patch.get(key, 0) is not None}
    for key, value in patch.items():
        if isinstance(value, dict):
            before = document.get(key)
            result[key] = apply(before if isinstance(before, dict) else {}, value)
        elif value is not None:
            result[key] = copy.deepcopy(value)
    return result


def request_id(topic):
    return re.search(r"\$rid=([^&]*)", topic).group(1)


def condition(topic):
    found = re.search(r"\$version=(\d+)", topic)
    return int(found.group(1)) if found else None


def is_retrieve(output):
    return type(output) is Publish and output.topic.startswith("$iothub/twin/GET/?")


def is_report(output):
    return type(output) is Publish and output.topic.startswith("$iothub/twin/PATCH/properties/reported/?")


def kinds(outputs):
    """Names of outputs, as the state table writes them."""
    names = []
    for output in outputs:
        name = type(output).__name__
        if is_retrieve(output):
            name = "retrieve"
        elif is_report(output):
            name = "report"
        elif type(output) is StateChanged:
            name = f"{output.old} -> {output.new}"
        names.append(name)
    return names


class Bench:
    """A twin on a bench: a clock set by hand, and what it last answered.

    After every input it is checked that the deadline tells when tick() has something to do, no sooner and no
    later, and that never more than one retrieve and one report are in flight.
    """

    def __init__(self, **options):
        self.twin = Twin(**options)
        self.now = 5 * SECOND
        self.jitter = 0.5
        self.out = []
        self.get = self.sent = None  # request ids in flight
        self.patch = None  # the last patch sent
        self.when = None  # the condition of the last report
        self.tickets = {}  # ticket: the outputs that ended it

    def take(self, outputs):
        self.out = outputs
        for output in outputs:
            if is_retrieve(output):
                assert self.get is None, "two retrieves in flight"
                assert output.payload == b""
                self.get = request_id(output.topic)
            elif is_report(output):
                assert self.sent is None, "two reports in flight"
                self.sent = request_id(output.topic)
                self.patch = json.loads(output.payload)
                self.when = condition(output.topic)
            elif type(output) in (Connect, Disconnect):
                self.get = self.sent = None
            elif type(output) in (Reported, Retrieved):
                self.tickets.setdefault(output.ticket, []).append(output)
        deadline = self.twin.deadline
        if deadline is not None and deadline > self.now:
            assert copy.deepcopy(self.twin).tick(deadline - 1, self.jitter) == []
        return outputs

    # What can happen to a twin.

    def start(self):
        return self.take(self.twin.start(self.now))

    def stop(self):
        return self.take(self.twin.stop())

    def connected(self, lifetime=None):
        return self.take(self.twin.connected(self.now, self.jitter, lifetime))

    def refused(self, code):
        return self.take(self.twin.refused(code, self.now, self.jitter))

    def disconnected(self, error=None):
        self.get = self.sent = None
        return self.take(self.twin.disconnected(self.now, self.jitter, error))

    def subscribed(self, granted=(0, 0)):
        return self.take(self.twin.subscribed(granted, self.now, self.jitter))

    def message(self, topic, payload=b""):
        return self.take(self.twin.message_received(topic, payload, self.now, self.jitter))

    def document(self, desired=None, version=1, reported=None, reported_version=1):
        """The hub answers the retrieve in flight."""
        body = {
            "desired": {**(desired or {}), "$version": version},
            "reported": {**(reported or {}), "$version": reported_version},
        }
        return self.answer_get(200, json.dumps(body).encode())

    def answer_get(self, status, payload=b"", extra=""):
        topic, self.get = f"$iothub/twin/res/{status}/?$rid={self.get}{extra}", None
        return self.message(topic, payload)

    def answer(self, status=204, version=None, payload=b"", extra=""):
        """The hub answers the report in flight."""
        if version is not None:
            extra += f"&$version={version}"
        topic, self.sent = f"$iothub/twin/res/{status}/?$rid={self.sent}{extra}", None
        return self.message(topic, payload)

    def notify(self, patch, version):
        topic = f"$iothub/twin/PATCH/properties/desired/?$version={version}"
        return self.message(topic, json.dumps({**patch, "$version": version}).encode())

    def report(self, patch, delay=0, **options):
        self.twin.gather(self.now, delay)
        ticket, outputs = self.twin.report(patch, self.now, **options)
        self.take(outputs)
        return ticket

    def retrieve(self):
        ticket, outputs = self.twin.ask(self.now)
        self.take(outputs)
        return ticket

    def tick(self):
        """Time passes up to the deadline."""
        self.now = max(self.now, self.twin.deadline)
        get, sent = self.get, self.sent
        # What is past its deadline is given up.
        if get is not None and self.twin._get_wait <= self.now:
            self.get = None
        if sent is not None and self.twin._flight_wait <= self.now:
            self.sent = None
        outputs = self.take(self.twin.tick(self.now, self.jitter))
        assert outputs or self.twin.deadline is None or self.twin.deadline > self.now, "tick spins"
        return outputs

    def wait(self, milliseconds):
        """Time passes, and tick() is called whenever it is due. Everything that it gave."""
        end = self.now + milliseconds
        given = []
        while self.twin.deadline is not None and self.twin.deadline <= end:
            given += self.tick()
        self.now = end
        return given

    # Shortcuts to a state.

    def retrieving(self, lifetime=None):
        self.start()
        self.connected(lifetime)
        self.subscribed()
        return self

    def synchronised(self, desired=None, version=1, reported=None, reported_version=1, lifetime=None):
        self.retrieving(lifetime)
        self.document(desired, version, reported, reported_version)
        assert self.twin.state == SYNCHRONISED
        return self

    def reconnected(self, desired=None, version=1, reported=None, reported_version=1):
        """The connection is lost; the next one finds the hub like this."""
        self.disconnected()
        return self.dialled_again(desired, version, reported, reported_version)

    def dialled_again(self, desired=None, version=1, reported=None, reported_version=1):
        self.tick()
        self.connected()
        self.subscribed()
        return self.document(desired, version, reported, reported_version)

    # What is looked at.

    def changes(self):
        return [output.patch for output in self.out if type(output) is DesiredChanged]

    def errors(self):
        return [output.error for output in self.out if type(output) is Failed]

    def result(self, ticket):
        """How the report or retrieve with this ticket ended; None while it has not."""
        ends = self.tickets.get(ticket, [])
        assert len(ends) <= 1, "a ticket ended twice"
        return ends[0] if ends else None

    def retrieves(self):
        return self.twin.counts["retrieves"]


def bench_in(state):
    bench = Bench()
    if state == "dialling":
        bench.start()
    elif state == SUBSCRIBING:
        bench.start()
        bench.connected()
    elif state == RETRIEVING:
        bench.retrieving()
    elif state == SYNCHRONISED:
        bench.synchronised({"a": 1}, 5)
    elif state == "waiting":
        bench.synchronised({"a": 1}, 5)
        bench.disconnected()
    return bench


# ---------------------------------------------------------------------- the state table

UP = "synchronised -> offline"


def lose_two_answers(bench):
    bench.tick()
    return bench.tick()


def reach_renewal(bench):
    bench.twin.stop()
    bench.synchronised(lifetime=100 * SECOND)
    return bench.tick()


def a_reported_document(bench):
    bench.report({"r": 1})
    return bench.document({"a": 1}, 5)


# The table of the module's docstring, row by row: state, input, next state, outputs.
TABLE = [
    ("offline", lambda bench: bench.start(), OFFLINE, ["Connect"]),
    ("waiting", lambda bench: bench.tick(), OFFLINE, ["Connect"]),
    ("dialling", lambda bench: bench.connected(), SUBSCRIBING, ["offline -> subscribing", "Subscribe"]),
    ("dialling", lambda bench: bench.refused(5), OFFLINE, ["Failed"]),
    ("dialling", lambda bench: bench.refused(3), OFFLINE, []),
    ("dialling", lambda bench: bench.disconnected(), OFFLINE, []),
    (
        SUBSCRIBING,
        lambda bench: bench.subscribed(),
        RETRIEVING,
        ["subscribing -> retrieving", "retrieve"],
    ),
    (
        SUBSCRIBING,
        lambda bench: bench.subscribed((0, 0x80)),
        OFFLINE,
        ["Disconnect", "subscribing -> offline", "Failed"],
    ),
    (SUBSCRIBING, lambda bench: bench.notify({"a": 2}, 6), SUBSCRIBING, []),
    (RETRIEVING, lambda bench: bench.notify({"a": 2}, 6), RETRIEVING, []),
    (
        RETRIEVING,
        a_reported_document,
        SYNCHRONISED,
        ["DesiredChanged", "retrieving -> synchronised", "report"],
    ),
    (SYNCHRONISED, lambda bench: bench.notify({"a": 2}, 6), SYNCHRONISED, ["DesiredChanged"]),
    (SYNCHRONISED, lambda bench: bench.notify({"a": 2}, 5), SYNCHRONISED, []),
    (
        SYNCHRONISED,
        lambda bench: bench.notify({"a": 2}, 7),
        RETRIEVING,
        ["synchronised -> retrieving", "retrieve"],
    ),
    (SUBSCRIBING, lambda bench: bench.disconnected(), OFFLINE, ["subscribing -> offline"]),
    (RETRIEVING, lambda bench: bench.disconnected(), OFFLINE, ["retrieving -> offline"]),
    (SYNCHRONISED, lambda bench: bench.disconnected(), OFFLINE, [UP]),
    (SUBSCRIBING, lose_two_answers, OFFLINE, ["Disconnect", "subscribing -> offline"]),
    (RETRIEVING, lose_two_answers, OFFLINE, ["Disconnect", "retrieving -> offline"]),
    (SYNCHRONISED, reach_renewal, OFFLINE, ["Disconnect", UP, "Connect"]),
    ("offline", lambda bench: bench.stop(), OFFLINE, []),
    ("dialling", lambda bench: bench.stop(), OFFLINE, ["Disconnect"]),
    ("waiting", lambda bench: bench.stop(), OFFLINE, ["Disconnect"]),
    (SUBSCRIBING, lambda bench: bench.stop(), OFFLINE, ["Disconnect", "subscribing -> offline"]),
    (RETRIEVING, lambda bench: bench.stop(), OFFLINE, ["Disconnect", "retrieving -> offline"]),
    (SYNCHRONISED, lambda bench: bench.stop(), OFFLINE, ["Disconnect", UP]),
]


@pytest.mark.parametrize(("state", "happens", "then", "outputs"), TABLE)
def test_the_state_table(state, happens, then, outputs):
    bench = bench_in(state)
    assert kinds(happens(bench)) == outputs
    assert bench.twin.state == then


# Inputs that come too late or too early change nothing: state, input.
NOTHING = [
    ("offline", lambda bench: bench.connected()),
    ("offline", lambda bench: bench.disconnected()),
    ("offline", lambda bench: bench.refused(5)),
    ("offline", lambda bench: bench.subscribed()),
    ("offline", lambda bench: bench.notify({"a": 1}, 1)),
    ("offline", lambda bench: bench.take(bench.twin.tick(10**9, 0.5))),
    ("dialling", lambda bench: bench.start()),
    ("dialling", lambda bench: bench.subscribed()),
    ("dialling", lambda bench: bench.notify({"a": 1}, 1)),
    ("waiting", lambda bench: bench.disconnected()),
    ("waiting", lambda bench: bench.subscribed()),
    ("waiting", lambda bench: bench.notify({"a": 2}, 6)),
    (SUBSCRIBING, lambda bench: bench.start()),
    (SUBSCRIBING, lambda bench: bench.connected()),
    (RETRIEVING, lambda bench: bench.subscribed()),
    (RETRIEVING, lambda bench: bench.connected()),
    (SYNCHRONISED, lambda bench: bench.start()),
    (SYNCHRONISED, lambda bench: bench.connected()),
    (SYNCHRONISED, lambda bench: bench.subscribed((0x80,))),
    (SYNCHRONISED, lambda bench: bench.message("some/other/topic", b"x")),
    (SYNCHRONISED, lambda bench: bench.message("$iothub/twin/res/200/", b"{}")),
    (SYNCHRONISED, lambda bench: bench.message("$iothub/twin/GET/?$rid=2", b"")),
]


@pytest.mark.parametrize(("state", "happens"), NOTHING)
def test_an_input_out_of_turn_changes_nothing(state, happens):
    bench = bench_in(state)
    before = vars(copy.deepcopy(bench.twin))
    assert happens(bench) == []
    assert vars(bench.twin) == before


# ---------------------------------------------------------------------- 1: synchronising


def test_stopping_while_dialling_wants_nothing_more():
    bench = bench_in("dialling")
    bench.stop()
    assert bench.twin.deadline is None
    assert bench.take(bench.twin.tick(10**9, 0.5)) == []


def test_1_1_connect_then_subscribe_then_retrieve():
    bench = Bench()
    assert bench.start() == [Connect()]
    assert bench.connected()[-1] == Subscribe(FILTERS)
    assert bench.get is None
    bench.subscribed()
    assert bench.get is not None


@pytest.mark.parametrize("granted", [(0, 0), (1, 1), (0, 1), (2, 0), [0, 0]])
def test_1_1_any_granted_quality_will_do(granted):
    bench = bench_in(SUBSCRIBING)
    bench.subscribed(granted)
    assert bench.twin.state == RETRIEVING


@pytest.mark.parametrize("granted", [(), (0,), (0x80, 0), (0, 0x80), (0x80, 0x80), (0, 0, 0)])
def test_1_1_a_refused_filter_is_an_error_and_not_a_hang(granted):
    bench = bench_in(SUBSCRIBING)
    bench.subscribed(granted)
    assert bench.twin.state == OFFLINE
    (error,) = bench.errors()
    assert isinstance(error, ConnectRefused)
    assert error.can_retry is False
    assert bench.now + 30 * SECOND <= bench.twin.deadline <= bench.now + MINUTE


def test_1_2_the_document_is_the_truth_even_with_a_lower_version():
    bench = Bench().synchronised({"a": 1, "b": {"c": 1}}, 50)
    bench.reconnected({"a": 2}, 3)
    assert bench.changes() == [{"a": 2, "b": None}]
    assert bench.twin.desired == {"a": 2}
    assert bench.twin.desired_version == 3
    bench.notify({"a": 4}, 4)
    assert bench.changes() == [{"a": 4}]


def test_1_2_within_a_connection_an_older_document_is_a_recreated_twin():
    bench = Bench().synchronised({"a": 1}, 50)
    bench.retrieve()
    bench.document({"a": 0}, 1)
    assert bench.changes() == [{"a": 0}]
    assert bench.twin.desired_version == 1
    bench.notify({"a": 4}, 2)
    assert bench.changes() == [{"a": 4}]


def test_1_2_a_document_that_notifications_have_overtaken_takes_nothing_back():
    bench = Bench().synchronised({"a": 1}, 5)
    ticket = bench.retrieve()
    bench.notify({"a": 2}, 6)
    bench.document({"a": 1}, 5)
    assert bench.changes() == []
    assert bench.twin.desired == {"a": 2}
    assert bench.result(ticket).twin["desired"] == {"a": 1}
    bench.notify({"a": 3}, 7)
    assert bench.changes() == [{"a": 3}]


@pytest.mark.parametrize("trouble", ["rubbish", "gap"])
def test_1_2_nor_does_it_if_a_gap_was_found_meanwhile(trouble):
    bench = Bench().synchronised({"a": 5}, 5)
    bench.retrieve()
    bench.notify({"a": 6}, 6)
    bench.notify({"a": 7}, 7)
    if trouble == "rubbish":
        bench.message("$iothub/twin/PATCH/properties/desired/?$version=8", b"?")
    else:
        bench.notify({"a": 9}, 9)
    bench.document({"a": 6}, 6)
    assert bench.changes() == []
    assert bench.twin.desired == {"a": 7}
    assert bench.get is not None
    bench.document({"a": 9, "b": 8}, 9)
    assert bench.changes() == [{"a": 9, "b": 8}]
    assert bench.twin.state == SYNCHRONISED
    assert bench.get is None


def test_1_3_notifications_before_the_document_wait_for_it():
    bench = Bench()
    bench.start()
    bench.connected()
    for version in (6, 5, 8):  # before SUBACK, and in any order
        assert bench.notify({f"k{version}": version}, version) == []
    bench.subscribed()
    assert bench.notify({"k7": 7}, 7) == []
    bench.document({"d": 1}, 5)
    assert bench.changes() == [{"d": 1, "k6": 6, "k7": 7, "k8": 8}]
    assert bench.twin.desired_version == 8
    assert bench.twin.state == SYNCHRONISED


def test_1_3_after_the_document_what_it_holds_already_is_discarded():
    bench = bench_in(RETRIEVING)
    bench.notify({"a": "old"}, 4)
    bench.notify({"a": "also old"}, 5)
    bench.document({"a": "new"}, 5)
    assert bench.changes() == [{"a": "new"}]
    assert bench.twin.counts["stale"] == 2
    assert bench.notify({"a": "older"}, 5) == []


def test_1_3_doubled_notifications_before_the_document_count_once():
    bench = bench_in(RETRIEVING)
    for _ in range(3):
        bench.notify({"a": 6}, 6)
    bench.document({}, 5)
    assert bench.changes() == [{"a": 6}]
    assert bench.twin.state == SYNCHRONISED


@pytest.mark.parametrize("version", [0, 1, False, None])
def test_1_3_no_version_is_the_next_before_the_document(version):
    bench = bench_in(RETRIEVING)
    bench.message("$iothub/twin/PATCH/properties/desired/", json.dumps({"$version": version}).encode())
    assert bench.out == []
    assert (bench.twin.desired, bench.twin.desired_version) == ({}, None)


def test_1_3_a_gap_in_what_was_kept_is_closed_by_another_document():
    bench = bench_in(RETRIEVING)
    bench.notify({"a": 7}, 7)
    bench.document({"a": 5}, 5)
    assert bench.twin.state == RETRIEVING
    assert bench.twin.desired == {"a": 5}
    bench.document({"a": 7, "b": 6}, 7)
    assert bench.changes() == [{"a": 7, "b": 6}]
    assert bench.twin.state == SYNCHRONISED


@pytest.mark.parametrize("state", [SUBSCRIBING, RETRIEVING])
def test_1_3_more_notifications_than_can_be_kept_are_not_lost(state):
    bench = bench_in(state)
    for version in range(6, 300):
        bench.notify({"v": version}, version)
    assert len(bench.twin._kept) <= 64
    if state == SUBSCRIBING:
        bench.subscribed()
        bench.document({"v": 299}, 299)  # asked for after all of them
    else:
        bench.document({"v": 5}, 5)
    for _ in range(5):
        if bench.twin.state == SYNCHRONISED:
            break
        if bench.get is None:
            bench.tick()
        bench.document({"v": 299}, 299)
    assert bench.twin.desired == {"v": 299}
    assert bench.retrieves() <= 3


def test_1_4_the_app_gets_one_change_the_difference():
    bench = Bench(desired={"a": 1, "b": {"c": 1, "d": 1}, "e": 1})
    bench.retrieving()
    bench.notify({"a": 3}, 10)
    bench.document({"a": 2, "b": {"c": 1, "x": {}}, "f": [1]}, 9)
    assert bench.changes() == [{"a": 3, "b": {"d": None, "x": {}}, "e": None, "f": [1]}]
    (change,) = [output for output in bench.out if type(output) is DesiredChanged]
    assert change.desired == {"a": 3, "b": {"c": 1, "x": {}}, "f": [1]}


def test_1_4_the_first_document_is_one_change_if_the_app_has_none():
    bench = Bench().retrieving()
    bench.document({"a": {"b": 1}}, 1)
    assert bench.changes() == [{"a": {"b": 1}}]


def test_1_4_no_difference_no_change_and_synchronised_all_the_same():
    bench = Bench().synchronised({"a": [1, {"b": True}]}, 7)
    assert kinds(bench.reconnected({"a": [1, {"b": True}]}, 7)) == ["retrieving -> synchronised"]
    bench.reconnected({"a": [1, {"b": 1}]}, 9)
    assert bench.changes() == [{"a": [1, {"b": 1}]}]


def test_1_4_an_empty_object_and_a_missing_key_differ():
    bench = Bench().synchronised({"a": {}}, 1)
    bench.reconnected({}, 2)
    assert bench.changes() == [{"a": None}]
    bench.reconnected({"a": {"b": {}}}, 3)
    assert bench.changes() == [{"a": {"b": {}}}]


def test_1_4_a_null_or_a_version_in_the_document_is_no_property():
    bench = Bench().retrieving()
    bench.answer_get(
        200,
        b'{"desired":{"a":null,"b":{"c":null,"d":1},"$version":3,"$metadata":{}},'
        b'"reported":{"r":1,"x":null,"$version":4,"$metadata":{"r":{}}}}',
    )
    assert bench.changes() == [{"b": {"d": 1}}]
    assert bench.twin.reported == {"r": 1}
    assert (bench.twin.desired_version, bench.twin.reported_version) == (3, 4)


def test_1_4_a_document_in_the_wrapper_of_older_hubs_is_read_too():
    bench = Bench().retrieving()
    bench.answer_get(
        200, b'{"properties":{"desired":{"a":1,"$version":3},"reported":{"$version":4}},"deviceId":"d"}'
    )
    assert bench.changes() == [{"a": 1}]


def test_1_4_any_2xx_is_a_document():
    bench = Bench().retrieving()
    bench.answer_get(202, b'{"desired":{"$version":1},"reported":{}}')
    assert bench.twin.state == SYNCHRONISED
    assert bench.twin.reported_version is None


def test_1_5_an_answer_nobody_waits_for_is_ignored():
    bench = Bench(request_id=100).retrieving()
    first = bench.get
    bench.disconnected()
    bench.tick()
    bench.connected()
    bench.subscribed()
    assert bench.get != first
    body = b'{"desired":{"old":1,"$version":1},"reported":{"$version":1}}'
    for unknown in (first, "", "99", "0" + bench.get, bench.get + "0"):
        assert bench.message(f"$iothub/twin/res/200/?$rid={unknown}", body) == []
    assert bench.twin.counts["ignored"] == 5
    assert bench.twin.state == RETRIEVING


def test_1_5_the_answer_to_a_request_given_up_is_ignored():
    bench = Bench().retrieving()
    first = bench.get
    assert kinds(bench.tick()) == ["retrieve"]
    assert bench.message(f"$iothub/twin/res/200/?$rid={first}", b"{}") == []
    bench.document({"a": 1}, 1)
    assert bench.twin.state == SYNCHRONISED


def test_1_5_request_ids_never_come_again():
    bench = Bench(request_id=41)
    seen = []
    for round_ in range(5):
        (bench.synchronised if not round_ else bench.reconnected)(version=round_ + 1)
        bench.report({"r": round_})
        seen.append(bench.sent)
        bench.retrieve()
        seen.append(bench.get)
    assert len(set(seen)) == len(seen)
    assert all(re.fullmatch(r"[0-9]+", one) for one in seen)


# ---------------------------------------------------------------------- 2: desired notifications


def test_2_1_a_stale_or_doubled_notification_is_discarded_and_counted():
    bench = Bench().synchronised({"a": 1}, 5)
    for version in (5, 4, 1, 0, -7):
        assert bench.notify({"a": "stale"}, version) == []
    assert bench.twin.counts["stale"] == 5
    assert bench.twin.desired == {"a": 1}


def test_2_2_the_next_version_is_merged_and_handed_on():
    bench = Bench().synchronised({"a": {"b": 1, "c": 2}, "d": 3}, 5)
    out = bench.notify({"a": {"b": None, "e": {}}, "d": None, "f": [1]}, 6)
    assert out == [
        DesiredChanged({"a": {"b": None, "e": {}}, "d": None, "f": [1]}, {"a": {"c": 2, "e": {}}, "f": [1]})
    ]
    assert bench.twin.desired_version == 6
    assert bench.twin.counts["notifications"] == 1


def test_2_2_the_same_value_again_is_handed_on_as_the_hub_sent_it():
    bench = Bench().synchronised({"a": 1}, 5)
    bench.notify({"a": 1}, 6)
    assert bench.changes() == [{"a": 1}]
    bench.notify({}, 7)
    assert bench.twin.desired_version == 7


def test_2_2_what_the_app_was_handed_never_changes_afterwards():
    bench = Bench().synchronised({"a": {"b": 1}}, 5)
    bench.notify({"a": {"c": [1]}}, 6)
    (change,) = bench.out
    handed = copy.deepcopy(change)
    bench.notify({"a": {"c": None, "d": 1}}, 7)
    assert change == handed
    change.patch["a"]["c"].append(2)
    assert bench.twin.desired == {"a": {"b": 1, "d": 1}}


def test_2_3_a_gap_is_not_applied_but_retrieved():
    bench = Bench().synchronised({"a": 1}, 5)
    assert kinds(bench.notify({"a": 7}, 7)) == ["synchronised -> retrieving", "retrieve"]
    assert bench.twin.desired == {"a": 1}
    for version in (8, 9, 12):
        assert bench.notify({"a": version}, version) == []
    bench.document({"a": 12, "missed": 6}, 12)
    assert bench.changes() == [{"a": 12, "missed": 6}]
    assert bench.twin.state == SYNCHRONISED
    assert bench.twin.counts["gaps"] == 1
    assert bench.retrieves() == 2


def test_2_3_the_missing_notification_may_still_come():
    bench = Bench().synchronised({}, 5)
    bench.notify({"b": 7}, 7)
    bench.notify({"a": 6}, 6)
    bench.document({}, 5)
    assert bench.changes() == [{"a": 6, "b": 7}]
    assert bench.twin.desired_version == 7


def test_2_3_a_version_that_was_never_written_costs_a_bounded_number_of_retrieves():
    bench = Bench().synchronised({"a": 1}, 5)
    bench.notify({"a": "?"}, 10**30)
    for _ in range(5):
        if bench.get is not None:
            bench.document({"a": 1}, 5)
        if bench.twin.deadline is not None and bench.get is None:
            bench.tick()
    assert bench.twin.state == SYNCHRONISED
    assert bench.retrieves() == 3
    bench.notify({"a": 2}, 6)
    assert bench.changes() == [{"a": 2}]


def test_2_3_documents_that_never_reach_the_notifications_are_asked_for_ever_more_slowly():
    bench = Bench().synchronised({}, 5)
    times = []
    for version in range(10**6, 10**6 + 12):
        bench.notify({"a": 1}, version)
        if bench.get is None:
            bench.tick()
        times.append(bench.now)
        bench.document({}, 5)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits[0] < 2 * SECOND
    assert max(waits) >= 60 * SECOND
    assert max(waits) <= 100 * SECOND


# $version in the body, in the topic, and whether the notification is applied to version 5.
NEXT_VERSIONS = [
    (6, 6, True),
    (6, None, True),
    (6, 99, True),
    (99, 6, False),
    ("absent", 6, True),
    ("absent", None, False),
    ("absent", "x", False),
    ("6", 6, False),
    (6.0, 6, False),
    (True, 6, False),
    (None, 6, False),
    ([6], 6, False),
    ({}, 6, False),
]


@pytest.mark.parametrize(("body", "topic", "applied"), NEXT_VERSIONS, ids=repr)
def test_2_4_the_bodys_version_counts_and_the_topics_stands_in(body, topic, applied):
    bench = Bench().synchronised({"a": 1}, 5)
    patch = {"a": 2} if body == "absent" else {"a": 2, "$version": body}
    parameter = "" if topic is None else f"?$version={topic}"
    bench.message(f"$iothub/twin/PATCH/properties/desired/{parameter}", json.dumps(patch).encode())
    if applied:
        assert bench.changes() == [{"a": 2}]
        assert bench.twin.desired_version == 6
    else:
        assert kinds(bench.out) == ["synchronised -> retrieving", "retrieve"]
        bench.document({"a": 2}, 6)
        if bench.twin.state != SYNCHRONISED:  # version 99 is nowhere
            bench.tick()
            bench.document({"a": 2}, 6)
        assert bench.twin.state == SYNCHRONISED
        assert bench.twin.desired == {"a": 2}


def test_2_4_before_the_document_a_notification_without_a_version_makes_it_retrieve_again():
    bench = bench_in(RETRIEVING)
    bench.message("$iothub/twin/PATCH/properties/desired/", b'{"a":6}')
    bench.document({"a": 5}, 5)
    assert bench.get is not None
    bench.document({"a": 6}, 6)
    assert bench.changes() == [{"a": 6}]
    assert bench.twin.state == SYNCHRONISED
    assert bench.retrieves() == 2


RUBBISH = [
    b"",
    b" ",
    b"[]",
    b"5",
    b"null",
    b'"text"',
    b"{",
    b'{"a":1',
    b"\xff\xfe",
    b'{"a":"\xed\xa0\x80"}',
    b'{"a":NaN}',
    b"[" * 50000,
    b'{"a":' * 300 + b"1" + b"}" * 300,
    b'{"a":' * 50000 + b"1" + b"}" * 50000,
    b'{"a":' + b"[" * 800 + b"]" * 800 + b',"$version":6}',
]


@pytest.mark.parametrize("payload", RUBBISH, ids=lambda payload: repr(payload[:12]) + str(len(payload)))
@pytest.mark.parametrize("state", [SUBSCRIBING, RETRIEVING, SYNCHRONISED])
def test_2_5_a_notification_that_is_no_object_is_reported_and_retrieved(state, payload):
    bench = bench_in(state)
    bench.message("$iothub/twin/PATCH/properties/desired/?$version=6", payload)
    (error,) = bench.errors()
    assert isinstance(error, RemoteError)
    assert bench.twin.state != OFFLINE
    if state == SUBSCRIBING:
        bench.subscribed()
    bench.document({"a": 5}, 5)
    if state == RETRIEVING:  # the retrieve was under way already
        bench.document({"a": 6}, 6)
    assert bench.twin.state == SYNCHRONISED
    assert bench.get is None


def test_2_6_a_replaced_document_arrives_as_nulls():
    bench = Bench().synchronised({"a": 1, "b": 2}, 5)
    bench.notify({"a": 1, "b": None, "c": 100}, 6)
    assert bench.twin.desired == {"a": 1, "c": 100}


def test_2_7_metadata_and_version_are_no_properties():
    bench = Bench().synchronised({}, 5)
    bench.notify({"a": 1, "$metadata": {"a": {}}}, 6)
    assert bench.changes() == [{"a": 1}]
    assert bench.twin.desired == {"a": 1}


def test_2_7_arrays_are_replaced_whole():
    bench = Bench().synchronised({"a": [1, 2, 3]}, 5)
    bench.notify({"a": [{"b": 1}]}, 6)
    assert bench.twin.desired == {"a": [{"b": 1}]}


# ---------------------------------------------------------------------- 3: reporting


def test_3_1_an_invalid_patch_changes_nothing():
    bench = Bench().synchronised()
    before = vars(copy.deepcopy(bench.twin))
    for patch in ({"a.b": 1}, {"a": [None]}, {"a": 2**60}, [], {"a": "x" * 5000}, {"$version": 1}):
        with pytest.raises(PatchError):
            bench.twin.report(patch, bench.now)
    assert vars(bench.twin) == before


def test_3_1_the_size_of_the_whole_target_counts():
    bench = Bench().synchronised(reported={f"k{index}": "x" * 4096 for index in range(4)})
    bench.report({f"m{index}": "x" * 4096 for index in range(3)})
    with pytest.raises(PatchError) as caught:
        bench.report({"small": 1, "large": "y" * 4096})
    assert caught.value.path == "large"
    assert caught.value.size > 32768
    bench.answer(204, 2)
    with pytest.raises(PatchError):
        bench.report({"large": "y" * 4096})
    # A key that goes makes room; so does one that gets smaller.
    bench.report({"k0": None, "large": "y" * 4096})
    bench.report({"m0": 1, "more": "z" * 4000})
    assert bench.twin.outstanding


def test_3_1_the_size_counts_anew_once_the_document_is_known():
    bench = Bench()
    bench.report({"small": 1})
    bench.synchronised(reported={f"k{index}": "x" * 4096 for index in range(7)})
    with pytest.raises(PatchError):
        bench.report({"large": "y" * 4096})


def test_3_1_the_size_is_not_forgotten_by_replacing_values():
    bench = Bench().synchronised()
    for round_ in range(50):
        bench.report({"k": chr(97 + round_ % 26) * 4000, "other": "x" * 4000})
        if bench.sent:
            bench.answer(204, round_ + 2)
    assert bench.twin.outstanding or bench.twin.reported["other"]


def test_3_1_the_patch_is_the_apps_own_afterwards():
    bench = Bench()
    patch = {"a": {"b": [1]}}
    bench.report(patch)
    patch["a"]["b"].append(object())
    patch["c.d"] = 1
    bench.synchronised()
    assert bench.patch == {"a": {"b": [1]}}


def test_3_2_one_report_is_in_flight_and_the_rest_goes_as_one_patch():
    bench = Bench().synchronised()
    first = bench.report({"a": 1})
    assert bench.patch == {"a": 1}
    others = [bench.report({"a": 2}), bench.report({"b": {"c": 1}}), bench.report({"b": {"c": None, "d": 1}})]
    assert bench.out == []
    bench.answer(204, 2)
    assert bench.patch == {"a": 2, "b": {"d": 1}}
    assert bench.result(first) == Reported(first, 2, None)
    bench.answer(204, 3)
    assert [bench.result(ticket).version for ticket in others] == [3, 3, 3]
    assert bench.twin.counts["coalesced"] == 2
    assert bench.twin.counts["reports"] == 2


def a_burst_of_three():
    """The first is answered while the app is still in the burst."""
    bench = Bench().synchronised()
    bench.report({"n": 0}, delay=20)
    assert bench.patch == {"n": 0}
    bench.report({"n": 1}, delay=20)
    bench.answer(204, 2)
    assert bench.sent is None
    bench.report({"n": 2}, delay=20)
    assert bench.out == []
    return bench


def test_3_2_a_burst_that_nobody_waits_for_leaves_as_two_patches():
    bench = a_burst_of_three()
    assert bench.wait(19) == []
    bench.wait(1)
    assert bench.patch == {"n": 2}


@pytest.mark.parametrize(
    "ends",
    [
        lambda bench: bench.take(bench.twin.flush(bench.now)),
        lambda bench: bench.report({"m": 1}),
        lambda bench: bench.reconnected(),
    ],
    ids=["somebody waits", "a report that is waited for", "a reconnect"],
)
def test_3_2_a_burst_ends_at_once(ends):
    bench = a_burst_of_three()
    ends(bench)
    bench.wait(20)
    assert bench.patch["n"] == 2
    assert bench.twin.counts["reports"] == 2


def test_3_2_a_report_that_follows_no_other_leaves_at_once():
    bench = Bench().synchronised()
    for number in range(3):
        bench.report({"n": number}, delay=20)
        assert bench.patch == {"n": number}
        bench.answer(204, 2 + number)
        bench.wait(20)


def test_3_2_what_is_reported_offline_goes_as_one_patch():
    bench = Bench()
    tickets = [bench.report({f"k{index}": index}) for index in range(5)]
    bench.synchronised()
    assert bench.patch == {f"k{index}": index for index in range(5)}
    bench.answer(204, 2)
    assert all(bench.result(ticket).error is None for ticket in tickets)


def test_3_2_reports_go_on_while_a_gap_is_closed():
    bench = Bench().synchronised({}, 5)
    bench.notify({}, 9)
    bench.report({"a": 1})
    assert bench.sent is not None


def test_3_3_merge_patches_do_not_compose_so_the_difference_is_sent():
    bench = Bench().synchronised(reported={"a": {"b": 1}})
    bench.report({"x": 1})
    bench.report({"a": None})
    bench.report({"a": {"c": 2}})
    bench.answer(204, 2)
    assert bench.patch == {"a": {"b": None, "c": 2}}


def test_3_3_also_offline():
    bench = Bench()
    bench.report({"a": None})
    bench.report({"a": {"c": 2}})
    bench.synchronised(reported={"a": {"b": 1}})
    assert bench.patch == {"a": {"b": None, "c": 2}}


def test_3_3_without_a_copy_patches_that_do_not_compose_go_one_after_another():
    bench = Bench(keep_reported=False)
    tickets = [
        bench.report(patch) for patch in ({"x": 1}, {"a": None}, {"a": {"c": 2}}, {"a": {"d": 1}, "y": 1})
    ]
    bench.synchronised(reported={"a": {"b": 1}})
    assert bench.patch == {"x": 1, "a": None}
    bench.answer(204, 2)
    assert bench.patch == {"a": {"c": 2, "d": 1}, "y": 1}
    bench.answer(204, 3)
    assert [bench.result(ticket).version for ticket in tickets] == [2, 2, 3, 3]
    assert bench.twin.reported is None


def test_3_4_an_accepted_report_is_what_the_hub_holds():
    bench = Bench().synchronised(reported={"a": {"b": 1}})
    ticket = bench.report({"a": {"b": None, "c": 1}})
    bench.answer(204, 77)
    assert bench.result(ticket) == Reported(ticket, 77, None)
    assert bench.twin.reported == {"a": {"c": 1}}
    assert bench.twin.reported_version == 77


@pytest.mark.parametrize("status", [200, 202, 204])
def test_3_4_any_2xx_with_or_without_a_version_accepts(status):
    bench = Bench().synchronised()
    ticket = bench.report({"a": 1})
    bench.answer(status)
    assert bench.result(ticket) == Reported(ticket, None, None)
    assert bench.twin.reported == {"a": 1}


QUOTA = b'{"errorCode":403002,"message":"quota"}'

# status, payload, least and most milliseconds until the same patch goes again
LATER = [
    (429, b"", 500, 1000),
    (429, b'{"errorCode":429001}', 500, 1000),
    (500, b"", 500, 1000),
    (502, b"", 500, 1000),
    (503, b"<html>", 500, 1000),
    (504, b"", 500, 1000),
    (599, b"", 500, 1000),
    (408, b"", 500, 1000),
    (499, b"", 500, 1000),
    (403, QUOTA, 30000, 60000),
]


@pytest.mark.parametrize(("status", "payload", "least", "most"), LATER)
@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.99])
def test_3_4_what_may_go_better_later_is_sent_again(status, payload, least, most, jitter):
    bench = Bench().synchronised()
    bench.jitter = jitter
    ticket = bench.report({"a": 1})
    assert bench.answer(status, payload=payload) == []
    assert bench.result(ticket) is None
    since = bench.now
    later = bench.report({"b": 1})
    assert bench.out == []
    bench.tick()
    assert least <= bench.now - since <= most
    assert bench.patch == {"a": 1, "b": 1}
    bench.answer(204, 2)
    assert bench.result(ticket).error is None
    assert bench.result(later).error is None
    assert bench.twin.counts["throttled"] == 1


# status, payload
NEVER = [
    (400, b'{"errorCode":400004,"trackingId":"t-1","message":"no"}'),
    (400, b""),
    (400, b"\xff not json"),
    (400, b"[1]"),
    (401, b""),
    (403, b""),
    (403, b'{"errorCode":403100}'),
    (403, b'{"errorCode":"403002"}'),
    (404, b""),
    (409, b""),
    (412, b""),
    (413, b"[" * 5000),
    (302, b""),
    (199, b""),
]


@pytest.mark.parametrize(("status", "payload"), NEVER)
def test_3_4_any_other_answer_refuses_that_patch_and_holds_nothing_up(status, payload):
    bench = Bench().synchronised(reported={"a": 0})
    ticket = bench.report({"a": 1, "b": 1})
    later = bench.report({"c": 1})
    bench.answer(status, payload=payload)
    error = bench.result(ticket).error
    assert isinstance(error, ReportRejected)
    assert error.status == status
    assert bench.patch == {"c": 1}
    bench.answer(204, 2)
    assert bench.result(later).error is None
    assert bench.twin.reported == bench.twin.target == {"a": 0, "c": 1}
    assert bench.twin.counts["rejected"] == 1


def test_3_4_a_refusal_says_what_the_hub_said():
    bench = Bench().synchronised()
    ticket = bench.report({"a": 1})
    bench.answer(400, payload=NEVER[0][1])
    error = bench.result(ticket).error
    assert (error.status, error.error_code, error.tracking_id) == (400, 400004, "t-1")
    assert "no" in str(error)


def test_3_4_a_refused_patch_of_many_hits_only_the_guilty_one():
    bench = Bench().synchronised(reported={"old": 1})
    first = bench.report({"z": 0})
    good = bench.report({"a": 1})
    bad = bench.report({"bad": 1})
    fine = bench.report({"a": 2, "old": None})
    bench.answer(204, 2)
    assert bench.patch == {"a": 2, "bad": 1, "old": None}
    version = 2
    bench.answer(400)
    for _ in range(3):
        if "bad" in bench.patch:
            bench.answer(400)
        else:
            version += 1
            bench.answer(204, version)
    assert not bench.twin.outstanding
    assert bench.result(first).error is None
    assert bench.result(good).error is None
    assert bench.result(bad).error.status == 400
    assert bench.result(fine).error is None
    assert bench.twin.reported == {"z": 0, "a": 2}


def test_3_4_a_refusal_does_not_take_a_joined_report_with_it(monkeypatch):
    monkeypatch.setattr(machine, "_MAX_PARTS", 2)
    bench = Bench().synchronised(reported={"a": {"old": 1, "x": 1}})
    bench.report({"z": 0})
    bad = bench.report({"bad": 1, "a": {"x": None}})
    last = bench.report({"a": 5})
    joined = bench.report({"a": None})
    assert joined == last  # parts do not grow without end
    replaced = bench.report({"a": {"y": 1}})
    bench.answer(204, 2)
    hub = {"a": {"old": 1, "x": 1}, "z": 0}
    while bench.sent is not None:
        if "bad" in bench.patch:
            bench.answer(400)
        else:
            hub = apply(hub, bench.patch)
            bench.answer(204, 3)
    assert bench.result(bad).error is not None
    assert bench.result(last).error is None
    assert bench.result(replaced).error is None
    assert hub == bench.twin.reported == {"a": {"y": 1}, "z": 0}


def test_3_5_after_a_lost_connection_the_difference_is_sent():
    bench = Bench().synchronised(reported={"a": 0})
    ticket = bench.report({"a": 1, "b": 1})
    bench.reconnected(reported={"a": 0})
    assert bench.patch == {"a": 1, "b": 1}
    assert bench.result(ticket) is None
    bench.answer(204, 2)
    assert bench.result(ticket).error is None


def test_3_5_after_a_lost_connection_nothing_is_sent_if_the_hub_has_it():
    bench = Bench().synchronised(reported={"a": 0})
    ticket = bench.report({"a": 1, "b": None})
    bench.reconnected(reported={"a": 1}, reported_version=9)
    assert bench.sent is None
    assert bench.result(ticket) == Reported(ticket, 9, None)


def test_3_5_nothing_that_was_accepted_is_forgotten_after_a_failover():
    bench = Bench().synchronised(reported={"old": 1})
    bench.report({"a": {"b": 1}, "old": None})
    bench.answer(204, 5)
    late = bench.report({"c": 1})
    bench.reconnected(reported={"old": 1}, reported_version=2)
    assert bench.patch == {"a": {"b": 1}, "old": None, "c": 1}
    bench.answer(204, 3)
    assert bench.result(late).error is None
    assert bench.twin.reported == {"a": {"b": 1}, "c": 1}


def test_3_5_nothing_that_was_accepted_is_forgotten_after_a_second_failover_in_a_row():
    bench = Bench().synchronised()
    bench.report({"a": 1})
    bench.answer(204, 5)
    bench.reconnected()
    assert bench.patch == {"a": 1}
    bench.reconnected(reported={"b": 2})
    assert apply({"b": 2}, bench.patch) == {"a": 1}
    bench.reconnected()
    assert bench.patch == {"a": 1}


def test_3_5_a_twin_that_was_recreated_within_a_connection_is_filled_again():
    bench = Bench().synchronised({}, 9, {"a": 1}, 9)
    bench.retrieve()
    bench.document({}, 1, {}, 1)
    assert bench.patch == {"a": 1}


def test_3_5_what_the_store_kept_is_the_target():
    bench = Bench(reported={"a": 1})
    assert bench.twin.target == {"a": 1}
    bench.synchronised(reported={"b": 1})
    assert bench.patch == {"a": 1, "b": None}


def test_3_5_what_another_process_reported_is_no_loss_of_ours():
    bench = Bench().synchronised(reported={"theirs": 1})
    bench.report({"mine": 1})
    bench.answer(204, 2)
    assert bench.twin.reported == {"theirs": 1, "mine": 1}
    assert bench.reconnected(reported={"theirs": 1, "mine": 1}) == [StateChanged(RETRIEVING, SYNCHRONISED)]


def test_3_5_a_report_whose_answer_was_lost_is_asked_again():
    bench = Bench().synchronised()
    ticket = bench.report({"a": 1})
    assert kinds(bench.tick()) == ["report"]
    assert bench.patch == {"a": 1}
    bench.answer(204, 3)
    assert bench.result(ticket) == Reported(ticket, 3, None)


# What the hub held, the report whose answer was lost, what is reported then.
UNSURE = [
    ({}, {"a": 1}, {"a": None}),
    ({"a": 0}, {"a": 1}, {"a": 0}),
    ({"a": {"b": 1}}, {"a": None}, {"a": {"b": 1}}),
    ({"a": {"b": 1}}, {"a": 5}, {"a": {"c": 1}}),
    ({"a": {"b": 1}}, {"a": {"c": 1}}, {"a": {"c": None}}),
    ({"a": 5}, {"a": {"c": 1}}, {"a": 5}),
    ({"a": 1}, {"b": 1}, {"c": 1}),
    ({"a": [1]}, {"a": [2]}, {"a": [1]}),
]


@pytest.mark.parametrize(("held", "lost", "then"), UNSURE, ids=repr)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("throttled", [False, True])
def test_3_5_a_later_report_is_right_whether_or_not_the_lost_one_was_merged(
    held, lost, then, merged, throttled
):
    bench = Bench().synchronised(reported=held)
    hub = held
    tickets = [bench.report(lost)]
    if merged:
        hub = apply(hub, bench.patch)
    tickets.append(bench.report(then))
    bench.tick()
    if throttled:
        bench.answer(429)
        bench.tick()
    hub = apply(hub, bench.patch)
    bench.answer(204, 9)
    assert bench.sent is None
    assert hub == bench.twin.reported == apply(apply(held, lost), then)
    assert all(bench.result(ticket).error is None for ticket in tickets)


def given_up_and_sent_again():
    """A report was given up; it is in flight again, with another one. Also the id that was given up."""
    bench = Bench().synchronised()
    bench.report({"a": 1})
    late = bench.sent
    bench.report({"a": 2, "b": 2})
    bench.tick()
    assert bench.patch == {"a": 2, "b": 2}
    return bench, late


def test_3_5_a_report_that_a_slow_hub_merges_after_the_next_one_is_made_up_for():
    bench, late = given_up_and_sent_again()
    bench.answer(204, 2)
    # The one that was given up is merged now: it undoes the newer one.
    bench.message(f"$iothub/twin/res/204/?$rid={late}&$version=3")
    assert bench.get is not None
    bench.document(reported={"a": 1, "b": 2}, reported_version=3)
    assert bench.patch == {"a": 2}
    bench.answer(204, 4)
    assert bench.twin.reported == {"a": 2, "b": 2}


def test_3_5_a_version_that_grew_by_more_than_our_own_writes_is_looked_into():
    bench, _ = given_up_and_sent_again()
    bench.answer(204, 2)
    bench.report({"c": 3})
    bench.answer(204, 4)
    assert bench.get is not None
    bench.report({"d": 4})
    assert bench.sent is None, "what the hub holds is not known"
    bench.document(reported={"a": 1, "b": 2, "c": 3}, reported_version=4)
    assert bench.patch == {"a": 2, "d": 4}


def test_3_5_a_document_that_was_on_its_way_does_not_settle_the_doubt():
    bench, late = given_up_and_sent_again()
    bench.retrieve()
    bench.answer(204, 2)
    bench.message(f"$iothub/twin/res/204/?$rid={late}&$version=3")
    bench.document(reported={}, reported_version=1)
    assert bench.get is not None
    assert bench.twin.reported == {"a": 2, "b": 2}
    bench.document(reported={"a": 1, "b": 2}, reported_version=3)
    assert bench.patch == {"a": 2}


def test_3_5_nor_does_one_if_only_the_late_answer_came_meanwhile():
    bench, late = given_up_and_sent_again()
    bench.answer(204, 2)
    bench.retrieve()
    bench.message(f"$iothub/twin/res/204/?$rid={late}&$version=3")
    bench.document(reported={"a": 2, "b": 2}, reported_version=2)
    assert bench.get is not None
    bench.report({"d": 4})
    assert bench.sent is None, "what the hub holds is not known"
    bench.document(reported={"a": 1, "b": 2}, reported_version=3)
    assert bench.patch == {"a": 2, "d": 4}


def test_3_5_a_document_older_than_an_answer_takes_nothing_back():
    bench = Bench().synchronised()
    bench.retrieve()
    bench.report({"a": 1})
    bench.answer(204, 2)
    bench.document(reported={}, reported_version=1)
    assert bench.sent is None
    assert bench.twin.reported == {"a": 1}


def test_3_5_a_report_that_was_merged_twice_is_no_reason_to_look():
    bench, late = given_up_and_sent_again()
    bench.message(f"$iothub/twin/res/204/?$rid={late}&$version=2")
    bench.answer(204, 3)
    assert bench.get is None
    assert bench.twin.reported == {"a": 2, "b": 2}


def test_3_5_a_lost_report_that_was_merged_is_not_taken_back_for_a_moment():
    bench = Bench().synchronised(reported={"a": 1})
    ticket = bench.report({"a": 2}, always=True)
    bench.reconnected(reported={"a": 2})
    assert bench.patch == {"a": 2}
    bench.answer(204, 3)
    assert bench.result(ticket).error is None
    assert not bench.twin.outstanding


def test_3_6_a_report_that_changes_nothing_is_answered_without_traffic():
    bench = Bench().synchronised(reported={"a": {"b": 1}}, reported_version=8)
    ticket = bench.report({"a": {"b": 1}, "gone": None})
    assert bench.out == [Reported(ticket, 8, None)]
    assert not bench.twin.outstanding


def test_3_6_true_is_not_1():
    bench = Bench().synchronised(reported={"a": 1})
    bench.report({"a": True})
    assert bench.patch == {"a": True}


def test_3_6_unless_the_app_asks_for_it():
    bench = Bench().synchronised(reported={"a": 1})
    ticket = bench.report({"a": 1}, always=True)
    assert bench.patch == {"a": 1}
    bench.answer(204, 2)
    assert bench.result(ticket).version == 2
    bench.report({}, always=True)
    assert bench.patch == {}


def test_3_6_always_goes_as_it_is_and_in_order():
    bench = Bench().synchronised(reported={"a": 1})
    bench.report({"x": 1})
    bench.report({"a": 2})
    bench.report({"a": 1}, always=True)
    bench.report({"b": 1})
    sent = []
    while bench.sent is not None:
        sent.append(bench.patch)
        bench.answer(204, len(sent))
    assert sent == [{"x": 1}, {"a": 2}, {"a": 1}, {"b": 1}]


def test_3_6_without_a_copy_every_report_is_sent():
    bench = Bench(keep_reported=False).synchronised(reported={"a": 1})
    bench.report({"a": 1})
    assert bench.patch == {"a": 1}


# Conditional reports.


def test_a_conditional_report_names_its_version():
    bench = Bench().synchronised(reported_version=7)
    ticket = bench.report({"a": 1}, version=7)
    assert (bench.patch, bench.when) == ({"a": 1}, 7)
    bench.answer(204, 8)
    assert bench.result(ticket) == Reported(ticket, 8, None)


def test_a_conditional_report_goes_alone_and_as_it_is():
    bench = Bench().synchronised(reported={"a": 1})
    bench.report({"x": 1})
    bench.report({"y": 1})
    bench.report({"a": 1}, version=3)
    bench.report({"z": 1})
    sent = []
    while bench.sent is not None:
        sent.append((bench.patch, bench.when))
        bench.answer(204, len(sent) + 1)
    assert sent == [({"x": 1}, None), ({"y": 1}, None), ({"a": 1}, 3), ({"z": 1}, None)]


def test_a_conditional_report_of_an_older_version_is_refused_and_nothing_else():
    bench = Bench().synchronised(reported_version=7)
    ticket = bench.report({"a": 1}, version=5)
    later = bench.report({"b": 1})
    bench.answer(412)
    assert bench.result(ticket).error.status == 412
    assert bench.patch == {"b": 1}
    bench.answer(204, 8)
    assert bench.result(later).error is None


# The lost report was merged, and what the hub then says to the second try is only its echo.
@pytest.mark.parametrize("merged", [True, False])
def test_a_lost_answer_then_412_is_decided_by_the_document(merged):
    bench = Bench().synchronised(reported={"a": 0}, reported_version=7)
    ticket = bench.report({"a": 1}, version=7)
    later = bench.report({"b": 1})
    bench.tick()
    assert bench.when == 7
    assert kinds(bench.answer(412)) == ["retrieve"]
    assert bench.result(ticket) is None
    bench.document(reported={"a": 1} if merged else {"a": 5}, reported_version=8)
    if merged:
        assert bench.result(ticket) == Reported(ticket, 8, None)
    else:
        assert bench.result(ticket).error.status == 412
    hub = apply({"a": 1} if merged else {"a": 5}, bench.patch)
    bench.answer(204, 9)
    assert bench.result(later).error is None
    assert hub == bench.twin.reported
    assert bench.twin.reported["b"] == 1


def test_a_recreated_twin_that_looks_like_the_lost_report_is_filled_again():
    bench = Bench().synchronised(reported={"a": 1}, reported_version=7)
    ticket = bench.report({"a": None}, version=1)
    bench.reconnected(reported={}, reported_version=1)
    assert bench.patch == {"a": 1}
    bench.answer(204, 2)
    assert bench.when == 1
    bench.answer(412)
    bench.document(reported={"a": 1}, reported_version=2)
    assert bench.result(ticket).error.status == 412
    assert bench.twin.reported == {"a": 1}


def test_a_document_that_was_asked_for_before_the_412_decides_nothing():
    bench = Bench().synchronised(reported={"a": 0}, reported_version=7)
    ticket = bench.report({"a": 1}, version=7)
    bench.tick()
    bench.retrieve()
    bench.answer(412)
    bench.document(reported={"a": 0}, reported_version=7)
    assert bench.result(ticket) is None
    assert bench.get is not None
    bench.document(reported={"a": 1}, reported_version=8)
    assert bench.result(ticket) == Reported(ticket, 8, None)


@pytest.mark.parametrize("status", [429, 503, 404])
def test_that_document_is_asked_for_until_it_comes(status):
    bench = Bench().synchronised(reported={"a": 0}, reported_version=7)
    ticket = bench.report({"a": 1}, version=7)
    bench.tick()
    bench.answer(412)
    bench.answer_get(status)
    assert kinds(bench.tick()) == ["retrieve"]
    bench.document(reported={"a": 1}, reported_version=8)
    assert bench.result(ticket) == Reported(ticket, 8, None)


def test_a_conditional_report_lost_with_its_connection_is_decided_by_the_document():
    def lost():
        bench = Bench().synchronised(reported={"a": 0}, reported_version=7)
        return bench, bench.report({"a": 1}, version=7)

    bench, ticket = lost()
    bench.reconnected(reported={"a": 1}, reported_version=8)
    assert bench.result(ticket) == Reported(ticket, 8, None)
    assert not bench.twin.outstanding

    bench, ticket = lost()
    bench.reconnected(reported={"a": 0}, reported_version=7)
    assert bench.result(ticket) is None
    assert (bench.patch, bench.when) == ({"a": 1}, 7)

    bench, ticket = lost()
    bench.reconnected(reported={"a": 0, "b": 1}, reported_version=8)
    assert bench.result(ticket).error.status == 412


# The queue.


def test_many_reports_are_joined_and_share_a_ticket():
    bench = Bench().synchronised()
    first = bench.report({"k": -1})
    tickets = [bench.report({"k": index, f"k{index % 50}": index}) for index in range(500)]
    assert len(bench.twin._queue) <= 1 + 32  # one is in flight
    assert len(set(tickets)) <= 32
    bench.answer(204, 2)
    assert bench.patch == {"k": 499, **{f"k{index}": index + 450 for index in range(50)}}
    bench.answer(204, 3)
    assert bench.result(first).version == 2
    assert {bench.result(ticket).version for ticket in tickets} == {3}


def test_reports_that_undo_each_other_are_joined_without_end(monkeypatch):
    monkeypatch.setattr(machine, "_MAX_QUEUE", 64)
    bench = Bench().synchronised(reported={"a": {"old": 1}})
    bench.report({"x": 1})
    for index in range(300):
        bench.report({"a": None} if index % 2 else {"a": {f"k{index % 7}": index}})
    assert len(bench.twin._queue) <= 1 + 64  # one is in flight
    bench.answer(204, 2)
    assert bench.patch == {"a": None}


def test_nothing_is_joined_to_a_report_that_the_hub_may_have_merged(monkeypatch):
    monkeypatch.setattr(machine, "_MAX_PARTS", 1)
    monkeypatch.setattr(machine, "_MAX_QUEUE", 1)
    bench = Bench().synchronised()
    bench.report({"a": {"b": 1}})
    bench.disconnected()
    with pytest.raises(LocalError, match="too many"):
        bench.report({"a": None})
    bench.dialled_again()
    assert bench.patch == {"a": {"b": 1}}


def test_nothing_is_joined_to_what_the_machine_restores_by_itself(monkeypatch):
    monkeypatch.setattr(machine, "_MAX_PARTS", 1)
    bench = Bench(reported={"a": 1}).synchronised()
    assert bench.patch == {"a": 1}
    bench.answer(429)
    ticket = bench.report({"b": 1})
    assert ticket is not None
    bench.tick()
    bench.answer(204, 2)
    assert bench.result(ticket).error is None


def test_reports_that_cannot_be_joined_are_refused_at_1024():
    bench = Bench()
    for index in range(1024):
        bench.report({"a": index}, always=True)
    before = vars(copy.deepcopy(bench.twin))["_bound"]
    with pytest.raises(LocalError, match="too many"):
        bench.report({"a": 1})
    assert bench.twin._bound == before
    assert len(bench.twin._queue) == 1024


# ---------------------------------------------------------------------- retrieve


def test_a_retrieve_gives_the_twin_as_the_hub_has_it():
    bench = Bench().synchronised({"d": 1}, 5, {"r": 1}, 5)
    ticket = bench.retrieve()
    assert bench.get is not None
    bench.document({"d": {"e": [2]}}, 6, {"r": 2}, 6)
    assert bench.result(ticket) == Retrieved(
        ticket, {"desired": {"d": {"e": [2]}}, "reported": {"r": 2}}, None
    )
    assert bench.changes() == [{"d": {"e": [2]}}]
    bench.result(ticket).twin["desired"]["d"]["e"].append("app's own")
    assert bench.twin.desired == {"d": {"e": [2]}}


def test_a_retrieve_asked_while_one_is_in_flight_gets_one_asked_after_it():
    bench = Bench().synchronised()
    first = bench.retrieve()
    second, third = bench.retrieve(), bench.retrieve()
    assert bench.out == []
    bench.document({"a": 1}, 2)
    assert bench.result(first).twin["desired"] == {"a": 1}
    assert bench.result(second) is None
    bench.document({"a": 2}, 3)
    assert bench.result(second).twin == bench.result(third).twin == {"desired": {"a": 2}, "reported": {}}
    assert bench.get is None


def test_a_retrieve_asked_offline_is_answered_by_the_first_document():
    bench = Bench()
    ticket = bench.retrieve()
    bench.synchronised({"a": 1}, 2)
    assert bench.result(ticket).twin["desired"] == {"a": 1}
    assert bench.retrieves() == 1


def test_a_retrieve_lost_with_its_connection_is_asked_on_the_next():
    bench = Bench().synchronised()
    ticket = bench.retrieve()
    bench.reconnected({"a": 1}, 2)
    assert bench.result(ticket).twin["desired"] == {"a": 1}


def test_a_refused_retrieve_is_told_and_tried_again_slowly():
    bench = Bench().retrieving()
    ticket = bench.retrieve()
    bench.answer_get(404, b'{"errorCode":404001,"trackingId":"t"}')
    (error,) = bench.errors()
    assert isinstance(error, RetrieveRejected)
    assert (error.status, error.error_code, error.tracking_id) == (404, 404001, "t")
    assert bench.result(ticket) is None  # asked while that one was in flight
    since = bench.now
    assert kinds(bench.tick()) == ["retrieve"]
    assert 30 * SECOND <= bench.now - since <= MINUTE
    bench.answer_get(404)
    assert bench.result(ticket).error.status == 404


def test_a_retrieve_refused_while_synchronised_is_not_tried_again():
    bench = Bench().synchronised()
    ticket = bench.retrieve()
    bench.answer_get(400)
    assert bench.result(ticket).error.status == 400
    assert bench.twin.state == SYNCHRONISED
    assert bench.twin.deadline is None


BAD_DOCUMENTS = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff",
    b'{"desired":{},"reported":{}}',
    b'{"desired":{"$version":1}}',
    b'{"desired":{"$version":"1"},"reported":{}}',
    b'{"desired":{"$version":true},"reported":{}}',
    b'{"desired":[],"reported":{}}',
    b'{"desired":{"$version":1},"reported":5}',
    b'{"properties":{"desired":{"$version":1}}}',
    b'{"properties":[]}',
    b'{"desired":{"$version":1,"a":' + b'{"a":' * 400 + b"1" + b"}" * 401 + b',"reported":{}}',
    b'{"desired":{"$version":1},"reported":{"a":' + b"[" * 700 + b"]" * 700 + b"}}",
]


@pytest.mark.parametrize("payload", BAD_DOCUMENTS, ids=lambda payload: repr(payload[:40]) + str(len(payload)))
def test_a_document_that_is_none_is_reported_and_asked_for_again(payload):
    bench = Bench(desired={"a": 1}).retrieving()
    bench.answer_get(200, payload)
    (error,) = bench.errors()
    assert isinstance(error, RemoteError)
    assert bench.twin.desired == {"a": 1}
    waits = []
    for _ in range(10):
        since = bench.now
        if bench.get is None:
            bench.tick()
        waits.append(bench.now - since)
        bench.answer_get(200, payload)
    assert waits[0] == 0
    assert max(waits) > 30 * SECOND
    if bench.get is None:
        bench.tick()
    bench.document({"a": 2}, 2)
    assert bench.changes() == [{"a": 2}]


# ---------------------------------------------------------------------- 4: time


def test_4_1_connecting_has_a_deadline():
    bench = Bench()
    bench.start()
    assert bench.twin.deadline == bench.now + MINUTE
    assert bench.tick() == [Disconnect()]
    assert bench.twin.state == OFFLINE
    assert bench.twin.deadline is not None


def test_4_1_subscribing_has_a_deadline_and_is_asked_again():
    bench = bench_in(SUBSCRIBING)
    since = bench.now
    assert bench.tick() == [Subscribe(FILTERS)]
    assert bench.now - since == TIMEOUT
    assert kinds(bench.tick())[0] == "Disconnect"


@pytest.mark.parametrize("timeout", [1, 5000])
def test_4_1_requests_are_given_up_after_the_timeout(timeout):
    bench = Bench(timeout=timeout).retrieving()
    assert bench.twin.deadline == bench.now + timeout
    bench.document()
    bench.report({"a": 1})
    assert bench.twin.deadline == bench.now + timeout


def test_4_1_a_second_loss_in_a_row_drops_the_connection():
    bench = Bench().synchronised()
    bench.report({"a": 1})
    assert kinds(bench.tick()) == ["report"]
    assert kinds(bench.tick()) == ["Disconnect", UP]
    assert "twice in a row" in bench.twin.counts["last_error"]
    bench.dialled_again()
    assert bench.patch == {"a": 1}


def test_4_1_each_connection_has_its_own_count():
    bench = Bench().synchronised()
    bench.report({"a": 1})
    bench.tick()
    bench.tick()
    bench.tick()
    bench.connected()
    assert bench.tick() == [Subscribe(FILTERS)]


def test_4_1_an_answer_in_between_starts_the_count_over():
    bench = Bench().synchronised()
    for value in range(5):
        bench.report({"a": value})
        bench.tick()
        bench.answer(204, value + 2)
    assert bench.twin.state == SYNCHRONISED


def test_4_1_two_requests_lost_at_once_drop_the_connection():
    bench = Bench().synchronised()
    bench.retrieve()
    bench.report({"a": 1})
    assert kinds(bench.tick()) == ["Disconnect", UP]


def backoffs(bench, times, fails):
    """How long each wait for the next attempt was."""
    waits = []
    for _ in range(times):
        fails(bench)
        since = bench.now
        assert kinds(bench.tick()) == ["Connect"]
        waits.append(bench.now - since)
    return waits


@pytest.mark.parametrize("jitter", [0.0, 0.25, 0.999])
def test_4_2_reconnecting_backs_off_with_full_jitter_up_to_a_cap(jitter):
    bench = bench_in("dialling")
    bench.jitter = jitter
    waits = backoffs(bench, 15, Bench.disconnected)
    assert waits == [int(jitter * min(100000, 1000 * 2**tries)) for tries in range(15)]


def test_4_2_being_unavailable_is_no_refusal():
    bench = bench_in("dialling")
    assert max(backoffs(bench, 5, lambda bench: bench.refused(3))) <= 32 * SECOND


def connect_and_lose(bench, lived):
    bench.connected()
    bench.subscribed()
    bench.document()
    bench.now += lived
    bench.disconnected()


@pytest.mark.parametrize(("lived", "starts_over"), [(0, False), (MINUTE - 1, False), (MINUTE, True)])
def test_4_2_backoff_starts_over_after_a_minute_synchronised(lived, starts_over):
    bench = bench_in("dialling")
    waits = backoffs(bench, 6, lambda bench: connect_and_lose(bench, lived))
    if starts_over:
        assert waits == [500] * 6
    else:
        assert waits == [500, 1000, 2000, 4000, 8000, 16000]


def test_4_2_a_fight_for_one_identity_is_told_once_and_again_after_peace():
    bench = bench_in("dialling")
    told = []

    def lose(lived):
        connect_and_lose(bench, lived)
        told.append([str(error) for error in bench.errors()])
        assert all(error.can_retry for error in bench.errors())
        bench.tick()

    for lived in (0, MINUTE - 1, 0, 0, 0, MINUTE, 0, 0, 0):
        lose(lived)
    fights = [[], [], ["fight"], [], [], [], [], [], ["fight"]]
    assert [["fight" for text in texts if "does another client" in text] for texts in told] == fights


def test_4_2_a_renewal_in_between_is_no_fight():
    bench = Bench()
    bench.synchronised(lifetime=10 * SECOND)
    for _ in range(6):
        bench.disconnected()
        assert bench.errors() == []
        bench.tick()
        bench.connected(10 * SECOND)
        bench.subscribed()
        bench.document()
        # The renewal, and the connection after it.
        bench.wait(9 * SECOND)
        bench.connected(10 * SECOND)
        bench.subscribed()
        bench.document()


def test_4_2_what_the_client_ends_itself_is_no_fight():
    bench = bench_in("synchronised")
    for _ in range(5):
        bench.stop()
        bench.start()
        bench.connected()
        bench.subscribed()
        bench.document()
        assert bench.errors() == []
    assert bench.twin.counts["last_error"] is None


def test_4_2_a_minute_without_being_synchronised_does_not_count():
    def never_synchronised(bench):
        bench.connected()
        bench.subscribed()
        bench.now += 10 * MINUTE
        bench.disconnected()

    assert backoffs(bench_in("dialling"), 4, never_synchronised) == [500, 1000, 2000, 4000]


def test_4_2_the_minute_counts_from_the_first_document_of_a_connection():
    def with_a_gap(bench):
        bench.connected()
        bench.subscribed()
        bench.document({}, 5)
        bench.now += MINUTE - 1
        bench.notify({}, 7)
        bench.document({}, 7)
        bench.now += 1
        bench.disconnected()

    assert backoffs(bench_in("dialling"), 4, with_a_gap) == [500] * 4


@pytest.mark.parametrize("code", [1, 2, 4, 5, 99])
def test_4_2_refused_credentials_are_told_at_once_and_tried_slowly(code):
    bench = bench_in("dialling")
    bench.jitter = 0.0
    told = []

    def refuse(bench):
        bench.refused(code)
        told.extend(bench.errors())

    waits = backoffs(bench, 8, refuse)
    assert len(told) == 8
    assert all(isinstance(error, ConnectRefused) and not error.can_retry for error in told)
    assert str(code) in str(told[0])
    assert waits[0] == 30 * SECOND
    assert waits == sorted(waits)
    assert waits[-1] == 450 * SECOND


@pytest.mark.parametrize("jitter", [0.0, 0.999])
def test_4_3_throttled_requests_back_off_with_jitter(jitter):
    bench = Bench().synchronised()
    bench.jitter = jitter
    bench.report({"a": 1})
    waits = []
    for _ in range(10):
        bench.answer(429)
        since = bench.now
        bench.tick()
        waits.append(bench.now - since)
    assert waits == [int(min(100000, 1000 * 2**tries) * (0.5 + 0.5 * jitter)) for tries in range(10)]
    bench.answer(204, 2)
    bench.report({"a": 2})
    bench.answer(503)
    since = bench.now
    bench.tick()
    assert bench.now - since <= SECOND


def test_4_3_a_throttled_retrieve_backs_off_too():
    bench = Bench().retrieving()
    waits = []
    for _ in range(10):
        bench.answer_get(429)
        assert bench.out == []
        since = bench.now
        assert kinds(bench.tick()) == ["retrieve"]
        waits.append(bench.now - since)
    assert waits == [int(min(100000, 1000 * 2**tries) * 0.75) for tries in range(10)]
    bench.document({"a": 1}, 1)
    assert bench.twin.state == SYNCHRONISED


def test_4_3_another_connection_does_not_cut_the_wait_short():
    bench = Bench().synchronised()
    bench.report({"a": 1})
    bench.answer(429, extra="&retry-after=100")
    allowed = bench.now + 100 * SECOND
    bench.reconnected()
    assert bench.sent is None
    bench.tick()
    assert bench.sent is not None
    assert bench.now == allowed


def test_4_3_notifications_do_not_cut_the_wait_of_a_retrieve_short():
    bench = Bench().synchronised({}, 1)
    bench.retrieve()
    waits = []
    for version in range(2, 8):
        bench.answer_get(429)
        since = bench.now
        bench.notify({}, version)
        bench.tick()
        waits.append(bench.now - since)
    assert waits == [750, 1500, 3000, 6000, 12000, 24000]


def test_4_3_a_throttled_retrieve_does_not_hold_up_reports_and_the_other_way_round():
    bench = Bench().synchronised()
    ticket = bench.retrieve()
    bench.answer_get(429)
    bench.report({"a": 1})
    assert bench.sent is not None
    bench.answer(429, extra="&retry-after=100")
    bench.tick()
    assert bench.get is not None
    bench.document()
    assert bench.result(ticket).error is None


# retry-after, milliseconds that are waited at least and at most
RETRY_AFTER = [
    ("0", 500, 1000),
    ("7", 7000, 7000),
    ("x", 500, 1000),
    ("-5", 500, 1000),
    ("9" * 18, 60000, 900000),
]


@pytest.mark.parametrize(("value", "least", "most"), RETRY_AFTER)
def test_4_3_retry_after_is_obeyed_but_no_wait_is_without_end(value, least, most):
    bench = Bench().synchronised()
    bench.report({"a": 1})
    bench.answer(429, extra=f"&retry-after={value}")
    assert least <= bench.twin.deadline - bench.now <= most
    bench.retrieve()
    bench.answer_get(503, extra=f"&retry-after={value}")
    assert least <= bench.twin.deadline - bench.now <= most


def test_4_4_credentials_are_renewed_between_80_and_85_percent_of_their_life():
    for jitter in (0.0, 0.5, 0.999):
        bench = Bench()
        bench.jitter = jitter
        bench.synchronised(lifetime=1000 * SECOND)
        assert 800 * SECOND <= bench.twin.deadline - bench.now <= 850 * SECOND
        assert kinds(bench.tick()) == ["Disconnect", UP, "Connect"]


def test_4_4_the_app_sees_no_error_and_no_lost_change():
    bench = Bench().synchronised({"a": 1}, 5, lifetime=100 * SECOND)
    bench.tick()
    assert bench.errors() == []
    bench.connected(100 * SECOND)
    bench.subscribed()
    bench.document({"a": 2}, 6)
    assert bench.changes() == [{"a": 2}]


def test_4_4_renewal_waits_for_what_is_in_flight_and_nothing_more_is_sent():
    bench = Bench(timeout=1000 * SECOND).synchronised({"a": 1}, 5, lifetime=100 * SECOND)
    ticket = bench.report({"a": 1})
    asked = bench.retrieve()
    bench.now += 90 * SECOND
    assert bench.take(bench.twin.tick(bench.now, 0.5)) == []
    held_back = bench.report({"b": 1})
    bench.notify({"a": 9}, 9)  # a gap; it cannot be asked about now
    assert bench.twin.deadline > bench.now, "nothing is due before an answer or its deadline"
    bench.answer(204, 2)
    assert bench.sent is None
    assert bench.result(ticket).error is None
    bench.document({"a": 1}, 5)
    assert bench.result(asked).error is None
    assert bench.twin.state == OFFLINE
    assert kinds(bench.out)[-1] == "Connect"
    bench.connected()
    bench.subscribed()
    bench.document({"a": 9}, 9, {"a": 1}, 2)
    assert bench.changes() == [{"a": 9}]
    assert bench.patch == {"b": 1}
    bench.answer(204, 3)
    assert bench.result(held_back).error is None


def test_4_4_constant_reports_do_not_starve_the_renewal():
    bench = Bench().synchronised(lifetime=100 * SECOND)
    for value in range(1000):
        bench.report({"a": value})
        bench.now += 500
        if bench.sent is not None:
            bench.answer(204, value + 2)
        if bench.twin.state == OFFLINE:
            break
    assert bench.twin.state == OFFLINE
    assert bench.now <= 91 * SECOND


@pytest.mark.parametrize("in_flight", ["report", "retrieve"])
def test_4_4_what_is_held_back_for_the_renewal_does_not_keep_the_clock_spinning(in_flight):
    bench = Bench(timeout=1000 * SECOND).synchronised({}, 5, lifetime=100 * SECOND)
    bench.report({"a": 1}) if in_flight == "report" else bench.retrieve()
    bench.now += 90 * SECOND
    assert bench.take(bench.twin.tick(bench.now, 0.5)) == []
    bench.notify({}, 9)
    bench.report({"b": 1})
    assert bench.twin.deadline > bench.now + MINUTE


@pytest.mark.parametrize("lifetime", [0, 1, -5])
def test_4_4_a_lifetime_that_is_over_already_still_synchronises_first(lifetime):
    bench = Bench().retrieving(lifetime)
    assert bench.get is not None
    bench.document({"a": 1}, 1)
    assert bench.changes() == [{"a": 1}]


def test_4_4_a_renewal_does_not_count_as_a_failed_attempt():
    bench = Bench().synchronised(lifetime=100 * SECOND)
    for _ in range(5):
        assert kinds(bench.tick())[-1] == "Connect"
        bench.connected(100 * SECOND)
        bench.subscribed()
        bench.document()
    bench.disconnected()
    assert bench.twin.deadline - bench.now == 500


@pytest.mark.parametrize(("lifetime", "wait"), [(100 * SECOND, 500), (10 * SECOND, 16000)])
def test_4_4_after_a_renewal_backoff_starts_over_if_the_connection_was_stable(lifetime, wait):
    bench = bench_in("dialling")
    backoffs(bench, 5, Bench.disconnected)
    bench.connected(lifetime)
    bench.subscribed()
    bench.document()
    assert kinds(bench.tick())[-1] == "Connect"
    bench.disconnected()
    assert bench.twin.deadline - bench.now == wait


def test_4_4_a_chain_of_renewals_is_one_life():
    # Tokens of less than a minute: no connection lives that long, and yet backoff starts over.
    bench = bench_in("dialling")
    backoffs(bench, 5, Bench.disconnected)
    waits = []
    for renewals in range(10):
        chain = copy.deepcopy(bench)
        for _ in range(renewals):
            chain.connected(10 * SECOND)
            chain.subscribed()
            chain.document()
            assert kinds(chain.tick())[-1] == "Connect"
        chain.connected(10 * SECOND)
        chain.subscribed()
        chain.document()
        chain.disconnected()
        waits.append(chain.twin.deadline - chain.now)
    # Every connection lives 8 s, the last one none: seven make 56 s, eight more than the minute.
    assert waits == [16000] * 8 + [500] * 2


def test_4_5_the_core_asks_for_no_time_and_no_chance():
    # Same inputs, same outputs.
    def run():
        bench = Bench()
        given = []
        for value in range(3):
            bench.report({"a": value})
        bench.synchronised({"a": 1}, 1)
        given += bench.out
        bench.notify({}, 9)
        given += bench.out
        given += bench.wait(10 * MINUTE)
        return given

    assert run() == run()


# ---------------------------------------------------------------------- stop, start, abandon


def test_what_is_gathered_stays_over_a_stop():
    bench = Bench().synchronised()
    ticket = bench.report({"a": 1})
    bench.stop()
    later = bench.report({"b": 1})
    assert bench.twin.deadline is None
    bench.synchronised()
    assert bench.patch == {"a": 1, "b": 1}
    bench.answer(204, 2)
    assert bench.result(ticket).error is None
    assert bench.result(later).error is None


def test_start_dials_at_once_whatever_failed_before():
    bench = bench_in("dialling")
    for _ in range(5):
        bench.disconnected()
        bench.tick()
    bench.disconnected()
    bench.stop()
    assert bench.start() == [Connect()]
    bench.disconnected()
    assert bench.twin.deadline - bench.now == 500


def test_abandon_ends_every_ticket():
    bench = Bench().synchronised()
    asked = [bench.retrieve(), bench.retrieve()]
    reported = [bench.report({"a": 1}), bench.report({"b": 1}), bench.report({"c": 1}, version=5)]
    bench.stop()
    bench.take(bench.twin.abandon())
    for ticket in asked + reported:
        assert isinstance(bench.result(ticket).error, NotConnected)
    assert not bench.twin.outstanding
    assert bench.twin.abandon() == []


def test_an_answer_after_abandon_ends_nothing_twice():
    bench = Bench().synchronised()
    ticket = bench.report({"a": 1})
    asked = bench.retrieve()
    bench.take(bench.twin.abandon())
    bench.answer(204, 2)
    bench.document()
    assert isinstance(bench.result(ticket).error, NotConnected)
    assert isinstance(bench.result(asked).error, NotConnected)


def test_after_abandon_later_reports_are_right_all_the_same():
    bench = Bench().synchronised(reported={"a": 0})
    bench.report({"a": 1})
    bench.take(bench.twin.abandon())
    bench.sent = None
    bench.report({"b": 1})
    assert apply({"a": 1}, bench.patch) == apply({"a": 0}, bench.patch)


def test_outstanding_and_target_tell_what_is_not_answered_yet():
    bench = Bench()
    assert not bench.twin.outstanding
    bench.report({"a": 1})
    assert bench.twin.outstanding
    bench.synchronised(reported={"z": 1})
    bench.report({"b": 1, "z": None})
    assert bench.twin.target == {"a": 1, "b": 1}
    assert bench.twin.reported == {"z": 1}
    bench.answer(204, 2)
    bench.answer(204, 3)
    assert not bench.twin.outstanding
    assert bench.twin.target == {"a": 1, "b": 1}


def test_without_a_copy_a_stored_one_is_not_taken_either():
    assert Twin(keep_reported=False, reported={"a": 1}).reported is None


def test_the_statistics_have_only_the_documented_names():
    bench = Bench().synchronised({}, 5)
    names = set(bench.twin.counts)
    bench.notify({}, 1)
    bench.notify({}, 9)
    bench.report({"a": 1})
    bench.answer(400)
    assert set(bench.twin.counts) == names
    assert bench.twin.counts["connects"] == 1


# ---------------------------------------------------------------------- the way of a notification


def test_a_connection_that_was_not_asked_for_changes_nothing():
    for state in ("offline", "waiting"):
        bench = bench_in(state)
        assert bench.connected() == []
        assert bench.twin.state == OFFLINE
        assert bench.twin.counts["connects"] == (state == "waiting")


def test_a_flat_desired_patch_takes_few_python_calls():
    bench = Bench().synchronised({f"k{index}": index for index in range(20)}, 5)
    payload = json.dumps({**{f"k{index}": index + 1 for index in range(10)}, "$version": 6}).encode()
    topic = "$iothub/twin/PATCH/properties/desired/?$version=6"
    calls = []

    def note(frame, event, _argument):
        if event == "call" and os.path.dirname(frame.f_code.co_filename) == os.path.dirname(machine.__file__):
            calls.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        bench.twin.message_received(topic, payload, bench.now, 0.5)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 8, calls


# ---------------------------------------------------------------------- against a hub that misbehaves


class Hub:
    """A twin in memory, and what can go wrong with it. Shares no code with the twin that it serves."""

    def __init__(self, chance, faults):
        self.chance = chance
        self.faults = faults
        self.snapshots = []
        self.recreate()

    def recreate(self):
        self.desired, self.desired_version = {}, 1
        self.reported, self.reported_version = {}, 1

    def roll_back(self):
        if self.snapshots:
            kept = copy.deepcopy(self.chance.choice(self.snapshots))
            self.desired, self.desired_version, self.reported, self.reported_version = kept

    def remember(self):
        kept = (self.desired, self.desired_version, self.reported, self.reported_version)
        self.snapshots.append(copy.deepcopy(kept))

    def write(self, patch):
        """The back end writes; the notification."""
        self.desired = apply(self.desired, patch)
        self.desired_version += 1
        body = {**patch, "$version": self.desired_version}
        topic = f"$iothub/twin/PATCH/properties/desired/?$version={self.desired_version}"
        return topic, json.dumps(body).encode()

    def serve(self, topic, payload):
        """A request; its answer."""
        rid = request_id(topic)
        fault = self.chance.random() < self.faults
        if fault and self.chance.random() < 0.3:
            status, body = self.chance.choice(
                [(429, b""), (503, b"<busy>"), (500, b""), (408, b"{}"), (403, QUOTA)]
            )
            wait = self.chance.choice(["", "", "&retry-after=3", "&retry-after=soon"])
            return f"$iothub/twin/res/{status}/?$rid={rid}{wait}", body
        if "/GET/" in topic:
            body = {
                "desired": {**self.desired, "$version": self.desired_version},
                "reported": {**self.reported, "$version": self.reported_version},
            }
            text = json.dumps(body).encode()
            if fault and self.chance.random() < 0.1:
                text = text[: len(text) // 2]
            return f"$iothub/twin/res/200/?$rid={rid}", text
        patch = json.loads(payload)
        wanted = condition(topic)
        if wanted is not None and wanted != self.reported_version:
            return f"$iothub/twin/res/412/?$rid={rid}", b'{"errorCode":412001}'
        if patch.get("bad") is not None:
            return f"$iothub/twin/res/400/?$rid={rid}", b'{"errorCode":400004}'
        self.reported = apply(self.reported, patch)
        self.reported_version += 1
        return f"$iothub/twin/res/204/?$rid={rid}&$version={self.reported_version}", b""


class World:
    """A hub, a network that loses, doubles, delays and reorders, a shell, and an app that checks."""

    def __init__(self, seed, faults, **options):
        self.chance = random.Random(seed)
        self.faults = faults
        self.hub = Hub(self.chance, faults)
        self.timeout = 20 * SECOND
        self.twin = Twin(timeout=self.timeout, **options)
        self.now = 0
        self.connection = 0  # counts; what belongs to an earlier one does not arrive
        self.subscribed = False  # as the hub sees it
        self.granted = False  # as the client sees it
        self.alive = False
        self.uplink = 0  # when the last request arrives: requests of one connection keep their order
        self.events = []
        self.count = itertools.count()
        self.open = {}  # "get" and "report": its request id, and when it was sent
        self.desired = {}
        self.version = None  # of the last change in this connection
        self.order = []  # of reports: ticket, patch
        self.ended = {}
        self.asked = []
        self.handed = []
        self.failed = []

    # The network.

    def sometimes(self, probability=1.0):
        return self.chance.random() < self.faults * probability

    def at(self, delay, action, *arguments):
        heapq.heappush(self.events, (self.now + delay, next(self.count), self.connection, action, arguments))

    def delay(self):
        if self.sometimes(0.1):
            return self.chance.randrange(40 * SECOND)
        if self.sometimes():
            return self.chance.randrange(2 * SECOND)
        return self.chance.randrange(1, 50)

    def jitter(self):
        return self.chance.random()

    def perform(self, outputs):
        for output in outputs:
            kind = type(output)
            if kind is Connect:
                self.drop()
                self.at(self.delay(), self.dialled)
            elif kind is Disconnect:
                self.drop()
            elif kind is Subscribe:
                assert output.filters == FILTERS
                self.at(self.delay(), self.hub_subscribes)
            elif kind is Publish:
                self.publish(output)
            elif kind is StateChanged:
                assert output.old != output.new
            elif kind is DesiredChanged:
                self.change(output)
            elif kind is Reported or kind is Retrieved:
                if output.ticket is not None:
                    assert output.ticket not in self.ended, "a ticket ended twice"
                    self.ended[output.ticket] = output.error
            elif kind is Failed:
                self.failed.append(output.error)
            else:
                self.other(output)

    def other(self, output):
        raise AssertionError(output)

    def drop(self):
        self.connection += 1
        self.alive = self.subscribed = self.granted = False
        self.open = {}
        self.version = None

    def dialled(self):
        if self.sometimes(0.3):
            self.take(self.twin.disconnected(self.now, self.jitter()))
        elif self.sometimes(0.1):
            self.take(self.twin.refused(self.chance.choice([3, 5]), self.now, self.jitter()))
        elif not self.sometimes(0.05):  # else: no CONNACK ever
            self.alive = True
            lifetime = self.chance.choice([None, 5 * MINUTE, 60 * MINUTE])
            self.take(self.twin.connected(self.now, self.jitter(), lifetime))

    def hub_subscribes(self):
        if self.alive and not self.sometimes(0.1):
            self.subscribed = True
            granted = (0, 0x80) if self.sometimes(0.03) else (0, 0)
            self.at(self.delay(), self.suback, granted)

    def suback(self, granted):
        self.granted = True
        self.take(self.twin.subscribed(granted, self.now, self.jitter()))

    def publish(self, output):
        assert self.granted, "published before SUBACK"
        name = "get" if is_retrieve(output) else "report"
        _, sent = self.open.get(name, (None, None))
        assert sent is None or self.now - sent >= self.timeout, f"two of {name} in flight"
        self.open[name] = f"/?$rid={request_id(output.topic)}", self.now
        self.uplink = max(self.uplink, self.now + self.delay())
        if not self.sometimes(0.1):
            self.at(self.uplink - self.now, self.hub_serves, output.topic, output.payload)

    def hub_serves(self, topic, payload):
        if not self.alive:
            return
        answer = self.hub.serve(topic, payload)
        if self.sometimes(0.05):  # a resumed session brings it on a later connection
            self.connection += 1
            self.at(self.delay(), self.arrive, *answer)
            self.connection -= 1
        elif not self.sometimes(0.15):
            self.at(self.delay(), self.arrive, *answer)
            if self.sometimes(0.1):
                self.at(self.delay(), self.arrive, *answer)

    def arrive(self, topic, payload):
        for name, (rid, _) in list(self.open.items()):
            if (topic + "&").partition(rid)[2][:1] == "&":
                del self.open[name]
        self.take(self.twin.message_received(topic, payload, self.now, self.jitter()))

    def cut(self):
        """The hub is gone; the client notices later."""
        self.alive = self.subscribed = False
        self.at(self.delay(), self.notice)

    def notice(self):
        self.drop()
        self.take(self.twin.disconnected(self.now, self.jitter()))

    # The app.

    def change(self, output):
        assert apply(self.desired, output.patch) == output.desired
        assert same_json(output.desired, self.twin.desired)
        assert self.version is None or self.twin.desired_version >= self.version, "versions went back"
        self.version = self.twin.desired_version
        self.desired = copy.deepcopy(output.desired)
        self.handed.append(copy.deepcopy(output))

    def take(self, outputs):
        self.perform(outputs)

    def report(self, **options):
        patch = self.patch(3)
        if self.chance.random() < 0.1 and self.bad_reports:
            patch["bad"] = 1
        try:
            ticket, outputs = self.twin.report(patch, self.now, **options)
        except PatchError:
            raise
        except LocalError:  # too many that cannot be joined
            return
        self.order.append((ticket, patch))
        self.take(outputs)

    bad_reports = True

    def patch(self, depth):
        patch = {}
        for key in self.chance.sample("abcd", self.chance.randrange(1, 4)):
            pick = self.chance.random()
            if pick < 0.25:
                patch[key] = None
            elif pick < 0.6 and depth > 1:
                patch[key] = self.patch(depth - 1)
            else:
                patch[key] = self.chance.choice([0, 1, True, False, "x", [1, {"a": 1}], {}, 1.5])
        return patch

    def write(self):
        topic, payload = self.hub.write(self.desired_patch())
        if not self.subscribed or self.sometimes(0.2):
            return
        if self.sometimes(0.05):
            payload = self.chance.choice(
                [payload[:-3], b"[]", payload.replace(b"$version", b"$else"), b"\xff"]
            )
            topic = self.chance.choice([topic, topic.partition("?")[0]])
        if self.sometimes(0.03):
            payload = b'{"never":"written","$version":%d}' % 10**12
        self.at(self.delay(), self.arrive, topic, payload)
        if self.sometimes(0.2):
            self.at(self.delay(), self.arrive, topic, payload)

    def desired_patch(self):
        return self.patch(3)

    # Time.

    def step(self, until):
        """The next thing that is due before until; False if there is none."""
        deadline = self.twin.deadline
        due = [self.events[0][0]] if self.events else []
        if deadline is not None:
            due.append(deadline)
        if not due or min(due) > until:
            self.now = max(self.now, until)
            return False
        if self.events and (deadline is None or self.events[0][0] <= deadline):
            when, _, connection, action, arguments = heapq.heappop(self.events)
            self.now = max(self.now, when)
            if connection in (None, self.connection):
                action(*arguments)
            if deadline is not None and self.now < deadline == self.twin.deadline:
                assert self.twin.tick(self.now, self.jitter()) == [], (
                    "tick had something to do before its deadline"
                )
        else:
            late = self.chance.randrange(30) if self.sometimes() else 0
            self.now = max(self.now, deadline) + late
            outputs = self.twin.tick(self.now, self.jitter())
            after = self.twin.deadline
            assert outputs or after is None or after > self.now, "tick spins"
            self.take(outputs)
        return True

    def run(self, milliseconds):
        until = self.now + milliseconds
        for _ in range(200000):
            if not self.step(until):
                return
        raise AssertionError("endless traffic")

    def misbehave(self, steps):
        for _ in range(steps):
            self.run(self.chance.choice([0, 10, 100, SECOND, 10 * SECOND, 100 * SECOND]))
            self.happens()
            self.hub.remember()

    def happens(self):
        pick = self.chance.random()
        if pick < 0.35:
            self.write()
        elif pick < 0.75:
            self.report(**self.chance.choice(self.ways))
        elif pick < 0.82:
            ticket, outputs = self.twin.ask(self.now)
            self.asked.append(ticket)
            self.take(outputs)
        elif pick < 0.88 and self.alive:
            self.cut()
        elif pick < 0.91 and self.alive and self.rolls_back:
            self.chance.choice([self.hub.recreate, self.hub.roll_back])()
            self.cut()
        elif pick < 0.93:
            self.take(self.twin.stop())
            self.run(self.chance.choice([0, 5 * SECOND]))
            self.take(self.twin.start(self.now))

    ways = ({}, {}, {}, {}, {"always": True})
    rolls_back = True

    def recover(self):
        """The hub is well again, and the back end writes once more."""
        self.faults = self.hub.faults = 0
        self.take(self.twin.start(self.now))
        self.run(MINUTE)
        self.write()
        self.run(40 * MINUTE)
        assert self.twin.state == SYNCHRONISED
        assert self.twin.desired_version == self.hub.desired_version
        assert same_json(self.twin.desired, self.hub.desired)
        assert same_json(self.desired, self.hub.desired)

    def wanted(self):
        """What every report that was not refused adds up to."""
        wanted = {}
        for ticket, patch in self.order:
            if self.ended[ticket] is None:
                wanted = apply(wanted, patch)
        return wanted


def same_json(one, other):
    # Python's True == 1 would hide a wrong value.
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.mark.parametrize("faults", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(40))
def test_whatever_goes_wrong_both_sides_agree_in_the_end(seed, faults):
    world = World(seed, faults)
    world.take(world.twin.start(0))
    world.misbehave(300)
    world.recover()
    for ticket, _ in world.order:
        assert ticket in world.ended
    for ticket in world.asked:
        assert ticket in world.ended
    assert not world.twin.outstanding
    assert same_json(world.hub.reported, world.wanted())
    assert same_json(world.twin.reported, world.hub.reported)
    for error in world.ended.values():
        assert error is None or isinstance(error, (ReportRejected, RetrieveRejected))
    # Nothing was refused but what the hub really refuses.
    for ticket, error in world.ended.items():
        if isinstance(error, ReportRejected):
            assert error.status == 400
            assert any("bad" in patch for other, patch in world.order if other == ticket)


@pytest.mark.parametrize("seed", range(40))
def test_so_they_do_with_conditional_reports(seed):
    class Conditional(World):
        @property
        def ways(self):
            return (
                {},
                {"version": self.twin.reported_version or 1},
                {"version": self.hub.reported_version},
                {"always": True},
            )

    world = Conditional(seed, 0.5)
    world.take(world.twin.start(0))
    world.misbehave(300)
    world.recover()
    assert not world.twin.outstanding
    assert same_json(world.twin.reported, world.hub.reported)
    assert same_json(world.hub.reported, world.wanted())


@pytest.mark.parametrize("seed", range(40))
def test_so_they_do_when_many_reports_are_joined(seed, monkeypatch):
    monkeypatch.setattr(machine, "_MAX_PARTS", 2)
    monkeypatch.setattr(machine, "_MAX_QUEUE", 4)
    world = World(seed, 0.7)
    # The one exception: a refusal before a report that was joined for want of space.
    world.bad_reports = False
    world.ways = ({},)
    world.take(world.twin.start(0))
    world.misbehave(300)
    world.recover()
    assert world.twin.counts["coalesced"] > 0
    assert same_json(world.hub.reported, world.wanted())


@pytest.mark.parametrize("seed", range(40))
def test_so_they_do_without_a_copy_of_the_reported_properties(seed):
    world = World(seed, 0.7, keep_reported=False)
    world.rolls_back = False
    world.take(world.twin.start(0))
    world.misbehave(300)
    world.recover()
    assert not world.twin.outstanding
    assert same_json(world.hub.reported, world.wanted())


class Recording(World):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.record = []

    def perform(self, outputs):
        for output in outputs:
            if type(output) is Retrieved and output.twin is not None:
                # A reader leaves the reported properties out.
                output = output._replace(twin=output.twin["desired"])
            self.record.append(repr(output))
        super().perform(outputs)


class Board(Recording):
    """The shell reads every payload in chunks."""

    def arrive(self, topic, payload):
        document = b""
        twin = self.twin.reading(topic)
        if twin is not None:
            reading = reader(twin)
            next(reading)
            try:
                for start in range(0, len(payload), 7):
                    document = reading.send(payload[start : start + 7]) or b""
            except ValueError:
                document = b""
        super().arrive(topic, document)


@pytest.mark.parametrize("seed", range(40))
def test_a_shell_that_reads_in_chunks_is_given_the_same_outputs(seed):
    records = []
    for kind in (Recording, Board):
        world = kind(seed, 0.7, keep_reported=False)
        world.take(world.twin.start(0))
        world.misbehave(300)
        records.append(world.record)
    assert records[0] == records[1]
    assert len(records[0]) > 300


@pytest.mark.parametrize("seed", range(40))
def test_a_second_process_goes_on_from_what_the_store_kept(seed):
    first = World(seed, 0.7)
    first.bad_reports = False
    first.take(first.twin.start(0))
    first.misbehave(150)
    stored = json.loads(json.dumps([first.twin.desired, first.twin.target]))
    second = World(seed + 1000, 0.7, desired=stored[0], reported=stored[1], request_id=10**6)
    second.hub = first.hub
    second.desired = copy.deepcopy(stored[0])
    second.order = [(0, stored[1])]
    second.ended[0] = None
    second.take(second.twin.start(0))
    second.misbehave(150)
    second.recover()
    assert same_json(second.hub.reported, second.wanted())


class Storing(World):
    """Its shell writes down what a store keeps, and only what the store finds worth a write."""

    file = Kept({}, None, [])

    def take(self, outputs):
        super().take(outputs)
        kept = Kept(self.desired, self.twin.reported, self.twin.unanswered)
        if not _is_unchanged(self.file, kept):
            content = json.loads(json.dumps(kept))
            self.file = Kept(*content[:2], [tuple(report) for report in content[2]])

    def cut_off(self, seed):
        """The power goes; the next run finds this hub and this file."""
        desired, reported, reports = self.file
        after = type(self)(
            seed, self.faults, desired=desired, reported=reported, reports=reports, request_id=seed * 10**6
        )
        after.hub, after.file = self.hub, self.file
        after.desired = copy.deepcopy(desired)
        guilty = {ticket for ticket, patch in self.order if "bad" in patch}
        for number, (ticket, patch) in enumerate(self.order):
            # Its tickets start over.
            after.order.append((("before", number), patch))
            ended = self.ended.get(ticket, "refused in the next run" if ticket in guilty else None)
            after.ended["before", number] = ended
        return after


@pytest.mark.parametrize("seed", range(40))
def test_7_power_cuts_lose_nothing_that_was_accepted(seed):
    world = Storing(seed, 0.5)
    for run in range(1, 6):
        world.take(world.twin.start(0))
        world.misbehave(run * 17)
        world = world.cut_off(seed * 10 + run)
    world.take(world.twin.start(0))
    world.recover()
    assert not world.twin.outstanding
    assert same_json(world.hub.reported, world.wanted())
    assert same_json(world.twin.reported, world.hub.reported)


def test_7_a_report_of_an_earlier_run_has_no_ticket_and_fails_as_nobodys():
    bench = Bench(reports=[({"a": 1}, None, False), ({"b": 1}, None, True), ({"c": 1}, 9, True)])
    assert bench.twin.outstanding
    assert bench.twin.target == {"a": 1, "b": 1, "c": 1}
    bench.synchronised()
    assert bench.patch == {"a": 1}
    assert bench.report({"d": 1}) == 1
    bench.answer(204, 2)
    # Whoever waits for what is outstanding, or keeps it, is to know.
    assert Reported(None, 2, None) in bench.out
    assert bench.patch == {"b": 1}
    bench.answer(400)
    assert kinds(bench.out) == ["Failed", "report"]
    assert (bench.patch, bench.when) == ({"c": 1}, 9)
    bench.answer(412)
    assert kinds(bench.out) == ["Failed", "report"]
    assert bench.patch == {"d": 1}
    assert bench.twin.counts["rejected"] == 2


# the hub's reported properties and version, what comes of a report {"n": 1} that was bound to version 4
CUT_OFF = [
    ("never sent", {"n": 0}, 4, "sent"),
    ("answer lost", {"n": 1}, 5, "done"),
    ("overtaken", {"n": 7}, 5, "refused"),
]


@pytest.mark.parametrize(
    ("reported", "version", "fate"), [row[1:] for row in CUT_OFF], ids=[r[0] for r in CUT_OFF]
)
def test_7_a_conditional_report_may_have_been_sent_before_the_restart(reported, version, fate):
    bench = Bench(reported={"n": 0}, reports=[({"n": 1}, 4, True)])
    bench.synchronised(reported=reported, reported_version=version)
    if fate == "sent":
        assert (bench.patch, bench.when) == ({"n": 1}, 4)
    elif fate == "done":
        assert bench.sent is None
        assert not bench.twin.outstanding
        assert "Failed" not in kinds(bench.out)
    else:
        [error] = [output.error for output in bench.out if type(output) is Failed]
        assert error.status == 412
        # What the app last knew to be there is the target again.
        assert bench.patch == {"n": 0}


def test_7_a_report_sent_alone_and_merged_is_not_taken_back_first():
    bench = Bench(reported={"n": 0}, reports=[({"n": 1}, None, True)])
    bench.synchronised(reported={"n": 1}, reported_version=5)
    assert bench.patch == {"n": 1}


def test_7_what_is_unanswered_goes_to_the_next_run_in_order():
    bench = Bench().synchronised(reported={"x": 1})
    bench.report({"a": 1})
    bench.report({"b": None})
    bench.report({"c": 1}, version=3)
    bench.report({"d": 1}, always=True)
    assert bench.twin.unanswered == [
        ({"a": 1}, None, False),
        ({"b": None}, None, False),
        ({"c": 1}, 3, True),
        ({"d": 1}, None, True),
    ]


def test_7_what_was_answered_before_a_report_sent_alone_does_not_undo_it():
    # The file is older than the answer to the first; the power went after the second was merged.
    bench = Bench(reported={"n": 0}, reports=[({"a": 1}, None, False), ({"n": 1}, 5, True)])
    bench.synchronised(reported={"n": 1, "a": 1}, reported_version=6)
    assert (bench.patch, bench.when) == ({"n": 1}, 5)
    bench.answer(412)
    bench.document(reported={"n": 1, "a": 1}, reported_version=6)
    assert bench.sent is None
    assert not bench.twin.outstanding
    assert bench.twin.reported == bench.twin.target == {"n": 1, "a": 1}


@pytest.mark.parametrize("seed", range(40))
def test_7_both_sides_agree_after_power_cuts_with_conditional_reports(seed):
    class Conditional(Storing):
        @property
        def ways(self):
            return ({}, {}, {"version": self.twin.reported_version or 1}, {"always": True})

    world = Conditional(seed, 0.5)
    for run in range(1, 6):
        world.take(world.twin.start(0))
        world.misbehave(run * 17)
        world = world.cut_off(seed * 10 + run)
    world.take(world.twin.start(0))
    world.recover()
    assert not world.twin.outstanding
    assert same_json(world.twin.reported, world.hub.reported)
