"""`make scorecard`: 15 situations of a device's life, put to Microsoft's azure-iot-device and to this client.

Each situation has one criterion, the same for all, and a local hub of its own. The app is the same, too: it
registers a handler, connects, retrieves once, and reports; it does not know how its client works, and does
nothing again. Every client runs in a process of its own with the options that it has by default, but for the
lifetime of tokens in the last situation. Exit status 1: ours has failed one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.merge_patch import merged
from tests.players.player import OrderFailed, Player, ours
from twin_device.hub import Device, LocalHub

AZURE = "2.14.0"  # the newest release
# A client may take as long as this to come back by itself: azure-iot-device tries every 10 s.
COMES_BACK = 45.0
SOON = 10.0
DEVICE = "sensor-1"

Document = dict[str, Any]


class Failed(Exception):
    """The client does not pass; the text says what was seen."""


def check(passes: bool, seen: str) -> str:
    if not passes:
        raise Failed(seen)
    return seen


class Stage:
    """One client in one situation: a hub, a device, and the player."""

    def __init__(self, subject: "Subject", certificates: Path) -> None:
        self.subject = subject
        self.hub = LocalHub(certificates=certificates)
        self.hub.start()
        self.device = self.hub.create_device(DEVICE, desired={"n": 0, "mode": {"fan": "low", "heat": True}})
        self.player = Player(*subject.command(self.hub.mqtts_port or 0), on_event=self._told)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self.events: list[Document] = []
        self._base: Document = {}

    def close(self) -> None:
        self.player.close()
        self.hub.close()

    def _told(self, event: Document) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    # ------------------------------------------------------------------ the app

    def open(self, device: Device | None = None, **options: Any) -> None:
        self.open_soon(device, **options).result(SOON)

    def open_soon(self, device: Device | None = None, **options: Any) -> "Future[Any]":
        device = device or self.device
        text = device.connection_string
        if self.subject.port_is_fixed:
            text = text.replace(f"localhost:{self.hub.mqtts_port}", "localhost")
        return self.player.start("open", device.id, text=text, ca=self.hub.ca_file, **options)

    def retrieve(self) -> None:
        twin = self.player("retrieve", DEVICE, within=SOON)
        with self._changed:
            self._base = _without_dollars(twin["desired"])

    def start(self, **options: Any) -> None:
        """The app as most are: a handler, a connection, the twin."""
        self.open(**options)
        self.player("connect", DEVICE, within=SOON)
        self.retrieve()
        self.await_known(SOON)

    def patches(self, device: str = DEVICE) -> list[Document]:
        with self._lock:
            events = [one for one in self.events if one["event"] == "desired" and one["client"] == device]
        return [_without_dollars(one["patch"]) for one in events]

    def known(self) -> Document:
        """The desired properties as the app knows them: what it retrieved, and every patch since."""
        document = self._base
        for patch in self.patches():
            document = merged(document, patch)
        return document

    def numbers(self) -> list[Any]:
        return [patch["n"] for patch in self.patches() if "n" in patch]

    # ------------------------------------------------------------------ waiting

    def until(self, condition: Callable[[], Any], within: float) -> float | None:
        """Seconds until it was true; None: it was not, in time."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > within:
                return None
            with self._changed:
                self._changed.wait(0.02)
        return time.monotonic() - began

    def await_known(self, within: float) -> float | None:
        return self.until(lambda: self.known() == self.device.desired, within)

    def await_event(self, kind: str, within: float) -> str | None:
        """The text of the first such event; None: there was none in time."""

        def texts() -> list[str]:
            with self._lock:
                return [one["text"] for one in self.events if one["event"] == kind]

        return None if self.until(texts, within) is None else texts()[0]


def _without_dollars(document: Document) -> Document:
    return {key: value for key, value in document.items() if not key.startswith("$")}


def _ended(done: "Future[Any]", within: float) -> str:
    """How an order ended: "answered", the error's kind, or that it waits."""
    try:
        done.result(within)
    except OrderFailed as error:
        return str(error).partition(":")[0]
    except Exception:  # noqa: BLE001  # of the future: no end in time
        return "waits for ever"
    return "answered"


