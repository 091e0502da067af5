"""Who is next: first come, first served, and clients take turns."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several clients; each client's own keep their order."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[T]] = {}
        self._turns: deque[str] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, client: str, item: T) -> None:
        """Queue up."""
        if client not in self._clients:
            self._clients[client] = deque()
            self._turns.append(client)
        self._clients[client].append(item)
        self._count += 1

    def peek(self) -> T:
        """The next item; there must be one."""
        return self._clients[self._turns[0]][0]

    def pop(self) -> T:
        """Take the next item; its client goes to the end of the line."""
        client = self._turns.popleft()
        waiting = self._clients[client]
        item = waiting.popleft()
        if waiting:
            self._turns.append(client)
        else:
            del self._clients[client]
        self._count -= 1
        return item

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out all items for which this holds."""
        removed = []
        for client in list(self._clients):
            waiting = self._clients[client]
            gone = [item for item in waiting if unwanted(item)]
            if not gone:
                continue
            removed += gone
            rest = deque(item for item in waiting if item not in gone)
            if rest:
                self._clients[client] = rest
            else:
                del self._clients[client]
                self._turns.remove(client)
        self._count -= len(removed)
        return removed
