"""The query language: what each query selects, and where a wrong one is wrong."""

import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twin_device.hub.query import QueryError, parse, parse_condition, run


def device(name: str, **members: Any) -> dict[str, Any]:
    return {
        "deviceId": name,
        "status": "enabled",
        "version": 2,
        "tags": members.get("tags", {}),
        "properties": {"desired": members.get("desired", {}), "reported": members.get("reported", {})},
        "capabilities": {"iotEdge": False},
    }


DEVICES = [
    device(
        "sensor-1",
        tags={"location": {"building": "A", "floor": 3, "region": "EU"}},
        desired={"firmwareVersion": "2.3", "$version": 4},
        reported={
            "firmwareVersion": "2.2",
            "batteryLevel": 15,
            "telemetryConfig": {"status": "Success"},
            "list": [1, 2],
        },
    ),
    device(
        "sensor-2",
        tags={"location": {"building": "A", "floor": 1, "region": "US"}, "odd key!": "x"},
        desired={"firmwareVersion": "2.3"},
        reported={
            "firmwareVersion": "2.3",
            "batteryLevel": 80,
            "telemetryConfig": {"status": "Failed"},
            "ok": True,
        },
    ),
    device(
        "gateway",
        tags={"location": {"building": "B", "floor": 3}},
        reported={"batteryLevel": "full", "connectivity": {"type": "lte"}, "nothing": None},
    ),
]
ALL = ["sensor-1", "sensor-2", "gateway"]

SELECTED: list[tuple[str, list[str]]] = [
    ("deviceId = 'sensor-1'", ["sensor-1"]),
    ('DEVICEID = "sensor-1"', ["sensor-1"]),
    ("devices.deviceId = 'sensor-1'", ["sensor-1"]),
    ("properties.desired.firmwareVersion != properties.reported.firmwareVersion", ["sensor-1"]),
    ("properties.desired.firmwareVersion <> properties.reported.firmwareVersion", ["sensor-1"]),
    ("tags.location.floor = 3 AND properties.reported.batteryLevel < 20", ["sensor-1"]),
    ("tags.location.region IN ['US', 'EU'] AND is_defined(properties.reported.ok)", ["sensor-2"]),
    ("tags.location.region NIN ['US']", ["sensor-1"]),
    ("properties.reported.batteryLevel NIN [15]", ["sensor-2"]),
    ("NOT properties.reported.batteryLevel IN [15]", ["sensor-2"]),
    ("properties.reported.batteryLevel IN [80, 'full']", ["sensor-2", "gateway"]),
    ("deviceId NIN ['gateway', undefined]", []),
    ("deviceId IN []", []),
    ("deviceId NIN []", ALL),
    ("tags.location.region in ('US')", ["sensor-2"]),
    ("NOT is_defined(tags.location.region)", ["gateway"]),
    ("capabilities.iotEdge = true", []),
    ("NOT capabilities.iotEdge", ALL),
    ("STARTSWITH(deviceId, 'sensor-')", ["sensor-1", "sensor-2"]),
    ("ends_with(deviceId, '1') OR contains(deviceId, 'way')", ["sensor-1", "gateway"]),
    ("properties.desired.$version = 4", ["sensor-1"]),
    ("tags.[[odd key!]] = 'x'", ["sensor-2"]),
    ("tags['odd key!'] = 'x'", ["sensor-2"]),
    ("properties.reported.list[1] = 2", ["sensor-1"]),
    ("properties.reported.list[2] = 2", []),
    ("properties.reported.list.x = 2 OR deviceId[0] = 's'", []),
    ("Tags.location.floor = 1", ["sensor-2"]),
    ("tags.Location.floor = 1", []),
    ("[[deviceId]] = 'gateway'", ["gateway"]),
    ("tags.größe = 1 OR tags.from = 1", []),
    # Different types, and what is not there, select nothing.
    ("properties.reported.batteryLevel > 10", ["sensor-1", "sensor-2"]),
    ("properties.reported.batteryLevel != 15", ["sensor-2"]),
    ("properties.reported.nowhere != 1", []),
    ("NOT (properties.reported.nowhere = 1)", []),
    ("properties.reported.nowhere = undefined", []),
    ("properties.reported.ok = 1", []),
    ("properties.reported.ok", ["sensor-2"]),
    ("version", []),
    ("properties.reported.nothing = null", ["gateway"]),
    ("properties.reported.ok != null", ["sensor-2"]),
    ("is_null(properties.reported.nothing)", ["gateway"]),
    # A known false or true decides, whatever is undefined beside it.
    ("properties.reported.nowhere = 1 OR deviceId = 'gateway'", ["gateway"]),
    ("NOT (properties.reported.nowhere = 1 AND deviceId = 'gateway')", ["sensor-1", "sensor-2"]),
    # Precedence and arithmetic.
    ("deviceId = 'gateway' OR deviceId = 'sensor-1' AND false", ["gateway"]),
    ("(deviceId = 'gateway' OR deviceId = 'sensor-1') AND false", []),
    ("NOT false AND true", ALL),
    ("1 + 2 * 3 = 7", ALL),
    ("(1 + 2) * 3 = 9", ALL),
    ("10 - 2 - 3 = 5", ALL),
    ("-7 % 4 = -3", ALL),
    ("7 / 2 = 3.5", ALL),
    ("1 / 0 = 1", []),
    ("1 / 0 != 1", []),
    ("7 % 0 = 0 OR 1e308 * 10 > 0 OR 'a' + 'b' = 'ab' OR true + 1 = 2", []),
    ("2 + 2 = 4.0 AND 9007199254740993 = 0x20000000000001", ALL),
    ("0x1F = 31 AND 1e2 = 100 AND .5 = 0.5", ALL),
    ("version - 1 = 1", ALL),
    ("version * 2 > 3", ALL),
    ("'a' < 'b'", ALL),
    (r"'it\'s' = 'it\u0027s'", ALL),
    (r"'\ud83d\ude00' = '😀' AND length('\\') = 1", ALL),
    ("true > false", []),
    ("5", []),
    ("'true'", []),
    ("NOT 5 OR NOT undefined OR NOT null", []),
    ("[1] = [1] OR [1] != [2]", []),
    ("tags = tags", []),
    ("length(deviceId) = 8 AND upper(deviceId) = 'SENSOR-1'", ["sensor-1"]),
    ("substring(deviceId, 7) = '1' OR index_of(deviceId, 'way') = 4", ["sensor-1", "gateway"]),
    ("concat('a', 'b') = 'ab' AND abs(-1) = 1 AND floor(1.5) = 1 AND power(2, 3) = 8 AND sign(-2) = -1", ALL),
    ("ceiling(1.2) = 2 AND square(3) = 9 AND exp(0) = 1 AND sqrt(16) = 4 AND lower('A') = 'a'", ALL),
    ("substring('abc', 4 / 2) = 'c' AND substring('abc', 1, 1) = 'b' AND substring('abc', 9) = ''", ALL),
    ("substring('abc', -1) = 'c' OR substring('abc', 0.5) = 'abc' OR substring(5, 0) = '5'", []),
    ("sqrt(-1) = 0 OR power(10, 400) > 0 OR power(-8, 0.5) = 0 OR exp(1000) > 0 OR abs('1') = 1", []),
    (
        "is_object(properties.reported.connectivity) AND is_string(properties.reported.batteryLevel)",
        ["gateway"],
    ),
    ("is_number(properties.reported.ok)", []),
    ("is_bool(properties.reported.ok)", ["sensor-2"]),
    ("is_array(properties.reported.list) AND is_primitive(version)", ["sensor-1"]),
]


