"""The REST API of the local hub, over HTTPS, as a back end uses it."""

import base64
import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.hub_backend import KEY, OTHER_KEY, SENSOR, Answer, Backend, token
from tests.waiting import PATIENCE
from twin_device import ConnectRefused, TwinClient
from twin_device.hub import Device, LocalHub


@pytest.fixture
def sensor(backend: Backend) -> Device:
    assert backend.ask("PUT", "/devices/sensor-1", SENSOR).status == 200
    return backend.hub.device("sensor-1")


# ---------------------------------------------------------------------- who may what


def test_every_policy_has_its_rights_and_no_more(backend: Backend, sensor: Device) -> None:
    rights = {
        "iothubowner": {"read", "write", "service"},
        "service": {"service"},
        "device": set(),
        "registryRead": {"read"},
        "registryReadWrite": {"read", "write"},
    }
    requests = {
        "read": ("GET", "/devices/sensor-1", None),
        "write": ("PUT", "/devices/sensor-2", {"deviceId": "sensor-2"}),
        "service": ("GET", "/twins/sensor-1", None),
    }
    for policy, granted in rights.items():
        for right, (method, path, body) in requests.items():
            answer = backend.ask(method, path, body, authorization=token(policy=policy), If_Match="*")
            if right == "write" and "write" in granted:
                # An update of what is not there.
                assert (answer.status, answer.code) == (404, "DeviceNotFound")
            else:
                assert answer.status == (200 if right in granted else 401), (policy, right)


