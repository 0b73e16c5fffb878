"""TwinClient for boards: asyncio, one connection, the twin read as it arrives.

    async with TwinClient.from_connection_string(text, ca_file="root.der") as client:
        await client.report({"batteryLevel": 55})

A client that is connected has three tasks: one reads, one looks at the clock once a second, one calls the
handlers. TLS always checks the hub's certificate and name; a board has no trust store and, at first, no
right time, so it is told a CA and refuses to dial while its clock is unset. Wi-Fi is none of its business.
"""

import asyncio
import gc
import os
import random
import time

from .core.credentials import (
    MADE,
    clock_unset,
    connection_string_fields,
    identify,
    sas_token,
    user_name,
)
from .core.errors import (
    ConnectRefused,
    LocalError,
    NotConnected,
    RemoteError,
    ReportTimeout,
    RetrieveTimeout,
    TwinError,
)
from .core.patch import diff
from .core.stream import reader
from .core.twin import (
    OFFLINE,
    SYNCHRONISED,
    Connect,
    DesiredChanged,
    Disconnect,
    Failed,
    Publish,
    Reported,
    Retrieved,
    StateChanged,
    Subscribe,
    Twin,
)
from .mqtt import (
    CONNACK,
    DISCONNECT,
    PINGREQ,
    PINGRESP,
    SUBACK,
    Receiver,
    connect,
    following,
    puback,
    publish_once,
    subscribe,
)

const = int  # MicroPython's compiler puts the numbers in place of the names

_MAX_KEEP_ALIVE = const(1177)  # the hub's own limit
_FLUSH = const(5000)  # milliseconds that close() waits for reports on their way
_MAX_EVENTS = const(16)  # of each kind, for handlers that do not keep up
_MAX_BACKLOG = const(65536)  # bytes that a connection does not take
_JOINED = const(512)  # bytes: a payload up to this is sent in one write with its head
_LOADING = const(8192)  # gc.threshold while a twin is read: its parts lie close together then
_MAX_CA = const(16384)  # bytes
_CLOSED = "this client is closed; make a new one"
_VERSION = "0.1.0"
_PRODUCT = "twin-device-micropython/0.1.0"
_WHATEVER = DesiredChanged(None, None)  # up to the newest desired properties


class Report:
    """A report on its way to the hub. Reports that left in one patch may be one and the same Report."""

    def __init__(self, timeout: float) -> None:
        self.done = False  # the hub has answered, or the client was closed
        self._timeout = timeout
        self._ended = asyncio.Event()
        self._watched = False

    async def wait(self, timeout: "float | None" = None) -> "int | None":
        """Wait for the hub's answer; at most timeout seconds, None for the client's own.

        Returns the reported `$version` after it. Raises ReportRejected, ReportTimeout (it stays on its
        way), or NotConnected if the client was closed before.
        """
        self._watched = True
        try:
            await asyncio.wait_for(self._ended.wait(), self._timeout if timeout is None else timeout)
        except asyncio.TimeoutError:
            raise ReportTimeout("the hub has not answered in time; the report is still on its way")
        if self._told.error is not None:
            raise self._told.error
        return self._told[1]

    def _end(self, answer: "Reported | Retrieved") -> None:
        self._told = answer
        self.done = True
        self._ended.set()


