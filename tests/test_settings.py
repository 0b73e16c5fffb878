"""The desired-state pattern: pending, apply, success or failure; and where it goes on after an outage."""

import json

import pytest
from test_twin import MINUTE, SECOND, Bench, World, apply, same_json

from twin_device.core import settings as module
from twin_device.core.errors import LocalError, PatchError
from twin_device.core.settings import DOCUMENT, PNP, Apply, Settings
from twin_device.core.twin import SYNCHRONISED, Failed, Twin


class Device(Bench):
    """A bench whose twin has settings. The hub that it talks to answers every report at once."""

    def __init__(self, shape=DOCUMENT, name="s", **options):
        super().__init__(**options)
        self.settings = Settings(self.twin)
        self.settings.declare(name, shape)
        self.name = name
        self.shape = shape
        self.hub = {}
        self.version = 1  # of the hub's reported properties
        self.history = []  # what the setting's property was reported as
        self.applies = []  # values that wait for the app
        self.failures = []
        self.answering = True

    def take(self, outputs):
        outputs = outputs + self.settings.observe(outputs, self.now)
        return self.perform(outputs)

    def perform(self, outputs):
        super().take(outputs)
        for output in outputs:
            if type(output) is Apply:
                assert output.name == self.name
                self.applies.append(output.value)
            elif type(output) is Failed:
                self.failures.append(output.error)
        while self.answering and self.sent is not None:
            self.hub = apply(self.hub, self.patch)
            self.history.append(at(self.hub, self.name))
            self.version += 1
            self.answer(204, self.version)
        return outputs

    def applied(self, error=None):
        self.applies.pop(0)
        self.perform(self.settings.applied(self.name, error, self.now))

    def up(self, desired=None, version=1):
        """Connected and synchronised with the hub as it is."""
        if self.twin.deadline is None:
            self.start()
        else:
            self.tick()
        self.connected()
        self.subscribed()
        self.document(desired, version, self.hub, self.version)
        assert self.twin.state == SYNCHRONISED
        return self

    def again(self, desired=None, version=1):
        self.disconnected()
        return self.up(desired, version)


def at(document, name):
    for key in name.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


# ---------------------------------------------------------------------- the state table, row by row


def test_a_new_desired_value_is_reported_pending_applied_and_reported_success():
    device = Device().up({"s": {"interval": 5}}, 3)
    assert device.applies == [{"interval": 5}]
    assert device.hub == {"s": {"status": "Pending", "pendingConfig": {"interval": 5}}}
    device.applied()
    assert device.hub == {"s": {"interval": 5, "status": "Success"}}
    assert device.applies == []


def test_pending_shows_what_the_device_still_runs_with():
    device = Device().up({"s": {"interval": 5}}, 3)
    device.applied()
    device.notify({"s": {"interval": 6, "mode": "x"}}, 4)
    assert device.hub["s"] == {
        "interval": 5,
        "status": "Pending",
        "pendingConfig": {"interval": 6, "mode": "x"},
    }
    device.applied()
    assert device.hub["s"] == {"interval": 6, "mode": "x", "status": "Success"}


def test_a_failure_is_reported_with_its_reason_and_the_old_value_stays_current():
    device = Device().up({"s": {"interval": 5}}, 3)
    device.applied()
    device.notify({"s": {"interval": -1}}, 4)
    device.applied("it must be positive")
    assert device.hub["s"] == {"interval": 5, "status": "Failed", "reason": "it must be positive"}
    assert device.applies == []


def test_the_same_desired_value_again_is_not_applied_again():
    device = Device().up({"s": {"interval": 5}}, 3)
    device.applied()
    device.notify({"s": {"interval": 5}}, 4)
    assert device.applies == []
    assert device.history[-1] == {"interval": 5, "status": "Success"}


def test_what_was_applied_before_an_outage_is_not_applied_again():
    device = Device().up({"s": {"interval": 5}}, 3)
    device.applied()
    reports = len(device.history)
    device.again({"s": {"interval": 5}}, 3)
    assert device.applies == []
    assert len(device.history) == reports


def test_what_was_pending_at_a_reboot_is_applied_again():
    device = Device()
    device.hub = {"s": {"status": "Pending", "pendingConfig": {"interval": 5}, "interval": 4}}
    device.up({"s": {"interval": 5}}, 3)
    assert device.applies == [{"interval": 5}]
    device.applied()
    assert device.hub["s"] == {"interval": 5, "status": "Success"}


