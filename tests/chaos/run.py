"""`make chaos`: everything is broken that can be broken, and every client has to be right again.

A proxy breaks the links of all clients, the hub does all that it can do wrong, is killed and comes back with
sessions and without, from a plan that its seed gives. Meanwhile a back end patches, deletes, replaces and
creates anew, and the apps report. After each storm nothing is broken any more, the back end patches each twin
once (of a lost notification only the next one can tell) and each app reports once. Then it is promised of
every client, within the bound of its shell (shells.py):

    synchronised    it is
    desired         what it holds as desired is what the hub holds
    reported        what the hub holds as reported is what the app has reported, and the client knows it
    versions        no version of desired went backwards within a connection
    handler         the patches that the handler was given lead, one by one, to the document it was given with
                    them, and in the end to the hub's
    answers         every report has ended, and none was refused that the hub did not mean to refuse

Exit status 1: a promise was broken; it is named with the seed and the storm.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import plan
from tests.chaos.hub import KEY
from tests.chaos.plan import Action, Subject
from tests.chaos.proxy import Proxy
from tests.chaos.shells import SHELLS, Shell, available
from tests.merge_patch import merged
from tests.players.player import OrderFailed, Player

Document = dict[str, Any]

# Seconds. A request is given up after a third of the timeout.
_OPTIONS = {"timeout": 6, "keep_alive": 4}
# Of every other client of a shell: replaced every 10 s. The others' connections last, since a new one mends
# whatever a client has missed.
_TOKEN_LIFETIME = 12
_STORM = 10.0
# One that began before the storm's end ends by then.
_ENDS_WITHIN = 60.0


class Broken(Exception):
    """The run itself cannot go on."""


# ---------------------------------------------------------------------- one device


class Witness:
    """What is known about one device, and which promises were broken to it."""

    def __init__(self, subject: Subject, shell: str) -> None:
        self.subject = subject
        self.name = subject.name
        self.shell = shell
        self.broken: list[str] = []
        self.changes = 0
        self.answered = self.refused = 0
        self._replayed: Document = {}
        self._versions: dict[int, int] = {}
        self._reports: list[tuple[Document, Future[Any]]] = []
        self.target: Document = {}

    def told(self, event: Document) -> None:
        """An event of the client, in the player's thread."""
        if event["event"] == "said":
            self.broken.append(f"program: it says {event['text']!r}")
        if event["event"] != "desired":
            return
        self.changes += 1
        self._replayed = merged(self._replayed, event["patch"])
        if self._replayed != event["desired"]:
            self.broken.append(f"handler: {_json(event['patch'])} does not lead to {_json(event['desired'])}")
            self._replayed = event["desired"]
        version, connection = event["version"], event["connection"]
        if version is not None and connection is not None:
            if version < self._versions.get(connection, version):
                last = self._versions[connection]
                self.broken.append(f"versions: {version} after {last} in connection {connection}")
            self._versions[connection] = version

    def reports(self, patch: Document, done: "Future[Any]") -> None:
        self._reports.append((patch, done))

    def count_answers(self) -> str | None:
        """Take over what has ended, in order; which promise is not kept (yet)."""
        while self._reports:
            patch, done = self._reports[0]
            if not done.done():
                return f"answers: {_json(patch)} has no end"
            del self._reports[0]
            try:
                done.result()
            except OrderFailed as error:
                if not (self.subject.strict and str(error).startswith("ReportRejected")):
                    self.broken.append(f"answers: {_json(patch)} ended in {error}")
                    continue
                self.refused += 1
            else:
                self.answered += 1
                self.target = merged(self.target, patch)
        return None

    def wrong(self, hub: Document, client: Document) -> str | None:
        """The first promise that is not kept now; None if all are."""
        late = self.count_answers()
        if client["state"] != "synchronised":
            return f"synchronised: it is {client['state']}: {client['statistics'].get('last_error')}"
        for what, one, other in (
            ("desired: the client's is not the hub's", client["desired"], hub["desired"]),
            ("handler: its patches do not lead to the hub's", self._replayed, hub["desired"]),
            ("reported: the hub's is not the app's", hub["reported"], self.target),
            ("reported: the client's is not the hub's", client["reported"], hub["reported"]),
        ):
            if one != other and late is None:
                return f"{what}: {_json(one)} and {_json(other)}"
        return late


