"""A TCP proxy that breaks links on demand: one port a device, all to the same hub.

KINDS lists what it does. It runs in a thread of its own; `act` may be called by any other.
"""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

KINDS = {
    "fin": "the connection ends, orderly",
    "rst": "the connection is reset",
    "cut_up": "a packet to the hub is cut in its middle, by a reset",
    "cut_down": "a packet from the hub is cut in its middle, by a reset",
    "half_open": "nothing gets through any more, nobody is told; reset after some seconds",
    "delay": "everything comes later, for some seconds",
    "trickle": "everything comes a byte at a time, for some seconds",
    "refuse": "nobody listens, for some seconds",
    "hang_connect": "the first packet of TCP is not answered, for some seconds",
    "hang_handshake": "TCP is accepted, nothing answered, for some seconds",
}
_RESET = struct.pack("ii", 1, 0)
_GAP = 0.002  # seconds from byte to byte of a trickle
_DELAY = 0.3


class Proxy:
    """Links by name. hits: how many of each kind have met a connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.hits: Counter[str] = Counter()
        self._links: dict[str, _Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def _run(self, work: "Coroutine[Any, Any, Any]") -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def _call(self, work: Callable[[], Any]) -> Any:
        async def inside() -> Any:
            return work()

        return self._run(inside())

    def listen(self, name: str) -> int:
        """A new link; its port."""
        link = self._links[name] = _Link(self)
        self._call(link.open)
        return link.port

    def act(self, name: str, kind: str, seconds: float, amount: int) -> None:
        """Break a link. amount: how many bytes still pass before it is cut."""
        self._call(lambda: self._links[name].act(kind, seconds, amount))

    def heal(self) -> None:
        """Every link is whole again, and what hung has been reset."""
        self._call(lambda: [link.heal() for link in self._links.values()])

    def close(self) -> None:
        async def end() -> None:
            for link in self._links.values():
                link.close()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Pipe:
    """One connection of a device, and the hub's end of it if there is one."""

    def __init__(self, device: socket.socket) -> None:
        self.sockets = [device]
        self.silent = False
        # Bytes that still pass, to the hub and from it; None: no end.
        self.left: list[int | None] = [None, None]
        self.ended = asyncio.Event()

    def end(self, reset: bool) -> None:
        for one in self.sockets:
            with contextlib.suppress(OSError):
                if reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                else:
                    one.shutdown(socket.SHUT_WR)
        self.ended.set()