def test_what_failed_is_tried_again_after_a_reconnect_and_not_before():
    device = Device().up({"s": {"interval": 5}}, 3)
    device.applied("no")
    device.notify({"other": 1}, 4)
    assert device.applies == []
    device.again({"s": {"interval": 5}, "other": 1}, 4)
    assert device.applies == [{"interval": 5}]
    device.applied()
    assert device.hub["s"] == {"interval": 5, "status": "Success"}


def test_what_failed_is_tried_again_when_it_is_desired_once_more():
    device = Device().up({"s": 5}, 3)
    device.applied("no")
    device.notify({"s": 5}, 4)
    assert device.applies == [5]


def test_a_desired_value_that_goes_away_leaves_the_device_as_it_was():
    device = Device().up({"s": {"interval": 5}}, 3)
    device.applied()
    reports = len(device.history)
    device.notify({"s": None}, 4)
    device.again({}, 4)
    assert device.applies == []
    assert len(device.history) == reports
    assert device.hub["s"] == {"interval": 5, "status": "Success"}


def test_a_property_that_is_no_setting_is_left_alone():
    device = Device().up({"other": 1}, 3)
    device.notify({"other": 2}, 4)
    assert device.history == []
    assert device.applies == []


# ---------------------------------------------------------------------- one at a time, only the newest


def test_while_one_is_applied_only_the_newest_waits():
    device = Device().up({"s": 1}, 3)
    for version in (4, 5, 6):
        device.notify({"s": version}, version)
    assert device.applies == [1]
    device.applied()
    assert device.applies == [6]
    device.applied()
    assert device.applies == []
    assert device.hub["s"] == {"value": 6, "status": "Success"}


def test_a_newer_value_is_applied_after_a_failure_too():
    device = Device().up({"s": 1}, 3)
    device.notify({"s": 2}, 4)
    device.applied("no")
    assert device.applies == [2]


def test_back_to_the_value_that_is_being_applied_needs_nothing_more():
    device = Device().up({"s": 1}, 3)
    device.notify({"s": 2}, 4)
    device.notify({"s": 1}, 5)
    device.applied()
    assert device.applies == []
    assert device.hub["s"] == {"value": 1, "status": "Success"}


def test_an_outage_while_applying_does_not_apply_twice():
    device = Device().up({"s": 1}, 3)
    device.again({"s": 1}, 3)
    assert device.applies == [1]
    device.applied()
    assert device.applies == []
    assert device.hub["s"] == {"value": 1, "status": "Success"}


def test_applied_while_offline_is_reported_on_the_next_connection():
    device = Device().up({"s": 1}, 3)
    device.disconnected()
    device.applied()
    device.up({"s": 1}, 3)
    assert device.applies == []
    assert device.hub["s"] == {"value": 1, "status": "Success"}


def test_what_is_desired_during_an_outage_is_applied_after_it():
    device = Device().up({"s": 1}, 3)
    device.disconnected()
    device.applied()
    device.up({"s": 2}, 4)
    assert device.applies == [2]
    device.applied()
    assert device.hub["s"] == {"value": 2, "status": "Success"}


def test_nothing_is_applied_in_the_middle_of_a_gap():
    device = Device().up({"s": 1}, 3)
    device.applied()
    device.notify({"s": 9}, 9)
    assert device.applies == []
    device.document({"s": 7}, 7, device.hub, device.version)
    assert device.twin.state != SYNCHRONISED
    assert device.applies == []
    device.tick()
    device.document({"s": 10}, 10, device.hub, device.version)
    assert device.applies == [10]


def test_two_settings_do_not_wait_for_each_other():
    twin = Twin()
    settings = Settings(twin)
    settings.declare("a")
    settings.declare("b")
    bench = Bench()
    bench.twin = twin
    taken = []
    take = bench.take
    bench.take = lambda outputs: taken.extend(outputs + settings.observe(outputs, bench.now)) or take(outputs)
    bench.synchronised({"a": 1, "b": 2})
    assert {output.name: output.value for output in taken if type(output) is Apply} == {"a": 1, "b": 2}


