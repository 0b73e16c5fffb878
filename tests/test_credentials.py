"""Connection string, SAS token, and the three fields of CONNECT."""

import base64
import hashlib
import hmac
from urllib.parse import quote, unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twin_device.core import credentials as module
from twin_device.core.credentials import (
    Credentials,
    decode_key,
    from_connection_string,
    hmac_sha256,
    percent_encode,
    sas_token,
)
from twin_device.core.errors import LocalError

FIXED = settings(derandomize=True, deadline=None, max_examples=200)

KEY = b"0123456789abcdef0123456789abcdef"
TEXT = base64.b64encode(KEY).decode()
HOST = "myhub.azure-devices.net"
DEVICE = f"HostName={HOST};DeviceId=dev-1;SharedAccessKey={TEXT}"
EXPIRY = 1893456000

# Key and expiry as above: resource, policy, token.
TOKENS = [
    (
        HOST + "/devices/dev-1",
        None,
        "SharedAccessSignature sr=myhub.azure-devices.net%2Fdevices%2Fdev-1"
        "&sig=Q24ahLH4tHeubVhDv5kUKA2xiVvnqPFhqSD%2FqIjCq3I%3D&se=1893456000",
    ),
    (
        HOST + "/devices/dev-1/modules/mod-1",
        None,
        "SharedAccessSignature sr=myhub.azure-devices.net%2Fdevices%2Fdev-1%2Fmodules%2Fmod-1"
        "&sig=ThNvC0Z0Qv8Ro2lRz6AhWWJmSoPWo7HVNfOD3FbgcCc%3D&se=1893456000",
    ),
    (
        HOST,
        "service",
        "SharedAccessSignature sr=myhub.azure-devices.net"
        "&sig=khSw3Hu42nfiGmvv0z8UfhaVjclOsrYKOsP3H0wMCJU%3D&se=1893456000&skn=service",
    ),
]


@pytest.mark.parametrize(("resource", "policy", "token"), TOKENS, ids=["device", "module", "policy"])
def test_the_token_is_the_one_of_the_reference(resource, policy, token):
    assert sas_token(resource, KEY, EXPIRY, policy) == token


def test_the_password_is_the_token_of_the_identity():
    assert from_connection_string(DEVICE).password(EXPIRY) == TOKENS[0][2]
    assert from_connection_string(DEVICE + ";ModuleId=mod-1").password(EXPIRY) == TOKENS[1][2]


def test_a_policys_key_signs_with_its_name():
    password = from_connection_string(DEVICE + ";SharedAccessKeyName=de vice").password(EXPIRY)
    assert password.endswith("&se=1893456000&skn=de%20vice")


def test_without_a_key_there_is_no_password():
    assert Credentials(HOST, "dev-1").password(EXPIRY) == ""


@FIXED
@given(st.text(max_size=20), st.binary(min_size=1, max_size=80), st.integers(0, 2**40))
def test_a_token_verifies_the_way_the_hub_verifies_it(resource, key, expiry):
    fields = sas_token(resource, key, expiry).partition(" ")[2].split("&")
    sr, sig, se = (field.partition("=")[2] for field in fields)
    assert unquote(sr) == resource
    signed = hmac.new(key, f"{sr}\n{se}".encode(), hashlib.sha256).digest()
    assert base64.b64decode(unquote(sig), validate=True) == signed
    assert int(se) == expiry


