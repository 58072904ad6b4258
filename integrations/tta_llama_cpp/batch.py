"""Sequences that llama.cpp decodes side by side: continuous batching over a fixed number of places.

Everything here runs on the engine's own event loop and on no other thread, so nothing is locked. One task makes the
passes and gives way to the loop between any two of them: what was decoded is read there, and closings and new requests
are heard.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tta_llama_cpp.model import ROWS, Column, LlamaModel
from tta_middleware.engines.decoding.sampling import next_tokens, seeded
from tta_middleware.errors import EngineError
from tta_middleware.types import FinishReason, FloatMatrix, GenerationRequest

# Rows of prompts that one pass takes, so that a long prompt does not hold the others' next words up; and scored tokens
# whose logits are held at once (19 MB for 32 of a vocabulary of 152,000).
_PROMPT_ROWS, _SCORED = 256, 32
_CLOSED = "the engine was closed while it decoded"


@dataclass(eq=False)
class Running:
    """One sequence on its way.

    Attributes:
        place: its number in llama.cpp.
        most: tokens that it may have.
        read: rows of the prompt that have run.
        found: tokens that nobody has taken yet.
        last: the newest token, which is run next.
        count: tokens so far.
        reason: why it is over; None while it goes on.
        news: set where there is something to take.
    """

    request: GenerationRequest
    place: int
    most: int
    read: int = 0
    found: list[int] = field(default_factory=list)
    last: int = 0
    count: int = 0
    reason: FinishReason | None = None
    error: EngineError | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.rows: FloatMatrix = self.request.prompt.matrix
        self.generator = seeded(self.request.sampling)

    @property
    def over(self) -> bool:
        return self.reason is not None or self.error is not None

    def fail(self, error: EngineError) -> None:
        self.error = error
        self.news.set()

    def take(self, token: int | None, endings: frozenset[int]) -> None:
        """The next token; None where the model's numbers are none."""
        if token is None:
            self.fail(EngineError("the model's numbers overflowed; were the embeddings moved too far?"))
            return
        self.found.append(token)
        self.last, self.count = token, self.count + 1
        if token in endings:
            self.reason = "stop"
        elif self.count >= self.most:
            self.reason = "length"
        self.news.set()


@dataclass(eq=False)
class _Waiting:
    request: GenerationRequest
    place: asyncio.Future[int | None]


