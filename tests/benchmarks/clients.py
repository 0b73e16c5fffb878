"""The device clients side by side: `make bench`, or `python -m tests.benchmarks.clients --help`.

twin_device's client for threads and the one for asyncio, azure-iot-device and bare paho-mqtt do the same
work against one local hub, over TLS. Each contestant is installed in an environment of its own, and runs in
processes of its own. What is compared takes turns, so that a machine that is busy for a while is busy for
all of them; a ratio is the median of the ratios of the rounds. At the end every bar is checked, a line each;
the exit status is 1 if one falls short. Linux only: what a process costs is read from /proc.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.bars import bars, quantile
from tests.benchmarks.hub import KEY, ROOT, Answerer, Failed, Worker, hub, process, raise_file_limit, resident
from tests.benchmarks.proxy import proxy, silence

Figures = dict[str, Any]

HERE = Path(__file__).parent / "contestants"
# Who takes part, and whose environment it runs in.
THREADS, LOOP, PEER, PAHO, PAHO_LOOP = (
    "twin_device",
    "twin_device.aio",
    "azure-iot-device",
    "paho",
    "paho, one loop",
)
PROGRAMS = {
    THREADS: ("ours", "threads.py"),
    LOOP: ("ours", "loop.py"),
    PEER: ("azure", "peer.py"),
    PAHO: ("paho", "paho_threads.py"),
    PAHO_LOOP: ("paho", "paho_loop.py"),
}
SINGLE = (THREADS, LOOP, PEER, PAHO)
FLEETS = (THREADS, LOOP, PEER, PAHO_LOOP)
LARGE = (LOOP, PAHO_LOOP)

_STRING = f"HostName=localhost;DeviceId=one;SharedAccessKey={KEY}"
_OURS = "c = TwinClient.from_connection_string(" + repr(_STRING) + ")"
# What is imported, by whose interpreter.
IMPORTS = {
    "the bare interpreter": ("ours", "pass"),
    "import twin_device": ("ours", "import twin_device"),
    LOOP: ("ours", f"from twin_device.aio import TwinClient; {_OURS}"),
    THREADS: ("ours", f"from twin_device import TwinClient; {_OURS}"),
    PAHO: ("paho", "import paho.mqtt.client as m; c = m.Client(m.CallbackAPIVersion.VERSION2, 'one')"),
    PEER: (
        "azure",
        "from azure.iot.device import IoTHubDeviceClient as C; "
        f"c = C.create_from_connection_string({_STRING!r})",
    ),
}
# The clients' threads need not be ended; and the memory is looked at before anything is.
_LEAVE = "; import os; os._exit(0)"
_TELL = "; print(open('/proc/self/status').read().partition('VmRSS:')[2].split()[0], flush=True)"


class Options(argparse.Namespace):
    """How much of everything; the defaults are what the bars are checked with."""

    rounds: int
    turns: int
    imports: int
    reports: int
    patches: int
    sizes: list[int]
    large: int
    idle: float
    delay: float
    short: bool


# ---------------------------------------------------------------------- environments


def install(folder: Path) -> dict[str, Path]:
    """An environment for each contestant, made anew or brought up to date; gives their interpreters."""
    needs = {"ours": ["paho-mqtt>=2,<3"], "azure": ["azure-iot-device"], "paho": ["paho-mqtt>=2,<3"]}
    interpreters = {}
    for name, packages in needs.items():
        place = folder / name
        interpreter = place / ("Scripts" if os.name == "nt" else "bin") / "python"
        if not interpreter.exists():
            venv.create(place, with_pip=True, clear=True)
        _pip(interpreter, "--upgrade", *packages)
        interpreters[name] = interpreter
    with tempfile.TemporaryDirectory(prefix="twin-device-bench-") as copy:
        # Where a build finds nothing of an earlier one, and leaves nothing behind.
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, copy)
        shutil.copytree(ROOT / "twin_device", Path(copy) / "twin_device")
        _pip(interpreters["ours"], "--force-reinstall", "--no-deps", copy)
    return interpreters


def _pip(interpreter: Path, *arguments: str) -> None:
    command = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip says nothing"]
        raise Failed(f"{arguments[-1]} does not install: {lines[-1]}")


_LIST = """\
import importlib.metadata, json, os
found = {}
for one in importlib.metadata.distributions():
    files = {str(f.locate()) for f in one.files or ()}
    found[one.metadata["Name"]] = (one.version, sum(os.path.getsize(f) for f in files if os.path.isfile(f)))