class _Link:
    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._loop = proxy._loop
        self.port = 0
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._fillers: list[socket.socket] = []
        self._pipes: dict[_Pipe, asyncio.Task[None]] = {}
        # Until when: delay, trickle, hang_handshake; and those that have met a connection.
        self._until: dict[str, float] = {}
        self._met: set[str] = set()
        self._timers: list[asyncio.TimerHandle] = []

    # ------------------------------------------------------------------ listening

    def open(self) -> None:
        """Listen; again and again if somebody else has the port for a moment."""
        if self._listener is not None:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", self.port))
            # The shortest queue there is, so that it can be filled.
            listener.listen(0)
        except OSError:
            listener.close()
            self._timers.append(self._loop.call_later(0.05, self.open))
            return
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._accept()

    def _accept(self) -> None:
        if self._listener is not None and self._accepting is None:
            self._accepting = self._loop.create_task(self._accept_all(self._listener))

    def _shut(self) -> None:
        self._pause()
        if self._listener is not None:
            # First: closed, its number may be another socket's before the task that waits for it has ended.
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _pause(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None

    async def _accept_all(self, listener: socket.socket) -> None:
        while True:
            # Not sock_accept: cancelled at the wrong moment it forgets a connection that is open.
            try:
                device, _ = listener.accept()
            except BlockingIOError:
                await self._readable(listener)
                continue
            pipe = _Pipe(device)
            task = self._pipes[pipe] = self._loop.create_task(self._serve(pipe))
            task.add_done_callback(lambda _task, pipe=pipe: self._forget(pipe))

    async def _readable(self, listener: socket.socket) -> None:
        ready = self._loop.create_future()
        self._loop.add_reader(listener, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            if listener.fileno() >= 0:
                self._loop.remove_reader(listener)

    def _forget(self, pipe: _Pipe) -> None:
        del self._pipes[pipe]
        for one in pipe.sockets:
            one.close()

    # ------------------------------------------------------------------ one connection

    def _is(self, kind: str) -> bool:
        """True while this goes on; asked by a connection that meets it."""
        if self._until.get(kind, 0) <= time.monotonic():
            return False
        if kind not in self._met:
            self._met.add(kind)
            self._proxy.hits[kind] += 1
        return True

    async def _serve(self, pipe: _Pipe) -> None:
        device = pipe.sockets[0]
        device.setblocking(False)
        device.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pumps: list[asyncio.Task[None]] = []
        try:
            if self._is("hang_handshake"):
                pipe.silent = True
                await pipe.ended.wait()
                return
            hub = socket.socket()
            pipe.sockets.append(hub)
            hub.setblocking(False)
            hub.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.sock_connect(hub, ("127.0.0.1", self._proxy.port))
            pumps = [
                self._loop.create_task(self._pump(pipe, 0, device, hub)),
                self._loop.create_task(self._pump(pipe, 1, hub, device)),
            ]
            await pipe.ended.wait()
        except OSError:
            # The hub is away.
            pipe.end(reset=True)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, pipe: _Pipe, way: int, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := await self._loop.sock_recv(source, 65536):
                if pipe.silent:
                    continue
                left = pipe.left[way]
                if left is not None:
                    data = data[:left]
                    pipe.left[way] = left - len(data)
                await self._pass(data, sink)
                if pipe.left[way] == 0:
                    pipe.end(reset=True)
                    return
        except OSError:
            pipe.end(reset=True)
            return
        # An end that nobody hears of is part of a link that is half open.
        if not pipe.silent:
            pipe.end(reset=False)

    async def _pass(self, data: bytes, sink: socket.socket) -> None:
        if self._is("delay"):
            await asyncio.sleep(_DELAY)
        at = 0
        if self._is("trickle"):
            while at < len(data) and self._is("trickle"):
                await self._loop.sock_sendall(sink, data[at : at + 1])
                at += 1
                await asyncio.sleep(_GAP)
        await self._loop.sock_sendall(sink, data[at:])

    # ------------------------------------------------------------------ breaking it

    def act(self, kind: str, seconds: float, amount: int) -> None:
        now = time.monotonic()
        if kind in ("delay", "trickle", "hang_handshake"):
            self._until[kind] = now + seconds
            self._met.discard(kind)
        if kind == "hang_handshake":
            self._later(seconds, self._reset_silent)
        elif kind == "refuse":
            self._proxy.hits[kind] += 1
            self._shut()
            self._end_all(reset=True)
            self._later(seconds, self.open)
        elif kind == "hang_connect":
            self._proxy.hits[kind] += 1
            self._pause()
            self._fill()
            self._end_all(reset=True)
            self._later(seconds, self._empty)
        elif kind in ("fin", "rst"):
            self._proxy.hits[kind] += len(self._pipes) > 0
            self._end_all(reset=kind == "rst")
        elif kind == "half_open":
            self._proxy.hits[kind] += len(self._pipes) > 0
            for pipe in self._pipes:
                pipe.silent = True
            self._later(seconds, self._reset_silent)
        elif kind in ("cut_up", "cut_down"):
            self._proxy.hits[kind] += len(self._pipes) > 0
            for pipe in self._pipes:
                pipe.left[kind == "cut_down"] = amount

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        self._timers = [one for one in self._timers if one.when() > self._loop.time()]
        self._timers.append(self._loop.call_later(seconds, do))

    def _end_all(self, reset: bool) -> None:
        for pipe in list(self._pipes):
            pipe.end(reset)

    def _reset_silent(self) -> None:
        for pipe in list(self._pipes):
            if pipe.silent:
                pipe.end(reset=True)

    def _fill(self) -> None:
        if self._listener is None:
            return
        for _ in range(2):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(filler)

    def _empty(self) -> None:
        for filler in self._fillers:
            filler.close()
        self._fillers = []
        self._accept()

    def heal(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers = []
        self._until = {}
        for pipe in self._pipes:
            # What was to be cut, and has not been, is whole.
            pipe.left = [None, None]
        self._reset_silent()
        self._empty()
        self.open()

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._shut()
        self._empty()
        self._end_all(reset=True)
