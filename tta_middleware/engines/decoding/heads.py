"""Beginnings of prompts: what of them has run already, and what has to run before the sequences that begin with it.

Where nothing is known of a prompt's beginning it runs alone, once for everybody who waits for it, so its keys and
values do not depend on who asked for it first and with whom. A turn of a conversation finds nearly all of its beginning
in the tree, as the turn before has left it: then what is missing runs with the turn itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from tta_middleware.engines.decoding.feeds import Feed
from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.engines.decoding.prefix_tree import WORTH_SHARING, PrefixTree
from tta_middleware.engines.decoding.scored import Scored
from tta_middleware.types import IntVector

# As a fraction of what may be kept: sequences that run need the memory more than those that may come, but nearly all of
# them begin with the same few rows.
_LEAST_SHARE = 4


class Heads:
    """Finds beginnings in the tree and among texts that were scored lately, and says which one has to run.

    Attributes:
        reused: columns that sequences found here instead of running them.
    """

    def __init__(self, most_bytes: int, scored: Scored) -> None:
        self.reused = 0
        self._tree = PrefixTree(most_bytes, most_bytes // _LEAST_SHARE)
        self._scored = scored
        self._building: Feed | None = None

    @property
    def nbytes(self) -> int:
        return self._tree.nbytes

    @property
    def keeps(self) -> bool:
        """Whether anything may be kept, and taken from what was kept for others."""
        return self._tree.most_bytes > 0

    def begin(self, feed: Feed) -> bool:
        """Give ``feed`` what is here of its beginning; whether it can go on."""
        if feed.begun or not feed.reach:
            return True
        found = self._longest(feed)
        if feed.done:
            # Another text has run some of its rows. The tree may have more of them.
            feed.begun = True
            if found is not None and found.length > feed.done:
                self._give(feed, found)
            return True
        if feed.head - (found.length if found else 0) < WORTH_SHARING:
            self._give(feed, found)
            return True
        if self._building is None:
            self._building = Feed(feed.rows[: feed.head], head=0, keep=0, marks=feed.marks[: feed.head])
            self._give(self._building, found)
        return False

    @property
    def building(self) -> Feed | None:
        """The beginning that has to run next."""
        return self._building

    def built(self, waiting: Iterable[Feed]) -> None:
        """Hand the beginning that has run to all that wait for it, whether or not there is room to keep it."""
        done, self._building = self._building, None
        if done is None or done.past is None:
            return
        self._tree.keep(done.marks, done.past)
        # Whoever asked for it has run it; the others are spared that.
        self.reused -= len(done.rows)
        for feed in waiting:
            if (
                not feed.begun
                and not feed.done
                and feed.head == len(done.rows)
                and (feed.marks[: feed.head] == done.marks).all()
            ):
                self._give(feed, done.past)

    def keep(self, marks: IntVector, prefix: Prefix) -> None:
        """Keep a sequence that has ended, for the next turn."""
        self._tree.keep(marks, prefix)

    def shared_with(self, marks: IntVector) -> int:
        """How many of the first of these rows are kept."""
        return self._tree.shared_with(marks)

    @property
    def least(self) -> int:
        """Bytes that running sequences have to leave, for system prompts and the like."""
        return self._tree.most_bytes // _LEAST_SHARE

    def leave(self, room: int) -> None:
        """Keep to the ``room`` that all else leaves, or to :attr:`least`."""
        self._tree.shrink(max(room, self.least))

    def spare(self) -> None:
        """Forget what is kept, for memory; what is being built goes on."""
        self._tree.clear()

    def clear(self) -> None:
        """Forget everything, after an error."""
        self._tree.clear()
        self._building = None

    def _longest(self, feed: Feed) -> Prefix | None:
        if not self.keeps:
            return None
        found = self._tree.find(feed.marks, feed.reach)
        # A repaired answer was decoded behind moved rows; behind those of the question it ran when it was judged.
        judged = self._scored.beginning(feed.marks, feed.reach)
        if judged is not None and judged.length >= WORTH_SHARING + (found.length if found else 0):
            return judged
        return found

    def _give(self, feed: Feed, found: Prefix | None) -> None:
        feed.past, feed.begun = found, True
        self.reused += found.length if found else 0