# ---------------------------------------------------------------------- the situations


def stale(stage: Stage) -> str:
    stage.start()
    for n in range(1, 7):
        fault = {3: "notification_doubled", 4: "notification_stale"}.get(n)
        if fault is not None:
            stage.hub.fault(fault, times=1)
        stage.device.patch_desired({"n": n})
        stage.until(lambda n=n: n in stage.numbers(), SOON)  # type: ignore[misc]  # n is of this round
        if n == 5:
            stage.device.notify({"n": -1}, version=1)
    stage.until(lambda: False, 0.5)
    seen = [n for n in stage.numbers() if n != 0]
    return check(seen == [1, 2, 3, 4, 5, 6], "the handler saw " + " ".join(map(str, seen)))


def six_quick(stage: Stage) -> str:
    stage.start(behaviour={"takes": [0.02, 0, 0.015, 0, 0.01, 0]})
    right = 0
    for begin in range(1, 61, 6):
        wanted = list(range(begin, begin + 6))
        for n in wanted:
            stage.device.patch_desired({"n": n})
        stage.until(lambda wanted=wanted: len(set(stage.numbers()) & set(wanted)) == 6, SOON)  # type: ignore[misc]  # as above
        right += [n for n in stage.numbers() if n in wanted] == wanted
    return check(right == 10, f"in order in {right} of 10 rounds")


def away(stage: Stage, change: Callable[[Device], Any], forget: bool = False) -> None:
    stage.hub.stop_listening()
    if forget:
        stage.hub.forget_sessions()
    change(stage.device)
    stage.hub.listen_again()


def catches_up(stage: Stage, change: Callable[[Device], Any]) -> str:
    stage.start()
    away(stage, change)
    taken = stage.await_known(COMES_BACK)
    if taken is None:
        back = "connected" if stage.device.connected else "not connected"
        raise Failed(f"{back}, the copy still wrong after {COMES_BACK:g} s")
    return f"after {taken:.1f} s"


def deleted(stage: Stage) -> str:
    return catches_up(stage, lambda device: device.patch_desired({"mode": {"heat": None}}))


def replaced(stage: Stage) -> str:
    return catches_up(stage, lambda device: device.replace_desired({"n": 7, "zone": {"id": 3}}))


def session_forgotten(stage: Stage) -> str:
    stage.start()
    away(stage, lambda device: None, forget=True)
    back = stage.until(lambda: stage.device.connected, COMES_BACK)
    if back is None:
        raise Failed("does not come back")
    # Long enough for whatever the client does after a CONNECT.
    stage.until(lambda: False, 2.0)
    stage.device.patch_desired({"n": 1})
    taken = stage.await_known(20.0)
    return check(taken is not None, "deaf" if taken is None else f"after {taken * 1000:.0f} ms")


def handler_only(stage: Stage) -> str:
    stage.open()
    stage.player("connect", DEVICE, within=SOON)
    if stage.await_known(SOON) is None:
        raise Failed(f"knows {json.dumps(stage.known())} after {SOON:g} s")
    stage.device.patch_desired({"n": 1})
    taken = stage.await_known(SOON)
    return check(taken is not None, "the document, then patches")


def lost_answers(stage: Stage) -> str:
    stage.start()
    seen = []
    for operation, order in (("retrieve", {}), ("report", {"patch": {"a": 1}})):
        stage.hub.fault("answer_lost", operation=operation, times=1)
        began = time.monotonic()
        end = _ended(stage.player.start(operation, DEVICE, **order), 60)
        seen.append(f"{operation} {end}" + ("" if "ever" in end else f" in {time.monotonic() - began:.0f} s"))
    return check(not any("ever" in one for one in seen), ", ".join(seen))