@pytest.mark.parametrize(("condition", "expected"), SELECTED, ids=[condition for condition, _ in SELECTED])
def test_a_condition_selects(condition: str, expected: list[str]) -> None:
    for query in (parse(f"SELECT * FROM devices WHERE {condition}"), parse_condition(condition)):
        assert [one["deviceId"] for one in run(query, DEVICES)] == expected
    rows = run(parse(f"select deviceId from DEVICES where {condition}"), DEVICES)
    assert rows == [{"deviceId": name} for name in expected]


@pytest.mark.parametrize("condition", ["", "*", "  "])
def test_no_condition_is_all(condition: str) -> None:
    assert run(parse_condition(condition), DEVICES) == DEVICES


PROJECTED: list[tuple[str, list[Any]]] = [
    (
        "SELECT TOP 2 deviceId, tags.location.floor FROM devices",
        [{"deviceId": "sensor-1", "floor": 3}, {"deviceId": "sensor-2", "floor": 1}],
    ),
    ("SELECT tags.location.region AS r FROM devices", [{"r": "EU"}, {"r": "US"}, {}]),
    (
        "SELECT TOP 1 deviceId, tags FROM devices",
        [{"deviceId": "sensor-1", "tags": {"location": {"building": "A", "floor": 3, "region": "EU"}}}],
    ),
    (
        "SELECT tags['odd key!'], properties.reported.list[1], properties.desired.$version FROM devices",
        [{"list": 2, "$version": 4}, {"odd key!": "x"}, {}],
    ),
    ("SELECT tags.[[odd key!]] AS [[a b]] FROM devices WHERE deviceId = 'sensor-2'", [{"a b": "x"}]),
    (
        "SELECT deviceId FROM devices WHERE properties.desired.firmwareVersion != "
        "properties.reported.firmwareVersion",
        [{"deviceId": "sensor-1"}],
    ),
    ("SELECT COUNT() FROM devices", [{"count": 3}]),
    ("SELECT TOP 1 tags.location.floor FROM devices GROUP BY devices.tags.location.floor", [{"floor": 3}]),
    ("SELECT COUNT() FROM devices WHERE false GROUP BY status", []),
    ("SELECT STATUS, COUNT() FROM devices GROUP BY status", [{"STATUS": "enabled", "count": 3}]),
    ("SELECT COUNT() AS n FROM devices WHERE false", [{"n": 0}]),
    (
        "SELECT AVG(properties.reported.batteryLevel) AS mean, MIN(properties.reported.batteryLevel) AS low, "
        "max(properties.reported.batteryLevel) AS high, SUM(tags.location.floor) FROM devices",
        [{"mean": 47.5, "low": 15, "high": 80, "sum": 7}],
    ),
    (
        "SELECT COUNT() AS n, tags.location.building FROM devices GROUP BY tags.location.building",
        [{"n": 2, "building": "A"}, {"n": 1, "building": "B"}],
    ),
    (
        "SELECT properties.reported.telemetryConfig.status AS status, COUNT() AS numberOfDevices "
        "FROM devices GROUP BY properties.reported.telemetryConfig.status",
        [
            {"status": "Success", "numberOfDevices": 1},
            {"status": "Failed", "numberOfDevices": 1},
            {"numberOfDevices": 1},
        ],
    ),
    (
        "SELECT tags.location.building, tags.location.floor, COUNT() AS n FROM devices "
        "GROUP BY tags.location.building, tags.location.floor",
        [
            {"building": "A", "floor": 3, "n": 1},
            {"building": "A", "floor": 1, "n": 1},
            {"building": "B", "floor": 3, "n": 1},
        ],
    ),
    ("SELECT AVG(deviceId) AS nothing FROM devices", [{}]),
]


