"""The decode thread: one per engine, for every stream, batch and score of every event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tta_middleware.aio import process as _process
from tta_middleware.engines.decoding.admission import FairQueue
from tta_middleware.engines.decoding.capacity import default_prefix_budget, is_out_of_memory
from tta_middleware.engines.decoding.feeds import Reading
from tta_middleware.engines.decoding.handoff import Chore, one_call_per_loop
from tta_middleware.engines.decoding.loaded import LoadedModel, PackedModel
from tta_middleware.engines.decoding.plain_batch import PlainBatch
from tta_middleware.engines.decoding.plain_model import PlainModel
from tta_middleware.engines.decoding.row import Row
from tta_middleware.engines.decoding.running_batch import Batch
from tta_middleware.engines.decoding.threads import ThreadTuner
from tta_middleware.errors import EngineError

# After a want of memory one more place is tried every so many passes.
_RECOVERY = 32


@dataclass(frozen=True, slots=True)
class DecoderStats:
    """What the decode thread is doing and has done.

    Attributes:
        active: sequences that have a place.
        queued: sequences waiting for a place.
        steps: forward passes so far.
        tokens: tokens generated so far, over all sequences.
        set_aside: sequences that had to give up their place for want of memory and began again.
        reused: columns of prompts so far that were found in what had run before, over all sequences.
        kept_bytes: what is kept of sequences that have ended, and of beginnings that several share.
    """

    active: int = 0
    queued: int = 0
    steps: int = 0
    tokens: int = 0
    set_aside: int = 0
    reused: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Work:
    """What was asked for since the last pass."""

    joining: Sequence[Row]
    scoring: Sequence[Reading]
    chores: Sequence[Chore[Any]]
    forgotten: Sequence[int]


class Decoder:
    """Continuous batching: sequences join and leave at any pass, and prompts run beside the decode steps.

    Places go by :class:`FairQueue`, as far as the memory for keys and values reaches. For want of memory the latest
    sequences give their places up and begin again later, from the tokens they have. An idle thread ends after
    ``grace_seconds``; the next request starts another.
    """

    def __init__(
        self,
        model: LoadedModel,
        max_batch: int,
        *,
        max_waiting: int | None = None,
        memory_budget: int = 2**62,
        prefix_budget: int | None = None,
        grace_seconds: float = 1.0,
    ) -> None:
        self._grace_seconds = grace_seconds
        self._max_batch = max_batch
        self._model, self._max_waiting, self._memory_budget = model, max_waiting, memory_budget
        given = default_prefix_budget(model.device, memory_budget) if prefix_budget is None else prefix_budget
        self._prefix_budget = min(given, memory_budget)
        self._tuner = ThreadTuner.for_model(model)
        self._closed = False
        self._steps = self._tokens = self._set_aside = self._calm = 0
        self._begin_empty()
        _process.at_exit(_process.ANSWERING, self.halt)
        _process.forget_after_fork(self)

    def _begin_empty(self) -> None:
        self._places = self._max_batch
        self._batch = _batch(self._model, self._max_batch, self._memory_budget, self._prefix_budget)
        self._queue: FairQueue[Row] = FairQueue(self._max_waiting)
        self._to_score: list[Reading] = []
        self._chores: list[Chore[Any]] = []
        self._forgotten: list[int] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """The sequences are the parent's and go on there; the weights are here as well, so a new thread can run them.

        That thread multiplies with OpenMP threads of its own. The parent's did not survive, and whichever thread had
        them would wait for them for ever.
        """
        _process.inherit(self._batch, self._queue, self._to_score, self._chores)
        self._begin_empty()

    def submit(self, ticket: int, rows: Sequence[Row]) -> None:
        """Queue sequences of one request, which share their patience; thread-safe, does not wait.

        Raises:
            EngineError: the decoder is closed.
            EngineBusyError: too many sequences wait already.
        """
        with self._changed:
            self._check_open()
            self._wake()
            self._queue.put(ticket, rows, rows[0].request.patience if rows else 0.0)

    def score(self, jobs: Sequence[Reading]) -> None:
        """Queue texts to be scored; they need no place. Thread-safe, does not wait.

        Raises:
            EngineError: the decoder is closed.
        """
        with self._changed:
            self._check_open()
            self._wake()
            self._to_score += jobs

    def run(self, chore: Chore[Any]) -> None:
        """Queue work that is done before the next pass; thread-safe, does not wait.

        Other threads leave matrices alone: each that multiplies keeps a pool of OpenMP threads, and where there are
        more of those than processors all of them sleep at once instead of waiting briefly (docs/decisions/008).

        Raises:
            EngineError: the decoder is closed.
        """
        with self._changed:
            self._check_open()
            self._wake()
            self._chores.append(chore)

    def forget(self, owner: int) -> None:
        """Let go of what is kept of the texts that ran for ``owner``; thread-safe, does not wait, never fails."""
        with self._changed:
            if self._closed or _process.ended():
                return
            self._forgotten.append(owner)
            if self._thread is not None:
                self._changed.notify()
            else:
                # No thread uses the batch, and none starts while the lock is held.
                self._forget()

    def _forget(self) -> None:
        self._batch.forget(self._forgotten)
        self._forgotten = []

    def close(self) -> None:
        """Stop within one step, fail what is unfinished, and wait for the thread; idempotent."""
        self.halt()
        closed = EngineError("the engine was closed while it decoded")
        self._batch.fail(closed)
        for row in self._queue.remove(lambda _: True):
            row.fail(closed)
            row.announce()
        waiting: list[Reading | Chore[Any]] = [*self._to_score, *self._chores]
        for asked in waiting:
            asked.fail(closed)
        self._to_score, self._chores = [], []

    def halt(self) -> None:
        """Stop within one step and wait for the thread; whoever waits for it goes on waiting."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None:
            thread.join()

    def stats(self) -> DecoderStats:
        with self._changed:
            queued = len(self._queue)
        batch = self._batch
        done = (self._steps, self._tokens, self._set_aside, batch.reused)
        return DecoderStats(batch.places_taken, queued, *done, batch.kept_bytes)

    def _check_open(self) -> None:
        if _process.ended():
            _process.refuse()
        if self._closed:
            raise EngineError("the engine is closed; build a new one")

    def _wake(self) -> None:
        """Called with the lock, so that the thread finds what is queued next."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="tta-decode", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:
                raise EngineError(f"the decode thread does not start: {exc}") from exc
            self._thread = thread
        self._changed.notify()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                self._turn(work)
            except BaseException as exc:  # noqa: BLE001  the thread boundary: its callers get the error, not the thread
                self._batch.fail(exc)
        self._tuner.rest()

    def _turn(self, work: _Work) -> None:
        # First of all: whatever fails from here on, the batch tells them.
        self._batch.join(work.joining)
        self._batch.score(work.scoring)
        self._batch.forget(work.forgotten)  # drops references and touches no tensor, so that no chore waits in vain
        self._tuner.begin()
        for chore in work.chores:
            chore.do()
        self._batch.drop_cancelled()
        try:
            if self._batch.short_of_memory():
                self._set_aside_some()
            if not self._batch.idle:
                self._pass()
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            fewer = self._batch.run_fewer_columns()
            if not self._set_aside_some() and not fewer:
                raise EngineError("out of memory with a single sequence; shorten it or use a smaller model") from exc

    def _pass(self) -> None:
        start = time.perf_counter()
        with one_call_per_loop():
            self._tokens += self._batch.turn()
            # Counted before callers are told at the end of this block: whoever has a token finds its step here.
            self._steps += 1
        self._tuner.record_pass(self._batch.columns_run, time.perf_counter() - start)
        self._calm += 1
        if self._calm % _RECOVERY == 0:
            self._places = min(self._max_batch, self._places + 1)
            self._batch.run_more_columns()

    def _set_aside_some(self) -> bool:
        """Let the later half of the sequences begin again when there is room; False if there is only one."""
        leaving = self._batch.shed()
        with self._changed:
            for row in reversed(leaving):
                self._queue.put_back(row.ticket, row)
        self._places, self._calm = max(1, self._batch.places_taken), 0
        self._set_aside += len(leaving)
        return bool(leaving)

    def _next(self) -> _Work | None:
        """What comes in addition from now on, perhaps nothing; None when the thread should end."""
        with self._changed:
            while not (self._asked() or self._closed) and self._batch.idle:
                if not self._changed.wait(self._grace_seconds) and not self._asked():
                    break
            if self._closed or (self._batch.idle and not self._asked()):
                self._thread = None
                return None
            for row in self._queue.remove(lambda row: row.cancelled):
                row.finish("aborted")
                row.announce()
            work = _Work(self._admit(), self._to_score, self._chores, self._forgotten)
            self._to_score, self._chores, self._forgotten = [], [], []
            return work

    def _asked(self) -> bool:
        return bool(self._queue or self._to_score or self._chores or self._forgotten)

    def _admit(self) -> list[Row]:
        room = self._places - self._batch.places_taken
        if room < 1 or not self._queue:
            return []
        return self._queue.take(self._batch.tickets(), room, self._batch.has_memory_for)


def _batch(model: LoadedModel, most: int, budget: int, prefix_budget: int) -> Batch | PlainBatch:
    if isinstance(model, PackedModel):
        return Batch(model, most, budget, prefix_budget)
    if isinstance(model, PlainModel):
        return PlainBatch(model, most, budget, prefix_budget)
    raise TypeError(f"{type(model).__name__} is no model that can be run")
