"""What a model's own cache held of sequences that have run; the plain counterpart of :mod:`.prefix_tree`.

A state cannot be cut, so only a sequence that begins with all of a kept one's rows goes on from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tta_middleware.engines.decoding.own_cache import OwnCache
from tta_middleware.engines.decoding.scored import common
from tta_middleware.types import IntVector

_MOST_STATES = 128


@dataclass(eq=False, slots=True)
class _State:
    marks: IntVector
    cache: OwnCache
    ended: bool
    nbytes: int
    used: int


class KeptStates:
    """States within ``most_bytes``; used by the decode thread alone.

    Where they do not fit, the one goes whose bytes, times how long nobody has asked for it, are most.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._states: list[_State] = []
        self._clock = 0

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self._states)

    def find(self, marks: IntVector, most: int) -> OwnCache | None:
        """The state of the longest beginning of these rows, ``most`` of them at the most; to be copied, not run on."""
        self._clock += 1
        found = [state for state in self._states if _begins(state.marks, marks[:most])]
        if not found:
            return None
        best = max(found, key=lambda state: len(state.marks))
        best.used = self._clock
        return best.cache

    def keep(self, marks: IntVector, cache: OwnCache, *, ended: bool) -> None:
        """Keep the state of rows that have run: of a sequence that ``ended``, or of a beginning that several share.

        Where a conversation has gone on, the states at the ends of its turns before are no longer kept.
        """
        self._clock += 1
        new = _State(marks, cache, ended, cache.nbytes + marks.nbytes, self._clock)
        self._states = [state for state in self._states if not _replaces(new, state)]
        # What does not fit by itself would push out all others first.
        if new.nbytes > self.most_bytes:
            return
        self._states.append(new)
        if len(self._states) > _MOST_STATES:
            self._drop_one()
        self.shrink(self.most_bytes)

    def shrink(self, most_bytes: int) -> None:
        """Let go of what is above ``most_bytes``."""
        while self._states and self.nbytes > most_bytes:
            self._drop_one()

    def clear(self) -> None:
        """Let go of everything."""
        self._states.clear()

    def _drop_one(self) -> None:
        self._states.remove(max(self._states, key=lambda state: state.nbytes * (self._clock - state.used + 1)))


def _begins(short: IntVector, long: IntVector) -> bool:
    return len(short) <= len(long) and common(short, long) == len(short)


def _replaces(new: _State, old: _State) -> bool:
    return _begins(old.marks, new.marks) and (old.ended or len(old.marks) == len(new.marks))
