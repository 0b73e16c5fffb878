"""Who the device is to the hub: connection string, SAS token, the three fields of CONNECT.

Sources: IoT Hub, "Control access with shared access signatures" and "Communicate with an IoT hub using the
MQTT protocol".
"""

import binascii
import hashlib

from .errors import ConnectRefused, LocalError

API_VERSION = "2021-04-12"
# Unix seconds: 2026-11-01. What a clock says is before this version was made, it cannot be right.
MADE = 1793491200

_DIGITS = "0123456789"
_LETTERS_AND_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" + _DIGITS
_UNRESERVED = _LETTERS_AND_DIGITS + "-._~"
_ID_SIGNS = "-:.+%_#*?!(),=@;$'"
_NAMES = (
    "HostName",
    "DeviceId",
    "ModuleId",
    "SharedAccessKey",
    "SharedAccessKeyName",
    "GatewayHostName",
    "SharedAccessSignature",
    "x509",
)


class Credentials:
    """A device's or module's identity and its key. The key never shows in repr.

    host: the hub's name as user name and token carry it, without port. device_id, module_id: str, None for a
    device's own identity. key: bytes, already decoded; None where a certificate stands for it. gateway: the
    name to dial instead of host. port: int, or None where the connection string has none. policy: the name
    of the hub's policy whose key it is, None for the identity's own key.
    LocalError names the part that cannot be right.
    """

    def __init__(
        self,
        host: str,
        device_id: str,
        module_id: "str | None" = None,
        key: "bytes | None" = None,
        gateway: "str | None" = None,
        port: "int | None" = None,
        policy: "str | None" = None,
    ) -> None:
        _check_id("DeviceId", device_id)
        if module_id is not None:
            _check_id("ModuleId", module_id)
        self.host, host_port = _split_port("HostName", host)
        self.gateway = None
        if gateway is not None:
            # The port that is dialled is the one of the name that is dialled.
            self.gateway, host_port = _split_port("GatewayHostName", gateway)
        self.port = host_port if port is None else port
        self.device_id = device_id
        self.module_id = module_id
        self.policy = policy
        self.key = key

    def __repr__(self) -> str:
        return "Credentials(" + self.host + ", " + self.client_id + ")"

    @property
    def client_id(self) -> str:
        """CONNECT's client identifier. Ids are never percent-encoded."""
        return self.device_id if self.module_id is None else self.device_id + "/" + self.module_id

    @property
    def dialled(self) -> str:
        """The host name to connect to, and to find in the hub's certificate."""
        return self.gateway or self.host

    def user_name(self, product_info: str = "", model_id: "str | None" = None) -> str:
        """CONNECT's user name. model_id: the device's DTMI (IoT Plug and Play)."""
        text = self.host + "/" + self.client_id + "/?api-version=" + API_VERSION
        if product_info:
            text += "&DeviceClientType=" + percent_encode(product_info)
        if model_id:
            text += "&model-id=" + percent_encode(model_id)
        return text

    def password(self, expiry: int) -> str:
        """CONNECT's password: a SAS token that is good until expiry (Unix seconds, UTC); "" without a key."""
        if self.key is None:
            return ""
        resource = self.host + "/devices/" + self.device_id
        if self.module_id is not None:
            resource += "/modules/" + self.module_id
        return sas_token(resource, self.key, expiry, self.policy)


def check_clock(now: int, date: str) -> None:
    """Raise ConnectRefused if a clock cannot be right, by which a token or a certificate is to be dated.

    now: what it says, in Unix seconds; date: the same, for a person.
    """
    if now < MADE:
        raise ConnectRefused(
            "the clock is not set, it says " + date + ", before this version was made: set it, by NTP", False
        )


def from_connection_string(text: str) -> Credentials:
    """The credentials in a device's or module's connection string, as IoT Hub hands it out.

    Raises LocalError that names the part that is missing, doubled, unknown or malformed; never its value,
    which may be a key.
    """
    return Credentials(**connection_string_fields(text))  # type: ignore[arg-type]  # the fields are its arguments


def connection_string_fields(text: str) -> "dict[str, object]":
    """The arguments of Credentials that a connection string stands for. Raises as from_connection_string."""
    if not isinstance(text, str) or not text.strip():
        raise LocalError("the connection string is empty")
    where = " in the connection string"
    values: "dict[str, str]" = {}
    parts = [part.strip() for part in text.strip().split(";")]
    for index, part in enumerate(parts):
        if not part:
            continue
        given, equals, value = part.partition("=")
        name = None
        for known in _NAMES:
            if known.lower() == given.strip().lower():
                name = known
        if name is None or not equals:
            raise LocalError(
                "part " + str(index + 1) + " of the connection string is not one of " + ", ".join(_NAMES)
            )
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
        "key": None if certified else decode_key(values["SharedAccessKey"]),
        "gateway": values.get("GatewayHostName"),
        "policy": values.get("SharedAccessKeyName"),
    }


def decode_key(text: str) -> bytes:
    """The bytes of a SharedAccessKey (base64). LocalError, without the text, if it is none."""
    body = text.rstrip("=")
    if not body or len(text) % 4 or len(text) - len(body) > 2 or _foreign(body, _LETTERS_AND_DIGITS + "+/"):
        raise LocalError("SharedAccessKey is not base64: is it cut off, or percent-encoded?")
    return binascii.a2b_base64(text.encode())


def sas_token(resource: str, key: bytes, expiry: int, policy: "str | None" = None) -> str:
    """A shared access signature for resource ("{host}/devices/{id}"), good until expiry (Unix seconds)."""
    encoded = percent_encode(resource)
    signature = hmac_sha256(key, (encoded + "\n" + str(expiry)).encode())
    text = "SharedAccessSignature sr=" + encoded
    text += "&sig=" + percent_encode(binascii.b2a_base64(signature).decode().strip())
    text += "&se=" + str(expiry)
    if policy:
        text += "&skn=" + percent_encode(policy)
    return text


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """RFC 2104 with SHA-256, 32 bytes. MicroPython has no hmac."""
    if len(key) > 64:
        key = hashlib.sha256(key).digest()
    key = key + bytes(64 - len(key))
    inner = hashlib.sha256(bytes([byte ^ 0x36 for byte in key]) + message).digest()
    return hashlib.sha256(bytes([byte ^ 0x5C for byte in key]) + inner).digest()


def percent_encode(text: str) -> str:
    """RFC 3986 with no safe characters but the unreserved ones; upper-case hex, as every SDK writes it."""
    encoded = ""
    for byte in text.encode():
        character = chr(byte)
        encoded += character if character in _UNRESERVED else "%{:02X}".format(byte)
    return encoded


def _foreign(text: str, allowed: str) -> str:
    """The first character that is not allowed; "" if there is none."""
    for character in text:
        if character not in allowed:
            return character
    return ""


def _check_id(name: str, value: object) -> None:
    if not isinstance(value, str) or not value or len(value) > 128:
        raise LocalError(name + " must be 1 to 128 characters")
    foreign = _foreign(value, _UNRESERVED + _ID_SIGNS)
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
        port = 0 if not digits or len(digits) > 5 or _foreign(digits, _DIGITS) else int(digits)
        if not 0 < port < 65536:
            raise LocalError(name + " has a port that is not a number from 1 to 65535")
    foreign = _foreign(host, _UNRESERVED + ":")
    if foreign:
        raise LocalError(name + " has a character that no host name has: " + repr(foreign))
    if not host:
        raise LocalError(name + " is empty")
    return host, port
