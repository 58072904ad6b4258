"""The decode thread: one per engine, for every stream and batch of every event loop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tta_middleware.engines.batch import Batch
from tta_middleware.engines.loaded import LoadedModel
from tta_middleware.engines.row import Row
from tta_middleware.errors import EngineError


@dataclass(frozen=True, slots=True)
class DecoderStats:
    """What the decode thread is doing and has done.

    Attributes:
        active: sequences being decoded.
        queued: sequences waiting for a place.
        steps: forward passes so far, prefills included.
        tokens: tokens generated so far, over all sequences.
    """

    active: int = 0
    queued: int = 0
    steps: int = 0
    tokens: int = 0


class Decoder:
    """Continuous batching in its simple form: groups join at a step boundary, rows leave at any step.

    A group joins whole, so a batch decodes the same way each time when nothing else runs. Of a group larger
    than ``max_batch`` the first ``max_batch`` join together and the rest follow one by one as places come free.
    Groups are served first come, first served. An idle thread ends after ``grace_seconds``; the next request
    starts another.
    """

    def __init__(self, model: LoadedModel, max_batch: int, grace_seconds: float = 1.0) -> None:
        self._grace_seconds = grace_seconds
        self._max_batch = max_batch
        self._batch = Batch(model)
        self._queue: deque[list[Row]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._steps = 0
        self._tokens = 0

    def submit(self, group: Sequence[Row]) -> None:
        """Queue sequences that belong together; thread-safe, does not wait.

        Raises:
            EngineError: the decoder is closed.
        """
        head, rest = list(group[: self._max_batch]), group[self._max_batch :]
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed; build a new one")
            self._queue.extend([head, *([row] for row in rest)])
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tta-decode", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Stop within one step, fail what is unfinished, and wait for the thread; idempotent."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify()
        if thread is not None:
            thread.join()
        closed = EngineError("the engine was closed while it decoded")
        self._batch.fail(closed)
        while self._queue:
            for row in self._queue.popleft():
                row.fail(closed)
                row.announce()

    def stats(self) -> DecoderStats:
        with self._changed:
            queued = sum(map(len, self._queue))
        return DecoderStats(len(self._batch.rows), queued, self._steps, self._tokens)

    def _run(self) -> None:
        while (joining := self._next_group()) is not None:
            try:
                self._turn(joining)
            except Exception as exc:  # noqa: BLE001  the thread boundary: its callers get the error, not the thread
                self._batch.fail(exc)
                self._refuse(joining, exc)

    def _turn(self, joining: list[Row]) -> None:
        self._batch.drop_cancelled()
        if joining:
            self._join(joining)
        elif self._batch.rows:
            rows = len(self._batch.rows)
            self._batch.step()
            self._tokens += rows
        else:
            return
        self._steps += 1

    def _join(self, joining: list[Row]) -> None:
        try:
            self._batch.join(joining)
            self._tokens += len(joining)
        except Exception as exc:  # noqa: BLE001  rows that were already running go on
            self._refuse(joining, exc)

    def _refuse(self, joining: list[Row], cause: Exception) -> None:
        for row in joining:
            row.fail(cause)
            if row not in self._batch.rows:
                row.announce()
        self._batch.drop_finished()

    def _next_group(self) -> list[Row] | None:
        """What joins now, perhaps nothing; None when the thread should end."""
        with self._changed:
            while not (self._queue or self._batch.rows or self._closed):
                if not self._changed.wait(self._grace_seconds) and not self._queue:
                    break
            if self._closed or not (self._queue or self._batch.rows):
                self._thread = None
                return None
            return self._admit()

    def _admit(self) -> list[Row]:
        admitted: list[Row] = []
        self._drop_cancelled_from_queue()
        while self._queue and len(self._batch.rows) + len(admitted) + len(self._queue[0]) <= self._max_batch:
            admitted += self._queue.popleft()
        return admitted

    def _drop_cancelled_from_queue(self) -> None:
        for group in list(self._queue):
            for row in [row for row in group if row.cancelled]:
                row.finish("aborted")
                row.announce()
                group.remove(row)
            if not group:
                self._queue.remove(group)
