"""The back end's REST API: identities, twins, direct methods, queries, jobs.

Sources: IoT Hub REST reference (api-version 2021-04-12) and "Understand the identity registry".
"""

import asyncio
import base64
import binascii
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

from . import query, twins
from .console import Console
from .guard import Guards
from .jobs import JobRefused, Jobs, invoked, method_of
from .mqtt import Endpoint, MethodFailed
from .problem import Problem
from .registry import Identity, Refused, check_key, is_thumbprint, make_key
from .websocket import WebSockets

_log = logging.getLogger("twin_device.hub")
Document = dict[str, Any]

_MAX_BODY = 1024 * 1024
_BODY_WITHIN = 60.0  # seconds
_MAX_LIST = 1000
_PAGE = 100
_MAX_BULK = 100
# By what they are in lower case: clients differ.
_IMPORT_MODES = {
    mode.lower(): mode
    for mode in (
        "create",
        "createOrUpdate",
        "update",
        "updateIfMatchETag",
        "delete",
        "deleteIfMatchETag",
        "updateTwin",
        "updateTwinIfMatchETag",
    )
}
_WHICH = ("primary", "secondary")
_STATUSES = ("enabled", "disabled")
_AUTHENTICATION = ("sas", "selfSigned", "certificateAuthority", "none")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # it has one only from Python 3.11 on
    """What aiohttp logs. Of a request that it cannot read it quotes a line, which may be that of a token."""

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        error = options.get("exc_info")
        if isinstance(error, HttpProcessingError):
            # The peer's mistake; it is told.
            level, options["exc_info"] = logging.INFO, None
            msg = f"{msg}: {type(error).__name__}"
        super().log(level, msg, *args, **options)


