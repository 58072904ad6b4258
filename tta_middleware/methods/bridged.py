"""Any optimiser, with other answers beside its own: bridges out of a late flag, one that is asked for before all."""

from __future__ import annotations

from collections.abc import Sequence

from tta_middleware.methods.base import words_ahead
from tta_middleware.protocols import Optimiser
from tta_middleware.types import Proposal


class Bridged:
    """The optimiser's first wave alone, its second with all bridges behind it, then the optimiser again.

    Text that has left and leads straight into harm leaves little to moved embeddings, while a turn of phrase from
    which the model goes on is nearly always safe (docs/results/late-flags.md).
    """

    def __init__(self, inner: Optimiser, bridges: Sequence[Proposal]) -> None:
        self.name = inner.name
        self._inner = inner
        self._bridges = list(bridges)
        self._waves = 0

    def ask(self, limit: int) -> list[Proposal]:
        self._waves += 1
        proposals = [] if self._inner.stop() else self._inner.ask(limit)
        if self._waves > 1 or not proposals:
            room = max(0, limit - len(proposals))
            proposals += self._bridges[:room]
            del self._bridges[:room]
        return proposals

    def words_ahead(self, limit: int) -> Sequence[str]:
        return words_ahead(self._inner, limit)

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        own = [(p, loss) for p, loss in zip(proposals, losses, strict=True) if not p.opening]
        self._inner.tell([p for p, _ in own], [loss for _, loss in own])

    def stop(self) -> tuple[str, ...]:
        return () if self._bridges else self._inner.stop()


class Led:
    """One proposal alone, then the optimiser."""

    def __init__(self, first: Proposal, inner: Optimiser) -> None:
        self.name = inner.name
        self._first, self._inner = first, inner
        self._asked = False

    def ask(self, limit: int) -> list[Proposal]:
        if self._asked:
            return self._inner.ask(limit)
        self._asked = True
        return [self._first]

    def words_ahead(self, limit: int) -> Sequence[str]:
        return words_ahead(self._inner, limit) if self._asked else ()

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        own = [(p, loss) for p, loss in zip(proposals, losses, strict=True) if p is not self._first]
        if own:
            self._inner.tell([p for p, _ in own], [loss for _, loss in own])

    def stop(self) -> tuple[str, ...]:
        return self._inner.stop() if self._asked else ()
