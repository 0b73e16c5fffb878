"""How much one hub process holds: `make bench-hub`, or `python -m tests.benchmarks.hub --help`.

The hub, the load and, for comparison, a general broker with a client that keeps the twins are processes of
their own on one machine, over loopback. The load checks every answer; one that is lost or wrong ends the run
with exit status 1.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]  # as said

ROOT = Path(__file__).parents[2]
KEY = base64.b64encode(b"a benchmark's key of 32 bytes....").decode()
# Seconds: for a process to be ready, and for orders that take no time of their own.
_READY_WITHIN = 30.0
_ORDER_WITHIN = 60.0
_SOME = 200  # devices: so many that the load is no burst, and no more

Figures = dict[str, Any]


class Failed(Exception):
    """The run has failed; the text says why."""


# ---------------------------------------------------------------------- processes


class Worker:
    """A process that does as it is told, line by line."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name
        self.pid = process.pid

    async def __call__(self, do: str, *, takes: float = 0.0, **order: Any) -> Figures:
        """takes: seconds that the order takes of its own."""
        assert self._process.stdin is not None
        within = takes + _ORDER_WITHIN
        self._process.stdin.write(json.dumps({"do": do, "within": within, **order}).encode() + b"\n")
        answer = await _line(self._process, within + 10, f"{self._name}: {do}")
        if "error" in answer:
            raise Failed(f"{self._name}: {do}: {answer['error']}")
        return answer


async def _line(process: asyncio.subprocess.Process, within: float, what: str) -> Figures:
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), within)
    except asyncio.TimeoutError:
        raise Failed(f"{what}: nothing came within {within:g} s") from None
    if not line:
        raise Failed(f"{what}: the process ended with {await process.wait()}")
    found: Figures = json.loads(line)
    return found