def test_the_app_may_change_the_value_that_it_is_given():
    device = Device().up({"s": {"list": [1]}}, 3)
    device.applies[0]["list"].append("app's own")
    device.applied()
    assert device.hub["s"] == {"list": [1], "status": "Success"}
    assert device.twin.desired == {"s": {"list": [1]}}


def test_pending_is_reported_before_the_app_is_called():
    device = Device()
    device.answering = False
    device.start()
    device.connected()
    device.subscribed()
    device.document({"s": 1}, 3)
    names = [type(output).__name__ for output in device.settings.observe([], 0)]
    assert names == []
    assert device.patch == {"s": {"status": "Pending", "pendingConfig": 1}}


# ---------------------------------------------------------------------- the shapes

# shape, desired, pending, success, failure: for a device that reports nothing yet
SHAPES = [
    (
        DOCUMENT,
        {"i": 1},
        {"status": "Pending", "pendingConfig": {"i": 1}},
        {"i": 1, "status": "Success"},
        {"status": "Failed", "reason": "why"},
    ),
    (
        DOCUMENT,
        5,
        {"status": "Pending", "pendingConfig": 5},
        {"value": 5, "status": "Success"},
        {"status": "Failed", "reason": "why"},
    ),
    (
        DOCUMENT,
        False,
        {"status": "Pending", "pendingConfig": False},
        {"value": False, "status": "Success"},
        {"status": "Failed", "reason": "why"},
    ),
    (
        DOCUMENT,
        [1, {"a": 1}],
        {"status": "Pending", "pendingConfig": [1, {"a": 1}]},
        {"value": [1, {"a": 1}], "status": "Success"},
        {"status": "Failed", "reason": "why"},
    ),
    (
        DOCUMENT,
        {},
        {"status": "Pending", "pendingConfig": {}},
        {"status": "Success"},
        {"status": "Failed", "reason": "why"},
    ),
    # A member named like one of the answer's own.
    (
        DOCUMENT,
        {"status": "on", "i": 1},
        {"status": "Pending", "pendingConfig": {"status": "on", "i": 1}},
        {"value": {"status": "on", "i": 1}, "status": "Success"},
        {"status": "Failed", "reason": "why"},
    ),
    (
        PNP,
        21.5,
        {"value": 21.5, "ac": 202, "av": 3, "ad": "pending"},
        {"value": 21.5, "ac": 200, "av": 3, "ad": "success"},
        {"value": 21.5, "ac": 400, "av": 3, "ad": "why"},
    ),
    (
        PNP,
        {"i": 1},
        {"value": {"i": 1}, "ac": 202, "av": 3, "ad": "pending"},
        {"value": {"i": 1}, "ac": 200, "av": 3, "ad": "success"},
        {"value": {"i": 1}, "ac": 400, "av": 3, "ad": "why"},
    ),
]


@pytest.mark.parametrize(("shape", "desired", "pending", "success", "failure"), SHAPES)
def test_the_shape_of_the_reported_property(shape, desired, pending, success, failure):
    device = Device(shape).up({"s": desired}, 3)
    device.applied()
    assert [same_json(*pair) for pair in zip(device.history, [pending, success], strict=True)] == [True, True]
    assert device.again({"s": desired}, 3).applies == []
    device = Device(shape).up({"s": desired}, 3)
    device.applied("why")
    assert same_json(device.history, [pending, failure])
    assert device.again({"s": desired}, 3).applies == [desired]


@pytest.mark.parametrize("shape", [DOCUMENT, PNP])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 1, "b": 2}, {"b": 3}),
        ({"a": 1}, 5),
        (5, {"a": 1}),
        ([1], {}),
        ({"value": 1}, {"x": 1}),
        (1, True),
    ],
)
def test_a_value_of_another_kind_leaves_nothing_of_the_old_one(shape, before, after):
    device = Device(shape).up({"s": before}, 3)
    device.applied()
    device.again({"s": after}, 4)
    assert same_json(device.applies, [after])
    device.applied()
    fresh = Device(shape).up({"s": after}, 4)
    fresh.applied()
    assert same_json(device.hub, fresh.hub)


def test_a_property_that_was_reported_plainly_before_counts_as_current():
    device = Device()
    device.hub = {"s": 7}
    device.up({"s": 8}, 3)
    assert device.hub["s"] == {"value": 7, "status": "Pending", "pendingConfig": 8}
    device.applied("no")
    assert device.hub["s"] == {"value": 7, "status": "Failed", "reason": "no"}


