"""The push parser: what is built is what the json module gives, however the payload is cut into chunks."""

import json
import sys
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twin_device.core.patch import loads, same
from twin_device.core.stream import reader

FIXED = settings(derandomize=True, deadline=None, max_examples=300)

# Names that mean something in some place, in every place; texts that look like what is around them.
NAMES = st.sampled_from(["desired", "reported", "$version", "$metadata", "a", "é", '"', "\\", "{", "😀", ""])
TEXTS = st.sampled_from(["desired", "$version", "a", "]}", '"a":1', "\\", "\n", "é😀", "", "x" * 40])
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=5),
    lambda inner: st.dictionaries(NAMES, inner, max_size=4) | st.lists(inner, max_size=3),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=5)
TWINS = st.fixed_dictionaries(
    {"desired": DOCUMENTS, "reported": DOCUMENTS},
    optional={"tags": VALUES, "$x": VALUES, "properties": VALUES},
)


@st.composite
def written(draw, documents):
    """A document and its text, in one of the ways to write it."""
    document = draw(documents)
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n", "\t: ")]))
    indent = draw(st.sampled_from([None, None, 1]))
    text = json.dumps(document, ensure_ascii=draw(st.booleans()), separators=separators, indent=indent)
    return document, text.encode()


CUTS = st.lists(st.floats(0, 1), max_size=6) | st.none()


def read(payload, cuts=None, **options):
    """The document, read in chunks that end at these parts of the payload; None: byte by byte."""
    reading = reader(**options)
    document = next(reading)
    ends = range(len(payload)) if cuts is None else sorted(int(cut * len(payload)) for cut in cuts)
    start = 0
    # One buffer for all, as on a board: a chunk that were kept would be overwritten.
    buffer = bytearray(len(payload))
    for end in [*ends, len(payload)]:
        buffer[: end - start] = payload[start:end]
        document = reading.send(memoryview(buffer)[: end - start])
        start = end
    return document


def section(document, keep=None):
    return {
        name: value
        for name, value in document.items()
        if name == "$version" or (not name.startswith("$") if keep is None else name in keep)
    }


def leaves(value, path):
    """The properties inside a value, as on_property gets them."""
    if isinstance(value, dict) and value:
        return [leaf for name, member in value.items() for leaf in leaves(member, (*path, name))]
    return [(path, value)]


# ---------------------------------------------------------------------- what is built


@FIXED
@given(written(DOCUMENTS), CUTS)
def test_a_section_is_built_as_the_json_module_builds_it(case, cuts):
    document, payload = case
    assert loads(payload) == document
    assert repr(read(payload, cuts)) == repr(section(document))


@FIXED
@given(written(TWINS), CUTS)
def test_of_a_twin_the_desired_section_is_built_and_the_version_of_the_other(case, cuts):
    document, payload = case
    found = read(payload, cuts, twin=True)
    assert found == {
        "desired": section(document["desired"]),
        "reported": section(document["reported"], ()),
    }


@FIXED
@given(written(TWINS), CUTS, st.lists(NAMES.filter(lambda name: not name.startswith("$")), max_size=3))
def test_only_what_is_kept_is_built(case, cuts, keep):
    document, payload = case
    keep = tuple(keep)
    assert read(payload, cuts, twin=True, keep=keep)["desired"] == section(document["desired"], keep)
    assert read(payload, cuts, keep=keep) == section(document, keep)


@FIXED
@given(written(TWINS), CUTS, st.sampled_from([(), ("a",), ("a", "desired"), None]))
def test_what_is_not_kept_is_handed_over_property_by_property(case, cuts, keep):
    document, payload = case
    handed = []
    found = read(
        payload, cuts, twin=True, keep=keep, on_property=lambda path, value: handed.append((path, value))
    )
    assert found["desired"] == section(document["desired"], keep)
    rest = {
        name: value
        for name, value in document["desired"].items()
        if not name.startswith("$") and keep is not None and name not in keep
    }
    assert handed == [leaf for name, value in rest.items() for leaf in leaves(value, (name,))]


@FIXED
@given(written(TWINS), TWINS, CUTS)
def test_beside_an_old_document_the_same_is_built_and_the_old_one_stays_as_it_was(case, old, cuts):
    _, payload = case
    before = json.dumps(old)
    assert same(
        read(payload, cuts, twin=True, reported=True, old=old), read(payload, twin=True, reported=True)
    )
    assert json.dumps(old) == before