print(json.dumps(found))
"""


def installed(interpreters: dict[str, Path]) -> Figures:
    """What each environment has beside pip and setuptools: packages with versions, and KiB."""
    found = {}
    for name, interpreter in interpreters.items():
        done = subprocess.run([interpreter, "-I", "-c", _LIST], capture_output=True, text=True, check=True)
        packages = {n: one for n, one in json.loads(done.stdout).items() if n not in ("pip", "setuptools")}
        found[name] = {
            "packages": {name: version for name, (version, _) in sorted(packages.items())},
            "kib": sum(size for _, size in packages.values()) / 1024,
        }
    return found


# ---------------------------------------------------------------------- import


def measure_imports(interpreters: dict[str, Path], rounds: int) -> Figures:
    """Seconds of a process that imports something, and makes a client; KiB that it has in memory then."""
    here = {name: one for name, one in IMPORTS.items() if one[0] in interpreters}
    found: Figures = {name: {"seconds": [], "cpu": []} for name in here}
    turns = list(here.items())
    for number in range(rounds + 1):
        # As everywhere: whoever came first comes last next time.
        turns.reverse()
        for name, (whose, code) in turns:
            interpreter = interpreters[whose]
            began = time.perf_counter()
            command = [str(interpreter), "-I", "-c", code + _LEAVE]
            pid = os.posix_spawn(interpreter, command, os.environ)
            _, status, used = os.wait4(pid, 0)
            seconds = time.perf_counter() - began
            if status:
                raise Failed(f"{code!r} ended with {status}")
            if number:
                found[name]["seconds"].append(seconds)
                found[name]["cpu"].append(used.ru_utime + used.ru_stime)
    for name, (whose, code) in here.items():
        command = [str(interpreters[whose]), "-I", "-c", code + _TELL + _LEAVE]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name]["resident_kib"] = int(done.stdout)
    return found


# ---------------------------------------------------------------------- contestants


class Arena:
    """The hub, and who runs against it."""

    def __init__(self, answerer: Answerer, interpreters: dict[str, Path], trusted: Path) -> None:
        self._interpreters = interpreters
        # The default trust store, with the hub's CA in it.
        self._environment = {**os.environ, "SSL_CERT_FILE": str(trusted)}
        self.port = answerer.ports["TLS"]
        assert answerer.rest is not None
        self.ask = answerer.rest.ask
        self.names = [name for name in PROGRAMS if PROGRAMS[name][0] in interpreters]

    @asynccontextmanager
    async def start(self, name: str) -> AsyncIterator[Worker]:
        whose, program = PROGRAMS[name]
        command = str(self._interpreters[whose]), str(HERE / program)
        pipe = asyncio.subprocess.PIPE
        async with process(*command, stdin=pipe, environment=self._environment) as one:
            yield Worker(one, name)

    @asynccontextmanager
    async def start_all(self, names: tuple[str, ...]) -> AsyncIterator[dict[str, Worker]]:
        async with AsyncExitStack() as stack:
            yield {
                name: await stack.enter_async_context(self.start(name))
                for name in names
                if name in self.names
            }

    def string(self, device: str, port: int | None = None) -> str:
        return f"HostName=localhost:{port or self.port};DeviceId={device};SharedAccessKey={KEY}"

    def strings(self, first: int, end: int) -> list[str]:
        return [self.string(f"device-{number:05}") for number in range(first, end)]


async def measure_first_twin(arena: Arena, options: Options) -> Figures:
    """Connect, subscribe and retrieve, through a link with 100 ms there and back."""
    found: Figures = {}
    async with arena.start_all(SINGLE) as workers, proxy(arena.port, options.delay / 2) as link:
        for number in range(options.rounds):
            for place, (name, worker) in enumerate(workers.items()):
                device = f"first-{place}-{number}"
                connected = await worker("connect", string=arena.string(device, link.port))
                figures = found.setdefault(name, {"seconds": []})
                figures["seconds"].append(connected["seconds"])
                figures["round_trips"] = link.round_trips
                packets = arena.ask("GET", f"/local/packets?deviceId={device}", version=False)
                figures["packets"] = len(packets)
                await worker("close")
    return found


async def measure_single(arena: Arena, options: Options) -> Figures:
    """Reports one by one and fifty at once, and desired patches; by turns."""
    found: Figures = {}
    async with arena.start_all(SINGLE) as workers:
        for place, (name, worker) in enumerate(workers.items()):
            found[name] = {kind: [] for kind in ("one_by_one", "at_once", "patches", "report_cpu")}
            found[name] |= {"latencies": [], "desired_cpu": []}
            await worker("connect", string=arena.string(f"single-{place}"))
            # Nobody is measured cold.
            await worker("one_by_one", count=options.reports, base=0)
        base = options.reports
        turns = list(workers.items())
        for _ in range(options.turns):
            # Whoever came first comes last next time.
            turns.reverse()
            for name, worker in turns:
                done = await worker("one_by_one", count=options.reports, base=base)
                found[name]["one_by_one"].append(options.reports / done["seconds"])
                found[name]["report_cpu"].append(10_000 * done["cpu"] / options.reports)
            base += options.reports
            for name, worker in turns:
                done = await worker("at_once", count=50, base=base)
                found[name]["at_once"].append(50 / done["seconds"])
                found[name]["patches"].append(done["patches"])
            base += 50
        number = 0
        for _ in range(options.rounds):
            for place, (name, worker) in enumerate(workers.items()):
                await worker("listen")
                called = {}
                for _ in range(options.patches):
                    number += 1
                    called[number] = time.monotonic()
                    patch = {"properties": {"desired": {"n": number}}}
                    await asyncio.to_thread(arena.ask, "PATCH", f"/twins/single-{place}", patch)
                done = await worker("desired", count=options.patches)
                found[name]["latencies"] += [at - called[number] for number, at in done["times"]]
                found[name]["desired_cpu"].append(10_000 * done["cpu"] / options.patches)
        for worker in workers.values():
            await worker("close")
    return found


def _of_process(pid: int) -> tuple[int, int]:
    """Its threads, and how often one of them was given or left the processor."""
    switches = threads = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        threads += 1
        for line in (task / "status").read_text("ascii").splitlines():
            if "ctxt_switches" in line:
                switches += int(line.split()[1])
    return threads, switches


async def _at_rest(worker: Worker, idle: float) -> Figures:
    """What so many clients cost while nothing happens."""
    await asyncio.sleep(min(1.0, idle))
    _, before = _of_process(worker.pid)
    await asyncio.sleep(idle)
    threads, after = _of_process(worker.pid)
    memory = resident(worker.pid)
    assert memory is not None
    return {"threads": threads, "wakeups": (after - before) / idle, "resident_kib": 1024 * memory}


async def measure_fleets(arena: Arena, options: Options) -> Figures:
    """A process that grows, one contestant at a time; then all of its connections are cut."""
    found: Figures = {}
    for name in FLEETS:
        if name not in arena.names:
            continue
        async with arena.start(name) as worker:
            figures: Figures = {"sizes": {}}
            size = 0
            for more in options.sizes:
                await worker("fleet", takes=120, strings=arena.strings(size, more))
                size = more
                figures["sizes"][str(size)] = await _at_rest(worker, options.idle)
            cut = time.monotonic()
            for number in range(size):
                arena.ask("DELETE", f"/local/connections/device-{number:05}", version=False)
            back = await worker("synchronised", takes=120, connects=2)
            figures["reconnect_seconds"] = back["at"] - cut
            found[name] = figures
            await worker("end")
    return found


async def measure_large(arena: Arena, options: Options) -> Figures:
    """A thousand in one process, and what it costs them if a neighbour hangs."""
    found: Figures = {}
    for name in LARGE:
        if name not in arena.names:
            continue
        async with arena.start(name) as worker:
            await worker("fleet", strings=arena.strings(0, 1))
            alone = await _at_rest(worker, 0.2)
            up = await worker("fleet", takes=120, strings=arena.strings(1, options.large))
            figures = await _at_rest(worker, options.idle)
            grown = figures["resident_kib"] - alone["resident_kib"]
            figures |= {
                "clients": options.large,
                "seconds": up["seconds"],
                "connected": _connected(arena, options.large),
                "kib_each": grown / (options.large - 1),
            }
            if name == LOOP:
                figures |= await _beside_one_that_hangs(arena, worker, options, 2 * options.rounds)
            found[name] = figures
            await worker("end")
    if PEER in arena.names:
        async with arena.start(PEER) as worker:
            await worker("fleet", strings=arena.strings(0, 1))
            # Once: it takes its time.
            found[PEER] = await _beside_one_that_hangs(arena, worker, options, 1)
            await worker("end")
    return found


def _connected(arena: Arena, size: int) -> int:
    """How many of these the hub has answered a retrieve of, and holds a connection to."""
    devices = arena.ask("GET", "/local/devices", version=False)
    return sum(
        one["connected"] for one in devices if one["id"] < f"device-{size:05}" and "device-" in one["id"]
    )


async def _beside_one_that_hangs(arena: Arena, worker: Worker, options: Options, rounds: int) -> Figures:
    """Seconds of reports, without and with a neighbour in a TLS handshake that hangs."""
    found: dict[str, list[list[float]]] = {"without": [], "with": []}
    count = options.reports
    await worker("latencies", count=count)
    with silence() as port:
        for number in range(rounds):
            found["without"].append((await worker("latencies", count=count))["latencies"])
            await worker("hang", string=arena.string(f"hangs-{number}", port))
            found["with"].append((await worker("latencies", takes=60, count=count))["latencies"])
            await worker("hang_up", takes=60)
    return {"hang": found}


# ---------------------------------------------------------------------- a run


def _trusted(ca: str, folder: Path) -> Path:
    """The machine's default trust store as one file, and the hub's CA at its end."""
    default = ssl.get_default_verify_paths().cafile
    if default is None:
        import pip._vendor.certifi

        default = pip._vendor.certifi.where()
    both = folder / "trusted.pem"
    both.write_text(Path(default).read_text("utf-8") + Path(ca).read_text("utf-8"), "utf-8")
    return both


async def run(options: Options, interpreters: dict[str, Path]) -> Figures:
    limit, too_low = raise_file_limit(options.large)
    if too_low:
        raise Failed(too_low)
    busy = os.getloadavg()[0]
    began = time.monotonic()
    devices = [f"device-{number:05}" for number in range(options.large)]
    devices += [f"hangs-{number}" for number in range(2 * options.rounds)]
    devices += [f"single-{place}" for place in range(len(SINGLE))]
    devices += [f"first-{place}-{number}" for place in range(len(SINGLE)) for number in range(options.rounds)]
    found: Figures = {
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "processors": os.cpu_count(),
        # Processes that ran or waited to run, in the minute before.
        "load_before": busy,
        "open_files": limit,
        "devices": options.large,
        "sizes": options.sizes,
        "installed": installed(interpreters),
        "import": measure_imports(interpreters, options.imports),
    }
    with tempfile.TemporaryDirectory(prefix="twin-device-bench-") as folder:
        async with hub(devices, Path(folder)) as answerer:
            trusted = _trusted(answerer.ca, Path(folder))
            arena = Arena(answerer, interpreters, trusted)
            steps: list[tuple[str, Callable[[Arena, Options], Any]]] = [
                ("first_twin", measure_first_twin),
                ("single", measure_single),
                ("fleets", measure_fleets),
                ("large", measure_large),
            ]
            for name, measure in steps:
                print(f"{name} …", file=sys.stderr, flush=True)
                found[name] = await measure(arena, options)
    found["seconds"] = time.monotonic() - began
    return found


# ---------------------------------------------------------------------- how it is shown


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _all(rounds: list[list[float]]) -> list[float]:
    return [value for values in rounds for value in values]


def _row(title: str, cells: list[str]) -> str:
    return f"{title:<44}" + "".join(f"{cell:>18}" for cell in cells)


def table(found: Figures) -> str:
    """Every figure, a column each contestant."""
    lines = [
        f"Python {found['python']}, {found['openssl']}, {found['processors']} processors, TLS over loopback; "
        f"{found['seconds']:.0f} s in all. Load average before: {found['load_before']:.1f}.",
    ]

    def section(names: tuple[str, ...] | list[str]) -> Callable[..., None]:
        lines.extend(["", _row("", list(names))])

        def row(title: str, figure: Callable[[str], Any], form: str = "{:,.0f}") -> None:
            cells = []
            for name in names:
                try:
                    value = figure(name)
                except KeyError:
                    value = None
                cells.append("-" if value is None else form.format(value))
            lines.append(_row(title, cells))

        return row

    imports = found["import"]
    row = section(list(imports))
    row("import, ms", lambda name: 1000 * _median(imports[name]["seconds"]), "{:.1f}")
    row("  of the processor, ms", lambda name: 1000 * _median(imports[name]["cpu"]), "{:.1f}")
    row("  memory after it, MiB", lambda name: imports[name]["resident_kib"] / 1024, "{:.1f}")

    row = section(SINGLE)
    whose = {name: found["installed"].get(PROGRAMS[name][0], {}) for name in PROGRAMS}
    row("installed, KiB", lambda name: whose[name]["kib"])
    row("  packages", lambda name: len(whose[name]["packages"]))
    first, single = found["first_twin"], found["single"]
    row("first twin 100 ms away, ms", lambda name: 1000 * _median(first[name]["seconds"]))
    row("  packets", lambda name: first[name]["packets"])
    row("  round trips", lambda name: first[name]["round_trips"])
    row("reports/s, one by one", lambda name: _median(single[name]["one_by_one"]))
    row("  processor, s in 10,000", lambda name: _median(single[name]["report_cpu"]), "{:.2f}")
    row("reports/s, 50 at once", lambda name: _median(single[name]["at_once"]))
    row("  patches sent", lambda name: max(single[name]["patches"]))
    for share in (0.5, 0.99):
        row(
            f"desired patch, call to handler, p{100 * share:g}, ms",
            lambda name, share=share: 1000 * quantile(single[name]["latencies"], share),
            "{:.2f}",
        )
    row("  processor, s in 10,000", lambda name: _median(single[name]["desired_cpu"]), "{:.2f}")

    fleets, large = found["fleets"], found["large"]
    row = section(FLEETS)
    for size in map(str, found["sizes"]):

        def of(figure: str, size: str = size) -> Callable[[str], Any]:
            return lambda name: fleets[name]["sizes"][size][figure]

        row(f"clients: {size}; memory, MiB", lambda name, of=of: of("resident_kib")(name) / 1024, "{:.1f}")
        row("  threads", of("threads"))
        row("  wake-ups a second, idle", of("wakeups"), "{:.1f}")
    row(f"all {size} back after a cut, s", lambda name: fleets[name]["reconnect_seconds"], "{:.1f}")
    size = f"{found['devices']:,}"
    row(f"clients: {size}; all synchronised after, s", lambda name: large[name]["seconds"], "{:.1f}")
    row("  memory, MiB", lambda name: large[name]["resident_kib"] / 1024, "{:.1f}")
    row("  each, KiB", lambda name: large[name]["kib_each"], "{:.1f}")
    row("  threads", lambda name: large[name]["threads"])
    row("  wake-ups a second, idle", lambda name: large[name]["wakeups"], "{:.1f}")
    for kind in ("without", "with"):
        row(
            f"report {kind} a neighbour that hangs, p50, ms",
            lambda name, kind=kind: 1000 * quantile(_all(large[name]["hang"][kind]), 0.5),
            "{:.2f}",
        )
        row(
            "  the longest, ms",
            lambda name, kind=kind: 1000 * max(_all(large[name]["hang"][kind])),
            "{:.2f}",
        )
    versions = found["installed"]["paho"]["packages"] | found["installed"].get("azure", {}).get(
        "packages", {}
    )
    return "\n".join(
        [
            *lines,
            "",
            "azure-iot-device "
            + versions.get("azure-iot-device", "is not here")
            + ", beside it paho-mqtt "
            + found["installed"]["paho"]["packages"]["paho-mqtt"]
            + " by hand: nothing is checked, compared or",
            "sent again. All trust the machine's default store, with the local hub's CA in it. Figures are",
            "medians of rounds in which the contestants take turns.",
        ]
    )


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="bench", description="Measure the device clients side by side.")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there as well")
    parser.add_argument(
        "--environments",
        metavar="DIR",
        type=Path,
        default=Path(sys.prefix) / "bench",
        help="where the contestants are installed (default: in this environment)",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="small enough for a test, with what is installed already and without azure-iot-device; "
        "only the bars that do not depend on time count",
    )
    options = parser.parse_args(namespace=Options())
    usual: Figures = {
        "rounds": 7,
        # Short turns, and many of them: another's burst of work hits few, or both of a ratio.
        "turns": 60,
        "imports": 41,
        "reports": 100,
        "patches": 100,
        "sizes": [1, 50, 200],
        "large": 1000,
        "idle": 5.0,
        "delay": 0.1,
    }
    if options.short:
        usual |= {
            "rounds": 1,
            "turns": 1,
            "imports": 1,
            "reports": 10,
            "patches": 5,
            "sizes": [1, 5],
            "large": 20,
        }
        usual |= {"idle": 0.1, "delay": 0.01}
    for name, value in usual.items():
        setattr(options, name, value)
    return options


def main() -> int:
    options = _options()
    try:
        if options.short:
            interpreters = dict.fromkeys(("ours", "paho"), Path(sys.executable))
        else:
            interpreters = install(options.environments)
        found = asyncio.run(run(options, interpreters))
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    judged = bars(found)
    found["bars"] = [
        {"name": bar.name, "value": bar.value, "least": bar.least, "bound": bar.bound, "holds": bar.holds}
        for bar in judged
    ]
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(table(found))
    print()
    for bar in judged:
        print(bar)
    return 0 if all(bar.holds for bar in judged if bar.counts or not options.short) else 1


if __name__ == "__main__":
    sys.exit(main())