def throttled_report(stage: Stage) -> str:
    stage.start()
    fault = stage.hub.fault("answer_status", operation="report", status=429, times=3)
    done = stage.player.start("report", DEVICE, patch={"a": 1})
    taken = stage.until(lambda: stage.device.reported == {"a": 1}, 30)
    if taken is None:
        raise Failed(f"not in the hub after {fault.hits} tries; the call: {_ended(done, 0.1)}")
    return f"in the hub after {taken:.1f} s"


def throttled_retrieve(stage: Stage) -> str:
    fault = stage.hub.fault("answer_status", operation="retrieve", status=429, seconds=3)
    stage.open()
    began = time.monotonic()
    stage.player.start("connect", DEVICE).result(COMES_BACK)
    end = _ended(stage.player.start("retrieve", DEVICE), 30)
    seen = f"{fault.hits} retrieves, {end} after {time.monotonic() - began:.1f} s"
    return check(fault.hits <= 6 and end == "answered", seen)


def hub_away(stage: Stage) -> str:
    stage.start()
    stage.hub.stop_listening()
    wanted = {f"k{number}": number for number in range(6)}
    calls = []
    for key, value in wanted.items():
        calls.append(stage.player.start("report", DEVICE, patch={key: value}))
        stage.until(lambda: False, 1.0)
    stage.hub.listen_again()
    taken = stage.until(lambda: stage.device.reported == wanted, 60)
    if taken is None:
        ends = ", ".join(sorted({_ended(call, 0.1) for call in calls}))
        raise Failed(f"{len(stage.device.reported)} of 6 after 60 s; the calls: {ends}")
    return f"all 6, {taken:.1f} s after it is back"


def refused_retries(stage: Stage) -> str:
    devices = [stage.hub.create_device(f"fleet-{number}") for number in range(20)]
    for device in devices:
        stage.open(device)
        stage.player("connect", device.id)
    before = len(stage.player("count"))
    stage.hub.stop_listening()
    stage.until(lambda: len(stage.player("count")) >= before + 2 * len(devices), 30)
    dials = stage.player("count")[before:]
    stage.hub.listen_again()
    busiest = max((sum(at <= other < at + 0.1 for other in dials) for at in dials), default=0)
    back = stage.until(lambda: all(device.connected for device in devices), 60)
    seen = f"{busiest} in the busiest 0.1 s"
    if back is None:
        raise Failed(f"{seen}; {sum(device.connected for device in devices)} of 20 came back within 60 s")
    return check(busiest <= 15, f"{seen}; all back after {back:.1f} s")


INVALID: tuple[Document, ...] = (
    {"a.b": 1},
    {"a b": 1},
    {"a$b": 1},
    {"infinite": float("inf")},
    {"nan": float("nan")},
    {"large": 2**53},
    {"text": "x" * 4097},
    {"deep": {"1": {"2": {"3": {"4": {"5": {"6": {"7": {"8": {"9": {"10": {"11": 1}}}}}}}}}}}},
    {"much": {str(number): "x" * 4000 for number in range(10)}},
)


def invalid(stage: Stage) -> str:
    stage.start()
    refused = named = 0
    for patch in INVALID:
        try:
            stage.player("report", DEVICE, patch=patch, within=SOON)
        except OrderFailed as error:
            refused += 1
            named += next(iter(patch)) in str(error)
        except TimeoutError:
            pass
    unharmed = stage.device.reported == {}
    then = _ended(stage.player.start("report", DEVICE, patch={"good": 1}), SOON)
    seen = f"{refused} of {len(INVALID)} refused, {named} errors name the key"
    if not unharmed or then != "answered":
        raise Failed(f"{seen}; the hub holds {json.dumps(stage.device.reported)[:40]}; a good one: {then}")
    return check(refused == len(INVALID), seen)