class TwinClient:
    """One device's or module's twin. Options as on CPython, times in seconds; what only boards have:

    ca_file: path of the CA's certificate (DER; PEM where the firmware reads it), or a tuple of paths; needed
    with tls. is_online: called without arguments before dialling and once a second; while it returns False
    nothing is dialled. keep: names of the properties that are kept (tuple of str), None for all of the
    desired ones; on_property(path, value): called for each desired property that keep leaves out, while a
    document or a notification is read. keep_reported: whether the reported properties are kept, too; None
    for True if a setting is declared before the client is first used. Without them a report that changes
    nothing is sent all the same, and what a hub loses of them is not restored.
    store: path of a file, or one of store.py's stores.

    Handlers may be coroutines, and may call and await every method. `desired` and what handlers are given is
    the client's own, not a copy: it is read, never changed.
    """

    def __init__(
        self,
        host: str,
        device_id: str,
        *,
        module_id: "str | None" = None,
        key: "str | bytes",
        gateway: "str | None" = None,
        policy: "str | None" = None,
        port: int = 8883,
        ca_file: "str | tuple[str, ...] | None" = None,
        tls: bool = True,
        keep_alive: int = 60,
        timeout: float = 60,
        product_info: str = "",
        model_id: "str | None" = None,
        token_lifetime: int = 3600,
        store: object = None,
        keep: "tuple[str, ...] | None" = None,
        on_property: object = None,
        keep_reported: "bool | None" = None,
        is_online: object = None,
    ) -> None:
        if not tls:
            ca_file = ()
        elif not ca_file:
            raise LocalError("ca_file is missing: a board has no trust store of its own")
        if keep_alive < 1 or keep_alive > _MAX_KEEP_ALIVE or timeout <= 0 or token_lifetime <= 0:
            raise _unfit_times(keep_alive)
        self._whose, self._resource, self._key, self._dialled, its_port = identify(
            host, device_id, module_id, key, gateway
        )
        self._policy = policy
        if port == 8883:
            port = its_port or (port if tls else 1883)
        self._port = port
        self._ca_files = (ca_file,) if isinstance(ca_file, str) else ca_file
        self._context = None
        self._keep_alive = keep_alive
        self._timeout = timeout
        self._user_name = user_name(self._whose, product_info or _PRODUCT, model_id)
        self._token_lifetime = int(token_lifetime)
        self._store = store
        self._keep = keep
        self._on_property = on_property
        self._keep_reported = keep_reported
        self._is_online = is_online
        self._handlers = {DesiredChanged: [], StateChanged: [], Failed: []}
        self._settings = None
        self._twin = None
        self._waits = {}  # by ticket: who waits for the end of a report or retrieve
        self._events = []
        self._event = asyncio.Event()  # something has happened: whoever waits looks again
        self._refused = None
        self._waiting = 0
        self._link = None
        self._offline = False  # a dial waits for is_online
        self._watcher = None
        self._dispatcher = None
        self._closed = False
        self._ticks = time.ticks_ms()
        self._now = 1  # times are above 0

    @classmethod
    def from_connection_string(cls, text: str, **options: object) -> "TwinClient":
        """The client of a device's or module's connection string. LocalError names the malformed part."""
        options.update(connection_string_fields(text))
        return cls(**options)

    # ------------------------------------------------------------------ what the app knows

    @property
    def state(self) -> str:
        """ "offline", "subscribing", "retrieving" or "synchronised"."""
        return self._core().state

    @property
    def desired(self) -> "dict[str, object]":
        """The desired properties as last known, less what is not kept. Not to be changed."""
        return self._core().desired

    @property
    def reported(self) -> "dict[str, object]":
        """The reported properties that the hub is known to hold, {} if they are not kept. Read only."""
        return self._core().reported or {}

    @property
    def desired_version(self) -> "int | None":
        """`$version` of the desired properties; None before the first synchronisation."""
        return self._core().desired_version

    @property
    def reported_version(self) -> "int | None":
        """`$version` of the reported properties; None before the first synchronisation."""
        return self._core().reported_version

    @property
    def statistics(self) -> "dict[str, object]":
        """Counts since the client was made, and last_error; as on CPython."""
        return self._core().counts

    # ------------------------------------------------------------------ handlers

    def on_desired(self, handler: object) -> object:
        """Have handler(patch, desired) called at every change, after a connect with the whole difference."""
        self._handlers[DesiredChanged].append(handler)
        return handler

    def on_state(self, handler: object) -> object:
        """Have handler(old, new) called at every change of `state`."""
        self._handlers[StateChanged].append(handler)
        return handler

    def on_error(self, handler: object) -> object:
        """Have handler(error) called for errors that belong to no call of the app."""
        self._handlers[Failed].append(handler)
        return handler

    def setting(self, name: str, *, shape: str = "document") -> object:
        """Make a desired property a setting, as on CPython.

        LocalError: the reported properties are not kept, or the property is not.
        """
        from .core.settings import Settings

        if self._keep_reported is None and self._twin is None:
            self._keep_reported = True
        if not self._keep_reported:
            raise LocalError(
                "a setting needs keep_reported=True, or to be declared before the client is used"
            )
        if self._keep is not None and name.split(".")[0] not in self._keep:
            raise LocalError("the setting " + name + " is not among the properties that are kept")

        def declare(apply: object) -> object:
            core = self._core()
            if self._settings is None:
                self._settings = Settings(core)
                self._appliers = {}
            self._settings.declare(name, shape)
            self._appliers[name] = apply
            self._perform(self._settings.declared(name, self._clock()))
            return apply

        return declare

    # ------------------------------------------------------------------ connecting

    async def connect(self, *, wait: bool = True, timeout: "float | None" = None) -> None:
        """Connect, subscribe and retrieve; from then on the client reconnects by itself.

        Returns once synchronised, or with wait=False at once. Raises ConnectRefused if the hub refuses the
        credentials or is not who it should be, if the clock is unset, or if there is no connection after
        timeout seconds; the client is disconnected again then. LocalError: a bad ca_file.
        """
        if self._closed:
            raise NotConnected(_CLOSED)
        core = self._core()
        if self._ca_files and self._context is None:
            self._context = _tls_context(self._ca_files)
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
            if self._dispatcher is None:
                self._dispatcher = asyncio.create_task(self._dispatch())
            self._perform(core.start(self._clock()))
        if wait:
            await self._synchronised(timeout)

    async def _synchronised(self, timeout: "float | None") -> None:
        core = self._core()
        end = self._clock() + int(1000 * (self._timeout if timeout is None else timeout))
        self._waiting += 1
        try:
            while core.state != SYNCHRONISED:
                if self._refused is not None:
                    raise self._refused
                if self._watcher is None:
                    raise NotConnected("the client was disconnected while it connected")
                left = end - self._clock()
                if left <= 0:
                    why = core.counts["last_error"] or "it is still " + core.state
                    raise ConnectRefused("not synchronised with " + self._dialled + " in time: " + why)
                # The dispatcher may clear it before this task sees it.
                self._event.clear()
                await _within(self._event.wait(), min(1, left / 1000))
        except BaseException:
            await self.disconnect()
            raise
        finally:
            self._waiting -= 1

    async def disconnect(self) -> None:
        """End the connection and the client's tasks. What is gathered stays, for the next connect()."""
        if self._watcher is None:
            return
        self._perform(self._twin.stop())
        self._refused = None
        watcher, self._watcher = self._watcher, None
        watcher.cancel()
        self._event.set()
        # A handler may disconnect: the task that has called it goes on when it has returned.
        if self._dispatcher is not None and self._dispatcher is not asyncio.current_task():
            await _within(self._dispatcher, _FLUSH / 1000)
            self._dispatcher = None

    async def close(self) -> None:
        """Disconnect for good. While connected, first waits up to 5 seconds for reports on their way; those
        that stay unanswered, and every other call that waits, end in NotConnected. With a store, the next
        run delivers them all the same."""
        core = self._core()
        end = self._clock() + _FLUSH
        while core.outstanding and core.state != OFFLINE and self._clock() < end:
            self._event.clear()
            await _within(self._event.wait(), 1)
        self._closed = True
        await self.disconnect()
        if self._store:
            self._write(True)
        self._perform(core.abandon())

    async def __aenter__(self) -> "TwinClient":
        await self.connect()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.close()

    async def run(self) -> None:
        """Connect, however long it takes, and return once the client is closed: asyncio.run(client.run()).

        At once if it is closed already, as a handler may have done.
        """
        if self._closed:
            return
        await self.connect(wait=False)
        try:
            while self._watcher is not None:
                self._event.clear()
                await self._event.wait()
        finally:
            await self.close()

    # ------------------------------------------------------------------ reporting and retrieving

    async def report(
        self,
        patch: "dict[str, object]",
        *,
        wait: bool = True,
        timeout: "float | None" = None,
        version: "int | None" = None,
        always: bool = False,
    ) -> object:
        """Bring a merge patch of the reported properties to the hub (None removes a key).

        wait=True: returns the reported `$version` after it; raises as Report.wait. wait=False: returns a
        Report at once, also while offline. What is reported meanwhile leaves as one patch. version: the
        reported version that the hub must be at. PatchError: the hub would refuse it; it names the path.
        """
        if self._closed or (wait and self._watcher is None):
            raise NotConnected(
                _CLOSED if self._closed else "not connected: call connect() first, or report with wait=False"
            )
        ticket, outputs = self._core().report(patch, self._clock(), version, always)
        report = self._waits.setdefault(ticket, Report(self._timeout))
        self._perform(outputs)
        return await report.wait(timeout) if wait else report

    async def retrieve(self, timeout: "float | None" = None) -> "dict[str, object]":
        """Ask the hub for the twin now: {"desired": ..., "reported": ...}, less what is not kept.

        Raises RetrieveTimeout, RetrieveRejected, or NotConnected.
        """
        if self._watcher is None:
            raise NotConnected("not connected: call connect() first")
        ticket, outputs = self._core().ask(self._clock())
        retrieve = self._waits[ticket] = Report(self._timeout)
        self._perform(outputs)
        try:
            return await retrieve.wait(timeout)
        except ReportTimeout:
            raise RetrieveTimeout("the hub has not answered in time")
        finally:
            self._waits.pop(ticket, None)

    # ------------------------------------------------------------------ performing outputs

    def _core(self) -> Twin:
        if self._twin is None:
            self._twin = Twin(
                int(self._timeout * 1000 / 3),
                random.getrandbits(16) << 16,
                self._keep_reported,
                *(self._stored() if self._store else ()),
            )
            self._given = self._twin.desired
        return self._twin

    def _stored(self) -> "tuple[object, object, object]":
        if isinstance(self._store, str):
            from .store import FileStore

            self._store = FileStore(self._store)
        found, error = self._store.load(self._whose)
        if error is not None:
            self._tell(Failed(error))
        return found

    def _clock(self) -> int:
        """Milliseconds that only go forward; ticks_ms starts over after 12 days."""
        ticks = time.ticks_ms()
        self._now += time.ticks_diff(ticks, self._ticks)
        self._ticks = ticks
        return self._now

    def _perform(self, outputs: "list[object]") -> None:
        if self._settings is not None:
            outputs = outputs + self._settings.observe(outputs, self._clock())
        for output in outputs:
            kind = type(output)
            if kind is Publish:
                self._link.publish(*output)
            elif kind is Reported or kind is Retrieved:
                waiting = self._waits.pop(output.ticket, None)
                if waiting is not None:
                    waiting._end(output)
                if (
                    kind is Reported
                    and output.error is not None
                    and not self._closed
                    and not (waiting and waiting._watched)
                ):
                    self._tell(Failed(output.error))
            elif kind is Connect:
                self._offline = True
                self._look()
            elif kind is Subscribe:
                self._link.subscribe(output.filters)
            elif kind is Disconnect:
                self._offline = False
                if self._link is not None:
                    self._link.end()
                    self._link = None
            else:
                if kind is StateChanged:
                    self._refused = None
                elif kind is Failed and not getattr(output.error, "can_retry", True):
                    self._refused = output.error
                    if self._waiting:
                        continue
                self._tell(output)
        self._event.set()
        if self._store:
            self._write(False)

    def _lost(self, link: "_Link", error: TwinError) -> None:
        if link is self._link:
            self._link = None
            self._perform(self._twin.disconnected(self._clock(), random.random(), error))
            asyncio.create_task(self._return())

    async def _return(self) -> None:
        """Dial again when it is time, not when the clock is looked at next."""
        await asyncio.sleep_ms(min(1000, (self._twin.deadline or 0) - self._clock()))
        self._look()

    def _write(self, now: bool) -> None:
        core = self._twin
        error = self._store.keep(self._given, core.reported, core.unanswered, self._clock(), now)
        if error is not None:
            self._tell(Failed(error))

    async def _watch(self) -> None:
        while True:
            wait = 1000
            try:
                try:
                    wait = self._look()
                except Exception as error:
                    # Of is_online, or a bug: neither may leave the client without a clock.
                    self._tell(Failed(error))
            except MemoryError:
                # What was due is due in a second, too.
                self._tell_difference()
            await asyncio.sleep_ms(wait)

    def _look(self) -> int:
        """Do what is due; milliseconds until something else is."""
        online = self._is_online is None or self._is_online()
        now = self._clock()
        core = self._twin
        if not self._offline:
            # No wait of the core's counts while there is no network.
            self._perform(core.tick(now, random.random()))
        if self._offline:
            if not online:
                return 1000
            self._offline = False
            self._link = _Link(self)
        elif self._link is not None:
            if online:
                self._link.watch(now)
            else:
                self._without_network(self._link)
        deadline = core.deadline
        return 1000 if deadline is None else min(1000, deadline - now)

    def _without_network(self, link: "_Link") -> None:
        error = RemoteError("the network is gone")
        link.end()
        self._lost(link, error)

    # ------------------------------------------------------------------ calling handlers

    def _tell(self, event: object) -> None:
        events = self._events
        kind = type(event)
        alike = [index for index, waiting in enumerate(events) if type(waiting) is kind]
        if alike and events[alike[-1]] is _WHATEVER:
            return
        # Of the settings there is one for each at the most.
        if len(alike) >= _MAX_EVENTS and kind in self._handlers:
            if kind is DesiredChanged:
                # The app gets one difference for this and all that follow.
                events[alike[-1]] = _WHATEVER
                return
            del events[alike[0]]
        events.append(event)
        self._event.set()

    def _tell_difference(self) -> None:
        """What was to be told may be lost; the difference to what the app was given is not."""
        try:
            self._tell(_WHATEVER)
        except MemoryError:
            # This takes none.
            self._events.clear()
            self._events.append(_WHATEVER)
            self._event.set()

    async def _dispatch(self) -> None:
        while True:
            while self._events:
                try:
                    await self._call(self._events.pop(0))
                except MemoryError:
                    # With the next event the app is given what it lacks.
                    self._tell_difference()
                    break
            if self._watcher is None:
                self._dispatcher = None
                return
            self._event.clear()
            await self._event.wait()

    async def _call(self, event: object) -> None:
        kind = type(event)
        handlers = self._handlers.get(kind)
        if handlers is None:
            await self._apply(*event)
            return
        if event is _WHATEVER:
            desired = self._twin.desired
            event = DesiredChanged(diff(self._given, desired), desired)
        if event[0] == {}:
            # Of a patch nothing is kept.
            handlers = ()
        if kind is Failed and not handlers:
            _unheard(event.error)
        for handler in handlers:
            try:
                result = handler(*event)
                if hasattr(result, "send"):
                    await result
            except Exception as error:
                if kind is Failed:
                    _misheard(error)
                else:
                    self._tell(Failed(error))
        if kind is DesiredChanged:
            self._given = event.desired
            if self._store:
                self._write(False)

    async def _apply(self, name: str, value: object) -> None:
        reason = None
        try:
            result = self._appliers[name](value)
            if hasattr(result, "send"):
                await result
        except Exception as error:
            reason = str(error) or type(error).__name__
            self._tell(Failed(error))
        self._perform(self._settings.applied(name, reason, self._clock()))


