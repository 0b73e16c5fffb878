"""The topics of the device twin: filters, builders, one parser.

Source: IoT Hub, "Communicate with an IoT hub using the MQTT protocol", device twins.
"""

import binascii
from collections import namedtuple

_TWIN = "$iothub/twin/"
_RESPONSE_PATH = _TWIN + "res/"
_PROPERTIES = _TWIN + "PATCH/properties/"
_DESIRED_PATH = _PROPERTIES + "desired"
FILTERS = (_RESPONSE_PATH + "#", _DESIRED_PATH + "/#")

# kind: one of the four below. status: int of a response, else None. request_id: str or None.
# version: int or None. retry_after: seconds (int) or None.
Topic = namedtuple("Topic", ("kind", "status", "request_id", "version", "retry_after"))
RETRIEVE = "retrieve"
REPORT = "report"
RESPONSE = "response"
DESIRED = "desired"


def retrieve_topic(request_id: str) -> str:
    """The topic to publish an empty payload to, to be sent the twin."""
    return _TWIN + "GET/?$rid=" + request_id


def report_topic(request_id: str, version: "int | None" = None) -> str:
    """The topic to publish a merge patch of the reported properties to.

    version: the reported `$version` that the hub must be at, else it answers 412 and changes nothing.
    """
    topic = _PROPERTIES + "reported/?$rid=" + request_id
    if version is not None:
        topic += "&$version=" + str(version)
    return topic


def parse(topic: str) -> "Topic | None":
    """Take a topic apart; None if it is none of the twin's. Raises nothing, whatever the text.

    Parameters may come in any order, their names and values percent-encoded or not; of one that is
    repeated the first counts. A `$version` or `retry-after` that is no integer reads as None.
    """
    path, _, query = topic.partition("?")
    if path.endswith("/"):
        path = path[:-1]
    kind: "str | None" = DESIRED
    status = None
    if path != _DESIRED_PATH:
        if path[:-3] == _RESPONSE_PATH:
            status = _integer(path[-3:])
        kind = RESPONSE if status is not None else _own_kind(path)
        if kind is None:
            return None
    parameters: "dict[str, str]" = {}
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if "%" in pair:
            name = _percent_decoded(name)
            value = _percent_decoded(value)
        parameters.setdefault(name, value)
    version = parameters.get("$version")
    retry_after = parameters.get("retry-after")
    return Topic(
        kind,
        status,
        parameters.get("$rid"),
        _integer(version) if version else None,
        _integer(retry_after) if retry_after else None,
    )


def _own_kind(path: str) -> "str | None":
    """Of what a device publishes to; the hub sends nothing there."""
    if path == _TWIN + "GET":
        return RETRIEVE
    return REPORT if path == _PROPERTIES + "reported" else None


def _integer(text: str) -> "int | None":
    # str.isdigit accepts "²" on CPython, and int() takes "1_0", " 1" and "+1".
    if not text or len(text) > 18:
        return None
    for character in text:
        if character not in "0123456789":
            return None
    return int(text)


def _percent_decoded(text: str) -> str:
    head, *rest = text.split("%")
    try:
        data = head.encode()
        for part in rest:
            if not part:
                return text
            # int() would take "+1" and " 1", too.
            data += binascii.unhexlify(part[:2]) + part[2:].encode()
        return data.decode()
    except ValueError:
        return text
