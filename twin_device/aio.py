"""TwinClient for asyncio: any number of clients in one thread.

    from twin_device.aio import TwinClient

    async with TwinClient.from_connection_string(text) as client:
        await client.report({"batteryLevel": 55})

An idle client is one socket watched by the loop and one timer: it has no task. There is a task while it
dials, and one while there are handlers to call. MQTT 3.1.1 is spoken here and not by paho, whose client
object costs as much memory as a whole client does here. Everything runs in the loop's thread, so nothing is
locked; from another thread a client is reached by `asyncio.run_coroutine_threadsafe`.
"""

import asyncio
import contextlib
import errno
import inspect
import logging
import os
import random
import signal
import socket
import ssl
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from . import tls as tls_files
from .core import settings, twin
from .core.errors import (
    ConnectRefused,
    LocalError,
    NotConnected,
    RemoteError,
    ReportTimeout,
    RetrieveTimeout,
    StoreError,
    TwinError,
)
from .shell import (
    FLUSH,
    LOGGED,
    MAX_PACKET,
    READ_AT_ONCE,
    Bounds,
    Broken,
    Document,
    Pending,
    Shell,
    clock,
    copied,
    framed,
    packet_at,
)

if TYPE_CHECKING:
    from .store import Kept

__all__ = ["Change", "Changes", "Report", "TwinClient"]

_log = logging.getLogger("twin_device.aio")

# A handler that keeps the loop for longer than this (seconds) is named: meanwhile no other client is heard.
_BLOCKING = 0.05

# MQTT 3.1.1, 2.2.1: control packet types, with the flags that they must have.
_CONNECT = 0x10
_CONNACK = 0x20
_PUBLISH = 0x30
_PUBACK = 0x40
_SUBSCRIBE = 0x82
_SUBACK = 0x90
_PINGREQ = b"\xc0\x00"
_PINGRESP = 0xD0
_DISCONNECT = b"\xe0\x00"


class Change(NamedTuple):
    """A change of the desired properties: a JSON merge patch, and the properties after it. Both are copies of
    the receiver's own."""

    patch: Document
    desired: Document


_Waiters = list["asyncio.Future[bool]"]


