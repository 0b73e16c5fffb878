"""JSON in chunks, for boards: a document is read as it arrives, and only what is wanted of it is built.

What is built is what patch.loads makes of the whole payload, less what is not wanted. It takes the memory of
that, of one chunk and of one token, if the garbage of one chunk does not lie between what is kept of the
next: a board sets gc.threshold(8192) while it reads. What is built is held to RFC 8259 on every runtime, but
for unknown escapes, which are refused or taken as patch.loads does; of what is skipped only strings and
brackets are looked at.
"""

from .patch import loads, same

const = int  # MicroPython's compiler puts the numbers in place of the names

_MAX_DOCUMENT = const(262144)  # bytes; no message of the hub is larger
_MAX_STRING = const(24576)  # bytes; the hub's 4096, each of them written as \u0000
_MAX_TOKEN = const(24640)  # with the space that may stand before a key's colon
_MAX_NUMBER = const(400)  # bytes; without an exponent the largest double has 309
_MAX_NESTING = const(20)  # as patch.loads has it
_MAX_SHARED = const(24)  # keys and short strings of which there is but one
_SHORT = const(24)  # bytes of those strings

# What comes next. Up to _FIRST_VALUE a value can; from _FIRST_VALUE to _FIRST_KEY the end of the array or
# object; from _FIRST_KEY to _SKIP a key.
_VALUE = const(0)
_FIRST_VALUE = const(1)
_COMMA = const(2)
_FIRST_KEY = const(3)
_KEY = const(4)
_SKIP = const(5)  # anything, up to a key that is wanted or to the end of the object
_ROOT = const(6)
_NOTHING = const(7)
_BROKEN = const(8)

_WORDS = ((b"true", True), (b"false", False), (b"null", None))


