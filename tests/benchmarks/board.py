"""What the board's client costs: bytes of .mpy, and the least heap on a real MicroPython: `make board-budget`

Every figure is of the 64-bit interpreter for unix from PyPI, whose heap -X heapsize bounds. Its objects are
twice as large as a board's, so the budgets are twice those of a 32-bit board. TLS takes its memory outside of
that heap there: on a Pico W some 40 KB come on top, on an ESP32 they lie in the IDF's heap.
"""

import argparse
import itertools
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.board import der
from tests.twins import json_bytes, twin
from tests.vm import build, micropython
from twin_device import TwinClient
from twin_device.hub import Device, LocalHub

APP = Path(__file__).parent / "board_app.py"
PATCHES = 20
RECONNECTS = 3
MOST_MPY = 14 * 1024
PATIENCE = 3  # seconds without any progress: it hangs for want of memory


@dataclass(frozen=True)
class Case:
    """size: of the twin, KB. budget: KB of heap on the 64-bit interpreter, None: only measured."""

    name: str
    size: int
    budget: int | None = None
    tls: bool = False
    keep: str | None = None
    hand_on: bool = False


CASES = (
    Case("8 KB twin", 8, 80),
    Case("32 KB twin", 32, 160),
    Case("8 KB twin, TLS", 8, tls=True),
    Case("32 KB twin, TLS", 32, tls=True),
    Case("64 KB twin, TLS", 64, 298, tls=True),
    Case("32 KB twin, two properties kept", 32, keep="sensor000 round"),
    Case("32 KB twin, handed on, nothing kept", 32, keep="round", hand_on=True),
)


class Bench:
    """A local hub, and the twins of every size on it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        package = build(folder / "mpy") / "twin_device"
        self.sizes = {path.name: path.stat().st_size for path in package.iterdir()}
        self._hub = LocalHub(mqtt_port=0)
        self._numbers = itertools.count()

    def __enter__(self) -> "Bench":
        self._hub.start()
        self._ca = der(self._hub.ca_file, self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        self._hub.close()

    def _device(self, size: int) -> Device:
        wanted = twin(size)
        for section in wanted.values():
            del section["$version"]
        device = self._hub.create_device(f"board{next(self._numbers)}", desired=wanted["desired"])
        with TwinClient.from_connection_string(device.connection_string, ca_file=self._hub.ca_file) as client:
            client.report(wanted["reported"])
        return device

    def smallest(self, case: Case, most: int = 640) -> int | None:
        """KB of heap that are enough; None if `most` are not."""
        if not self.fits(case, most):
            return None
        least = 16
        while most - least > 1:
            middle = (least + most) // 2
            if self.fits(case, middle):
                most = middle
            else:
                least = middle
        return most

    def loaded(self) -> set[str]:
        """The files of the package that the interpreter opens in the story, over TLS and with room enough."""
        opened: set[str] = set()
        if not self.fits(Case("", 8, tls=True), 2000, opened):
            raise RuntimeError("the story does not hold")
        return opened

    def fits(self, case: Case, heap: int, opened: set[str] | None = None) -> bool:
        """Whether the story holds in so many KB: 20 patches, each answered by a report, and 3 reconnects.

        opened: is filled with the names of the package's files that the interpreter opens.
        """
        device = self._device(case.size)
        environment = {**os.environ, "MICROPYPATH": f"{self._folder / 'mpy'}:.frozen"}
        if opened is not None:
            environment.update(MICROPYPATH=".frozen", WATCH=str(self._folder / "mpy"))
        if case.tls:
            environment.update(DEVICE=device.connection_string, CA=self._ca)
        else:
            environment.update(DEVICE=device.plaintext_connection_string)
        if case.keep is not None:
            environment["KEEP"] = case.keep
        if case.hand_on:
            environment["HAND_ON"] = "1"
        command = [micropython(), "-X", f"heapsize={heap}K", str(APP)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            return _holds(process, device, set() if opened is None else opened)
        finally:
            process.kill()
            process.wait()
            device.delete()


def _holds(process: "subprocess.Popen[str]", device: Device, opened: set[str]) -> bool:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if line.startswith("opened "):
                    opened.add(line.strip().rpartition("/")[2])
                else:
                    lines.put(line.strip())
        lines.put("ended")

    threading.Thread(target=read, daemon=True).start()
    rounds = itertools.count(1)

    def until(wanted: str) -> bool:
        # A connection that is lost without our doing was lost for want of memory.
        while (line := lines.get(timeout=PATIENCE)) != wanted:
            if line in ("ended", "offline") or "memory" in line:
                return False
        return True

    def patch() -> bool:
        number = next(rounds)
        device.patch_desired({"round": number})
        return until(f"reported {number}")

    def reconnect() -> bool:
        device.disconnect()
        return until("offline") and until("synchronised") and patch()

    try:
        return (
            until("synchronised")
            and all(patch() for _ in range(PATCHES))
            and all(reconnect() for _ in range(RECONNECTS))
        )
    except queue.Empty:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only whether the budgets hold")
    quick = parser.parse_args().quick
    folder = Path(tempfile.mkdtemp(prefix="board-budget-"))
    short = []
    try:
        with Bench(folder) as bench:
            loaded = bench.loaded()
            needed = sum(bench.sizes[name] for name in loaded)
            print("| module | bytes of .mpy (-O3) |\n|---|---|")
            for name in sorted(loaded):
                print(f"| {name} | {bench.sizes[name]:,} |")
            print(f"| **what every app loads** | **{needed:,}** |")
            others = sorted(set(bench.sizes) - loaded)
            sizes = ", ".join(f"{name.removesuffix('.mpy')} {bench.sizes[name]:,}" for name in others)
            print(f"| loaded when needed: {sizes} | {sum(bench.sizes.values()) - needed:,} |\n")
            if needed > MOST_MPY:
                short.append(f".mpy that every app loads: {needed:,} bytes, the budget is {MOST_MPY:,}")
            print("| twin | bytes of JSON | smallest heap, KB | budget, KB |\n|---|---|---|---|")
            for case in CASES:
                if quick and case.budget is None:
                    continue
                if quick:
                    found = case.budget if bench.fits(case, case.budget or 0) else None
                else:
                    found = bench.smallest(case)
                print(
                    f"| {case.name} | {json_bytes(twin(case.size)):,} | {found} | {case.budget or ''} |",
                    flush=True,
                )
                if case.budget is not None and (found is None or found > case.budget):
                    short.append(f"{case.name}: {found} KB of heap, the budget is {case.budget} KB")
    finally:
        shutil.rmtree(folder)
    print()
    for line in short:
        print("short:", line)
    if not short:
        print("every budget holds")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
