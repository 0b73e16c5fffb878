"""What is done in a chaos run, as data: the same seed gives the same plan."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos import proxy
from twin_device.hub.faults import KINDS

Arguments = dict[str, Any]

# A refusal is tried again slowly, which a client that is not hurried does for minutes.
_SLOW = frozenset({"suback_refused", "connack_refused", "clock_skew", "quota", "half_open", "disabled"})
# What may have a report refused for good, and what has the client report anew what was accepted before. Of a
# refusal of the latter nobody can say which of the app's reports it has hit: no device gets both.
_RESTORING = frozenset({"reports_reordered", "recreate"})
_ALL = (*sorted(KINDS), "disabled")
_OF_MESSAGES = tuple(kind for kind in _ALL if kind.startswith(("notification_", "answer_", "reports_")))
# Seconds, on average, from one desired change of a device to the next, and from report to report.
_EVERY = 0.3
_WORLD = ("killed", "killed, no sessions", "away")


@dataclass(frozen=True)
class Subject:
    """A device of the run. gentle: its client is not hurried. strict: the hub may refuse its reports.
    renews: its token lives shortly."""

    name: str
    gentle: bool = False
    strict: bool = False
    renews: bool = False


@dataclass(frozen=True)
class Action:
    """at: seconds from the storm's begin. what: "link", "hub" or "world" for a fault; "desired", "report"."""

    at: float
    what: str
    kind: str
    device: str | None = None
    arguments: Arguments = field(default_factory=dict)

    @property
    def is_fault(self) -> bool:
        return self.what in ("link", "hub", "world")


def storm(seed: int, number: int, subjects: Sequence[Subject], faults: int, seconds: float) -> list[Action]:
    """One storm's actions in their order: so many faults, and what the back end and the apps do meanwhile.

    In every other storm connections are left alone: a new one mends what a client has missed before.
    """
    chance = random.Random(f"{seed}/{number}")
    violent = number % 2 == 1
    actions = [
        # So early that the hub is back when the storm ends.
        Action(chance.uniform(0.1, 0.6) * seconds, "world", kind, None, {"seconds": chance.uniform(0.2, 1.0)})
        for kind in _WORLD[: min(len(_WORLD), faults) if violent else 0]
    ]
    while len(actions) < faults:
        at, subject = chance.uniform(0, seconds), chance.choice(subjects)
        if not violent:
            actions.append(_hub_fault(chance, at, subject, _OF_MESSAGES))
        elif chance.random() < 0.6:
            actions.append(_link_fault(chance, at, subject))
        else:
            actions.append(_hub_fault(chance, at, subject, _ALL))
    for subject in subjects:
        for what, one in (("desired", _desired), ("report", _report)):
            at = chance.expovariate(1 / _EVERY)
            while at < seconds:
                actions.append(one(chance, at, what, subject))
                at += chance.expovariate(1 / _EVERY)
    return sorted(actions, key=lambda action: action.at)


# ---------------------------------------------------------------------- faults


def _link_fault(chance: random.Random, at: float, subject: Subject) -> Action:
    kind = chance.choice(sorted(proxy.KINDS))
    arguments = {"seconds": chance.uniform(0.3, 2.5), "amount": chance.randrange(1, 80)}
    return Action(at, "link", kind, subject.name, arguments)


def _hub_fault(chance: random.Random, at: float, subject: Subject, kinds: Sequence[str]) -> Action:
    while True:
        kind = chance.choice(kinds)
        if not (kind in _SLOW and subject.gentle) and not (kind in _RESTORING and subject.strict):
            break
    if kind == "disabled":
        return Action(at, "world", kind, subject.name, {"seconds": chance.uniform(0.2, 1.0)})
    arguments = {"times": chance.randrange(1, 3)}
    if kind == "hanging_tls":
        return Action(at, "hub", kind, None, {"times": 1})
    if kind == "clock_skew":
        arguments = {"seconds": 1.0, "offset": chance.choice((-7200.0, 7200.0))}
    elif kind == "connack_refused":
        arguments["code"] = chance.randrange(1, 6)
    elif kind == "answer_status":
        arguments |= _status(chance, subject)
    elif "seconds_late" in KINDS[kind].parameters:
        arguments["seconds_late"] = chance.uniform(0.1, 3.0)
    if KINDS[kind].of_operations and "operation" not in arguments:
        arguments["operation"] = chance.choice((None, "retrieve", "report"))
    return Action(at, "hub", kind, subject.name, arguments)


def _status(chance: random.Random, subject: Subject) -> Arguments:
    operation = chance.choice(("retrieve", "report"))
    statuses = [429, 429, 500, 503]
    if operation == "report" and subject.strict:
        statuses = [429, 400, 400, 403, 413]
    elif operation == "retrieve" and not subject.gentle:
        statuses.append(400)
    return {"operation": operation, "status": chance.choice(statuses)}


# ---------------------------------------------------------------------- the back end and the app


def _document(chance: random.Random, depth: int = 2) -> Arguments:
    found: Arguments = {}
    for key in chance.sample("abcdef", chance.randrange(1, 4)):
        if depth and chance.random() < 0.35:
            found[key] = _document(chance, depth - 1)
        else:
            found[key] = chance.choice((chance.randrange(1000), chance.random() < 0.5, "text é €", 0.5, ""))
    return found


def _patch(chance: random.Random, depth: int = 2) -> Arguments:
    found = _document(chance, depth)
    for key in chance.sample("abcdef", chance.randrange(3)):
        found[key] = None
    for key, value in found.items():
        if isinstance(value, dict) and depth:
            found[key] = _patch(chance, depth - 1)
    return found


def _desired(chance: random.Random, at: float, what: str, subject: Subject) -> Action:
    drawn = chance.random()
    if drawn < 0.04 and not subject.strict:
        return Action(at, what, "recreate", subject.name)
    if drawn < 0.2:
        return Action(at, what, "replace", subject.name, {"document": _document(chance)})
    if drawn < 0.35:
        keys = chance.sample("abcdef", 3)
        return Action(at, what, "patch", subject.name, {"patch": dict.fromkeys(keys)})
    return Action(at, what, "patch", subject.name, {"patch": _patch(chance)})


def _report(chance: random.Random, at: float, what: str, subject: Subject) -> Action:
    return Action(at, what, "report", subject.name, {"patch": _patch(chance)})