def hanging_neighbour(stage: Stage) -> str:
    stage.start()
    neighbour = stage.hub.create_device("neighbour")
    fault = stage.hub.fault("hanging_tls", times=1)
    # azure-iot-device connects as soon as it is given a handler.
    opening = stage.open_soon(neighbour)
    stage.until(lambda: fault.hits or opening.done(), SOON)
    if not fault.hits:
        stage.player.start("connect", neighbour.id)
    if stage.until(lambda: fault.hits, SOON) is None:
        raise Failed("the neighbour did not dial")
    load = stage.player("load", DEVICE, seconds=12.0, within=90)
    seen = f"the slowest of {load['sent']} reports took {_time(load['slowest'])}"
    return check(load["slowest"] <= 1 and not load["errors"], seen)


def handler_raises(stage: Stage) -> str:
    stage.open(behaviour={"raises": 1})
    stage.player("connect", DEVICE, within=SOON)
    stage.retrieve()
    stage.device.patch_desired({"n": 1})
    told = stage.await_event("error", 5)
    how = "told to the error handler" if told else "logged"
    told = told or stage.await_event("log", 0)
    if told is None:
        how = "told nobody"
    elif "as it was told to" not in told:
        how += ", but not what"
    stage.device.patch_desired({"n": 2})
    heard = stage.until(lambda: 2 in stage.numbers(), 5) is not None
    return check(told is not None and heard, f"{how}; the next patch {'arrives' if heard else 'is lost'}")


def renewals(stage: Stage) -> str:
    # azure-iot-device renews 120 s before the end, ours after 80 % to 85 %: both every 5 s.
    lifetime = 125 if stage.subject.port_is_fixed else 6.2
    stage.start(token_lifetime=lifetime)
    load = stage.player.start("load", DEVICE, seconds=26.0)
    for n in range(1, 51):
        stage.device.patch_desired({"n": n})
        stage.until(lambda: False, 0.5)
    try:
        done = load.result(90)
    except FutureTimeout:
        renewed, stored = stage.device.connections - 1, stage.device.reported.get("load")
        raise Failed(f"{renewed} renewals; the report after the {stored}th waits for ever") from None
    renewed = stage.device.connections - 1
    right = stage.await_known(COMES_BACK) is not None
    stored = stage.device.reported.get("load") == done["sent"]
    errors = len(done["errors"])
    seen = f"{renewed} renewals, {done['sent']} reports, {errors} errors, slowest {_time(done['slowest'])}"
    if not right:
        raise Failed(seen + "; desired is not the hub's")
    return check(renewed >= 3 and not errors and stored, seen)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


@dataclass
class Situation:
    name: str
    passes: str
    play: Callable[[Stage], str]


SITUATIONS = (
    Situation("stale, doubled and ancient versions", "the handler sees each version once, in order", stale),
    Situation("six quick patches, a handler that takes 0 to 20 ms", "in order, 10 times of 10", six_quick),
    Situation("a key deleted while offline", "the app's copy is the hub's, within 45 s", deleted),
    Situation("everything replaced while offline", "the app's copy is the hub's, within 45 s", replaced),
    Situation("the hub forgot the session", "hears the next patch within 20 s", session_forgotten),
    Situation(
        "a handler, and no retrieve by the app", "knows its desired properties, then hears", handler_only
    ),
    Situation("the answer to a retrieve, to a report is lost", "both calls end within 60 s", lost_answers),
    Situation("429 on a report, three times", "it is in the hub within 30 s", throttled_report),
    Situation("429 on retrieve for 3 s", "6 retrieves at most, then the twin", throttled_retrieve),
    Situation("the hub is away for 6 s, a report each second", "all are in the hub within 60 s", hub_away),
    Situation("the hub refuses 20 clients' first retries", "at most 15 dial within 0.1 s", refused_retries),
    Situation("9 invalid reports", "all refused, nothing changed, the next one goes", invalid),
    Situation("a neighbour's TLS handshake hangs", "no report takes longer than 1 s", hanging_neighbour),
    Situation("a handler raises", "it is told or logged, the next patch is heard", handler_raises),
    Situation("the token is renewed every 5 s under load", "no report fails, nothing is lost", renewals),
)


# ---------------------------------------------------------------------- the subjects


