"""The twin documents as the hub keeps them: versions, metadata, merge, limits.

Source: IoT Hub, "Understand and use device twins".
"""

import base64
import copy
import json
import struct
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

Document = dict[str, Any]

# What the service prints for a time that there has not been yet.
NEVER = "0001-01-01T00:00:00Z"
MAX_SECTION = 32768
MAX_TAGS = 8192
_MAX_KEY = 1024
_MAX_STRING = 4096
_MAX_DEPTH = 10
_INTEGERS = range(-(2**52), 2**52)


class Invalid(Exception):
    """The hub refuses a document. code: IoT Hub's error code (int), its first three digits are the status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    @property
    def status(self) -> int:
        return self.code // 1000


@dataclass(frozen=True)
class Rules:
    """Where sources do not agree on what the hub stores.

    hash_in_keys: keys may have a "#". size_rule: a section's size is that of its keys and "values" (the
    documented formula), or of its "text" as JSON. size_code: errorCode of a section that is too large.
    """

    hash_in_keys: bool = False
    size_rule: str = "values"
    size_code: int = 403100


_DOCUMENTED = Rules()


@dataclass
class Twin:
    """One identity's twin. Sections hold no `$` keys."""

    tags: Document = field(default_factory=dict)
    desired: Document = field(default_factory=dict)
    reported: Document = field(default_factory=dict)
    desired_version: int = 1
    reported_version: int = 1
    rules: Rules = _DOCUMENTED
    # The desired properties before they were last written.
    former_desired: Document = field(default_factory=dict)
    # The back end's writes of tags and desired properties.
    etag_counter: int = 1
    desired_metadata: Document = field(default_factory=lambda: {"$lastUpdated": now()})
    reported_metadata: Document = field(default_factory=lambda: {"$lastUpdated": now()})
    # The reported properties are no larger than this; None: nobody has looked.
    _reported_most: int | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def etag(self) -> str:
        """Base64 of the counter in 8 bytes, big-endian: "AAAAAAAAAAE=" when new."""
        return base64.b64encode(struct.pack(">Q", self.etag_counter)).decode()

    @property
    def version(self) -> int:
        """The whole twin's version: 2 when new."""
        return self.etag_counter + self.reported_version

    def device_view(self) -> bytes:
        """The body of the answer to a retrieve: no tags, no metadata."""
        return encode(
            {
                "desired": {**self.desired, "$version": self.desired_version},
                "reported": {**self.reported, "$version": self.reported_version},
            }
        )

    def service_view(self) -> Document:
        """The parts of the back end's twin document that the twin itself knows; a copy."""
        return copy.deepcopy(
            {
                "etag": self.etag,
                "version": self.version,
                "tags": self.tags,
                "properties": {
                    "desired": {
                        **self.desired,
                        "$metadata": self.desired_metadata,
                        "$version": self.desired_version,
                    },
                    "reported": {
                        **self.reported,
                        "$metadata": self.reported_metadata,
                        "$version": self.reported_version,
                    },
                },
            }
        )

    def desired_change(self, patch: Document) -> Document:
        """A patch of the desired properties that was just merged, as an event tells it."""
        return _change(patch, self.desired_metadata, self.desired_version)

    def reported_change(self, patch: Document) -> Document:
        """A patch of the reported properties that was just merged, as an event tells it."""
        return _change(patch, self.reported_metadata, self.reported_version)

    def patch_reported(self, payload: bytes, expected: int | None) -> Document:
        """Merge a device's report and return it; Invalid, and nothing changed, if the hub refuses it.

        expected: the version that the reported properties must have, None for any.
        """
        patch = decode(payload)
        check(patch, nulls=True, rules=self.rules)
        if expected is not None and expected != self.reported_version:
            raise Invalid(412001, f"the reported properties have version {self.reported_version}")
        result = merged(self.reported, patch)
        # A merge adds no more than the patch. Only a sum that is too large has the whole document measured.
        most = None if self._reported_most is None else self._reported_most + _measure(patch, self.rules)
        if most is None or most > MAX_SECTION:
            most = _check_size(result, "Properties.Reported", MAX_SECTION, self.rules)
        self.reported, self._reported_most = result, most
        self.reported_version += 1
        mark(self.reported_metadata, patch, {"$lastUpdated": now()})
        return patch

    def patch_desired(self, patch: Document) -> Document | None:
        """Merge the back end's patch; returns the notification without `$version`, None if there is none.

        The device is sent exactly the patch, also where values do not change; a patch that only removes what
        is not there says nothing.
        """
        patch = written(patch, nulls=True, rules=self.rules)
        if _says_nothing(self.desired, patch):
            self.etag_counter += 1
            return None
        self._set_desired(merged(self.desired, patch), patch)
        return patch

    def replace_desired(self, document: Document) -> Document:
        """Replace the desired properties; returns the notification without `$version`.

        It has every key of the new document, with null for each that is gone, nested ones too.
        """
        document = written(document, nulls=False, rules=self.rules)
        patch = _replacement(self.desired, document)
        self._set_desired(document, patch)
        return patch

    def patch_tags(self, patch: Document) -> None:
        """Merge into the tags. Devices are not told."""
        check(patch, nulls=True, rules=self.rules)
        result = merged(self.tags, patch)
        _check_size(result, "Tags", MAX_TAGS, self.rules)
        self.tags = result
        self.etag_counter += 1

    def _set_desired(self, document: Document, patch: Document) -> None:
        _check_size(document, "Properties.Desired", MAX_SECTION, self.rules)
        self.former_desired, self.desired = self.desired, document
        self.desired_version += 1
        self.etag_counter += 1
        stamp = {"$lastUpdated": now(), "$lastUpdatedVersion": self.desired_version}
        mark(self.desired_metadata, patch, stamp)


