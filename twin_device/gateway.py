"""TwinGateway: the twins of a fleet in one process and one thread, on top of aio.TwinClient.

    from twin_device.gateway import TwinGateway

    async with TwinGateway() as gateway:
        for text in connection_strings:
            gateway.add(text)
        await gateway.run_forever()

The gateway has no task and no timer of its own: each client keeps itself connected, and asks the gateway when
it may dial.
"""

import asyncio
import hashlib
import logging
import os
import random
import ssl
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from . import tls as tls_files
from .aio import TwinClient, _Signals, _signals, _Waiters, _wake, _woken
from .core.credentials import from_connection_string
from .core.errors import ConnectRefused, LocalError, NotConnected, TwinError

__all__ = ["DeviceStatus", "GatewaySummary", "TwinGateway"]

Document = dict[str, Any]
_Handler = TypeVar("_Handler", bound=Callable[..., object])

_log = logging.getLogger("twin_device.gateway")


class DeviceStatus(NamedTuple):
    """One device in the gateway's table.

    device_id: or "device/module". state: as TwinClient.state. connected: the hub has accepted the
    connection. synchronised: subscribed and retrieved, too. rejected: why the hub refused it, if only a
    change of its key, certificate or identity can help; None otherwise, and once it is connected. why: why
    it is not connected, where that is known. since: when state or rejected last changed. last_change: when
    its desired properties last changed, None as long as they are unknown or empty. Both are Unix times in
    seconds.
    """

    device_id: str
    state: str
    connected: bool
    synchronised: bool
    rejected: str | None
    why: str | None
    since: float
    last_change: float | None


class GatewaySummary(NamedTuple):
    """How many devices there are, and of these: connected, synchronised, rejected. last_change: as of
    DeviceStatus, the latest of all."""

    devices: int
    connected: int
    synchronised: int
    rejected: int
    last_change: float | None


class _Member:
    """What the gateway knows of one device beside its client."""

    __slots__ = ("client", "device_id", "last_change", "rejected", "since")

    def __init__(self, device_id: str, client: TwinClient) -> None:
        self.device_id = device_id
        self.client = client
        self.rejected: str | None = None
        self.since = time.time()
        self.last_change: float | None = None