class _Link:
    """One connection: from the name's look-up to its end, which is when the client has it no longer."""

    def __init__(self, client: TwinClient) -> None:
        self._client = client
        self._stream = None
        self._backlog = b""
        self._heard = self._sent = client._clock()
        self._identifier = 0
        self._reader = None
        self._document = None  # what the reader has made
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        client = self._client
        failed = None
        try:
            try:
                await self._read()
            except Exception as error:
                failed = error if isinstance(error, TwinError) else self._failure(error)
        except MemoryError:
            # First: what follows needs some of the room that half a twin takes.
            self._reader = self._document = None
            client._tell_difference()
            failed = ConnectRefused("not enough memory to connect and to keep the twin")
        finally:
            if self._stream is not None:
                self._stream.s.close()
        if failed is not None:
            client._lost(self, failed)

    def _failure(self, error: Exception) -> TwinError:
        if isinstance(error, MemoryError):
            raise error
        host = self._client._dialled
        if not isinstance(error, (OSError, ValueError)):
            # A bug costs a reconnect, and no more.
            return RemoteError("unexpected " + repr(error))
        if isinstance(error, ValueError):
            # What MicroPython's TLS raises for a certificate.
            return ConnectRefused(
                "the certificate of " + host + " is not to be trusted: " + _reason(error), False
            )
        if self._client._twin.state == OFFLINE:
            return ConnectRefused("cannot connect to " + host + ": " + str(error))
        return RemoteError("lost the connection to " + host + ": " + str(error))

    async def _read(self) -> None:
        client = self._client
        hello = self._hello()
        # TLS wants its memory in large pieces.
        gc.collect()
        # Without a context it is plain TCP; with one, the name that the certificate must have comes last.
        host = client._dialled
        self._stream = stream = (await asyncio.open_connection(host, client._port, client._context, host))[0]
        self._send(hello)
        hello = None
        receiver = Receiver(self)
        while client._link is self:
            count = await stream.readinto(receiver.buffer)
            if count:
                self._heard = client._clock()
                receiver.received(count)
            elif count == 0:
                raise RemoteError("the hub closed the connection")

    def _hello(self) -> bytes:
        """The CONNECT packet; ConnectRefused if the clock cannot be right."""
        client = self._client
        now = int(time.time())
        if time.gmtime(0)[0] == 2000:
            now += 946684800
        if now < MADE:
            self._unset()
        expiry = now + client._token_lifetime
        password = client._key and sas_token(client._resource, client._key, expiry, client._policy)
        return connect(client._whose.partition("/")[2], client._user_name, password, client._keep_alive)

    def _unset(self) -> None:
        raise clock_unset(str(time.gmtime()[0]))

    def end(self) -> None:
        """Let go of the connection; the client is not told."""
        try:
            self._stream.s.write(DISCONNECT)
        except Exception:  # noqa: S110  # not connected yet, or lost: it is over all the same
            pass
        if asyncio.current_task() is not self._task:
            self._task.cancel()

    def watch(self, now: int) -> None:
        """Say something before the hub thinks that nobody is there, and notice if the hub is not."""
        client = self._client
        quarter = client._keep_alive * 250
        if client._twin.state == OFFLINE:
            return
        if now - self._heard >= quarter * 6:
            self._silent()
        elif now - min(self._sent, self._heard) >= quarter * 2 and now - self._sent >= quarter:
            self._send(PINGREQ)

    def _silent(self) -> None:
        error = RemoteError("the hub has been silent for too long")
        self.end()
        self._client._lost(self, error)

    # ------------------------------------------------------------------ out

    def publish(self, topic: str, payload: bytes) -> None:
        head, payload = publish_once(topic, payload)
        if len(payload) > _JOINED:
            self._send(head)
            head = b""
        self._send(head + payload)

    def subscribe(self, filters: "tuple[str, ...]") -> None:
        self._identifier = following(self._identifier)
        self._send(subscribe(self._identifier, filters))

    def _send(self, data: bytes) -> None:
        stream = self._stream
        self._sent = self._client._clock()
        if stream.out_buf:
            # Stream.drain() forgets what is written meanwhile.
            self._backlog += data
            if len(self._backlog) > _MAX_BACKLOG:
                self._stalled()
        else:
            asyncio.create_task(self._drain(stream))
            stream.out_buf = data

    async def _drain(self, stream: object) -> None:
        try:
            while stream.out_buf and self._client._link is self:
                await stream.drain()
                stream.out_buf = self._backlog
                self._backlog = b""
        except Exception as error:
            self._broken(error)

    def _stalled(self) -> None:
        self._broken(OSError("it does not read"))

    def _broken(self, error: Exception) -> None:
        # Not at once: whoever sends is in the middle of performing outputs.
        asyncio.create_task(self._break(error))

    async def _break(self, error: Exception) -> None:
        if self._client._link is self:
            failed = self._failure(error)
            self.end()
            self._client._lost(self, failed)

    # ------------------------------------------------------------------ in: the Receiver's owner

    def packet(self, kind: int, body: bytes) -> None:
        client = self._client
        twin = client._twin
        if client._link is not self:
            return
        now = client._clock()
        jitter = random.random()
        if kind == CONNACK and len(body) == 2:
            if body[1]:
                self._not_let_in(body[1])
            else:
                client._perform(twin.connected(now, jitter, client._token_lifetime * 1000))
        elif kind == SUBACK and len(body) > 2:
            client._perform(twin.subscribed(tuple(body[2:]), now, jitter))
        elif kind != PINGRESP:
            raise RemoteError("a packet of the type " + str(kind) + " that answers nothing")

    def _not_let_in(self, code: int) -> None:
        client = self._client
        outputs = client._twin.refused(code, client._clock(), random.random())
        client._link = None
        client._perform(outputs)

    def began(self, topic: str, identifier: "int | None") -> None:
        if identifier is not None:
            self._send(puback(identifier))
        client = self._client
        twin = client._twin
        self._topic = topic
        self._whole = whole = twin.reading(topic)
        if whole is not None:
            self._reader = reader(
                whole,
                client._keep,
                client._on_property and self._property,
                client._keep_reported,
                {"desired": twin.desired, "reported": twin.reported},
            )
            self._document = next(self._reader)

    def chunk(self, data: memoryview) -> None:
        if self._reader is not None:
            before = gc.threshold()
            if self._whole:
                gc.threshold(_LOADING)
            try:
                self._document = self._reader.send(data)
            except ValueError:
                # The core says what is to be done about it.
                self._reader = self._document = None
            finally:
                gc.threshold(before)

    def ended(self) -> None:
        document = self._document
        self._reader = self._document = None
        client = self._client
        if client._link is self:
            client._perform(
                client._twin.message_received(
                    self._topic, b"" if document is None else document, client._clock(), random.random()
                )
            )

    def _property(self, path: "tuple[str, ...]", value: object) -> None:
        try:
            self._client._on_property(path, value)
        except Exception as error:
            self._client._tell(Failed(error))