class Batch:
    """The places of a model, and who has them.

    Args:
        model: has one sequence more than ``places``; the last is for scores.
        endings: ids that end an answer.
    """

    def __init__(self, model: LlamaModel, places: int, endings: frozenset[int]) -> None:
        self._model, self._endings = model, endings
        self._free = list(range(places))
        self._running: list[Running] = []
        self._waiting: deque[_Waiting] = deque()
        self._needed = asyncio.Event()
        self._scoring, self._scores = asyncio.Lock(), places
        self._held: FloatMatrix = np.empty((0, model.width), dtype=np.float32)
        self._closed = False

    @property
    def free(self) -> int:
        """Places that nobody has; other threads may ask."""
        return max(0, len(self._free) - len(self._waiting))

    async def run(self) -> None:
        """Pass after pass while anybody needs one, until it is cancelled."""
        while True:
            while any(not running.over for running in self._running):
                self._pass()
                # Twice: what came during the pass is heard, and what it leads to happens before the next.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            self._needed.clear()
            await self._needed.wait()

    async def steps(self, request: GenerationRequest) -> AsyncGenerator[tuple[list[int], FinishReason | None], None]:
        """New tokens of a request as they are found, and in the end why it is over."""
        place = await self._place(request)
        if place is None:
            yield [], "aborted"
            return
        running = Running(request, place, self._most(request))
        self._running.append(running)
        self._needed.set()
        try:
            while running.reason is None or running.found:
                await running.news.wait()
                running.news.clear()
                if running.error is not None:
                    raise running.error
                found, running.found = running.found, []
                if running.reason is not None:
                    # Before its last word is read: whoever has heard it may count on the place.
                    self._leave(running)
                yield found, running.reason
        finally:
            self._leave(running)

    async def scores(self, rows: FloatMatrix, completions: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-likelihoods of the tokens of each completion behind a prompt, which is run once for all of them."""
        async with self._scoring:
            first = await self._run_alone(rows)
            return [await self._score(len(rows), first, list(ids)) for ids in completions]

    async def following(self, prompts: Sequence[FloatMatrix], token_ids: Sequence[int]) -> list[list[float]]:
        """Per prompt, the log-likelihood of each of ``token_ids`` as the next token."""
        found: list[list[float]] = []
        for rows in prompts:
            async with self._scoring:
                found.append((await self._run_alone(rows))[list(token_ids)].tolist())
        return found

    def close(self) -> None:
        """Whoever still runs or waits gets an error; nothing reaches the model any more."""
        self._closed = True
        for running in self._running:
            running.fail(EngineError(_CLOSED))
        for waiting in self._waiting:
            if not waiting.place.done():
                waiting.place.set_exception(EngineError(_CLOSED))
        self._waiting.clear()

    def _most(self, request: GenerationRequest) -> int:
        # The engine has refused prompts that leave no room.
        return min(request.sampling.max_new_tokens, self._model.context - len(request.prompt.matrix))

    async def _place(self, request: GenerationRequest) -> int | None:
        """A free place, at once or when it is this request's turn; None if it was aborted before."""
        if request.abort.is_set():
            return None
        if self._closed:
            raise EngineError(_CLOSED)
        if self._free and not self._waiting:
            return self._free.pop()
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            return await waiting.place
        except asyncio.CancelledError:
            self._turn_away(waiting)
            raise

    def _turn_away(self, waiting: _Waiting) -> None:
        """It is cancelled: it stands in the queue no more, and a place that it just got goes on."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
        elif waiting.place.done() and not waiting.place.cancelled() and not waiting.place.exception():
            self._give(waiting.place.result())

    def _leave(self, running: Running) -> None:
        if running not in self._running:
            return
        self._running.remove(running)
        if not self._closed:
            self._model.forget(running.place)
            self._give(running.place)

    def _give(self, place: int | None) -> None:
        if place is None:
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.place.done():
                waiting.place.set_result(place)
                return
        self._free.append(place)

    def _drop_aborted(self) -> None:
        for waiting in [waiting for waiting in self._waiting if waiting.request.abort.is_set()]:
            self._waiting.remove(waiting)
            if not waiting.place.done():
                waiting.place.set_result(None)
        for running in self._running:
            if running.request.abort.is_set() and not running.over:
                running.reason = "aborted"
                running.news.set()

    def _pass(self) -> None:
        """Some rows of prompts, then a token of everybody whose prompt has run; an error of the pass is everybody's."""
        self._drop_aborted()
        try:
            decoding = [running for running in self._running if running.count and not running.over]
            self._run_prompts()
            for start in range(0, len(decoding), ROWS):
                self._run_tokens(decoding[start : start + ROWS])
        except Exception as error:  # noqa: BLE001  the boundary of the decoding task: readers get the error
            failed = error if isinstance(error, EngineError) else EngineError(f"decoding failed: {error!r}")
            for running in self._running:
                running.fail(failed)

    def _run_prompts(self) -> None:
        parts: list[Tensor] = []
        columns: list[Column] = []
        whole: list[Running] = []
        for running in self._running:
            end = min(len(running.rows), running.read + _PROMPT_ROWS - len(columns))
            if end == running.read or running.over:
                continue
            parts.append(torch.from_numpy(running.rows[running.read : end]))
            last = len(running.rows) - 1
            columns += [Column(running.place, at, at == last) for at in range(running.read, end)]
            running.read = end
            whole += [running] if end == len(running.rows) else []
        if columns:
            self._take(whole, self._model.decode_rows(torch.cat(parts).numpy(), columns))

    def _run_tokens(self, decoding: Sequence[Running]) -> None:
        columns = [Column(each.place, len(each.rows) + each.count - 1, True) for each in decoding]
        self._take(decoding, self._model.decode_tokens([each.last for each in decoding], columns))

    def _take(self, asked: Sequence[Running], logits: FloatMatrix) -> None:
        if asked:
            samplings = [running.request.sampling for running in asked]
            chosen = next_tokens(torch.from_numpy(logits), samplings, [running.generator for running in asked])
            for running, token in zip(asked, chosen, strict=True):
                running.take(token, self._endings)

    async def _run_alone(self, rows: FloatMatrix) -> Tensor:
        """(V,) log-likelihoods of what follows the rows, which are run in the place for scores.

        Rows that they begin with and that ran there last do not run again: what prompts share, and a growing text.
        """
        self._refuse_if_closed()
        if len(rows) > self._model.context:
            raise EngineError(f"a prompt has {len(rows)} rows, and only {self._model.context} fit")
        likely, start = torch.empty(0), self._kept(rows)
        self._model.forget(self._scores, start=start)
        self._held = rows[:start].copy()
        while start < len(rows):
            part = rows[start : start + _PROMPT_ROWS]
            columns = [Column(self._scores, start + at, start + at == len(rows) - 1) for at in range(len(part))]
            likely = torch.from_numpy(self._model.decode_rows(part, columns)).log_softmax(-1)
            start += len(part)
            self._held = rows[:start].copy()
            await asyncio.sleep(0)
            self._refuse_if_closed()
        return likely[0]

    def _kept(self, rows: FloatMatrix) -> int:
        """How many of the rows the place for scores holds; the last is always run, for what follows it."""
        most = min(len(self._held), len(rows) - 1)
        differ = np.flatnonzero((self._held[:most] != rows[:most]).any(axis=1))
        return int(differ[0]) if len(differ) else most

    async def _score(self, start: int, first: Tensor, ids: list[int]) -> list[float]:
        """``first`` is what the prompt of ``start`` rows leads to; what was run of a completion is forgotten again."""
        if start + len(ids) > self._model.context:
            raise EngineError(f"prompt and answer have {start + len(ids)} tokens, and only {self._model.context} fit")
        found = [float(first[ids[0]])] if ids else []
        for at in range(0, len(ids) - 1, _SCORED):
            part, following = ids[at : at + _SCORED][: len(ids) - 1 - at], ids[at + 1 : at + 1 + _SCORED]
            columns = [Column(self._scores, start + at + step, True) for step in range(len(part))]
            likely = torch.from_numpy(self._model.decode_tokens(part, columns)).log_softmax(-1)
            found += likely.gather(1, torch.tensor(following)[:, None])[:, 0].tolist()
            await asyncio.sleep(0)
            self._refuse_if_closed()
        self._model.forget(self._scores, start=start)
        return found

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineError(_CLOSED)