@dataclass
class Subject:
    """A client under test. command: its player's, for a hub's port."""

    name: str
    command: Callable[[int], tuple[str, ...]]
    port_is_fixed: bool = False


OURS = (
    Subject("twin-device, threads", lambda _port: ours("threads")),
    Subject("twin-device, asyncio", lambda _port: ours("coroutines")),
)


def install_azure(folder: Path) -> Subject | None:
    """Microsoft's client in an environment of its own; None where it does not install."""
    venv.create(folder, with_pip=True)
    interpreter = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, f"azure-iot-device=={AZURE}"], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"azure-iot-device does not install here: {done.stderr.strip().splitlines()[-1]}")
        return None
    return Subject(
        f"azure-iot-device {AZURE}",
        lambda port: (interpreter, "-m", "tests.players.azure", str(port)),
        port_is_fixed=True,
    )


@dataclass
class Verdict:
    passed: bool
    seen: str


@dataclass
class Card:
    situations: tuple[Situation, ...]
    subjects: tuple[Subject, ...]
    verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def score(self, subject: Subject) -> int:
        return sum(self.verdicts[one.name, subject.name].passed for one in self.situations)

    def table(self) -> str:
        """Markdown, for README."""
        lines = ["| | passes if | " + " | ".join(one.name for one in self.subjects) + " |"]
        lines.append("|---|---|" + "---|" * len(self.subjects))
        for situation in self.situations:
            cells = [self.verdicts[situation.name, subject.name] for subject in self.subjects]
            told = [f"{'yes' if one.passed else '**no**'}, {one.seen}" for one in cells]
            lines.append(f"| {situation.name} | {situation.passes} | " + " | ".join(told) + " |")
        scores = [f"{self.score(one)} of {len(self.situations)}" for one in self.subjects]
        return "\n".join([*lines, "| **passed** | | " + " | ".join(scores) + " |"])


def play_all(
    situations: tuple[Situation, ...],
    subjects: tuple[Subject, ...],
    at_once: int,
    say: Callable[[str], None] = print,
) -> Card:
    card = Card(situations, subjects)
    with tempfile.TemporaryDirectory(prefix="twin-device-scorecard-") as folder:
        certificates = Path(folder)
        # Made before two hubs would make them at once.
        with LocalHub(certificates=certificates):
            pass

        def one(situation: Situation, subject: Subject) -> None:
            stage = Stage(subject, certificates)
            try:
                verdict = Verdict(True, situation.play(stage))
            except Failed as failed:
                verdict = Verdict(False, str(failed))
            except Exception as error:  # noqa: BLE001  # a client that does not even start has failed
                verdict = Verdict(False, f"{type(error).__name__}: {error}".partition("\n")[0])
            finally:
                stage.close()
            card.verdicts[situation.name, subject.name] = verdict
            say(f"{subject.name}: {situation.name}: {'yes' if verdict.passed else 'NO'}: {verdict.seen}")

        with ThreadPoolExecutor(at_once) as pool:
            plays = [pool.submit(one, situation, subject) for subject in subjects for situation in situations]
            for done in plays:
                done.result()
    return card


def main() -> int:
    parser = argparse.ArgumentParser(prog="make scorecard", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="situations whose names contain this text")
    parser.add_argument("--without-azure", action="store_true")
    parser.add_argument("--at-once", type=int, default=3, help="how many plays at the same time (default: 3)")
    chosen = parser.parse_args()
    situations = tuple(one for one in SITUATIONS if chosen.only is None or chosen.only in one.name)
    if not situations:
        parser.error(f"no situation is called {chosen.only!r}")
    with tempfile.TemporaryDirectory(prefix="twin-device-azure-") as folder:
        azure = None if chosen.without_azure else install_azure(Path(folder))
        subjects = (azure, *OURS) if azure is not None else OURS
        card = play_all(situations, subjects, chosen.at_once)
    print(f"\n{card.table()}")
    return 0 if all(card.score(one) == len(situations) for one in OURS) else 1


if __name__ == "__main__":
    sys.exit(main())