def new(desired: Document, tags: Document, rules: Rules = _DOCUMENTED) -> Twin:
    """A new twin that begins with these documents; Invalid if the hub refuses one."""
    check(desired, nulls=False, rules=rules)
    check(tags, nulls=False, rules=rules)
    _check_size(desired, "Properties.Desired", MAX_SECTION, rules)
    _check_size(tags, "Tags", MAX_TAGS, rules)
    twin = Twin(copy.deepcopy(tags), copy.deepcopy(desired), rules=rules)
    mark(twin.desired_metadata, desired, {"$lastUpdated": now()})
    return twin


def encode(document: Document) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def decode(payload: bytes) -> Document:
    """The JSON object of a UTF-8 payload; Invalid if it is none."""
    try:
        document = _DECODER.decode(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Invalid(400006, "The payload is not valid JSON in UTF-8.") from None
    if not isinstance(document, dict):
        raise Invalid(400006, "Provided json is not a valid 'properties' object.")
    return document


def merged(target: Any, patch: Document) -> Document:
    """JSON merge patch (RFC 7396); shares nothing with patch, but with target what stays as it was."""
    # Documents are not changed in place: a new one takes the place of the old.
    result: Document = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = merged(result.get(key), value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def joined(before: Any, first: Document, second: Document) -> Document:
    """One patch that does to before what first and then second do.

    Merge patches do not compose without the document: {"a": null} and then {"a": {"c": 1}} has to remove what
    else there was in "a".
    """
    result = dict(first)
    for key, value in second.items():
        held = before.get(key) if isinstance(before, dict) else None
        earlier = first.get(key)
        if isinstance(value, dict) and isinstance(earlier, dict):
            result[key] = joined(held, earlier, value)
        elif isinstance(value, dict) and key in first and isinstance(held, dict):
            result[key] = _replacement(held, merged(None, value))
        else:
            result[key] = value
    return result


def size(value: Any) -> int:
    """Bytes by the documented rule: keys and strings without control characters, 8 a number, 4 a boolean."""
    if isinstance(value, dict):
        return sum(_characters(key) + size(member) for key, member in value.items())
    if isinstance(value, list):
        return sum(size(member) for member in value)
    if isinstance(value, str):
        return _characters(value)
    if isinstance(value, bool):
        return 4
    return 0 if value is None else 8


def check(document: Any, *, nulls: bool, rules: Rules = _DOCUMENTED) -> None:
    """Raise Invalid at the first key or value that the hub does not store. nulls: they remove (a patch)."""
    signs = " .$" if rules.hash_in_keys else " .$#"
    if not isinstance(document, dict):
        raise Invalid(400004, "Provided json is not a valid 'tags' or 'properties' object.")
    stack: list[tuple[Any, str, int, bool]] = [(document, "", 0, nulls)]
    while stack:
        value, path, depth, null = stack.pop()
        if isinstance(value, (dict, list)):
            if depth > _MAX_DEPTH:
                raise Invalid(400004, f"Properties nest deeper than {_MAX_DEPTH} levels. Error in {path}")
            if isinstance(value, dict):
                for key, member in value.items():
                    _check_key(key, path, signs)
                    stack.append((member, f"{path}.{key}" if path else key, depth + 1, null))
            else:
                stack += [(member, path, depth + 1, False) for member in value]
        elif value is None:
            if not null:
                raise Invalid(
                    400004, f"Value of Property or Tag cannot be null. Error in Property/Tag {path}"
                )
        elif isinstance(value, str):
            if len(_utf8(value, path)) > _MAX_STRING:
                raise Invalid(
                    400004,
                    f"Property or Tag value should be maximum 4096 bytes. Error in Property/Tag {path}",
                )
        elif isinstance(value, int) and not isinstance(value, bool):
            if value not in _INTEGERS:
                raise Invalid(400004, f"Integer out of range. Error in Property/Tag {path}")
        elif isinstance(value, float):
            if value in (float("inf"), float("-inf")) or value != value:
                raise Invalid(400006, f"Not a number of JSON. Error in Property/Tag {path}")
        elif not isinstance(value, bool):
            raise Invalid(400004, f"{type(value).__name__} is no JSON value. Error in Property/Tag {path}")


def _measure(document: Document, rules: Rules) -> int:
    return len(encode(document)) if rules.size_rule == "text" else size(document)


def _check_size(document: Document, name: str, most: int, rules: Rules) -> int:
    """How large it is; Invalid if that is too large."""
    measured = _measure(document, rules)
    if measured > most:
        raise Invalid(rules.size_code, f"'{name}' size should be less than {most} bytes.")
    return measured


def _check_key(key: Any, path: str, signs: str) -> None:
    where = f"under {path}" if path else "at the root"
    if not isinstance(key, str):
        raise Invalid(400004, f"A key {where} is no string.")
    if len(key) <= _MAX_KEY and key.isascii() and key.isidentifier():
        return  # most are
    if len(_utf8(key, path)) > _MAX_KEY:
        raise Invalid(400004, f"A key {where} is longer than {_MAX_KEY} bytes.")
    if any(c in signs or ord(c) < 32 or 127 <= ord(c) < 160 for c in key):
        raise Invalid(400004, f"The key {key[:64]!r} {where} has a character that keys may not have.")


def _utf8(text: str, path: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Invalid(400006, f"Not valid Unicode. Error in Property/Tag {path}") from None


def _characters(text: str) -> int:
    if text.isascii() and text.isprintable():
        return len(text)  # most are
    return len("".join(c for c in text if not (ord(c) < 32 or 127 <= ord(c) < 160)).encode())


def written(document: Document, *, nulls: bool, rules: Rules) -> Document:
    """A copy of what the back end writes, without the hub's own members; Invalid if the hub refuses it."""
    if isinstance(document, dict):
        # Tools send a whole twin back: what is the hub's own is not written.
        document = {key: value for key, value in document.items() if key not in ("$version", "$metadata")}
    check(document, nulls=nulls, rules=rules)
    # Copied only when its depth is known: a copy recurses.
    return copy.deepcopy(document)


def _says_nothing(target: Any, patch: Document) -> bool:
    if not patch:
        return True
    for key, value in patch.items():
        held = target.get(key) if isinstance(target, dict) else None
        if value is None:
            if isinstance(target, dict) and key in target:
                return False
        elif not isinstance(value, dict) or not isinstance(held, dict) or not _says_nothing(held, value):
            return False
    return True


def _replacement(old: Document, new: Document) -> Document:
    patch: Document = {}
    for key in old:
        if key not in new:
            patch[key] = None
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            patch[key] = _replacement(before, value)
        else:
            patch[key] = copy.deepcopy(value)
    return patch


def _change(patch: Document, metadata: Document, version: int) -> Document:
    stamp: Document = {
        name: metadata[name] for name in ("$lastUpdated", "$lastUpdatedVersion") if name in metadata
    }
    marks: Document = {}
    mark(marks, patch, stamp)
    return {**patch, "$metadata": marks, "$version": version}


def mark(node: Document, patch: Document, stamp: Document) -> None:
    """Stamp the metadata of all that a patch writes; what it removes loses its own."""
    node.update(stamp)
    for key, value in patch.items():
        if value is None:
            node.pop(key, None)
        elif isinstance(value, dict):
            mark(node.setdefault(key, {}), value, stamp)
        else:
            node[key] = dict(stamp)


def printed(seconds: float) -> str:
    """A time in Unix seconds as the service prints it: seven fractional digits and Z."""
    # Every report has one printed; strftime takes half as long again.
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds")[:26] + "0Z"


def now() -> str:
    """The time as the service prints it."""
    return printed(time.time())


def _refuse_constant(word: str) -> None:
    raise ValueError(word)


def _without_doubles(pairs: list[tuple[str, Any]]) -> Document:
    # Which of two members counts is nobody's rule (RFC 8259, section 4).
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a member twice")
    return document


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_doubles)
