"""JSON in chunks, for boards: a document is read as it arrives, and only what is wanted of it is built.

What is built is what patch.loads makes of the whole payload, less what is not wanted. It takes the memory of
that, of one chunk and of one token, if the garbage of one chunk does not lie between what is kept of the
next: a board sets gc.threshold(8192) while it reads. What is built is held to RFC 8259 on every runtime, but
for unknown escapes, which are refused or taken as patch.loads does; of what is skipped only strings and
brackets are looked at.
"""

from .patch import decode, loads, same

const = int  # MicroPython's compiler puts the numbers in place of the names

_MAX_DOCUMENT = const(262144)  # bytes; no message of the hub is larger
_MAX_STRING = const(24576)  # bytes; the hub's 4096, each of them written as \u0000
_MAX_NUMBER = const(400)  # bytes; without an exponent the largest double has 309
_MAX_NESTING = const(20)  # as patch.loads has it
_MAX_SHARED = const(24)  # keys and short strings of which there is but one
_SHORT = const(26)  # bytes of those strings, with their quotes

# What may come next: one or more of these.
_VALUE = const(1)
_CLOSER = const(2)  # the end of the array or object
_COMMA = const(4)
_COLON = const(8)
_KEY = const(16)
_SKIP = const(32)  # anything, up to a key that may be wanted or to the end of the object


