"""JSON merge patches (RFC 7396): merge, diff, compose, and the check against the hub's limits.

A document is what JSON gives: dict with str keys, list, str, int, float, bool; None only in patches, where
it removes a key. Limits: IoT Hub, "Understand and use device twins", tags and properties format.
"""

import sys

from .errors import PatchError

MAX_KEY = 1024  # bytes of UTF-8
MAX_STRING = 4096  # bytes of UTF-8
MAX_INTEGER = 4503599627370495
MIN_INTEGER = -4503599627370496
_INTEGER_BITS = 52  # of what is between them, beside the sign
MAX_DEPTH = 10  # objects and arrays below the section
MAX_SECTION = 32768  # bytes by the hub's own size rule, see size()
# What the hub sends nests at most 2 deeper than MAX_DEPTH; what follows recurses, on small stacks too.
_MAX_NESTING = 20


# How much of a float may differ and still be the same, 1 being all: 32-bit floats may not come back from
# their text as they were. float() at run time: the compiler runs on a PC, whose floats have 64 bits.
_NOISE = 0.0 if float("16777217") > 16777216 else 1e-6


def _no_number(word: str) -> object:
    raise ValueError(word + " is not JSON")


# The differences of the two json modules, in one place.
if sys.implementation.name == "micropython":
    import json

    decode = json.loads
    _utf8 = str.encode  # it writes a lone surrogate as three bytes that are no UTF-8

    def dumps(document: object) -> str:
        return json.dumps(document, separators=(",", ":"))

else:
    # The first document brings json in: to import it takes as long as all the rest of the core.
    _decoder = None

    def decode(text: str) -> object:  # type: ignore[misc]  # it is one or the other
        """The value of a JSON text."""
        global decode, _decoder
        if _decoder is None:
            import json

            # json.loads with options builds a decoder at every call, and accepts NaN without one.
            _decoder = json.JSONDecoder(parse_constant=_no_number).decode
        decode = _decoder  # type: ignore[assignment]  # called alike
        return _decoder(text)

    def _encode(document: object) -> str:
        global _encode
        import json

        _encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # type: ignore[assignment]  # as above
        return _encode(document)

    def _utf8(text: str) -> bytes:  # type: ignore[misc]  # as above
        try:
            return text.encode()
        except ValueError:
            # As MicroPython writes it.
            return text.encode("utf-8", "surrogatepass")

    def dumps(document: object) -> str:
        """The document as compact JSON, non-ASCII characters as they are."""
        return _encode(document)


def loads(payload: bytes) -> object:
    """The JSON value of UTF-8 bytes. ValueError or RuntimeError if it is none, or nests deeper than 20."""
    text = payload.decode()
    if "\\ud" in text or "\\uD" in text:
        text = _without_surrogates(text)
    value: object = decode(text)
    # Counting first spares the walk where it cannot find anything.
    if text.count("{") + text.count("[") > _MAX_NESTING and _is_deeper(value, _MAX_NESTING):
        raise ValueError("nested too deep")
    return value


def _without_surrogates(text: str) -> str:
    # MicroPython's json takes an escaped pair for two characters, and neither json minds a lone surrogate,
    # which no UTF-8 can say again.
    parts = []
    start = 0
    at = text.find("\\")
    while at >= 0:
        after = at + 2
        if text[at + 1 : after] == "u":
            after = at + 6
            high = int(text[at + 2 : after], 16)
            if 0xD800 <= high < 0xE000:
                parts.append(text[start:at])
                start = after
                low = 0
                if high < 0xDC00 and text[after : after + 2] == "\\u":
                    low = int(text[after + 2 : after + 6], 16)
                if 0xDC00 <= low < 0xE000:
                    parts.append(chr(((high - 0xD800) << 10) + low + 0x2400))
                    start = after = after + 6
                else:
                    parts.append("\ufffd")
        at = text.find("\\", after)
    parts.append(text[start:])
    return "".join(parts)


def _is_deeper(value: object, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list):
        return False
    deeper = levels == 0
    for member in value:
        deeper = deeper or _is_deeper(member, levels - 1)
    return deeper


