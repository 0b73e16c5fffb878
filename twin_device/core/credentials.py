"""Who the device is to the hub: connection string, SAS token, the three fields of CONNECT.

Sources: IoT Hub, "Control access with shared access signatures" and "Communicate with an IoT hub using the
MQTT protocol".

What is ordinary is taken at a glance: a connection string as the hub hands it out, plain names, a key. All
else is read by the function of the same name with a _, which says what cannot be right; a board has that in
its flash, and reads it when it is needed.
"""

import binascii
import hashlib

from .errors import ConnectRefused, LocalError

_QUERY = "/?api-version=2021-04-12"
# Unix seconds: 2026-11-01. What a clock says is before this version was made, it cannot be right.
MADE = 1793491200


class Credentials:
    """A device's or module's identity and its key. The key never shows in repr.

    host: the hub's name as user name and token carry it, without port. device_id, module_id: str, None for a
    device's own identity. key: bytes, or str as connection strings have it (base64); None where a certificate
    stands for it. gateway: the name to dial instead of host. port: int, None for the one given with the name,
    if any. policy: the name of the hub's policy whose key it is, None for the identity's own key.
    LocalError names the part that cannot be right.

    dialled: the host name to connect to, and to find in the hub's certificate. client_id: CONNECT's client
    identifier; ids are never percent-encoded.
    """

    def __init__(
        self,
        host: str,
        device_id: str,
        module_id: "str | None" = None,
        key: "str | bytes | None" = None,
        gateway: "str | None" = None,
        port: "int | None" = None,
        policy: "str | None" = None,
    ) -> None:
        whose, self._resource, self.key, self.dialled, its_port = identify(
            host, device_id, module_id, key, gateway
        )
        self._whose = whose
        self.host, _, self.client_id = whose.partition("/")
        self.port = its_port if port is None else port
        self.device_id = device_id
        self.module_id = module_id
        self.policy = policy

    def __repr__(self) -> str:
        return "Credentials(" + self.host + ", " + self.client_id + ")"

    def user_name(self, product_info: str = "", model_id: "str | None" = None) -> str:
        """CONNECT's user name. model_id: the device's DTMI (IoT Plug and Play)."""
        return user_name(self._whose, product_info, model_id)

    def password(self, expiry: int) -> str:
        """CONNECT's password: a SAS token that is good until expiry (Unix seconds, UTC); "" without a key."""
        return "" if self.key is None else sas_token(self._resource, self.key, expiry, self.policy)


def from_connection_string(text: str) -> Credentials:
    """The credentials in a device's or module's connection string, as IoT Hub hands it out.

    Raises LocalError that names the part that is missing, doubled, unknown or malformed; never its value,
    which may be a key.
    """
    return Credentials(**connection_string_fields(text))  # type: ignore[arg-type]  # the fields are its arguments


def connection_string_fields(text: str) -> "dict[str, object]":
    """The arguments of Credentials that a connection string stands for. Raises as from_connection_string."""
    parts = str(text).replace("=", ";", 3).split(";")
    if len(parts) == 6:
        _, host, _, device_id, _, key = parts
        whole = "HostName=%s;DeviceId=%s;SharedAccessKey=%s" % (host, device_id, key)
        # Not a blank in it.
        if host and device_id and key and text.split() == [whole]:
            return {"host": host, "device_id": device_id, "key": key}
    return _connection_string_fields(text)


def _connection_string_fields(text: str) -> "dict[str, object]":
    """Any other: its parts in any order and case, with blanks, those that are optional, and what is wrong."""
    known = (
        "HostName",
        "DeviceId",
        "ModuleId",
        "SharedAccessKey",
        "SharedAccessKeyName",
        "GatewayHostName",
        "SharedAccessSignature",
        "x509",
    )
    if not isinstance(text, str) or not text.strip():
        raise LocalError("the connection string is empty")
    where = " in the connection string"
    values: "dict[str, str]" = {}
    parts = [part.strip() for part in text.strip().split(";")]
    for index, part in enumerate(parts):
        if not part:
            continue
        given, equals, value = part.partition("=")
        alike = [name for name in known if name.lower() == given.strip().lower()]
        if not alike or not equals:
            raise LocalError(
                "part " + str(index + 1) + " of the connection string is not one of " + ", ".join(known)
            )
        name = alike[0]
        if name in values:
            raise LocalError(name + " appears twice" + where)
        value = value.strip()
        if not value:
            raise LocalError(name + " is empty" + where)
        values[name] = value
    if "SharedAccessSignature" in values:
        raise LocalError("SharedAccessSignature in a connection string is not supported: SharedAccessKey is")
    certified = values.get("x509", "").lower() == "true"
    if certified and "SharedAccessKey" in values:
        raise LocalError("x509=true and SharedAccessKey exclude each other" + where)
    for name in ("HostName", "DeviceId", "SharedAccessKey"):
        if name not in values and not (certified and name == "SharedAccessKey"):
            hint = ""
            if name == "DeviceId" and "SharedAccessKeyName" in values:
                hint = ": this is a service's, a device's is needed"
            raise LocalError(name + " is missing" + where + hint)
    return {
        "host": values["HostName"],
        "device_id": values["DeviceId"],
        "module_id": values.get("ModuleId"),
        "key": None if certified else values["SharedAccessKey"],
        "gateway": values.get("GatewayHostName"),
        "policy": values.get("SharedAccessKeyName"),
    }