@asynccontextmanager
async def process(
    *command: str,
    stdin: int | None = None,
    stderr: int | None = None,
    environment: dict[str, str] | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that ends with its context."""
    one = await asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        cwd=ROOT,
        limit=2**24,
        env=environment,
    )
    try:
        yield one
    finally:
        with contextlib.suppress(ProcessLookupError):
            one.terminate()
        try:
            await asyncio.wait_for(one.wait(), 10)
        except asyncio.TimeoutError:
            one.kill()
            await one.wait()


@asynccontextmanager
async def worker(module: str) -> AsyncIterator[Worker]:
    command = sys.executable, "-m", f"tests.benchmarks.{module}"
    async with process(*command, stdin=asyncio.subprocess.PIPE) as one:
        yield Worker(one, module)


def resident(*pids: int) -> float | None:
    """MiB that the processes have in memory together; None where /proc does not tell."""
    total = 0.0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text("ascii")
        except OSError:
            return None
        total += int(status.partition("VmRSS:")[2].split()[0]) / 1024
    return total


def cpu_seconds(*pids: int) -> float | None:
    """Seconds of a processor that the processes have used; None where /proc does not tell."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
        except OSError:
            return None
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def raise_file_limit(devices: int) -> tuple[int | None, str | None]:
    """The limit of open files, as high as it may be, and what to say if that is too low."""
    if resource is None:
        return None, None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS calls it unlimited and takes less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = devices + 100
    if soft != resource.RLIM_INFINITY and soft < need:
        return soft, f"{devices} devices need {need} open files a process; the limit is {soft} (ulimit -Hn)"
    return soft, None


# ---------------------------------------------------------------------- who answers


class Answerer:
    """Who answers the devices. patch: has all their desired properties changed; when that began."""

    def __init__(
        self,
        pids: tuple[int, ...],
        ports: dict[str, int],
        ca: str,
        key: str | None,
        patch: Callable[[], Any],
        rest: "Rest | None" = None,
    ) -> None:
        self.pids, self.ports, self.ca, self.key, self.patch = pids, ports, ca, key, patch
        # The hub's back end; a general broker has none.
        self.rest = rest


class Rest:
    """The hub's back end."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ORDER_WITHIN)
        expiry = int(time.time()) + 3600
        digest = hmac.digest(base64.b64decode(key), f"localhost\n{expiry}".encode(), hashlib.sha256)
        signature = quote(base64.b64encode(digest), safe="")
        self._token = f"SharedAccessSignature sr=localhost&sig={signature}&se={expiry}&skn=iothubowner"

    def ask(self, method: str, path: str, body: Any = None, *, version: bool = True) -> Any:
        """version: False for what only the local hub has, which wants no api-version."""
        headers = {"Authorization": self._token, "Content-Type": "application/json"}
        payload = None if body is None else json.dumps(body).encode()
        path += "?api-version=2021-04-12" if version else ""
        try:
            self._connection.request(method, path, payload, headers)
            response = self._connection.getresponse()
        except ConnectionError:
            # The hub has ended it meanwhile, for nothing was asked for a while. The next request dials anew.
            self._connection.close()
            self._connection.request(method, path, payload, headers)
            response = self._connection.getresponse()
        text = response.read()
        if response.status not in (200, 204):
            raise Failed(f"{method} {path} was answered with {response.status} {text[:200]!r}")
        return json.loads(text) if text else None

    def close(self) -> None:
        self._connection.close()


@asynccontextmanager
async def hub(devices: list[str], certificates: Path) -> AsyncIterator[Answerer]:
    """`twin-device hub run` with these devices."""
    command = [sys.executable, "-m", "twin_device.cli", "hub", "run", "--json", "--owner-key", KEY]
    for name in ("mqtts", "mqtt", "http"):
        command += [f"--{name}-port", "auto"]
    command += ["--https-port", "0", "--certificates", str(certificates)]
    async with process(*command) as one:
        ready = await _line(one, _READY_WITHIN, "the hub")
        rest = Rest(ready["http"], KEY)
        symmetric = {"symmetricKey": {"primaryKey": KEY, "secondaryKey": KEY}}
        for at in range(0, len(devices), 100):
            rest.ask(
                "POST",
                "/devices",
                [
                    {"id": name, "importMode": "create", "authentication": {"type": "sas", **symmetric}}
                    for name in devices[at : at + 100]
                ],
            )
        jobs = iter(range(1, 1000))

        def patch() -> float:
            began = time.time()
            update = {"etag": "*", "properties": {"desired": {"telemetryInterval": 15}}}
            job = {"type": "scheduleUpdateTwin", "queryCondition": "*", "updateTwin": update}
            rest.ask("PUT", f"/jobs/v2/patch-{next(jobs)}", job)
            return began

        async def patched() -> float:
            # In a thread: what it waits for must not hold up the rest.
            return await asyncio.to_thread(patch)

        ports = {"plaintext": ready["mqtt"], "TLS": ready["mqtts"]}
        try:
            yield Answerer((one.pid,), ports, ready["ca"], KEY, patched, rest)
        finally:
            rest.close()


_MOSQUITTO = """\
persistence false
allow_anonymous true
set_tcp_nodelay true
max_queued_messages 0
max_inflight_messages 0
log_dest none
user root
listener {plaintext} 127.0.0.1
listener {TLS} 127.0.0.1
certfile {folder}/server.pem
keyfile {folder}/server.pem
"""


def mosquitto() -> str | None:
    """Where the broker is. Distributions put it where only root looks."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
    return shutil.which("mosquitto", path=path)


@asynccontextmanager
async def broker(command: str, devices: list[str], certificates: Path) -> AsyncIterator[Answerer]:
    """mosquitto, and a client that answers for it."""
    ports = dict(zip(("plaintext", "TLS"), _free_ports(2), strict=True))
    configuration = certificates / "mosquitto.conf"
    configuration.write_text(_MOSQUITTO.format(**ports, folder=certificates), "utf-8")
    # It warns of root, on whose account it reads the certificates, and has no more to say.
    quiet = asyncio.subprocess.DEVNULL
    async with (
        process(command, "-c", str(configuration), stderr=quiet) as one,
        worker("responder") as responder,
    ):
        await _reachable(ports["plaintext"])
        await responder("start", port=ports["plaintext"], devices=devices)

        async def patched() -> float:
            began: float = (await responder("patch", patch={"telemetryInterval": 15}))["at"]
            return began

        ca = str(certificates / "ca.pem")
        yield Answerer((one.pid, responder.pid), ports, ca, None, patched)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


async def _reachable(port: int) -> None:
    deadline = time.monotonic() + _READY_WITHIN
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if time.monotonic() > deadline:
                raise Failed(f"the broker does not listen on port {port}") from None
            await asyncio.sleep(0.05)
            continue
        writer.close()
        await writer.wait_closed()
        return


# ---------------------------------------------------------------------- what is measured


async def measure(
    start: Callable[[], Any], security: str, devices: list[str], seconds: float, rate: float
) -> Figures:
    """One column of the table, with processes of its own."""
    async with AsyncExitStack() as stack:
        answerer: Answerer = await stack.enter_async_context(start())
        load = await stack.enter_async_context(worker("fleet"))
        figures: Figures = {"resident_idle_mib": resident(*answerer.pids)}
        connected = await load(
            "connect",
            takes=_ORDER_WITHIN,
            port=answerer.ports[security],
            ca=answerer.ca if security == "TLS" else None,
            devices=devices,
            key=answerer.key,
            of_hub=answerer.key is not None,
        )
        figures["connected"] = connected["connected"]
        figures["connect_seconds"] = connected["seconds"]
        figures["answered"] = (await load("begin"))["answered"]
        figures["resident_connected_mib"] = resident(*answerer.pids)

        async def loaded(name: str, do: str, **order: Any) -> None:
            before = cpu_seconds(*answerer.pids)
            found = await load(do, takes=seconds, seconds=seconds, **order)
            after = cpu_seconds(*answerer.pids)
            used = None if before is None or after is None else after - before
            found["cpu_us_a_report"] = None if used is None else 1e6 * used / found["requests"]
            found["answerer_cpu"] = None if used is None else used / found["seconds"]
            found["load_cpu"] = found.pop("load_cpu_seconds") / found["seconds"]
            figures[name] = found

        await loaded("all_qos0", "report", devices=len(devices), qos=0)
        await loaded("all_qos1", "report", devices=len(devices), qos=1)
        await loaded("some_qos0", "report", devices=_SOME, qos=0)
        await loaded("paced", "pace", rate=rate)
        await load("expect_desired")
        began = await answerer.patch()
        figures["desired_seconds"] = (await load("desired"))["at"] - began
        figures["resident_loaded_mib"] = resident(*answerer.pids)
        await load("close")
        idle, full = figures["resident_idle_mib"], figures["resident_connected_mib"]
        known = idle is not None and full is not None
        figures["kib_a_device"] = 1024 * (full - idle) / len(devices) if known else None
        return figures


async def run(options: argparse.Namespace) -> Figures:
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    limit, too_low = raise_file_limit(options.devices)
    if too_low:
        raise Failed(too_low)
    devices = [f"device-{number:05}" for number in range(options.devices)]
    command = None if options.no_broker else mosquitto()
    columns: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="twin-device-bench-") as folder:
        certificates = Path(folder)
        starts: list[tuple[str, Callable[[], Any]]] = [("hub", lambda: hub(devices, certificates))]
        if command is not None:
            # It finds the certificates that the hub has made.
            starts.append(("mosquitto", lambda: broker(command, devices, certificates)))
        for security in ("plaintext", "TLS"):
            for name, start in starts:
                column = await measure(start, security, devices, options.seconds, options.rate)
                columns[f"{name} {security}"] = column
    return {
        "devices": options.devices,
        "seconds": options.seconds,
        "rate": options.rate,
        "some": min(_SOME, options.devices),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        # Processes that ran or waited to run, in the minute before: figures of a busy machine say little.
        "load_before": busy,
        "open_files": limit,
        "broker": command and "mosquitto",
        "columns": columns,
    }