def copy(value: object) -> object:
    """The same document in dicts and lists of its own."""
    if isinstance(value, dict):
        value = keys = dict(value)
    elif isinstance(value, list):
        value = list(value)
        keys = range(len(value))  # type: ignore[assignment]  # either leads to every member
    else:
        return value
    for key in keys:
        if isinstance(value[key], (dict, list)):
            value[key] = copy(value[key])
    return value


def merge(target: object, patch: "dict[str, object]") -> "dict[str, object]":
    """The document that results when patch is merged into target; neither is changed.

    What patch does not touch is shared with target, what it touches is new: nothing of the result is
    shared with patch. A target that is no object counts as an empty one.
    """
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = merge(result.get(key), value)
        else:
            result[key] = copy(value) if isinstance(value, list) else value
    return result


def same(one: object, other: object) -> bool:
    """Equal as JSON: unlike Python's ==, true is not 1. Where floats have 32 bits, seven digits count."""
    if one is other:
        return True
    if isinstance(one, dict):
        kind: type = dict
    elif isinstance(one, list):
        kind = list
    elif _NOISE and type(one) is float and type(other) in (float, int):
        return abs(one - other) <= _NOISE * abs(one)  # type: ignore[operator]  # they are numbers
    else:
        # There is but one True, and one False.
        return one == other and bool not in (type(one), type(other))
    if not isinstance(other, kind) or len(one) != len(other):  # type: ignore[arg-type]  # kind says so
        return False
    for key in one if kind is dict else range(len(one)):
        if (kind is dict and key not in other) or not same(one[key], other[key]):  # type: ignore[index, operator]  # as above
            return False
    return True


def diff(old: "dict[str, object]", new: "dict[str, object]") -> "dict[str, object]":
    """The smallest merge patch with merge(old, patch) == new, for documents without None.

    Its values are those of new, not copies.
    """
    patch: "dict[str, object]" = {}
    for key in old:
        if key not in new:
            patch[key] = None
    for key, value in new.items():
        before = old.get(key)
        if before is value:
            # What a merge has not touched is the very same.
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            inner = diff(before, value)
            if inner:
                patch[key] = inner
        elif not same(before, value):
            patch[key] = value
    return patch


def compose(
    first: "dict[str, object]", second: "dict[str, object]", base: "dict[str, object] | None" = None
) -> "dict[str, object] | None":
    """One patch that does what first and then second do; None where no single merge patch can.

    An object that follows a null or a plain value replaces it, and a merge patch has no way to say
    "replace by this object": merged into what the hub may hold there, it keeps the hub's other members.
    base: what the patches are merged into, where that is known; then there always is such a patch. It
    leads to the same document from merge(base, first), too.
    """
    result = dict(first)
    for key, value in second.items():
        if isinstance(value, dict) and key in result:
            before = result[key]
            under = None
            if base is not None:
                member = base.get(key)
                under = member if isinstance(member, dict) else {}
            if isinstance(before, dict):
                inner = compose(before, value, under)
            elif under is None:
                return None
            else:
                whole = merge(None, value)
                inner = compose(diff(under, whole), whole)
            if inner is None:
                return None
            result[key] = inner
        else:
            result[key] = copy(value)
    return result


def size(value: object) -> int:
    """Bytes of a value by the hub's size rule: keys and strings in UTF-8 without control characters,
    8 a number, 4 a boolean, members added up, punctuation not counted."""
    if isinstance(value, dict):
        return sum([_text_size(key) + size(member) for key, member in value.items()])
    if isinstance(value, list):
        return sum([size(member) for member in value])
    if isinstance(value, str):
        return _text_size(value)
    if type(value) is bool:
        return 4
    return 0 if value is None else 8


def check(patch: object) -> int:
    """Raise PatchError if the hub would refuse this patch of the reported properties.

    Checked are types, keys, depth, string sizes, integer range, and nulls inside arrays; the size of the
    section is the business of check_section, since it depends on what is there already. Returns an upper
    bound of size(patch), in bytes.
    """
    if not isinstance(patch, dict):
        raise PatchError("", "a patch is a JSON object (dict)", _type_name(patch))
    return _check(patch, dict, (), 0, False)


