"""The topics of the device twin: filters, builders, one parser.

Source: IoT Hub, "Communicate with an IoT hub using the MQTT protocol", device twins.
"""

import binascii
from collections import namedtuple

_RETRIEVE_PATH = "$iothub/twin/GET"
_REPORT_PATH = "$iothub/twin/PATCH/properties/reported"
_DESIRED_PATH = "$iothub/twin/PATCH/properties/desired"
_RESPONSE_PATH = "$iothub/twin/res/"
RESPONSE_FILTER = _RESPONSE_PATH + "#"
DESIRED_FILTER = _DESIRED_PATH + "/#"
FILTERS = (RESPONSE_FILTER, DESIRED_FILTER)

# kind: one of the four below. status: int of a response, else None. request_id: str or None.
# version: int or None. retry_after: seconds (int) or None.
Topic = namedtuple("Topic", ("kind", "status", "request_id", "version", "retry_after"))
RETRIEVE = "retrieve"
REPORT = "report"
RESPONSE = "response"
DESIRED = "desired"

_PATHS = {_RETRIEVE_PATH: RETRIEVE, _REPORT_PATH: REPORT, _DESIRED_PATH: DESIRED}


def retrieve_topic(request_id: str) -> str:
    """The topic to publish an empty payload to, to be sent the twin."""
    return _RETRIEVE_PATH + "/?$rid=" + request_id


def report_topic(request_id: str, version: "int | None" = None) -> str:
    """The topic to publish a merge patch of the reported properties to.

    version: the reported `$version` that the hub must be at, else it answers 412 and changes nothing.
    """
    topic = _REPORT_PATH + "/?$rid=" + request_id
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
    status = None
    kind = _PATHS.get(path)
    if kind is None:
        if not path.startswith(_RESPONSE_PATH):
            return None
        status = _integer(path[len(_RESPONSE_PATH) :])
        if status is None or len(path) != len(_RESPONSE_PATH) + 3:
            return None
        kind = RESPONSE
    request_id = version = retry_after = None
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if "%" in pair:
            name = _percent_decoded(name)
            value = _percent_decoded(value)
        if name == "$rid" and request_id is None:
            request_id = value
        elif name == "$version" and version is None:
            version = _integer(value)
        elif name == "retry-after" and retry_after is None:
            retry_after = _integer(value)
    return Topic(kind, status, request_id, version, retry_after)


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
