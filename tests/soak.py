"""`make soak MINUTES=10`: 200 clients in one process under mixed load, and nothing of it may grow.

A hub in a process of its own patches and replaces desired properties and cuts connections; the apps report,
with and without waiting, and retrieve; tokens run out and are replaced. Nine clients in ten are of asyncio
and share one loop, the others have threads; handlers are quick, slow, or raise. What the process holds is
measured all the while. It is promised:

    memory, threads, descriptors   do not grow: the line of least squares through what was measured after the
                                   first quarter rises by no more than its limit. Memory is what the process
                                   takes, and what of it is in use: a small leak hides in the heap for long,
                                   in what the first handshakes, all at once, have left free
    synchronised, desired          in the end every client is, and holds what the hub holds
    reported                       the hub holds what each app has reported, and every report has ended
    handler                        the patches lead, one by one, to the document that came with each
    errors                         none but those that the handlers raise

The table comes last; exit status 1: a promise was broken.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import operator
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile import resident
from tests.merge_patch import merged
from twin_device import ConnectRefused, TwinClient, TwinError, aio
from twin_device.hub import LocalHub

Document = dict[str, Any]

_SETTLE = 90.0  # seconds that everything may take to come to rest
_WARM_UP = 0.25  # of the run
# By how much the lines may rise from the first quarter's end to the run's: memory by this share and this
# many bytes, since an interpreter's heap breathes; the others by less than one.
_SHARE, _BYTES = 0.02, 1 << 20
_IN_USE = 1 << 20  # bytes


# ---------------------------------------------------------------------- the hub's process


def serve(clients: int, seed: int, patches: float, cuts: float) -> None:
    """The hub and its back end. A line on stdin ends the load; then the twins are told."""
    chance = random.Random(seed)
    with LocalHub() as hub:
        devices = [hub.create_device(f"soak-{number}", desired={"n": 0}) for number in range(clients)]
        print(
            json.dumps({"ca": str(hub.ca_file), "texts": [one.connection_string for one in devices]}),
            flush=True,
        )
        ended = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
        counts = {"patches": 0, "replacements": 0, "cuts": 0}
        while not ended.wait(chance.expovariate(patches + cuts)):
            device = chance.choice(devices)
            if chance.random() < cuts / (patches + cuts):
                counts["cuts"] += device.connected
                device.disconnect()
            elif chance.random() < 0.05:
                device.replace_desired({f"k{chance.randrange(9)}": {"n": chance.randrange(99)}})
                counts["replacements"] += 1
            else:
                value = chance.choice([None, chance.randrange(1000), {"n": chance.randrange(99)}, "x" * 300])
                device.patch_desired({f"k{chance.randrange(9)}": value})
                counts["patches"] += 1
        twins = {one.id: {"desired": one.desired, "reported": one.reported} for one in devices}
        print(json.dumps({**counts, "twins": twins}), flush=True)
        # Reports may still be on their way: the twins are told again for each line.
        for _ in sys.stdin:
            twins = {one.id: {"desired": one.desired, "reported": one.reported} for one in devices}
            print(json.dumps({"twins": twins}), flush=True)


# ---------------------------------------------------------------------- the clients' process


@dataclass
class App:
    """One client, and what its app knows."""

    name: str
    client: Any
    target: Document = field(default_factory=dict)
    seen: Document = field(default_factory=dict)
    reports: list[Any] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    calls: int = 0

    def changed(self, patch: Document, desired: Document) -> None:
        self.calls += 1
        self.seen = merged(self.seen, patch)
        if self.seen != desired:
            self.wrong.append(f"the patches lead to {self.seen}, not to {desired}")

    def failed(self, error: Exception) -> None:
        # Who is cut three times in a row asks whether somebody else has its identity.
        cut = isinstance(error, ConnectRefused) and error.can_retry
        if not cut and not isinstance(error, ZeroDivisionError):
            self.wrong.append(f"an error: {error!r}")

    def next_report(self, chance: random.Random) -> Document:
        value = chance.choice([None, chance.randrange(1000), {"n": chance.randrange(99)}, "y" * 200])
        patch = {f"r{chance.randrange(5)}": value}
        self.target = merged(self.target, patch)
        return patch

    def keep(self, report: Any) -> None:
        self.reports = [*(one for one in self.reports if not one.done), report]


def raising(_patch: Document, _desired: Document) -> None:
    raise ZeroDivisionError


async def slow(_patch: Document, _desired: Document) -> None:
    await asyncio.sleep(0.2)


async def drive(app: App, chance: random.Random, pause: float, ended: asyncio.Event) -> None:
    """What one asyncio app does all the time."""
    while not ended.is_set():
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(ended.wait(), chance.uniform(0, 2 * pause))
        kind = chance.random()
        try:
            if kind < 0.6:
                await app.client.report(app.next_report(chance))
            elif kind < 0.95:
                app.keep(app.client.report(app.next_report(chance), wait=False))
            else:
                await app.client.retrieve()
        except TwinError as error:
            app.wrong.append(f"a call failed: {error!r}")


def drive_all(apps: list[App], chance: random.Random, pause: float, ended: threading.Event) -> None:
    """What the apps with threads do all the time, in turn: one that waits must not hold up the others."""
    while not ended.wait(chance.uniform(0, 2 * pause / len(apps))):
        app = chance.choice(apps)
        app.keep(app.client.report(app.next_report(chance), wait=False))


@dataclass(frozen=True)
class Sample:
    seconds: float
    memory: int
    threads: int
    descriptors: int
    in_use: int = 0


class _Malloc(ctypes.Structure):
    """glibc's struct mallinfo2; uordblks: in use of the heaps, hblkhd: of large blocks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def in_use() -> int:
    """Bytes that malloc has given out and not taken back; 0 before glibc 2.33.

    They are all only as `make soak` starts it: Python's own allocator is left out, and so are the blocks that
    a thread keeps after they were freed, up to 240 KB, which would count as given out.
    """
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo.restype = _Malloc
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def sample(started: float) -> Sample:
    # What waits for the collector is no growth.
    gc.collect()
    return Sample(
        time.monotonic() - started,
        resident(),
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        in_use(),
    )


