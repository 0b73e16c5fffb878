"""The back end's side for scripts: IoT Hub's REST API with a service connection string.

It speaks to a real IoT Hub and to the local hub alike; the local hub shares no code with it.
"""

import http.client
import json
import ssl
import time
from types import TracebackType
from typing import Any
from urllib.parse import quote

from .core.credentials import decode_key, sas_token
from .core.errors import LocalError, RemoteError

API_VERSION = "2021-04-12"
_TOKEN_LIFETIME = 3600  # seconds


class BackendRefused(RemoteError):
    """The hub refused a request. status: int. code: the hub's name for it ("DeviceNotFound"), or ""."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"the hub refused it with status {status} {code}: {message}".replace(" :", ":"))
        self.status = status
        self.code = code


class Backend:
    """One connection to a hub's REST API.

    text: a service connection string (HostName, SharedAccessKeyName, SharedAccessKey). ca_file: PEM file to
    trust instead of the system's store. tls: False for a local hub's plaintext port. timeout: seconds for
    each request. LocalError names the part of the string that is missing or malformed.
    """

    def __init__(
        self, text: str, *, ca_file: str | None = None, tls: bool = True, timeout: float = 60
    ) -> None:
        parts = dict(part.partition("=")[::2] for part in text.strip().split(";") if part)
        for name in ("HostName", "SharedAccessKeyName", "SharedAccessKey"):
            if not parts.get(name):
                raise LocalError(f"{name} is missing in the service connection string")
        self._policy = parts["SharedAccessKeyName"]
        self._key = decode_key(parts["SharedAccessKey"])
        self._where = parts["HostName"]
        self._host, _, port = self._where.partition(":")
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise LocalError("HostName has a port that is not a number from 1 to 65535")
        if tls:
            try:
                context = ssl.create_default_context(cafile=ca_file)
            except OSError as error:
                raise LocalError(f"ca_file {ca_file!r} cannot be read: {error.strerror or error}") from None
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, int(port or 443), timeout=timeout, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(self._host, int(port or 80), timeout=timeout)

    def __repr__(self) -> str:
        return f"<Backend of {self._where}>"

    def __enter__(self) -> "Backend":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    # ------------------------------------------------------------------ identities

    def create(self, name: str, key: str | None = None) -> dict[str, Any]:
        """Create a device or module ("device/module") and return its identity. key: base64, made by the hub
        when None."""
        device, slash, module = name.partition("/")
        body: dict[str, Any] = {"deviceId": device}
        if slash:
            body["moduleId"] = module
        if key is not None:
            decode_key(key)
            body["authentication"] = {"type": "sas", "symmetricKey": {"primaryKey": key, "secondaryKey": key}}
        identity: dict[str, Any] = self._ask("PUT", _identity_path(name), body)[0]
        return identity

    def identity(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET", _identity_path(name))[0]
        return found

    def identities(self) -> list[dict[str, Any]]:
        """All devices, at most 1,000, in the hub's order."""
        found: list[dict[str, Any]] = self._ask("GET", "/devices?top=1000")[0]
        return found

    def delete(self, name: str) -> None:
        """Delete an identity, whatever its ETag."""
        self._ask("DELETE", _identity_path(name), if_match="*")

    def connection_string(self, name: str) -> str:
        """What the device or module connects with."""
        identity = self.identity(name)
        key = (identity.get("authentication") or {}).get("symmetricKey", {}).get("primaryKey")
        if not key:
            raise LocalError(f"{name} connects with a certificate: it has no key for a connection string")
        device, slash, module = name.partition("/")
        # Without the port, which is the one of the REST API.
        return f"HostName={self._host};DeviceId={device};" + (
            f"ModuleId={module};SharedAccessKey={key}" if slash else f"SharedAccessKey={key}"
        )

    # ------------------------------------------------------------------ twins and queries

    def twin(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask("GET", _twin_path(name))[0]
        return found

    def update_twin(self, name: str, body: dict[str, Any], *, replace: bool = False) -> dict[str, Any]:
        """Merge, or with replace put in the place of what is there: {"tags": ..., "properties": {"desired":
        ...}}. Returns the whole twin after it."""
        after: dict[str, Any] = self._ask(
            "PUT" if replace else "PATCH", _twin_path(name), body, if_match="*"
        )[0]
        return after

    def query(self, text: str) -> list[dict[str, Any]]:
        """All rows of a query, page by page."""
        rows: list[dict[str, Any]] = []
        continuation = None
        while True:
            headers = {"x-ms-continuation": continuation} if continuation else None
            page, answer = self._ask("POST", "/devices/query", {"query": text}, headers=headers)
            rows += page
            continuation = answer.get("x-ms-continuation")
            if not continuation:
                return rows

    # ------------------------------------------------------------------ every request

    def _ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        if_match: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[Any, Any]:
        expiry = int(time.time()) + _TOKEN_LIFETIME
        sent = {
            "Authorization": sas_token(self._host, self._key, expiry, self._policy),
            "Content-Type": "application/json; charset=utf-8",
            **(headers or {}),
        }
        if if_match is not None:
            sent["If-Match"] = if_match
        mark = "&" if "?" in path else "?"
        payload = None if body is None else json.dumps(body).encode()
        try:
            self._connection.request(method, f"{path}{mark}api-version={API_VERSION}", payload, sent)
            answer = self._connection.getresponse()
            text = answer.read()
        except ssl.SSLCertVerificationError as error:
            why = f"the certificate of {self._where} is not to be trusted: {error.verify_message}"
            raise RemoteError(why) from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RemoteError(f"cannot reach {self._where}: {why}") from None
        try:
            found = json.loads(text) if text else None
        except ValueError:
            found = None
        if answer.status >= 300:
            message = (
                found.get("Message", "") if isinstance(found, dict) else text[:200].decode(errors="replace")
            )
            if isinstance(message, dict):
                message = message.get("message", "")
            raise BackendRefused(answer.status, answer.headers.get("iothub-errorcode", ""), str(message))
        return found, answer.headers


def _identity_path(name: str) -> str:
    device, slash, module = name.partition("/")
    return f"/devices/{quote(device, safe='')}" + (f"/modules/{quote(module, safe='')}" if slash else "")


def _twin_path(name: str) -> str:
    return "/twins" + _identity_path(name)[len("/devices") :]
