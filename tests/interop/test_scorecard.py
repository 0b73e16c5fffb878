"""`make scorecard` in short: our own clients, in situations that take no time."""

import subprocess
import sys

import pytest

from tests.interop.scorecard import OURS, SITUATIONS, Subject, play_all
from tests.players.player import ROOT

QUICK = (
    "stale, doubled and ancient versions",
    "a key deleted while offline",
    "everything replaced while offline",
    "a handler, and no retrieve by the app",
    "9 invalid reports",
    "a handler raises",
)

REFUSES = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"id": json.loads(line)["id"], "error": "no"}), flush=True)
"""


@pytest.mark.parametrize("subject", OURS, ids=lambda subject: subject.name)
def test_ours_passes(subject: Subject) -> None:
    chosen = tuple(one for one in SITUATIONS if one.name in QUICK)
    assert len(chosen) == len(QUICK)
    card = play_all(chosen, (subject,), at_once=len(chosen), say=lambda _: None)
    assert card.score(subject) == len(QUICK), card.table()
    assert f"| **passed** | | {len(QUICK)} of {len(QUICK)} |" in card.table()


def test_a_client_that_does_nothing_passes_nothing() -> None:
    subject = Subject("nobody", lambda _port: (sys.executable, "-c", REFUSES))
    chosen = tuple(one for one in SITUATIONS if one.name in QUICK)
    card = play_all(chosen, (subject,), at_once=len(chosen), say=lambda _: None)
    assert card.score(subject) == 0
    assert card.table().count("**no**, OrderFailed: no") == len(QUICK)


def test_fifteen_situations_and_nothing_to_play_is_an_error() -> None:
    assert len({one.name for one in SITUATIONS}) == 15
    command = [sys.executable, "-m", "tests.interop.scorecard", "--without-azure", "--only", "no such thing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