def test_what_has_not_changed_is_the_old_documents():
    old = {"desired": {"a": {"b": {"c": [1]}, "d": 1.5}, "e": ["f"], "g": True}}
    payload = (
        b'{"desired":{"a":{"b":{"c":[1]},"d":2.5},"e":["f"],"g":1,"$version":2},"reported":{"$version":1}}'
    )
    found = in_chunks(payload, twin=True, old=old)["desired"]
    assert found == {"a": {"b": {"c": [1]}, "d": 2.5}, "e": ["f"], "g": 1, "$version": 2}
    assert found["a"]["b"] is old["desired"]["a"]["b"]
    assert found["e"] is old["desired"]["e"]
    assert found["g"] is not True


def test_the_document_may_be_asked_for_again():
    reading = reader()
    next(reading)
    document = reading.send(b'{"a":1}')
    assert document == {"a": 1}
    assert reading.send(b" ") is document


# ---------------------------------------------------------------------- what is refused

# Without names that are skipped, since what is skipped is hardly looked at.
LOOKED_AT = st.dictionaries(
    NAMES.filter(lambda name: not name.startswith("$")),
    VALUES.filter(lambda value: "$" not in str(value)),
    max_size=4,
)
DAMAGE = [
    b"",
    b",",
    b":",
    b'"',
    b"{",
    b"[",
    b"]",
    b"}",
    b"0",
    b"-",
    b".",
    b"e",
    b"\\",
    b"\0",
    b"\xff",
    b" ",
    b"t",
]


@FIXED
@given(written(DOCUMENTS), CUTS, st.floats(0, 1, exclude_max=True))
@example(({}, b"{}"), [], 0.0)
def test_every_beginning_of_a_document_is_refused(case, cuts, part):
    _, payload = case
    assert read(payload[: int(part * len(payload.rstrip()))], cuts) is None


@settings(FIXED, max_examples=1000)
@given(
    written(LOOKED_AT), CUTS, st.floats(0, 1, exclude_max=True), st.integers(0, 1), st.sampled_from(DAMAGE)
)
def test_a_damaged_document_is_read_or_refused_as_the_json_module_does(case, cuts, part, less, more):
    _, payload = case
    at = int(part * len(payload))
    payload = payload[:at] + more + payload[at + less :]
    try:
        expected = loads(payload)
    except ValueError:
        expected = None
    try:
        found = read(payload, cuts)
    except ValueError:
        found = None
    assert repr(found) == repr(expected if isinstance(expected, dict) else None)


@FIXED
@given(st.binary(max_size=20) | st.text('{}[]":,\\ue01-.tfn \n', max_size=30).map(str.encode), CUTS)
def test_anything_is_read_alike_in_every_cut(payload, cuts):
    results = []
    for each in ([], cuts, None):
        try:
            results.append(repr(read(payload, each, keep=("a",))))
        except ValueError:
            # An error may come before the end or with it; there is no document then.
            results.append("None")
    assert len(set(results)) == 1


@pytest.mark.parametrize("payload", [b'{"a":01}', b'{"a":1}}', b'{"a":"\xff"}', b'{"a":nullx}'])
def test_nothing_is_read_after_an_error(payload):
    reading = reader()
    next(reading)
    with pytest.raises(ValueError, match=r"."):
        reading.send(payload)
    for _ in range(3):
        with pytest.raises(StopIteration) as ended:
            reading.send(b"{}")
        assert ended.value.value is None


def test_what_on_property_raises_comes_out_of_feed_and_ends_the_reading():
    def refuse(path, value):
        raise KeyError(path)

    reading = reader(keep=(), on_property=refuse)
    next(reading)
    with pytest.raises(KeyError):
        reading.send(b'{"a":1}')
    with pytest.raises(StopIteration):
        reading.send(b"")


# ---------------------------------------------------------------------- what bounds it


def in_chunks(payload, length=512, **options):
    reading = reader(**options)
    document = next(reading)
    for start in range(0, len(payload), length):
        document = reading.send(payload[start : start + length])
    return document


@pytest.mark.parametrize("length", [1, 512, 100000])
def test_the_longest_string_of_the_hub_is_read_whichever_way_it_is_written(length):
    for text, ascii_only in (
        ("x" * 4096, True),
        ("\x01" * 4096, True),
        ("😀" * 1024, True),
        ("😀" * 1024, False),
    ):
        payload = json.dumps({text: text}, ensure_ascii=ascii_only).encode()
        assert in_chunks(payload, length) == {text: text}


