"""The desired-state pattern: a setting that the back end wishes, the app applies and the device reports.

    reported state     input                       next state   outputs
    -----------------  --------------------------  -----------  ------------------------------------------
    anything           a new desired value         pending      report pending, Apply
    pending            applied without an error    success      report success
    pending            applied with an error       failed       report failed; the old value stays current
    success            the same desired value      success      none
    pending, failed    synchronised again          pending      report pending, Apply
    any                the desired value is gone   as it was    none

One Apply a setting is under way at a time; of what is desired meanwhile only the newest is applied next.
A desired value that goes away leaves the device with the value that it runs with.

Two shapes of the reported property. DOCUMENT, the one of the tutorials: an object's members stand beside
`status` (Pending, Success, Failed), and the value that is being applied in `pendingConfig`; a value that is
no object stands in `value`. PNP, the answer of IoT Plug and Play's writable properties: `value`, `ac` (202,
200, 400), `av` (the desired `$version`), `ad`.
"""

from collections import namedtuple

from .errors import LocalError
from .patch import check, copy, diff, same
from .twin import SYNCHRONISED, DesiredChanged, Failed, StateChanged, Twin

DOCUMENT = "document"
PNP = "pnp"

# Output for the app: have the setting's function called with this value (its own copy), then call applied().
Apply = namedtuple("Apply", ("name", "value"))

_OWN = ("status", "pendingConfig", "reason", "value")
_MAX_REASON = 1024  # characters; at most 4096 bytes of UTF-8, the hub's limit for a string


class Settings:
    """The settings of one twin. The shell hands each list of outputs to observe() before it performs them."""

    def __init__(self, twin: Twin) -> None:
        self._twin = twin
        self._names: "list[str]" = []  # as declared; a dict has no order on MicroPython
        self._shapes: "dict[str, str]" = {}
        # By name: value and version that are being applied; the value that failed last in this connection.
        self._applying: "dict[str, tuple[object, int | None]]" = {}
        self._failed: "dict[str, object]" = {}

    def declare(self, name: str, shape: str = DOCUMENT) -> None:
        """Make the property name a setting. "component.property" is a property of a Plug and Play component.

        LocalError: it is declared already, no property can have this name, or there is no such shape.
        """
        if shape not in (DOCUMENT, PNP):
            raise LocalError("a setting's shape is " + DOCUMENT + " or " + PNP + ", not " + str(shape))
        if name in self._shapes:
            raise LocalError("the setting " + name + " is declared already")
        parts = name.split(".")
        if "" in parts or len(parts) > 2:
            raise LocalError("a setting's name is a property's, or component.property, not " + repr(name))
        check(dict.fromkeys(parts))
        self._shapes[name] = shape
        self._names.append(name)

    def declared(self, name: str, now: int) -> "list[object]":
        """Look at a setting that was declared while synchronised already."""
        out: "list[object]" = []
        if self._twin.state == SYNCHRONISED:
            self._look(name, now, out)
        return out

    def observe(self, outputs: "list[object]", now: int) -> "list[object]":
        """What the settings add to these outputs of the twin, to be performed after them."""
        out: "list[object]" = []
        for output in outputs:
            if type(output) is StateChanged and output.new == SYNCHRONISED:
                self._failed = {}
                for name in self._names:
                    self._look(name, now, out)
            elif type(output) is DesiredChanged and self._twin.state == SYNCHRONISED:
                for name in self._names:
                    if _at(output.patch, name) is not None:
                        # Desired once more: a value that failed is worth another try.
                        self._failed.pop(name, None)
                        self._look(name, now, out)
        return out

    def applied(self, name: str, error: "str | None", now: int) -> "list[object]":
        """The app's function has returned (error None), or refused the value: error says why."""
        out: "list[object]" = []
        value, version = self._applying.pop(name)
        if error is None:
            self._failed.pop(name, None)
            self._report(name, _success(self._shapes[name], value, version), now, out)
        else:
            self._failed[name] = value
            current = self._current(name)
            reason = error[:_MAX_REASON]
            self._report(name, _failure(self._shapes[name], current, value, version, reason), now, out)
        if self._twin.state == SYNCHRONISED:
            self._look(name, now, out)
        return out

    def _look(self, name: str, now: int, out: "list[object]") -> None:
        desired = _at(self._twin.desired, name)
        version = self._twin.desired_version
        if name in self._applying:
            value = self._applying[name][0]
            if same(value, desired):
                # The answer to this one is the answer to the newer wish, too.
                self._applying[name] = (value, version)
            return
        if desired is None:
            return
        shape = self._shapes[name]
        reported = _at(self._twin.target, name)
        if _is_applied(shape, reported, desired):
            if shape == PNP and isinstance(reported, dict) and reported.get("av") != version:
                # The back end looks for the version that it wrote.
                self._report(name, _success(shape, desired, version), now, out)
            return
        if name in self._failed and same(self._failed[name], desired):
            return
        self._applying[name] = (desired, version)
        self._report(name, _pending(shape, self._current(name), desired, version), now, out)
        out.append(Apply(name, copy(desired)))

    def _current(self, name: str) -> object:
        """What the device is reported to run with; None if that is not known."""
        reported = _at(self._twin.target, name)
        if not isinstance(reported, dict):
            return reported
        if self._shapes[name] == PNP or "value" in reported:
            return reported.get("value")
        current = {key: member for key, member in reported.items() if key not in _OWN}
        return current or None

    def _report(self, name: str, state: "dict[str, object]", now: int, out: "list[object]") -> None:
        # The property is to be exactly this: what else it holds goes.
        before = _at(self._twin.target, name)
        patch: "dict[str, object]" = diff(before, state) if isinstance(before, dict) else state
        component, dot, key = name.rpartition(".")
        patch = {key: patch}
        if dot:
            patch["__t"] = "c"
            patch = {component: patch}
        try:
            out.extend(self._twin.report(patch, now)[1])
        except LocalError as error:
            # Desired properties may be what reported ones may not, by size or by the depth that we add.
            out.append(Failed(error))


def _at(document: object, name: str) -> object:
    for key in name.split("."):
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _is_applied(shape: str, reported: object, desired: object) -> bool:
    if not isinstance(reported, dict):
        return False
    if shape == PNP:
        return reported.get("ac") == 200 and same(reported.get("value"), desired)
    return same(reported, _success(shape, desired, None))


def _wrapped(value: object) -> "dict[str, object]":
    # An object with a member of these names could not be told from the answer's own.
    if isinstance(value, dict) and not [name for name in _OWN if name in value]:
        return dict(value)
    return {"value": value}


def _pending(shape: str, current: object, value: object, version: "int | None") -> "dict[str, object]":
    if shape == PNP:
        return {"value": value if current is None else current, "ac": 202, "av": version, "ad": "pending"}
    state = {} if current is None else _wrapped(current)
    state["status"] = "Pending"
    state["pendingConfig"] = value
    return state


def _success(shape: str, value: object, version: "int | None") -> "dict[str, object]":
    if shape == PNP:
        return {"value": value, "ac": 200, "av": version, "ad": "success"}
    state = _wrapped(value)
    state["status"] = "Success"
    return state


def _failure(
    shape: str, current: object, value: object, version: "int | None", reason: str
) -> "dict[str, object]":
    if shape == PNP:
        return {"value": value if current is None else current, "ac": 400, "av": version, "ad": reason}
    state = {} if current is None else _wrapped(current)
    state["status"] = "Failed"
    state["reason"] = reason
    return state