def _unheard(error: Exception) -> None:
    print("twin_device:", error)


def _misheard(error: Exception) -> None:
    print("twin_device: an error handler raised", repr(error))


async def _within(waited: object, seconds: float) -> bool:
    """Whether something has ended in time."""
    try:
        await asyncio.wait_for(waited, seconds)
    except asyncio.TimeoutError:
        return False
    return True


def _unfit_times(keep_alive: int) -> LocalError:
    if not 1 <= keep_alive <= _MAX_KEEP_ALIVE:
        return LocalError("keep_alive is from 1 to 1177 seconds")
    return LocalError("timeout and token_lifetime are positive numbers of seconds")


def _unfit_ca(path: str, error: Exception) -> LocalError:
    if isinstance(error, OSError):
        return LocalError("ca_file " + path + " cannot be read")
    return LocalError("ca_file " + path + " holds no certificate that this firmware can read: use DER")


def _tls_context(ca_files: "tuple[str, ...]") -> object:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_mode = ssl.CERT_REQUIRED
    for path in ca_files:
        try:
            with open(path, "rb") as file:
                data = file.read(min(os.stat(path)[6], _MAX_CA))
            context.load_verify_locations(cadata=data)
        except (OSError, ValueError) as error:
            raise _unfit_ca(path, error)
    return context


def _reason(error: Exception) -> str:
    text = str(error).strip()
    for part, reason in (
        ("Common Name", "it is another host's"),
        ("not correctly signed", "no CA in ca_file has signed it"),
        ("has expired", "it has expired"),
        ("starts in the future", "it is not valid yet; is the clock right?"),
    ):
        if part in text:
            return reason
    return text
