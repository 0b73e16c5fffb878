"""The fuzzing's short form: each target a little, and that the long form names what it finds."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import run, wire
from tests.fuzz.targets import TARGETS, Broken, Target, mutated

FUNCTIONS = sorted(TARGETS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_seeds_break_nothing(name: str) -> None:
    for data in TARGETS[name].seeds:
        TARGETS[name].run(data)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mutated_bytes_break_nothing(name: str) -> None:
    @settings(deadline=None, max_examples=150, derandomize=True)
    @given(st.binary(max_size=100) | st.integers(0).map(lambda n: mutated(TARGETS[name], random.Random(n))))
    def examples(data: bytes) -> None:
        TARGETS[name].run(data)

    examples()


@pytest.mark.parametrize("shell", wire.SHELLS)
def test_the_shells_outlive_mutated_bytes_from_a_socket(shell: str) -> None:
    found = wire.fuzz(shell, wire.drawn(1), 0.5)
    assert found["broken"] == []
    assert found["executions"] >= 50


# What long runs have found, by its target.
FOUND: list[tuple[str, bytes]] = [
    # Damage in what is skipped is refused or not, by the cut: the promise was too strict.
    (
        "stream",
        b'C{"desire(":{"a":\x01\x00\x00\x00\x00\x00\x00\x05"b":[1,"x"],"$version":4},"reported":'
        b'{"a":null,"c"ud83d\\ude:2.5,"\xdc\x89\x9a\x92sigl":7}}',
    ),
]


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_is_mended(name: str, data: bytes) -> None:
    assert run.replay(name, data)["broken"] == []


def test_the_same_seed_gives_the_same_inputs() -> None:
    inputs = [[mutated(TARGETS["stream"], random.Random(f"7:{n}")) for n in range(20)] for _ in range(2)]
    assert inputs[0] == inputs[1]
    assert wire.drawn(7)(3) == wire.drawn(7)(3)


def test_a_broken_promise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(data: bytes) -> None:
        if b"$rid=$rid=" in data:
            raise Broken("a promise")

    seed = TARGETS["topics"]
    monkeypatch.setitem(TARGETS, "topics", Target(breaks, seed.seeds, seed.words))
    found = run.mutate("topics", 20, 1)
    assert [why for why, _ in found["broken"]] == ["Broken: a promise"]
    with pytest.raises(Broken):
        run.replay("topics", found["broken"][0][1])


def test_atheris_sees_what_the_boards_packets_reach() -> None:
    """The one target that is not imported by its name. A run names any that shows no edge."""
    if not run.has_atheris():
        pytest.skip("no atheris: the extra [fuzz] installs it on Linux")
    found = run.guided("board packets", 1, 1)
    assert found["broken"] == []
    assert int(found["engine"].split()[1]) > 10


def test_the_command_prints_its_table_last(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--minutes", "0.005", "--target", "topics"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "0 inputs broke a promise"
    assert "| topics | " in done.stdout