@pytest.mark.parametrize(("text", "rows"), PROJECTED, ids=[text for text, _ in PROJECTED])
def test_a_projection_gives_rows(text: str, rows: list[Any]) -> None:
    query = parse(text)
    assert query.is_raw
    assert run(query, DEVICES) == rows


def test_everything_is_the_documents_themselves() -> None:
    query = parse("SELECT * FROM devices.modules WHERE devices.modules.status = 'enabled'")
    assert (query.collection, query.is_raw) == ("devices.modules", False)
    assert all(row is one for row, one in zip(run(query, DEVICES), DEVICES, strict=True))
    jobs = parse("SELECT * FROM devices.jobs WHERE devices.jobs.jobId = 'j1'")
    assert run(jobs, [{"jobId": "j1"}, {"jobId": "j2"}]) == [{"jobId": "j1"}]


WRONG: list[tuple[str, int]] = [
    ("", 0),
    ("SELECT", 6),
    ("SELECT FROM devices", 7),
    ("SELECT a, FROM devices", 10),
    ("SELECT a b FROM devices", 9),
    ("SELECT a.b, c.b FROM devices", 12),
    ("SELECT MIN(a), min(b) FROM devices", 15),
    ("SELECT length(a) FROM devices", 7),
    ("SELECT * FROM devices.", 22),
    ("SELECT * FROM devices WHERE AND a", 28),
    ("SELECT * FROM devices WHERE a AND", 33),
    ("SELECT * FROM devices WHERE tags.group = 1", 33),
    ("SELECT * FROM devices WHERE a[1.5] = 1", 30),
    ("SELECT * FROM devices WHERE a IN ['b',]", 38),
    ("SELECT * FROM devices WHERE a = 1e999", 32),
    (r"SELECT * FROM devices WHERE a = 'x\u12'", 34),
    ("SELECT * FROM devices WHERE a = " + "1" * 5000, 32),
    ("SELECT TOP " + "1" * 5000 + " * FROM devices", 11),
    ("SELECT * FROM nowhere", 14),
    ("SELECT * FROM devices WHERE", 27),
    ("SELECT * FROM devices WHERE a ==  1", 31),
    ("SELECT * FROM devices WHERE a = 'x", 32),
    ("SELECT * FROM devices WHERE (a = 1", 34),
    ("SELECT * FROM devices WHERE a = 1 b", 34),
    ("SELECT * FROM devices WHERE nosuch(a)", 28),
    ("SELECT * FROM devices WHERE is_defined(a, b)", 28),
    ("SELECT * FROM devices WHERE a IN 1", 33),
    ("SELECT * FROM devices WHERE a = 12abc", 32),
    ("SELECT TOP 0 * FROM devices", 11),
    ("SELECT * FROM devices GROUP BY a", 22),
    ("SELECT a, COUNT() FROM devices GROUP BY b", 7),
    ("SELECT COUNT(), a FROM devices", 16),
    ("SELECT tags.a, COUNT() FROM devices GROUP BY tags.A", 7),
    ("SELECT COUNT() FROM devices.jobs", 7),
    ("SELECT jobId FROM devices.jobs", 7),
    ("SELECT COUNT(a) FROM devices", 13),
    ("SELECT * FROM devices; DROP", 21),
    ("SELECT * FROM devices WHERE a.", 30),
    ("SELECT * FROM devices WHERE " + "(" * 60 + "1", 79),
    ("SELECT * FROM devices WHERE " + "NOT " * 60 + "true", 232),
    ("SELECT *\nFROM devices\nWHERE =", 28),
]


