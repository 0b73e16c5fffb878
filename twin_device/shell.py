"""What the CPython shells, client.py and aio.py, have in common: what a TwinClient is given and what it
knows, its handlers, and what waits for them.
"""

import contextlib
import logging
import marshal
import math
import os
import random
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from . import __version__
from . import tls as tls_files
from .core import settings, twin
from .core.credentials import MADE, Credentials, clock_unset, connection_string_fields
from .core.errors import ConnectRefused, LocalError, TwinError
from .core.patch import diff, dumps

if TYPE_CHECKING:
    from queue import SimpleQueue

    from .store import Kept

Document = dict[str, Any]
_Handler = TypeVar("_Handler", bound=Callable[..., object])
_Client = TypeVar("_Client", bound="Shell")

_MQTTS_PORT = 8883
_MQTT_PORT = 1883
# The hub's own limit: it closes at 1.5 times the keep-alive, and after 29.45 minutes at the latest.
_MAX_KEEP_ALIVE = 1177

# Seconds that close waits for reports that the hub has not answered yet.
FLUSH = 5.0
LOGGED = 1000  # bytes of a payload that a DEBUG line shows
# Bytes that are read at once: one record of TLS.
READ_AT_ONCE = 16384
# The hub's largest message has 256 KiB, and a topic of less than 1 KiB. More is no hub's, and must not take
# this machine's memory.
MAX_PACKET = (256 + 1) << 10
_MAX_ANSWER = 64  # bytes of a packet that is no message
# So many packets within so many milliseconds that neither bring nor answer anything are no hub's.
_MAX_IDLE = 10_000
_IDLE_TIME = 10_000

# A handler may be slower than the hub, or hang. Up to these bounds each change of the desired properties
# waits by itself.
_MAX_CHANGES = 64
_MAX_BYTES = 1 << 20  # of the changes that wait, as marshal writes them
# States and errors, each: more than reports can be refused at once.
_MAX_OTHERS = 2048


def clock() -> int:
    """Milliseconds, of a clock that never goes back. What the core is told as the time."""
    return time.monotonic_ns() // 1_000_000


def copied(document: Any) -> Any:
    """A deep copy of JSON."""
    # The fastest that CPython has.
    return marshal.loads(marshal.dumps(document))  # noqa: S302  # it reads what it has just written


class Broken(Exception):
    """What came is no hub's; the text says what it is."""


def framed(head: int, *parts: bytes) -> bytearray:
    """A packet of MQTT 3.1.1: its first byte, how long the rest is (2.2.3), and the rest."""
    packet = bytearray((head,))
    length = sum(map(len, parts))
    while length > 127:
        packet.append(length & 127 | 128)
        length >>= 7
    packet.append(length)
    return packet + b"".join(parts)


def packet_at(data: "bytes | bytearray", start: int) -> "tuple[int, int] | None":
    """Where the body of the packet that begins at `start` begins and ends, which may be beyond the data; None
    as long as not even that is there. Raises Broken for a packet that no hub sends to a client of ours."""
    # 2.2.3: the remaining length, seven bits a byte, the low ones first.
    length = shift = 0
    at, end = start + 1, len(data)
    while at < end:
        byte = data[at]
        at += 1
        length |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
        if shift > 21:
            raise Broken("a remaining length of more than four bytes")
    else:
        return None
    head = data[start]
    if head & 0xF0 == 0x30:
        if length > MAX_PACKET:
            raise Broken(f"a packet of {length} bytes")
        if head & 0x04:
            # It would have to be kept until it is released; the hub knows no QoS 2.
            raise Broken(f"a message with QoS {head >> 1 & 3}")
    elif head not in (0x20, 0x90, 0xD0):
        # Neither CONNACK, SUBACK nor PINGRESP.
        raise Broken(f"a packet of type {head >> 4}")
    elif length > _MAX_ANSWER:
        raise Broken(f"a packet of type {head >> 4} with {length} bytes")
    return at, at + length


class Bounds:
    """What one connection brings; raises Broken where no hub brings so much."""

    __slots__ = ("_heard", "_idle", "_since")

    def __init__(self) -> None:
        # Packets that neither brought nor answered anything, and since when they are counted; bytes of
        # messages since desired was measured.
        self._idle = self._since = self._heard = 0

    def packet(self) -> None:
        """A packet has come."""
        self._idle += 1
        if self._idle > _MAX_IDLE:
            now = clock()
            if now - self._since < _IDLE_TIME:
                raise Broken(f"{_MAX_IDLE} packets in a row that mean nothing")
            self._idle, self._since = 0, now

    def message(self, size: int, outputs: list[Any], desired: Document) -> None:
        """That packet was a message, of so many bytes; outputs: what the core made of it."""
        for output in outputs:
            if type(output) is not twin.Failed:
                self._idle -= 1
                break
        # Patches that are small enough may still add up to a document that is not.
        self._heard += size
        if self._heard > MAX_PACKET:
            self._heard = len(dumps(desired))
            if self._heard > MAX_PACKET:
                raise Broken(f"desired properties of {self._heard} bytes")


