"""The asyncio client behind the face of the thread client, so that one test can run on both."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tests.waiting import PATIENCE
from twin_device.aio import Report, TwinClient

_Result = TypeVar("_Result")


class LoopThread:
    """A loop that runs in a thread of its own until it is closed."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(6 * PATIENCE)

    def close(self) -> set[Any]:
        """Stop the loop; gives the tasks that were left in it."""
        left = asyncio.all_tasks(self._loop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        return left


class BlockingReport:
    def __init__(self, loop: LoopThread, report: Report) -> None:
        self._loop, self._report = loop, report

    def wait(self, timeout: float | None = None) -> int | None:
        return self._loop.call(self._report.wait(timeout))


class BlockingClient:
    """What the thread client offers, done by an asyncio client in the loop's thread."""

    def __init__(self, loop: LoopThread, client: TwinClient) -> None:
        self._loop, self.inner = loop, client

    def __getattr__(self, name: str) -> Any:
        # Handlers, and what the app knows: the same for both.
        return getattr(self.inner, name)

    def _run(self, call: Callable[[], Any]) -> Any:
        async def inside() -> Any:
            # A call that fails before it gives something to await must fail in the loop, too.
            result = call()
            # With a store, what is reported without waiting is in the file once it was awaited.
            return await result if inspect.isawaitable(result) else result

        return self._loop.call(inside())

    def setting(self, name: str, **options: Any) -> Callable[[Any], Any]:
        return lambda apply: self._run(lambda: self.inner.setting(name, **options)(apply))

    def connect(self, **options: Any) -> None:
        self._run(lambda: self.inner.connect(**options))

    def disconnect(self) -> None:
        self._run(self.inner.disconnect)

    def close(self) -> None:
        self._run(self.inner.close)

    def __enter__(self) -> "BlockingClient":
        self._run(self.inner.__aenter__)
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def report(self, patch: dict[str, Any], **options: Any) -> Any:
        result = self._run(lambda: self.inner.report(patch, **options))
        return BlockingReport(self._loop, result) if isinstance(result, Report) else result

    def retrieve(self, timeout: float | None = None) -> dict[str, Any]:
        return self._run(lambda: self.inner.retrieve(timeout))
