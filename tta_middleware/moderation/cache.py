"""Verdicts that are already known: LRU with a time to live, and single-flight for those on their way."""

from __future__ import annotations

import hashlib
import secrets
import time
import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from pydantic import PositiveFloat, PositiveInt

from tta_middleware.aio import process as _process
from tta_middleware.config import Settings
from tta_middleware.moderation.shared import SharedCall, join_all
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.policy import StagePolicies
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import ModerationContext, Verdict

_DIGEST_BYTES = 16


class CacheSettings(Settings):
    """Bounds of a cache.

    Attributes:
        entries: verdicts kept; the one that was not used for longest goes first.
        ttl: seconds that a verdict stays valid.
    """

    entries: PositiveInt = 10_000
    ttl: PositiveFloat = 3600.0


class VerdictCache:
    """Verdicts by a keyed hash of moderator and text; shared by all event loops and threads.

    Keys are BLAKE2b digests under a key of this process, so neither a dump of the cache nor a guess at a text
    tells what was asked. Verdicts hold scores, which no policy changes, so one cache serves all policies; those of a
    moderator whose ways depend on the policy are kept by policy.
    """

    def __init__(self, settings: CacheSettings | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings or CacheSettings()
        self._clock = clock
        self._lock = _process.Lock()
        self._entries: OrderedDict[bytes, tuple[float, Verdict]] = OrderedDict()
        self._secret = secrets.token_bytes(32)

    def key(self, moderator: str, text: str, prompt: str | None) -> bytes:
        """The digest under which a verdict is kept; lengths keep the three parts apart."""
        parts = [part.encode("utf-8", "surrogatepass") for part in (moderator, prompt or "", text)]
        head = f"{len(parts[0])},{len(parts[1])},{prompt is None};".encode()
        return hashlib.blake2b(head + b"".join(parts), key=self._secret, digest_size=_DIGEST_BYTES).digest()

    def get(self, key: bytes) -> Verdict | None:
        """The verdict under ``key`` if it is still valid."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] <= self._clock():
                self._entries.pop(key, None)
                return None
            self._entries.move_to_end(key)
            return entry[1]

    def put(self, key: bytes, verdict: Verdict) -> None:
        """Keep ``verdict``; the oldest entry makes room."""
        with self._lock:
            self._entries[key] = (self._clock() + self._settings.ttl, verdict)
            self._entries.move_to_end(key)
            while len(self._entries) > self._settings.entries:
                self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)


class Cached(Wrapper):
    """A moderator that is asked once for each text.

    Tasks of one event loop that ask for the same text at the same time share one call. Errors are not kept.

    Args:
        reads_prompt: False lets answers to different prompts share a verdict, for moderators that ignore it.
    """

    def __init__(self, inner: Moderator, cache: VerdictCache | None = None, *, reads_prompt: bool = True) -> None:
        super().__init__(inner)
        self.cache = VerdictCache() if cache is None else cache
        self._reads_prompt = reads_prompt
        self._lock = _process.Lock()
        self._flights: weakref.WeakKeyDictionary[AbstractEventLoop, _Flights] = weakref.WeakKeyDictionary()
        self._asked_as = self.name

    def in_context(self, context: ModerationContext) -> Self:
        """As every wrapper; verdicts by other rules, or of texts that are something else, are others."""
        twin = super().in_context(context)
        if twin is not self:
            twin._asked_as = f"{self._asked_as}\0{context.key}"
        return twin

    def under(self, policies: StagePolicies) -> Self:
        """As every wrapper; verdicts under other policies are others."""
        twin = super().under(policies)
        if twin is not self:
            twin._asked_as = f"{self._asked_as}\0{hashlib.sha256(repr(policies).encode()).hexdigest()}"
        return twin

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """As the inner moderator, which sees only texts without a valid verdict, each once."""
        read = prompt if self._reads_prompt else None
        keys = [self.cache.key(self._asked_as, text, read) for text in texts]
        known = {key: self.cache.get(key) for key in keys}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if known[key] is None}
        if missing:
            known |= await self._fetch(missing, prompt)
        return [verdict for key in keys if (verdict := known[key]) is not None]

    async def _fetch(self, missing: dict[bytes, str], prompt: str | None) -> dict[bytes, Verdict]:
        """Join the calls that are on their way for some texts, and make one for the others."""
        with self._lock:
            flights = self._flights.setdefault(get_running_loop(), {})
        calls = {key: flights[key] for key in missing if key in flights and flights[key].joinable}
        new = {key: text for key, text in missing.items() if key not in calls}
        if new:
            own = SharedCall(lambda: self._ask(new, prompt), lambda: _land(flights, new, own))
            flights |= dict.fromkeys(new, own)
            calls |= dict.fromkeys(new, own)
        found: dict[bytes, Verdict] = {}
        for verdicts in await join_all(dict.fromkeys(calls.values())):
            found |= verdicts
        return found

    async def _ask(self, new: dict[bytes, str], prompt: str | None) -> dict[bytes, Verdict]:
        found = dict(zip(new, await verdicts_on(self._inner, list(new.values()), prompt=prompt), strict=True))
        for key, verdict in found.items():
            self.cache.put(key, verdict)
        return found


_Flights = dict[bytes, SharedCall[dict[bytes, Verdict]]]


def _land(flights: _Flights, keys: Iterable[bytes], call: SharedCall[dict[bytes, Verdict]]) -> None:
    for key in keys:
        if flights.get(key) is call:
            del flights[key]
