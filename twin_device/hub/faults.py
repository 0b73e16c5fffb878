"""What the hub does wrong on demand, as data: KINDS is the list.

`operation` ("retrieve" or "report") narrows those that have to do with a twin operation, `device` (an
identity's id) all but hanging_tls. `times`: how often it happens. `seconds`: how long from now. Neither:
until it is cleared.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """One way to go wrong. text: what happens. parameters: their names and defaults. of_operations: operation
    narrows it."""

    text: str
    parameters: dict[str, Any]
    of_operations: bool


def _kind(text: str, of_operations: bool = False, **parameters: Any) -> Kind:
    return Kind(text, parameters, of_operations)


KINDS: dict[str, Kind] = {
    "answer_lost": _kind("a twin operation is done, its answer never sent", True),
    "answer_late": _kind("the answer comes this much later", True, seconds_late=1.0),
    "answer_doubled": _kind("the answer comes twice", True),
    "answer_status": _kind(
        "the operation is not done; its answer is this status with this errorCode; "
        'body "empty" for none, or the text to send instead of the usual JSON',
        True,
        status=429,
        error_code=None,
        body=None,
    ),
    "answer_before_puback": _kind("the answer to a QoS 1 request precedes its PUBACK", True),
    "quota": _kind("the daily quota is used up: status 403, code 403002", True),
    "reports_reordered": _kind("a reported patch is applied after the next one", True),
    "notification_lost": _kind("a desired notification is not sent"),
    "notification_doubled": _kind("a desired notification is sent twice"),
    "notification_stale": _kind("after a desired notification an older one is sent again"),
    "notification_reordered": _kind("a desired notification is held back and sent after the next one"),
    "notification_late": _kind("a desired notification comes this much later", seconds_late=1.0),
    "notification_coalesced": _kind("a desired notification is held back and merged into the next one"),
    "suback_refused": _kind("SUBACK refuses every filter"),
    "suback_late": _kind("SUBACK comes this much later", seconds_late=1.0),
    "session_forgotten": _kind("CONNECT finds no session, whatever there was"),
    "connack_refused": _kind("CONNACK with this return code, then the end", code=5),
    "connack_slow": _kind("CONNACK comes this much later", seconds_late=1.0),
    "half_open": _kind("the connection is accepted, CONNECT never answered"),
    "hanging_tls": _kind("TCP is accepted, the TLS handshake never answered"),
    "cut_in_packet": _kind("half of the answer is sent, then the connection ends", True),
    "disconnect": _kind("the connection ends when the operation arrives", True),
    "clock_skew": _kind("the hub's clock, for tokens, is wrong by these seconds", offset=0.0),
}
_OPERATIONS = (None, "retrieve", "report")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    """One thing that goes wrong. hits: how often it did. id: its number on its hub, 0 before it is set.

    ValueError: no such kind, operation or parameter.
    """

    kind: str
    device: str | None = None
    operation: str | None = None
    times: int | None = None
    seconds: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    hits: int = 0
    id: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.parameters, dict):
            raise ValueError(f"parameters are a dict, not {self.parameters!r}")
        if not isinstance(self.device, str | None):
            raise ValueError(f"device is an identity's id, not {self.device!r}")
        if self.kind not in KINDS:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(KINDS)}")
        if self.operation not in _OPERATIONS:
            raise ValueError(f"operation is 'retrieve' or 'report', not {self.operation!r}")
        if self.operation is not None and not KINDS[self.kind].of_operations:
            raise ValueError(f"{self.kind} has nothing to do with an operation")
        if self.device is not None and self.kind == "hanging_tls":
            raise ValueError("hanging_tls comes before the hub knows which device it is")
        unknown = self.parameters.keys() - KINDS[self.kind].parameters.keys()
        if unknown:
            known = ", ".join(KINDS[self.kind].parameters) or "none"
            raise ValueError(f"{self.kind} has no parameter {sorted(unknown)[0]!r}; it has {known}")
        for name, value in (("times", self.times), ("seconds", self.seconds)):
            if value is not None and not (_is_number(value) and value >= 0):
                raise ValueError(f"{name} is a number from 0 up, not {value!r}")
        self.parameters = {**KINDS[self.kind].parameters, **self.parameters}
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
            "id": self.id,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Fault":
        """A fresh fault of what as_dict gave; ValueError for a member that it does not have."""
        known = {"kind", "device", "operation", "times", "seconds", "parameters", "hits", "id"}
        unknown = data.keys() - known
        if unknown or "kind" not in data:
            raise ValueError(f"a fault has no {sorted(unknown)[0]!r}" if unknown else "a fault has a kind")
        return cls(**{name: value for name, value in data.items() if name not in ("hits", "id")})


class Faults:
    """The faults that are set on one hub, oldest first."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._ids = itertools.count(1)
        # Told of every hit.
        self.taken: Callable[[], None] = lambda: None

    def add(self, fault: Fault) -> Fault:
        fault.id = next(self._ids)
        self._faults = [one for one in self._faults if one.active] + [fault]
        return fault

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
                self.taken()
                return fault
        return None