def check_section(section: object, patch: "dict[str, object]") -> None:
    """Raise PatchError if a whole section, as it would be after patch, is larger than the hub allows."""
    total = size(section)
    if total > MAX_SECTION:
        largest = max(patch, key=lambda key: size(patch[key]), default="")
        raise PatchError(largest, "all reported properties together are at most 32768 bytes", total)


def _check(value: object, kind: type, where: "tuple[object, ...]", depth: int, in_array: bool) -> int:
    """kind: its type. where: (), or what it is in, as a place of this kind, and its key or index there."""
    if kind is str:
        return _check_text(value, MAX_STRING, where)  # type: ignore[arg-type]  # kind says so
    if kind is bool:
        return 4
    # value - value: not 0 for NaN and both infinities.
    if (kind is int and -1 <= value >> _INTEGER_BITS <= 0) or (kind is float and value - value == 0):  # type: ignore[operator]  # as above
        return 8
    if value is None and not in_array:
        return 0
    if kind not in (dict, list) or depth > MAX_DEPTH:
        raise _unfit(value, where, depth)
    total = 0
    for key in value if kind is dict else range(len(value)):  # type: ignore[arg-type, attr-defined]  # as above
        place = (where, key)
        if kind is dict:
            total += _check_key(key, place)
        member = value[key]  # type: ignore[index]  # as above
        total += _check(member, type(member), place, depth + 1, in_array or kind is list)
    return total


def _unfit(value: object, where: "tuple[object, ...]", depth: int) -> PatchError:
    if type(value) is int:
        limit = "an integer is from -4503599627370496 to 4503599627370495"
    elif type(value) is float:
        limit = "a number must be finite"
    elif value is None:
        return PatchError(_text(where), "null removes a key and has no meaning inside an array")
    elif type(value) is dict or type(value) is list:
        limit = "objects and arrays nest at most 10 deep"
        value = depth
    else:
        limit = "a value is a dict, list, str, int, float, bool or None"
        value = _type_name(value)
    return PatchError(_text(where), limit, value)


def _check_key(key: object, where: "tuple[object, ...]") -> int:
    if type(key) is not str:
        raise PatchError(_text(where), "a key is a str", _type_name(key))
    count = _check_text(key, MAX_KEY, where)
    if not key.isalpha():
        for character in key:
            if character <= " " or character in ".$#" or "\x7f" <= character <= "\x9f":
                raise PatchError(_text(where), "a key has no control character, space, '.', '$' or '#'")
    return count


def _check_text(text: str, most: int, where: "tuple[object, ...]") -> int:
    data = _utf8(text)
    count = len(data)
    if count > most or b"\xed" in data:
        _check_bytes(data, most, where)
    return count


def _check_bytes(data: bytes, most: int, where: "tuple[object, ...]") -> None:
    # Not every character that is written with the surrogates' first byte is one.
    what = "a key" if most == MAX_KEY else "a string"
    at = data.find(b"\xed")
    while at >= 0:
        if data[at + 1] >= 0xA0:
            raise PatchError(_text(where), what + " must be valid Unicode (no lone surrogate)")
        at = data.find(b"\xed", at + 1)
    if len(data) > most:
        raise PatchError(_text(where), what + " is at most " + str(most) + " bytes of UTF-8", len(data))


def _text_size(text: str) -> int:
    count = len(text.encode())
    for character in text:
        if character < " " or character == "\x7f":
            count -= 1
        elif "\x80" <= character <= "\x9f":
            count -= 2
    return count


def _text(where: "tuple[object, ...]") -> str:
    path: "list[object]" = []
    while where:
        where, part = where  # type: ignore[assignment]  # a place and a key
        path.insert(0, part)
    text = ""
    for part in path:
        if type(part) is int:
            text += "[" + str(part) + "]"
        else:
            # A key may be what is wrong: shown so that an error stays one readable line.
            name = part if type(part) is str else repr(part)
            if len(name) > 64:
                name = name[:61] + "..."
            text += ("." if text else "") + name
    return text


def _type_name(value: object) -> str:
    return type(value).__name__
