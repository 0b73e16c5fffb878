"""What a client's handlers are to be called for, in order, in memory that has a bound (rule 5).

A handler may be slower than the hub, or hang. Up to a bound each change of the desired properties waits by
itself. Beyond it the newest that waits takes in those that follow: the handler is given one patch, from what
it was last given to the newest properties, as after a reconnect (rule 1.4).
"""

import marshal
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from .core import twin
from .core.patch import diff

if TYPE_CHECKING:
    from queue import SimpleQueue

Document = dict[str, Any]

_MAX_CHANGES = 64
_MAX_BYTES = 1 << 20  # of the changes that wait, as marshal writes them
# States and errors, each: more than reports can be refused at once.
_MAX_OTHERS = 2048


class Pending:
    """The outputs of the core that are for handlers, until these are called. For any thread.

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