@pytest.mark.parametrize(("text", "position"), WRONG, ids=[text[:60] for text, _ in WRONG])
def test_a_wrong_query_says_where(text: str, position: int) -> None:
    with pytest.raises(QueryError) as raised:
        parse(text)
    assert raised.value.position == position
    assert f"line {text.count(chr(10), 0, position) + 1}, column " in str(raised.value)


def test_a_query_has_a_limit() -> None:
    with pytest.raises(QueryError, match="8192"):
        parse("SELECT * FROM devices WHERE a = '" + "x" * 8192 + "'")


@pytest.mark.parametrize(
    "text",
    ["1" * 8000 + "x", "[" * 8000, "[[a" * 2600, "'" + "\\'" * 4000, "a " * 4000, "- " * 4000, "0x" * 4000],
)
def test_no_text_takes_long(text: str) -> None:
    begun = time.thread_time()
    with pytest.raises(QueryError):
        parse_condition(text)
    assert time.thread_time() - begun < 0.2


@pytest.mark.parametrize(
    "text",
    [
        "(" * 50 + "true" + ")" * 50,
        "NOT " * 50 + "true",
        "0 = " + "-" * 50 + "0",
        "abs(" * 50 + "1" + ")" * 50,
    ],
)
def test_what_may_be_nested_can_be_run(text: str) -> None:
    def deep(frames: int) -> list[Any]:
        return deep(frames - 1) if frames else run(parse_condition(text), DEVICES)

    assert len(deep(250)) in (0, 3)
    for wide in (
        " OR ".join(["false"] * 900),
        " + ".join(["1"] * 2000),
        "a IN [" + ",".join("1" * 4000) + "]",
    ):
        assert run(parse_condition(wide), DEVICES) == []


def test_groups_are_of_the_same_values() -> None:
    query = parse("SELECT COUNT() AS n FROM devices GROUP BY a")
    values: list[Any] = [
        1,
        1.0,
        True,
        "1",
        None,
        [1, 2],
        [[1], 2],
        {"x": 1, "y": 2},
        {"y": 2.0, "x": 1},
        {"x": {}},
    ]
    found = run(query, [*({"a": value} for value in values), {}, {"A": "1"}])
    assert [row["n"] for row in found] == [2, 1, 2, 1, 1, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("aggregate", "values", "expected"),
    [
        ("SUM", [1, 2.5, True, "4", None, [5]], 3.5),
        ("SUM", [2**62, 2**62], 2.0**63),
        ("SUM", [1.5, 10**400], None),
        ("SUM", [10**400], None),
        ("SUM", [1e308, 1e308], None),
        ("AVG", [1, 2], 1.5),
        ("AVG", [10**400], None),
        ("MIN", ["a", 3, 2.5], 2.5),
        ("MAX", [False, -1, -2], -1),
        ("MAX", ["a", None], None),
    ],
)
def test_an_aggregate_is_of_numbers(aggregate: str, values: list[Any], expected: Any) -> None:
    rows = run(parse(f"SELECT {aggregate}(a) AS n FROM devices"), [{"a": value} for value in values])
    assert rows == [{} if expected is None else {"n": expected}]