def rise(samples: Sequence[Sample], name: str) -> tuple[float, float]:
    """The least-squares line after the warm-up: by how much it rises, and that as a slope per hour."""
    first = samples[-1].seconds * _WARM_UP
    points = [(one.seconds, float(getattr(one, name))) for one in samples if one.seconds >= first]
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0
    return slope * (points[-1][0] - points[0][0]), slope * 3600


def plot(samples: Sequence[Sample], title: str) -> str:
    """An SVG of the three lines, one above the other, each from zero."""
    width, height, left, top = 640, 130, 90, 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + left + 20}" '
        f'height="{3 * (height + 40) + top}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{title}</text>',
    ]
    end = samples[-1].seconds or 1.0
    rows = (("memory", "MB", 1 << 20), ("threads", "threads", 1), ("descriptors", "descriptors", 1))
    for row, (name, unit, scale) in enumerate(rows):
        base = top + row * (height + 40) + height
        values = [getattr(one, name) / scale for one in samples]
        most = max(*values, 1) * 1.1
        line = " ".join(
            f"{left + one.seconds / end * width:.1f},{base - value / most * height:.1f}"
            for one, value in zip(samples, values, strict=True)
        )
        parts += [
            f'<path d="M{left} {base - height}V{base}H{left + width}" fill="none" stroke="#888"/>',
            f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>',
            f'<text x="{left - 6}" y="{base - height + 10}" text-anchor="end">{most:.0f} {unit}</text>',
            f'<text x="{left + width}" y="{base + 16}" text-anchor="end">{end / 60:.1f} min</text>',
            f'<polyline points="{line}" fill="none" stroke="#0a58ca" stroke-width="1.5"/>',
        ]
    return "\n".join([*parts, "</svg>", ""])


