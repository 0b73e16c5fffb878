"""What a back end's connection may cost: an aiohttp connection, watched.

aiohttp waits for ever for the first request of a connection, and for a reader that does not read. Here both
end, and there are only so many connections: a new one takes the place of the oldest that asks nothing.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_log = logging.getLogger("twin_device.hub")

MAX_CONNECTIONS = 1000
# Seconds: for a request, from its connection's beginning; and for a reader to take what was sent.
REQUEST_WITHIN = 60.0
WRITE_WITHIN = 60.0


def abort(transport: asyncio.Transport) -> None:
    """End a connection now."""
    # A TLS transport that was closed twice has let go of its connection in Python 3.11.2, and fails here.
    with suppress(AttributeError):
        transport.abort()


class Guards:
    """All of a hub's HTTP connections."""

    def __init__(self) -> None:
        # In the order in which they came.
        self._guards: dict[Any, Guard] = {}

    def admit(self, guard: "Guard", transport: asyncio.Transport) -> None:
        self._guards[transport] = guard
        if len(self._guards) > MAX_CONNECTIONS:
            idle = next((one for one in self._guards.values() if not one.requests), guard)
            idle.end("there are too many connections")

    def leave(self, transport: asyncio.Transport) -> None:
        self._guards.pop(transport, None)

    @contextmanager
    def serving(self, transport: Any) -> Iterator[None]:
        """A request of this connection is being answered."""
        guard = self._guards.get(transport)
        if guard is None:
            # It has just ended; nobody will see the answer.
            yield
            return
        guard.requests += 1
        guard.expect_no_more()
        try:
            yield
        finally:
            guard.requests -= 1


class Guard(asyncio.Protocol):
    """One connection. inner: aiohttp's protocol. requests: how many are being answered."""

    def __init__(self, guards: Guards, inner: Any) -> None:
        self._guards = guards
        self._inner = inner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._request_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self.requests = 0
        # Handed on as they are, since every chunk comes this way.
        self.data_received = inner.data_received  # type: ignore[method-assign]  # as said
        self.eof_received = inner.eof_received  # type: ignore[method-assign]  # as said

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's transport
        self._inner.connection_made(transport)
        self._request_timer = self._loop.call_later(REQUEST_WITHIN, self.end, "it asked nothing in time")
        self._guards.admit(self, transport)  # type: ignore[arg-type]  # as above

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._request_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        if self._transport is not None:
            self._guards.leave(self._transport)
            # Python 3.10 takes a TLS transport that the peer has closed for one that leaks.
            abort(self._transport)
            self._transport = None
        self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        self._write_timer = self._loop.call_later(WRITE_WITHIN, self.end, "it does not read")
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        self._inner.resume_writing()

    def expect_no_more(self) -> None:
        """It has asked: between requests aiohttp's own keep-alive counts."""
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def end(self, why: str) -> None:
        """End it now."""
        if self._transport is not None:
            _log.info("a back end's connection ended: %s", why)
            # The loop tells connection_lost only later.
            self._guards.leave(self._transport)
            abort(self._transport)
