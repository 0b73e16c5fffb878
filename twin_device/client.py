"""TwinClient for threads, on paho-mqtt 2.

Two threads a client. The network thread dials, drives paho and feeds the core; the dispatcher thread calls
the app's handlers, one at a time and in order. One lock guards the core and paho; whoever gives the core an
input performs its outputs before letting go, so outputs leave in the order in which they were decided. A
report is written to the socket by the thread that makes it: to wake another one takes as long as the hub.
"""

import contextlib
import errno
import logging
import os
import random
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

try:
    # What `queue` has it from; that also brings in heapq, for what is not needed here.
    from _queue import SimpleQueue
except ImportError:
    from queue import SimpleQueue

from . import tls as tls_files
from .core import settings, twin
from .core.errors import (
    ConnectRefused,
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
    from .store import Kept, Store

_log = logging.getLogger("twin_device.client")

_LONG = 3_600_000  # milliseconds that a thread with nothing to do sleeps; what comes up wakes it
# Packets that wait to be written: a report, a retrieve and a ping. More are answers to a hub that reads none.
_MAX_UNWRITTEN = 1000
# Milliseconds in which reports are gathered that nobody waits for and that follow another: the hub may answer
# that one while the app is still in its burst, and each patch counts against the hub's quota.
_GATHER = 50

# paho gives the CONNACK return codes of MQTT 3.1.1 as the reason codes of MQTT 5.
_RETURN_CODES = {0: 0, 132: 1, 133: 2, 136: 3, 134: 4, 135: 5}


class Report:
    """A report on its way to the hub. Reports that left in one patch may be one and the same Report."""

    def __init__(self, timeout: float, flush: Callable[[], None]) -> None:
        self._timeout = timeout
        self._flush = flush
        self._done = False
        # Held until it is done. An Event costs three times as much to make, and there is one a report.
        self._pending = threading.Lock()
        self._pending.acquire()
        self._version: int | None = None
        self._error: TwinError | None = None
        self._watched = False

    def __repr__(self) -> str:
        state = "on its way" if not self.done else "accepted" if self._error is None else "not accepted"
        return f"<Report {state}>"

    @property
    def done(self) -> bool:
        """True once the hub has answered, or the client was closed."""
        return self._done

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the hub's answer; at most timeout seconds, None for the client's own.

        Returns the reported `$version` after it (int; None from a hub that tells none). Raises
        ReportRejected if the hub refused it, ReportTimeout if there is no answer yet (it stays on its way),
        NotConnected if the client was closed before.
        """
        if not self._done:
            self._flush()
        return self._wait(timeout)

    def _wait(self, timeout: float | None) -> int | None:
        timeout = self._timeout if timeout is None else timeout
        if not self._done:
            if not self._pending.acquire(timeout=max(0.0, timeout)):
                raise ReportTimeout(
                    f"the hub has not answered within {timeout:g} s; the report is still on its way"
                )
            # For whoever else waits.
            self._pending.release()
        if self._error is not None:
            raise self._error
        return self._version

    def _end(self, version: int | None, error: TwinError | None) -> None:
        """Be done. Whoever waits is woken by a _wake() that has to follow."""
        self._version, self._error = version, error
        self._done = True

    def _wake(self) -> None:
        self._pending.release()


class _Retrieve:
    def __init__(self) -> None:
        self.ended = threading.Event()
        self.twin: Document | None = None
        self.error: TwinError | None = None


class _Cancelled(OSError):
    """The client is being disconnected while it dials."""


class _Mqtt(mqtt.Client):
    """paho's client over a socket that was dialled by `dial`.

    paho's own dial can neither be ended by another thread nor bounded as a whole: a hub that sends its
    handshake a byte at a time would hold it for ever.
    """

    dial: Callable[[], "_Stream"]

    def _create_socket(self) -> Any:
        return self.dial()

    @property
    def unwritten(self) -> int:
        return len(self._out_packet)

    def drop(self) -> None:
        """Close the socket, if there is one, without a word to the hub."""
        self._sock_close()


class _Stream:
    """A connected socket as paho uses it.

    It takes apart what comes: paho is given whole packets of a bounded size, and no messages at QoS 0, which
    are nearly all that there is; for each of those it would make five objects and three reads. Likewise such
    messages are written without it. An error of a write is kept for the network thread, for no other thread
    may close what that one waits for.
    """

    def __init__(self, connected: "socket.socket | ssl.SSLSocket") -> None:
        self.socket = connected
        self.error: OSError | None = None
        # What could not be written yet of a message.
        self.rest = b""
        # What was read and not taken yet, and how long the packet at its start is if it is not whole.
        self._in = bytearray()
        self._wanted = 0
        # The packet that paho reads, and how far it is.
        self._packet = b""
        self._at = 0

    # For paho.

    def recv(self, size: int) -> bytes:
        at = self._at
        if at >= len(self._packet):
            raise BlockingIOError
        self._at = at + size
        return self._packet[at : at + size]

    def send(self, data: "bytes | bytearray") -> int:
        self.flush()
        if self.rest:
            raise BlockingIOError
        return self._write(data)

    def fileno(self) -> int:
        return self.socket.fileno()

    def setblocking(self, flag: bool) -> None:
        self.socket.setblocking(flag)

    def close(self) -> None:
        self.socket.close()

    # For the network.

    def publish(self, topic: str, payload: bytes) -> None:
        """A PUBLISH at QoS 0 (MQTT 3.1.1, 3.3)."""
        name = topic.encode()
        self.rest += framed(0x30, len(name).to_bytes(2, "big"), name, payload)
        self.flush()

    def flush(self) -> None:
        """Write what is left of messages, as far as it goes."""
        if self.rest:
            with contextlib.suppress(BlockingIOError):
                self.rest = self.rest[self._write(self.rest) :]

    def _write(self, data: "bytes | bytearray") -> int:
        try:
            return self.socket.send(data)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except OSError as error:
            self.error = error
            return len(data)

    def fill(self) -> bool:
        """Read what there is, up to a record of TLS; False at the connection's end. Raises OSError."""
        try:
            data = self.socket.recv(READ_AT_ONCE)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return True
        self._in += data
        return bool(data)

    def next(self) -> "tuple[bool, bytes] | None":
        """True and the body of a message at QoS 0; False for any other packet, which is paho's to read. None:
        no packet is whole. Raises Broken."""
        data = self._in
        end = len(data)
        if end < self._wanted or end < 2:
            return None
        found = packet_at(data, 0)
        if found is None:
            return None
        at, self._wanted = found
        if end < self._wanted:
            return None
        packet = bytes(data[: self._wanted])
        del data[: self._wanted]
        self._wanted = 0
        # 3.3.1: the type is 3, and the two bits of the QoS are not set.
        if packet[0] & 0xF6 == 0x30:
            return True, packet[at:]
        self._packet, self._at = packet, 0
        return False, b""

    @property
    def holds_more(self) -> bool:
        """True if TLS has more to read, of which the selector knows nothing."""
        return isinstance(self.socket, ssl.SSLSocket) and self.socket.pending() > 0


class TwinClient(Shell):
    """One device's or module's twin; `help(TwinClient.__init__)` tells the options.

    Handlers run one at a time and in order, in a thread of their own, and may call every method. An
    exception in one goes to the on_error handlers and stops nothing.
    """

    _log = _log
    _store: "Store | None" = None

    def _set_up(self) -> None:
        # Holds something if the dispatcher is to look at the events.
        self._ready: SimpleQueue[None] = SimpleQueue()
        # What the handlers were last given whole.
        self._given: Document = self._twin.desired
        self._events = Pending(self._given, self._ready)
        if self._store is not None and self._store.error is not None:
            self._put(twin.Failed(self._store.error))
        # What goes to the store in place of the core's queue, once that was given up at close.
        self._left: list[Any] | None = None
        self._store_failed = False
        self._reports: dict[int, Report] = {}
        self._retrieves: dict[int, _Retrieve] = {}
        self._lock = threading.RLock()
        # Notified at every change of state, refusal, and end of a report.
        self._changed = threading.Condition(self._lock)
        self._network: _Network | None = None
        self._dispatcher: threading.Thread | None = None

    def _notify(self) -> None:
        self._changed.notify_all()

    # ------------------------------------------------------------------ connecting

    def connect(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Connect, subscribe and retrieve; from then on the client reconnects by itself.

        Returns once synchronised, or with wait=False at once. Raises ConnectRefused if the hub refuses the
        credentials or is not who it should be, or if there is no connection after timeout seconds (None: the
        client's own); the client is disconnected again then. NotConnected: it is closed. LocalError: bad
        ca_file.
        """
        deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
        self._load_tls()
        with self._lock:
            if self._closed:
                raise NotConnected("this client is closed; make a new one")
        try:
            with self._lock:
                network = self._network or self._start()
            if wait:
                self._await_synchronised(network, deadline)
        except BaseException:
            self.disconnect()
            raise

    def _start(self) -> "_Network":
        self._refused = None
        self._warn_of_plaintext()
        network = self._network = _Network(self)
        if self._dispatcher is None:
            name = f"twin-dispatcher-{self._credentials.client_id}"
            self._dispatcher = threading.Thread(target=self._dispatch, name=name, daemon=True)
            self._dispatcher.start()
        network.start()
        self._perform(self._twin.start(clock()))
        return network

    def _await_synchronised(self, network: "_Network", deadline: float) -> None:
        with self._lock:
            self._waiting += 1
            try:
                while self._twin.state != twin.SYNCHRONISED:
                    if self._refused is not None:
                        raise self._refused
                    if self._network is not network:
                        raise NotConnected("the client was disconnected while it connected")
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                        raise self._not_in_time()
            finally:
                self._waiting -= 1

    def disconnect(self) -> None:
        """End the connection and the client's threads. What is gathered stays, for the next connect()."""
        with self._lock:
            network, dispatcher = self._network, self._dispatcher
            self._network = None
            if network is None:
                return
            outputs = self._twin.stop()
            # Told to the network thread last, so that it still performs these.
            self._perform(outputs, network)
            network.end()
            self._events.put(None)
            self._changed.notify_all()
        for thread in (network, dispatcher):
            # A handler may disconnect: its own thread ends once the handler has returned.
            if thread is None or thread is threading.current_thread():
                continue
            if thread.ident is None:
                # Ctrl-C came between making it and its start: there is nothing to wait for.
                if thread is dispatcher:
                    self._dispatcher = None
                else:
                    network.dispose()
                continue
            thread.join(self._timeout)
            if thread.is_alive():
                _log.warning("%s has not ended: a handler or a name look-up still runs", thread.name)

    def close(self) -> None:
        """Disconnect for good. While synchronised, first waits up to 5 seconds for reports on their way;
        those that stay unanswered, and every other call that waits, end in NotConnected. With a store, the
        next run delivers them all the same."""
        deadline = time.monotonic() + min(self._timeout, FLUSH)
        with self._lock:
            self._flush()
            while self._twin.outstanding and self._twin.state != twin.OFFLINE:
                if not self._changed.wait(deadline - time.monotonic()):
                    break
            self._closed = True
            # Then nobody has waited for the dispatcher to end: a handler has disconnected the client.
            unawaited = self._network is None
        self.disconnect()
        with self._lock:
            if self._left is None:
                self._left = self._twin.unanswered
            self._perform(self._twin.abandon())
            self._changed.notify_all()
        if self._store is not None:
            self._close_store(self._timeout if unawaited else 0)

    def __enter__(self) -> "TwinClient":
        try:
            self.connect()
        except BaseException:
            # No __exit__ will come to give the file back.
            if self._store is not None:
                self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run_forever(self) -> None:
        """Connect if need be, and return once the client is closed, or at SIGINT or SIGTERM (which close it).

        At once if it is closed already, as a handler may have done. Signals are caught only in the main
        thread; their handlers are put back.
        """
        # Its constants take a while to be made, and only this needs them.
        import signal

        try:
            if self._network is None:
                self.connect()
        except NotConnected:
            if self._closed:
                return
            raise
        previous: dict[signal.Signals, Any] = {}
        stopping = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, lambda _number, _frame: stopping.set())
        try:
            while not stopping.is_set():
                with self._lock:
                    if self._network is None:
                        break
                # A signal cannot notify a condition; it can only interrupt a wait.
                stopping.wait(0.5)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.close()

    # ------------------------------------------------------------------ reporting and retrieving

    def report(
        self,
        patch: Document,
        *,
        wait: bool = True,
        timeout: float | None = None,
        version: int | None = None,
        always: bool = False,
    ) -> Any:
        """Bring a merge patch of the reported properties to the hub (None removes a key).

        wait=True: waits up to timeout seconds (None: the client's own) and returns the reported `$version`
        after it (int); raises as Report.wait. wait=False: returns a Report at once, also while offline.
        Whatever the app reports while an answer is on its way, or while offline, leaves as one patch. A burst
        of reports that it does not wait for leaves as two: its first, and within 50 ms all the others. What
        the hub holds already is not sent, unless always=True. version: the reported version that the hub
        must be at, else ReportRejected with status 412.

        PatchError: the hub would refuse the patch; it names the path. NotConnected: the client is closed, or
        was never connected and would have to wait. In both cases nothing was changed.
        """
        with self._lock:
            if self._closed:
                raise NotConnected("this client is closed; make a new one")
            if wait and self._network is None:
                raise NotConnected("not connected: call connect() first, or report with wait=False")
            now = clock()
            self._twin.gather(now, 0 if wait else _GATHER)
            ticket, outputs = self._twin.report(patch, now, version, always)
            report = self._reports.get(ticket)
            if report is None:
                report = self._reports[ticket] = Report(self._timeout, self._flush)
            report._watched = report._watched or wait
            self._perform(outputs)
        if self._store is not None:
            self._keep()
        return report._wait(timeout) if wait else report

    def _flush(self) -> None:
        with self._lock:
            self._perform(self._twin.flush(clock()))

    def retrieve(self, timeout: float | None = None) -> Document:
        """Ask the hub for the twin now: {"desired": ..., "reported": ...}, without `$` keys.

        Waits at most timeout seconds (None: the client's own). Raises RetrieveTimeout, RetrieveRejected, or
        NotConnected if the client is not connected or was closed meanwhile.
        """
        timeout = self._timeout if timeout is None else timeout
        with self._lock:
            if self._network is None:
                raise NotConnected("not connected: call connect() first")
            ticket, outputs = self._twin.ask(clock())
            retrieve = self._retrieves[ticket] = _Retrieve()
            self._perform(outputs)
        if not retrieve.ended.wait(timeout):
            with self._lock:
                self._retrieves.pop(ticket, None)
            raise RetrieveTimeout(f"the hub has not answered within {timeout:g} s")
        if retrieve.error is not None:
            raise retrieve.error
        return retrieve.twin or {}

    # ------------------------------------------------------------------ performing outputs

    def _perform(self, outputs: list[Any], network: "_Network | None" = None) -> None:
        """Perform the core's outputs in their order. The lock is held."""
        network = network or self._network
        if self._appliers:
            outputs = outputs + self._settings.observe(outputs, clock())
        for output in outputs:
            kind = type(output)
            if kind is twin.DesiredChanged:
                self._events.put(output)
            elif kind is twin.Publish:
                network.publish(output.topic, output.payload)  # type: ignore[union-attr]  # connected: there is one
            elif kind is twin.Reported:
                self._reported(output)
            elif kind is twin.Retrieved:
                retrieve = self._retrieves.pop(output.ticket, None)
                if retrieve is not None:
                    retrieve.twin, retrieve.error = output.twin, output.error
                    retrieve.ended.set()
            elif kind is twin.StateChanged:
                self._state_changed(output)
                self._put(output)
            elif kind is twin.Failed:
                self._failed(output.error)
            elif kind is settings.Apply:
                self._events.put(output)
            elif network is not None:
                network.perform(output)
        if network is not None and network.ident != threading.get_ident() and network.is_needed():
            network.wake()

    def _reported(self, output: Any) -> None:
        report = self._reports.pop(output.ticket, None)
        self._changed.notify_all()
        if report is not None:
            report._end(output.version, output.error)
            network = self._network
            if network is not None and network.ident == threading.get_ident():
                network.to_wake.append(report)
            else:
                report._wake()
        if output.error is not None and (report is None or not report._watched) and not self._closed:
            self._events.put(twin.Failed(output.error))
        elif self._store is not None:
            # What was refused, or went alone, is not to come again: the dispatcher looks at the store after
            # every event.
            self._events.put(output)

    # ------------------------------------------------------------------ the store

    def _open_store(self, path: str | os.PathLike[str]) -> "Kept":
        from .store import Store

        self._store = store = Store(path, self._credentials.host, self._credentials.client_id)
        return store.found

    def _keep(self) -> None:
        """Have the store hold what is true now. Not with the lock held: a card may take seconds."""
        try:
            self._store.keep(self._take)  # type: ignore[union-attr]  # called where there is one
        except StoreError as error:
            if self._closed:
                # The error handlers have gone.
                _log.error("%s: %s", self._credentials.client_id, error)
            elif not self._store_failed:
                self._store_failed = True
                self._events.put(twin.Failed(error))
        else:
            self._store_failed = False

    def _take(self) -> "Kept":
        from .store import Kept

        with self._lock:
            reports = self._twin.unanswered if self._left is None else self._left
            return Kept(self._given, self._twin.reported, reports)

    def _close_store(self, timeout: float) -> None:
        dispatcher = self._dispatcher
        if dispatcher is threading.current_thread():
            # A handler closes the client: its call is kept once it has returned.
            return
        if dispatcher is not None and dispatcher.ident is not None:
            dispatcher.join(timeout)
        self._keep()
        self._store.close()  # type: ignore[union-attr]  # called where there is one

    # ------------------------------------------------------------------ the dispatcher thread

    def _dispatch(self) -> None:
        while True:
            try:
                event = self._events.take()
            except IndexError:
                self._ready.get()
                continue
            if event is None:
                with self._lock:
                    # Connected again meanwhile, by a handler: this thread goes on.
                    ends = self._network is None
                    if ends:
                        self._dispatcher = None
                if ends:
                    if self._closed and self._store is not None:
                        # What a full disk has refused before may go now.
                        self._keep()
                        self._store.close()
                    return
                continue
            kind = type(event)
            if kind is twin.DesiredChanged:
                for on_desired in self._on_desired if event.patch else ():
                    try:
                        on_desired(*copied((event.patch, event.desired)))
                    except Exception as error:  # noqa: BLE001  # whatever an app raises goes to its error handlers
                        self._tell_error(error)
                self._given = event.desired
            elif kind is twin.StateChanged:
                for on_state in self._on_state:
                    try:
                        on_state(event.old, event.new)
                    except Exception as error:  # noqa: BLE001  # as above
                        self._tell_error(error)
            elif kind is twin.Failed:
                self._tell_error(event.error)
            elif kind is settings.Apply:
                self._apply(event.name, event.value)
            if self._store is not None:
                self._keep()

    def _apply(self, name: str, value: Any) -> None:
        reason = None
        try:
            self._appliers[name](value)
        except Exception as error:  # noqa: BLE001  # whatever an app raises is its refusal of the value
            reason = str(error) or type(error).__name__
            self._tell_error(error)
        with self._lock:
            self._perform(self._settings.applied(name, reason, clock()))

    def _tell_error(self, error: Exception) -> None:
        self._log_unheard(error)
        for on_error in self._on_error:
            try:
                on_error(error)
            except Exception:  # noqa: BLE001  # nobody is left to tell but the log
                _log.exception("%s: an error handler raised", self._credentials.client_id)


class _Network(threading.Thread):
    """The network thread of one connect(): dials, drives paho, feeds the core."""

    def __init__(self, client: TwinClient) -> None:
        super().__init__(name=f"twin-network-{client._credentials.client_id}", daemon=True)
        self._client = client
        self._twin = client._twin
        self._lock = client._lock
        self._ending = False
        self._dial_wanted = False
        self._hang_up_wanted = False
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        # poll() has no limit on descriptor numbers, and needs none of its own.
        self._selector: selectors.BaseSelector = getattr(
            selectors, "PollSelector", selectors.SelectSelector
        )()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._watched: _Stream | None = None
        # When it will look at the core's deadline again, and at the keep-alive.
        self._until = 0
        self._misc_at = 0
        # True while the stream holds more, of which the selector knows nothing.
        self._more = False
        self._bounds = Bounds()
        # Reports whose waiters are woken once this thread goes to sleep: woken earlier, they would only take
        # the processor from it and wait for the interpreter.
        self.to_wake: list[Report] = []

        self._mqtt = _Mqtt(
            CallbackAPIVersion.VERSION2,
            client._credentials.client_id,
            clean_session=False,
            reconnect_on_failure=False,
        )
        self._mqtt.dial = self._dial
        self._mqtt.on_connect = self._on_connect
        self._mqtt.on_subscribe = self._on_subscribe
        self._mqtt.on_message = self._on_qos1_message
        self._mqtt.connect_async(client._host, client._port, client._keep_alive)

    # Called by any thread, with the lock held.

    def publish(self, topic: str, payload: bytes) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s -> %s %r", self._client._credentials.client_id, topic, payload[:LOGGED])
        stream: Any = self._mqtt.socket()
        if stream is not None and not self._mqtt.want_write():
            stream.publish(topic, payload)
        else:
            self._mqtt.publish(topic, payload)

    def perform(self, output: Any) -> None:
        if type(output) is twin.Subscribe:
            self._mqtt.subscribe([(topic, 0) for topic in output.filters])
        elif type(output) is twin.Disconnect:
            self._hang_up_wanted, self._dial_wanted = True, False
        elif type(output) is twin.Connect:
            self._dial_wanted = True

    def is_needed(self) -> bool:
        """True if there is something that this thread has to do before it looks again by itself."""
        if self._dial_wanted or self._hang_up_wanted:
            return True
        stream: Any = self._mqtt.socket()
        if stream is not None and (stream.rest or stream.error is not None or self._mqtt.want_write()):
            return True
        deadline = self._twin.deadline
        return deadline is not None and deadline < self._until

    def end(self) -> None:
        self._ending = True
        self.wake()

    def wake(self) -> None:
        # Full: it wakes anyway. Closed: it has ended.
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def dispose(self) -> None:
        """Close what the thread waits with."""
        self._selector.close()
        self._woken.close()
        self._waker.close()

    # The thread itself.

    def run(self) -> None:
        try:
            while True:
                with self._lock:
                    hang_up, self._hang_up_wanted = self._hang_up_wanted, False
                    dial, self._dial_wanted = self._dial_wanted, False
                    ending = self._ending
                if hang_up:
                    self._hang_up()
                if ending:
                    return
                try:
                    if dial:
                        self._connect()
                    self._step()
                except Exception as error:  # noqa: BLE001  # a bug costs a reconnect, never the thread
                    _log.exception(
                        "%s: unexpected error in the network thread", self._client._credentials.client_id
                    )
                    self._lose(RemoteError(f"unexpected {type(error).__name__} while reading from the hub"))
        finally:
            self._hang_up()
            self.dispose()
            for report in self.to_wake:
                report._wake()

    def _step(self) -> None:
        """Wait for the socket, a wake-up or the core's deadline, and serve what is there."""
        with self._lock:
            connected = self._watch()
            now = clock()
            until = now + _LONG if connected is None else now + self._client._keep_alive * 125
            deadline = self._twin.deadline
            if deadline is not None:
                until = min(until, deadline)
            if self._dial_wanted or self._hang_up_wanted or self._ending or self._more:
                until = now
            self._until = until
            to_wake, self.to_wake = self.to_wake, []
        for report in to_wake:
            report._wake()
        for key, events in self._selector.select(max(0, until - now) / 1000):
            if key.fileobj is self._woken:
                self._clear_wake_up()
            elif events & selectors.EVENT_READ:
                self._more = True
        if self._more:
            self._read()
        with self._lock:
            now = clock()
            stream: Any = self._mqtt.socket()
            if stream is not None and not self._hang_up_wanted:
                if stream.rest:
                    stream.flush()
                if self._mqtt.want_write():
                    self._check(self._mqtt.loop_write())
                if stream.error is not None:
                    self._lose(RemoteError(f"the connection was lost: {_told(stream.error)}"))
                elif now >= self._misc_at:
                    self._misc_at = now + self._client._keep_alive * 125
                    self._check(self._mqtt.loop_misc())
            deadline = self._twin.deadline
            if deadline is not None and now >= deadline:
                self._client._perform(self._twin.tick(now, random.random()))

    def _watch(self) -> "_Stream | None":
        """Have the selector watch paho's socket, and for writing only while there is something to write."""
        current: Any = self._mqtt.socket()
        if self._watched is not None and self._watched is not current:
            self._selector.unregister(self._watched)
            self._watched = None
        if current is not None:
            events = selectors.EVENT_READ
            if current.rest or self._mqtt.want_write():
                events |= selectors.EVENT_WRITE
            if self._watched is None:
                self._selector.register(current, events)
                self._watched = current
                self._watched_for = events
            elif self._watched_for != events:
                self._selector.modify(current, events)
                self._watched_for = events
        return self._watched

    def _read(self) -> None:
        """Read once and hand on what is whole of it. Others get the lock between packets."""
        with self._lock:
            current: Any = self._mqtt.socket()
            stream: _Stream = current
            self._more = False
            if stream is None or self._hang_up_wanted:
                return
            try:
                if not stream.fill():
                    self._lose(RemoteError("the connection was lost: the hub has closed it"))
                    return
            except OSError as error:
                self._lose(RemoteError(f"the connection was lost: {_told(error)}"))
                return
            self._more = stream.holds_more
        while True:
            with self._lock:
                current = self._mqtt.socket()
                if current is not stream or self._hang_up_wanted:
                    return
                try:
                    packet = stream.next()
                    if packet is None:
                        return
                    self._bounds.packet()
                    is_message, body = packet
                    if is_message:
                        self._published(body)
                    elif self._mqtt.unwritten > _MAX_UNWRITTEN:
                        raise Broken("messages without reading their answers")
                    elif self._check(self._mqtt.loop_read()):
                        return
                except Broken as error:
                    self._lose(RemoteError(f"the connection was lost: the hub sent {error}"), True)
                    return

    def _published(self, body: bytes) -> None:
        end = 2 + int.from_bytes(body[:2], "big")
        if end > len(body):
            raise Broken("a message that ends in its topic")
        try:
            topic = body[2:end].decode()
        except UnicodeDecodeError:
            return
        self._on_message(topic, body[end:])

    def _check(self, code: int) -> bool:
        """True if the connection is lost; paho has closed the socket then."""
        if self._mqtt.socket() is not None:
            return False
        self._unwatch()
        if code == MQTTErrorCode.MQTT_ERR_PROTOCOL:
            raise Broken("what is no MQTT 3.1.1")
        if not self._hang_up_wanted:
            self._lose(RemoteError(f"the connection was lost: {mqtt.error_string(MQTTErrorCode(code))}"))
        return True

    def _lose(self, error: TwinError, tell: bool = False) -> None:
        _log.info("%s: %s", self._client._credentials.client_id, error)
        with self._lock:
            if tell:
                self._client._events.put(twin.Failed(error))
            self._close_socket()
            self._client._perform(self._twin.disconnected(clock(), random.random(), error))

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._selector.unregister(self._watched)
            self._watched = None

    def _hang_up(self) -> None:
        with self._lock:
            if self._mqtt.socket() is not None:
                try:
                    self._mqtt.disconnect()
                    self._mqtt.loop_write()
                except (OSError, ValueError):
                    # The socket is going away in any case.
                    pass
            self._close_socket()

    def _close_socket(self) -> None:
        self._unwatch()
        # loop_write has closed it where the DISCONNECT went out; else this does.
        self._mqtt.drop()

    def _connect(self) -> None:
        self._bounds = Bounds()
        client = self._client
        where = client._where
        try:
            client._before_dial()
        except ConnectRefused as error:
            self._lose(error)
            return
        self._mqtt.username_pw_set(client._user_name, client._password())
        _log.debug("%s: connecting to %s", client._credentials.client_id, where)
        try:
            self._mqtt.reconnect()
        except _Cancelled:
            return
        except OSError as error:
            self._lose(tls_files.refusal(where, error))

    def _dial(self) -> "_Stream":
        """A connected socket, with TLS if wanted, within the time of one request. Any wake-up that wants the
        connection ended ends it."""
        client = self._client
        end = time.monotonic() + client._timeout / 3
        last: OSError | None = None
        found = socket.getaddrinfo(client._host, client._port, type=socket.SOCK_STREAM)
        for index, (family, kind, protocol, _, address) in enumerate(found):
            # No address may use up the time of those after it.
            deadline = time.monotonic() + max(0.0, end - time.monotonic()) / (len(found) - index)
            raw = socket.socket(family, kind, protocol)
            try:
                raw.setblocking(False)
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                code = raw.connect_ex(address)
                if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
                    raise OSError(code, os.strerror(code))
                self._wait_for(raw, selectors.EVENT_WRITE, deadline)
                code = raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
                if client._context is None:
                    return _Stream(raw)
                return _Stream(self._handshake(raw, client._context, deadline))
            except _Cancelled:
                raw.close()
                raise
            except OSError as error:
                raw.close()
                last = error
        raise last or OSError("the name has no address")

    def _handshake(self, raw: socket.socket, context: ssl.SSLContext, deadline: float) -> ssl.SSLSocket:
        secure = context.wrap_socket(raw, server_hostname=self._client._host, do_handshake_on_connect=False)
        try:
            while True:
                try:
                    secure.do_handshake()
                except ssl.SSLWantReadError:
                    self._wait_for(secure, selectors.EVENT_READ, deadline)
                except ssl.SSLWantWriteError:
                    self._wait_for(secure, selectors.EVENT_WRITE, deadline)
                else:
                    return secure
        except BaseException:
            secure.close()
            raise

    def _clear_wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)

    def _wait_for(self, waited: socket.socket, event: int, deadline: float) -> None:
        self._selector.register(waited, event)
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
                ready = self._selector.select(left)
                if self._ending or self._hang_up_wanted:
                    raise _Cancelled
                for key, _ in ready:
                    if key.fileobj is waited:
                        return
                    self._clear_wake_up()
        finally:
            self._selector.unregister(waited)

    # paho's callbacks, in this thread.

    def _on_connect(
        self, _client: Any, _userdata: Any, _flags: Any, reason_code: Any, _properties: Any
    ) -> None:
        with self._lock:
            if self._hang_up_wanted:
                return
            code = _RETURN_CODES.get(reason_code.value, 1)
            now, jitter = clock(), random.random()
            if code == 0:
                self._client._perform(self._twin.connected(now, jitter, self._client._lifetime()))
            else:
                self._client._perform(self._twin.refused(code, now, jitter))

    def _on_subscribe(self, _client: Any, _userdata: Any, _mid: int, codes: Any, _properties: Any) -> None:
        with self._lock:
            if not self._hang_up_wanted:
                granted = tuple(code.value for code in codes)
                self._client._perform(self._twin.subscribed(granted, clock(), random.random()))

    def _on_qos1_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        # At QoS 1: a session of an earlier program may have subscribed so.
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return
        self._on_message(topic, message.payload)

    def _on_message(self, topic: str, payload: bytes) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s <- %s %r", self._client._credentials.client_id, topic, payload[:LOGGED])
        outputs = self._twin.message_received(topic, payload, clock(), random.random())
        self._client._perform(outputs)
        self._bounds.message(len(payload), outputs, self._twin.desired)


def _told(error: OSError) -> str:
    return error.strerror or str(error)