class Soak:
    """One run. seconds: of the load. renewal: the lifetime of tokens, in seconds; pause: between two calls of
    one app, on average."""

    def __init__(self, seconds: float, clients: int, seed: int, renewal: float, pause: float) -> None:
        self.seconds = seconds
        self.samples: list[Sample] = []
        self.counts: dict[str, int] = {}
        self.broken: list[str] = []
        self._clients = clients
        self._seed = seed
        self._renewal = renewal
        self._pause = pause
        self.apps: list[App] = []
        self._hub: Any = None

    def run(self) -> None:
        # As many desired changes as reports would be more than any back end writes.
        patches, cuts = self._clients / 10, max(0.5, self._clients / 200)
        command = [sys.executable, "-m", "tests.soak", "--hub", str(self._clients), str(self._seed)]
        with subprocess.Popen(
            [*command, str(patches), str(cuts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as self._hub:
            try:
                asyncio.run(self._play(json.loads(self._hub.stdout.readline())))
            finally:
                self._hub.stdin.close()
                try:
                    self._hub.wait(20)
                except subprocess.TimeoutExpired:
                    self._hub.kill()
        self._judge()

    async def _play(self, hub: Document) -> None:
        chance = random.Random(self._seed)
        options = {"ca_file": hub["ca"], "token_lifetime": self._renewal, "timeout": 60}
        for number, text in enumerate(hub["texts"]):
            kind: Any = TwinClient if number % 10 == 9 else aio.TwinClient
            app = App(f"soak-{number}", kind.from_connection_string(text, **options))
            app.client.on_desired(app.changed)
            app.client.on_error(app.failed)
            if number % 10 in (1, 2):
                app.client.on_desired(slow if number % 10 == 1 else raising)
            self.apps.append(app)
        threaded = [app for app in self.apps if isinstance(app.client, TwinClient)]
        looped = [app for app in self.apps if not isinstance(app.client, TwinClient)]
        for app in threaded:
            app.client.connect(wait=False)
        for app in looped:
            await app.client.connect(wait=False)
        await self._until(lambda: self._behind("synchronised"), "the clients to connect")
        ended, all_ended = asyncio.Event(), threading.Event()
        drivers = [asyncio.ensure_future(drive(app, chance, self._pause, ended)) for app in looped]
        thread = threading.Thread(target=drive_all, args=(threaded, chance, self._pause, all_ended))
        if threaded:
            thread.start()
        await self._measure()
        ended.set()
        all_ended.set()
        if threaded:
            thread.join()
        await asyncio.gather(*drivers)
        twins = await self._ask()
        self.counts = {name: twins[name] for name in ("patches", "replacements", "cuts")}
        deadline = time.monotonic() + _SETTLE
        while (wrong := list(self._differences(twins["twins"]))) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            twins = await self._ask()
        self.broken += wrong
        for app in looped:
            await app.client.close()
        for app in threaded:
            await asyncio.to_thread(app.client.close)

    async def _measure(self) -> None:
        started = time.monotonic()
        every = min(5.0, self.seconds / 60)
        shown = 0.0
        while True:
            self.samples.append(sample(started))
            now = self.samples[-1]
            if now.seconds >= self.seconds:
                return
            if now.seconds - shown >= 60:
                shown = now.seconds
                print(
                    f"{now.seconds / 60:.0f} min: {now.memory / 2**20:.1f} MB, {now.threads} threads, "
                    f"{now.descriptors} descriptors, {self._total('connects')} connects",
                    flush=True,
                )
            await asyncio.sleep(min(every, max(0.01, self.seconds - now.seconds)))

    async def _ask(self) -> Document:
        def ask() -> Document:
            self._hub.stdin.write("\n")
            self._hub.stdin.flush()
            found: Document = json.loads(self._hub.stdout.readline())
            return found

        return await asyncio.to_thread(ask)

    async def _until(self, behind: Any, what: str) -> None:
        deadline = time.monotonic() + _SETTLE
        while behind():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {_SETTLE:g} s for {what}")
            await asyncio.sleep(0.1)

    def _behind(self, state: str) -> int:
        return sum(app.client.state != state for app in self.apps)

    def _total(self, name: str) -> int:
        return sum(app.client.statistics[name] for app in self.apps)

    def _differences(self, twins: dict[str, Document]) -> Iterator[str]:
        for app in self.apps:
            twin = twins[app.name]
            if app.client.state != "synchronised":
                yield f"{app.name} is {app.client.state}"
            for what, ours, theirs in (
                ("holds as desired", app.client.desired, twin["desired"]),
                ("was given", app.seen, twin["desired"]),
                ("has reported", app.target, twin["reported"]),
                ("knows as reported", app.client.reported, twin["reported"]),
            ):
                if ours != theirs:
                    yield f"{app.name} {what} {ours}, and the hub holds {theirs}"
            if any(not report.done for report in app.reports):
                yield f"{app.name} has reports that have not ended"

    def _judge(self) -> None:
        for app in self.apps:
            self.broken += [f"{app.name}: {text}" for text in app.wrong]
        for name, (grown, limit) in self.growth().items():
            if grown >= limit:
                self.broken.append(f"{name.replace('_', ' ')} grew by {grown:.1f}, the limit is {limit:.1f}")

    def growth(self) -> dict[str, tuple[float, float]]:
        """By how much each has grown, and its limit."""
        memory = max(one.memory for one in self.samples) * _SHARE + _BYTES
        return {
            "memory": (rise(self.samples, "memory")[0], memory),
            "in_use": (rise(self.samples, "in_use")[0], _IN_USE),
            "threads": (rise(self.samples, "threads")[0], 1.0),
            "descriptors": (rise(self.samples, "descriptors")[0], 1.0 + self._clients / 100),
        }

    def table(self) -> str:
        first = next(one for one in self.samples if one.seconds >= self.samples[-1].seconds * _WARM_UP)
        last = self.samples[-1]
        rows = [
            "| | after warm-up | at the end | most | slope an hour | rise | limit |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, unit, scale in (
            ("memory", " MB", float(1 << 20)),
            ("in_use", " MB", float(1 << 20)),
            ("threads", "", 1.0),
            ("descriptors", "", 1.0),
        ):
            grown, limit = self.growth()[name]
            most = max(self.samples, key=operator.attrgetter(name))
            found = [f"{getattr(one, name) / scale:.1f}{unit}" for one in (first, last, most)]
            lines = [f"{value / scale:+.2f}{unit}" for value in (rise(self.samples, name)[1], grown, limit)]
            rows.append(f"| {name.replace('_', ' ')} | " + " | ".join(found + lines) + " |")
        connects = self._total("connects")
        renewals = connects - len(self.apps) - self.counts.get("cuts", 0)
        rows += [
            "",
            f"{len(self.apps)} clients for {last.seconds / 60:.1f} min: "
            f"{sum(app.calls for app in self.apps):,} desired changes handled, "
            f"{self._total('reports'):,} reports sent, "
            f"{self._total('retrieves'):,} retrieves, {connects:,} connects, of them "
            f"{self.counts.get('cuts', 0):,} after a cut and about {max(0, renewals):,} to replace a token",
        ]
        return "\n".join(rows)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--hub"]:
        serve(int(arguments[1]), int(arguments[2]), float(arguments[3]), float(arguments[4]))
        return 0
    parser = argparse.ArgumentParser(
        prog="soak", description="Many clients for a long time: nothing may grow."
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--renewal", type=float, default=60.0, help="seconds that a token lives")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two calls of one app")
    parser.add_argument("--plot", type=Path, default=Path("soak.svg"), help="where the plot goes")
    options = parser.parse_args(arguments)
    soak = Soak(options.minutes * 60, options.clients, options.seed, options.renewal, options.pause)
    soak.run()
    options.plot.write_text(plot(soak.samples, f"{options.clients} clients, {options.minutes:g} minutes"))
    for text in soak.broken[:20]:
        print(f"broken: {text}")
    print(soak.table())
    print(f"{len(soak.broken)} promises broken; plot: {options.plot}")
    return 1 if soak.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
