"""The back end's side for scripts: IoT Hub's REST API with a service connection string.

It speaks to a real IoT Hub and to the local hub alike; the local hub shares no code with it.
"""

import http.client
import json
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    def create(
        self,
        name: str,
        key: str | None = None,
        *,
        thumbprints: Sequence[str] = (),
        ca_signed: bool = False,
    ) -> dict[str, Any]:
        """Create a device or module ("device/module") and return its identity. key: base64, made by the hub
        when None. thumbprints: of one or two certificates that it connects with, in place of a key: SHA-1 or
        SHA-256 in hexadecimal. ca_signed: its certificate is signed by a CA that the hub knows."""
        device, slash, module = name.partition("/")
        body: dict[str, Any] = {"deviceId": device}
        if slash:
            body["moduleId"] = module
        if key is not None:
            decode_key(key)
            body["authentication"] = {"type": "sas", "symmetricKey": {"primaryKey": key, "secondaryKey": key}}
        if thumbprints:
            primary, secondary = (*thumbprints, None)[:2]
            shown = {"primaryThumbprint": primary, "secondaryThumbprint": secondary}
            body["authentication"] = {"type": "selfSigned", "x509Thumbprint": shown}
        if ca_signed:
            body["authentication"] = {"type": "certificateAuthority"}
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
        """What the device or module connects with; x509=true in place of a key if that is a certificate."""
        authentication = self.identity(name).get("authentication") or {}
        if authentication.get("type") in ("selfSigned", "certificateAuthority"):
            proof = "x509=true"
        else:
            key = (authentication.get("symmetricKey") or {}).get("primaryKey")
            if not key:
                raise LocalError(f"{name} has no key for a connection string")
            proof = f"SharedAccessKey={key}"
        device, slash, module = name.partition("/")
        # Without the port, which is the one of the REST API.
        return f"HostName={self._host};DeviceId={device};" + (f"ModuleId={module};" if slash else "") + proof

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
        return self._pages("POST", "/devices/query", {"query": text})

    # ------------------------------------------------------------------ direct methods and jobs

    def invoke(self, name: str, method: dict[str, Any]) -> dict[str, Any]:
        """Have a device perform a direct method; returns {"status": ..., "payload": ...}.

        method: {"methodName": ..., "payload": ..., "responseTimeoutInSeconds": ...}. The request's own
        timeout has to be longer than the method's.
        """
        answer: dict[str, Any] = self._ask("POST", f"{_twin_path(name)}/methods", method)[0]
        return answer

    def create_job(self, job_id: str, body: dict[str, Any]) -> dict[str, Any]:
        """Make a job of {"type": ..., "queryCondition": ..., ...} and return it as it is then."""
        made: dict[str, Any] = self._ask("PUT", _job_path(job_id), {"jobId": job_id, **body})[0]
        return made

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as it is now. LocalError: there is none, which hubs tell by its status "unknown"."""
        found: dict[str, Any] = self._ask("GET", _job_path(job_id))[0]
        if found.get("status") == "unknown":
            raise LocalError(f"there is no job {job_id!r}")
        return found

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that the hub still knows."""
        return self._pages("GET", "/jobs/v2/query", None)

    def cancel_job(self, job_id: str) -> dict[str, Any]:
        cancelled: dict[str, Any] = self._ask("POST", f"{_job_path(job_id)}/cancel")[0]
        return cancelled

    # ------------------------------------------------------------------ what only the local hub has

    def events(self, sources: list[str], device: str | None) -> Iterator[dict[str, Any]]:
        """Its events from now on, without an end; sources: all but packets when empty. The first thing that
        comes is {}, once nothing is missed any more.

        RemoteError: the stream ended, or was silent for the connection's timeout.
        """
        query = "".join(f"&source={quote(source, safe='')}" for source in sources)
        if device is not None:
            query += f"&deviceId={quote(device, safe='')}"
        with self._local(), self._opened("GET", f"/local/events?{query.lstrip('&')}") as answer:
            yield {}
            for line in answer:
                name, _, value = line.rstrip(b"\r\n").partition(b": ")
                if name == b"data":
                    yield json.loads(value)
        raise RemoteError(f"{self._where} ended the stream of its events")

    def faults(self) -> dict[str, Any]:
        """{"kinds": what there is, "active": what is set}."""
        with self._local():
            found: dict[str, Any] = self._ask("GET", "/local/faults")[0]
        return found

    def set_fault(self, fault: dict[str, Any]) -> dict[str, Any]:
        """Set one; returns it with its id."""
        with self._local():
            made: dict[str, Any] = self._ask("POST", "/local/faults", fault)[0]
        return made

    def clear_faults(self, fault_id: str | None = None) -> None:
        """Clear one, or all."""
        with self._local():
            self._ask(
                "DELETE", "/local/faults" + ("" if fault_id is None else f"/{quote(fault_id, safe='')}")
            )

    def forget_sessions(self) -> None:
        """Have the hub forget what devices subscribed to."""
        with self._local():
            self._ask("DELETE", "/local/sessions")

    def disconnect(self, name: str) -> None:
        """End a device's connection, like a network that is gone."""
        with self._local():
            self._ask("DELETE", f"/local/connections/{quote(name, safe='')}")

    @contextmanager
    def _local(self) -> Iterator[None]:
        try:
            yield
        except BackendRefused as error:
            if error.status == 404 and error.code not in ("DeviceNotFound", "FaultNotFound"):
                raise LocalError(f"{self._where} is no local hub: only that has events and faults") from None
            raise

    # ------------------------------------------------------------------ every request

    def _pages(self, method: str, path: str, body: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        continuation = None
        while True:
            headers = {"x-ms-continuation": continuation} if continuation else None
            page, answer = self._ask(method, path, body, headers=headers)
            rows += page
            continuation = answer.get("x-ms-continuation")
            if not continuation:
                return rows

    def _ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        if_match: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[Any, Any]:
        with self._opened(method, path, body, if_match=if_match, headers=headers) as answer:
            return _decoded(answer.read()), answer.headers

    @contextmanager
    def _opened(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        if_match: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, its body still to be read."""
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
            if answer.status >= 300:
                raise _refused(answer, answer.read())
            yield answer
        except ssl.SSLCertVerificationError as error:
            why = f"the certificate of {self._where} is not to be trusted: {error.verify_message}"
            raise RemoteError(why) from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RemoteError(f"cannot reach {self._where}: {why}") from None


def _decoded(text: bytes) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


def _refused(answer: http.client.HTTPResponse, text: bytes) -> BackendRefused:
    found = _decoded(text)
    message = found.get("Message", "") if isinstance(found, dict) else text[:200].decode(errors="replace")
    if isinstance(message, dict):
        message = message.get("message", "")
    return BackendRefused(answer.status, answer.headers.get("iothub-errorcode", ""), str(message))


def _identity_path(name: str) -> str:
    device, slash, module = name.partition("/")
    return f"/devices/{quote(device, safe='')}" + (f"/modules/{quote(module, safe='')}" if slash else "")


def _twin_path(name: str) -> str:
    return "/twins" + _identity_path(name)[len("/devices") :]


def _job_path(job_id: str) -> str:
    return f"/jobs/v2/{quote(job_id, safe='')}"