def test_plug_and_play_answers_the_version_that_was_written():
    device = Device(PNP).up({"s": 1}, 3)
    device.applied()
    device.notify({"s": 1}, 4)
    assert device.applies == []
    assert device.hub["s"]["av"] == 4
    device.notify({"s": 2}, 5)
    device.applied("too high")
    assert device.hub["s"] == {"value": 1, "ac": 400, "av": 5, "ad": "too high"}


@pytest.mark.parametrize("error", [None, "no"])
def test_plug_and_play_answers_the_newest_wish_for_the_same_value(error):
    device = Device(PNP).up({"s": 1}, 3)
    device.notify({"s": 1}, 4)
    device.applied(error)
    assert device.hub["s"]["av"] == 4
    assert device.applies == []


def test_a_components_property_is_marked_as_a_components():
    device = Device(PNP, "thermostat.target").up({"thermostat": {"__t": "c", "target": 21}}, 3)
    assert device.applies == [21]
    device.applied()
    assert device.hub == {
        "thermostat": {"__t": "c", "target": {"value": 21, "ac": 200, "av": 3, "ad": "success"}}
    }
    device.again({"thermostat": {"__t": "c", "target": 21}}, 3)
    assert device.applies == []


# ---------------------------------------------------------------------- declaring


# name, shape
BAD_DECLARATIONS = [
    ("", DOCUMENT),
    (".", DOCUMENT),
    ("a.", DOCUMENT),
    (".a", DOCUMENT),
    ("a.b.c", DOCUMENT),
    ("$version", DOCUMENT),
    ("a b", DOCUMENT),
    ("a\n", PNP),
    ("a#.b", PNP),
    ("x" * 1025, DOCUMENT),
    ("a", "other"),
    ("a", None),
    ("s", DOCUMENT),
]


@pytest.mark.parametrize(("name", "shape"), BAD_DECLARATIONS, ids=lambda value: repr(value)[:20])
def test_a_declaration_that_cannot_be_right_is_refused(name, shape):
    settings = Settings(Twin())
    settings.declare("s")
    with pytest.raises(LocalError):
        settings.declare(name, shape)
    assert settings._shapes == {"s": DOCUMENT}


def test_a_setting_declared_late_is_applied_at_once():
    device = Device(name="other").up({"s": 1}, 3)
    device.settings.declare("s")
    device.name = "s"
    device.perform(device.settings.declared("s", device.now))
    assert device.applies == [1]
    device.applied()
    assert device.hub["s"] == {"value": 1, "status": "Success"}


def test_a_setting_declared_offline_waits_for_the_connection():
    device = Device()
    assert device.settings.declared("s", 0) == []


# ---------------------------------------------------------------------- what cannot be reported


def deep(depth):
    return 1 if depth == 0 else {"k": deep(depth - 1)}


def test_a_value_too_deep_to_be_shown_pending_is_applied_all_the_same():
    device = Device().up({"s": deep(9)}, 3)
    assert device.applies == [deep(9)]
    device.applied()
    assert device.hub["s"] == {**deep(9), "status": "Success"}
    device = Device().up({"s": deep(10)}, 3)
    assert device.applies == [deep(10)]
    (error,) = device.failures
    assert isinstance(error, PatchError)
    device.applied()
    assert device.hub["s"] == {**deep(10), "status": "Success"}


def test_a_value_too_large_to_be_shown_twice_is_applied_all_the_same():
    large = {f"k{index}": "x" * 4000 for index in range(7)}
    device = Device().up({"s": large}, 3)
    device.applied()
    other = dict.fromkeys(large, "y" * 4000)
    device.notify({"s": other}, 4)
    assert device.applies == [other]
    assert isinstance(device.failures[0], PatchError)
    device.applied()
    assert device.hub["s"] == {**other, "status": "Success"}


# reason, what is reported
REASONS = [
    ("x" * 5000, "x" * 1024),
    ("😀" * 5000, "😀" * 1024),
    ("a\nb", "a\nb"),
    ("", ""),
]


@pytest.mark.parametrize(("reason", "reported"), REASONS, ids=lambda text: ascii(text[:3]))
def test_a_reason_is_cut_to_what_the_hub_takes(reason, reported):
    device = Device().up({"s": 1}, 3)
    device.applied(reason)
    assert device.hub["s"]["reason"] == reported