class Service:
    """The REST API over one hub's devices. Everything here runs in the hub's event loop."""

    def __init__(self, endpoint: Endpoint, jobs: Jobs, guards: Guards) -> None:
        self._endpoint = endpoint
        self._guards = guards
        self._jobs = jobs
        self._registry = endpoint.registry
        self._rules = endpoint.settings.rules

    def application(self) -> web.Application:
        """What an aiohttp server serves."""
        application = web.Application(middlewares=[self._answer], client_max_size=_MAX_BODY)
        console = Console(self._endpoint)
        application.on_shutdown.append(console.close)
        for method, path, right, handler in (
            ("GET", "/devices", "RegistryRead", self._list_devices),
            ("GET", "/devices/", "RegistryRead", self._list_devices),
            ("POST", "/devices", "RegistryWrite", self._bulk),
            ("POST", "/devices/query", "ServiceConnect", self._query),
            ("GET", "/devices/{device}", "RegistryRead", self._get_identity),
            ("PUT", "/devices/{device}", "RegistryWrite", self._put_identity),
            ("DELETE", "/devices/{device}", "RegistryWrite", self._delete_identity),
            ("GET", "/devices/{device}/modules", "RegistryRead", self._list_modules),
            ("GET", "/devices/{device}/modules/{module}", "RegistryRead", self._get_identity),
            ("PUT", "/devices/{device}/modules/{module}", "RegistryWrite", self._put_identity),
            ("DELETE", "/devices/{device}/modules/{module}", "RegistryWrite", self._delete_identity),
            ("GET", "/twins/{device}", "ServiceConnect", self._get_twin),
            ("PATCH", "/twins/{device}", "ServiceConnect", self._write_twin),
            ("PUT", "/twins/{device}", "ServiceConnect", self._write_twin),
            ("GET", "/twins/{device}/modules/{module}", "ServiceConnect", self._get_twin),
            ("PATCH", "/twins/{device}/modules/{module}", "ServiceConnect", self._write_twin),
            ("PUT", "/twins/{device}/modules/{module}", "ServiceConnect", self._write_twin),
            ("POST", "/twins/{device}/methods", "ServiceConnect", self._invoke),
            ("POST", "/twins/{device}/modules/{module}/methods", "ServiceConnect", self._invoke),
            ("GET", "/jobs/v2/query", "ServiceConnect", self._list_jobs),
            ("PUT", "/jobs/v2/{job}", "ServiceConnect", self._create_job),
            ("GET", "/jobs/v2/{job}", "ServiceConnect", self._get_job),
            ("POST", "/jobs/v2/{job}/cancel", "ServiceConnect", self._cancel_job),
            ("GET", "/statistics/devices", "RegistryRead", self._device_statistics),
            ("GET", "/statistics/service", "ServiceConnect", self._service_statistics),
            ("GET", "/$iothub/websocket", "", WebSockets(self._endpoint).serve),
            *console.routes(),
        ):
            application.router.add_route(method, path, self._guarded(right, handler))
        return application

    # ------------------------------------------------------------------ every request

    def _guarded(self, right: str, handler: _Handler) -> _Handler:
        if not right:
            return handler

        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                rights = self._registry.authorize(
                    request.headers.get("Authorization", ""), request.path, time.time()
                )
            except Refused as error:
                raise Problem(401002, f"Unauthorized: {error}") from None
            if right not in rights:
                raise Problem(401002, f"Unauthorized: the policy does not grant {right}")
            try:
                # Read whole, and kept by aiohttp for whoever asks for it.
                await asyncio.wait_for(request.read(), _BODY_WITHIN)
            except asyncio.TimeoutError:
                raise Problem(408000, "The body did not come in time.") from None
            return await handler(request)

        return guarded

    @web.middleware
    async def _answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            with self._guards.serving(request.transport):
                return await handler(request)
        except Problem as error:
            problem = error
        except twins.Invalid as error:
            problem = Problem(error.code, error.message)
        except query.QueryError as error:
            problem = Problem(400004, str(error))
        except JobRefused as error:
            problem = Problem(error.code, error.message, error.name)
        except MethodFailed as error:
            problem = Problem(error.code, error.message)
        except web.HTTPRequestEntityTooLarge:
            problem = Problem(413001, f"A request has at most {_MAX_BODY} bytes.")
        except web.HTTPNotFound:
            problem = Problem(404001, f"There is no {request.path}.", "ResourceNotFound")
        except web.HTTPMethodNotAllowed:
            problem = Problem(405000, f"{request.method} is not for {request.path}.")
        except web.HTTPException:
            raise
        except Exception:  # noqa: BLE001  # no request may take the hub down
            _log.exception("an error of the hub in %s %s", request.method, request.path)
            problem = Problem(500001, "An error of the local hub; its log tells more.")
        return problem.response(self._endpoint.settings.service_error)

    async def _body(self, request: web.Request) -> Document:
        payload = await request.read()
        return twins.decode(payload or b"{}")

    def _identity(self, request: web.Request) -> Identity:
        name = _name(request)
        identity = self._registry.identities.get(name)
        if identity is None:
            device = request.match_info["device"]
            if "module" in request.match_info and device in self._registry.identities:
                raise Problem(404010, f"Module {name} not registered")
            raise Problem(404001, f"Device {device} not registered")
        return identity

    # ------------------------------------------------------------------ identities

    def _identity_view(self, identity: Identity) -> Document:
        connected = identity.id in self._endpoint.connections
        view: Document = {"deviceId": identity.device_id}
        if identity.module_id is not None:
            view["moduleId"] = identity.module_id
            view["managedBy"] = identity.managed_by
        else:
            view["status"] = "enabled" if identity.enabled else "disabled"
            view["statusReason"] = identity.status_reason
            view["statusUpdatedTime"] = twins.NEVER
            view["capabilities"] = {"iotEdge": identity.is_edge}
        primary, secondary = identity.thumbprints
        sas = identity.authentication == "sas"
        return {
            **view,
            "generationId": identity.generation,
            "etag": identity.etag,
            "connectionState": "Connected" if connected else "Disconnected",
            "connectionStateUpdatedTime": self._endpoint.state_times.get(identity.id, twins.NEVER),
            "lastActivityTime": self._endpoint.last_activity(identity.id),
            "cloudToDeviceMessageCount": len(self._endpoint.messages[identity.id]),
            "authentication": {
                "type": identity.authentication,
                "symmetricKey": {
                    "primaryKey": identity.primary_key if sas else None,
                    "secondaryKey": identity.secondary_key if sas else None,
                },
                "x509Thumbprint": {"primaryThumbprint": primary, "secondaryThumbprint": secondary},
            },
        }

    def _identity_response(self, identity: Identity) -> web.Response:
        headers = {"ETag": f'"{identity.etag}"'}
        return web.json_response(self._identity_view(identity), headers=headers)

    async def _list_devices(self, request: web.Request) -> web.Response:
        top = request.query.get("top", str(_MAX_LIST))
        if not (_is_count(top) and int(top) <= _MAX_LIST):
            raise Problem(400004, f"top is a number from 1 to {_MAX_LIST}.")
        found = [one for one in self._registry.identities.values() if one.module_id is None]
        return web.json_response([self._identity_view(one) for one in found[: int(top)]])

    async def _list_modules(self, request: web.Request) -> web.Response:
        device = self._identity(request)
        found = [
            one
            for one in self._registry.identities.values()
            if one.device_id == device.device_id and one.module_id is not None
        ]
        return web.json_response([self._identity_view(one) for one in found])

    async def _get_identity(self, request: web.Request) -> web.Response:
        return self._identity_response(self._identity(request))

    async def _put_identity(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        name = _name(request)
        for member in ("deviceId", "moduleId"):
            wanted = request.match_info.get(member[:-2])
            if body.get(member) is not None and body[member] != wanted:
                raise Problem(400004, f"{member} in the body is not the one in the path.")
        condition = request.headers.get("If-Match")
        settings = _identity_settings(body)
        if condition is None:
            return self._identity_response(self._create(name, settings, None))
        identity = self._identity(request)
        _check_condition(condition, identity.etag)
        self._update(identity, settings)
        return self._identity_response(identity)

    def _create(self, name: str, settings: Document, twin: twins.Twin | None) -> Identity:
        """Register an identity. Nothing is changed when that is refused."""
        device, slash, _ = name.partition("/")
        if name in self._registry.identities:
            what, code = ("module", 409301) if slash else ("device", 409001)
            raise Problem(code, f"A {what} with ID '{name}' is already registered.")
        if slash and device not in self._registry.identities:
            raise Problem(404001, f"Device {device} not registered")
        try:
            identity = self._registry.create(name)
        except ValueError as error:
            raise Problem(400004, str(error)) from None
        identity.change(**settings)
        self._endpoint.create(identity, twin)
        return identity

    def _update(self, identity: Identity, settings: Document) -> None:
        was_enabled = identity.enabled
        identity.change(**settings)
        self._endpoint.keep(identity.id)
        if was_enabled and not identity.enabled:
            self._endpoint.drop_with_modules(identity.id)
        self._endpoint.changed()

    def _delete(self, identity: Identity) -> None:
        for name in self._registry.delete(identity.id):
            self._endpoint.delete(name)

    async def _delete_identity(self, request: web.Request) -> web.Response:
        identity = self._identity(request)
        condition = request.headers.get("If-Match")
        if condition is None:
            raise Problem(412001, 'Precondition failed: a delete needs If-Match, "*" or the ETag.')
        _check_condition(condition, identity.etag)
        self._delete(identity)
        return web.Response(status=204)

    # ------------------------------------------------------------------ many identities at once

    async def _bulk(self, request: web.Request) -> web.Response:
        try:
            # The body is an array, which no other request has: as a member it can be read like the others.
            (items,) = twins.decode(b'{"items":%b}' % await request.read()).values()
        except ValueError:
            items = None
        if not isinstance(items, list) or not items:
            raise Problem(400004, "The body is an array of identities, with one at least.")
        if len(items) > _MAX_BULK:
            raise Problem(413002, f"At most {_MAX_BULK} identities at once.")
        errors = []
        for item in items:
            try:
                self._apply(item)
            except (Problem, twins.Invalid) as error:
                problem = error if isinstance(error, Problem) else Problem(error.code, error.message)
                one = item if isinstance(item, dict) else {}
                told = {"deviceId": one.get("id"), "errorCode": problem.name, "errorStatus": problem.message}
                errors.append({**told, "moduleId": one["moduleId"]} if one.get("moduleId") else told)
        result = {"isSuccessful": not errors, "errors": errors, "warnings": []}
        return web.json_response(result, status=400 if errors else 200)

    def _apply(self, item: Any) -> None:
        """One identity of a bulk request: its importMode says what to do."""
        if not isinstance(item, dict) or not isinstance(item.get("id"), str):
            raise Problem(400004, "An identity of a bulk request is an object with an id.")
        device, module = item["id"], item.get("moduleId")
        if "/" in device or not isinstance(module, str | None):
            raise Problem(400004, "id is the device's, moduleId a text.")
        name = f"{device}/{module}" if module else device
        mode = str(item.get("importMode") or "createOrUpdate").lower()
        if mode not in _IMPORT_MODES:
            raise Problem(400004, f"importMode is one of {', '.join(_IMPORT_MODES.values())}.")
        identity = self._registry.identities.get(name)
        if mode == "create" or (mode == "createorupdate" and identity is None):
            tags, properties = item.get("tags") or {}, item.get("properties") or {}
            if not isinstance(properties, dict):
                raise Problem(400004, "properties is no object.")
            desired = twins.written(properties.get("desired") or {}, nulls=False, rules=self._rules)
            self._create(name, _identity_settings(item), twins.new(desired, tags, self._rules))
            return
        if identity is None:
            known = module is not None and device in self._registry.identities
            raise Problem(404010 if known else 404001, f"{name} is not registered.")
        twin = mode.startswith("updatetwin")
        if mode.endswith("ifmatchetag"):
            etag = self._endpoint.twins[name].etag if twin else identity.etag
            _check_condition(str(item.get("twinETag" if twin else "eTag") or ""), etag)
        if mode.startswith("delete"):
            self._delete(identity)
        elif twin:
            sections = {part: item[part] for part in ("tags", "properties") if part in item}
            self._endpoint.update_twin(name, sections)
        else:
            self._update(identity, _identity_settings(item))

    # ------------------------------------------------------------------ twins

    def _twin_response(self, identity: Identity) -> web.Response:
        view = self._endpoint.twin_view(identity)
        return web.json_response(view, headers={"ETag": f'"{view["etag"]}"'})

    async def _get_twin(self, request: web.Request) -> web.Response:
        return self._twin_response(self._identity(request))

    async def _write_twin(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        identity = self._identity(request)
        condition = request.headers.get("If-Match")
        # Clients that leave the quotes out get no condition at all, as with the real service.
        if condition is not None and '"' in condition:
            _check_condition(condition, self._endpoint.twins[identity.id].etag)
        if request.method == "PUT":
            self._endpoint.replace_twin(identity.id, body)
        else:
            self._endpoint.update_twin(identity.id, body)
        return self._twin_response(identity)

    # ------------------------------------------------------------------ queries

    async def _query(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        text = body.get("query")
        if not isinstance(text, str):
            raise Problem(400004, "The body has no query.")
        parsed = query.parse(text)
        if parsed.collection == "devices.jobs":
            documents = [row for job in self._jobs for row in job.rows()]
        else:
            modules = parsed.collection == "devices.modules"
            documents = [
                self._endpoint.twin_view(identity)
                for identity in self._registry.identities.values()
                if (identity.module_id is not None) is modules
            ]
        whole = "DeviceJob" if parsed.collection == "devices.jobs" else "Twin"
        rows = query.run(parsed, documents)
        return _page(request, rows, text, "Raw" if parsed.is_raw else whole)

    # ------------------------------------------------------------------ direct methods and jobs

    async def _invoke(self, request: web.Request) -> web.Response:
        identity = self._identity(request)
        method = method_of(await self._body(request))
        return web.json_response(await invoked(self._endpoint, identity.id, method))

    async def _create_job(self, request: web.Request) -> web.Response:
        job = self._jobs.create(request.match_info["job"], await self._body(request))
        return web.json_response(job.view())

    async def _get_job(self, request: web.Request) -> web.Response:
        name = request.match_info["job"]
        job = self._jobs.get(name)
        if job is None:
            return web.json_response({"jobId": name, "type": "unknown", "status": "unknown"})
        return web.json_response(job.view())

    async def _cancel_job(self, request: web.Request) -> web.Response:
        return web.json_response(self._jobs.cancel(request.match_info["job"]).view())

    async def _list_jobs(self, request: web.Request) -> web.Response:
        kind, status = (request.query.get(name, "").lower() for name in ("jobType", "jobStatus"))
        rows = [
            job.view()
            for job in self._jobs
            if kind in ("", job.type.lower()) and status in ("", job.status.lower())
        ]
        return _page(request, rows, f"{kind} {status}", "JobResponse")

    # ------------------------------------------------------------------ statistics

    async def _device_statistics(self, _request: web.Request) -> web.Response:
        devices = [one for one in self._registry.identities.values() if one.module_id is None]
        enabled = sum(one.enabled for one in devices)
        return web.json_response(
            {
                "totalDeviceCount": len(devices),
                "enabledDeviceCount": enabled,
                "disabledDeviceCount": len(devices) - enabled,
            }
        )

    async def _service_statistics(self, _request: web.Request) -> web.Response:
        return web.json_response({"connectedDeviceCount": len(self._endpoint.connections)})


def _name(request: web.Request) -> str:
    module = request.match_info.get("module")
    if any("/" in value for value in request.match_info.values()):
        # Percent-encoded: no id has one, and "device/module" is how the hub itself names a module.
        raise Problem(400004, "An id has no slash.")
    return request.match_info["device"] + ("" if module is None else f"/{module}")


def _check_condition(condition: str, etag: str) -> None:
    if condition.strip().strip('"') not in ("*", etag):
        raise Problem(
            412001, "Precondition failed: Invalid ETag, the identity or twin was changed meanwhile."
        )


def _identity_settings(body: Document) -> Document:
    """What a PUT says of an identity: the arguments of Identity.change."""
    status = body.get("status") or "enabled"
    if status not in _STATUSES:
        raise Problem(400004, f"status is enabled or disabled, not {status!r}.")
    reason = body.get("statusReason")
    authentication = body.get("authentication") or {}
    if not isinstance(authentication, dict) or not isinstance(reason, str | None):
        raise Problem(400004, "authentication is no object, or statusReason no string.")
    managed_by, capabilities = body.get("managedBy") or "", body.get("capabilities") or {}
    if not isinstance(managed_by, str) or not isinstance(capabilities, dict):
        raise Problem(400004, "managedBy is no string, or capabilities no object.")
    is_edge = capabilities.get("iotEdge") or False
    if not isinstance(is_edge, bool):
        raise Problem(400004, "capabilities.iotEdge is true or false.")
    kind = authentication.get("type") or "sas"
    if kind not in _AUTHENTICATION:
        raise Problem(400004, f"authentication.type is one of {', '.join(_AUTHENTICATION)}.")
    keys, thumbprints = authentication.get("symmetricKey") or {}, authentication.get("x509Thumbprint") or {}
    if not isinstance(keys, dict) or not isinstance(thumbprints, dict):
        raise Problem(400004, "symmetricKey or x509Thumbprint is no object.")
    primary, secondary = keys.get("primaryKey") or None, keys.get("secondaryKey") or None
    for key in (primary, secondary):
        if key is not None and not _is_key(key):
            raise Problem(400004, "A key in symmetricKey is not base64 of 16 to 64 bytes.")
    if (primary is None) is not (secondary is None):
        raise Problem(400004, "symmetricKey has both keys or none.")
    if not body.get("authentication"):
        # As the service does: who says nothing of keys gets new ones, with an update too.
        primary, secondary = make_key(), make_key()
    shown = tuple(_thumbprint(thumbprints.get(f"{which}Thumbprint")) for which in _WHICH)
    if kind == "selfSigned" and not any(shown):
        raise Problem(400004, "An identity of type selfSigned has a thumbprint.")
    return {
        "enabled": status == "enabled",
        "status_reason": reason,
        "managed_by": managed_by,
        "is_edge": is_edge,
        "authentication": kind,
        "primary_key": primary,
        "secondary_key": secondary,
        "thumbprints": shown,
    }


def _thumbprint(value: Any) -> str | None:
    if not value:
        return None
    if not isinstance(value, str) or not is_thumbprint(value):
        raise Problem(400004, "A thumbprint is 40 or 64 hexadecimal digits.")
    return value


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0


def _is_key(key: Any) -> bool:
    try:
        return 16 <= len(base64.b64decode(check_key(key))) <= 64
    except (ValueError, TypeError):
        return False


def _page(request: web.Request, rows: list[Document], text: str, kind: str) -> web.Response:
    """The rows that the request's headers ask for. text: what was asked; kind: what the rows are."""
    start = _continued(request.headers.get("x-ms-continuation"), text)
    size = request.headers.get("x-ms-max-item-count") or str(_PAGE)
    if not _is_count(size):
        raise Problem(400004, "x-ms-max-item-count is a number from 1 up.")
    end = start + min(int(size), _PAGE)
    headers = {"x-ms-item-type": kind}
    if end < len(rows):
        headers["x-ms-continuation"] = _continuation(text, end)
    return web.json_response(rows[start:end], headers=headers)


def _continuation(text: str, offset: int) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return base64.urlsafe_b64encode(f"{digest}:{offset}".encode()).decode()


def _continued(token: str | None, text: str) -> int:
    """Where the next page begins. A token that is of another query, or none of ours, is refused."""
    if not token:
        return 0
    try:
        _, _, offset = base64.b64decode(token, b"-_", validate=True).decode().partition(":")
        start = int(offset)
    except (binascii.Error, ValueError):
        start = -1
    if start < 0 or _continuation(text, start) != token:
        raise Problem(400004, "x-ms-continuation is not of this query.")
    return start