def identify(
    host: str, device_id: str, module_id: "str | None", key: "str | bytes | None", gateway: "str | None"
) -> "tuple[str, str, bytes | None, str, int | None]":
    """An identity, checked: whose, resource, key, dialled, port. Arguments and LocalError as Credentials.

    whose: "host/device_id" or "host/device_id/module_id". resource: what sas_token() takes. key: bytes or
    None. dialled: as of Credentials. port: that of the name that is dialled, None where it has none.
    """
    try:
        name, colon, digits = host.partition(":")
        port = int(digits) if colon else None
        # An id has 128 characters at the most.
        whose = "%s/%.128s" % (name, device_id)
        encoded = key.encode()  # type: ignore[union-attr]  # what is not a str is read thoroughly, too
        decoded = binascii.a2b_base64(encoded)
        if (
            percent_encode(whose).split("%2F") == [name, device_id]
            and binascii.b2a_base64(decoded).strip() == encoded
            and (name and device_id and key and module_id is None and gateway is None)
            and (port is None or (digits == str(port) and 0 < port < 65536))
        ):
            return whose, whose.replace("/", "/devices/"), decoded, name, port
    except Exception:  # noqa: BLE001, S110  # which it is depends on the binascii; the thorough reading tells
        pass
    return _identify(host, device_id, module_id, key, gateway)


def _identify(
    host: str, device_id: str, module_id: "str | None", key: "str | bytes | None", gateway: "str | None"
) -> "tuple[str, str, bytes | None, str, int | None]":
    """Any other: an IPv6 address, signs to encode, a module, a gateway, no key, and what is wrong."""
    if isinstance(key, str):
        key = decode_key(key)
    _check_id("DeviceId", device_id)
    if module_id is not None:
        _check_id("ModuleId", module_id)
    host, port = _split_port("HostName", host)
    dialled = host
    if gateway is not None:
        # The port that is dialled is the one of the name that is dialled.
        dialled, port = _split_port("GatewayHostName", gateway)
    whose = host + "/" + device_id
    resource = host + "/devices/" + device_id
    if module_id is not None:
        whose += "/" + module_id
        resource += "/modules/" + module_id
    return whose, resource, key, dialled, port


def decode_key(text: str) -> bytes:
    """The bytes of a SharedAccessKey (base64). LocalError, without the text, if it is none."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    body = text.rstrip("=")
    if not body or len(text) % 4 or len(text) - len(body) > 2 or body.strip(alphabet):
        raise LocalError("SharedAccessKey is not base64: is it cut off, or percent-encoded?")
    return binascii.a2b_base64(text.encode())


def clock_unset(date: str) -> ConnectRefused:
    """The error of a clock that says a time before MADE, by which a token or a certificate is to be dated.

    date: what it says, for a person.
    """
    return ConnectRefused(
        "the clock is not set, it says " + date + ", before this version was made: set it, by NTP", False
    )


def user_name(whose: str, product_info: str, model_id: "str | None") -> str:
    """CONNECT's user name. whose: of identify(). model_id: the device's DTMI (IoT Plug and Play)."""
    text = whose + _QUERY
    if product_info:
        text += "&DeviceClientType=" + percent_encode(product_info)
    if model_id:
        text += "&model-id=" + percent_encode(model_id)
    return text


def sas_token(resource: str, key: bytes, expiry: int, policy: "str | None" = None) -> str:
    """A shared access signature for resource ("{host}/devices/{id}"), good until expiry (Unix seconds)."""
    encoded = percent_encode(resource)
    signature = hmac_sha256(key, (encoded + "\n%d" % expiry).encode())
    signed = percent_encode(binascii.b2a_base64(signature).decode().strip())
    text = "SharedAccessSignature sr=%s&sig=%s&se=%d" % (encoded, signed, expiry)
    if policy:
        text += "&skn=" + percent_encode(policy)
    return text


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    """RFC 2104 with SHA-256, 32 bytes. MicroPython has no hmac."""
    if len(key) > 64:
        key = hashlib.sha256(key).digest()
    key += bytes(64 - len(key))
    for pad in b"\x36\x5c":
        padded = [byte ^ pad for byte in key]
        data = hashlib.sha256(bytes(padded) + data).digest()
    return data


def percent_encode(text: str) -> str:
    """RFC 3986 with no safe characters but the unreserved ones; upper-case hex, as every SDK writes it."""
    encoded = ""
    for byte in text.encode():
        # Of bytes, only ASCII's letters are letters.
        sign = bytes((byte,))
        encoded += sign.decode() if sign.isalpha() or sign.isdigit() or sign in b"-._~" else "%%%02X" % byte
    return encoded


def _foreign(text: str, signs: str) -> str:
    """The first character that is neither unreserved (RFC 3986) nor one of signs; "" if there is none."""
    allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~" + signs
    for character in text:
        if character not in allowed:
            return character
    return ""


def _check_id(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or len(value) > 128:
        raise LocalError(name + " must be 1 to 128 characters")
    foreign = _foreign(value, ":+%#*?!(),=@;$'")
    if foreign:
        raise LocalError(name + " has a character that IoT Hub does not allow: " + repr(foreign))


def _split_port(name: str, host: str) -> "tuple[str, int | None]":
    if "://" in host:
        raise LocalError(name + " is a host name, not a URL")
    port = None
    if host.startswith("["):
        # An IPv6 address in brackets.
        host, bracket, rest = host[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise LocalError(name + " is not a host name")
        digits = rest[1:] if rest else None
    elif ":" in host:
        host, _, digits = host.partition(":")
    else:
        digits = None
    if digits is not None:
        port = 0 if not digits or len(digits) > 5 or digits.strip("0123456789") else int(digits)
        if not 0 < port < 65536:
            raise LocalError(name + " has a port that is not a number from 1 to 65535")
    foreign = _foreign(host, ":")
    if foreign:
        raise LocalError(name + " has a character that no host name has: " + repr(foreign))
    if not host:
        raise LocalError(name + " is empty")
    return host, port
