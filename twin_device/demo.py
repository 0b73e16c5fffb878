"""A device's story against a local hub, on real sockets: what the command `twin-device demo` plays."""

import json
import queue
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from .client import TwinClient
from .hub import Device, LocalHub

Document = dict[str, Any]

_DEVICE = "sensor-temp-042"
_PATIENCE = 15.0  # seconds, for each step
_REPORTED_TOPIC = "$iothub/twin/PATCH/properties/reported/"


class _Broken(Exception):
    """A step of the story did not hold."""


def play() -> int:
    """Play the six scenes; returns the exit status, 0 if every step held."""
    started = time.monotonic()
    try:
        with LocalHub() as hub:
            _Story(hub).play()
    except _Broken as error:
        print(f"\nThe story broke: {error}")
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.")
        return 130
    print(f"\nEvery step held, in {time.monotonic() - started:.1f} s.")
    return 0


class _Story:
    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        self.device: Device = hub.create_device(
            _DEVICE,
            desired={
                "telemetryInterval": 30,
                "temperatureThreshold": {"min": 18.0, "max": 28.0},
                "firmwareVersion": "2.2.0",
            },
        )
        self.client = TwinClient.from_connection_string(
            self.device.connection_string, ca_file=hub.ca_file, timeout=_PATIENCE
        )
        # What the app's handlers were given, in order.
        self.changes: queue.SimpleQueue[tuple[Document, Document]] = queue.SimpleQueue()
        self.states: queue.SimpleQueue[str] = queue.SimpleQueue()

    def play(self) -> None:
        client = self.client

        @client.on_desired
        def changed(patch: Document, desired: Document) -> None:
            self.changes.put((patch, desired))

        @client.on_state
        def moved(_old: str, new: str) -> None:
            self.states.put(new)

        @client.on_error
        def failed(error: Exception) -> None:
            self.say("device", f"the app's error handler is told: {error}")

        @client.setting("telemetryConfig")
        def apply(value: Document) -> None:
            if value["sendFrequency"] == "0s":
                raise ValueError("sendFrequency 0s would never let the radio sleep")
            self.say("device", f"the app applies telemetryConfig {_text(value)}")

        try:
            self.first_twin()
            self.a_patch()
            self.a_setting()
            self.offline_changes()
            self.stale_notifications()
            self.offline_reports()
        finally:
            client.close()

    # ------------------------------------------------------------------ the scenes

    def first_twin(self) -> None:
        self.scene("1. First twin")
        self.say("hub", f"listens on localhost:{self.hub.mqtts_port}, MQTT over TLS, with a CA made just now")
        self.client.connect()
        patch, desired = self.next_change()
        self.say("device", f"{_DEVICE} connects, subscribes, retrieves {_text(desired)}")
        self.check(
            patch == desired == self.device.desired, "the handler was given the whole desired document"
        )
        kinds = [packet.kind for packet in self.device.packets]
        self.check(len(kinds) <= 6, f"{len(kinds)} MQTT packets to the first twin: {' '.join(kinds)}")
        self.report({**desired, "batteryLevel": 97, "lastBootTime": "2026-01-31T06:00:00Z"})

    def a_patch(self) -> None:
        self.scene("2. The back end changes its mind")
        patch = {
            "telemetryInterval": 15,
            "temperatureThreshold": {"min": 20.0, "max": 26.0, "alertEnabled": True},
            "loggingLevel": "info",
        }
        with self.before_and_after():
            self.say("back end", f"patches desired with {_text(patch)}")
            self.device.patch_desired(patch)
            given, _ = self.next_change()
            self.check(given == patch, "the handler was given exactly that patch")
            self.report(given)

    def a_setting(self) -> None:
        self.scene("3. A setting: pending, applied, refused")
        good = {"configId": "c-1001", "sendFrequency": "5m"}
        bad = {"configId": "c-1002", "sendFrequency": "0s"}
        self.device.clear_packets()
        self.say("back end", f"desires telemetryConfig {_text(good)}")
        self.device.patch_desired({"telemetryConfig": good})
        self.device.wait_for(
            {"telemetryConfig": {**good, "status": "Success", "pendingConfig": None}}, _PATIENCE
        )
        for report in self.reports_on_the_wire():
            self.say("device", f"reports {_text(report)}")
        pending = self.reports_on_the_wire()[0]["telemetryConfig"]
        self.check(
            pending == {"status": "Pending", "pendingConfig": good}, "it was pending before it was a success"
        )
        self.say("back end", f"desires telemetryConfig {_text(bad)}")
        self.device.patch_desired({"telemetryConfig": bad})
        found = self.device.wait_for(
            {"telemetryConfig": {"status": "Failed", "pendingConfig": None}}, _PATIENCE
        )
        self.check(found is not None, "the app refused it: the hub was told Failed")
        config = self.device.reported["telemetryConfig"]
        self.say("hub", f"holds reported telemetryConfig {_text(config)}")
        self.check(
            {key: config[key] for key in good} == good and "radio" in config["reason"],
            "with the reason, and the old configuration still the current one",
        )
        self.next_change()
        self.next_change()

    def offline_changes(self) -> None:
        self.scene("4. Changed, deleted and replaced while the device was away")
        before = self.client.desired
        with self.connection_lost(), self.before_and_after():
            self.say("back end", 'patches desired with {"telemetryInterval": 60}')
            self.device.patch_desired({"telemetryInterval": 60})
            self.say("back end", 'deletes a key with {"loggingLevel": null}')
            self.device.patch_desired({"loggingLevel": None})
            replacement = {
                "telemetryInterval": 60,
                "temperatureThreshold": {"min": 20.0, "max": 30.0},
                "firmwareVersion": "2.3.0",
            }
            self.say("back end", f"replaces the whole desired document with {_text(replacement)}")
            self.device.replace_desired(replacement)
        patch, desired = self.next_change()
        self.say("device", f"is back; one patch: {_text(patch)}")
        exact = {
            "telemetryInterval": 60,
            "loggingLevel": None,
            "temperatureThreshold": {"max": 30.0, "alertEnabled": None},
            "firmwareVersion": "2.3.0",
            "telemetryConfig": None,
        }
        self.check(patch == exact, "it is the exact difference, with null for what went away")
        self.check(desired == replacement and before != desired, "and leads to the hub's document")
        self.check(self.changes.empty(), "the states in between were never shown")

    def stale_notifications(self) -> None:
        self.scene("5. Stale and doubled notifications")
        before = self.client.statistics
        version = self.device.desired_version
        self.say(
            "hub", f"sends version {version} once more, and then version {version - 2} with an old value"
        )
        self.device.notify({"telemetryInterval": 60}, version)
        self.device.notify({"telemetryInterval": 30}, version - 2)
        self.device.patch_desired({"telemetryInterval": 45})
        patch, _ = self.next_change()
        after = self.client.statistics
        counts = {name: (before[name], after[name]) for name in ("stale", "notifications", "gaps")}
        for name, (old, new) in counts.items():
            self.say("device", f"counts {name}: {old} -> {new}")
        self.check(after["stale"] - before["stale"] == 2, "both were discarded")
        self.check(
            patch == {"telemetryInterval": 45}, "the handler saw only the new value that came after them"
        )

    def offline_reports(self) -> None:
        self.scene("6. Fifty reports while offline")
        with self.connection_lost():
            self.device.clear_packets()
            for number in range(50):
                self.client.report({"batteryLevel": 96 - number, "uptime": number * 60}, wait=False)
            self.say("device", "reports 50 times: batteryLevel 96 down to 47, uptime 0 up to 2940")
        self.device.wait_for({"batteryLevel": 47, "uptime": 2940}, _PATIENCE)
        patches = self.reports_on_the_wire()
        self.say("device", f"sends {_text(patches[0])}")
        self.check(len(patches) == 1, "one patch on the wire")
        # Asked now: what the device holds is then at least as new as what the hub told.
        twin = self.client.retrieve()
        for section in ("desired", "reported"):
            ours = twin[section]
            theirs = self.device.desired if section == "desired" else self.device.reported
            lines = [f"{section} at the hub", *_lines(theirs)], [f"{section} at the device", *_lines(ours)]
            width = max(map(len, lines[0])) + 3
            print()
            for left, right in zip_longest(*lines, fillvalue=""):
                print(f"   {left:<{width}}{right}")
            self.check(ours == theirs, f"{section}: equal")
        self.check(
            self.client.desired == self.device.desired and self.client.reported == self.device.reported,
            "and so are the copies that the client keeps",
        )

    # ------------------------------------------------------------------ how it is told

    def scene(self, title: str) -> None:
        print(f"\n{title}")

    def say(self, who: str, what: str) -> None:
        print(f"   {who:<9} {what}")
        sys.stdout.flush()

    def check(self, held: bool, what: str) -> None:
        if not held:
            raise _Broken(f"not true: {what}")
        self.say("  ok", what)

    def next_change(self) -> tuple[Document, Document]:
        try:
            return self.changes.get(timeout=_PATIENCE)
        except queue.Empty:
            raise _Broken("the handler was not called in time") from None

    def report(self, patch: Document) -> None:
        version = self.client.report(patch)
        self.say("device", f"reports {_text(patch)}: accepted, reported version {version}")
        # Raises TimeoutError if the hub does not hold it.
        self.device.wait_for(patch, _PATIENCE)

    def reports_on_the_wire(self) -> list[Document]:
        return [
            json.loads(packet.payload)
            for packet in self.device.packets
            if packet.direction == "in" and packet.topic and packet.topic.startswith(_REPORTED_TOPIC)
        ]

    @contextmanager
    def before_and_after(self) -> Iterator[None]:
        self.say("hub", f"desired before: {_text(self.device.desired)}")
        yield
        self.say("hub", f"desired after:  {_text(self.device.desired)}")

    @contextmanager
    def connection_lost(self) -> Iterator[None]:
        """Take the hub away, and bring it back at the end and wait until the device is synchronised."""
        while not self.states.empty():
            self.states.get()
        self.hub.stop_listening()
        self.await_state("offline")
        self.say("device", "loses its connection")
        yield
        self.hub.listen_again()
        self.await_state("synchronised")

    def await_state(self, wanted: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                if self.states.get(timeout=max(0.0, deadline - time.monotonic())) == wanted:
                    return
            except queue.Empty:
                raise _Broken(f"the device did not become {wanted} in time") from None


def _text(document: object) -> str:
    return json.dumps(document, ensure_ascii=False)


def _lines(document: Document) -> list[str]:
    return json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True).splitlines()