# RFC 4231's test cases with SHA-256: key, message, digest
HMACS = [
    (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
    (
        b"Jefe",
        b"what do ya want for nothing?",
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
    ),
    (b"\xaa" * 20, b"\xdd" * 50, "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
    (
        b"\xaa" * 131,
        b"Test Using Larger Than Block-Size Key - Hash Key First",
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
    ),
]


@pytest.mark.parametrize(("key", "message", "digest"), HMACS)
def test_hmac_follows_rfc_4231(key, message, digest):
    assert hmac_sha256(key, message).hex() == digest


@FIXED
@given(st.binary(max_size=130), st.binary(max_size=200))
def test_hmac_agrees_with_the_standard_library(key, message):
    assert hmac_sha256(key, message) == hmac.new(key, message, hashlib.sha256).digest()


@FIXED
@given(st.text())
def test_percent_encoding_agrees_with_the_standard_library(text):
    assert percent_encode(text) == quote(text, safe="")


# ---------------------------------------------------------------------- the fields of CONNECT

# fields of Credentials, product info, model id, client id, user name
FIELDS = [
    ({}, "", None, "dev-1", f"{HOST}/dev-1/?api-version=2021-04-12"),
    (
        {"module_id": "mod-1"},
        "",
        None,
        "dev-1/mod-1",
        f"{HOST}/dev-1/mod-1/?api-version=2021-04-12",
    ),
    (
        {},
        "twin_device/1.0 (linux)",
        "dtmi:com:example:Thermostat;1",
        "dev-1",
        f"{HOST}/dev-1/?api-version=2021-04-12&DeviceClientType=twin_device%2F1.0%20%28linux%29"
        "&model-id=dtmi%3Acom%3Aexample%3AThermostat%3B1",
    ),
    # Ids are never percent-encoded.
    ({"device_id": "d#%+ö"[:4]}, "", None, "d#%+", f"{HOST}/d#%+/?api-version=2021-04-12"),
    # The hub's name stays in the user name even if a gateway is dialled.
    ({"gateway": "edge.local"}, "", None, "dev-1", f"{HOST}/dev-1/?api-version=2021-04-12"),
]


@pytest.mark.parametrize(("fields", "product", "model", "client_id", "user_name"), FIELDS)
def test_the_fields_of_connect(fields, product, model, client_id, user_name):
    credentials = Credentials(**{"host": HOST, "device_id": "dev-1", **fields})
    assert credentials.client_id == client_id
    assert credentials.user_name(product, model) == user_name


# host, gateway, port: host, dialled, port
NAMES = [
    (HOST, None, None, HOST, HOST, None),
    (HOST + ":8884", None, None, HOST, HOST, 8884),
    (HOST + ":8884", None, 1883, HOST, HOST, 1883),
    (HOST + ":8884", "edge.local", None, HOST, "edge.local", None),
    (HOST, "edge.local:8885", None, HOST, "edge.local", 8885),
    ("localhost:1", None, None, "localhost", "localhost", 1),
    ("localhost:65535", None, None, "localhost", "localhost", 65535),
    ("127.0.0.1:1883", None, None, "127.0.0.1", "127.0.0.1", 1883),
    ("[::1]:1883", None, None, "::1", "::1", 1883),
    ("[::1]", None, None, "::1", "::1", None),
]


@pytest.mark.parametrize(("host", "gateway", "given", "name", "dialled", "port"), NAMES)
def test_the_name_that_is_dialled_brings_its_port(host, gateway, given, name, dialled, port):
    credentials = Credentials(host, "dev-1", gateway=gateway, port=given)
    assert (credentials.host, credentials.dialled, credentials.port) == (name, dialled, port)


BAD_HOSTS = [
    "",
    ":8883",
    "https://" + HOST,
    HOST + ":",
    HOST + ":0",
    HOST + ":65536",
    HOST + ":123456",
    HOST + ":x",
    HOST + ":-1",
    HOST + ":²",
    "a:1:2",
    "my hub",
    "hub/",
    "hüb",
    "[::1",
    "[::1]x",
    "[]",
]


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_what_is_no_host_name_is_refused(host):
    with pytest.raises(LocalError, match="HostName"):
        Credentials(host, "dev-1")
    with pytest.raises(LocalError, match="GatewayHostName"):
        Credentials(HOST, "dev-1", gateway=host)


GOOD_IDS = ["a", "x" * 128, "A-:.+%_#*?!(),=@;$'z0~"]
BAD_IDS = ["", "x" * 129, "a b", "a/b", "ä", "a\n", "a\x00", "a&b", None, 5]


@pytest.mark.parametrize("identity", GOOD_IDS)
def test_ids_of_the_hubs_alphabet_are_taken(identity):
    assert Credentials(HOST, identity, identity).client_id == identity + "/" + identity


@pytest.mark.parametrize("identity", BAD_IDS)
def test_other_ids_are_refused(identity):
    with pytest.raises(LocalError, match="DeviceId"):
        Credentials(HOST, identity)
    if identity is not None:
        with pytest.raises(LocalError, match="ModuleId"):
            Credentials(HOST, "dev-1", identity)


# ---------------------------------------------------------------------- connection strings


def test_a_connection_string_is_read():
    credentials = from_connection_string(DEVICE + ";ModuleId=m;GatewayHostName=edge:1;SharedAccessKeyName=p")
    assert (credentials.host, credentials.device_id, credentials.module_id) == (HOST, "dev-1", "m")
    assert (credentials.dialled, credentials.port, credentials.policy) == ("edge", 1, "p")


READ_ALIKE = [
    DEVICE + ";",
    ";;" + DEVICE + ";;",
    "  " + DEVICE + "\n",
    DEVICE.replace(";", " ; "),
    DEVICE.replace("=", " = ", 1),
    DEVICE.replace("HostName", "hostname").replace("DeviceId", "DEVICEID"),
    ";".join(reversed(DEVICE.split(";"))),
]


@pytest.mark.parametrize("text", READ_ALIKE, ids=repr)
def test_order_case_and_blanks_of_a_connection_string_do_not_matter(text):
    credentials = from_connection_string(text)
    assert (credentials.host, credentials.client_id) == (HOST, "dev-1")
    assert credentials.password(EXPIRY) == TOKENS[0][2]


# connection string, what the error names
REFUSED = [
    ("", "empty"),
    ("  \n", "empty"),
    (None, "empty"),
    (b"HostName=h", "empty"),
    ("SECRET", "part 1"),
    (f"HostName={HOST};SECRET;DeviceId=d", "part 2"),
    (f"HostName={HOST};DeviceID=d;Key=SECRET", "part 3"),
    (f"HostName={HOST};HostName={HOST};DeviceId=d", "HostName appears twice"),
    (DEVICE + ";sharedaccesskey=SECRET", "SharedAccessKey appears twice"),
    (f"HostName=;DeviceId=d;SharedAccessKey={TEXT}", "HostName is empty"),
    (f"HostName={HOST};DeviceId= ;SharedAccessKey={TEXT}", "DeviceId is empty"),
    (f"HostName={HOST};DeviceId=d;SharedAccessKey=", "SharedAccessKey is empty"),
    (f"DeviceId=d;SharedAccessKey={TEXT}", "HostName is missing"),
    (f"HostName={HOST};SharedAccessKey={TEXT}", "DeviceId is missing"),
    (
        f"HostName={HOST};SharedAccessKeyName=iothubowner;SharedAccessKey={TEXT}",
        "DeviceId is missing.*service's",
    ),
    (f"HostName={HOST};DeviceId=d", "SharedAccessKey is missing"),
    (f"HostName={HOST};DeviceId=d;x509=true;SharedAccessKey={TEXT}", "x509"),
    (f"HostName={HOST};DeviceId=d;x509=false", "SharedAccessKey is missing"),
    (f"HostName={HOST};DeviceId=d;SharedAccessSignature=SECRET", "SharedAccessSignature"),
    (f"HostName={HOST};DeviceId=d;SharedAccessKey=SECRET", "base64"),
    (f"HostName={HOST}:0;DeviceId=d;SharedAccessKey={TEXT}", "port"),
    (f"HostName={HOST};DeviceId=d/e;SharedAccessKey={TEXT}", "DeviceId"),
]


@pytest.mark.parametrize(("text", "named"), REFUSED, ids=[repr(named) for _, named in REFUSED])
def test_a_bad_connection_string_is_named_and_no_secret_is(text, named):
    with pytest.raises(LocalError, match=named) as caught:
        from_connection_string(text)
    assert "SECRET" not in str(caught.value)
    assert TEXT not in str(caught.value)


BAD_KEYS = [
    "",
    "=",
    "====",
    "A===",
    "QUJ",
    "QUJDR",
    "QU=D",
    "QUI==",
    "QUJ-",
    "QU_D",
    "QUJ ",
    "QUJD\n",
    "QUJ%3D",
]


@pytest.mark.parametrize("text", BAD_KEYS, ids=repr)
def test_what_is_no_base64_is_no_key(text):
    with pytest.raises(LocalError, match="base64") as caught:
        decode_key(text)
    assert not text or text not in str(caught.value)


@FIXED
@given(st.binary(min_size=1, max_size=70))
def test_every_base64_key_decodes(key):
    assert decode_key(base64.b64encode(key).decode()) == key


# ---------------------------------------------------------------------- what is ordinary is read at a glance


@pytest.mark.parametrize("key", [KEY, KEY + b"!", KEY + b"!!", b"k"], ids=len)
@pytest.mark.parametrize("device_id", ["dev-1", "A_z.0~9", "x" * 128])
@pytest.mark.parametrize("port", [None, 1, 65535])
def test_the_ordinary_needs_no_thorough_reading(monkeypatch, key, device_id, port):
    for name in ("_connection_string_fields", "_identify", "decode_key"):
        monkeypatch.delattr(module, name)
    name = HOST if port is None else f"{HOST}:{port}"
    text = f"HostName={name};DeviceId={device_id};SharedAccessKey={base64.b64encode(key).decode()}"
    credentials = from_connection_string(text)
    assert (credentials.host, credentials.dialled, credentials.port) == (HOST, HOST, port)
    assert (credentials.client_id, credentials.key) == (device_id, key)


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except LocalError as error:
        return str(error)


# What stands in the place of a part of an ordinary connection string.
UNUSUAL = [
    ("HostName=", "Hostname="),
    ("HostName=", "GatewayHostName="),
    ("HostName=", "="),
    ("HostName=", ""),
    ("DeviceId=", "ModuleId="),
    ("DeviceId=", "DeviceId"),
    ("SharedAccessKey=", "SharedAccessSignature="),
    ("SharedAccessKey=", "x509=true;SharedAccessKey="),
    (HOST, ""),
    (HOST, HOST + " "),
    (HOST, HOST + ";" + HOST),
    (HOST, HOST + ";HostName=" + HOST),
    ("dev-1", ""),
    ("dev-1", "a=b"),
    ("dev-1", "a;b"),
    ("dev-1", "a b"),
    ("dev-1", "\ta"),
    (TEXT, ""),
    (TEXT, TEXT + "\n"),
    (TEXT, TEXT + ";"),
    (TEXT, TEXT + ";ModuleId=m"),
    (TEXT, TEXT + ";SharedAccessKeyName=p"),
]


def without_none(fields):
    return {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize(("part", "other"), [("", ""), *UNUSUAL], ids=repr)
def test_a_connection_string_is_the_same_at_a_glance_and_read_thoroughly(part, other):
    text = DEVICE.replace(part, other) if part else DEVICE
    both = [
        outcome(read, text) for read in (module.connection_string_fields, module._connection_string_fields)
    ]
    found, thorough = (without_none(each) if isinstance(each, dict) else each for each in both)
    assert found == thorough


ODD = ["a/b", "a b", "a%2Fb", "a%b", "é", "\udc80", "", "x" * 129]
PORTS = [
    "h:1",
    "h:65535",
    "h:0",
    "h:65536",
    "h:01",
    "h:-1",
    "h:+1",
    "h:1 ",
    "h:x",
    "h:",
    "h:1:2",
    ":1",
    "h:\uff11",
]
IDENTITIES = [
    {},
    *({"host": host} for host in (*ODD, *PORTS, "[::1]", "https://h")),
    *({"device_id": device_id} for device_id in (*ODD, *BAD_IDS, "a:b+c")),
    *({"module_id": module_id} for module_id in ("m", "", "a/b")),
    *({"key": key} for key in (*BAD_KEYS, "QR==", "\udc80", KEY, b"", None)),
    *({"gateway": gateway} for gateway in ("edge", "edge:1", "", "a/b")),
]


@pytest.mark.parametrize("fields", IDENTITIES, ids=repr)
def test_an_identity_is_the_same_at_a_glance_and_read_thoroughly(fields):
    given = {"host": HOST, "device_id": "dev-1", "module_id": None, "key": TEXT, "gateway": None, **fields}
    assert outcome(module.identify, *given.values()) == outcome(module._identify, *given.values())


@FIXED
@given(st.text(), st.text(), st.binary().map(base64.b64encode).map(bytes.decode) | st.text())
def test_any_identity_is_the_same_at_a_glance_and_read_thoroughly(host, device_id, key):
    given = (host, device_id, None, key, None)
    assert outcome(module.identify, *given) == outcome(module._identify, *given)


def test_the_key_never_shows():
    credentials = from_connection_string(DEVICE)
    for shown in (repr(credentials), str(credentials), f"{credentials}", repr([credentials])):
        assert TEXT not in shown
        assert "0123456789abcdef" not in shown
        assert HOST in shown