def reader(
    twin: bool = False,
    keep: "tuple[str, ...] | None" = None,
    on_property: object = None,
    reported: bool = False,
    old: "dict[str, object] | None" = None,
) -> object:
    """Reads one payload. A generator: next() begins, and send() takes a chunk, which may be overwritten
    afterwards. What both give is the document once every chunk was sent, and None until then.

    twin: True for a retrieved twin: "desired" is read, and the `$version` of "reported"; with reported=True
    all of "reported". False for an object that is such a section itself, as a desired notification is.
    keep: the names of the properties that are built (tuple of str), None for all of them. Beside them
    `$version` is, and no other name with `$`.
    on_property: called with the path (tuple of str) and the value of every property that keep leaves out, as
    soon as it is read: an object's properties one by one, any other value whole. What it raises passes
    through send().
    old: the document as it was, {} if there is none. What has not changed is taken from there, so that old
    and new together need hardly more memory than one; neither may be changed in place then.

    ValueError: the payload is no JSON, is larger than 256 KiB, or nests deeper than 20. Nothing can be read
    after an error; what on_property was given until then belongs to no document. Of what is JSON, but no
    object, there is no document.
    """
    at = end = depth = size = closer = 0
    state = _VALUE
    value: object
    # The array or object that is being read, the key of its next value, and the path of what goes to
    # on_property. On the stack are those around it, outermost first, and for each what stood in its place of
    # the old document, and its closing bracket.
    into: object = {}
    key = ""
    path: "tuple[str, ...] | None" = None
    stack: "list[tuple[object, str, tuple[str, ...] | None, dict[str, object], int]]" = []
    data = b""
    document: object = None
    sections = 1 + twin  # how deep the properties lie
    names: "list[str] | tuple[str, ...] | None" = None  # what is wanted there, if it is not everything
    shared: "dict[object, object]" = {}
    old = {"": old}
    if keep is not None:
        keep += ("$version",)
    while True:
        chunk: bytes = yield document  # type: ignore[assignment]  # what send() is given
        size += len(chunk)
        if size > _MAX_DOCUMENT:
            raise ValueError("too large")
        # Behind it what ends any token: so whoever looks for the end finds one.
        data = data[at:end] + chunk + b'"",'
        end = len(data) - 3
        find = data.find
        count = data.count
        at = 0
        while at < end:
            if state == _SKIP:
                # String by string, until the object ends or a string may be a wanted key: see below.
                quote = find(b'"', at)
                # Between most strings there is but a colon or a comma; brackets are greater.
                if quote > at + 1 or data[at] > 58:
                    closing = count(b"}", at, quote) + count(b"]", at, quote)
                    if closing <= depth:
                        depth += count(b"{", at, quote) + count(b"[", at, quote) - closing
                        at = quote
                else:
                    at = quote
                while at < quote:
                    depth += (data[at] in b"[{") - (data[at] in b"]}")
                    if depth < 0:
                        depth = 0
                        state = _CLOSER
                        break
                    at += 1
                else:
                    stop = find(b'"', at + 1)
                    if (
                        stop < end
                        and find(b"\\", at, stop) < 0
                        and (depth or (names and data[at + 1 : stop].decode() not in names))
                    ):
                        at = stop + 1
                        continue
            byte = data[at]
            if byte == closer and state & _CLOSER:
                at += 1
                value = into
                into, key, path, old, closer = stack.pop()
                if path is not None and byte == 125 and state & _COMMA:
                    # What is inside it was handed over.
                    continue
            else:
                if byte == 58 and state & _COLON:  # :
                    stop = at
                elif byte == 44 and state & _COMMA:
                    at += 1
                    state = _KEY if closer == 125 else _VALUE
                    continue
                elif byte in b" \t\r\n":
                    at += 1
                    continue
                elif state == _SKIP | _COLON:
                    # It was a value, and no key.
                    state = _SKIP
                    continue
                elif byte == 34 and state & (_VALUE | _KEY | _SKIP):  # "
                    stop = at
                    while True:
                        first = stop = find(b'"', stop + 1)
                        while data[first - 1] == 92:  # a backslash
                            first -= 1
                        if not stop - first & 1:
                            break
                    text = data[at : stop + 1]
                    longest = _MAX_STRING + 1
                elif not state & _VALUE:
                    raise ValueError("no JSON")
                elif byte in b"[{":
                    if len(stack) == _MAX_NESTING:
                        raise ValueError("nested too deep")
                    stack.append((into, key, path, old, closer))
                    at += 1
                    closer = byte + 2
                    old = old.get(key)  # type: ignore[assignment]  # see the next line
                    if not isinstance(old, dict):
                        old = {}
                    if byte == 123:
                        into = {}
                        state = _KEY | _CLOSER
                        if path is not None:
                            path += (key,)
                    else:
                        into = []
                        state = _VALUE | _CLOSER
                        path = None
                    continue
                else:
                    # Between a number and the next comma there are closing brackets, if anything.
                    text = data[at : find(b",", at)].rstrip(b'"]} \t\r\n')
                    stop = at + len(text)
                    longest = _MAX_NUMBER
                if stop - at > longest:
                    raise ValueError("too long")
                if stop >= end:
                    break
                at = stop
                if text.startswith(b'"'):
                    at += 1
                    if not state & (_VALUE | _COLON):
                        # A key; or where it is skipped, what is one if a colon follows.
                        if not depth:
                            state = _COLON | state & _SKIP
                        continue
                    if min(text) < 32:
                        raise ValueError("no JSON")
                    value = loads(text) if b"\\" in text else text[1:-1].decode()
                    level = len(stack) - sections
                    if level > 0 and len(text) <= _SHORT:
                        # The same few keys and words come again and again.
                        if len(shared) == _MAX_SHARED:
                            shared = {}
                        value = shared.setdefault(value, value)
                    if byte == 58:
                        key = value  # type: ignore[assignment]  # a string was read
                        state = _VALUE
                        if level <= 0:
                            # A section of a twin, or a property: it is built, handed over or skipped.
                            path = None
                            names = keep
                            if level:
                                names = ["desired", "reported"]
                            elif stack[-1][1] == "reported":
                                names = None if reported else ["$version"]
                            handing = names is keep and on_property
                            hidden = key.startswith("$") and key != "$version"
                            if key not in names if names else hidden:
                                state = _SKIP
                                if handing:
                                    names = None
                                    if not hidden:
                                        state = _VALUE
                                        path = ()
                        continue
                else:
                    value = _scalar(text)
            before = old.get(key)
            if before and same(before, value):
                value = before
            if closer == 93:
                into.append(value)  # type: ignore[attr-defined]  # its closer says that it is a list
            elif path is not None:
                on_property(path + (key,), value)  # type: ignore[operator]  # there is no Callable here
            else:
                into[key] = value  # type: ignore[index]  # its closer says that it is a dict
            state = _COMMA | _CLOSER
            if not stack:
                state = 0
                if byte == 125:
                    document = value


def _scalar(text: bytes) -> object:
    """A number or a word."""
    if not text.isalpha():
        # What MicroPython's json takes, and RFC 8259 does not.
        whole = text.lstrip(b"-")
        for part in whole.split(b"."):
            if not (part[:1] + part[-1:]).isdigit() or (whole[0] == 48 and whole[1:2].isdigit()):
                raise ValueError("no JSON")
    return decode(text.decode())
