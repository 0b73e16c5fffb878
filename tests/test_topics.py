"""The grammar of the twin's topics: what is built, what is understood, what is none of ours."""

import itertools
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twin_device.core import topics
from twin_device.core.topics import DESIRED, REPORT, RESPONSE, RETRIEVE, Topic, parse

FIXED = settings(derandomize=True, deadline=None, max_examples=200)

RES = "$iothub/twin/res/"
PATCH = "$iothub/twin/PATCH/properties/"

# topic, what parse() gives: (kind, status, request_id, version, retry_after) or None
CASES = [
    # Exactly as the hub and the documentation write them.
    ("$iothub/twin/res/200/?$rid=1", (RESPONSE, 200, "1", None, None)),
    ("$iothub/twin/res/204/?$rid=2&$version=124", (RESPONSE, 204, "2", 124, None)),
    ("$iothub/twin/res/429/?$rid=3&retry-after=12", (RESPONSE, 429, "3", None, 12)),
    ("$iothub/twin/PATCH/properties/desired/?$version=13", (DESIRED, None, None, 13, None)),
    ("$iothub/twin/GET/?$rid=1", (RETRIEVE, None, "1", None, None)),
    ("$iothub/twin/PATCH/properties/reported/?$rid=2", (REPORT, None, "2", None, None)),
    ("$iothub/twin/PATCH/properties/reported/?$rid=2&$version=7", (REPORT, None, "2", 7, None)),
    # The order of parameters is nobody's promise.
    ("$iothub/twin/res/429/?retry-after=5&$rid=9", (RESPONSE, 429, "9", None, 5)),
    ("$iothub/twin/res/204/?$version=1&x=y&$rid=a-b", (RESPONSE, 204, "a-b", 1, None)),
    # Percent-encoded, in either case, or not.
    ("$iothub/twin/res/204/?%24rid=2&%24version=12", (RESPONSE, 204, "2", 12, None)),
    ("$iothub/twin/res/204/?$rid=%61%2d%C3%A9", (RESPONSE, 204, "a-é", None, None)),
    ("$iothub/twin/res/204/?$rid=%26%3D", (RESPONSE, 204, "&=", None, None)),
    ("$iothub/twin/res/204/?$rid=2&%24version=%31%32", (RESPONSE, 204, "2", 12, None)),
    # Encoded badly: the text as it stands.
    ("$iothub/twin/res/204/?$rid=%", (RESPONSE, 204, "%", None, None)),
    ("$iothub/twin/res/204/?$rid=%4", (RESPONSE, 204, "%4", None, None)),
    ("$iothub/twin/res/204/?$rid=%zz", (RESPONSE, 204, "%zz", None, None)),
    ("$iothub/twin/res/204/?$rid=%+1%-1", (RESPONSE, 204, "%+1%-1", None, None)),
    ("$iothub/twin/res/204/?$rid=%ff", (RESPONSE, 204, "%ff", None, None)),
    ("$iothub/twin/res/204/?$rid=\ud800%41", (RESPONSE, 204, "\ud800%41", None, None)),
    ("$iothub/twin/res/204/?$rid=%41\ud800", (RESPONSE, 204, "%41\ud800", None, None)),
    # Only the first "=" divides; the first of a repeated parameter counts; the slash before "?" is optional.
    ("$iothub/twin/res/204/?$rid=a=b", (RESPONSE, 204, "a=b", None, None)),
    ("$iothub/twin/res/204/?$rid=1&$rid=2", (RESPONSE, 204, "1", None, None)),
    ("$iothub/twin/res/204/?$rid=1&$version=3&$version=4", (RESPONSE, 204, "1", 3, None)),
    ("$iothub/twin/res/204/?$rid=1&$version=x&$version=4", (RESPONSE, 204, "1", None, None)),
    ("$iothub/twin/res/204?$rid=1", (RESPONSE, 204, "1", None, None)),
    ("$iothub/twin/PATCH/properties/desired?$version=1", (DESIRED, None, None, 1, None)),
    # Without parameters.
    ("$iothub/twin/res/204/", (RESPONSE, 204, None, None, None)),
    ("$iothub/twin/res/204/?", (RESPONSE, 204, None, None, None)),
    ("$iothub/twin/res/204/?$rid", (RESPONSE, 204, "", None, None)),
    ("$iothub/twin/res/204/?$rid=", (RESPONSE, 204, "", None, None)),
    ("$iothub/twin/PATCH/properties/desired/", (DESIRED, None, None, None, None)),
    # No integers.
    ("$iothub/twin/PATCH/properties/desired/?$version=", (DESIRED, None, None, None, None)),
    ("$iothub/twin/PATCH/properties/desired/?$version=x", (DESIRED, None, None, None, None)),
    ("$iothub/twin/PATCH/properties/desired/?$version=-1", (DESIRED, None, None, None, None)),
    ("$iothub/twin/PATCH/properties/desired/?$version=1.0", (DESIRED, None, None, None, None)),
    ("$iothub/twin/PATCH/properties/desired/?$version=1_0", (DESIRED, None, None, None, None)),
    ("$iothub/twin/PATCH/properties/desired/?$version= 1", (DESIRED, None, None, None, None)),
    ("$iothub/twin/PATCH/properties/desired/?$version=²", (DESIRED, None, None, None, None)),
    ("$iothub/twin/PATCH/properties/desired/?$version=" + "9" * 18, (DESIRED, None, None, 10**18 - 1, None)),
    ("$iothub/twin/PATCH/properties/desired/?$version=" + "9" * 5000, (DESIRED, None, None, None, None)),
    ("$iothub/twin/res/429/?$rid=1&retry-after=soon", (RESPONSE, 429, "1", None, None)),
    # Names are case-sensitive, and so is the path.
    ("$iothub/twin/res/204/?$RID=1", (RESPONSE, 204, None, None, None)),
    ("$iothub/twin/RES/204/?$rid=1", None),
    ("$iothub/twin/get/?$rid=1", None),
    # No status.
    ("$iothub/twin/res/", None),
    ("$iothub/twin/res/?$rid=1", None),
    ("$iothub/twin/res/20/?$rid=1", None),
    ("$iothub/twin/res/2000/?$rid=1", None),
    ("$iothub/twin/res/+20/?$rid=1", None),
    ("$iothub/twin/res/2²0/?$rid=1", None),
    ("$iothub/twin/res/ok/?$rid=1", None),
    ("$iothub/twin/res/200/more/?$rid=1", None),
    ("$iothub/twin/res/200//?$rid=1", None),
    # None of ours.
    ("", None),
    ("?", None),
    ("$iothub/twin", None),
    ("$iothub/twin/PATCH/properties/tags/?$version=1", None),
    ("$iothub/twin/PATCH/properties/desired/deep/?$version=1", None),
    ("$iothub/methods/POST/reboot/?$rid=1", None),
    ("devices/d/messages/devicebound/%24.mid=1", None),
]


