"""What the hub remembers of every identity, its last packets and messages, in bounds for the whole hub."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class _Shelf(Generic[_T]):
    """One identity's items. gone: how many of them have left before it was their turn."""

    def __init__(self) -> None:
        self.items: deque[_T] = deque()
        self.gone = 0


class Log(Generic[_T]):
    """The last items of every identity, oldest first.

    each: how many of one identity. most, most_bytes: how many, and of what size, of all together; beyond that
    the oldest of all go first.
    """

    def __init__(self, each: int, most: int, most_bytes: int, size: Callable[[_T], int]) -> None:
        self._each, self._most, self._most_bytes = each, most, most_bytes
        self._size = size
        self._shelves: dict[str, _Shelf[_T]] = {}
        # Whose turn it is to lose its oldest item: a shelf for every item, in the order in which they came.
        # Items that have left before stay in it as gaps, and count as none.
        self._turns: deque[_Shelf[_T]] = deque()
        self._gaps = 0
        self._bytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._shelves

    def __getitem__(self, name: str) -> tuple[_T, ...]:
        """KeyError: there is no such identity."""
        return tuple(self._shelves[name].items)

    def __len__(self) -> int:
        """How many items there are of all identities."""
        return len(self._turns) - self._gaps

    def add(self, name: str) -> None:
        """An identity that has no items yet."""
        self._shelves[name] = _Shelf()

    def remove(self, name: str) -> None:
        """The identity is gone, its items with it."""
        self.clear(name)
        del self._shelves[name]

    def clear(self, name: str) -> None:
        shelf = self._shelves[name]
        for _ in range(len(shelf.items)):
            self._drop(shelf)

    def append(self, name: str, item: _T) -> None:
        shelf = self._shelves[name]
        shelf.items.append(item)
        self._turns.append(shelf)
        self._bytes += self._size(item)
        if len(shelf.items) > self._each:
            self._drop(shelf)
        while len(self) > self._most or self._bytes > self._most_bytes:
            oldest = self._turns.popleft()
            if oldest.gone:
                oldest.gone -= 1
                self._gaps -= 1
            else:
                self._bytes -= self._size(oldest.items.popleft())
        if self._gaps > self._most:
            self._close_gaps()

    def extend(self, name: str, items: Iterable[_T]) -> None:
        for item in items:
            self.append(name, item)

    def _drop(self, shelf: _Shelf[_T]) -> None:
        self._bytes -= self._size(shelf.items.popleft())
        shelf.gone += 1
        self._gaps += 1

    def _close_gaps(self) -> None:
        turns, self._turns, self._gaps = self._turns, deque(), 0
        for shelf in turns:
            if shelf.gone:
                shelf.gone -= 1
            else:
                self._turns.append(shelf)