class Shell(ABC):
    """The part of a TwinClient that is the same with threads and with asyncio."""

    _log: ClassVar[logging.Logger]
    # Held while the core is used. Where one thread does everything there is nothing to hold.
    _lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def __init__(
        self,
        host: str,
        device_id: str,
        *,
        module_id: str | None = None,
        key: str | bytes | None = None,
        certificate: tls_files.Certificate | None = None,
        gateway: str | None = None,
        policy: str | None = None,
        port: int = _MQTTS_PORT,
        ca_file: str | os.PathLike[str] | None = None,
        tls: bool = True,
        keep_alive: int = 60,
        timeout: float = 60,
        product_info: str = "",
        model_id: str | None = None,
        token_lifetime: float = 3600,
        store: str | os.PathLike[str] | None = None,
    ) -> None:
        """A client that is not connected yet.

        host: the hub's name, a port may follow (`localhost:18883`); the port is dialled and left out of user
        name and token. device_id, module_id: the identity, as it is registered. key: its key, in base64 or
        decoded. certificate: in its place, for X.509: the files (PEM) of the certificate and of its key, and
        the key's password if it has one, or an ssl.SSLContext that presents it and knows whom to trust;
        files that are replaced count from the next connection on. gateway: the name to dial instead of host.
        policy: the name of the hub's policy whose key it is. Options, times in seconds:

        port: used where host has none; 8883, or 1883 with tls=False. ca_file: PEM file to trust instead of
        the system's store. tls: False for plaintext, which only a local hub speaks. keep_alive: 1 to 1177.
        timeout: the longest wait of a call; a request to the hub is given up and asked again after a third
        of it. product_info: told to the hub as DeviceClientType. model_id: the DTMI of IoT Plug and Play.
        token_lifetime: of the SAS token; it is replaced after four fifths.

        store: a file in which the client goes on where an earlier run with this identity stopped, by power
        cut or not. `desired` is known before there is a connection, and the first patch is the difference to
        it. A report that was accepted is in the file before report() returns, and delivered by a later run
        if this one cannot; a call of the on_desired handlers is in it after they returned, so that one cut
        short is made again. The file is this client's until close(). Damaged, it is set aside, and on_error
        gets a StoreError; so it does, once, when the file cannot be written. Until it can be again, a
        restart goes back to what it holds.

        Raises LocalError: an option is out of its range, the host or the key malformed; the store is used by
        another client, is another identity's, or its folder cannot be written.
        """
        if not 1 <= keep_alive <= _MAX_KEEP_ALIVE:
            raise LocalError(f"keep_alive is from 1 to {_MAX_KEEP_ALIVE} seconds, not {keep_alive}")
        if not timeout > 0:
            raise LocalError(f"timeout is a positive number of seconds, not {timeout}")
        if not token_lifetime > 0:
            raise LocalError(f"token_lifetime is a positive number of seconds, not {token_lifetime}")
        if not 0 < port < 65536:
            raise LocalError(f"port is from 1 to 65535, not {port}")
        if (key is None) is (certificate is None):
            raise LocalError("give the identity's key or its certificate: certificate=(file, key file)")
        if certificate is not None and not tls:
            raise LocalError("a certificate needs tls")
        if isinstance(certificate, ssl.SSLContext) and ca_file is not None:
            raise LocalError("ca_file: the context that is given as certificate says whom to trust")
        credentials = Credentials(host, device_id, module_id, key, gateway, policy=policy)
        self._credentials = credentials
        self._host = credentials.dialled
        if port != _MQTTS_PORT:
            self._port = port
        else:
            self._port = credentials.port or (_MQTTS_PORT if tls else _MQTT_PORT)
        self._where = f"{self._host}:{self._port}"
        self._ca_file = ca_file
        self._certificate = certificate
        self._tls = tls
        self._timeout = float(timeout)
        self._keep_alive = int(keep_alive)
        self._user_name = credentials.user_name(product_info or f"twin-device/{__version__}", model_id)
        self._token_lifetime = float(token_lifetime)
        self._context: ssl.SSLContext | None = None

        self._on_desired: list[Callable[[Document, Document], object]] = []
        self._on_state: list[Callable[[str, str], object]] = []
        self._on_error: list[Callable[[Exception], object]] = []
        self._appliers: dict[str, Callable[[Any], object]] = {}

        kept = None if store is None else self._open_store(store)
        self._twin = twin.Twin(
            timeout=max(1, int(self._timeout * 1000 / 3)),
            request_id=random.randrange(1 << 16) << 16,
            desired=kept and kept.desired,
            reported=kept and kept.reported,
            reports=kept and kept.reports,
        )
        self._settings = settings.Settings(self._twin)
        self._events: Pending
        self._refused: ConnectRefused | None = None
        # How many connect() calls wait: what they raise is not told to the error handlers, too.
        self._waiting = 0
        self._closed = False
        self._set_up()

    @abstractmethod
    def _open_store(self, path: str | os.PathLike[str]) -> "Kept":
        """Open the store; what an earlier run has left in it."""

    @abstractmethod
    def _set_up(self) -> None:
        """Make what the shell has of its own. The core is there; `_events` is to be made."""

    @abstractmethod
    def _perform(self, outputs: list[Any]) -> None:
        """Perform the core's outputs in their order, with the lock held."""

    @abstractmethod
    def _notify(self) -> None:
        """Wake whoever waits for a change of state, a refusal or the end of a report. With the lock held."""

    def _put(self, event: Any) -> None:
        """Have the handlers called for an output of the core."""
        self._events.put(event)

    def __repr__(self) -> str:
        return f"<TwinClient {self._credentials.client_id} at {self._where}, {self.state}>"

    @classmethod
    def from_connection_string(cls: type[_Client], text: str, **options: Any) -> _Client:
        """The client of a device's or module's connection string. options: as of TwinClient.

        Raises LocalError that names the malformed part, never its value.
        """
        fields: dict[str, Any] = connection_string_fields(text)
        return cls(**fields, **options)

    # ------------------------------------------------------------------ what the app knows

    @property
    def state(self) -> str:
        """ "offline", "subscribing", "retrieving" or "synchronised" (connected, subscribed and retrieved)."""
        return self._twin.state

    @property
    def desired(self) -> Document:
        """The desired properties as last known, in a copy of the caller's own."""
        desired: Document = copied(self._twin.desired)
        return desired

    @property
    def reported(self) -> Document:
        """The reported properties that the hub is known to hold, in a copy of the caller's own."""
        reported: Document = copied(self._twin.reported or {})
        return reported

    @property
    def desired_version(self) -> int | None:
        """`$version` of `desired`; None before the first synchronisation."""
        return self._twin.desired_version

    @property
    def reported_version(self) -> int | None:
        """`$version` of `reported`; None before the first synchronisation. Good for report(version=...)."""
        return self._twin.reported_version

    @property
    def statistics(self) -> dict[str, Any]:
        """Counts since the client was made: connects, retrieves, notifications (applied), stale (discarded),
        gaps, reports (patches sent), coalesced (reports that needed none of their own), rejected, throttled,
        ignored (answers nobody waited for); and last_error (str or None)."""
        with self._lock:
            return self._twin.counts

    # ------------------------------------------------------------------ handlers

    def on_desired(self, handler: _Handler) -> _Handler:
        """Have handler(patch, desired) called at every change of the desired properties.

        patch: a JSON merge patch from what the handlers were given before; after a (re)connect it is the
        whole difference in one. desired: the properties after it. Both are the handler's own copies.
        """
        self._on_desired.append(handler)
        return handler

    def on_state(self, handler: _Handler) -> _Handler:
        """Have handler(old, new) called at every change of `state`."""
        self._on_state.append(handler)
        return handler

    def on_error(self, handler: _Handler) -> _Handler:
        """Have handler(error) called for errors that belong to no call of the app: refused credentials, a hub
        that breaks its protocol, a refused report that nobody waited for, an exception in another handler."""
        self._on_error.append(handler)
        return handler

    def setting(self, name: str, *, shape: str = "document") -> Callable[[_Handler], _Handler]:
        """Make a desired property a setting: the desired-state pattern.

        The decorated function is called with a new desired value and applies it, or raises to refuse it. The
        client reports the value as pending before, and success or failure with the exception's text after.
        A value that is reported as applied already is not applied again; one that is not is tried again
        after every reconnect. Of values that arrive meanwhile only the newest is applied. A desired value
        that is removed changes nothing.

        shape: "document" (`status` Pending, Success, Failed; `pendingConfig`; `reason`) or "pnp" (`value`,
        `ac`, `av`, `ad`). name: "component.property" for a property of a Plug and Play component.
        """

        def declare(apply: _Handler) -> _Handler:
            with self._lock:
                self._settings.declare(name, shape)
                self._appliers[name] = apply
                self._perform(self._settings.declared(name, clock()))
            return apply

        return declare

    # ------------------------------------------------------------------ for the shells

    def _load_tls(self) -> None:
        """Read the files that TLS needs; LocalError if they cannot be right. That a certificate has expired
        is no LocalError: the dial tells."""
        if self._tls:
            with contextlib.suppress(ConnectRefused):
                self._context = tls_files.context(self._ca_file, self._certificate)

    def _warn_of_plaintext(self) -> None:
        host = self._host
        if not self._tls and not (host in ("localhost", "::1") or host.startswith("127.")):
            self._log.warning("%s: plaintext to %s: anybody on the way can read and change it", self, host)

    def _before_dial(self) -> None:
        """What has to be right before each dial. Raises ConnectRefused."""
        try:
            if time.time() < MADE:
                raise clock_unset(time.strftime("%Y-%m-%d", time.gmtime()))
            if self._tls:
                # Anew each time: files that were replaced, as certificates are, count from the next dial on.
                self._context = tls_files.context(self._ca_file, self._certificate)
        except LocalError as error:
            raise ConnectRefused(f"cannot connect to {self._where}: {error}", False) from error

    def _password(self) -> str | None:
        """The password of a connection that begins now: a new token, or none beside a certificate."""
        if self._certificate is not None:
            return None
        # Whole seconds, and never fewer than the lifetime after which the core renews it.
        return self._credentials.password(math.ceil(time.time() + self._token_lifetime))

    def _lifetime(self) -> int | None:
        """Milliseconds that the password of this connection lives; None for ever."""
        return int(self._token_lifetime * 1000) if self._certificate is None else None

    def _not_in_time(self) -> ConnectRefused:
        why = self._twin.counts["last_error"] or f"it is still {self._twin.state}"
        return ConnectRefused(f"not synchronised with {self._where} in time: {why}")

    def _state_changed(self, output: Any) -> None:
        final = output.new in (twin.OFFLINE, twin.SYNCHRONISED)
        self._log.log(
            logging.INFO if final else logging.DEBUG, "%s is %s", self._credentials.client_id, output.new
        )
        if output.new == twin.SYNCHRONISED:
            self._refused = None
        self._notify()

    def _failed(self, error: Exception) -> None:
        if isinstance(error, ConnectRefused) and not error.can_retry:
            self._refused = error
            self._notify()
            if self._waiting:
                return
        self._put(twin.Failed(error))

    def _log_unheard(self, error: BaseException) -> None:
        """An error that no handler is there for goes to the log; an app's own with its traceback."""
        if not self._on_error:
            known = isinstance(error, TwinError)
            self._log.error("%s: %s", self._credentials.client_id, error, exc_info=None if known else error)


