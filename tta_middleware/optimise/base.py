"""What every method shares: settings that build an optimiser, and the book of open proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from tta_middleware.protocols import Optimiser
from tta_middleware.types import PromptEmbeddings, Proposal


@runtime_checkable
class Method(Protocol):
    """A search method with its settings; builds one optimiser per flagged answer."""

    @property
    def name(self) -> str: ...

    def build(self, prompt: PromptEmbeddings, loss: float, rng: np.random.Generator) -> Optimiser:
        """An optimiser that starts at ``prompt``, whose own answer had ``loss``."""
        ...


class OpenProposals:
    """Proposals that were asked for and not yet told, in the order of asking."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Proposal, int]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, proposal: Proposal, index: int) -> Proposal:
        self._open[id(proposal)] = (proposal, index)
        return proposal

    def settle(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> list[tuple[int, float]]:
        """The (index, loss) pairs of told proposals.

        Raises:
            ValueError: lengths differ, a loss is NaN, or a proposal is not open.
        """
        if len(proposals) != len(losses):
            raise ValueError(f"{len(proposals)} proposals need as many losses, not {len(losses)}")
        settled = []
        for proposal, loss in zip(proposals, losses, strict=True):
            if np.isnan(loss):
                raise ValueError("a loss must be a number, not NaN")
            if id(proposal) not in self._open:
                raise ValueError("this proposal was not asked for, or was told before")
            settled.append((self._open.pop(id(proposal))[1], float(loss)))
        return settled
