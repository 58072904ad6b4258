"""Beginnings of prompts that were run once and serve every sequence that begins alike.

A beginning always runs alone, so its keys and values do not depend on who asked for it first and with whom.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from tta_middleware.engines.decoding.feeds import Feed
from tta_middleware.engines.decoding.kv_slots import Prefix

_KEPT = 16


class Heads:
    """The latest used beginnings, by content, within a number and ``most_bytes``."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._building: tuple[bytes, Feed] | None = None

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._kept.values())

    def begin(self, feed: Feed) -> bool:
        """Give ``feed`` its beginning if that is here; whether it can go on."""
        if not feed.head or feed.done:
            return True
        key = _key(feed.rows[: feed.head])
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            feed.past = found
            return True
        if self._building is None:
            self._building = (key, Feed(feed.rows[: feed.head], head=0, keep=0))
        return False

    @property
    def building(self) -> Feed | None:
        """The beginning that has to run next."""
        return self._building[1] if self._building else None

    def built(self) -> None:
        """Keep the beginning that has run, and forget the oldest ones that no longer fit."""
        if self._building is None:
            return
        key, feed = self._building
        self._building = None
        if feed.past is None:
            return
        self._kept[key] = feed.past
        while len(self._kept) > 1 and (len(self._kept) > _KEPT or self.nbytes > self._most_bytes):
            self._kept.popitem(last=False)

    def spare(self) -> None:
        """Forget what is kept, for memory; what is being built goes on."""
        self._kept.clear()

    def clear(self) -> None:
        """Forget everything, after an error."""
        self._kept.clear()
        self._building = None


def _key(rows: Tensor) -> bytes:
    # By bytes, in a type that numpy knows; bfloat16 is not one.
    raw = rows.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(raw.tobytes(), digest_size=16, key=str(tuple(rows.shape)).encode()).digest()
