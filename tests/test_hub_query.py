"""The query language: what each query selects, and where a wrong one is wrong."""

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
    ("0x1F = 31 AND 1e2 = 100 AND .5 = 0.5", ALL),
    ("version - 1 = 1", ALL),
    ("version * 2 > 3", ALL),
    ("'a' < 'b'", ALL),
    (r"'it\'s' = 'it\u0027s'", ALL),
    ("true > false", []),
    ("length(deviceId) = 8 AND upper(deviceId) = 'SENSOR-1'", ["sensor-1"]),
    ("substring(deviceId, 7) = '1' OR index_of(deviceId, 'way') = 4", ["sensor-1", "gateway"]),
    ("concat('a', 'b') = 'ab' AND abs(-1) = 1 AND floor(1.5) = 1 AND power(2, 3) = 8 AND sign(-2) = -1", ALL),
    ("sqrt(-1) = 0 OR power(10, 400) > 0", []),
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
    ("SELECT COUNT() FROM devices", [{"count": 3}]),
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
    ("SELECT FROM devices", 12),
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
    ("SELECT a, COUNT() FROM devices GROUP BY b", 31),
    ("SELECT a, COUNT() FROM devices", 30),
    ("SELECT COUNT() FROM devices.jobs", 32),
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


WORDS = """
    select * from devices devices.modules where group by and or not in nin ( ) [ ] , . = != < - + / % 'x' 1
    0x1 true null undefined is_defined length a tags.b [[c]] count() as top
"""


@settings(deadline=None, derandomize=True, max_examples=400)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(WORDS.split()), max_size=30).map(" ".join)))
def test_no_text_gives_another_error(text: str) -> None:
    for query_of in (parse, parse_condition):
        with suppress(QueryError):
            run(query_of(text), [*DEVICES, {}, {"a": [{}], "tags": 5}])


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