@pytest.mark.parametrize(("topic", "expected"), CASES, ids=[repr(case[0])[:60] for case in CASES])
def test_a_topic_is_understood_or_none_of_ours(topic, expected):
    assert parse(topic) == (None if expected is None else Topic(*expected))


def test_the_filters_are_the_documented_ones():
    assert topics.FILTERS == ("$iothub/twin/res/#", "$iothub/twin/PATCH/properties/desired/#")


def test_the_builders_build_the_documented_topics():
    assert topics.retrieve_topic("1") == "$iothub/twin/GET/?$rid=1"
    assert topics.report_topic("2") == "$iothub/twin/PATCH/properties/reported/?$rid=2"
    assert topics.report_topic("2", 7) == "$iothub/twin/PATCH/properties/reported/?$rid=2&$version=7"
    assert topics.report_topic("2", 0).endswith("&$version=0")


@FIXED
@given(st.from_regex(r"[A-Za-z0-9-]{1,128}", fullmatch=True), st.none() | st.integers(0, 10**18 - 1))
def test_what_the_builders_build_is_read_back(request_id, version):
    assert parse(topics.retrieve_topic(request_id)) == Topic(RETRIEVE, None, request_id, None, None)
    assert parse(topics.report_topic(request_id, version)) == Topic(REPORT, None, request_id, version, None)


ANY_TEXT = st.text(st.characters(codec=None), max_size=30)  # lone surrogates as well


@FIXED
@given(
    st.integers(100, 599),
    st.text(min_size=1, max_size=20),
    st.none() | st.integers(0, 10**9),
    st.none() | st.integers(0, 10**9),
    st.booleans(),
)
def test_parameters_are_read_in_any_order_and_encoding(
    status, request_id, version, retry_after, encode_names
):
    parameters = [("$rid", request_id), ("$version", version), ("retry-after", retry_after), ("other", "x")]
    pairs = [
        (quote(name, safe="") if encode_names else name) + "=" + quote(str(value), safe="")
        for name, value in parameters
        if value is not None
    ]
    for order in itertools.permutations(pairs):
        topic = f"{RES}{status}/?" + "&".join(order)
        assert parse(topic) == Topic(RESPONSE, status, request_id, version, retry_after)


@FIXED
@given(st.sampled_from(["", RES, RES + "204/?", RES + "204/?$rid=", PATCH + "desired/?"]), ANY_TEXT)
def test_parse_never_raises(head, tail):
    found = parse(head + tail)
    assert found is None or found.kind in (RETRIEVE, REPORT, RESPONSE, DESIRED)
    if found is not None:
        assert (found.status is not None) == (found.kind == RESPONSE)
        assert found.version is None or type(found.version) is int


@FIXED
@given(
    st.lists(
        st.sampled_from([*"%$&=?/", "%2", "%24", "%zz", "é", "1", "rid", "version", "\ud800"]), max_size=12
    )
)
def test_parse_never_raises_on_scraps_of_the_grammar(scraps):
    parse(RES + "204/?" + "".join(scraps))
    parse(PATCH + "desired/?" + "".join(scraps))