def _json(document: Any) -> str:
    return json.dumps(document, sort_keys=True)


# ---------------------------------------------------------------------- the hub


class HubProcess:
    """The hub, which may be killed; orders to one that is not there are lost, as on any network."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._player: Player | None = None
        self._ready: Future[Document] = Future()
        self.hits: Counter[str] = Counter()
        self.port, self.ca = 0, ""
        self.start()

    def start(self) -> None:
        ready = self._ready = Future()
        folders = str(self._folder / "data"), str(self._folder / "certificates")
        command = sys.executable, "-m", "tests.chaos.hub", *folders, str(self.port)
        player = Player(*command, on_event=lambda event: ready.set_result(event))
        try:
            found = ready.result(30)
        except FutureTimeout:
            player.close()
            raise Broken("the hub does not start") from None
        self.port, self.ca = found["port"], found["ca"]
        with self._lock:
            self._player = player

    def kill(self) -> None:
        with self._lock:
            player, self._player = self._player, None
        if player is not None:
            with contextlib.suppress(OrderFailed, OSError):
                self.hits.update(player("hits"))
            player.close()

    def __call__(self, do: str, **order: Any) -> Any:
        player = self._player
        if player is None:
            raise Broken(f"no hub to {do}")
        return player(do, **order)

    def tell(self, do: str, **order: Any) -> "Future[Any] | None":
        """Have it done, if the hub is there."""
        with self._lock, contextlib.suppress(OSError):
            return None if self._player is None else self._player.start(do, **order)
        return None

    def all_hits(self) -> "Counter[str]":
        return self.hits + Counter(self("hits"))


# ---------------------------------------------------------------------- the run


@dataclass
class Storm:
    """What one storm was, for the table."""

    number: int
    faults: int
    hits: int
    changes: int
    reports: int
    slowest: float
    connects: int
    broken: list[str] = field(default_factory=list)


class Run:
    def __init__(self, seed: int, clients: Sequence[tuple[str, Subject]], folder: Path) -> None:
        self.seed = seed
        self._witnesses = {subject.name: Witness(subject, shell) for shell, subject in clients}
        self._hub = HubProcess(folder)
        self._proxy = Proxy(self._hub.port)
        self._shells: dict[str, Shell] = {}
        self._world: list[threading.Thread] = []
        self._worldly: Counter[str] = Counter()
        # One at a time takes the hub away.
        self._taking = threading.Lock()
        self._before: Counter[str] = Counter()
        self._failures: list[str] = []

    def close(self) -> None:
        for shell in self._shells.values():
            shell.close()
        self._proxy.close()
        self._hub.kill()

    def _told(self, event: Document) -> None:
        witness = self._witnesses.get(event["client"])
        if witness is not None:
            witness.told(event)

    def connect(self) -> None:
        self._hub("create", devices=list(self._witnesses))
        opened = []
        for witness in self._witnesses.values():
            if witness.shell not in self._shells:
                self._shells[witness.shell] = SHELLS[witness.shell].make(self._told)
            port = self._proxy.listen(witness.name)
            text = f"HostName=localhost:{port};DeviceId={witness.name};SharedAccessKey={KEY}"
            shell = self._shells[witness.shell]
            options = {**_OPTIONS, **SHELLS[witness.shell].options}
            if witness.subject.renews:
                options["token_lifetime"] = _TOKEN_LIFETIME
            opened.append(shell.start("open", witness.name, text=text, ca=self._hub.ca, **options))
        for done in opened:
            done.result(60)
        starts = [
            self._shells[one.shell].start("connect", one.name, timeout=50) for one in self._witnesses.values()
        ]
        for done in starts:
            done.result(60)

    def storm(self, number: int, actions: Sequence[Action], seconds: float) -> Storm:
        began = time.monotonic()
        pause = threading.Event()
        for action in actions:
            pause.wait(max(0.0, began + action.at - time.monotonic()))
            self._do(action)
        pause.wait(max(0.0, began + seconds - time.monotonic()))
        for thread in self._world:
            thread.join()
        self._world = []
        if self._failures:
            raise Broken(f"the back end failed: {self._failures[0]}")
        hits = self._proxy.hits + self._hub.all_hits() + self._worldly
        self._calm(number)
        slowest, broken = self._await_right()
        found = Storm(
            number,
            sum(action.is_fault for action in actions),
            (hits - self._before).total(),
            sum(action.what == "desired" for action in actions),
            sum(action.what == "report" for action in actions),
            slowest,
            sum(look["statistics"]["connects"] for look in self._look().values()),
            broken,
        )
        self._before = hits
        return found

    # ------------------------------------------------------------------ breaking it

    def _do(self, action: Action) -> None:
        if action.what == "link":
            self._proxy.act(action.device or "", action.kind, **action.arguments)
        elif action.what == "hub":
            self._order("fault", kind=action.kind, device=action.device, **action.arguments)
        elif action.what == "world":
            thread = threading.Thread(target=self._shake, args=(action,))
            self._world.append(thread)
            thread.start()
        elif action.what == "desired":
            self._order(action.kind, device=action.device, **action.arguments)
        else:
            self._report(action.device or "", action.arguments["patch"])

    def _order(self, do: str, **order: Any) -> None:
        done = self._hub.tell(do, **order)
        if done is not None:
            done.add_done_callback(lambda done: self._check(do, done))

    def _check(self, do: str, done: "Future[Any]") -> None:
        error = done.exception()
        if error is not None and "the player has ended" not in str(error):
            self._failures.append(f"{do}: {error}")

    def _report(self, device: str, patch: Document) -> None:
        witness = self._witnesses[device]
        shell = self._shells[witness.shell]
        witness.reports(patch, shell.start("post", device, patch=patch, timeout=_ENDS_WITHIN * 3))

    def _shake(self, action: Action) -> None:
        pause = threading.Event()
        seconds = action.arguments["seconds"]
        self._worldly[action.kind] += 1
        if action.kind == "disabled":
            self._order("enable", device=action.device, enabled=False)
            pause.wait(seconds)
            self._order("enable", device=action.device, enabled=True)
            return
        with self._taking:
            if action.kind == "away":
                self._hub("away")
                pause.wait(seconds)
                self._hub("back")
                return
            self._hub.kill()
            pause.wait(seconds)
            try:
                self._hub.start()
                if action.kind == "killed, no sessions":
                    self._hub("back", forget=True)
            except Exception as error:  # noqa: BLE001  # a thread's error is told by the run
                self._failures.append(f"restart: {error}")

    # ------------------------------------------------------------------ being right again

    def _calm(self, number: int) -> None:
        self._proxy.heal()
        self._hub("clear")
        for name in self._witnesses:
            self._order("patch", device=name, patch={"calm": number})
            self._report(name, {"calm": number})

    def _look(self) -> dict[str, Document]:
        looks = [shell.start("look") for shell in self._shells.values()]
        return {name: look for done in looks for name, look in done.result(60).items()}

    def _await_right(self) -> tuple[float, list[str]]:
        """Seconds until everything was right, and what was not within its bound."""
        began = time.monotonic()
        slowest = 0.0
        waiting = dict(self._witnesses)
        wrong: dict[str, str] = {}
        broken = []
        pause = threading.Event()
        while waiting:
            clients, hub = self._look(), self._hub("look")
            taken = time.monotonic() - began
            for name, witness in list(waiting.items()):
                found = witness.wrong(hub[name], clients[name])
                if found is None:
                    slowest = max(slowest, taken)
                elif taken > SHELLS[witness.shell].bound:
                    broken.append(f"{name} ({witness.shell}): after {taken:.0f} s {found}")
                else:
                    wrong[name] = found
                    continue
                del waiting[name]
            pause.wait(0.1)
        for name, witness in self._witnesses.items():
            broken += [f"{name} ({witness.shell}): {one}" for one in witness.broken]
            witness.broken = []
        return slowest, broken

    def summary(self) -> Document:
        shells = sorted({witness.shell for witness in self._witnesses.values()})
        looks = self._look()
        statistics: Counter[str] = Counter()
        for look in looks.values():
            statistics.update(
                {key: value for key, value in look["statistics"].items() if key != "last_error"}
            )
        return {
            "shells": shells,
            "kinds": dict(sorted(self._before.items())),
            "answered": sum(witness.answered for witness in self._witnesses.values()),
            "refused": sum(witness.refused for witness in self._witnesses.values()),
            "changes": sum(witness.changes for witness in self._witnesses.values()),
            "statistics": dict(statistics),
        }


def subjects(count: int, shells: Sequence[str], boards: int) -> list[tuple[str, Subject]]:
    """So many clients, spread over the shells; a board is a process, so there are only so many."""
    found = []
    others = [name for name in shells if not SHELLS[name].is_board]
    for number in range(count):
        is_board = "board" in shells and (number < boards or not others)
        shell = "board" if is_board else others[number % len(others)]
        gentle, strict, renews = not SHELLS[shell].hurried, number % 5 == 4, number // 2 % 2 == 1
        found.append((shell, Subject(f"{shell}-{number}", gentle, strict, renews)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--storms", type=int, default=6)
    parser.add_argument("--faults", type=int, default=300, help="in each storm (default: 300)")
    parser.add_argument("--seconds", type=float, help="stop storming after so many; instead of --storms")
    parser.add_argument("--length", type=float, default=_STORM, help="of a storm, in seconds (default: 10)")
    parser.add_argument(
        "--shells", nargs="+", choices=list(SHELLS), default=None, help="default: all that are here"
    )
    parser.add_argument(
        "--boards", type=int, default=6, help="how many of the clients are boards (default: 6)"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    chosen = parser.parse_args(arguments)
    if min(chosen.clients, chosen.storms, chosen.faults) < 1:
        parser.error("at least one client, storm and fault")
    shells = chosen.shells or available()
    clients = subjects(chosen.clients, shells, chosen.boards)
    everybody = [subject for _, subject in clients]
    if chosen.plan:
        for number in range(1, chosen.storms + 1):
            for action in plan.storm(chosen.seed, number, everybody, chosen.faults, chosen.length):
                print(
                    number,
                    f"{action.at:.3f}",
                    action.what,
                    action.kind,
                    action.device,
                    _json(action.arguments),
                )
        return 0
    began = time.monotonic()
    storms: list[Storm] = []
    with tempfile.TemporaryDirectory(prefix="twin-device-chaos-") as folder:
        run = Run(chosen.seed, clients, Path(folder))
        try:
            run.connect()
            print(f"seed {chosen.seed}: {len(clients)} clients connected: {', '.join(shells)}", flush=True)
            while (
                len(storms) < chosen.storms
                if chosen.seconds is None
                else time.monotonic() - began < chosen.seconds
            ):
                number = len(storms) + 1
                actions = plan.storm(chosen.seed, number, everybody, chosen.faults, chosen.length)
                storm = run.storm(number, actions, chosen.length)
                storms.append(storm)
                for one in storm.broken:
                    print(f"BROKEN: seed {chosen.seed}, storm {number}: {one}", flush=True)
                print(
                    f"storm {number}: {storm.hits} faults, all right after {storm.slowest:.1f} s", flush=True
                )
            summary = run.summary()
        finally:
            run.close()
    return tell(chosen.seed, len(clients), storms, summary)


def tell(seed: int, clients: int, storms: Sequence[Storm], summary: Document) -> int:
    """The table, last; the exit status."""
    broken = sum(len(storm.broken) for storm in storms)
    print("\nfaults that took effect: " + ", ".join(f"{kind} {n}" for kind, n in summary["kinds"].items()))
    print("clients' counts: " + ", ".join(f"{name} {n}" for name, n in summary["statistics"].items()))
    print(f"\nseed {seed}, {clients} clients ({', '.join(summary['shells'])})\n")
    print("| storm | faults planned | took effect | desired changes | reports | right again after | broken |")
    print("|---|---|---|---|---|---|---|")
    for storm in storms:
        cells = (storm.number, storm.faults, storm.hits, storm.changes, storm.reports)
        print("| " + " | ".join(map(str, cells)) + f" | {storm.slowest:.1f} s | {len(storm.broken)} |")
    sums = [
        sum(getattr(storm, name) for storm in storms) for name in ("faults", "hits", "changes", "reports")
    ]
    slowest = max((storm.slowest for storm in storms), default=0.0)
    print("| **all** | " + " | ".join(map(str, sums)) + f" | {slowest:.1f} s | **{broken}** |")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
