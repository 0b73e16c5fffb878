"""JSON merge patches (RFC 7396), and the hub's limits for what a device may report."""

import copy as std
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twin_device.core import patch as patches
from twin_device.core.errors import PatchError
from twin_device.core.patch import check, check_section, compose, copy, diff, dumps, loads, merge, same, size

FIXED = settings(derandomize=True, deadline=None, max_examples=300)

# Few keys and values, so that documents meet often; true beside 1 and 0 beside false on purpose.
KEYS = st.sampled_from(["a", "b", "c"])
SCALARS = st.sampled_from([True, False, 0, 1, 1.5, "", "x"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=2),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=3)
PATCHES = st.dictionaries(
    KEYS,
    st.recursive(
        st.none() | SCALARS | st.lists(SCALARS, max_size=2),
        lambda inner: st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=3,
)


def merged(target, patch):
    """RFC 7396, section 2, word by word."""
    if isinstance(patch, dict):
        if not isinstance(target, dict):
            target = {}
        target = dict(target)
        for name, value in patch.items():
            if value is None:
                if name in target:
                    del target[name]
            else:
                target[name] = merged(target.get(name), value)
        return target
    return patch


def canonical(value):
    """A text that tells true from 1, but not 1 from 1.0 (JSON has one kind of number)."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(member) for member in value) + "]"
    return json.dumps(float(value) if type(value) is int else value)


def parts_of(value):
    """The ids of every dict and list in value."""
    if isinstance(value, dict):
        return {id(value)}.union(*[parts_of(member) for member in value.values()])
    if isinstance(value, list):
        return {id(value)}.union(*[parts_of(member) for member in value])
    return set()


# ---------------------------------------------------------------------- merge

# RFC 7396, appendix A, those rows whose patch is an object: target, patch, result.
MERGES = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    # What else the hub does.
    ({}, {"p": {"q": None}}, {"p": {}}),
    ({"p": {}}, {"p": {"q": None}}, {"p": {}}),
    ({"p": 5}, {"p": {"q": None}}, {"p": {}}),
    ({"p": {"q": 1}}, {"p": 5}, {"p": 5}),
    ({"p": {"q": 1}}, {"p": {}}, {"p": {"q": 1}}),
    ({"a": 1}, {"zz": None}, {"a": 1}),
    (None, {"a": 1}, {"a": 1}),
]


@pytest.mark.parametrize(("target", "patch", "result"), MERGES, ids=repr)
def test_merge_follows_rfc_7396(target, patch, result):
    assert merge(target, patch) == result
    assert merged(target, patch) == result


@FIXED
@given(DOCUMENTS, PATCHES)
def test_merge_agrees_with_the_rfcs_own_words(document, patch):
    assert canonical(merge(document, patch)) == canonical(merged(document, patch))


@FIXED
@given(DOCUMENTS, PATCHES)
def test_merge_changes_neither_side_and_shares_nothing_with_the_patch(document, patch):
    before = std.deepcopy((document, patch))
    result = merge(document, patch)
    assert (document, patch) == before
    assert not parts_of(result) & parts_of(patch)


@FIXED
@given(DOCUMENTS, PATCHES)
def test_merge_copies_only_the_way_to_what_it_touches(document, patch):
    result = merge(document, patch)
    for key, value in document.items():
        if key not in patch:
            assert result[key] is value


@FIXED
@given(DOCUMENTS, PATCHES)
def test_merging_twice_is_merging_once(document, patch):
    once = merge(document, patch)
    assert canonical(merge(once, patch)) == canonical(once)


def test_copy_is_equal_and_shares_nothing():
    document = {"a": [1, {"b": []}], "c": {"d": {}}, "e": None}
    other = copy(document)
    assert other == document
    assert not parts_of(other) & parts_of(document)
    assert copy(5) == 5


# ---------------------------------------------------------------------- same, diff

SAMES = [
    (True, 1, False),
    (1, True, False),
    (False, 0, False),
    (0, 0, True),
    (1, 1.0, True),
    ("", 0, False),
    (None, None, True),
    (None, False, False),
    ("1", 1, False),
    ([], {}, False),
    ({}, [], False),
    ({}, None, False),
    ([True], [1], False),
    ([1, 2], [2, 1], False),
    ([1], [1, 1], False),
    ({"a": 1}, {"b": 1}, False),
    ({"a": None}, {"b": None}, False),
    ({"a": True}, {"a": 1}, False),
    ({"a": [{"b": 0}]}, {"a": [{"b": False}]}, False),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
]


@pytest.mark.parametrize(("one", "other", "expected"), SAMES, ids=repr)
def test_same_is_equality_of_json_not_of_python(one, other, expected):
    assert same(one, other) is expected
    assert same(other, one) is expected


@FIXED
@given(VALUES, VALUES)
def test_same_agrees_with_canonical_text(one, other):
    assert same(one, other) == (canonical(one) == canonical(other))
    assert same(one, std.deepcopy(one))


# old, new, patch
DIFFS = [
    ({}, {}, {}),
    ({"a": 1}, {"a": 1}, {}),
    ({"a": 1}, {"a": True}, {"a": True}),
    ({"a": 1}, {}, {"a": None}),
    ({}, {"a": {}}, {"a": {}}),
    ({"a": {}}, {"a": {}}, {}),
    ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": None}}),
    ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, {"a": {"c": 3}}),
    ({"a": [1, 2]}, {"a": [1, 3]}, {"a": [1, 3]}),
    ({"a": [1]}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ({"a": {"b": 1}}, {"a": 5}, {"a": 5}),
    ({"a": {"b": 1}, "d": 1}, {"c": 1, "d": 1}, {"a": None, "c": 1}),
]


@pytest.mark.parametrize(("old", "new", "expected"), DIFFS, ids=repr)
def test_diff_is_the_smallest_patch(old, new, expected):
    patch = diff(old, new)
    assert canonical(patch) == canonical(expected)
    assert merge(old, patch) == new


@FIXED
@given(DOCUMENTS, DOCUMENTS)
@example({"a": {"b": 1}}, {"a": {}})
@example({"a": 1}, {"a": True})
def test_merging_the_difference_leads_to_the_new_document(old, new):
    before = std.deepcopy((old, new))
    patch = diff(old, new)
    assert canonical(merge(old, patch)) == canonical(new)
    assert (patch == {}) == (canonical(old) == canonical(new))
    assert not parts_of(patch) & parts_of(old)
    assert (old, new) == before


def leaves(patch, way=()):
    """Every way to a member of a patch that is no object, or an empty one."""
    for key, value in patch.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*way, key))
        else:
            yield (*way, key)


def without(patch, way):
    patch = dict(patch)
    if len(way) == 1:
        del patch[way[0]]
    else:
        patch[way[0]] = without(patch[way[0]], way[1:])
        if not patch[way[0]]:
            del patch[way[0]]
    return patch


@FIXED
@given(DOCUMENTS, DOCUMENTS)
def test_no_member_of_a_difference_can_be_spared(old, new):
    patch = diff(old, new)
    for way in leaves(patch):
        assert canonical(merge(old, without(patch, way))) != canonical(new)


# ---------------------------------------------------------------------- compose

# first, second, what does both (None: no patch can)
COMPOSED = [
    ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    ({"a": 1}, {"a": 2}, {"a": 2}),
    ({"a": 1}, {"a": None}, {"a": None}),
    ({"a": None}, {"a": 1}, {"a": 1}),
    ({"a": None}, {"a": [1]}, {"a": [1]}),
    ({"a": None}, {"a": {"c": 2}}, None),
    ({"a": None}, {"a": {}}, None),
    ({"a": 1}, {"a": {"c": 2}}, None),
    ({"a": [1]}, {"a": {"c": 2}}, None),
    ({"a": {"b": None}}, {"a": {"b": {"c": 1}}}, None),
    ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
    ({"a": {"b": 1}}, {"a": {"b": None}}, {"a": {"b": None}}),
    ({"a": {"b": 1}}, {"a": 5}, {"a": 5}),
    ({"a": {"b": 1}}, {"a": None}, {"a": None}),
    ({}, {"a": {"b": None}}, {"a": {"b": None}}),
]


@pytest.mark.parametrize(("first", "second", "expected"), COMPOSED, ids=repr)
def test_two_patches_compose_or_cannot(first, second, expected):
    assert compose(first, second) == expected


@FIXED
@given(PATCHES, PATCHES, DOCUMENTS)
def test_a_composed_patch_does_what_both_do_one_after_the_other(first, second, document):
    before = std.deepcopy((first, second))
    both = compose(first, second)
    assert (first, second) == before
    if both is not None:
        assert canonical(merge(document, both)) == canonical(merge(merge(document, first), second))
        assert not parts_of(both) & parts_of(second)


@FIXED
@given(PATCHES, PATCHES)
def test_compose_gives_up_only_where_an_object_replaces(first, second):
    def replaces(one, other):
        return any(
            isinstance(value, dict)
            and key in one
            and (not isinstance(one[key], dict) or replaces(one[key], value))
            for key, value in other.items()
        )

    assert (compose(first, second) is None) == replaces(first, second)


@FIXED
@given(PATCHES, PATCHES, DOCUMENTS)
@example({"a": None}, {"a": {"c": 1}}, {"a": {"b": 1, "c": {"a": 2}}})
@example({"a": 5}, {"a": {"c": {"b": 1}}}, {"a": {"c": {"a": 2, "b": 1}}})
def test_with_a_known_base_patches_always_compose(first, second, base):
    before = std.deepcopy((first, second, base))
    both = compose(first, second, base)
    assert (first, second, base) == before
    wanted = canonical(merge(merge(base, first), second))
    assert canonical(merge(base, both)) == wanted
    # Nobody may know whether the hub merged the first one already.
    assert canonical(merge(merge(base, first), both)) == wanted


# ---------------------------------------------------------------------- size

# value, bytes by the hub's rule
SIZES = [
    ({}, 0),
    ([], 0),
    (None, 0),
    ("", 0),
    (0, 8),
    (1.5, 8),
    (10**15, 8),
    (True, 4),
    (False, 4),
    ("abc", 3),
    ("é", 2),
    ("€", 3),
    ("😀", 4),
    ("a\nb\tc\x00\x1f\x7f", 3),
    ("\x80\x9f", 0),
    ("\xa0", 2),
    ({"a": 1}, 9),
    ({"é": "é"}, 4),
    ({"a": None}, 1),
    ({"ab": {"c": True, "d": "xyz"}}, 2 + 1 + 4 + 1 + 3),
    ({"a": [1, "x", [True]]}, 1 + 8 + 1 + 4),
]


@pytest.mark.parametrize(("value", "expected"), SIZES, ids=ascii)
def test_size_follows_the_hubs_rule(value, expected):
    assert size(value) == expected


# ---------------------------------------------------------------------- check


def nested(depth, kind="object"):
    """A patch whose containers nest depth deep below the section, with a plain value in the last."""
    value = 1
    for level in range(depth, 0, -1):
        value = [value] if kind == "array" or (kind == "mixed" and level % 2) else {"k": value}
    return {"k": value}


ACCEPTED = {
    "nothing": {},
    "null": {"a": None, "b": {"c": None}},
    "booleans": {"a": True, "b": False},
    "largest integer": {"a": 2**52 - 1},
    "smallest integer": {"a": -(2**52)},
    "floats": {"a": 1e308, "b": -0.0, "c": 5e-324, "d": 1e17},
    "key of 1024 bytes": {"k" * 1024: 1},
    "key of 1024 bytes of UTF-8": {"é" * 512: 1},
    "string of 4096 bytes": {"a": "x" * 4096},
    "string of 4096 bytes of UTF-8": {"a": "😀" * 1024},
    "control characters in a string": {"a": "\x00\n\x7f\x9f"},
    "every sign in a string": {"a": ". $#"},
    "other signs in a key": {"-_:/\\\"'@!%&()[]{}<>|~^`+*=?,;": 1},
    "characters beside the forbidden ones in a key": {"!\x7e\xa0¡": 1},
    "empty key": {"": 1},
    "empty containers": {"a": {}, "b": []},
    "10 objects": nested(10),
    "10 arrays": nested(10, "array"),
    "10 of both": nested(10, "mixed"),
    "digits as a key": {"0": 1},
    "characters next to the surrogates": {"\ud7ff\ue000": "\ud7ff\ue000"},
}


@pytest.mark.parametrize("patch", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_the_hub_takes_is_accepted(patch):
    before = std.deepcopy(patch)
    bound = check(patch)
    assert bound >= size(patch)
    assert patch == before


class Word(str):
    pass


class Mapping(dict):
    pass


def test_only_the_patch_itself_may_be_a_kind_of_dict():
    patch = Mapping(a={"b": 1})
    assert check(patch) == 1 + 1 + 8
    assert copy(patch) == patch
    assert same(patch, {"a": {"b": 1}})
    with pytest.raises(PatchError, match="a value is a dict"):
        check({"a": Mapping(b=1)})


cycle = {}
cycle["again"] = cycle
loop = []
loop.append(loop)

KEY = "a key has no control character, space, '.', '$' or '#'"
KEY_TYPE = "a key is a str"
KEY_SIZE = "a key is at most 1024 bytes of UTF-8"
KEY_TEXT = "a key must be valid Unicode (no lone surrogate)"
VALUE_TYPE = "a value is a dict, list, str, int, float, bool or None"
STRING_SIZE = "a string is at most 4096 bytes of UTF-8"
STRING_TEXT = "a string must be valid Unicode (no lone surrogate)"
INTEGER = "an integer is from -4503599627370496 to 4503599627370495"
FINITE = "a number must be finite"
NULL = "null removes a key and has no meaning inside an array"
DEPTH = "objects and arrays nest at most 10 deep"
PATCH = "a patch is a JSON object (dict)"

# patch, path, limit, size
REFUSED = {
    "a list": ([], "", PATCH, "list"),
    "null itself": (None, "", PATCH, "NoneType"),
    "text": ("{}", "", PATCH, "str"),
    "key of 1025 bytes": ({"k" * 1025: 1}, "k" * 61 + "...", KEY_SIZE, 1025),
    "key of 1025 bytes of UTF-8": ({"é" * 512 + "x": 1}, "é" * 61 + "...", KEY_SIZE, 1025),
    "dot": ({"a.b": 1}, "a.b", KEY, None),
    "dollar": ({"$version": 1}, "$version", KEY, None),
    "dollar further down": ({"a": {"b$": 1}}, "a.b$", KEY, None),
    "hash": ({"#": 1}, "#", KEY, None),
    "space": ({"a b": 1}, "a b", KEY, None),
    "newline": ({"a\n": 1}, "a\n", KEY, None),
    "NUL": ({"\x00": 1}, "\x00", KEY, None),
    "last of C0": ({"a\x1f": 1}, "a\x1f", KEY, None),
    "DEL": ({"a\x7f": 1}, "a\x7f", KEY, None),
    "first of C1": ({"a\x80": 1}, "a\x80", KEY, None),
    "last of C1": ({"a\x9f": 1}, "a\x9f", KEY, None),
    "bad key whose value removes": ({"a.b": None}, "a.b", KEY, None),
    "bad key in an array": ({"a": [0, {"b.c": 1}]}, "a[1].b.c", KEY, None),
    "integer as a key": ({1: 1}, "[1]", KEY_TYPE, "int"),
    "None as a key": ({"a": {None: 1}}, "a.None", KEY_TYPE, "NoneType"),
    "tuple as a key": ({(1, 2): 1}, "(1, 2)", KEY_TYPE, "tuple"),
    "a kind of str as a key": ({Word("w"): 1}, "'w'", KEY_TYPE, "Word"),
    "lone surrogate in a key": ({"\ud800": 1}, "\ud800", KEY_TEXT, None),
    "lone surrogate": ({"a": "x\udfff"}, "a", STRING_TEXT, None),
    "string of 4097 bytes": ({"a": {"b": "x" * 4097}}, "a.b", STRING_SIZE, 4097),
    "string of 4097 bytes of UTF-8": ({"a": "😀" * 1024 + "x"}, "a", STRING_SIZE, 4097),
    "string in an array": ({"a": [[], ["x" * 5000]]}, "a[1][0]", STRING_SIZE, 5000),
    "integer too large": ({"a": 2**52}, "a", INTEGER, 2**52),
    "integer too small": ({"a": -(2**52) - 1}, "a", INTEGER, -(2**52) - 1),
    "integer in an array": ({"a": [0, 2**60]}, "a[1]", INTEGER, 2**60),
    "NaN": ({"a": math.nan}, "a", FINITE, math.nan),
    "infinity": ({"a": math.inf}, "a", FINITE, math.inf),
    "minus infinity": ({"a": [-math.inf]}, "a[0]", FINITE, -math.inf),
    "null in an array": ({"a": [1, None]}, "a[1]", NULL, None),
    "null in an array in an array": ({"a": [[None]]}, "a[0][0]", NULL, None),
    "null in an object in an array": ({"a": [{"b": {"c": None}}]}, "a[0].b.c", NULL, None),
    "bytes": ({"a": b"x"}, "a", VALUE_TYPE, "bytes"),
    "tuple": ({"a": (1,)}, "a", VALUE_TYPE, "tuple"),
    "set": ({"a": [{1}]}, "a[0]", VALUE_TYPE, "set"),
    "object": ({"a": object()}, "a", VALUE_TYPE, "object"),
    "complex": ({"a": 1j}, "a", VALUE_TYPE, "complex"),
    "a kind of str": ({"a": Word("w")}, "a", VALUE_TYPE, "Word"),
    "11 objects": (nested(11), "k" + ".k" * 10, DEPTH, 11),
    "11 arrays": (nested(11, "array"), "k" + "[0]" * 10, DEPTH, 11),
    "11 of both": (nested(11, "mixed"), "k[0].k[0].k[0].k[0].k[0].k", DEPTH, 11),
    "11 objects, the last one empty": ({"k": nested(10)}, "k" + ".k" * 10, DEPTH, 11),
    "a cycle": (cycle, "again" + ".again" * 10, DEPTH, 11),
    "a cycle of lists": ({"a": loop}, "a" + "[0]" * 10, DEPTH, 11),
}


@pytest.mark.parametrize(("patch", "path", "limit", "size"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_hub_refuses_is_named(patch, path, limit, size):
    with pytest.raises(PatchError) as caught:
        check(patch)
    error = caught.value
    assert (error.path, error.limit) == (path, limit)
    assert error.size is size or error.size == size
    assert error.__cause__ is None


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec=None), max_size=3) | st.integers(), inner, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=10,
)


@FIXED
@given(ANYTHING)
def test_what_is_accepted_can_be_sent_and_anything_else_is_a_patch_error(value):
    try:
        bound = check(value)
    except PatchError:
        return
    assert bound >= size(value)
    assert json.loads(dumps(value).encode()) == value


@FIXED
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_a_key_is_accepted_exactly_if_it_has_no_forbidden_character(key, text):
    bad = [c for c in key if c in ".$# " or ord(c) < 32 or 0x7F <= ord(c) <= 0x9F]
    try:
        check({key: text})
        accepted = True
    except PatchError:
        accepted = False
    assert accepted == (not bad)


def test_a_section_may_have_32768_bytes_and_no_more():
    full = {f"k{index}": "x" * 4094 for index in range(8)}
    assert size(full) == 32768
    check_section(full, {"k0": 1})
    full["k7"] += "x"
    with pytest.raises(PatchError) as caught:
        check_section(full, {"k1": 1, "k7": full["k7"], "k3": None})
    assert caught.value.path == "k7"
    assert caught.value.size == 32769
    assert "32768" in caught.value.limit


def test_control_characters_do_not_count_for_a_section():
    check_section({"k": "\n" * 40000 + "x" * 32767}, {})


# ---------------------------------------------------------------------- loads, dumps

# payload, value
LOADED = [
    (b"{}", {}),
    (b' {"a" : [1, 1.5, true, false, null, "x"]} ', {"a": [1, 1.5, True, False, None, "x"]}),
    ('{"é":"€😀"}'.encode(), {"é": "€😀"}),
    (b'{"a":"\\u00e9\\ud83d\\ude00\\uD83D\\uDE00"}', {"a": "é😀😀"}),
    (b'{"\\ud83d\\ude00":"x\\ud83d\\ude00y"}', {"😀": "x😀y"}),
    # What no UTF-8 can say becomes the replacement character; a backslash before it is none of its own.
    (b'"\\ud800"', "\ufffd"),
    (b'"\\udc00\\ud800x"', "\ufffd\ufffdx"),
    (b'"\\ud83d\\ud83d\\ude00"', "\ufffd😀"),
    (b'"\\ud83d\\u0041"', "\ufffdA"),
    (b'"\\ud83dn\\n"', "\ufffdn\n"),
    (b'"\\\\ud83d\\\\ude00"', "\\ud83d\\ude00"),
    (b'"\\\\\\ud83d\\ude00\\""', '\\😀"'),
    (b"123456789012345678901234567890", 123456789012345678901234567890),
]


@pytest.mark.parametrize(("payload", "value"), LOADED, ids=repr)
def test_json_is_read(payload, value):
    assert loads(payload) == value


NO_JSON = [
    b"",
    b" ",
    b"{",
    b'{"a":1',
    b'{"a"}',
    b"\xff",
    b'{"a":"\xed\xa0\x80"}',
    b"NaN",
    b'{"a":NaN}',
    b"[Infinity]",
    b"-Infinity",
    b"\x00",
    b'{"a":1}}',
    b'"\\ud8"',
    b'"\\ud83d\\u"',
    b'"\\ud83d\\uzzzz"',
    b"\\ud83d",
    b"\xef\xbb\xbf{}",
    b"[" * 100000,
    b"[" * 21 + b"]" * 21,
    b'{"a":' * 21 + b"1" + b"}" * 21,
    b'{"b":[' * 400 + b"]}" * 400,
]


@pytest.mark.parametrize("payload", NO_JSON, ids=lambda payload: repr(payload)[:40])
def test_what_is_no_json_is_an_error_and_nothing_else(payload):
    with pytest.raises((ValueError, RuntimeError)):
        loads(payload)


def test_json_may_nest_20_deep():
    deepest = b'{"a":[' * 10 + b"]}" * 10
    assert loads(deepest) == json.loads(deepest)
    wide = b"[" + b"{}," * 1000 + b"[]]"
    assert len(loads(wide)) == 1001


@FIXED
@given(st.binary(max_size=30) | st.lists(st.sampled_from(['"', "\\u", "d83d", "de00", "\\", "a", "{", "}"])))
def test_reading_rubbish_gives_an_error_or_a_value_that_utf8_can_say(payload):
    payload = payload if isinstance(payload, bytes) else "".join(payload).encode()
    try:
        value = loads(payload)
    except (ValueError, RuntimeError):
        return
    dumps(value).encode()


@FIXED
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_escaped_and_raw_text_read_alike(text):
    assert loads(json.dumps([text]).encode()) == [text]
    assert loads(json.dumps([text], ensure_ascii=False).encode()) == [text]


@FIXED
@given(DOCUMENTS)
def test_what_is_written_is_compact_and_reads_back(document):
    text = dumps(document)
    assert canonical(loads(text.encode())) == canonical(document)
    assert " " not in text


def test_what_is_written_keeps_characters_as_they_are():
    assert dumps({"é": ["😀", 1, True, None]}) == '{"é":["😀",1,true,null]}'


def test_the_limits_are_the_hubs():
    assert (patches.MAX_KEY, patches.MAX_STRING, patches.MAX_DEPTH) == (1024, 4096, 10)
    assert (patches.MIN_INTEGER, patches.MAX_INTEGER) == (-(2**52), 2**52 - 1)
    assert patches.MAX_SECTION == 32768