REFUSED = {
    "no token": "",
    "a token of another kind": "Bearer abc",
    "no policy": token().rpartition("&")[0],
    "an unknown policy": token(policy="owner"),
    "another key": token(key=OTHER_KEY),
    "another host": token("elsewhere"),
    "one device's resource": token("localhost/devices/sensor-2"),
    "expired": token(expiry=1),
    "an expiry that is no number": token().replace("&se=", "&se=x"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_token_that_is_not_right_is_refused(backend: Backend, sensor: Device, why: str) -> None:
    answer = backend.ask("GET", "/devices/sensor-1", authorization=REFUSED[why] or "none")
    assert (answer.status, answer.code) == (401, "IotHubUnauthorizedAccess")
    assert answer.body["Message"].startswith("ErrorCode:IotHubUnauthorizedAccess;")
    assert KEY not in json.dumps(answer.body)


def test_one_wrong_byte_anywhere_in_a_token_is_refused(backend: Backend, sensor: Device) -> None:
    good = token()
    assert backend.ask("GET", "/devices/sensor-1", authorization=good).status == 200
    for at in range(len(good)):
        changed = good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :]
        # Host names have no case, and the expiry is signed with the resource.
        if changed.lower() != good.lower():
            answer = backend.ask("GET", "/devices/sensor-1", authorization=changed)
            assert answer.status == 401, changed[at - 5 : at + 5]


@pytest.mark.parametrize(
    "resource",
    ["localhost", "LOCALHOST", "localhost:8443", "localhost/devices", "localhost/devices/sensor-1"],
)
def test_a_token_may_cover_a_part(backend: Backend, sensor: Device, resource: str) -> None:
    assert backend.ask("GET", "/devices/sensor-1", authorization=token(resource)).status == 200


# ---------------------------------------------------------------------- identities


def test_a_device_is_created_with_keys_and_can_connect(backend: Backend) -> None:
    created = backend.ask("PUT", "/devices/sensor-1", SENSOR)
    assert created.status == 200
    keys = created.body["authentication"]["symmetricKey"]
    assert created.body["status"] == "enabled"
    assert created.body["connectionState"] == "Disconnected"
    assert created.headers["ETag"] == f'"{created.body["etag"]}"'
    for key in keys.values():
        client = TwinClient(
            f"localhost:{backend.hub.mqtts_port}",
            "sensor-1",
            key=key,
            ca_file=backend.hub.ca_file,
            timeout=PATIENCE,
        )
        with client:
            assert backend.ask("GET", "/devices/sensor-1").body["connectionState"] == "Connected"


def test_keys_that_are_given_are_kept_and_empty_ones_made(backend: Backend) -> None:
    given, empty = {"primaryKey": KEY, "secondaryKey": OTHER_KEY}, {"primaryKey": "", "secondaryKey": None}
    for name, keys in (("a", given), ("b", empty)):
        body = {"deviceId": name, "authentication": {"type": "sas", "symmetricKey": keys}}
        assert backend.ask("PUT", f"/devices/{name}", body).status == 200
    assert backend.hub.device("a").keys == (KEY, OTHER_KEY)
    assert [len(base64.b64decode(key)) for key in backend.hub.device("b").keys] == [32, 32]


def test_what_the_back_end_notes_is_kept(backend: Backend, sensor: Device) -> None:
    body = {**SENSOR, "capabilities": {"iotEdge": True}}
    assert backend.ask("PUT", "/devices/sensor-1", body, If_Match="*").body["capabilities"] == {
        "iotEdge": True
    }
    assert backend.ask("GET", "/twins/sensor-1").body["capabilities"] == {"iotEdge": True}
    module = {"deviceId": "sensor-1", "moduleId": "m", "managedBy": "me"}
    backend.ask("PUT", "/devices/sensor-1/modules/m", module)
    assert backend.ask("GET", "/devices/sensor-1/modules/m").body["managedBy"] == "me"


def test_an_identity_tells_when_it_was_last_seen(backend: Backend, sensor: Device) -> None:
    def times() -> list[str]:
        body = backend.ask("GET", "/devices/sensor-1").body
        return [body["connectionStateUpdatedTime"], body["lastActivityTime"]]

    assert times() == ["0001-01-01T00:00:00Z"] * 2
    before = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    with TwinClient.from_connection_string(
        sensor.connection_string, ca_file=backend.hub.ca_file, timeout=PATIENCE
    ) as client:
        connected = times()
        assert before <= connected[0] <= connected[1]
        client.report({"a": 1})
        assert connected[1] < times()[1]
    sensor.wait_for(lambda device: not device.connected)
    assert connected[0] < times()[0]
    assert times()[1] == backend.ask("GET", "/twins/sensor-1").body["lastActivityTime"]


def test_an_update_without_authentication_makes_new_keys(backend: Backend, sensor: Device) -> None:
    before = sensor.keys
    same = {**SENSOR, "authentication": {"type": "sas"}}
    assert backend.ask("PUT", "/devices/sensor-1", same, If_Match="*").status == 200
    assert sensor.keys == before
    assert backend.ask("PUT", "/devices/sensor-1", SENSOR, If_Match="*").status == 200
    assert not {*sensor.keys} & {*before}


def test_an_update_needs_the_etag_and_changes_it(backend: Backend, sensor: Device) -> None:
    first = backend.ask("GET", "/devices/sensor-1").body
    assert backend.ask("PUT", "/devices/sensor-1", first).status == 409
    second = backend.ask(
        "PUT", "/devices/sensor-1", {**first, "statusReason": "new battery"}, If_Match=f'"{first["etag"]}"'
    )
    assert second.status == 200
    assert second.body["statusReason"] == "new battery"
    assert second.body["etag"] != first["etag"]
    assert second.body["generationId"] == first["generationId"]
    assert second.body["authentication"] == first["authentication"]
    stale = backend.ask("PUT", "/devices/sensor-1", first, If_Match=f'"{first["etag"]}"')
    assert (stale.status, stale.code) == (412, "PreconditionFailed")
    assert backend.ask("PUT", "/devices/sensor-1", SENSOR, If_Match="*").status == 200


def test_disabling_ends_the_connection_and_refuses_the_next(backend: Backend, sensor: Device) -> None:
    client = TwinClient.from_connection_string(
        sensor.connection_string, ca_file=backend.hub.ca_file, timeout=PATIENCE
    )
    with client:
        backend.ask("PUT", "/devices/sensor-1", {**SENSOR, "status": "disabled"}, If_Match="*")
        sensor.wait_for(lambda device: not device.connected)
    again = TwinClient.from_connection_string(
        sensor.connection_string, ca_file=backend.hub.ca_file, timeout=PATIENCE
    )
    with pytest.raises(ConnectRefused):
        again.connect()


def test_a_delete_needs_a_condition_and_takes_the_modules_along(backend: Backend, sensor: Device) -> None:
    module = backend.ask("PUT", "/devices/sensor-1/modules/m", {"deviceId": "sensor-1", "moduleId": "m"})
    assert module.status == 200
    assert [one["moduleId"] for one in backend.ask("GET", "/devices/sensor-1/modules").body] == ["m"]
    assert backend.ask("DELETE", "/devices/sensor-1").status == 412
    assert backend.ask("DELETE", "/devices/sensor-1", If_Match='"stale"').status == 412
    deleted = backend.ask("DELETE", "/devices/sensor-1", If_Match="*")
    assert (deleted.status, deleted.body) == (204, None)
    for path in (
        "/devices/sensor-1",
        "/twins/sensor-1",
        "/devices/sensor-1/modules/m",
        "/twins/sensor-1/modules/m",
    ):
        answer = backend.ask("GET", path)
        assert (answer.status, answer.code) == (404, "DeviceNotFound")


def test_devices_are_listed_up_to_top(backend: Backend) -> None:
    for name in ("a", "b", "c"):
        backend.ask("PUT", f"/devices/{name}", {"deviceId": name})
    backend.ask("PUT", "/devices/a/modules/m", {"deviceId": "a", "moduleId": "m"})
    for path in ("/devices", "/devices/"):
        assert [one["deviceId"] for one in backend.ask("GET", path).body] == ["a", "b", "c"]
    assert len(backend.ask("GET", "/devices?top=2").body) == 2
    assert backend.ask("GET", "/devices?top=0").status == 400
    assert backend.ask("GET", "/statistics/devices").body["totalDeviceCount"] == 3
    assert backend.ask("GET", "/statistics/service").body == {"connectedDeviceCount": 0}


def test_an_id_with_signs_is_percent_encoded_in_the_path(backend: Backend) -> None:
    name = "a-:.+%_#*?!(),=@;$'"
    path = "/devices/" + quote(name, safe="")
    assert backend.ask("PUT", path, {"deviceId": name}).body["deviceId"] == name
    assert backend.ask("GET", path).status == 200
    assert backend.hub.device(name).desired == {}


SHORT_KEYS = {"primaryKey": "MDEyMw==", "secondaryKey": "MDEyMw=="}
COLONS = {"primaryThumbprint": "AB:" * 19 + "AB"}
BAD_IDENTITIES: list[Any] = [
    ("another id in the body", {"deviceId": "sensor-2"}),
    ("a status that there is not", {**SENSOR, "status": "sleepy"}),
    ("a key that is not base64", {**SENSOR, "authentication": {"symmetricKey": {"primaryKey": "secret!"}}}),
    ("a manager that is no text", {**SENSOR, "managedBy": 5}),
    ("capabilities that are none", {**SENSOR, "capabilities": {"iotEdge": "yes"}}),
    ("one key of two", {**SENSOR, "authentication": {"symmetricKey": {"primaryKey": KEY}}}),
    ("keys that are too short", {**SENSOR, "authentication": {"symmetricKey": SHORT_KEYS}}),
    ("a thumbprint with colons", {**SENSOR, "authentication": {"x509Thumbprint": COLONS}}),
    ("a key that is a number", {**SENSOR, "authentication": {"symmetricKey": {"primaryKey": 5}}}),
    ("authentication that is no object", {**SENSOR, "authentication": "sas"}),
    ("an authentication that there is not", {**SENSOR, "authentication": {"type": "magic"}}),
    ("a body that is no object", [SENSOR]),
    ("a body that is no JSON", b"{"),
]


@pytest.mark.parametrize("body", [body for _, body in BAD_IDENTITIES], ids=[why for why, _ in BAD_IDENTITIES])
def test_a_bad_identity_is_refused_whole(backend: Backend, body: Any) -> None:
    answer = backend.ask("PUT", "/devices/sensor-1", body)
    assert answer.status == 400
    assert "secret" not in json.dumps(answer.body)
    assert backend.ask("GET", "/devices/sensor-1").status == 404


# ---------------------------------------------------------------------- twins


def test_a_new_twin_is_as_documented(backend: Backend, sensor: Device) -> None:
    answer = backend.ask("GET", "/twins/sensor-1")
    twin = answer.body
    assert (twin["etag"], twin["version"]) == ("AAAAAAAAAAE=", 2)
    assert answer.headers["ETag"] == '"AAAAAAAAAAE="'
    assert twin["tags"] == {}
    assert {name: section["$version"] for name, section in twin["properties"].items()} == {
        "desired": 1,
        "reported": 1,
    }
    assert twin["deviceId"] == "sensor-1"
    assert twin["authenticationType"] == "sas"


def test_a_desired_patch_reaches_the_device_and_what_it_reports_comes_back(
    backend: Backend, sensor: Device
) -> None:
    client = TwinClient.from_connection_string(
        sensor.connection_string, ca_file=backend.hub.ca_file, timeout=PATIENCE
    )
    client.on_desired(lambda patch, desired: client.report(patch))
    with client:
        patched = backend.ask(
            "PATCH", "/twins/sensor-1", {"tags": {"floor": 3}, "properties": {"desired": {"a": {"b": 1}}}}
        )
        assert patched.status == 200
        assert patched.body["tags"] == {"floor": 3}
        desired = patched.body["properties"]["desired"]
        assert (desired["a"], desired["$version"]) == ({"b": 1}, 2)
        assert desired["$metadata"]["a"]["b"]["$lastUpdatedVersion"] == 2
        # One request is one step, whatever it wrote.
        assert (patched.body["etag"], patched.body["version"]) == ("AAAAAAAAAAI=", 3)
        sensor.wait_for({"a": {"b": 1}})
        after = backend.ask("GET", "/twins/sensor-1").body
        assert after["properties"]["reported"]["a"] == {"b": 1}
        assert (after["etag"], after["version"]) == ("AAAAAAAAAAI=", 4)


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
def test_a_condition_on_the_etag(backend: Backend, sensor: Device, method: str) -> None:
    body = {"properties": {"desired": {"a": 1}}}
    stale = backend.ask(method, "/twins/sensor-1", body, If_Match='"AAAAAAAAAAk="')
    assert (stale.status, stale.code) == (412, "PreconditionFailed")
    assert sensor.desired == {}
    for condition in ('"AAAAAAAAAAE="', '"*"', "*", "unquoted-is-no-condition"):
        assert backend.ask(method, "/twins/sensor-1", body, If_Match=condition).status == 200


def wrong(text: str) -> Iterator[str]:
    """The text with each of its bytes changed in turn."""
    for at, byte in enumerate(text):
        yield text[:at] + ("A" if byte != "A" else "B") + text[at + 1 :]


def test_one_wrong_byte_anywhere_in_an_etag_is_refused(backend: Backend, sensor: Device) -> None:
    etag, twin_etag = (backend.ask("GET", f"/{kind}/sensor-1").body["etag"] for kind in ("devices", "twins"))
    before = sensor.twin
    for changed in wrong(f'"{twin_etag}"'):
        for method in ("PATCH", "PUT"):
            answer = backend.ask(method, "/twins/sensor-1", {"tags": {"x": 1}}, If_Match=changed)
            assert (answer.status, answer.code) == (412, "PreconditionFailed"), changed
    for changed in wrong(f'"{etag}"'):
        for method, body in (("PUT", SENSOR), ("DELETE", None)):
            answer = backend.ask(method, "/devices/sensor-1", body, If_Match=changed)
            assert (answer.status, answer.code) == (412, "PreconditionFailed"), changed
    for member, good, mode in (("eTag", etag, "delete"), ("twinETag", twin_etag, "updateTwin")):
        for changed in wrong(good):
            item = {"id": "sensor-1", "importMode": f"{mode}IfMatchETag", member: changed, "tags": {"x": 1}}
            (error,) = backend.ask("POST", "/devices", [item]).body["errors"]
            assert error["errorCode"] == "PreconditionFailed", changed
    assert sensor.twin == before


def test_one_wrong_byte_anywhere_in_a_policy_is_refused(backend: Backend, sensor: Device) -> None:
    for changed in wrong("iothubowner"):
        answer = backend.ask("GET", "/twins/sensor-1", authorization=token(policy=changed))
        assert (answer.status, answer.code) == (401, "IotHubUnauthorizedAccess"), changed
    for changed in wrong(KEY.rstrip("=")):
        # The last character has bits that are no part of the key.
        if base64.b64decode(changed + "=") != base64.b64decode(KEY):
            answer = backend.ask("GET", "/twins/sensor-1", authorization=token(key=changed + "="))
            assert (answer.status, answer.code) == (401, "IotHubUnauthorizedAccess"), changed


def test_a_replacement_replaces_all_and_a_missing_section_is_emptied(
    backend: Backend, sensor: Device
) -> None:
    sensor.patch_desired({"a": 1, "b": {"c": 2}})
    backend.ask("PATCH", "/twins/sensor-1", {"tags": {"x": 1}})
    answer = backend.ask("PUT", "/twins/sensor-1", {"properties": {"desired": {"b": {"d": 3}}}}).body
    assert sensor.desired == {"b": {"d": 3}}
    assert answer["tags"] == {}
    assert answer["properties"]["desired"]["$version"] == 3
    backend.ask("PUT", "/twins/sensor-1", {})
    assert sensor.desired == {}


def test_null_empties_a_section(backend: Backend, sensor: Device) -> None:
    sensor.patch_desired({"a": 1, "b": 2})
    backend.ask("PATCH", "/twins/sensor-1", {"tags": {"x": 1}})
    answer = backend.ask("PATCH", "/twins/sensor-1", {"tags": None, "properties": {"desired": None}}).body
    assert sensor.desired == {} == answer["tags"]


def test_a_whole_twin_that_is_sent_back_changes_only_what_is_the_back_ends(
    backend: Backend, sensor: Device
) -> None:
    sensor.patch_desired({"a": 1})
    twin = backend.ask("GET", "/twins/sensor-1").body
    twin["properties"]["reported"]["hacked"] = True
    twin["etag"] = "x"
    after = backend.ask("PATCH", "/twins/sensor-1", twin).body
    assert after["properties"]["desired"]["$version"] == 3
    assert sensor.desired == {"a": 1}
    assert sensor.reported == {}


def test_tags_alone_do_not_touch_the_desired_version(backend: Backend, sensor: Device) -> None:
    after = backend.ask("PATCH", "/twins/sensor-1", {"tags": {"x": 1}}).body
    assert after["properties"]["desired"]["$version"] == 1
    assert (after["etag"], after["version"]) == ("AAAAAAAAAAI=", 3)


BAD_TWINS: list[Any] = [
    ("PUT", {"properties": {"desired": {"a": None}}}),
    ("PUT", {"tags": {"a": None}}),
    ("PATCH", {"properties": {"desired": {"a.b": 1}}}),
    ("PATCH", {"properties": {"desired": {"a": 2**52}}}),
    ("PATCH", {"properties": {"desired": [1]}}),
    ("PATCH", {"properties": [1]}),
    ("PATCH", {"tags": {"ok": 1}, "properties": {"desired": {"a": "x" * 4097}}}),
    ("PATCH", {"tags": {f"k{n}": "x" * 4000 for n in range(3)}}),
    ("PATCH", {"properties": {"desired": {f"k{n}": "x" * 4000 for n in range(9)}}}),
]


@pytest.mark.parametrize(("method", "body"), BAD_TWINS, ids=[str(number) for number in range(len(BAD_TWINS))])
def test_a_bad_twin_is_refused_whole(backend: Backend, sensor: Device, method: str, body: Any) -> None:
    before = backend.ask("GET", "/twins/sensor-1").body
    answer = backend.ask(method, "/twins/sensor-1", body)
    assert answer.status in (400, 403)
    assert answer.code in ("ArgumentInvalid", "DeviceModelMaxPropertiesExceeded")
    assert backend.ask("GET", "/twins/sensor-1").body == before


def test_a_modules_twin_is_its_own(backend: Backend, sensor: Device) -> None:
    backend.ask("PUT", "/devices/sensor-1/modules/m", {"deviceId": "sensor-1", "moduleId": "m"})
    backend.ask("PATCH", "/twins/sensor-1/modules/m", {"properties": {"desired": {"a": 1}}})
    twin = backend.ask("GET", "/twins/sensor-1/modules/m").body
    assert (twin["deviceId"], twin["moduleId"]) == ("sensor-1", "m")
    assert sensor.desired == {}
    assert backend.hub.device("sensor-1/m").desired == {"a": 1}
    missing = backend.ask("GET", "/twins/sensor-1/modules/other")
    assert (missing.status, missing.code) == (404, "ModuleNotFound")


# ---------------------------------------------------------------------- queries


def rows(backend: Backend, text: str, **headers: str) -> Answer:
    return backend.ask("POST", "/devices/query", {"query": text}, **headers)


def test_a_query_gives_the_devices_that_it_asks_for(backend: Backend) -> None:
    for name, wanted, has in (("a", "2.2", "2.2"), ("b", "2.3", "2.2"), ("c", "2.3", "2.3")):
        device = backend.hub.create_device(
            name, desired={"firmwareVersion": wanted}, tags={"building": name[0]}
        )
        client = TwinClient.from_connection_string(
            device.connection_string, ca_file=backend.hub.ca_file, timeout=PATIENCE
        )
        with client:
            client.report({"firmwareVersion": has})
    backend.hub.create_device("a/m", desired={"x": 1})
    found = rows(
        backend,
        "SELECT deviceId FROM devices "
        "WHERE properties.desired.firmwareVersion != properties.reported.firmwareVersion",
    )
    assert (found.status, found.body) == (200, [{"deviceId": "b"}])
    assert found.headers["x-ms-item-type"].lower() == "raw"
    whole = rows(backend, "SELECT * FROM devices")
    assert [one["deviceId"] for one in whole.body] == ["a", "b", "c"]
    assert whole.headers["x-ms-item-type"].lower() == "twin"
    assert [one["moduleId"] for one in rows(backend, "SELECT * FROM devices.modules").body] == ["m"]
    assert rows(backend, "SELECT COUNT() AS n FROM devices").body == [{"n": 3}]


def test_a_long_result_comes_in_pages(backend: Backend) -> None:
    for number in range(7):
        backend.hub.create_device(f"d{number}")
    seen: list[str] = []
    headers: dict[str, str] = {"x-ms-max-item-count": "3"}
    sizes = []
    while True:
        page = rows(backend, "SELECT deviceId FROM devices", **headers)
        sizes.append(len(page.body))
        seen += [one["deviceId"] for one in page.body]
        if "x-ms-continuation" not in page.headers:
            break
        headers["x-ms-continuation"] = page.headers["x-ms-continuation"]
    assert sizes == [3, 3, 1]
    assert seen == [f"d{number}" for number in range(7)]
    for bad in ("nonsense", headers["x-ms-continuation"]):
        other = rows(backend, "SELECT * FROM devices", **{"x-ms-continuation": bad})
        assert (other.status, other.code) == (400, "ArgumentInvalid")


@pytest.mark.parametrize(
    "text",
    ["", "SELECT", "SELECT * FROM nowhere", "SELECT * FROM devices WHERE", "SELECT * FROM devices WHERE ((("],
)
def test_a_bad_query_is_refused(backend: Backend, text: str) -> None:
    answer = rows(backend, text)
    assert (answer.status, answer.code) == (400, "ArgumentInvalid")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_an_encoded_slash_is_no_way_to_a_module(backend: Backend, sensor: Device, method: str) -> None:
    backend.ask("PUT", "/devices/sensor-1/modules/m", {"deviceId": "sensor-1", "moduleId": "m"})
    for path in ("/devices/sensor-1%2Fm", "/devices/sensor-1%2Fn"):
        answer = backend.ask(method, path, {} if method == "PUT" else None)
        assert (answer.status, answer.code) == (400, "ArgumentInvalid")
    assert [one.id for one in backend.hub.devices] == ["sensor-1", "sensor-1/m"]


# ---------------------------------------------------------------------- many identities at once


def test_a_bulk_request_creates_updates_and_deletes(backend: Backend, sensor: Device) -> None:
    keys = {"primaryKey": KEY, "secondaryKey": OTHER_KEY}
    etag = backend.ask("GET", "/devices/sensor-1").body["etag"]
    done = backend.ask(
        "POST",
        "/devices",
        [
            {
                "id": "a",
                "importMode": "create",
                "status": "disabled",
                "authentication": {"type": "sas", "symmetricKey": keys},
                "tags": {"site": "A"},
                "properties": {"desired": {"interval": 30, "$version": 7, "$metadata": {}}},
            },
            {"id": "a", "moduleId": "m", "importMode": "Create"},
            {"id": "sensor-1", "importMode": "updateIfMatchETag", "eTag": etag, "statusReason": "sold"},
            {"id": "a", "importMode": "updateTwin", "tags": {"site": None, "floor": 3}},
        ],
    )
    assert (done.status, done.body) == (200, {"isSuccessful": True, "errors": [], "warnings": []})
    device = backend.hub.device("a")
    assert (device.keys, device.desired, device.desired_version) == ((KEY, OTHER_KEY), {"interval": 30}, 1)
    assert device.twin["tags"] == {"floor": 3}
    assert device.twin["status"] == "disabled"
    assert backend.ask("GET", "/devices/sensor-1").body["statusReason"] == "sold"
    twin_etag = backend.ask("GET", "/twins/a").body["etag"]
    done = backend.ask(
        "POST",
        "/devices",
        [
            {"id": "a", "importMode": "updateTwinIfMatchETag", "twinETag": twin_etag, "tags": {"floor": 4}},
            {"id": "sensor-1", "importMode": "delete"},
        ],
    )
    assert done.status == 200
    assert device.twin["tags"] == {"floor": 4}
    assert [one.id for one in backend.hub.devices] == ["a", "a/m"]


def test_what_fails_in_a_bulk_request_is_told_and_the_rest_is_done(backend: Backend, sensor: Device) -> None:
    rows: list[Any] = [
        ({"id": "sensor-1", "importMode": "create"}, "DeviceAlreadyExists"),
        ({"id": "nobody", "importMode": "update"}, "DeviceNotFound"),
        ({"id": "sensor-1", "moduleId": "m", "importMode": "delete"}, "ModuleNotFound"),
        ({"id": "nobody", "moduleId": "m", "importMode": "create"}, "DeviceNotFound"),
        ({"id": "sensor-1", "importMode": "deleteIfMatchETag", "eTag": "stale"}, "PreconditionFailed"),
        ({"id": "sensor-1", "importMode": "deleteIfMatchETag"}, "PreconditionFailed"),
        (
            {"id": "sensor-1", "importMode": "updateTwinIfMatchETag", "twinETag": "x", "tags": {}},
            "PreconditionFailed",
        ),
        ({"id": "sensor-1", "importMode": "frobnicate"}, "ArgumentInvalid"),
        ({"id": "a/b", "importMode": "create"}, "ArgumentInvalid"),
        ({"id": "no spaces", "importMode": "create"}, "ArgumentInvalid"),
        ({"id": "b", "importMode": "create", "tags": {"a.b": 1}}, "ArgumentInvalid"),
        ({"id": "b", "importMode": "create", "properties": {"desired": {"a": None}}}, "ArgumentInvalid"),
        ({"id": "b", "importMode": "create", "status": "sleepy"}, "ArgumentInvalid"),
        ({"id": 5}, "ArgumentInvalid"),
        (5, "ArgumentInvalid"),
    ]
    answer = backend.ask("POST", "/devices", [*(item for item, _ in rows), {"id": "c"}])
    assert (answer.status, answer.body["isSuccessful"]) == (400, False)
    assert [error["errorCode"] for error in answer.body["errors"]] == [code for _, code in rows]
    assert answer.body["errors"][2]["moduleId"] == "m"
    assert all(error["errorStatus"] for error in answer.body["errors"])
    assert [one.id for one in backend.hub.devices] == ["c", "sensor-1"]
    assert sensor.twin["version"] == 2


NO_BULK = [[], {}, b"{", b"", b"]}[", b'[{"id": "a"}], "a": [1]', [{"id": f"d{n}"} for n in range(101)]]


@pytest.mark.parametrize("body", NO_BULK, ids=lambda body: f"{body!r:.12}")
def test_what_is_no_bulk_request_changes_nothing(backend: Backend, body: Any) -> None:
    answer = backend.ask("POST", "/devices", body)
    assert answer.status in (400, 413)
    assert backend.hub.devices == []


def test_a_bulk_request_is_a_registry_write(backend: Backend) -> None:
    for policy, status in (("service", 401), ("registryRead", 401), ("registryReadWrite", 200)):
        answer = backend.ask("POST", "/devices", [{"id": "a"}], authorization=token(policy=policy))
        assert answer.status == status


# ---------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", "/twins/sensor-1", 405), ("GET", "/page/nowhere", 404)],
)
def test_what_is_not_there_says_so(backend: Backend, method: str, path: str, status: int) -> None:
    answer = backend.ask(method, path)
    assert answer.status == status
    assert answer.code


