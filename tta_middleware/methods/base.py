"""What every method shares: settings that build an optimiser, and the book of open proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from tta_middleware.protocols import Optimiser
from tta_middleware.types import FloatMatrix, PromptEmbeddings, Proposal


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method wants to know of the model and the conversation before it starts.

    Attributes:
        words: words of which it wants the directions in embedding space.
        reminders: system prompts under which it wants the conversation embedded, too.
        margin: whether its answers have to clear the margin that the repair stage has by default; one that a policy
            names itself holds for every method.
        free_places: whether it is to be asked for no more proposals than the engine has places free, one at least.
        reach: how far it would step along a word at most, as a share of a row's norm, if it wants to know how far each
            row can go and still be nearest to its own token; 0 if it does not.
        reach_later: its optimisers are :class:`StepsAlongWords`: what they want to know of their reach is looked up
            before each wave, instead of all of it at the beginning.
    """

    words: tuple[str, ...] = ()
    reminders: tuple[str, ...] = ()
    reach: float = 0.0
    margin: bool = True
    free_places: bool = False
    reach_later: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What one search starts from.

    Attributes:
        prompt: the unmoved prompt, whose own answer was flagged.
        loss: that answer's loss.
        whole: whether ``loss`` is of the whole answer, as the losses of proposals are that are decoded whole; False
            where the answer was dropped at its first flagged window.
        rng: the search's only source of chance.
        directions: per word of :class:`Needs`, its (d,) embedding less the mean of the model's table, of length 1.
        variants: per reminder of :class:`Needs`, the conversation under that system prompt; one that it cannot take,
            for its length or its chat template, is not among them.
        reach: per word, the longest step for each of the user's token ids, as a share of its row's norm, after which
            the row is still nearest to its own token by cosine. The rows nearest to one token form a convex cone, so
            any shorter step stays inside as well. With ``Needs.reach_later`` words come in here as they are named.
    """

    prompt: PromptEmbeddings
    loss: float
    rng: np.random.Generator
    directions: Mapping[str, FloatMatrix] = field(default_factory=dict)
    variants: Mapping[str, PromptEmbeddings] = field(default_factory=dict)
    reach: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    whole: bool = True


@runtime_checkable
class Method(Protocol):
    """A search method with its settings; builds one optimiser per flagged answer."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def build(self, start: Start) -> Optimiser:
        """An optimiser for one flagged answer."""
        ...


@runtime_checkable
class StepsAlongWords(Protocol):
    """What an optimiser offers besides that wants to know its reach (:class:`Start`) along the words of its steps."""

    def words_ahead(self, limit: int) -> Sequence[str]:
        """The words along which ``ask(limit)`` would step, if it came now."""
        ...


def words_ahead(optimiser: Optimiser, limit: int) -> Sequence[str]:
    """As :meth:`StepsAlongWords.words_ahead`; none of an optimiser that does not step along words."""
    return optimiser.words_ahead(limit) if isinstance(optimiser, StepsAlongWords) else ()


class OpenProposals:
    """Proposals that were asked for and not yet told, in the order of asking."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Proposal, int]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, proposal: Proposal, index: int) -> Proposal:
        self._open[id(proposal)] = (proposal, index)
        return proposal

    def resolve(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> list[tuple[int, float]]:
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
