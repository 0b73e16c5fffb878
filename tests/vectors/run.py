"""Runs every vector of this folder and prints one line a case: what was found, and PASS or FAIL.

    python run.py FOLDER      (or micropython)

The package `core` must be importable. The same lines must come out of every runtime, so nothing here depends
on the order of a dict, on how a float is written, or on anything that one of them lacks.
"""

import json
import sys

from core import credentials, errors, patch, topics
from core.settings import Settings
from core.stream import reader
from core.twin import Twin

# ---------------------------------------------------------------------- writing values


def text(value):
    """Canonical JSON, of what JSON has and of a few things that it has not."""
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if type(value) is str:
        return string(value)
    if type(value) is int:
        return str(value)
    if type(value) is float:
        return str(int(value)) if value == int(value) else str(value)
    if type(value) is dict:
        return "{" + ",".join([string(key) + ":" + text(value[key]) for key in sorted(value)]) + "}"
    return "[" + ",".join([text(member) for member in value]) + "]"


def string(value):
    written = '"'
    for character in value:
        code = ord(character)
        if character in '"\\':
            written += "\\" + character
        elif 32 <= code < 127:
            written += character
        else:
            written += f"<{code:x}>"
    return written + '"'


def error(caught):
    return [type(caught).__name__, str(caught)]


# ---------------------------------------------------------------------- values that JSON cannot write


def expanded(value):
    """{"@": kind, ...} stands for a value that is too long for a file, or no JSON at all."""
    if type(value) is list:
        return [expanded(member) for member in value]
    if type(value) is not dict:
        return value
    kind = value.get("@")
    if kind is None:
        return {key: expanded(value[key]) for key in value}
    if kind == "repeat":
        return value["text"] * value["times"]
    if kind == "keys":
        return {expanded(key): expanded(member) for key, member in value["members"]}
    if kind == "nested":
        inner = expanded(value["in"])
        for _ in range(value["times"]):
            inner = [inner] if value["of"] == "array" else {"k": inner}
        return inner
    if kind == "cycle":
        cycle = {}
        cycle["k"] = cycle
        return cycle
    if kind == "integer":
        return value["value"]
    return {
        "bytes": b"x",
        "tuple": (1,),
        "object": object(),
        "nan": float("nan"),
        "inf": float("inf"),
        "surrogate": chr(0xD800),
    }[kind]


# ---------------------------------------------------------------------- one function a file


def run_topics(case):
    if "build" in case:
        name, arguments = case["build"][0], case["build"][1:]
        build = topics.retrieve_topic if name == "retrieve" else topics.report_topic
        return build(*arguments)
    found = topics.parse(case["topic"])
    return None if found is None else list(found)


def run_merge(case):
    return patch.merge(case["target"], case["patch"])


def run_diff(case):
    difference = patch.diff(case["old"], case["new"])
    if text(patch.merge(case["old"], difference)) != text(case["new"]):
        return "does not lead to the new document"
    return difference


def run_compose(case):
    return patch.compose(case["first"], case["second"], case.get("base"))


def run_same(case):
    return patch.same(case["one"], case["other"])


def run_size(case):
    return patch.size(expanded(case["value"]))


def run_check(case):
    try:
        return patch.check(expanded(case["patch"]))
    except errors.PatchError as caught:
        return [caught.path, caught.limit, caught.size]


def payload_of(case):
    if "payload" in case:
        return case["payload"].encode()
    return bytes([int(pair, 16) for pair in case["hex"].split()])


def run_json(case):
    try:
        value = patch.loads(payload_of(case))
    except (ValueError, RuntimeError):
        return "no JSON"
    return [value, text(patch.loads(patch.dumps(value).encode()))]


def run_stream(case):
    payload = payload_of(case)
    found = streamed(case, payload, len(payload) or 1)
    for length in (1, 2, 3, 7):
        if text(streamed(case, payload, length)) != text(found):
            return "another result in chunks of " + str(length)
    return found


