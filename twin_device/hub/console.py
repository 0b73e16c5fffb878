"""What only the local hub has over HTTP: the web page, the stream of events, faults.

    GET    /                          the page
    GET    /local/devices             every device and module: {"id", "connected", "enabled"}
    GET    /local/events              events from now on, as server-sent events (text/event-stream);
                                      ?source= (may be repeated) and ?deviceId= narrow them
    GET    /local/packets?deviceId=   the last MQTT packets of an identity, oldest first
    GET    /local/faults              {"kinds": what there is, "active": what is set}
    POST   /local/faults              set one: {"kind": ..., "device", "operation", "times", "seconds",
                                      "parameters"}; answers with it and its id
    DELETE /local/faults[/ID]         clear all, or one
    DELETE /local/sessions            forget what devices subscribed to and which messages wait
    DELETE /local/connections/ID      end an identity's connection ("device" or "device/module")

Everything but the page wants a token with ServiceConnect, as the back end's own API does. An event's data is
events.Event.as_dict as JSON; its name is the source, its id the sequence. A listener that is too slow is told
how many it missed by an event `lost`. An id of an identity in a query or path is percent-encoded.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

from aiohttp import web

from . import faults
from .mqtt import Endpoint, told
from .problem import Problem

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# A name in a request is looked up here, and never taken as a path.
_FILES = {path.name: _TYPES[path.suffix] for path in _FOLDER.iterdir() if path.suffix in _TYPES}
_HEADERS = {
    # The page needs nothing from elsewhere, and shows what devices say: nothing of that may ever run.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_HEARTBEAT = 15.0  # seconds
_MAX_STREAMS = 100


class Console:
    """Our own requests. Everything here runs in the hub's event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._streams: set[asyncio.Event] = set()
        self._closing = False

    def routes(self) -> list[tuple[str, str, str, Any]]:
        """Method, path, right, handler. The right is empty where everybody may ask."""
        return [
            ("GET", "/", "", self._page),
            ("GET", "/page/{file}", "", self._page),
            ("GET", "/local/devices", "ServiceConnect", self._devices),
            ("GET", "/local/events", "ServiceConnect", self._events),
            ("GET", "/local/packets", "ServiceConnect", self._packets),
            ("GET", "/local/faults", "ServiceConnect", self._list_faults),
            ("POST", "/local/faults", "ServiceConnect", self._set_fault),
            ("DELETE", "/local/faults", "ServiceConnect", self._clear_faults),
            ("DELETE", "/local/faults/{id}", "ServiceConnect", self._clear_faults),
            ("DELETE", "/local/sessions", "ServiceConnect", self._forget_sessions),
            ("DELETE", "/local/connections/{id:.+}", "ServiceConnect", self._disconnect),
        ]

    async def close(self, _application: web.Application) -> None:
        """End every stream, so that closing the hub waits for none."""
        self._closing = True
        for awake in self._streams:
            awake.set()

    # ------------------------------------------------------------------ the page

    async def _page(self, request: web.Request) -> web.Response:
        name = request.match_info.get("file", "index.html")
        if name not in _FILES:
            raise web.HTTPNotFound
        text = (_FOLDER / name).read_text("utf-8")
        return web.Response(text=text, content_type=_FILES[name], charset="utf-8", headers=_HEADERS)

    async def _devices(self, _request: web.Request) -> web.Response:
        # A page of twins at a time, as a query has them, would be a request for every hundred.
        connections = self._endpoint.connections
        return web.json_response(
            [
                {"id": name, "connected": name in connections, "enabled": identity.enabled}
                for name, identity in self._endpoint.registry.identities.items()
            ]
        )

    # ------------------------------------------------------------------ events

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if len(self._streams) >= _MAX_STREAMS:
            raise Problem(503001, f"{_MAX_STREAMS} streams are open already.")
        awake = asyncio.Event()
        sources = request.query.getall("source", [])
        try:
            subscription = self._endpoint.events.subscribe(sources, request.query.get("deviceId"), awake.set)
        except ValueError as error:
            raise Problem(400004, str(error)) from None
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        self._streams.add(awake)
        try:
            await response.prepare(request)
            # Says that from here on nothing is missed.
            await response.write(b": listening\n\n")
            while not self._closing:
                event = subscription.take()
                if event is not None:
                    text = json.dumps(event.as_dict())
                    head = f"id: {event.sequence}\nevent: {event.source}\n"
                    await response.write(f"{head}data: {text}\n\n".encode())
                    continue
                lost = subscription.take_lost()
                if lost:
                    await response.write(f'event: lost\ndata: {{"count": {lost}}}\n\n'.encode())
                    continue
                awake.clear()
                try:
                    await asyncio.wait_for(awake.wait(), _HEARTBEAT)
                except asyncio.TimeoutError:
                    await response.write(b": still here\n\n")
            await response.write_eof()
        except ConnectionError:
            pass  # the listener has gone
        finally:
            self._streams.discard(awake)
            self._endpoint.events.unsubscribe(subscription)
        return response

    async def _packets(self, request: web.Request) -> web.Response:
        name = request.query.get("deviceId", "")
        if name not in self._endpoint.packets:
            raise Problem(404001, f"Device {name} not registered")
        return web.json_response(
            [{"time": packet.time, **told(packet)} for packet in self._endpoint.packets[name]]
        )

    # ------------------------------------------------------------------ faults

    async def _list_faults(self, _request: web.Request) -> web.Response:
        kinds = {
            name: {"text": kind.text, "parameters": kind.parameters, "ofOperations": kind.of_operations}
            for name, kind in faults.KINDS.items()
        }
        active = [fault.as_dict() for fault in self._endpoint.faults.active()]
        return web.json_response({"kinds": kinds, "active": active})

    async def _set_fault(self, request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.read())
            if not isinstance(body, dict):
                raise ValueError("a fault is an object")
            fault = faults.Fault.from_dict(body)
        except RecursionError:
            raise Problem(400004, "The body nests too deeply.") from None
        except (ValueError, TypeError) as error:
            raise Problem(400004, f"No fault was set: {error}") from None
        return web.json_response(self._endpoint.add_fault(fault).as_dict())

    async def _clear_faults(self, request: web.Request) -> web.Response:
        name = request.match_info.get("id")
        chosen: faults.Fault | None = None
        if name is not None:
            chosen = next((one for one in self._endpoint.faults.active() if str(one.id) == name), None)
            if chosen is None:
                raise Problem(404001, f"There is no active fault {name}.", "FaultNotFound")
        self._endpoint.clear_faults(chosen)
        return web.Response(status=204)

    # ------------------------------------------------------------------ sessions and connections

    async def _forget_sessions(self, _request: web.Request) -> web.Response:
        self._endpoint.forget_sessions()
        return web.Response(status=204)

    async def _disconnect(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name not in self._endpoint.registry.identities:
            raise Problem(404001, f"Device {name} not registered")
        self._endpoint.drop(name)
        return web.Response(status=204)
