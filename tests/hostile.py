"""A hub that means harm: it lets a device synchronise, and then sends whatever a test has it send."""

import contextlib
import json
import resource
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.hub_wire import frame, text

KEY = "a2V5"
DESIRED = "$iothub/twin/PATCH/properties/desired/?$version="
DOCUMENT = {"desired": {"interval": 30, "$version": 1}, "reported": {"$version": 1}}


def publish(topic: str | bytes, payload: bytes, quality: int = 0) -> bytes:
    identifier = b"\0\1" if quality else b""
    return frame(0x30 | quality << 1, text(topic) + identifier + payload)


def notification(version: int, payload: bytes) -> bytes:
    return publish(f"{DESIRED}{version}", payload)


def answer(request_id: str, payload: bytes, status: int = 200) -> bytes:
    return publish(f"$iothub/twin/res/{status}/?$rid={request_id}", payload)


class HostileHub:
    """Serves any number of connections at the port, each in a thread of its own.

    attack: the bytes to send once a client has its document; called anew for each connection. before: those
    to send at once in place of everything. reads: False if nothing is read any more during the attack.
    document: what a retrieve is answered with.
    """

    def __init__(
        self,
        attack: Callable[[], Iterable[bytes]] = lambda: (),
        *,
        before: Callable[[], Iterable[bytes]] | None = None,
        reads: bool = True,
        document: bytes = json.dumps(DOCUMENT).encode(),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.attack = attack
        self.before = before
        self.reads = reads
        self.document = document
        self._tls = tls
        self.connections = 0
        self.sent = 0
        self.reports: list[Any] = []
        self._ended = threading.Event()
        # The connections that there are now are to be ended, by the hub.
        self.over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        if not reads:
            # The system's own memory for what is not read would take long to fill.
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._ended.set()
        # A listener that is shut down wakes whoever accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def __enter__(self) -> "HostileHub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._ended.is_set():
                connected, _ = self._listener.accept()
                self.connections += 1
                thread = threading.Thread(target=self._serve, args=(connected,))
                self._threads = [one for one in self._threads if one.is_alive()]
                self._threads.append(thread)
                thread.start()

    def _serve(self, connected: socket.socket) -> None:
        # Whatever the client does to the connection is right.
        with connected, contextlib.suppress(OSError):
            connected.settimeout(10)
            if self._tls is not None:
                connected = self._tls.wrap_socket(connected, server_side=True)
            with connected:
                connected.setblocking(False)
                self._talk(connected)

    def _talk(self, connected: socket.socket) -> None:
        received = bytearray()
        attack: Iterator[bytes] | None = None if self.before is None else iter(self.before())
        out = b""
        while not self._ended.is_set() and not self.over.is_set():
            if not out and attack is not None:
                out = next(attack, b"")
                if not out:
                    attack = None
            wanted = [connected] if self.reads or attack is None else []
            readable, writable, _ = select.select(wanted, [connected] if out else [], [], 0.1)
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if readable or (wanted and getattr(connected, "pending", int)()):
                    data = connected.recv(1 << 16)
                    if not data:
                        return
                    received += data
                    for reply in self._replies(received):
                        out += reply
                        if reply[0] == 0x30 and attack is None and b"$rid" in reply[:60]:
                            attack = iter(self.attack())
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if writable:
                    count = connected.send(out[: 1 << 18])
                    self.sent += count
                    out = out[count:]

    def _replies(self, received: bytearray) -> Iterator[bytes]:
        while len(received) >= 2:
            length = shift = 0
            at = 1
            while at < len(received):
                length |= (received[at] & 127) << shift
                shift += 7
                at += 1
                if received[at - 1] < 128:
                    break
            else:
                return
            if len(received) < at + length:
                return
            kind, body = received[0] & 0xF0, bytes(received[at : at + length])
            del received[: at + length]
            if kind == 0x10:
                yield b"\x20\2\0\0"
            elif kind == 0x80:
                yield frame(0x90, body[:2] + bytes(body.count(b"#")))
            elif kind == 0xC0:
                yield b"\xd0\0"
            elif kind == 0x30:
                topic, _, rest = body[2:].partition(b"$rid=")
                request_id = rest.split(b"&")[0][: len(rest)]
                payload = body[2 + int.from_bytes(body[:2], "big") :]
                request_id = request_id[: len(request_id) - len(payload)] if payload else request_id
                if b"/GET/" in topic:
                    yield answer(request_id.decode(), self.document)
                else:
                    self.reports.append(json.loads(payload))
                    version = f"{request_id.decode()}&$version={len(self.reports) + 1}"
                    yield publish(f"$iothub/twin/res/204/?$rid={version}", b"")


def resident() -> int:
    """Bytes of memory that the process holds now."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
