"""What the hub does wrong on demand, as data.

    kind                     parameters (default)       what happens
    -----------------------  -------------------------  ---------------------------------------------------
    answer_lost                                         a twin operation is done, its answer never sent
    answer_late              seconds_late (1.0)         the answer comes this much later
    answer_doubled                                      the answer comes twice
    answer_status            status (429),              the operation is not done; its answer is this status
                             error_code (None),         with this errorCode; body "empty" for none, or the
                             body (None)                text to send instead of the usual JSON
    answer_before_puback                                the answer to a QoS 1 request precedes its PUBACK
    quota                                               the daily quota is used up: status 403, code 403002
    reports_reordered                                   a reported patch is applied after the next one
    notification_lost                                   a desired notification is not sent
    notification_doubled                                it is sent twice
    notification_stale                                  after it an older one is sent again
    notification_reordered                              it is held back and sent after the next one
    notification_late        seconds_late (1.0)         it comes this much later
    notification_coalesced                              it is held back and merged into the next one
    suback_refused                                      SUBACK refuses every filter
    suback_late              seconds_late (1.0)         SUBACK comes this much later
    session_forgotten                                   CONNECT finds no session, whatever there was
    connack_refused          code (5)                   CONNACK with this return code, then the end
    connack_slow             seconds_late (1.0)         CONNACK comes this much later
    half_open                                           the connection is accepted, CONNECT never answered
    hanging_tls                                         TCP is accepted, the TLS handshake never answered
    cut_in_packet                                       half of the answer is sent, then the connection ends
    disconnect                                          the connection ends when the operation arrives
    clock_skew               offset (0.0)               the hub's clock, for tokens, is wrong by these seconds

`operation` ("retrieve" or "report") narrows those that have to do with a twin operation, `device` (an
identity's id) all but hanging_tls. `times`: how often it happens. `seconds`: how long from now. Neither:
until it is cleared.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "answer_lost": {},
    "answer_late": {"seconds_late": 1.0},
    "answer_doubled": {},
    "answer_status": {"status": 429, "error_code": None, "body": None},
    "answer_before_puback": {},
    "quota": {},
    "reports_reordered": {},
    "notification_lost": {},
    "notification_doubled": {},
    "notification_stale": {},
    "notification_reordered": {},
    "notification_late": {"seconds_late": 1.0},
    "notification_coalesced": {},
    "suback_refused": {},
    "suback_late": {"seconds_late": 1.0},
    "session_forgotten": {},
    "connack_refused": {"code": 5},
    "connack_slow": {"seconds_late": 1.0},
    "half_open": {},
    "hanging_tls": {},
    "cut_in_packet": {},
    "disconnect": {},
    "clock_skew": {"offset": 0.0},
}
_OPERATIONS = (None, "retrieve", "report")
# Those that operation narrows.
_OF_OPERATIONS = {
    "answer_lost",
    "answer_late",
    "answer_doubled",
    "answer_status",
    "answer_before_puback",
    "quota",
    "reports_reordered",
    "cut_in_packet",
    "disconnect",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


_PARAMETERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seconds_late": ("a number from 0 up", lambda value: _is_number(value) and value >= 0),
    "offset": ("a number", _is_number),
    "status": ("an integer from 100 to 999", lambda value: _is_integer(value, 100, 999)),
    "error_code": ("an integer or None", lambda value: value is None or _is_integer(value, 0, 2**31 - 1)),
    "body": ("a text or None", lambda value: value is None or isinstance(value, str)),
    "code": ("an integer from 1 to 255", lambda value: _is_integer(value, 1, 255)),
}


@dataclass
class Fault:
    """One thing that goes wrong. hits: how often it did. ValueError: no such kind, operation or parameter."""

    kind: str
    device: str | None = None
    operation: str | None = None
    times: int | None = None
    seconds: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    hits: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(KINDS)}")
        if self.operation not in _OPERATIONS:
            raise ValueError(f"operation is 'retrieve' or 'report', not {self.operation!r}")
        if self.operation is not None and self.kind not in _OF_OPERATIONS:
            raise ValueError(f"{self.kind} has nothing to do with an operation")
        if self.device is not None and self.kind == "hanging_tls":
            raise ValueError("hanging_tls comes before the hub knows which device it is")
        unknown = self.parameters.keys() - KINDS[self.kind].keys()
        if unknown:
            known = ", ".join(KINDS[self.kind]) or "none"
            raise ValueError(f"{self.kind} has no parameter {sorted(unknown)[0]!r}; it has {known}")
        for name, value in (("times", self.times), ("seconds", self.seconds)):
            if value is not None and not (_is_number(value) and value >= 0):
                raise ValueError(f"{name} is a number from 0 up, not {value!r}")
        self.parameters = {**KINDS[self.kind], **self.parameters}
        for name, value in self.parameters.items():
            wanted, right = _PARAMETERS[name]
            if not right(value):
                raise ValueError(f"{name} is {wanted}, not {value!r}")
        self._ends = None if self.seconds is None else time.monotonic() + self.seconds
        self._cleared = False

    @property
    def active(self) -> bool:
        """False once it is cleared, used up, or its time is over."""
        return not (
            self._cleared
            or (self.times is not None and self.hits >= self.times)
            or (self._ends is not None and time.monotonic() >= self._ends)
        )

    def __getitem__(self, name: str) -> Any:
        """The value of a parameter."""
        return self.parameters[name]

    def clear(self) -> None:
        """Let it happen no more."""
        self._cleared = True

    def as_dict(self) -> dict[str, Any]:
        """As JSON, for from_dict and for people."""
        return {
            "kind": self.kind,
            "device": self.device,
            "operation": self.operation,
            "times": self.times,
            "seconds": self.seconds,
            "parameters": dict(self.parameters),
            "hits": self.hits,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Fault":
        """A fresh fault of what as_dict gave; ValueError for a member that it does not have."""
        known = {"kind", "device", "operation", "times", "seconds", "parameters", "hits"}
        unknown = data.keys() - known
        if unknown or "kind" not in data:
            raise ValueError(f"a fault has no {sorted(unknown)[0]!r}" if unknown else "a fault has a kind")
        return cls(**{name: value for name, value in data.items() if name != "hits"})


class Faults:
    """The faults that are set on one hub, oldest first."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        self._faults = [one for one in self._faults if one.active] + [fault]
        return fault

    def clear(self) -> None:
        for fault in self._faults:
            fault.clear()
        self._faults = []

    def active(self) -> list[Fault]:
        return [fault for fault in self._faults if fault.active]

    def take(self, kind: str, device: str | None = None, operation: str | None = None) -> Fault | None:
        """The first fault that is to happen here, counted as a hit; None if none is."""
        for fault in self._faults:
            if (
                fault.kind == kind
                and fault.device in (None, device)
                and fault.operation in (None, operation)
                and fault.active
            ):
                fault.hits += 1
                return fault
        return None