class Report:
    """A report on its way to the hub. Reports that left in one patch may be one and the same Report."""

    __slots__ = ("_done", "_error", "_keeper", "_timeout", "_version", "_waiters", "_watched")

    def __init__(self, timeout: float, keeper: "_Keeper | None" = None) -> None:
        self._timeout = timeout
        self._keeper = keeper
        self._done = False
        self._version: int | None = None
        self._error: TwinError | None = None
        # How many calls of report() wait for it: none, and its refusal is told to the error handlers.
        self._watched = 0
        self._waiters: _Waiters = []

    def __repr__(self) -> str:
        state = "on its way" if not self.done else "accepted" if self._error is None else "not accepted"
        return f"<Report {state}>"

    def __await__(self) -> Generator[None, None, "Report"]:
        # What report(wait=False) gives is there already, awaited or not; with a store it is kept then.
        if self._keeper is not None:
            yield from self._keeper.kept().__await__()
        return self

    @property
    def done(self) -> bool:
        """True once the hub has answered, or the client was closed."""
        return self._done

    async def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the hub's answer; at most timeout seconds, None for the client's own.

        Returns the reported `$version` after it (int; None from a hub that tells none). Raises
        ReportRejected if the hub refused it, ReportTimeout if there is no answer yet (it stays on its way),
        NotConnected if the client was closed before. Cancelled, it stays on its way as well.
        """
        timeout = self._timeout if timeout is None else timeout
        if not self._done and not await _woken(self._waiters, timeout):
            raise ReportTimeout(
                f"the hub has not answered within {timeout:g} s; the report is still on its way"
            )
        if self._error is not None:
            raise self._error
        return self._version

    def _end(self, version: int | None, error: TwinError | None) -> None:
        self._version, self._error = version, error
        self._done = True
        _wake(self._waiters)


class _Retrieve:
    __slots__ = ("error", "twin", "waiters")

    def __init__(self) -> None:
        self.twin: Document | None = None
        self.error: TwinError | None = None
        self.waiters: _Waiters = []


class Changes:
    """What TwinClient.changes() gives: an iterator for `async for`."""

    def __init__(self, client: "TwinClient") -> None:
        self._client = client
        self._changes = Pending({})
        self._waiters: _Waiters = []

    def __aiter__(self) -> "Changes":
        return self

    async def __anext__(self) -> Change:
        while True:
            while not self._changes:
                if self._client._closed:
                    raise StopAsyncIteration
                await _woken(self._waiters, None)
            # Taken only now: whoever is cancelled while waiting loses nothing.
            patch, desired = self._changes.take()
            if patch:
                return Change(copied(patch), copied(desired))

    def _add(self, patch: Document, desired: Document) -> None:
        self._changes.put(twin.DesiredChanged(patch, desired))
        _wake(self._waiters)


class TwinClient(Shell):
    """One device's or module's twin, for asyncio; `help(TwinClient.__init__)` tells the options.

    With a store, a report is in the file once `await client.report(...)` has returned, also with wait=False.
    The file is written in a thread that is shared by all clients, so that a slow card holds up no loop, and
    ends when there is nothing to write. It is this client's until close() has returned.

    Handlers are plain functions or coroutine functions. They run one at a time and in order, in a task of
    their own, and may call every method. Like everything in a loop a plain function must not block: what
    takes long belongs into a coroutine, or into `asyncio.to_thread`; one that blocks for more than 50 ms is
    named in the log. An exception in a handler goes to the on_error handlers and stops nothing.

    A client may be made, and its handlers declared, before there is a loop. It lives in the loop that
    connect() runs in, which must be one that can watch sockets (on Windows a selector event loop).
    """

    _log = _log
    _keeper: "_Keeper | None" = None

    def _set_up(self) -> None:
        self._events = Pending(self._twin.desired)
        self._iterators: weakref.WeakSet[Changes] | None = None
        self._reports: dict[int, Report] = {}
        self._retrieves: dict[int, _Retrieve] = {}
        # A signal has come for run_forever().
        self._stopping = False
        # Woken at every change of state, refusal, and end of a report.
        self._changed: _Waiters = []

        # The loop from connect() to disconnect(), else None; and one object for each such time.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._run: object = None
        self._link: _Link | None = None
        self._dials: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0
        # A fleet's clients take turns at dialling (gateway.TwinGateway): called before every attempt but the
        # one that replaces a token, it gives the seconds until this one's turn.
        self._pace: Callable[[], float] | None = None
        # When the attempt that is due may be made. Nothing else is due meanwhile.
        self._turn_at: int | None = None
        self._dispatcher: asyncio.Task[None] | None = None
        if self._keeper is not None and self._keeper.error is not None:
            self._put(twin.Failed(self._keeper.error))

    def _open_store(self, path: str | os.PathLike[str]) -> "Kept":
        self._keeper = _Keeper(self, path)
        return self._keeper.found

    def _notify(self) -> None:
        _wake(self._changed)

    # ------------------------------------------------------------------ changes

    def changes(self) -> Changes:
        """Every change of the desired properties from now on, for `async for change in client.changes()`.

        The first one is everything that is desired already, if there is anything. Each iterator gets every
        change, beside the handlers and at its own pace; it ends once the client is closed.
        """
        changes = Changes(self)
        if self._iterators is None:
            self._iterators = weakref.WeakSet()
        self._iterators.add(changes)
        if self._twin.desired:
            changes._add(self._twin.desired, self._twin.desired)
        return changes

    # ------------------------------------------------------------------ connecting

    async def connect(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Connect, subscribe and retrieve; from then on the client reconnects by itself.

        Returns once synchronised, or with wait=False at once. Raises ConnectRefused if the hub refuses the
        credentials or is not who it should be, or if there is no connection after timeout seconds (None: the
        client's own); the client is disconnected again then, and also if it is cancelled. NotConnected: it
        is closed. LocalError: bad ca_file, or a loop that cannot watch sockets.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        self._start()
        if wait:
            try:
                await self._await_synchronised(deadline)
            except BaseException:
                await self.disconnect()
                raise

    def _start(self, tell_at_dial: bool = False) -> None:
        """Want a connection from now on, if that is new. tell_at_dial: a certificate that cannot be right is
        no LocalError, but a refusal at each dial, until somebody mends it."""
        if self._closed:
            raise NotConnected("this client is closed; make a new one")
        if self._loop is not None:
            return
        with contextlib.suppress(*((LocalError,) if tell_at_dial else ())):
            self._load_tls()
        loop = asyncio.get_running_loop()
        if isinstance(loop, getattr(asyncio, "ProactorEventLoop", ())):
            raise LocalError("this event loop cannot watch sockets: use a selector event loop")
        self._refused = None
        self._warn_of_plaintext()
        self._loop = loop
        self._run = object()
        self._wake_dispatcher()
        if self._pace is None:
            self._perform(self._twin.start(clock()))
        else:
            self._await_turn(self._pace)

    async def _await_synchronised(self, deadline: float) -> None:
        run = self._run
        self._waiting += 1
        try:
            while self._twin.state != twin.SYNCHRONISED:
                if self._refused is not None:
                    raise self._refused
                if self._run is not run:
                    raise NotConnected("the client was disconnected while it connected")
                if not await _woken(self._changed, deadline - time.monotonic()):
                    raise self._not_in_time()
        finally:
            self._waiting -= 1

    async def disconnect(self) -> None:
        """End the connection. What is gathered stays, for the next connect().

        Waits up to 5 seconds for the handler that is running and those that are due, and cancels what is
        left of them.
        """
        self._stop()
        await self._settle()

    def _stop(self) -> None:
        if self._loop is None:
            return
        self._perform(self._twin.stop())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop = self._run = self._turn_at = None
        _wake(self._changed)

    async def _settle(self) -> None:
        """Wait for the client's tasks; a handler's own task, which may be what calls, ends after it."""
        tasks: set[asyncio.Task[None]] = set(self._dials)
        if self._dispatcher is not None and self._dispatcher is not asyncio.current_task():
            tasks.add(self._dispatcher)
        if not tasks:
            return
        grace = min(self._timeout, FLUSH)
        try:
            _, tasks = await asyncio.wait(tasks, timeout=grace)
        finally:
            for task in tasks:
                task.cancel()
        if tasks:
            _, tasks = await asyncio.wait(tasks, timeout=grace)
        if tasks:
            _log.warning("%s: a handler still runs although it was cancelled", self)

    async def close(self) -> None:
        """Disconnect for good. While synchronised, first waits up to 5 seconds for reports on their way;
        those that stay unanswered, and every other call that waits, end in NotConnected. With a store, the
        next run delivers them all the same.

        Handlers are treated as by disconnect(). Nothing is left then: no task, no socket, no timer.
        """
        deadline = time.monotonic() + min(self._timeout, FLUSH)
        try:
            while self._twin.outstanding and self._twin.state != twin.OFFLINE:
                if not await _woken(self._changed, deadline - time.monotonic()):
                    break
        finally:
            self._closed = True
            self._stop()
            if self._keeper is not None:
                self._keeper.leave()
            self._perform(self._twin.abandon())
            _wake(self._changed)
            for iterator in self._iterators or ():
                _wake(iterator._waiters)
            try:
                await self._settle()
            finally:
                if self._keeper is not None and self._dispatcher is not asyncio.current_task():
                    await self._keeper.close()

    async def __aenter__(self) -> "TwinClient":
        try:
            await self.connect()
        except BaseException:
            # No __aexit__ will come to give the file back.
            if self._keeper is not None:
                await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def run_forever(self) -> None:
        """Connect if need be, and return once the client is closed, or at SIGINT or SIGTERM (which close it).

        At once if it is closed already, as a handler may have done. Signals are caught only in the main
        thread, and told to every client that runs forever in the loop; their handlers are put back.
        Cancelled, it leaves the client as it is.
        """
        try:
            if self._loop is None:
                await self.connect()
        except NotConnected:
            if self._closed:
                return
            raise
        signals = _signals.setdefault(asyncio.get_running_loop(), _Signals())
        self._stopping = False
        signals.add(self)
        try:
            while self._loop is not None and not self._stopping:
                await _woken(self._changed, None)
        finally:
            signals.remove(self)
        await self.close()

    # ------------------------------------------------------------------ reporting and retrieving

    @overload
    def report(
        self,
        patch: Document,
        *,
        wait: Literal[True] = True,
        timeout: float | None = None,
        version: int | None = None,
        always: bool = False,
    ) -> Coroutine[Any, Any, int | None]: ...

    @overload
    def report(
        self,
        patch: Document,
        *,
        wait: Literal[False],
        timeout: float | None = None,
        version: int | None = None,
        always: bool = False,
    ) -> Report: ...

    def report(
        self,
        patch: Document,
        *,
        wait: bool = True,
        timeout: float | None = None,
        version: int | None = None,
        always: bool = False,
    ) -> Awaitable[Any]:
        """Bring a merge patch of the reported properties to the hub (None removes a key). To be awaited.

        wait=True: waits up to timeout seconds (None: the client's own) and gives the reported `$version`
        after it (int); raises as Report.wait. wait=False: gives a Report at once, also while offline, and
        also without await, for handlers that are plain functions.
        The call itself accepts the report: whoever is cancelled while waiting takes nothing back.
        Whatever the app reports while an answer is on its way, or while offline, leaves as one patch. What
        the hub holds already is not sent, unless always=True. version: the reported version that the hub
        must be at, else ReportRejected with status 412.

        PatchError: the hub would refuse the patch; it names the path. NotConnected: the client is closed, or
        was never connected and would have to wait. In both cases nothing was changed.
        """
        if self._closed:
            raise NotConnected("this client is closed; make a new one")
        if wait and self._loop is None:
            raise NotConnected("not connected: call connect() first, or report with wait=False")
        ticket, outputs = self._twin.report(patch, clock(), version, always)
        report = self._reports.get(ticket)
        if report is None:
            report = self._reports[ticket] = Report(self._timeout, self._keeper)
        report._watched += wait
        self._perform(outputs)
        if self._keeper is not None:
            self._keeper.keep()
        return self._answer(report, timeout) if wait else report

    async def _answer(self, report: Report, timeout: float | None) -> int | None:
        try:
            if self._keeper is not None:
                await self._keeper.kept()
            return await report.wait(timeout)
        except (asyncio.CancelledError, ReportTimeout):
            report._watched -= 1
            if report._error is not None and not report._watched and not self._closed:
                # Refused in the moment of the cancellation: nobody else would tell.
                self._put(twin.Failed(report._error))
            raise

    async def retrieve(self, timeout: float | None = None) -> Document:
        """Ask the hub for the twin now: {"desired": ..., "reported": ...}, without `$` keys.

        Waits at most timeout seconds (None: the client's own). Raises RetrieveTimeout, RetrieveRejected, or
        NotConnected if the client is not connected or was closed meanwhile.
        """
        timeout = self._timeout if timeout is None else timeout
        if self._loop is None:
            raise NotConnected("not connected: call connect() first")
        ticket, outputs = self._twin.ask(clock())
        retrieve = self._retrieves[ticket] = _Retrieve()
        self._perform(outputs)
        try:
            if not await _woken(retrieve.waiters, timeout):
                raise RetrieveTimeout(f"the hub has not answered within {timeout:g} s")
        finally:
            self._retrieves.pop(ticket, None)
        if retrieve.error is not None:
            raise retrieve.error
        return retrieve.twin or {}

    # ------------------------------------------------------------------ performing outputs

    def _perform(self, outputs: list[Any]) -> None:
        """Perform the core's outputs in their order. None of them gives the core an input at once."""
        if self._appliers:
            outputs = outputs + self._settings.observe(outputs, clock())
        for output in outputs:
            kind = type(output)
            if kind is twin.Publish:
                if _log.isEnabledFor(logging.DEBUG):
                    _log.debug(
                        "%s -> %s %r", self._credentials.client_id, output.topic, output.payload[:LOGGED]
                    )
                self._link.publish(output.topic, output.payload)  # type: ignore[union-attr]  # connected: there is one
            elif kind is twin.Reported:
                self._reported(output)
            elif kind is twin.DesiredChanged:
                for iterator in self._iterators or ():
                    iterator._add(output.patch, output.desired)
                if self._on_desired or self._keeper is not None:
                    self._put(output)
            elif kind is twin.Retrieved:
                retrieve = self._retrieves.pop(output.ticket, None)
                if retrieve is not None:
                    retrieve.twin, retrieve.error = output.twin, output.error
                    _wake(retrieve.waiters)
            elif kind is twin.StateChanged:
                self._state_changed(output)
            elif kind is twin.Failed:
                self._failed(output.error)
            elif kind is settings.Apply:
                self._put(output)
            elif kind is twin.Subscribe:
                self._link.subscribe(output.filters)  # type: ignore[union-attr]  # as above
            elif kind is twin.Connect:
                self._dial_soon()
            elif kind is twin.Disconnect:
                self._hang_up()
        self._arm()

    def _reported(self, output: Any) -> None:
        report = self._reports.pop(output.ticket, None)
        _wake(self._changed)
        if report is not None:
            report._end(output.version, output.error)
        if output.error is not None and (report is None or not report._watched) and not self._closed:
            self._put(twin.Failed(output.error))
        if self._keeper is not None and not self._closed:
            # What was refused, or went alone, is not to come again.
            self._keeper.keep()

    def _state_changed(self, output: Any) -> None:
        super()._state_changed(output)
        if self._on_state:
            self._put(output)

    # ------------------------------------------------------------------ time

    def _arm(self) -> None:
        """See to it that _tick() is called when there is something to do."""
        if self._loop is None:
            return
        due = self._twin.deadline if self._turn_at is None else self._turn_at
        link = self._link
        if link is not None:
            due = link.due if due is None else min(due, link.due)
        if due is None:
            return
        if self._timer is not None:
            # Deadlines mostly move away: a timer that fires in vain is cheaper than a new one each time.
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_later(max(0, due - clock()) / 1000, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = clock()
        if self._link is not None and now >= self._link.due:
            self._link.keep_alive(now)
        deadline = self._twin.deadline if self._turn_at is None else self._turn_at
        if deadline is not None and now >= deadline:
            if self._turn_at is not None:
                self._turn_at = None
                self._perform(self._twin.start(now) or self._twin.tick(now, random.random()))
            elif self._pace is not None and self._link is None and not self._dials:
                # Without a connection and a dial the core can want nothing but to dial.
                self._await_turn(self._pace)
            else:
                self._perform(self._twin.tick(now, random.random()))
        self._arm()

    def _await_turn(self, pace: Callable[[], float]) -> None:
        self._turn_at = clock() + int(pace() * 1000)
        self._arm()

    # ------------------------------------------------------------------ the connection

    def _dial_soon(self) -> None:
        if self._loop is not None:
            task = self._loop.create_task(self._dial())
            self._dials.add(task)
            task.add_done_callback(self._dials.discard)

    def _hang_up(self) -> None:
        for task in self._dials:
            task.cancel()
        if self._link is not None:
            self._link.disconnect()
            self._link = None

    async def _dial(self) -> None:
        where = self._where
        _log.debug("%s: connecting to %s", self._credentials.client_id, where)
        error: TwinError
        try:
            self._before_dial()
            connected = await _connected(
                self._host, self._port, self._context, time.monotonic() + self._timeout / 3
            )
            # Nothing is awaited from here on: the socket is either closed or the client's.
            link = self._link = _Link(self, connected)
            link.connect(self._credentials.client_id, self._user_name, self._password())
            self._arm()
        except ConnectRefused as refusal:
            error = refusal
        except OSError as failure:
            error = tls_files.refusal(where, failure)
        except Exception as failure:  # noqa: BLE001  # a bug costs a reconnect, never the client
            error = self._unexpected(failure)
        else:
            return
        self._lose(error)

    def _unexpected(self, error: Exception) -> RemoteError:
        _log.exception("%s: unexpected error in the connection", self._credentials.client_id)
        return RemoteError(f"unexpected {type(error).__name__} while reading from the hub")

    def _lose(self, error: TwinError, tell: bool = False) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        _log.info("%s: %s", self._credentials.client_id, error)
        if tell:
            self._put(twin.Failed(error))
        self._perform(self._twin.disconnected(clock(), random.random(), error))

    # What the link calls, never from within _perform.

    def _acknowledged(self, code: int) -> None:
        """CONNACK with this return code."""
        now, jitter = clock(), random.random()
        if code == 0:
            self._perform(self._twin.connected(now, jitter, self._lifetime()))
            return
        if self._link is not None:
            self._link.close()
            self._link = None
        self._perform(self._twin.refused(code, now, jitter))

    def _granted(self, codes: tuple[int, ...]) -> None:
        self._perform(self._twin.subscribed(codes, clock(), random.random()))

    def _received(self, topic: str, payload: bytes) -> list[Any]:
        """A message has come; what the core makes of it, which has been performed."""
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s <- %s %r", self._credentials.client_id, topic, payload[:LOGGED])
        outputs = self._twin.message_received(topic, payload, clock(), random.random())
        self._perform(outputs)
        return outputs

    # ------------------------------------------------------------------ the dispatcher task

    def _put(self, event: Any) -> None:
        super()._put(event)
        self._wake_dispatcher()

    def _wake_dispatcher(self) -> None:
        if self._dispatcher is None and self._events and self._loop is not None:
            self._dispatcher = self._loop.create_task(self._dispatch())

    async def _dispatch(self) -> None:
        """Call the handlers for every event that there is."""
        try:
            while self._events:
                event = self._events.take()
                kind = type(event)
                if kind is twin.DesiredChanged:
                    for on_desired in self._on_desired if event.patch else ():
                        await self._call(on_desired, copied(event.patch), copied(event.desired))
                    if self._keeper is not None:
                        self._keeper.given = event.desired
                elif kind is twin.StateChanged:
                    for on_state in self._on_state:
                        await self._call(on_state, event.old, event.new)
                elif kind is twin.Failed:
                    await self._tell_error(event.error)
                elif kind is settings.Apply:
                    await self._apply(event.name, event.value)
                if self._keeper is not None:
                    self._keeper.keep()
                if self._events:
                    # Plain functions give nothing else a turn.
                    await asyncio.sleep(0)
            if self._keeper is not None and self._closed:
                # A handler may have closed the client: its call was kept once it had returned.
                await self._keeper.close()
        finally:
            self._dispatcher = None
            if self._keeper is not None and self._closed:
                self._keeper.close_soon()

    async def _apply(self, name: str, value: Any) -> None:
        # Of one that is cut short nobody knows what it did. It is called again after the next connect.
        reason: str | None = "the handler was cancelled"
        try:
            error = await self._call(self._appliers[name], value)
            reason = None if error is None else str(error) or type(error).__name__
        finally:
            self._perform(self._settings.applied(name, reason, clock()))

    async def _call(self, handler: Callable[..., object], *arguments: Any) -> BaseException | None:
        """Call a handler. What it raises goes to the error handlers, and is returned."""
        try:
            started = time.monotonic()
            result = handler(*arguments)
            if time.monotonic() - started > _BLOCKING:
                _log.warning(
                    "%s: the handler %s kept the event loop for %.2f s, and with it every client; make it a "
                    "coroutine function that blocks nowhere, or have it use asyncio.to_thread",
                    self._credentials.client_id,
                    getattr(handler, "__qualname__", handler),
                    time.monotonic() - started,
                )
            if inspect.isawaitable(result):
                await result
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            await self._tell_error(error)
            return error
        except Exception as error:  # noqa: BLE001  # whatever an app raises goes to its error handlers
            await self._tell_error(error)
            return error
        return None

    async def _tell_error(self, error: BaseException) -> None:
        self._log_unheard(error)
        for on_error in self._on_error:
            try:
                result = on_error(error)  # type: ignore[arg-type]  # a handler's CancelledError is one more
                if inspect.isawaitable(result):
                    await result
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                _log.exception("%s: an error handler raised", self._credentials.client_id)
            except Exception:  # noqa: BLE001  # nobody is left to tell but the log
                _log.exception("%s: an error handler raised", self._credentials.client_id)


class _Keeper:
    """What one client keeps in its store, and how much of it is in the file already."""

    __slots__ = (
        "_client",
        "_closed",
        "_closing",
        "_done",
        "_failed",
        "_left",
        "_next",
        "_queued",
        "_store",
        "_waiters",
        "given",
    )

    def __init__(self, client: TwinClient, path: str | os.PathLike[str]) -> None:
        from .store import Store

        self._client = client
        self._store = Store(path, client._credentials.host, client._credentials.client_id)
        # What the handlers were last given whole.
        self.given: Document = self._store.found.desired
        # What goes to the store in place of the core's queue, once that was given up at close.
        self._left: list[Any] | None = None
        # The newest change's number, and what is true with it; which is in the file, or cannot be written.
        self._next: tuple[int, Kept] = (0, self._store.found)
        self._done = 0
        self._queued = self._failed = self._closing = self._closed = False
        self._waiters: _Waiters = []

    @property
    def error(self) -> StoreError | None:
        return self._store.error

    @property
    def found(self) -> "Kept":
        return self._store.found

    def keep(self) -> None:
        """Have the store hold what is true now, soon; without a loop that could be held up, at once."""
        from .store import Kept

        core = self._client._twin
        reports = core.unanswered if self._left is None else self._left
        self._next = (self._next[0] + 1, Kept(self.given, core.reported, reports))
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._written(*self._write())
            return
        if not self._queued:
            self._queued = True
            _writer.put(lambda: self._write_for(loop))

    async def kept(self) -> None:
        """Wait until everything up to now is in the file, or cannot be written. A card that hangs is waited
        for as long as any call at most; the error handlers are told."""
        number = self._next[0]
        deadline = time.monotonic() + self._client._timeout
        while self._done < number:
            if not await _woken(self._waiters, deadline - time.monotonic()):
                self._written(self._done, StoreError(f"store {self._store.path}: a write does not end"))
                return

    def leave(self) -> None:
        """The core's queue is given up: what is in it now goes to the next run."""
        if self._left is None:
            self._left = self._client._twin.unanswered

    def close_soon(self) -> None:
        """Write what is left, and give the file back."""
        if not self._closing:
            self._closing = True
            self.keep()
            loop = asyncio.get_running_loop()
            # Behind that write.
            _writer.put(lambda: self._close_for(loop))

    async def close(self) -> None:
        """close_soon(), and wait for it; for as long as any call at most."""
        self.close_soon()
        deadline = time.monotonic() + self._client._timeout
        while not self._closed:
            if not await _woken(self._waiters, deadline - time.monotonic()):
                _log.warning("store %s: a write does not end, so the file is not free yet", self._store.path)
                return

    # In the thread that writes.

    def _write_for(self, loop: asyncio.AbstractEventLoop) -> None:
        # A change after this is queued anew; one before it is in what is written now.
        self._queued = False
        result = self._write()
        # A loop that is closed by now waits for nothing.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._written, *result)

    def _close_for(self, loop: asyncio.AbstractEventLoop) -> None:
        self._store.close()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._free)

    def _write(self) -> tuple[int, StoreError | None]:
        number, kept = self._next
        try:
            self._store.keep(lambda: kept)
        except StoreError as error:
            return number, error
        return number, None

    # In the loop again.

    def _written(self, number: int, error: StoreError | None) -> None:
        self._done = max(self._done, number)
        if error is not None and self._client._closed:
            # The error handlers have gone.
            _log.error("%s: %s", self._client._credentials.client_id, error)
        elif error is not None and not self._failed:
            self._client._put(twin.Failed(error))
        self._failed = error is not None
        _wake(self._waiters)

    def _free(self) -> None:
        self._closed = True
        _wake(self._waiters)


class _Writer:
    """A thread for the stores of all clients, which mostly share a card; only there while it has work."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._running = False

    def put(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._work.append(work)
            if self._running:
                return
            self._running = True
        threading.Thread(target=self._run, name="twin-store", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._running = False
                    return
                work = self._work.popleft()
            try:
                work()
            except Exception:  # noqa: BLE001  # a bug in one client's store must not end the others'
                _log.exception("unexpected error while writing a store")


_writer = _Writer()


class _Link:
    """One connection of one client: MQTT 3.1.1 with QoS 0, over a socket that is connected already."""

    __slots__ = (
        "_acknowledged",
        "_bounds",
        "_client",
        "_in",
        "_keep_alive",
        "_loop",
        "_out",
        "_pinged",
        "_socket",
        "_wanted",
        "_watches_writes",
        "due",
    )

    def __init__(self, client: TwinClient, connected: socket.socket) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = connected
        self._keep_alive = client._keep_alive * 1000
        # What is read of a packet that is not whole yet, and how long it will be; what cannot be written yet.
        self._in = bytearray()
        self._wanted = 0
        self._out = bytearray()
        self._watches_writes = False
        self._acknowledged = False
        self._pinged = False
        self._bounds = Bounds()
        # When to look after the connection.
        self.due = clock() + self._keep_alive
        self._loop.add_reader(connected, self._readable)

    # Writing. A failure is told in the loop's next round, since the core may be waiting for its outputs.

    def connect(self, client_id: str, user_name: str, password: str | None) -> None:
        # 3.1.2: protocol level 4; user name, password if there is one, no clean session; and no will.
        self._send(
            _CONNECT,
            b"\x00\x04MQTT\x04\x80" if password is None else b"\x00\x04MQTT\x04\xc0",
            struct.pack("!H", self._keep_alive // 1000),
            _text(client_id),
            _text(user_name),
            b"" if password is None else _text(password),
        )

    def subscribe(self, filters: tuple[str, ...]) -> None:
        self._send(_SUBSCRIBE, b"\x00\x01", *(_text(name) + b"\x00" for name in filters))

    def publish(self, topic: str, payload: bytes) -> None:
        self._send(_PUBLISH, _text(topic), payload)

    def disconnect(self) -> None:
        if self._socket is not None and not self._out:
            with contextlib.suppress(OSError):
                self._socket.send(_DISCONNECT)
        self.close()

    def close(self) -> None:
        """Close the socket without a word to the hub."""
        connected, self._socket = self._socket, None
        if connected is not None:
            self._loop.remove_reader(connected)
            if self._watches_writes:
                self._loop.remove_writer(connected)
            connected.close()

    def keep_alive(self, now: int) -> None:
        """`due` has come: nothing was heard or said for that long."""
        self.due = now + self._keep_alive
        if self._pinged:
            self._lost("the hub did not answer PINGREQ")
        elif self._acknowledged:
            self._pinged = True
            self._write(_PINGREQ)

    def _send(self, kind: int, *parts: bytes) -> None:
        self._write(framed(kind, *parts))

    def _write(self, packet: "bytes | bytearray") -> None:
        if self._socket is None:
            return
        if not self._out:
            try:
                sent = self._socket.send(packet)
            except (BlockingIOError, ssl.SSLWantWriteError):
                sent = 0
            except ssl.SSLWantReadError:
                # TLS must read before it can write: _readable() tries again.
                self._out += packet
                return
            except OSError as error:
                self._loop.call_soon(self._lost, error.strerror or str(error))
                return
            if sent == len(packet):
                return
            packet = packet[sent:]
        self._out += packet
        if len(self._out) > MAX_PACKET:
            # A report, a retrieve and a ping are far less: these are answers to what it sends.
            self._loop.call_soon(self._broken, "messages without reading their answers")
        self._watch_writes()

    def _watch_writes(self) -> None:
        if not self._watches_writes and self._socket is not None:
            self._watches_writes = True
            self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        if self._socket is None:
            return
        self._watches_writes = False
        self._loop.remove_writer(self._socket)
        if self._out:
            self._flush()
        else:
            # TLS wanted to write before it could read.
            self._readable()

    def _flush(self) -> None:
        out, self._out = self._out, bytearray()
        self._write(out)

    # Reading.

    def _readable(self) -> None:
        """Read one slice and hand on what is whole of it."""
        connected: Any = self._socket
        if connected is None:
            return
        try:
            data = connected.recv(READ_AT_ONCE)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            return
        except ssl.SSLWantWriteError:
            self._watch_writes()
            return
        except OSError as error:
            self._lost(error.strerror or str(error))
            return
        if not data:
            self._lost("the hub has closed it")
            return
        try:
            self._take(data)
        except Broken as error:
            self._broken(str(error))
            return
        except Exception as error:  # noqa: BLE001  # a bug costs a reconnect, never the client
            if self._socket is not None:
                self._client._lose(self._client._unexpected(error))
            return
        if self._out and not self._watches_writes:
            self._flush()
        # TLS may hold more than was asked for, of which the selector knows nothing.
        if self._socket is not None and self._client._tls and connected.pending():
            self._loop.call_soon(self._readable)

    def _take(self, data: bytes) -> None:
        if self._in:
            self._in += data
            if len(self._in) < self._wanted:
                return
            data, self._in = bytes(self._in), bytearray()
        start, end = 0, len(data)
        while self._socket is not None:
            if start < end and not self._acknowledged and data[start] != _CONNACK:
                raise Broken("something else before CONNACK")
            found = packet_at(data, start)
            if found is None:
                self._wanted = 0
                break
            at, stop = found
            if stop > end:
                self._wanted = stop - start
                break
            head, start = data[start], stop
            self._packet(head, data[at:start])
        if self._socket is not None and start < end:
            self._in += data[start:]

    def _packet(self, head: int, body: bytes) -> None:
        kind = head & 0xF0
        client = self._client
        # A whole packet is a sign of life; bytes that never make one are not.
        self._pinged = False
        self._bounds.packet()
        if kind == _CONNACK and not self._acknowledged and len(body) == 2:
            self._acknowledged = True
            client._acknowledged(body[1])
        elif kind == _PUBLISH:
            self._published(head, body)
        elif kind == _SUBACK and len(body) > 2:
            client._granted(tuple(body[2:]))
        elif kind != _PINGRESP:
            raise Broken(f"a packet of type {head >> 4}")

    def _published(self, head: int, body: bytes) -> None:
        at = 2 + int.from_bytes(body[:2], "big")
        topic = body[2:at]
        if head & 0x06:
            # QoS 1: a session of an earlier program may have subscribed so.
            packet_id, at = body[at : at + 2], at + 2
            self._send(_PUBACK, packet_id)
        if at > len(body):
            raise Broken("a message that ends in its topic")
        try:
            name = topic.decode()
        except UnicodeDecodeError:
            return
        outputs = self._client._received(name, body[at:])
        self._bounds.message(len(body), outputs, self._client._twin.desired)

    def _broken(self, what: str) -> None:
        """The hub sent what no hub sends: the app is told."""
        self._lost(f"the hub sent {what}", True)

    def _lost(self, why: str, tell: bool = False) -> None:
        if self._socket is not None:
            self._client._lose(RemoteError(f"the connection was lost: {why}"), tell)


# ---------------------------------------------------------------------- dialling


async def _connected(
    host: str, port: int, context: ssl.SSLContext | None, end: float
) -> "socket.socket | ssl.SSLSocket":
    """A connected socket, with TLS if there is a context; OSError if there is none by `end` (monotonic)."""
    last: OSError | None = None
    found = await _addresses(host, port, end)
    for index, (family, kind, protocol, _, address) in enumerate(found):
        await _turn()
        # No address may use up the time of those after it.
        deadline = time.monotonic() + max(0.0, end - time.monotonic()) / (len(found) - index)
        raw = socket.socket(family, kind, protocol)
        try:
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = raw.connect_ex(address)
            if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
                await _ready(raw, True, deadline)
                code = raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            if context is None:
                return raw
            return await _handshake(raw, context, host, deadline)
        except OSError as error:
            raw.close()
            last = error
        except BaseException:
            raw.close()
            raise
    raise last or OSError("the name has no address")


async def _handshake(
    raw: socket.socket, context: ssl.SSLContext, host: str, deadline: float
) -> ssl.SSLSocket:
    secure = context.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            await _turn()
            try:
                secure.do_handshake()
            except ssl.SSLWantReadError:
                await _ready(secure, False, deadline)
            except ssl.SSLWantWriteError:
                await _ready(secure, True, deadline)
            else:
                return secure
    except BaseException:
        secure.close()
        raise


async def _ready(watched: socket.socket, write: bool, deadline: float) -> None:
    """Wait until the socket can be read or written; TimeoutError at the deadline (monotonic)."""
    loop = asyncio.get_running_loop()
    waiters: _Waiters = []
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(watched, _wake, waiters)
    try:
        if not await _woken(waiters, deadline - time.monotonic()):
            raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
    finally:
        remove(watched)


# A step of a handshake takes a millisecond. When a fleet comes back all at once, its steps stand in line, one
# in each round of the loop, so that whoever is connected already does not wait for all of them.
_turns: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, deque[asyncio.Future[None]]]" = (
    weakref.WeakKeyDictionary()
)


async def _turn() -> None:
    loop = asyncio.get_running_loop()
    line = _turns.get(loop)
    if line is None:
        line = _turns[loop] = deque()
    turn: asyncio.Future[None] = loop.create_future()
    line.append(turn)
    if len(line) == 1:
        loop.call_soon(_next_turn, loop, line)
    await turn


def _next_turn(loop: asyncio.AbstractEventLoop, line: "deque[asyncio.Future[None]]") -> None:
    turn = line.popleft()
    while turn.done() and line:
        turn = line.popleft()
    if not turn.done():
        turn.set_result(None)
    if line:
        loop.call_soon(_next_turn, loop, line)


class _Lookup:
    """A name that is being looked up, for all that wait for it."""

    def __init__(self) -> None:
        self.waiters: _Waiters = []
        self.found: list[Any] = []
        self.error: OSError | None = None


_lookups: dict[tuple[asyncio.AbstractEventLoop, str, int], _Lookup] = {}


async def _addresses(host: str, port: int, end: float) -> list[Any]:
    """getaddrinfo, in a thread of its own that ends with it.

    The loop's own executor keeps its threads, and a name server that hangs would hold all of them: then no
    client could dial. Clients that want the same name at the same time share one look-up.
    """
    with contextlib.suppress(OSError):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    loop = asyncio.get_running_loop()
    key = (loop, host, port)
    lookup = _lookups.get(key)
    if lookup is None:
        lookup = _lookups[key] = _Lookup()
        threading.Thread(target=_look_up, args=(key, lookup), name=f"twin-name-{host}", daemon=True).start()
    if not await _woken(lookup.waiters, end - time.monotonic()):
        raise TimeoutError(errno.ETIMEDOUT, "no answer from the name server in time")
    if lookup.error is not None:
        raise lookup.error
    return lookup.found


def _look_up(key: tuple[asyncio.AbstractEventLoop, str, int], lookup: _Lookup) -> None:
    loop, host, port = key
    try:
        lookup.found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        lookup.error = error
    except Exception as error:  # noqa: BLE001  # a name that cannot be encoded; who waits must be told
        lookup.error = OSError(str(error))
    _lookups.pop(key, None)
    # The loop may be closed by now: nobody waits then.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_wake, lookup.waiters)


# ---------------------------------------------------------------------- waiting


async def _woken(waiters: _Waiters, timeout: float | None) -> bool:
    """Wait for _wake(waiters); False if it did not come within timeout seconds (None: no limit)."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[bool] = loop.create_future()
    waiters.append(waiter)
    timer = None if timeout is None else loop.call_later(max(0.0, timeout), _end, waiter, False)
    try:
        return await waiter
    finally:
        if timer is not None:
            timer.cancel()
        with contextlib.suppress(ValueError):
            waiters.remove(waiter)


def _wake(waiters: _Waiters) -> None:
    for waiter in waiters:
        _end(waiter, True)
    waiters.clear()


def _end(waiter: "asyncio.Future[bool]", woken: bool) -> None:
    if not waiter.done():
        waiter.set_result(woken)


def _is_cancelled() -> bool:
    """True if the running task itself is cancelled, and not only what it waited for."""
    # Python 3.10 cannot tell: there the task ends, and the next event makes a new one.
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is None or cancelling() > 0


class _Signals:
    """SIGINT and SIGTERM for all clients that run forever in one loop, which knows one handler a signal."""

    def __init__(self) -> None:
        self._clients: list[Any] = []
        self._previous: dict[signal.Signals, Any] = {}

    def add(self, client: Any) -> None:
        """client: a TwinClient or TwinGateway, with `_stopping` and `_changed`."""
        self._clients.append(client)
        if len(self._clients) == 1 and threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.getsignal(number)
                # Windows has loops that know no signals.
                with contextlib.suppress(NotImplementedError):
                    loop.add_signal_handler(number, self._stop)
                    self._previous[number] = previous

    def remove(self, client: Any) -> None:
        self._clients.remove(client)
        if not self._clients:
            for number, previous in self._previous.items():
                asyncio.get_running_loop().remove_signal_handler(number)
                if previous is not None:
                    signal.signal(number, previous)
            self._previous = {}

    def _stop(self) -> None:
        for client in self._clients:
            client._stopping = True
            _wake(client._changed)


_signals: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Signals]" = weakref.WeakKeyDictionary()


# ---------------------------------------------------------------------- small things


def _text(text: str) -> bytes:
    # 1.5.3: strings, and binary data as well, stand after their length.
    data = text.encode()
    return struct.pack("!H", len(data)) + data
