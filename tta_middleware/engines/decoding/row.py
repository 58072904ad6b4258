"""One sequence on its way through the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tta_middleware.engines.decoding.sampling import seeded
from tta_middleware.engines.prompt.detokenise import TextAssembler, deltas
from tta_middleware.engines.prompt.thoughts import Piece
from tta_middleware.errors import EngineError
from tta_middleware.types import Collected, Completion, FinishReason, GenerationRequest, TextDelta


class Sink(Protocol):
    """Where a sequence's results go; called in the decode thread, so nothing here may block."""

    def delta(self, delta: TextDelta) -> bool:
        """Take a piece; False if nobody listens any more."""
        ...

    def ended(self, last: TextDelta, completion: Completion) -> None:
        """Take the last piece and the whole."""
        ...

    def failed(self, error: EngineError) -> None: ...


class Row:
    """Collects the tokens of one request until it is finished.

    Attributes:
        ticket: of the request that it belongs to.
        limit: most tokens to generate: the request's own bound, or what the context leaves.
        generator: what its tokens are drawn with; None when it decodes greedily.
        finished: it takes no more tokens; :meth:`announce` says so once its row is free.
    """

    def __init__(self, request: GenerationRequest, sink: Sink, *, ticket: int, limit: int, text: TextAssembler) -> None:
        self.request = request
        self.ticket = ticket
        self.limit = limit
        self.generator = seeded(request.sampling)
        self.finished = False
        self.token_ids: list[int] = []
        self._sink = sink
        self._assembler = text
        self._collected = Collected()
        self._delivered_ids = 0
        self._cancelled = False
        self._announcement: Callable[[], None] = lambda: None

    @property
    def columns(self) -> int:
        """Prompt and tokens so far."""
        return len(self.request.prompt.matrix) + len(self.token_ids)

    @property
    def cancelled(self) -> bool:
        return self._cancelled or self.request.abort.is_set()

    def cancel(self) -> None:
        """Give the sequence up; thread-safe, takes effect within one decode step."""
        self._cancelled = True

    def accept(self, token_id: int, eos_ids: frozenset[int]) -> None:
        """Take the next generated token."""
        self.token_ids.append(token_id)
        if token_id in eos_ids:
            self.finish("stop")
            return
        pieces = self._assembler.push(token_id)
        if self._assembler.stopped:
            self._deliver(pieces, "stop")
        elif len(self.token_ids) >= self.limit:
            self._finish_with(pieces, "length")
        elif pieces:
            self._deliver(pieces, None)

    def finish(self, reason: FinishReason) -> None:
        """End the sequence and deliver what is held."""
        self._finish_with([], reason)

    def fail(self, cause: BaseException) -> None:
        """End the sequence with an error of its own that names ``cause``."""
        if self.finished:
            return
        self.finished = True
        # One exception per waiter: raising one object in several tasks would mix their tracebacks.
        error = EngineError(str(cause) if isinstance(cause, EngineError) else f"decoding failed: {cause!r}")
        error.__cause__ = cause
        self._announcement = lambda: self._sink.failed(error)

    def announce(self) -> None:
        """Tell the sink, once, how the sequence ended; called when its place in the batch is free."""
        announcement, self._announcement = self._announcement, lambda: None
        announcement()

    def _finish_with(self, pieces: list[Piece], reason: FinishReason) -> None:
        pieces += self._assembler.flush()
        # The held text may complete a stop string after all.
        self._deliver(pieces, "stop" if self._assembler.stopped and reason == "length" else reason)

    def _deliver(self, pieces: list[Piece], reason: FinishReason | None) -> None:
        told = deltas(pieces, self.token_ids[self._delivered_ids :], reason)
        self._delivered_ids = len(self.token_ids)
        last = told.pop() if reason is not None else None
        for delta in told:
            self._collected.add(delta)
            if not self._sink.delta(delta):
                self.cancel()
        if last is None:
            return
        self._collected.add(last)
        self.finished = True
        completion = self._collected.completion
        self._announcement = lambda: self._sink.ended(last, completion)