class TwinGateway:
    """The twins of many devices: added and removed at any time, connected in good order, one table of all.

    connects_per_second: at most so many attempts to connect, in the mean and of all devices together; each
    waits for a turn, half to one and a half times the mean after the one before it. That holds for the first
    connects, and for those after an outage; a client that replaces its token does not wait. options: as of
    aio.TwinClient, for all devices (ca_file, tls, keep_alive, timeout, product_info, token_lifetime).

    store: a folder with a file for each device, in which it goes on where an earlier run stopped, as
    aio.TwinClient's store. remove() leaves the file there.

    A device that is refused, or whose certificate cannot be right, is tried again slowly and disturbs none of
    the others; nor does one whose connection hangs or whose handler takes its time. Handlers of one device
    run one at a time and in order, those of different devices side by side. Like TwinClient's they may be
    coroutine functions, and must not block.

    Used in one event loop and its thread, from start() to close(); `async with` calls these two. Devices may
    be added, and handlers declared, before there is a loop.
    """

    def __init__(
        self,
        *,
        connects_per_second: float = 20,
        store: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if not connects_per_second > 0:
            raise LocalError(f"connects_per_second is a positive number, not {connects_per_second}")
        self._interval = 1 / connects_per_second
        self._next_turn = 0.0
        self._store = store
        self._options = options
        # Bad options are to be told here, and not by the first device.
        TwinClient("localhost", "none", key=b"none", **options)
        self._context: ssl.SSLContext | None = None
        self._members: dict[str, _Member] = {}
        # Those that were neither synchronised nor rejected since they were added.
        self._unsettled: set[_Member] = set()
        self._on_desired: list[Callable[[str, Document, Document], object]] = []
        self._on_state: list[Callable[[str, str, str], object]] = []
        self._on_error: list[Callable[[str, Exception], object]] = []
        self._running = False
        self._closed = False
        # For run_forever() and settled(), as in TwinClient.
        self._stopping = False
        self._changed: _Waiters = []

    def __repr__(self) -> str:
        return f"<TwinGateway with {len(self._members)} devices>"

    @property
    def closed(self) -> bool:
        """True from the beginning of close() on."""
        return self._closed

    # ------------------------------------------------------------------ devices

    def add(self, connection_string: str, **options: Any) -> TwinClient:
        """Add a device or module, which connects when its turn comes; gives its client, for whatever the
        gateway has no method for (setting, retrieve, changes). The client must not be closed: remove() does.

        options: as of aio.TwinClient, where this device differs. Raises LocalError, which never has the
        key's value: the connection string or an option is malformed, the store cannot be, the gateway has
        this device already, or is closed.
        """
        if self._closed:
            raise NotConnected("this gateway is closed; make a new one")
        device_id = from_connection_string(connection_string).client_id
        if device_id in self._members:
            raise LocalError(f"the gateway has {device_id} already")
        options = {**self._options, **options}
        if self._store is not None:
            options.setdefault("store", os.path.join(self._store, _file_name(device_id)))
        client = TwinClient.from_connection_string(connection_string, **options)
        client._pace = self._turn
        member = _Member(device_id, client)
        client.on_state(partial(self._state_changed, member))
        client.on_desired(partial(self._desired_changed, member))
        client.on_error(partial(self._failed, member))
        for on_desired in self._on_desired:
            client.on_desired(partial(on_desired, device_id))
        for on_state in self._on_state:
            client.on_state(partial(on_state, device_id))
        for on_error in self._on_error:
            client.on_error(partial(on_error, device_id))
        if self._running:
            client._start(tell_at_dial=True)
        self._members[device_id] = member
        self._unsettled.add(member)
        return client

    async def remove(self, device_id: str) -> None:
        """Remove a device and close its client, as TwinClient.close() does. LocalError: there is none of this
        id. It is out of the table at once, and may be added again."""
        client = self.client(device_id)
        member = self._members.pop(device_id)
        self._settle(member)
        await client.close()

    def client(self, device_id: str) -> TwinClient:
        """The client of a device ("device" or "device/module"). LocalError: there is none of this id."""
        member = self._members.get(device_id)
        if member is None:
            raise LocalError(f"the gateway has no {device_id!r}")
        return member.client

    async def report(
        self,
        device_id: str,
        patch: Document,
        *,
        timeout: float | None = None,
        version: int | None = None,
        always: bool = False,
    ) -> int | None:
        """Bring a merge patch of a device's reported properties to the hub, and wait for the answer.

        Returns and raises as TwinClient.report(wait=True). A device that is not connected yet, or not at the
        moment, is waited for; at most timeout seconds, None for the client's own. Whoever wants no wait
        calls client(device_id).report(patch, wait=False).
        """
        return await self.client(device_id).report(patch, timeout=timeout, version=version, always=always)

    # ------------------------------------------------------------------ handlers

    def on_desired(self, handler: _Handler) -> _Handler:
        """Have handler(device_id, patch, desired) called at every change of a device's desired properties.

        patch and desired: as TwinClient.on_desired; both are the handler's own copies.
        """
        self._on_desired.append(handler)
        for device_id, member in self._members.items():
            member.client.on_desired(partial(handler, device_id))
        return handler

    def on_state(self, handler: _Handler) -> _Handler:
        """Have handler(device_id, old, new) called at every change of a device's state."""
        self._on_state.append(handler)
        for device_id, member in self._members.items():
            member.client.on_state(partial(handler, device_id))
        return handler

    def on_error(self, handler: _Handler) -> _Handler:
        """Have handler(device_id, error) called for errors that belong to no call of the app, as
        TwinClient.on_error. Without one they are logged."""
        self._on_error.append(handler)
        for device_id, member in self._members.items():
            member.client.on_error(partial(handler, device_id))
        return handler

    # ------------------------------------------------------------------ the table

    @property
    def status(self) -> list[DeviceStatus]:
        """The table: a row for every device, in the order in which they were added."""
        return [self._row(member) for member in self._members.values()]

    @property
    def summary(self) -> GatewaySummary:
        """The table in a line."""
        connected = synchronised = rejected = 0
        last_change: float | None = None
        for member in self._members.values():
            state = member.client.state
            connected += state != "offline"
            synchronised += state == "synchronised"
            rejected += member.rejected is not None
            if member.last_change is not None:
                last_change = max(last_change or 0.0, member.last_change)
        return GatewaySummary(len(self._members), connected, synchronised, rejected, last_change)

    def _row(self, member: _Member) -> DeviceStatus:
        state = member.client.state
        return DeviceStatus(
            member.device_id,
            state,
            state != "offline",
            state == "synchronised",
            member.rejected,
            member.client.statistics["last_error"] if state == "offline" else None,
            member.since,
            member.last_change,
        )

    async def settled(self, timeout: float | None = None) -> bool:
        """Wait until every device has been synchronised or rejected since it was added; at most timeout
        seconds, None for no limit. False: it is not so far, or the gateway was closed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._unsettled and not self._closed:
            if not await _woken(self._changed, None if deadline is None else deadline - time.monotonic()):
                break
        return not self._unsettled and not self._closed

    # ------------------------------------------------------------------ from start to end

    async def start(self) -> None:
        """Begin to connect; returns at once. settled() waits for the fleet.

        Raises LocalError for a bad ca_file or a loop that cannot watch sockets, NotConnected if the gateway
        is closed. Does nothing if it is running.
        """
        if self._closed:
            raise NotConnected("this gateway is closed; make a new one")
        if self._running:
            return
        if self._options.get("tls", True):
            # One for all: the clients find it in aio's cache for as long as it is held here.
            self._context = tls_files.context(self._options.get("ca_file"))
        self._running = True
        try:
            for member in self._members.values():
                member.client._start(tell_at_dial=True)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close all clients, side by side, each as by TwinClient.close(). Nothing is left then: no task, no
        socket, no timer. The table stays as it is then."""
        self._closed = True
        self._running = False
        _wake(self._changed)
        closing = [asyncio.ensure_future(member.client.close()) for member in self._members.values()]
        if closing:
            try:
                await asyncio.wait(closing)
            except BaseException:
                # Each has begun by now, and ends its client even if it is cancelled.
                for task in closing:
                    task.cancel()
                await asyncio.wait(closing)
                raise
            for task in closing:
                task.result()
        self._context = None

    async def __aenter__(self) -> "TwinGateway":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def run_forever(self) -> None:
        """Start if need be, and return once the gateway is closed, or at SIGINT or SIGTERM (which close it).

        At once if it is closed already, as a handler may have done. Signals are caught only in the main
        thread; their handlers are put back. Cancelled, it leaves the gateway as it is.
        """
        if self._closed:
            return
        await self.start()
        signals = _signals.setdefault(asyncio.get_running_loop(), _Signals())
        self._stopping = False
        signals.add(self)
        try:
            while not self._closed and not self._stopping:
                await _woken(self._changed, None)
        finally:
            signals.remove(self)
        await self.close()

    # ------------------------------------------------------------------ what the clients call

    def _turn(self) -> float:
        """Seconds that the next attempt to connect must wait. Turns lie half to one and a half intervals
        apart, so that gateways that start together do not dial in step."""
        now = time.monotonic()
        turn = max(now, self._next_turn)
        self._next_turn = turn + self._interval * (0.5 + random.random())
        return turn - now

    def _state_changed(self, member: _Member, old: str, new: str) -> None:
        member.since = time.time()
        if new != "offline":
            member.rejected = None
        if new == "synchronised":
            self._settle(member)

    def _desired_changed(self, member: _Member, patch: Document, desired: Document) -> None:
        member.last_change = time.time()

    def _failed(self, member: _Member, error: Exception) -> None:
        if isinstance(error, ConnectRefused) and not error.can_retry and member.client.state == "offline":
            member.rejected = str(error)
            member.since = time.time()
            self._settle(member)
        if not self._on_error:
            known = isinstance(error, TwinError)
            _log.error("%s: %s", member.device_id, error, exc_info=None if known else error)

    def _settle(self, member: _Member) -> None:
        self._unsettled.discard(member)
        if not self._unsettled:
            _wake(self._changed)


def _file_name(device_id: str) -> str:
    # Ids may have signs that file names may not, and be longer.
    name = quote(device_id, safe="")
    if len(name) > 200:
        name = hashlib.sha256(device_id.encode()).hexdigest()
    return f"{name}.json"
