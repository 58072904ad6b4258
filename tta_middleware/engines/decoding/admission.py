"""Who gets the next free place in the batch. Pure: no model, no clock, no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from tta_middleware.errors import EngineBusyError

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Waiting sequences, by the ticket of the request that they belong to.

    A free place goes to the request with the fewest sequences at work, of these to the one that has waited longest. So
    a request of a thousand sequences leaves places to single ones, and a repair's candidate lets the answers begin that
    waited before it came. Its ``patience`` moves it from there: up to the front, where nothing of its answer has left,
    or behind as many of those that come later, where some has. So it waits for a number of sequences that is known when
    it comes, and for candidates that are put in front.

    Args:
        most: sequences that may wait; None for no bound.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        # Each with its turn: lower ones go earlier, of equals those that came earlier; below 0 it had a place already.
        self._waiting: dict[int, deque[tuple[tuple[float, int], Item]]] = {}
        self._count = 0
        self._next_turn, self._front_turn = 0, -1

    def __len__(self) -> int:
        return self._count

    def put(self, ticket: int, items: Sequence[Item], patience: float = 0.0) -> None:
        """Queue sequences of one request.

        Args:
            patience: how many of those that come later go first, as a share of those that wait now; below 0 how many of
                the latter are gone before.

        Raises:
            EngineBusyError: too many sequences wait already; none of these is queued.
        """
        if self._most is not None and self._count + len(items) > self._most and self._count:
            raise EngineBusyError(
                f"{self._count} sequences wait for a place already and the limit is {self._most}; "
                "try again later, send fewer at once, or raise max_waiting"
            )
        moved = patience * self._count
        turns = [(max(0.0, came + moved), came) for came in range(self._next_turn, self._next_turn + len(items))]
        self._waiting.setdefault(ticket, deque()).extend(zip(turns, items, strict=True))
        self._next_turn += len(items)
        self._count += len(items)

    def put_back(self, ticket: int, item: Item) -> None:
        """Queue a sequence that had a place already, in front of all that have none."""
        self._waiting.setdefault(ticket, deque()).appendleft(((self._front_turn, 0), item))
        self._front_turn -= 1
        self._count += 1

    def take(
        self, active: Mapping[int, int], room: int, fits: Callable[[Sequence[Item]], bool] = lambda _: True
    ) -> list[Item]:
        """The sequences that get the ``room`` free places; ``active`` counts those at work by ticket.

        ``fits`` is asked of everything that the round has taken and the next one besides. The first that does not fit
        ends the round, so that a large one is not passed over for ever.
        """
        at_work = dict(active)
        taken: list[Item] = []
        while self._waiting and len(taken) < room:
            ticket = min(self._waiting, key=lambda ticket: (at_work.get(ticket, 0), self._waiting[ticket][0][0]))
            if not fits([*taken, self._waiting[ticket][0][1]]):
                break
            taken.append(self._waiting[ticket].popleft()[1])
            at_work[ticket] = at_work.get(ticket, 0) + 1
            self._count -= 1
            if not self._waiting[ticket]:
                del self._waiting[ticket]
        return taken

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Take out the sequences that are ``unwanted``."""
        removed = []
        for ticket, items in list(self._waiting.items()):
            kept = deque[tuple[tuple[float, int], Item]]()
            for turn, item in items:
                if unwanted(item):
                    removed.append(item)
                else:
                    kept.append((turn, item))
            self._waiting[ticket] = kept
            if not kept:
                del self._waiting[ticket]
        self._count -= len(removed)
        return removed