# ---------------------------------------------------------------------- how it is shown


def _rows(found: Figures) -> list[tuple[str, Callable[[Figures], list[Any]], str]]:
    """A row's name, its figures, and how they are printed."""

    def of(*path: str) -> Callable[[Figures], list[Any]]:
        """The figures of these names in a load, or in the column itself."""
        return lambda column: [column[name] for name in path]

    def grown(column: Figures) -> list[Any]:
        before, after = column["resident_connected_mib"], column["resident_loaded_mib"]
        return [None if before is None or after is None else after - before]

    rows: list[tuple[str, Callable[[Figures], list[Any]], str]] = [
        ("connected, each answered once", of("answered"), "{:,.0f}"),
        ("  all connected after, s", of("connect_seconds"), "{:.1f}"),
        ("memory before, MiB", of("resident_idle_mib"), "{:.0f}"),
        ("  a connected device, KiB", of("kib_a_device"), "{:.0f}"),
        ("  growth by all loads, MiB", grown, "{:+.0f}"),
    ]

    def in_load(load: str, *names: str) -> Callable[[Figures], list[Any]]:
        return lambda column: [column[load][name] for name in names]

    loads = [
        ("all_qos0", f"reports/s, {found['devices']:,} at once"),
        ("all_qos1", f"reports/s at QoS 1, {found['devices']:,} at once"),
        ("some_qos0", f"reports/s, {found['some']} of them at once"),
    ]
    processors: list[tuple[str, tuple[str, ...], str]] = [
        ("  processor a report, µs", ("cpu_us_a_report",), "{:.0f}"),
        ("  processors, answering / load", ("answerer_cpu", "load_cpu"), "{:.0%} / {:.0%}"),
    ]
    for load, title in loads:
        rows.append((title, in_load(load, "per_second"), "{:,.0f}"))
        rows.append(("  p50 / p99, ms", in_load(load, "p50_ms", "p99_ms"), "{:.0f} / {:.0f}"))
        rows += [(name, in_load(load, *names), form) for name, names, form in processors]
    rows.append((f"at {found['rate']:,.0f} reports/s", in_load("paced", "per_second"), "{:,.0f}"))
    rows.append(("  p50 / p99, ms", in_load("paced", "p50_ms", "p99_ms"), "{:.2f} / {:.2f}"))
    rows += [(name, in_load("paced", *names), form) for name, names, form in processors]
    rows.append(("desired patch until the last is told, s", of("desired_seconds"), "{:.2f}"))
    return rows