def test_a_reason_that_no_utf8_can_say_stops_nothing():
    device = Device().up({"s": 1}, 3)
    device.applied("\ud800")
    assert isinstance(device.failures[0], PatchError)
    device.notify({"s": 2}, 4)
    device.applied()
    assert device.hub["s"] == {"value": 2, "status": "Success"}


# ---------------------------------------------------------------------- against a hub that misbehaves


class Configured(World):
    """A world whose device has settings, and an app that takes its time, and fails now and then."""

    names = ("a", "b", "c.d")

    def __init__(self, seed, faults, shape, **options):
        super().__init__(seed, faults, **options)
        self.settings = Settings(self.twin)
        for name in self.names:
            self.settings.declare(name, shape)
        self.shape = shape
        self.applying = {}
        self.reasons = dict.fromkeys(self.names, True)  # why the next Apply would be right
        self.last = {}

    def take(self, outputs):
        self.perform(outputs + self.settings.observe(outputs, self.now))

    def perform(self, outputs):
        for output in outputs:
            if type(output).__name__ in ("Connect", "StateChanged"):
                self.reasons = dict.fromkeys(self.names, True)
            elif type(output).__name__ == "DesiredChanged":
                for name in self.names:
                    if at(output.patch, name) is not None and not same_json(
                        at(output.desired, name), self.last.get(name)
                    ):
                        self.reasons[name] = True
        super().perform(outputs)

    def other(self, output):
        assert type(output) is Apply
        name = output.name
        assert name not in self.applying, "two of one setting are applied at once"
        assert self.reasons[name] or not same_json(self.last.get(name), output.value), (
            "applied twice for nothing"
        )
        self.reasons[name] = False
        self.last[name] = output.value
        self.applying[name] = output.value
        # Not the connection's business: the app goes on while there is none.
        connection, self.connection = self.connection, None
        self.at(self.chance.choice([0, 10, SECOND, 60 * SECOND]), self.app_returns, name)
        self.connection = connection

    def app_returns(self, name):
        del self.applying[name]
        error = "no" if self.sometimes(0.3) else None
        if error:
            self.reasons[name] = True
        self.perform(self.settings.applied(name, error, self.now))

    def happens(self):
        if self.chance.random() < 0.5:
            self.write()
        else:
            super().happens()

    def report(self, **options):
        patch = {self.chance.choice("xyz"): self.patch(2)}
        ticket, outputs = self.twin.report(patch, self.now, **options)
        self.order.append((ticket, patch))
        self.take(outputs)

    def desired_patch(self):
        patch = {}
        for name in self.chance.sample(self.names, 2):
            value = self.chance.choice([1, 2, True, "x", [1], {"i": 1}, {"i": 2, "status": "on"}, {}, None])
            component, _, key = name.rpartition(".")
            patch[component or key] = {key: value, "__t": "c"} if component else value
        return patch


@pytest.mark.parametrize("faults", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [DOCUMENT, PNP])
@pytest.mark.parametrize("seed", range(15))
def test_whatever_goes_wrong_every_setting_ends_applied(seed, shape, faults):
    world = Configured(seed, faults, shape)
    world.take(world.twin.start(0))
    world.misbehave(200)
    world.recover()
    # What failed last in a connection that still lives is not tried again in it.
    world.cut()
    world.run(10 * MINUTE)
    assert world.applying == {}
    for name in world.names:
        desired = at(world.hub.desired, name)
        reported = at(world.hub.reported, name)
        if desired is None:
            assert reported is None or isinstance(reported, dict)
        elif shape == PNP:
            assert (reported["ac"], reported["ad"]) == (200, "success")
            assert reported["av"] == world.hub.desired_version
            assert same_json(reported["value"], desired)
        else:
            wrapped = (
                dict(desired) if isinstance(desired, dict) and "status" not in desired else {"value": desired}
            )
            assert same_json(reported, {**wrapped, "status": "Success"})
        if desired is not None:
            assert same_json(world.last[name], desired)
    assert [error for error in world.failed if isinstance(error, PatchError)] == []


def test_the_module_has_two_shapes():
    assert (module.DOCUMENT, module.PNP) == ("document", "pnp")
    assert json.dumps([DOCUMENT, PNP]) == '["document", "pnp"]'