WORDS = """
    select * from devices devices.modules where group by and or not in nin ( ) [ ] , . = != < - + / % 'x' 1
    as b 0x1 true null undefined is_defined length substring power a tags.b [[c]] ['d'] count() avg( a[0] top
    $version 1e308 \\
"""

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=6,
)
documents = st.lists(
    st.dictionaries(st.sampled_from(["a", "A", "b", "tags", "c"]), values, max_size=4), max_size=4
)
ATOMS = [
    "a",
    "tags.b",
    "B",
    "c[0]",
    "1",
    "-2.5",
    "'x'",
    "null",
    "undefined",
    "true",
    "[1, 'x']",
    "0x10",
    "1e308",
]
NAMES = """
    is_defined is_null is_bool is_number is_string is_object is_array is_primitive length lower upper abs
    ceiling floor exp sign sqrt square
"""
PAIRS = "startswith ends_with contains index_of concat substring power"
SIGNS = ["+", "-", "*", "/", "%", "=", "!=", "<>", "<", ">", "<=", ">=", "and", "or"]
expressions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(SIGNS), inner),
        st.builds("{}({})".format, st.sampled_from(NAMES.split()), inner),
        st.builds("{}({}, {})".format, st.sampled_from(PAIRS.split()), inner, inner),
        st.builds("({} {} [{}, {}])".format, inner, st.sampled_from(["in", "NIN"]), inner, inner),
        st.builds("(not {})".format, inner),
        st.builds("(- {})".format, inner),
    ),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS.split()), max_size=30).map(" ".join)))
def test_no_text_gives_another_error(text: str) -> None:
    for query_of in (parse, parse_condition):
        with suppress(QueryError):
            run(query_of(text), [*DEVICES, {}, {"a": [{}], "tags": 5}])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(expressions, documents)
def test_no_document_gives_an_error(expression: str, found: list[dict[str, Any]]) -> None:
    for row in run(parse_condition(expression), found):
        assert any(row is one for one in found)
    run(
        parse("SELECT a, COUNT(), AVG(b), SUM(b), MIN(c), MAX(c) AS m FROM devices GROUP BY a, tags.b"), found
    )
    assert len(run(parse(f"SELECT a, tags.b, c[0] FROM devices WHERE {expression} or true"), found)) == len(
        found
    )


# A condition as a tree: a leaf's text and value (None is undefined), or a sign and its terms.
LEAVES = [
    ("true", True),
    ("false", False),
    ("nowhere", None),
    ("1 = 1", True),
    ("'a' IN ['b']", False),
    ("2 < 'x'", None),
]
STRENGTH = {"OR": 0, "AND": 1, "NOT": 2}
trees = st.recursive(
    st.sampled_from(LEAVES).map(lambda leaf: ("leaf", *leaf)),
    lambda inner: st.tuples(st.sampled_from(["OR", "AND"]), inner, inner) | st.tuples(st.just("NOT"), inner),
    max_leaves=10,
)


def shown(tree: tuple[Any, ...], least: int = 0) -> str:
    """With only the brackets that the order of NOT, AND, OR asks for."""
    if tree[0] == "leaf":
        return str(tree[1])
    strength = STRENGTH[tree[0]]
    terms = [shown(term, strength) for term in tree[1:]]
    text = f"NOT {terms[0]}" if len(terms) == 1 else f" {tree[0]} ".join(terms)
    return text if strength >= least else f"({text})"


def meant(tree: tuple[Any, ...]) -> bool | None:
    """Kleene's three values in the order false, undefined, true."""
    if tree[0] == "leaf":
        value: bool | None = tree[2]
        return value
    order = [False, None, True]
    ranks = [order.index(meant(term)) for term in tree[1:]]
    return order[2 - ranks[0] if tree[0] == "NOT" else max(ranks) if tree[0] == "OR" else min(ranks)]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(trees)
def test_conditions_bind_as_their_tree(tree: tuple[Any, ...]) -> None:
    text = shown(tree)
    assert bool(run(parse_condition(text), [{}])) is (meant(tree) is True)
    assert bool(run(parse_condition(f"NOT ({text})"), [{}])) is (meant(tree) is False)


@st.composite
def sums(draw: st.DrawFn, depth: int = 3) -> str:
    if depth == 0 or draw(st.booleans()):
        return str(draw(st.integers(0, 9)))
    sign = draw(st.sampled_from(["+", "-", "*"]))
    left, right = draw(sums(depth=depth - 1)), draw(sums(depth=depth - 1))
    return f"({left} {sign} {right})" if draw(st.booleans()) else f"{left} {sign} {right}"


@settings(deadline=None, derandomize=True)
@given(sums(), sums())
def test_arithmetic_is_arithmetic(left: str, right: str) -> None:
    # Python's own reading of the same text.
    expected = eval(left) < eval(right)
    assert bool(run(parse_condition(f"{left} < {right}"), [{}])) is expected