class Pending:
    """The outputs of the core that are for handlers, until these are called. For any thread (rule 5).

    Beyond its bounds the newest change of the desired properties that waits takes in those that follow: the
    handler is given one patch, from what it was last given to the newest properties, as after a reconnect
    (rule 1.4).

    given: the desired properties that the handlers know. ready: given something when there is one to take.
    """

    __slots__ = ("_bytes", "_counts", "_given", "_lock", "_newest", "_ready", "_waiting")

    def __init__(self, given: Document, ready: "SimpleQueue[None] | None" = None) -> None:
        self._given = given
        self._ready = ready
        # Each with what it adds to _bytes.
        self._waiting: deque[list[Any]] = deque()
        self._bytes = 0
        # By kind: how many wait, and the newest of them.
        self._counts: dict[type, int] = {}
        self._newest: dict[type, list[Any]] = {}
        # A signal's handler may come in the middle of a call.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: Any) -> None:
        """Have it wait at the end, or join what waits."""
        kind = type(event)
        with self._lock:
            count = self._counts.get(kind, 0)
            newest = self._newest.get(kind)
            cost = 0
            if newest is not None:
                if kind is twin.DesiredChanged:
                    if count >= _MAX_CHANGES or self._bytes > _MAX_BYTES:
                        # Merge patches do not compose: the patch is made when it is taken.
                        newest[0] = twin.DesiredChanged(None, event.desired)
                        return
                    cost = len(marshal.dumps(tuple(event)))
                elif kind is twin.Reported:
                    # It only has the store looked at.
                    return
                elif count >= _MAX_OTHERS and kind is twin.StateChanged:
                    newest[0] = twin.StateChanged(newest[0].old, event.new)
                    return
                elif count >= _MAX_OTHERS and kind is twin.Failed:
                    newest[0] = event
                    return
            waiting = [event, cost]
            self._bytes += cost
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self._newest[kind] = waiting
            self._waiting.append(waiting)
        if self._ready is not None and self._ready.empty():
            self._ready.put(None)

    def take(self) -> Any:
        """The one that has waited longest; IndexError if there is none.

        A change whose patch is empty is none any more.
        """
        with self._lock:
            waiting = self._waiting.popleft()
            event, cost = waiting
            kind = type(event)
            self._bytes -= cost
            self._counts[kind] -= 1
            if self._newest.get(kind) is waiting:
                del self._newest[kind]
            if kind is twin.DesiredChanged:
                if event.patch is None:
                    event = twin.DesiredChanged(diff(self._given, event.desired), event.desired)
                self._given = event.desired
        return event
