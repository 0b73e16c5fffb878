"""LocalHub: the hub in a thread of its own, and Device: one identity as a back end sees it.

Everything the hub knows belongs to its event loop. A call from another thread hops there and waits.
"""

import asyncio
import copy
import json
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from . import certificates, twins
from .events import Event, Subscription
from .faults import Fault, Faults
from .guard import Guard, Guards, abort
from .jobs import JobRefused, Jobs, invoked, method_of
from .mqtt import Connection, Endpoint, MethodFailed, Packet, Session, Settings, Telemetry
from .registry import Identity, Registry, is_thumbprint
from .tls import Context, Secured

if TYPE_CHECKING:
    from .x509 import Authorities, DeviceCertificate, Issuer

_T = TypeVar("_T")
Document = dict[str, Any]

_log = logging.getLogger("twin_device.hub")
_CALL_WITHIN = 30.0
_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_HANDSHAKE_WITHIN = 20.0
_KEEP_ALIVE = 60.0
# For what is still sent of a body that was refused.
_LINGER = 1.0
# TLS handshakes under way; beyond that the oldest is given up.
_MAX_GREETING = 1000
_PAGE_LIFETIME = 7 * 86400  # seconds
_DAY = 86400.0


class LocalHub:
    """A local IoT Hub for development and tests; no production hub.

    mqtts_port, mqtt_port: MQTT over TLS, and in plaintext. https_port, http_port: the back end's REST API. 0
    is any free port, None is off; all listen on loopback only. host_names: the names that the hub goes by;
    connection strings carry the first. owner_key: base64, the key of the hub's policies; made when None.
    certificates: a folder with ca.pem and server.pem, made there when it is empty; None for one that goes
    away with the hub. device_ca: a PEM file, or several, with the CAs that may sign devices' certificates
    (certificateAuthority). data: a folder that keeps identities, twins, sessions and jobs over a restart;
    None for memory alone. settings: those of mqtt.Settings, by their names: what sources do not agree on, and
    limits. ValueError names what is wrong with an argument.
    """

    def __init__(
        self,
        mqtts_port: int | None = 0,
        mqtt_port: int | None = None,
        *,
        https_port: int | None = None,
        http_port: int | None = None,
        host_names: tuple[str, ...] = ("localhost",),
        owner_key: str | None = None,
        certificates: str | Path | None = None,
        device_ca: str | Path | Sequence[str | Path] | None = None,
        data: str | Path | None = None,
        **settings: Any,
    ) -> None:
        try:
            chosen = Settings(**settings)
        except TypeError:
            raise ValueError(
                f"a hub has no setting {sorted(settings.keys() - vars(Settings()).keys())[0]!r}"
            ) from None
        self._registry = Registry(host_names, owner_key)
        self._owner_key = owner_key
        for path in [device_ca] if isinstance(device_ca, (str, Path)) else device_ca or ():
            self._trust().add_file(path)
        self._data = None if data is None else Path(data)
        self._faults = Faults()
        self._endpoint = Endpoint(self._registry, self._faults, chosen, self._note_change)
        self._jobs = Jobs(self._endpoint)
        self._wanted = {"mqtts": mqtts_port, "mqtt": mqtt_port}
        self._wanted_http = {"https": https_port, "http": http_port}
        self._ports: dict[str, int] = {}
        self._folder = None if certificates is None else Path(certificates)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._ca_file: Path | None = None
        # TLS that asks for certificates, once there is a device that has one; False where it cannot be had.
        self._asking: Context | bool | None = None
        # Of make_certificate(): from the one that signs up to the root.
        self._issuers: list[Issuer] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # One at a time starts, pauses or closes it.
        self._life = threading.RLock()
        # Held while the loop is handed work, and while it ends: none is handed to a loop that is gone.
        self._gate = threading.RLock()
        self._listeners: list[tuple[socket.socket, asyncio.Task[None]]] = []
        # In the order in which they came.
        self._greeting: dict[asyncio.Task[None], None] = {}
        self._runner: Any = None
        self._guards = Guards()
        # Counts changes, so that a waiter cannot miss the one that comes while it looks.
        self._changes = 0
        self._changed = threading.Condition()

    # ------------------------------------------------------------------ its life

    def start(self) -> None:
        """Listen. OSError: a port is taken. ModuleNotFoundError: trustme or aiohttp is needed and missing."""
        with self._life:
            if self._thread is not None:
                raise RuntimeError("this hub runs already")
            context = None
            self._load()
            if self._wanted["mqtts"] is not None or self._wanted_http["https"] is not None:
                if self._folder is None:
                    self._temporary = tempfile.TemporaryDirectory(prefix="twin-device-hub-")
                folder = self._folder or Path(self._temporary.name if self._temporary else "")
                try:
                    self._ca_file = certificates.prepare(folder, self._registry.host_names)
                    context = certificates.server_context(folder)
                except BaseException:
                    self._clean_up()
                    raise
            self._asking = None
            self._contexts: dict[str, Any] = {"mqtts": context, "mqtt": None, "https": context, "http": None}
            self._loop = asyncio.SelectorEventLoop()  # on Windows too: it can wait for a listener
            self._thread = threading.Thread(target=self._run, name="twin-device-hub", daemon=True)
            self._thread.start()
            try:
                self.listen_again()
                self._call(self._jobs.start)
                self._wait(self._serve())
                self._wait(self._listen(self._wanted_http))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End every connection and the hub's thread."""
        with self._life:
            if self._thread is None or self._loop is None:
                return
            self._wait(self._shut_down(self._wanted))
            self._wait(self._jobs.close())
            self._wait(self._shut_down(self._wanted_http))
            self._wait(self._stop_serving())
            with self._gate:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(_CALL_WITHIN)
                self._thread = self._loop = None
            self._clean_up()

    def __enter__(self) -> "LocalHub":
        if self._thread is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _clean_up(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None
        if self._endpoint.storage is not None:
            self._endpoint.storage.close()
            self._endpoint.storage = None

    def _load(self) -> None:
        """Take over what the data folder keeps; what was created before start() stays, and is kept, too."""
        if self._data is None:
            return
        from .storage import Storage  # only here: sqlite3 is for who keeps something

        storage = Storage(self._data)
        registry, endpoint = self._registry, self._endpoint
        registry.policy_key = storage.policy_key(self._owner_key) or registry.policy_key
        storage.policy_key(registry.policy_key)
        for identity, twin, subscriptions in storage.load():
            if identity.id not in registry.identities:
                registry.identities[identity.id] = identity
                twin.rules = endpoint.settings.rules
                endpoint.create(identity, twin)
                if subscriptions is not None:
                    endpoint.sessions[identity.id] = Session(subscriptions, persistent=True)
        endpoint.storage = storage
        self._jobs.load(storage)
        for name in registry.identities:
            endpoint.keep(name)

    def _run(self) -> None:
        loop = self._loop
        if loop is not None:
            asyncio.set_event_loop(loop)
            try:
                loop.run_forever()
            finally:
                loop.close()

    def stop_listening(self) -> None:
        """Be away for devices: end every connection and take no new one, until listen_again().

        Sessions are kept; the REST API stays there.
        """
        with self._life:
            self._wait(self._shut_down(self._wanted))

    def listen_again(self) -> None:
        """Listen on the same ports as before."""
        with self._life:
            self._wait(self._listen(self._wanted))

    async def _listen(self, endpoints: dict[str, int | None]) -> None:
        if endpoints is self._wanted:
            self._endpoint.is_away = False
        for name, wanted in endpoints.items():
            if wanted is None or any(task.get_name() == name for _, task in self._listeners):
                continue
            for listener in self._bind(name, wanted):
                task = asyncio.get_running_loop().create_task(self._accept(name, listener), name=name)
                self._listeners.append((listener, task))

    async def _serve(self) -> None:
        """The REST API, which stays up also while the hub is away for its devices."""
        if not any(wanted is not None for wanted in self._wanted_http.values()):
            return
        from aiohttp import web  # only here: a hub for devices alone does not need it

        from .service import RequestLog, Service

        service = Service(self._endpoint, self._jobs, self._guards)
        self._runner = web.AppRunner(
            service.application(),
            access_log=None,
            logger=RequestLog(_log, None),
            shutdown_timeout=1.0,
            keepalive_timeout=_KEEP_ALIVE,
            lingering_time=_LINGER,
            # A stream of events ends when its listener goes, not when there is something to tell.
            handler_cancellation=True,
        )
        await self._runner.setup()

    async def _stop_serving(self) -> None:
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        transports = [connection.transport for connection in runner.server.connections]
        await runner.cleanup()
        for transport in transports:
            if transport is not None:
                # Merely closed, TLS would wait for its peer's goodbye.
                abort(transport)
        # Handshakes that have just begun, which nobody but the loop knows of.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # The loop closes the sockets of what was aborted in its next round.
        await asyncio.sleep(0)

    def _bind(self, name: str, wanted: int) -> list[socket.socket]:
        port = self._ports.get(name, wanted)
        listeners = []
        for family, address in _ADDRESSES:
            try:
                listener = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                continue  # a machine without IPv6
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((address, port))
                listener.listen(1024)
            except OSError as error:
                listener.close()
                if family == socket.AF_INET:
                    text = f"cannot listen on port {port} for {name}: {error.strerror}"
                    raise OSError(error.errno, text) from None
                # The same port of IPv6 is a convenience; who dials ::1 meets somebody else there.
                _log.warning("not on [::1]:%d for %s: %s", port, name, error.strerror)
                continue
            listener.setblocking(False)
            port = self._ports[name] = listener.getsockname()[1]
            listeners.append(listener)
        return listeners

    async def _accept(self, name: str, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Not sock_accept: cancelled at the wrong moment it forgets a connection that is open.
            try:
                raw, _ = listener.accept()
                raw.setblocking(False)
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                await _readable(loop, listener)
                continue
            except OSError as error:
                # Out of file descriptors: those who are connected go on, new ones wait.
                _log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(0.1)
                continue
            if name == "mqtts" and self._faults.take("hanging_tls"):
                self._endpoint.hanging.append(raw)
                continue
            if len(self._greeting) >= _MAX_GREETING:
                # Who has kept silent longest makes room.
                oldest = next(iter(self._greeting))
                del self._greeting[oldest]
                oldest.cancel()
            task = loop.create_task(self._greet(raw, name), name=name)
            self._greeting[task] = None
            task.add_done_callback(lambda done: self._greeting.pop(done, None))
            # It begins now: cancelled before, it would not close what it was given.
            await asyncio.sleep(0)

    def _connection(self) -> asyncio.BaseProtocol:
        return Connection(self._endpoint)

    def _guarded(self) -> asyncio.BaseProtocol:
        return Guard(self._guards, self._runner.server())

    async def _greet(self, raw: socket.socket, name: str) -> None:
        context = self._contexts[name]
        if name == "mqtts" and self._registry.asks_for_certificates:
            context = self._asking_context() or context
        loop = asyncio.get_running_loop()
        try:
            if name in self._wanted and context is not None:
                await self._secure(raw, context)
            else:
                await loop.connect_accepted_socket(
                    self._connection if name in self._wanted else self._guarded,
                    raw,
                    ssl=context,
                    ssl_handshake_timeout=None if context is None else _HANDSHAKE_WITHIN,
                )
        except OSError as error:
            # Not our certificate to trust, or no TLS at all.
            _log.info("no TLS connection: %s", error)
            raw.close()
        except BaseException:
            raw.close()
            raise

    def _asking_context(self) -> Context | None:
        if self._asking is None and self._ca_file is not None:
            try:
                from .x509 import Asking  # only here: not every hub has devices with certificates

                self._asking = Asking(self._ca_file.with_name("server.pem"))
            except ModuleNotFoundError as error:
                self._asking = False
                _log.warning(
                    "devices with certificates are refused, %s is missing: pip install 'twin-device[hub]'",
                    error.name,
                )
        return None if isinstance(self._asking, bool) else self._asking

    def _trust(self) -> "Authorities":
        """The CAs that may sign devices' certificates, to add one."""
        from .x509 import Authorities

        self._registry.authorities = self._registry.authorities or Authorities()
        return self._registry.authorities

    async def _secure(self, raw: socket.socket, context: Context) -> None:
        secured = Secured(context, Connection(self._endpoint), self._endpoint.inbox)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: secured, raw)
        try:
            await asyncio.wait_for(secured.done, _HANDSHAKE_WITHIN)
        except asyncio.TimeoutError:
            secured.abort()
            raise ConnectionAbortedError("TLS handshake is taking too long") from None
        except asyncio.CancelledError:
            secured.abort()
            raise

    async def _shut_down(self, endpoints: dict[str, int | None]) -> None:
        """Stop listening there and end every connection of devices, if they are theirs."""
        chosen = [one for one in self._listeners if one[1].get_name() in endpoints]
        self._listeners = [one for one in self._listeners if one not in chosen]
        greeting = [task for task in self._greeting if task.get_name() in endpoints]
        # First those who accept; by then every greeting has begun, and closes what it was given.
        for tasks in [task for _, task in chosen], greeting:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for listener, _ in chosen:
            listener.close()
        if endpoints is self._wanted:
            self._endpoint.is_away = True
            for raw in self._endpoint.hanging:
                raw.close()
            self._endpoint.hanging = []
            self._endpoint.drop_all()
            while self._endpoint.open:
                await asyncio.sleep(0)

    def _wait(self, work: "Coroutine[Any, Any, _T]", within: float = _CALL_WITHIN) -> _T:
        if self._loop is None:
            work.close()
            raise RuntimeError("this hub does not run")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(within)

    def _call(self, work: Callable[[], _T]) -> _T:
        """Have work done in the hub's loop, and wait for it. Before start() and after close(): right here."""
        if threading.current_thread() is self._thread:
            return work()
        answer: Future[_T] = Future()

        def do() -> None:
            try:
                answer.set_result(work())
            except BaseException as error:  # noqa: BLE001  # whoever asked gets it
                answer.set_exception(error)

        with self._gate:
            if self._loop is None:
                return work()
            self._loop.call_soon_threadsafe(do)
        return answer.result(_CALL_WITHIN)

    def _note_change(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    # ------------------------------------------------------------------ what it is

    @property
    def mqtts_port(self) -> int | None:
        """The port of MQTT over TLS; None if it is off."""
        return self._ports.get("mqtts")

    @property
    def mqtt_port(self) -> int | None:
        """The port of MQTT in plaintext; None if it is off."""
        return self._ports.get("mqtt")

    @property
    def https_port(self) -> int | None:
        """The port of the REST API over TLS; None if it is off."""
        return self._ports.get("https")

    @property
    def http_port(self) -> int | None:
        """The port of the REST API in plaintext; None if it is off."""
        return self._ports.get("http")

    @property
    def ca_file(self) -> str:
        """The path of the CA's certificate in PEM form, for clients to trust."""
        if self._ca_file is None:
            raise RuntimeError(
                "this hub has no certificates: it does not listen with TLS, or was not started"
            )
        return str(self._ca_file)

    @property
    def service_connection_string(self) -> str:
        """What a back end connects with, as policy iothubowner. It carries the port of HTTPS, else HTTP."""
        port = self.https_port or self.http_port
        host = self._registry.host_names[0] + ("" if port in (None, 443) else f":{port}")
        return f"HostName={host};SharedAccessKeyName=iothubowner;SharedAccessKey={self._registry.policy_key}"

    @property
    def page_url(self) -> str | None:
        """The web page's address, with a token of policy iothubowner that is good for a week; None if neither
        HTTP nor HTTPS is on. Plaintext if it is on: browsers do not know the hub's CA."""
        port = self.http_port or self.https_port
        if port is None:
            return None
        token = self._registry.token("iothubowner", int(time.time()) + _PAGE_LIFETIME)
        # The part behind "#" never leaves the browser. localhost: other names need not lead here.
        return f"http{'' if self.http_port else 's'}://localhost:{port}/#{quote(token, safe='')}"

    # ------------------------------------------------------------------ events

    def events(self, *sources: str, device: "str | Device | None" = None, timeout: float = 5.0) -> "Events":
        """What happens from now on, to iterate over; events.py lists the sources, none are all but packets.

        timeout: seconds to wait for each event. ValueError: there is no such source.
        """
        return Events(self, sources, device.id if isinstance(device, Device) else device, timeout)

    # ------------------------------------------------------------------ devices

    def create_device(
        self,
        device_id: str,
        key: str | None = None,
        *,
        certificate: str | Path | tuple[str | Path, str | Path] | None = None,
        authority: bool = False,
        desired: Document | None = None,
        tags: Document | None = None,
    ) -> "Device":
        """Create a device, or a module ("device/module", with its device when missing).

        key: base64, made when None. certificate: it connects with this one, or either of two, and not with a
        key: a PEM file, or a thumbprint (SHA-1 or SHA-256 in hexadecimal). authority: it connects with one
        that a CA for devices has signed. desired, tags: what its twin begins with; desired is version 1 all
        the same. ValueError: it exists, or an argument is bad; nothing is created then.
        """
        if (key is not None) + (certificate is not None) + authority > 1:
            raise ValueError("a device has one of key, certificate and authority")
        thumbprints = _thumbprints(certificate)
        rules = self._endpoint.settings.rules
        twin = self._valid(lambda: twins.new(desired or {}, tags or {}, rules))

        def create() -> None:
            identity = self._registry.create(device_id, key)
            if authority:
                identity.authentication = "certificateAuthority"
            elif certificate is not None:
                identity.authentication, identity.thumbprints = "selfSigned", thumbprints
            if identity.device_id not in self._registry.identities:
                self._endpoint.create(self._registry.create(identity.device_id))
            self._endpoint.create(identity, twin)

        self._call(create)
        return Device(self, device_id)

    def make_certificate(
        self,
        device_id: str,
        folder: str | Path,
        *,
        self_signed: bool = False,
        intermediate: bool = False,
        common_name: str | None = None,
        starts: float = -3600.0,
        ends: float = _DAY,
    ) -> "DeviceCertificate":
        """Make a certificate and its key for a device or module ("device/module"), as files in folder.

        Signed by a throw-away CA of this hub's, which it trusts from then on; it goes with create_device(...,
        authority=True). intermediate: another CA is in between, whose certificate is in the same file.
        self_signed: it signed itself; give its file to create_device(..., certificate=...). common_name:
        another than the device's. starts, ends: it is valid between them, in seconds from now; ends=-60.0 has
        expired. One of an unknown CA is one that another LocalHub made, which need not run.

        Returns certificate_file and key_file (PEM, not encrypted, for `ssl` and paho), thumbprint (SHA-256)
        and ca_file (for another hub's device_ca; None if self-signed). Files are named after the device, and
        take the place of older ones. ModuleNotFoundError: twin-device[hub] is not installed. ValueError: a
        common name of more than 64 characters, which no certificate has, or an end before the start.
        """
        from . import x509

        issuers: list[Issuer] = []
        if not self_signed:
            with self._life:
                if not self._issuers:
                    self._issuers = [x509.Issuer()]
                    root = self._issuers[0].certificate
                    self._call(lambda: self._trust().add(root))
                issuers = self._issuers
            if intermediate:
                issuers = [x509.Issuer("twin-device hub, in between", issuers[0]), *issuers]
        return x509.make(
            Path(folder), device_id, device_id if common_name is None else common_name, issuers, starts, ends
        )

    def device(self, device_id: str) -> "Device":
        """The device or module with this id. KeyError: there is none."""
        if device_id not in self._registry.identities:
            raise KeyError(device_id)
        return Device(self, device_id)

    @property
    def devices(self) -> list["Device"]:
        """All devices and modules, by id."""
        return [Device(self, name) for name in self._call(lambda: sorted(self._registry.identities))]

    def _valid(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except twins.Invalid as error:
            raise ValueError(error.message) from None

    # ------------------------------------------------------------------ what goes wrong

    def fault(
        self,
        kind: str,
        *,
        device: "str | Device | None" = None,
        operation: str | None = None,
        times: int | None = None,
        seconds: float | None = None,
        **parameters: Any,
    ) -> Fault:
        """Have something go wrong from now on; faults.py lists what. ValueError: no such thing."""
        name = device.id if isinstance(device, Device) else device
        fault = Fault(kind, name, operation, times, seconds, parameters)
        return self._call(lambda: self._endpoint.add_fault(fault))

    @property
    def faults(self) -> list[Fault]:
        """The faults that are active."""
        return self._call(self._faults.active)

    def clear_faults(self) -> None:
        """Have nothing go wrong any more. Handshakes that hang end."""
        self._call(self._endpoint.clear_faults)

    def forget_sessions(self) -> None:
        """Forget what devices subscribed to and which messages wait for them; connected ones go deaf."""
        self._call(self._endpoint.forget_sessions)

    def snapshot(self) -> Any:
        """All twins as they are, for fail_over()."""
        return self._call(lambda: copy.deepcopy(self._endpoint.twins))

    def fail_over(self, snapshot: Any) -> None:
        """Be another hub with older twins: restore them and end every connection. Younger twins are new."""

        def restore() -> None:
            self._endpoint.restore(copy.deepcopy(snapshot))

        self._call(restore)


class Events:
    """An iterator over a hub's events that ends when it is closed, or used as a context that ends.

    next() raises TimeoutError when nothing came in time. lost: how many events were dropped, since more than
    10,000 waited.
    """

    def __init__(self, hub: LocalHub, sources: tuple[str, ...], device: str | None, timeout: float) -> None:
        self._hub = hub
        self._timeout = timeout
        self._publisher = hub._endpoint.events
        self._subscription: Subscription | None = hub._call(
            lambda: self._publisher.subscribe(sources, device, hub._note_change)
        )
        self.lost = 0

    def __iter__(self) -> "Events":
        return self

    def __next__(self) -> Event:
        deadline = time.monotonic() + self._timeout
        hub = self._hub
        while True:
            seen = hub._changes
            event = hub._call(self._take)
            if event is not None:
                return event
            if self._subscription is None:
                raise StopIteration
            with hub._changed:
                left = deadline - time.monotonic()
                if left <= 0 or (hub._changes == seen and not hub._changed.wait(left)):
                    raise TimeoutError(f"no event came within {self._timeout:g} s")

    def _take(self) -> Event | None:
        if self._subscription is None:
            return None
        self.lost += self._subscription.take_lost()
        return self._subscription.take()

    def close(self) -> None:
        """Listen no more; iterations end."""

        def close() -> None:
            if self._subscription is not None:
                self._publisher.unsubscribe(self._subscription)
                self._subscription = None
                self._hub._note_change()

        self._hub._call(close)

    def __enter__(self) -> "Events":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Device:
    """One device or module of a LocalHub, from the back end's side. KeyError: it was deleted."""

    def __init__(self, hub: LocalHub, device_id: str) -> None:
        self._hub = hub
        self._endpoint = hub._endpoint
        self.id = device_id

    def __repr__(self) -> str:
        return f"<Device {self.id}>"

    # ------------------------------------------------------------------ who it is

    @property
    def connection_string(self) -> str:
        """For a device app, over TLS. It carries the port, unless that is 8883. A device with a certificate
        has x509=true in the place of a key."""
        return self._connection_string(self._hub.mqtts_port, 8883)

    @property
    def plaintext_connection_string(self) -> str:
        """For a device app, in plaintext."""
        return self._connection_string(self._hub.mqtt_port, 1883)

    def _connection_string(self, port: int | None, standard: int) -> str:
        if port is None:
            raise RuntimeError("the hub does not listen there, or was not started")
        identity = self._hub._registry.identities[self.id]
        host = self._hub._registry.host_names[0] + ("" if port == standard else f":{port}")
        module = "" if identity.module_id is None else f"ModuleId={identity.module_id};"
        proof = "x509=true" if identity.uses_certificate else f"SharedAccessKey={identity.primary_key}"
        return f"HostName={host};DeviceId={identity.device_id};{module}{proof}"

    @property
    def keys(self) -> tuple[str, str]:
        """Its two keys in base64; either connects."""
        identity = self._hub._registry.identities[self.id]
        return identity.primary_key, identity.secondary_key

    # ------------------------------------------------------------------ its twin

    @property
    def twin(self) -> Document:
        """The whole twin document as the back end sees it, in a copy."""

        return self._hub._call(lambda: self._endpoint.twin_view(self._hub._registry.identities[self.id]))

    @property
    def desired(self) -> Document:
        """The desired properties, without `$` keys, in a copy."""
        return self._hub._call(lambda: copy.deepcopy(self._endpoint.twins[self.id].desired))

    @property
    def reported(self) -> Document:
        """The reported properties, without `$` keys, in a copy."""
        return self._hub._call(lambda: copy.deepcopy(self._endpoint.twins[self.id].reported))

    @property
    def desired_version(self) -> int:
        return self._hub._call(lambda: self._endpoint.twins[self.id].desired_version)

    @property
    def reported_version(self) -> int:
        return self._hub._call(lambda: self._endpoint.twins[self.id].reported_version)

    def patch_desired(self, patch: Document) -> int:
        """Merge a patch into the desired properties and notify the device; returns the new version.

        ValueError: the hub refuses it, as a real one would; nothing is changed.
        """
        body = {"properties": {"desired": _object(patch)}}
        return self._write(lambda: self._endpoint.update_twin(self.id, body))

    def replace_desired(self, document: Document) -> int:
        """Replace the desired properties and notify the device; returns the new version. Raises as
        patch_desired."""
        properties = {"desired": _object(document)}

        def replace() -> None:
            tags = self._endpoint.twins[self.id].tags
            self._endpoint.replace_twin(self.id, {"tags": tags, "properties": properties})

        return self._write(replace)

    def _write(self, change: Callable[[], None]) -> int:
        def write() -> int:
            change()
            return self._endpoint.twins[self.id].desired_version

        return self._hub._valid(lambda: self._hub._call(write))

    def patch_tags(self, patch: Document) -> None:
        """Merge a patch into the tags, which the device never sees. ValueError: the hub refuses it."""
        body = {"tags": _object(patch)}
        self._write(lambda: self._endpoint.update_twin(self.id, body))

    def wait_for(self, condition: Document | Callable[["Device"], Any], timeout: float = 5.0) -> Any:
        """Wait until the reported properties contain a document, or a function of this Device is true.

        A document: nested objects are contained key by key, None means that the key is not there. Returns
        the reported properties, or what the function gave. TimeoutError after timeout seconds says what is
        there instead.
        """
        deadline = time.monotonic() + timeout
        hub = self._hub
        while True:
            seen = hub._changes
            if callable(condition):
                found = condition(self)
                if found:
                    return found
            else:
                reported = self.reported
                if _contains(reported, condition):
                    return reported
            with hub._changed:
                left = deadline - time.monotonic()
                if left <= 0 or (hub._changes == seen and not hub._changed.wait(left)):
                    break
        wanted = (
            getattr(condition, "__name__", repr(condition)) if callable(condition) else json.dumps(condition)
        )
        raise TimeoutError(
            f"{self.id}: waited {timeout:g} s for {wanted}; reported is {json.dumps(self.reported)}, "
            f"{'connected' if self.connected else 'not connected'}"
        )

    # ------------------------------------------------------------------ its connection

    @property
    def connected(self) -> bool:
        return self.id in self._endpoint.connections

    @property
    def connections(self) -> int:
        """How many CONNECTs were accepted so far."""
        return self._endpoint.connects[self.id]

    @property
    def packets(self) -> tuple[Packet, ...]:
        """The last 2,000 MQTT packets of this device, oldest first.

        Of all devices together the hub keeps the last 100,000, and no more than 64 MB of topics and payloads.
        """
        return self._hub._call(lambda: self._endpoint.packets[self.id])

    def clear_packets(self) -> None:
        self._hub._call(lambda: self._endpoint.packets.clear(self.id))

    @property
    def telemetry(self) -> tuple[Telemetry, ...]:
        """The last 1,000 device-to-cloud messages, oldest first; of all devices 50,000, and 64 MB."""
        return self._hub._call(lambda: self._endpoint.telemetry[self.id])

    def disconnect(self) -> None:
        """End its connection, like a network that is gone."""
        self._hub._call(lambda: self._endpoint.drop(self.id))

    def notify(self, patch: Document, version: int, topic_version: int | None = None) -> None:
        """Send a desired notification with this version as it is, without touching the twin."""
        self._hub._call(lambda: self._endpoint.send_notification(self.id, patch, version, topic_version))

    def send_raw(self, topic: str, payload: bytes) -> None:
        """Send any PUBLISH as it is."""

        def send() -> None:
            connection = self._endpoint.connections.get(self.id)
            if connection is not None:
                connection.send_raw(topic, payload)

        self._hub._call(send)

    def send_c2d(self, payload: bytes, properties: dict[str, str] | None = None) -> None:
        """Send a cloud-to-device message; it waits for the device. ValueError: 50 wait, it is too large, or a
        module."""
        if self._hub._registry.identities[self.id].module_id is not None:
            raise ValueError("modules get no cloud-to-device messages")
        to = {"$.to": f"/devices/{self.id}/messages/deviceBound", **(properties or {})}
        bag = "&".join(f"{quote(name, safe='$')}={quote(value, safe='')}" for name, value in to.items())
        bag = bag.replace("$.", "%24.")
        self._hub._call(lambda: self._endpoint.send_c2d(self.id, payload, bag))

    def invoke_method(
        self, name: str, payload: Any = None, *, timeout: float = 30.0, connect_timeout: float = 0.0
    ) -> tuple[int, Any]:
        """Have the device perform a direct method; its status and its payload, as JSON.

        payload: JSON; the device is sent it as text. timeout: seconds for the answer. connect_timeout:
        seconds to wait for a device that is not there. TimeoutError: no answer in time. ConnectionError: it
        is not there, or went away. ValueError: a name or payload that no direct method has, or an answer that
        is not JSON.
        """
        body = {"methodName": name, "payload": payload}
        try:
            method = method_of(body)
            method.connect_within, method.respond_within = connect_timeout, timeout
            work = invoked(self._endpoint, self.id, method)
            answer = self._hub._wait(work, timeout + connect_timeout + _CALL_WITHIN)
        except JobRefused as error:
            raise ValueError(error.message) from None
        except MethodFailed as error:
            kinds: dict[int, type[Exception]] = {504101: TimeoutError, 404103: ConnectionError}
            kinds[404104] = ConnectionError
            raise kinds.get(error.code, ValueError)(f"{self.id}: {error.message}") from None
        return answer["status"], answer["payload"]

    # ------------------------------------------------------------------ its identity

    def disable(self) -> None:
        """Refuse it from now on, its modules too, and end their connections."""

        def disable() -> None:
            self._hub._registry.identities[self.id].enabled = False
            self._endpoint.keep(self.id)
            self._endpoint.drop_with_modules(self.id)
            self._endpoint.changed()

        self._hub._call(disable)

    def enable(self) -> None:
        def enable() -> None:
            self._hub._registry.identities[self.id].enabled = True
            self._endpoint.keep(self.id)
            self._endpoint.changed()

        self._hub._call(enable)

    def delete(self) -> None:
        """Delete the identity with its twin, a device with its modules."""

        def delete() -> None:
            for name in self._hub._registry.delete(self.id):
                self._endpoint.delete(name)

        self._hub._call(delete)

    def recreate(self) -> None:
        """Delete it and create it again with the same key or certificate: its twin is new, its versions start
        over."""

        def recreate() -> None:
            old = self._hub._registry.identities[self.id]
            for name in self._hub._registry.delete(self.id):
                self._endpoint.delete(name)
            new: Identity = self._hub._registry.create(self.id, old.primary_key)
            new.authentication, new.thumbprints = old.authentication, old.thumbprints
            self._endpoint.create(new)

        self._hub._call(recreate)


async def _readable(loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
    ready = loop.create_future()
    loop.add_reader(listener, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(listener)


def _thumbprints(
    certificate: str | Path | tuple[str | Path, str | Path] | None,
) -> tuple[str | None, str | None]:
    """Primary and secondary thumbprint of what create_device() was given."""
    given = certificate if isinstance(certificate, tuple) else (certificate, None)
    if len(given) != 2:
        raise ValueError(f"a device has one or two certificates, not {len(given)}")
    primary, secondary = (one if one is None else _thumbprint(one) for one in given)
    return primary, secondary


def _thumbprint(certificate: str | Path) -> str:
    if isinstance(certificate, str) and is_thumbprint(certificate):
        return certificate
    from .x509 import thumbprint_of_file

    try:
        return thumbprint_of_file(certificate)
    except OSError as error:
        raise ValueError(
            f"{str(certificate)!r} is no thumbprint of 40 or 64 hexadecimal digits, and no file that can be "
            f"read: {error.strerror}"
        ) from None


def _object(document: Any) -> Document:
    # Over REST null empties a section; here it is a mistake.
    if not isinstance(document, dict):
        raise ValueError(f"a document is a dict, not {type(document).__name__}")
    return document


def _contains(document: Any, wanted: Any) -> bool:
    if not isinstance(wanted, dict):
        return bool(document == wanted) and isinstance(document, bool) == isinstance(wanted, bool)
    if not isinstance(document, dict):
        return False
    return all(
        key not in document if value is None else key in document and _contains(document[key], value)
        for key, value in wanted.items()
    )