class Reader:
    """Reads one payload: feed() takes its chunks, end() gives the document.

    twin: True for a retrieved twin: "desired" is read, and the `$version` of "reported"; with reported=True
    all of "reported". False for an object that is such a section itself, as a desired notification is.
    keep: the names of the properties that are built (tuple of str), None for all of them. Beside them
    `$version` is, and no other name with `$`.
    on_property: called with the path (tuple of str) and the value of every property that keep leaves out, as
    soon as it is read: an object's properties one by one, any other value whole. What it raises passes
    through feed().
    old: the document as it was, {} if there is none. What has not changed is taken from there, so that old
    and new together need hardly more memory than one; neither may be changed in place then.

    ValueError: the payload is no JSON object, is larger than 256 KiB, or nests deeper than 20. Nothing can be
    read after an error; what on_property was given until then belongs to no document.
    """

    def __init__(
        self,
        twin: bool = False,
        keep: "tuple[str, ...] | None" = None,
        on_property: object = None,
        reported: bool = False,
        old: "dict[str, object] | None" = None,
    ) -> None:
        self._sections = 2 if twin else 1  # how deep the properties lie
        self._reported = reported
        self._keep = None if keep is None else keep + ("$version",)
        self._on_property = on_property
        self._size = 0
        self._tail = b""  # the beginning of a token
        self._next = _ROOT
        # The objects and arrays that are being read, outermost first, each with the key of its next value,
        # whether that goes to on_property, and what stood in this place of the old document. The innermost
        # stands here between two chunks only.
        self._stack: "list[tuple[object, str, bool, object]]" = [(None, "", False, {"": old})]
        self._shared: "dict[object, object]" = {}
        # Skipping: the names to look for, None for any, and how many brackets are open.
        self._names: "list[bytes] | None" = None
        self._open = 0

    def feed(self, chunk: "bytes | bytearray | memoryview") -> None:
        """Read on. The chunk may be overwritten afterwards."""
        state = self._next
        self._next = _BROKEN
        self._size += len(chunk)
        if state == _BROKEN or self._size > _MAX_DOCUMENT:
            raise ValueError("broken, or too large")
        data = self._tail + chunk
        end = len(data)
        find = data.find
        stack = self._stack
        shared = self._shared
        into, key, handed, old = stack.pop()
        closer = 93 if type(into) is list else 125  # ] }
        value: object
        at = 0
        while at < end:
            if state == _SKIP:
                at = self._skipped(data, at)
                if at == end:
                    break
                if data[at] != 34:
                    state = _COMMA
            byte = data[at]
            if byte == 34 and state <= _SKIP and state != _COMMA:  # "
                stop = find(b'"', at + 1)
                while stop > 0 and data[stop - 1] == 92:  # a backslash
                    first = stop - 1
                    while data[first - 1] == 92:
                        first -= 1
                    if (stop - first) % 2 == 0:
                        break
                    stop = find(b'"', stop + 1)
                if stop < 0:
                    break
                if stop - at > _MAX_STRING + 1:
                    raise ValueError("too long")
                after = stop + 1
                if state >= _FIRST_KEY:
                    if state == _SKIP and self._open:
                        at = after
                        continue
                    while after < end and data[after] in b" \t\r\n":
                        after += 1
                    if after == end:
                        break
                    if data[after] != 58:  # :
                        if state != _SKIP:
                            raise ValueError("no JSON")
                        at = after
                        continue
                    after += 1
                text = data[at + 1 : stop]
                if text and min(text) < 32:
                    raise ValueError("control character")
                value = text.decode() if find(b"\\", at, stop) < 0 else loads(data[at : stop + 1])
                # Not the properties' own names: they come but once.
                if stop - at <= _SHORT and len(stack) > self._sections:
                    # The same few keys and words come again and again.
                    if len(shared) == _MAX_SHARED:
                        shared.clear()
                    value = shared.setdefault(value, value)
                at = after
                if state >= _FIRST_KEY:
                    key = value  # type: ignore[assignment]  # a string was read
                    state = _VALUE
                    if len(stack) <= self._sections:
                        wanted = self._wanted(key)
                        handed = wanted is False
                        if wanted is None:
                            state = _SKIP
                    continue
            elif state <= _FIRST_VALUE and (48 <= byte <= 57 or byte == 45):  # 0 to 9, -
                # Between a number and the next comma there are closing brackets, if anything.
                stop = find(b",", at)
                text = data[at : stop if stop > 0 else end].rstrip(b"]} \t\r\n")
                stop = at + len(text)
                if stop - at > _MAX_NUMBER:
                    raise ValueError("too long")
                if stop == end:
                    break
                value = int(text) if text.isdigit() and (byte != 48 or stop == at + 1) else _number(text)
                at = stop
            elif byte == closer and _FIRST_VALUE <= state <= _FIRST_KEY:
                at += 1
                empty = state != _COMMA
                state = _COMMA
                value = into
                into, key, handed, old = stack.pop()
                closer = 93 if type(into) is list else 125
                if not stack:
                    into = value
                    state = _NOTHING
                    continue
                if handed and byte == 125 and not empty:
                    # What is inside it was handed over.
                    continue
            elif byte == 44 and state == _COMMA:
                at += 1
                state = _KEY if closer == 125 else _VALUE
                continue
            elif (byte == 123 or byte == 91) and (state <= _FIRST_VALUE or state == _ROOT):  # { [
                if len(stack) == _MAX_NESTING:
                    raise ValueError("nested too deep")
                stack.append((into, key, handed, old))
                old = old.get(key) if type(old) is dict else None
                at += 1
                closer = byte + 2
                if byte == 123:
                    into = {}
                    state = _FIRST_KEY
                else:
                    into = []
                    handed = False
                    state = _FIRST_VALUE
                continue
            elif byte in b" \t\r\n":
                at += 1
                continue
            elif state <= _FIRST_VALUE:
                if end - at < 5:
                    break
                for word, value in _WORDS:  # noqa: B007  # it is used below
                    if data.startswith(word, at):
                        at += len(word)
                        break
                else:
                    raise ValueError("no JSON")
            else:
                raise ValueError("no JSON")
            if type(old) is dict and key in old and same(old[key], value):
                value = old[key]
            if closer == 93:
                into.append(value)  # type: ignore[attr-defined]  # its closer says that it is a list
            elif handed:
                path = [outer for _, outer, _, _ in stack[self._sections :]]
                self._on_property(tuple(path + [key]), value)  # type: ignore[operator]  # there is no Callable here
            else:
                into[key] = value  # type: ignore[index]  # its closer says that it is a dict
            state = _COMMA
        if end - at > _MAX_TOKEN:
            raise ValueError("too long")
        self._tail = data[at:]
        self._next = state
        stack.append((into, key, handed, old))

    def end(self) -> "dict[str, object]":
        """The document, once every chunk was fed."""
        if self._next == _NOTHING:
            document = self._stack[0][0]
            if isinstance(document, dict):
                return document
        raise ValueError("no JSON object")

    def _wanted(self, key: str) -> "bool | None":
        """True: build it. False: hand it over. None: skip it, and all up to one of _names."""
        stack = self._stack
        keep = self._keep
        handing = False
        if len(stack) < self._sections:
            keep = ("desired", "reported")
        elif self._sections == 2 and stack[1][1] == "reported":
            keep = None if self._reported else ("$version",)
        else:
            handing = self._on_property is not None
        hidden = key.startswith("$") and key != "$version"
        if not hidden if keep is None else key in keep:
            return True
        if handing and not hidden:
            return False
        self._names = None if handing or keep is None else [name.encode() for name in keep]
        self._open = 0
        return None

    def _skipped(self, data: bytes, at: int) -> int:
        """Where the object ends, or a string begins that may be a wanted key; else the length of data."""
        find = data.find
        count = data.count
        names = self._names
        depth = self._open
        plain = find(b"\\", at)
        if plain < 0:
            plain = len(data)
        quote = find(b'"', at)
        while True:
            if quote < 0:
                quote = len(data)
            closing = count(b"}", at, quote) + count(b"]", at, quote)
            if closing <= depth:
                depth += count(b"{", at, quote) + count(b"[", at, quote) - closing
                at = quote
            while at < quote:
                byte = data[at]
                if byte == 125 or byte == 93:  # } ]
                    if depth == 0:
                        return at
                    depth -= 1
                elif byte == 123 or byte == 91:  # { [
                    depth += 1
                at += 1
            while True:
                after = find(b'"', quote + 1) + 1
                if not quote < after <= plain or (
                    depth == 0 and (names is None or data[quote + 1 : after - 1] in names)
                ):
                    self._open = depth
                    return quote
                at = after
                quote = find(b'"', at)
                # Between most strings there is but a colon or a comma; brackets are greater.
                if quote != at + 1 or data[at] > 58:
                    break


def _number(text: bytes) -> "int | float":
    whole, point, fraction = text.lstrip(b"-").partition(b".")
    # What int() and float() would take, and JSON does not.
    if (
        b"_" in text
        or not whole[:1].isdigit()
        or (whole[0] == 48 and whole[1:2].isdigit())
        or (point and not fraction[:1].isdigit())
    ):
        raise ValueError("no JSON")
    return int(text) if (whole + point).isdigit() else float(text)