def test_a_body_that_is_too_large_is_refused(backend: Backend, sensor: Device) -> None:
    answer = backend.ask("PATCH", "/twins/sensor-1", b" " * (1024 * 1024 + 1))
    assert (answer.status, answer.code) == (413, "MessageTooLarge")


@pytest.mark.parametrize("shape", ["code", "object", "text"])
def test_the_three_shapes_of_an_error(shape: str) -> None:
    with LocalHub(mqtts_port=None, https_port=0, owner_key=KEY, service_error=shape) as hub:
        backend = Backend(hub)
        answer = backend.ask("GET", "/devices/nobody")
        backend.connection.close()
    assert (answer.status, answer.code) == (404, "DeviceNotFound")
    message = answer.body["Message"]
    if shape == "code":
        assert message.startswith("ErrorCode:DeviceNotFound;")
    else:
        details = json.loads(message) if shape == "text" else message
        assert details["errorCode"] == 404001
        assert set(details) == {"errorCode", "trackingId", "message", "timestampUtc"}
    assert answer.body["ExceptionMessage"].startswith("Tracking ID:")


def test_the_api_stays_up_while_the_hub_is_away_for_its_devices(backend: Backend, sensor: Device) -> None:
    backend.hub.stop_listening()
    assert backend.ask("PATCH", "/twins/sensor-1", {"properties": {"desired": {"a": 1}}}).status == 200
    backend.hub.listen_again()
    assert sensor.desired == {"a": 1}


def test_plaintext_is_served_where_it_is_asked_for() -> None:
    with LocalHub(mqtts_port=None, http_port=0, owner_key=KEY) as hub:
        assert hub.service_connection_string.startswith(f"HostName=localhost:{hub.http_port};")
        connection = http.client.HTTPConnection("localhost", hub.http_port, timeout=PATIENCE)
        connection.request("GET", "/devices", headers={"Authorization": token()})
        assert connection.getresponse().read() == b"[]"
        connection.close()
