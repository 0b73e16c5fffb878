"""`make fuzz MINUTES=1`: so long for each target, and a table at the end.

    python -m tests.fuzz.run --minutes 5 --target stream --seed 7
    python -m tests.fuzz.run --target stream --replay fuzz-crashers/stream-1a2b3c4d

Functions are fuzzed with atheris, which is guided by the lines that an input reaches, where it is installed
(extra [fuzz]); else, and over sockets, with the mutations of targets.mutated, which see no coverage: there
the same seed gives the same inputs. Each target has a process of its own. Exit status 1: an input has broken
a promise, crashed, made memory grow without bound or held a wait without end. It is saved and named.
"""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fuzz import wire

_SLOW = 10.0  # seconds for one input of a function
_MAX_MEMORY = 512 << 20  # bytes of a process

NAMES = (
    "topics",
    "connection strings",
    "patches",
    "messages",
    "stream",
    "store files",
    "board packets",
    *(f"wire, {shell}" for shell in wire.SHELLS),
)


def mutate(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """Our own mutations, until something breaks. Gives executions, peak (bytes) and broken."""
    from tests.fuzz.targets import TARGETS, mutated
    from tests.hostile import resident

    target = TARGETS[name]
    ends = time.monotonic() + seconds
    before, peak, number = resident(), 0, 0
    broken: list[tuple[str, bytes]] = []
    for data in target.seeds:
        target.run(data)
    while not broken and time.monotonic() < ends:
        data = mutated(target, random.Random(f"{seed}:{number}"))
        number += 1
        started = time.monotonic()
        try:
            target.run(data)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the finding
            broken.append((f"{type(error).__name__}: {error}", data))
        if time.monotonic() - started > _SLOW:
            broken.append((f"it takes {time.monotonic() - started:.1f} s", data))
        if number % 1000 == 0:
            peak = max(peak, resident() - before)
            if peak > _MAX_MEMORY:
                broken.append((f"memory grew by {peak >> 20} MB", data))
    return {"engine": "mutations", "executions": number, "peak": peak, "broken": broken}


def guided(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """atheris, in a process that it ends itself."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        limits = [
            f"-max_total_time={max(1, int(seconds))}",
            f"-seed={seed}",
            f"-timeout={_SLOW:.0f}",
            f"-rss_limit_mb={_MAX_MEMORY >> 20}",
            "-max_len=4096",
            "-print_final_stats=1",
            f"-artifact_prefix={folder}/",
        ]
        command = [sys.executable, "-m", "tests.fuzz.guided", name, *limits]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds + 120, check=False
        )
        found = list(Path(folder).iterdir())
        text = done.stdout + done.stderr
        broken = [(_reason(text), path.read_bytes()) for path in found]
        if done.returncode and not broken:
            broken = [(_reason(text), b"")]
    numbers = {word: int(count) for word, count in re.findall(r"stat::(\w+):\s+(\d+)", text)}
    edges = int(([0, *re.findall(r"cov: (\d+)", text)])[-1])
    if not edges and not broken:
        broken = [("no edge was seen: what it runs is not instrumented", b"")]
    return {
        "engine": f"atheris, {edges} edges",
        "executions": numbers.get("number_of_executed_units", 0),
        "peak": numbers.get("peak_rss_mb", 0) << 20,
        "broken": broken,
    }


def _reason(text: str) -> str:
    lines = [line for line in text.splitlines() if "Error" in line or "Broken" in line or "ERROR" in line]
    return lines[0].strip()[:300] if lines else text[-300:]


def has_atheris() -> bool:
    found = subprocess.run([sys.executable, "-c", "import atheris"], capture_output=True, check=False)
    return found.returncode == 0


def fuzz(name: str, seconds: float, seed: int, with_atheris: bool) -> dict[str, Any]:
    if name.startswith("wire, "):
        found = wire.fuzz(name.removeprefix("wire, "), wire.drawn(seed), seconds)
        return {"engine": "mutations, sockets", **found}
    return guided(name, seconds, seed) if with_atheris else mutate(name, seconds, seed)


def replay(name: str, data: bytes) -> dict[str, Any]:
    if name.startswith("wire, "):
        found = wire.fuzz(name.removeprefix("wire, "), wire.given(data), 0)
        return {"engine": "replayed", **found}
    from tests.fuzz.targets import TARGETS

    TARGETS[name].run(data)
    return {"engine": "replayed", "executions": 1, "peak": 0, "broken": []}


def alone(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """One target in a process of its own, so that it may die, hang or eat memory."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--child", "--target", name]
    command += ["--minutes", str(seconds / 60), "--seed", str(seed)]
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 180, check=False)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        result["broken"] = [(why, bytes.fromhex(data)) for why, data in result["broken"]]
    except subprocess.TimeoutExpired:
        result = {"engine": "", "executions": 0, "peak": 0, "broken": [("it has not ended", b"")]}
    except (IndexError, ValueError):
        why = f"the process died with {done.returncode}: {done.stderr[-300:]}"
        result = {"engine": "", "executions": 0, "peak": 0, "broken": [(why, b"")]}
    return {**result, "seconds": time.monotonic() - started}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz", description="Random and mutated input for all that reads any."
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target")
    parser.add_argument("--target", choices=NAMES, action="append", help="this one only; may be repeated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, help="a saved input, for the target")
    parser.add_argument("--crashers", type=Path, default=Path("fuzz-crashers"), help="where inputs are saved")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.replay:
        result = replay(options.target[0], options.replay.read_bytes())
        print("\n".join(why for why, _ in result["broken"]) or "it breaks nothing")
        return 1 if result["broken"] else 0
    if options.child:
        result = fuzz(options.target[0], options.minutes * 60, options.seed, has_atheris())
        result["broken"] = [(why, data.hex()) for why, data in result["broken"]]
        print(json.dumps(result))
        return 0
    rows, failed = [], 0
    for name in options.target or NAMES:
        print(f"{name} ...", flush=True)
        result = alone(name, options.minutes * 60, options.seed)
        rows.append(
            f"| {name} | {result['engine']} | {result['executions']:,} "
            f"| {result['executions'] / max(result['seconds'], 0.001):,.0f} | {result['peak'] / 2**20:.0f} "
            f"| {len(result['broken'])} |"
        )
        for why, data in result["broken"]:
            failed += 1
            options.crashers.mkdir(exist_ok=True)
            label = f"{name.replace(', ', '-').replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:8]}"
            (options.crashers / label).write_bytes(data)
            print(f"broken: {why}\n  input: {os.fspath(options.crashers / label)} (seed {options.seed})")
    print("| target | engine | inputs | a second | peak memory, MB | broken |\n|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"{failed} inputs broke a promise")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