def table(found: Figures) -> str:
    names = list(found["columns"])
    if found["broker"] is None:
        beside = ["Without a general broker beside it: mosquitto is not here, or was not wanted."]
    else:
        beside = [
            "mosquitto: a general broker, and a Python client beside it that keeps dicts and versions. No",
            "tokens, no limits or checks of patches, no metadata, no log of packets, no back end; its memory",
            "and processors are those of both. The hub does all of that. Neither writes to a disk here.",
        ]
    lines = [
        f"{found['devices']:,} devices, {found['seconds']:g} s a load, Python {found['python']}, "
        f"{found['processors']} processors shared by all processes, over loopback. Load average before: "
        + ("?" if found["load_before"] is None else f"{found['load_before']:.1f}."),
        "",
        " " * 40 + "".join(f"{name:>21}" for name in names),
    ]
    for title, figure, form in _rows(found):
        cells = []
        for name in names:
            values = figure(found["columns"][name])
            cells.append("?" if None in values else form.format(*values))
        lines.append(f"{title:<40}" + "".join(f"{cell:>21}" for cell in cells))
    lines += [
        "",
        "A report patches two numbers of a document of 319 bytes, at QoS 0 if nothing else is said; it",
        "counts when 204, its $rid and the next $version came back. At once: each device reports again as",
        "soon as it is answered. The hub is one thread: 100% of a processor is all that it can use.",
        *beside,
    ]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-hub", description="Measure how much one hub process holds.")
    parser.add_argument("--devices", type=int, metavar="N", help="how many (default 2000, --short: 50)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of a load (default 5, --short: 0.1)")
    parser.add_argument(
        "--rate", type=float, metavar="N", help="reports a second of the modest load (default 1000)"
    )
    parser.add_argument(
        "--short", action="store_true", help="small enough for a test; its figures say nothing"
    )
    parser.add_argument("--no-broker", action="store_true", help="the hub alone")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    usual = {"devices": 50, "seconds": 0.1, "rate": 500.0} if options.short else {}
    for name, value in {"devices": 2000, "seconds": 5.0, "rate": 1000.0, **usual}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
        if getattr(options, name) <= 0:
            parser.error(f"--{name} is a number above 0")
    return options


def main() -> int:
    options = _options()
    try:
        found = asyncio.run(run(options))
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