def streamed(case, payload, length):
    """What a reader finds when every chunk comes in the same buffer, as on a board."""
    keep = case.get("keep")
    handed = []
    options = (
        {"on_property": lambda path, value: handed.append([list(path), value])} if "hand" in case else {}
    )
    reading = reader(case.get("twin", False), None if keep is None else tuple(keep), **options)
    document = next(reading)
    buffer = bytearray(length)
    try:
        for start in range(0, len(payload), length):
            chunk = payload[start : start + length]
            buffer[: len(chunk)] = chunk
            document = reading.send(memoryview(buffer)[: len(chunk)])
    except ValueError:
        return "no JSON"
    if document is None:
        return "no JSON"
    return [document, handed] if "hand" in case else document


def run_sas(case):
    return credentials.sas_token(
        case["resource"], credentials.decode_key(case["key"]), case["expiry"], case.get("policy")
    )


def run_connection(case):
    try:
        found = credentials.from_connection_string(case["text"])
    except errors.LocalError as caught:
        return error(caught)
    return {
        "client_id": found.client_id,
        "user_name": found.user_name(case.get("product_info", ""), case.get("model_id")),
        "dialled": found.dialled,
        "port": found.port,
        "password": found.password(1893456000),
        "repr": repr(found),
    }


def run_sequences(case):
    options = case.get("options", {})
    twin = Twin(**options)
    settings = Settings(twin)
    for name, shape in case.get("settings", []):
        settings.declare(name, shape)
    return [step_of(twin, settings, step) for step in case["steps"]]


def step_of(twin, settings, step):
    now = step["at"]
    jitter = step.get("jitter", 0.5)
    name = step["do"]
    ticket = None
    try:
        if name == "start":
            given = twin.start(now)
        elif name == "stop" or name == "abandon":
            given = getattr(twin, name)()
        elif name == "connected":
            given = twin.connected(now, jitter, step.get("lifetime"))
        elif name == "refused":
            given = twin.refused(step["code"], now, jitter)
        elif name == "disconnected":
            given = twin.disconnected(now, jitter)
        elif name == "subscribed":
            given = twin.subscribed(tuple(step["granted"]), now, jitter)
        elif name == "tick":
            given = twin.tick(now, jitter)
        elif name == "message":
            body = step["text"].encode() if "text" in step else json.dumps(step["payload"]).encode()
            given = twin.message_received(step["topic"], body, now, jitter)
        elif name == "report":
            ticket, given = twin.report(step["patch"], now, step.get("version"), step.get("always", False))
        elif name == "retrieve":
            ticket, given = twin.ask(now)
        elif name == "declared":
            given = settings.declared(step["name"], now)
        else:
            given = settings.applied(step["name"], step["error"], now)
    except errors.TwinError as caught:
        return {"raised": error(caught)}
    given = given + settings.observe(given, now)
    found = {"give": [output_of(output) for output in given], "state": twin.state, "deadline": twin.deadline}
    if ticket is not None:
        found["ticket"] = ticket
    return found


def output_of(output):
    written = [type(output).__name__]
    for value in output:
        if type(value) is bytes:
            value = json.loads(value.decode()) if value else ""
        elif isinstance(value, Exception):
            value = error(value)
        elif type(value) is tuple:
            value = list(value)
        written.append(value)
    return written


# ---------------------------------------------------------------------- all of them

FILES = (
    "topics",
    "merge",
    "diff",
    "compose",
    "same",
    "size",
    "check",
    "json",
    "stream",
    "sas",
    "connection",
    "sequences",
)


def main(folder):
    failed = 0
    for name in FILES:
        with open(folder + "/" + name + ".json") as file:
            cases = json.loads(file.read())
        run = globals()["run_" + name]
        for case in cases:
            found = run(case)
            found, expected = [found], [case["expect"]]
            if name == "sequences":
                found, expected = found[0], expected[0]
            for index in range(len(found)):
                good = index < len(expected) and text(found[index]) == text(expected[index])
                failed += not good
                label = name + ": " + string(case["name"])[1:-1]
                if name == "sequences":
                    label += " " + str(index + 1)
                print(label + ": " + text(found[index]) + (" PASS" if good else " FAIL"))
    print("failed: " + str(failed))


if __name__ == "__main__":
    main(sys.argv[1])
