"""The back end's REST API: identities, twins, queries.

Sources: IoT Hub REST reference (api-version 2021-04-12) and "Understand the identity registry".
"""

import base64
import binascii
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from . import query, twins
from .console import Console
from .mqtt import Endpoint
from .problem import Problem
from .registry import Identity, Refused, check_key

_log = logging.getLogger("twin_device.hub")
Document = dict[str, Any]

_MAX_BODY = 1024 * 1024
_MAX_LIST = 1000
_PAGE = 100
_STATUSES = ("enabled", "disabled")
_AUTHENTICATION = ("sas", "selfSigned", "certificateAuthority", "none")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Service:
    """The REST API over one hub's devices. Everything here runs in the hub's event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._registry = endpoint.registry

    def application(self) -> web.Application:
        """What an aiohttp server serves."""
        application = web.Application(middlewares=[self._answer], client_max_size=_MAX_BODY)
        console = Console(self._endpoint)
        application.on_shutdown.append(console.close)
        for method, path, right, handler in (
            ("GET", "/devices", "RegistryRead", self._list_devices),
            ("GET", "/devices/", "RegistryRead", self._list_devices),
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
            ("GET", "/statistics/devices", "RegistryRead", self._device_statistics),
            ("GET", "/statistics/service", "ServiceConnect", self._service_statistics),
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
            return await handler(request)

        return guarded

    @web.middleware
    async def _answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Problem as error:
            problem = error
        except twins.Invalid as error:
            problem = Problem(error.code, error.message)
        except query.QueryError as error:
            problem = Problem(400004, str(error))
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
            view["managedBy"] = ""
        else:
            view["status"] = "enabled" if identity.enabled else "disabled"
            view["statusReason"] = identity.status_reason
            view["statusUpdatedTime"] = "0001-01-01T00:00:00"
            view["capabilities"] = {"iotEdge": False}
        primary, secondary = identity.thumbprints
        sas = identity.authentication == "sas"
        return {
            **view,
            "generationId": identity.generation,
            "etag": identity.etag,
            "connectionState": "Connected" if connected else "Disconnected",
            "connectionStateUpdatedTime": "0001-01-01T00:00:00",
            "lastActivityTime": "0001-01-01T00:00:00",
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

    def _identity_response(self, identity: Identity, status: int = 200) -> web.Response:
        headers = {"ETag": f'"{identity.etag}"'}
        return web.json_response(self._identity_view(identity), status=status, headers=headers)

    async def _list_devices(self, request: web.Request) -> web.Response:
        top = request.query.get("top", str(_MAX_LIST))
        if not (top.isascii() and top.isdigit() and 1 <= int(top) <= _MAX_LIST):
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
        existing = self._registry.identities.get(name)
        # All that can be refused is looked at before anything is changed.
        settings = _identity_settings(body)
        if condition is None:
            if existing is not None:
                what, code = ("module", 409301) if existing.module_id else ("device", 409001)
                raise Problem(code, f"A {what} with ID '{name}' is already registered.")
            if (
                "module" in request.match_info
                and request.match_info["device"] not in self._registry.identities
            ):
                raise Problem(404001, f"Device {request.match_info['device']} not registered")
            try:
                identity = self._registry.create(name)
            except ValueError as error:
                raise Problem(400004, str(error)) from None
            self._endpoint.create(identity)
        else:
            identity = self._identity(request)
            _check_condition(condition, identity.etag)
        was_enabled = identity.enabled
        identity.change(**settings)
        self._endpoint.keep(identity.id)
        if was_enabled and not identity.enabled:
            self._endpoint.drop_with_modules(identity.id)
        self._endpoint.changed()
        created_module = condition is None and identity.module_id is not None
        return self._identity_response(identity, 201 if created_module else 200)

    async def _delete_identity(self, request: web.Request) -> web.Response:
        identity = self._identity(request)
        condition = request.headers.get("If-Match")
        if condition is None:
            raise Problem(412001, 'Precondition failed: a delete needs If-Match, "*" or the ETag.')
        _check_condition(condition, identity.etag)
        for name in self._registry.delete(identity.id):
            self._endpoint.delete(name)
        return web.Response(status=204)

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
        if condition is not None and condition != "*" and condition.startswith('"'):
            _check_condition(condition, self._endpoint.twins[identity.id].etag)
        if request.method == "PUT":
            self._endpoint.replace_twin(identity.id, body)
        else:
            self._endpoint.update_twin(identity.id, body)
        return self._twin_response(identity)

    # ------------------------------------------------------------------ queries and statistics

    async def _query(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        text = body.get("query")
        if not isinstance(text, str):
            raise Problem(400004, "The body has no query.")
        parsed = query.parse(text)
        if parsed.collection == "devices.jobs":
            documents: list[Document] = []
        else:
            modules = parsed.collection == "devices.modules"
            documents = [
                self._endpoint.twin_view(identity)
                for identity in self._registry.identities.values()
                if (identity.module_id is not None) is modules
            ]
        rows = query.run(parsed, documents)
        start = _continued(request.headers.get("x-ms-continuation"), text)
        size = request.headers.get("x-ms-max-item-count", str(_PAGE))
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise Problem(400004, "x-ms-max-item-count is a number from 1 up.")
        end = start + min(int(size), _PAGE)
        headers = {"x-ms-item-type": "raw" if parsed.is_raw else "twin"}
        if end < len(rows):
            headers["x-ms-continuation"] = _continuation(text, end)
        return web.json_response(rows[start:end], headers=headers)

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
    kind = authentication.get("type") or "sas"
    if kind not in _AUTHENTICATION:
        raise Problem(400004, f"authentication.type is one of {', '.join(_AUTHENTICATION)}.")
    keys, thumbprints = authentication.get("symmetricKey") or {}, authentication.get("x509Thumbprint") or {}
    if not isinstance(keys, dict) or not isinstance(thumbprints, dict):
        raise Problem(400004, "symmetricKey or x509Thumbprint is no object.")
    try:
        primary, secondary = (
            check_key(keys[name]) if keys.get(name) else None for name in ("primaryKey", "secondaryKey")
        )
    except (ValueError, TypeError):
        raise Problem(400004, "A key in symmetricKey is not base64.") from None
    return {
        "enabled": status == "enabled",
        "status_reason": reason,
        "authentication": kind,
        "primary_key": primary,
        "secondary_key": secondary,
        "thumbprints": (thumbprints.get("primaryThumbprint"), thumbprints.get("secondaryThumbprint")),
    }


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
