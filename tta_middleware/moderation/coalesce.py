"""Concurrent calls become one request."""

from __future__ import annotations

import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Sequence
from functools import partial
from typing import Self

import anyio
from pydantic import NonNegativeFloat

from tta_middleware.aio import process as _process
from tta_middleware.errors import ModerationRejectedError
from tta_middleware.moderation.concurrency import gather
from tta_middleware.moderation.request_size import BatchLimits, split
from tta_middleware.moderation.shared import SharedCall
from tta_middleware.moderation.wrapper import Wrapper
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.protocols import Moderator
from tta_middleware.types import Verdict

_FAULTS_OF_THE_REQUEST = frozenset({400, 413, 422})


class CoalescingSettings(BatchLimits):
    """How calls are gathered.

    Attributes:
        window: seconds that the first call waits for others.
    """

    window: NonNegativeFloat = 0.003


class Coalescing(Wrapper):
    """Gathers the texts of calls that arrive within a few milliseconds into one list.

    Calls of one event loop and with the same prompt share a request. A caller that is cancelled takes its texts
    with it. If the server finds fault with a gathered request, each caller's texts are sent on their own, so that
    one unusable text harms its own caller only.

    Args:
        reads_prompt: False lets calls with different prompts share a request, for moderators that ignore it.
    """

    def __init__(
        self, inner: Moderator, settings: CoalescingSettings | None = None, *, reads_prompt: bool = True
    ) -> None:
        super().__init__(inner)
        self._settings = settings or CoalescingSettings()
        self._reads_prompt = reads_prompt
        self._lock = _process.Lock()
        self._open: weakref.WeakKeyDictionary[AbstractEventLoop, dict[str | None, _Batch]] = weakref.WeakKeyDictionary()

    def _around(self, inner: Moderator) -> Self:
        """As every wrapper; texts of different contexts and policies share no request."""
        twin = super()._around(inner)
        if twin is not self:
            twin._open = weakref.WeakKeyDictionary()
        return twin

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """As the inner moderator, after at most ``window`` seconds of waiting for other calls."""
        groups = split(texts, self._settings)
        answers = await gather([partial(self._join, group, prompt) for group in groups]) if groups else []
        return [verdict for answer in answers for verdict in answer]

    async def _join(self, texts: Sequence[str], prompt: str | None) -> list[Verdict]:
        batch = self._batch(texts, prompt if self._reads_prompt else None)
        try:
            return await batch.join(texts)
        except ModerationRejectedError as error:
            if batch.callers == 1 or error.status not in _FAULTS_OF_THE_REQUEST:
                raise
        return await verdicts_on(self._inner, texts, prompt=prompt)

    def _batch(self, texts: Sequence[str], prompt: str | None) -> _Batch:
        """The batch that takes ``texts``; a full one is sent off."""
        with self._lock:
            batches = self._open.setdefault(get_running_loop(), {})
        batch = batches.get(prompt)
        if batch is None or not batch.takes(texts):
            if batch is not None:
                batch.full.set()
            batch = batches[prompt] = _Batch(self._inner, self._settings, prompt, batches)
        return batch


class _Batch:
    """Texts on their way into one request."""

    def __init__(
        self,
        inner: Moderator,
        settings: CoalescingSettings,
        prompt: str | None,
        batches: dict[str | None, _Batch],
    ) -> None:
        self._inner = inner
        self._settings = settings
        self._prompt = prompt
        self._batches = batches
        self._entries: dict[int, Sequence[str]] = {}
        self._next = 0
        self.callers = 0
        self.full = anyio.Event()
        self._call = SharedCall(self._send, self._forget)

    def takes(self, texts: Sequence[str]) -> bool:
        """Whether ``texts`` still fit and the batch has not left."""
        if self.full.is_set() or not self._call.joinable:
            return False
        count, characters = self._size()
        return self._settings.allows(count + len(texts), characters + sum(map(len, texts)))

    async def join(self, texts: Sequence[str]) -> list[Verdict]:
        place = self._next
        self._next += 1
        self._entries[place] = texts
        count, characters = self._size()
        if not self._settings.allows(count + 1, characters + 1):
            self.full.set()
        try:
            return (await self._call.join())[place]
        finally:
            self._entries.pop(place, None)

    async def _send(self) -> dict[int, list[Verdict]]:
        with anyio.move_on_after(self._settings.window):
            await self.full.wait()
        self.full.set()
        self._forget()
        entries = dict(self._entries)
        self.callers = len(entries)
        texts = [text for entry in entries.values() for text in entry]
        verdicts = iter(await verdicts_on(self._inner, texts, prompt=self._prompt))
        return {place: [next(verdicts) for _ in entry] for place, entry in entries.items()}

    def _size(self) -> tuple[int, int]:
        """Texts and characters that wait."""
        waiting = [text for entry in self._entries.values() for text in entry]
        return len(waiting), sum(map(len, waiting))

    def _forget(self) -> None:
        if self._batches.get(self._prompt) is self:
            del self._batches[self._prompt]
