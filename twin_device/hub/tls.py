"""TLS for many connections: asyncio's own keeps a buffer of 256 KB for each, and no option makes it smaller.

Here TLS runs in memory (ssl.SSLObject), between a transport of asyncio's and the protocol inside.
"""

import asyncio
import contextlib
import ssl
from typing import Any, Protocol


class Context(Protocol):
    """An ssl.SSLContext, or what does its work here."""

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *, server_side: bool) -> Any: ...


class Secured(asyncio.BufferedProtocol, asyncio.Transport):
    """One connection that a client makes: the transport of the protocol inside, once hands were shaken.

    inbox: where the loop reads into; it is done with when buffer_updated returns, so that all connections may
    have the same. done: then a future's result, or ssl.SSLError or ConnectionError if that fails.
    """

    def __init__(self, context: Context, inside: asyncio.BufferedProtocol, inbox: memoryview) -> None:
        super().__init__()
        self._inside: Any = inside  # data_received() is its own
        self._inbox = inbox
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._outside: asyncio.Transport | None = None
        self._is_open = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # ------------------------------------------------------------------ a protocol to the outside

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._outside = transport  # type: ignore[assignment]  # a stream's transport

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._inbox

    def buffer_updated(self, count: int) -> None:
        self._incoming.write(self._inbox[:count])
        try:
            if not self._is_open:
                self._tls.do_handshake()
                self._is_open = True
                self._flush()
                if not self.done.done():
                    self.done.set_result(None)
                self._inside.connection_made(self)
            while not self.is_closing():
                # Until it is empty: what TLS still holds the loop does not know.
                size: Any = self._tls.read(len(self._inbox), self._inbox)
                if size:
                    self._inside.data_received(self._inbox[:size])
                else:
                    self.close()  # the client has said goodbye
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._flush()  # the alert that says why
            self._fail(error)
            self._close()

    def connection_lost(self, error: Exception | None) -> None:
        self._outside = None
        self._fail(error or ConnectionResetError("the client has gone"))
        if self._is_open:
            self._is_open = False
            self._inside.connection_lost(error)

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # seen, also when nobody waits for it any more

    def _flush(self) -> None:
        if self._outside is not None and self._outgoing.pending:
            self._outside.write(self._outgoing.read())

    # ------------------------------------------------------------------ a transport to the inside

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if name == "ssl_object":
            return self._tls
        if name == "client_certificate":
            # What ssl verifies it was not asked for here.
            show = getattr(self._tls, "client_certificate", None)
            return default if show is None else show()
        return default if self._outside is None else self._outside.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._outside is None or self._outside.is_closing()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_closing():
            return
        left = memoryview(data)
        while left:
            left = left[self._tls.write(left) :]
        self._flush()

    def get_write_buffer_size(self) -> int:
        return 0 if self._outside is None else self._outside.get_write_buffer_size()

    def close(self) -> None:
        """Say goodbye, and do not wait for the client's."""
        if not self.is_closing():
            with contextlib.suppress(ssl.SSLError):  # it wants to read that goodbye
                self._tls.unwrap()
            self._flush()
            self._close()

    def _close(self) -> None:
        if self._outside is not None:
            self._outside.close()

    def abort(self) -> None:
        if self._outside is not None:
            self._outside.abort()