@pytest.mark.parametrize("options", [{}, {"keep": ()}], ids=["built", "skipped"])
@pytest.mark.parametrize("length", [1, 512])
def test_a_longer_string_is_refused(length, options):
    with pytest.raises(ValueError, match="too long"):
        in_chunks(b'{"a":"' + b"x" * 30000 + b'"}', length, **options)


@pytest.mark.parametrize("length", [1, 512, 100000])
def test_a_string_is_24576_bytes_at_most(length):
    text = "x" * 24576
    assert in_chunks(f'{{"a":"{text}"}}'.encode(), length) == {"a": text}
    with pytest.raises(ValueError, match="too long"):
        in_chunks(f'{{"a":"{text}x"}}'.encode(), length)


@pytest.mark.parametrize("length", [1, 7, 100000])
def test_a_number_is_400_bytes_at_most(length):
    digits = "9" * 400
    assert in_chunks(b'{"a":%s}' % digits.encode(), length) == {"a": int(digits)}
    with pytest.raises(ValueError, match="too long"):
        in_chunks(b'{"a":%s1}' % digits.encode(), length)


def test_a_document_is_256_kib_at_most():
    payload = b'{"a":1' + b" " * 262137 + b"}"
    assert in_chunks(payload) == {"a": 1}
    with pytest.raises(ValueError, match="too large"):
        in_chunks(payload + b" ")


@pytest.mark.parametrize(
    "payload",
    [b'{"' + b"x" * 200000, b'{"a"' + b" " * 200000, b'{"a":' + b"1" * 200000, b'{"a":t' + b" " * 200000],
    ids=["string", "space before a colon", "number", "word"],
)
def test_no_more_than_one_token_is_remembered(payload):
    reading = reader()
    next(reading)

    def send_it():
        for start in range(0, 30000, 512):
            reading.send(payload[start : start + 512])
            assert len(reading.gi_frame.f_locals["data"]) < 24576 + 1024
        reading.send(b"x")

    with pytest.raises(ValueError, match=r"too long|no JSON|Expecting value"):
        send_it()


def peak(payload, **options):
    """The most memory that reading took, in bytes."""
    chunks = [payload[start : start + 512] for start in range(0, len(payload), 512)]
    reading = reader(**options)
    next(reading)
    tracemalloc.start()
    try:
        for chunk in chunks:
            reading.send(chunk)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LARGE = {
    f"group{group}": {f"property{i}": [i, "text", {"a": 1.5}] for i in range(100)} for group in range(20)
}
LARGE_TWIN = json.dumps({"desired": {**LARGE, "$version": 1}, "reported": {**LARGE, "$version": 2}}).encode()


@pytest.mark.parametrize(
    "options",
    [{"keep": ()}, {"keep": ("nothing",)}, {"keep": (), "on_property": lambda path, value: None}],
    ids=["nothing kept", "nothing found", "handed over"],
)
def test_what_is_not_built_takes_no_memory(options):
    assert len(LARGE_TWIN) > 100000
    assert peak(LARGE_TWIN, twin=True, **options) < 8192
    assert peak(LARGE_TWIN, twin=True) > 100000


def test_reading_what_has_not_changed_takes_the_memory_of_one_object():
    old = in_chunks(LARGE_TWIN, twin=True)
    assert peak(LARGE_TWIN, twin=True, old=old) < 32768


def test_a_key_that_comes_again_is_one_string():
    found = in_chunks(b'{"a":{"telemetryInterval":"celsius"},"b":{"telemetryInterval":"celsius"}}', 7)
    (key, value), (key_again, value_again) = next(iter(found["a"].items())), next(iter(found["b"].items()))
    assert key is key_again
    assert value is value_again


def lines(payload, **options):
    """How many lines of the parser reading takes: a measure of time that is the same on every machine."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_globals["__name__"] != reader.__module__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        in_chunks(payload, **options)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("shape", ["nested", "flat"])
def test_skipping_costs_less_than_half_of_building(shape):
    flat = {f"property{i}": i if i % 2 else "text" for i in range(500)}
    payload = json.dumps(LARGE if shape == "nested" else flat, separators=(",", ":")).encode()
    assert lines(payload, keep=()) * 2 < lines(payload)
