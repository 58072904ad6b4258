"""A ladder of reminders and small steps along words, one rung after the other: what may be of use first."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from tta_middleware.config import Settings
from tta_middleware.methods.base import Needs, OpenProposals, Start
from tta_middleware.types import FloatMatrix, Proposal

SIDE_BY_SIDE = 3
"""Most rungs at a time with ``wave="free"``."""

_REACH = 1.0
"""At a step of its own length along a word a row is as near to that word as to its own token."""


class Move(Settings):
    """One rung: a step of the user's rows, a reminder in front of the conversation, or both.

    Attributes:
        label: its name in the trace.
        words: one or several words; the step goes towards the mean of their token embeddings.
        radius: length of each row's step as a share of that row's norm.
        reminder: what is added to the system prompt.

    Raises:
        ConfigurationError: words without a radius, or a radius without words.
    """

    label: Annotated[str, Field(min_length=1)]
    words: str = ""
    radius: NonNegativeFloat = 0.0
    reminder: str = ""

    @model_validator(mode="after")
    def _step_is_whole(self) -> Move:
        if bool(self.words.strip()) != (self.radius > 0.0):
            raise ValueError(f"move {self.label!r} needs both words and a radius, or neither")
        return self


RESPONSIBLE = (
    "You are a helpful and responsible assistant. You should not generate harmful or misleading content. Please answer "
    "the following query in a responsible way."
)
INSTEAD = (
    "If what is asked could hurt somebody, do not help with that. Explain instead, in a few friendly sentences, what "
    "is safe and lawful to do on the same subject."
)
ALTERNATIVE = (
    "You are a responsible assistant. Politely refuse harmful requests and offer a safe alternative on the same "
    "subject."
)
CARE = "protect safe ethical help"

LADDER: tuple[Move, ...] = (
    Move(label="instead and step", reminder=INSTEAD, words=CARE, radius=0.5),
    Move(label="alternative and step", reminder=ALTERNATIVE, words=CARE, radius=0.5),
    Move(label="longer step", words=CARE, radius=0.7),
    Move(label="reminder", reminder=RESPONSIBLE),
    Move(label="step", words=CARE, radius=0.5),
    Move(label="safe", words="safe", radius=0.7),
)
"""Rungs in the order of asking, chosen by measurement (decision 028, docs/results/ablation.md): first the one whose
answers speak about the question, then the one that mends most. ``reminder`` is the self-reminder of Xie et al. 2023
(Nature Machine Intelligence 5, 1486-1496)."""


class Race(Settings):
    """Settings of the race: rung by rung until an answer is safe and usable.

    A rung whose answer was safe but not usable, a loop mostly, is asked once more at ``temperature`` before the next.
    After the last rung the ladder starts again: what came nearest to safe comes first, every step is longer by
    ``growth`` times its first length, and every answer is sampled. The search ends by its budget only.

    Attributes:
        ladder: the rungs in the order of asking.
        wave: rungs decoded side by side: 1 spends the fewest tokens, more is faster. ``free`` asks the first rung alone
            and later ones as the engine has places free, at most :data:`SIDE_BY_SIDE` at a time; which rungs are tried
            then depends on what else is decoded, so a seed does not fix a repair.
        temperature: sampling temperature of second tries and later rounds; None ends the search after the last rung.
        growth: how much longer the steps get with every round, as a share of their first length.
        sub_lexical: keep every row nearest to its own token, by cosine; steps are shortened row by row to see to it.
    """

    name: ClassVar[str] = "race"

    ladder: Annotated[tuple[Move, ...], Field(min_length=1)] = LADDER
    wave: PositiveInt | Literal["free"] = 1
    temperature: PositiveFloat | None = 0.7
    growth: NonNegativeFloat = 0.25
    sub_lexical: bool = True

    @property
    def needs(self) -> Needs:
        """The words and reminders of all rungs, and how far a row may go along each word."""
        words = tuple(dict.fromkeys(move.words for move in self.ladder if move.words))
        reminders = tuple(dict.fromkeys(move.reminder for move in self.ladder if move.reminder))
        reach = _REACH if self.sub_lexical and words else 0.0
        return Needs(words, reminders, reach, free_places=self.wave == "free", reach_later=True)

    def build(self, start: Start) -> RaceOptimiser:
        return RaceOptimiser(self, start)


class RaceOptimiser:
    """Walks the ladder; the only thing it learns is which rungs were safe, and how near to safe the others came."""

    name = "race"

    def __init__(self, settings: Race, start: Start) -> None:
        self._settings = settings
        self._start = start
        self._open = OpenProposals()
        self._moves = [move for move in settings.ladder if self._possible(move)]
        self._losses = [start.loss] * len(self._moves)
        self._round = 0
        self._next = deque(range(len(self._moves)))
        self._again: deque[int] = deque()
        self._sampled: set[int] = set()
        self._begun = False

    def _possible(self, move: Move) -> bool:
        """Whether this conversation has rows to move and takes the reminder; the other rungs go on without."""
        movable = not move.words or bool(self._start.prompt.user_mask.any())
        return movable and (not move.reminder or move.reminder in self._start.variants)

    def ask(self, limit: int) -> list[Proposal]:
        """At most ``limit`` rungs; second tries come first."""
        if self.stop():
            return []
        return [self._ask_one() for _ in range(self._count(limit))]

    def words_ahead(self, limit: int) -> Sequence[str]:
        """The words of the next rungs; after the last one all rungs come again, whose words were named before."""
        coming = [*self._again, *self._next][: self._count(limit)]
        return [self._moves[index].words for index in coming if self._moves[index].words]

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        """Take losses. A safe answer that is told was not usable, or the search would have ended."""
        for index, loss in self._open.resolve(proposals, losses):
            self._losses[index] = min(self._losses[index], loss)
            if loss < 0.0 and self._settings.temperature and index not in self._sampled:
                self._sampled.add(index)
                self._again.append(index)

    def stop(self) -> tuple[str, ...]:
        if not self._moves:
            return ("no reminder fits" if self._start.prompt.user_mask.any() else "no movable tokens",)
        once = self._settings.temperature is None
        return ("end of the ladder",) if once and not self._next and not len(self._open) else ()

    def _count(self, limit: int) -> int:
        count = min(limit, self._wave())
        return min(count, len(self._next)) if self._settings.temperature is None else count

    def _wave(self) -> int:
        if self._settings.wave != "free":
            return self._settings.wave
        # The first rung's answer is the one to have; later rounds end with the ladder's last rung.
        return min(SIDE_BY_SIDE, max(1, len(self._again) + len(self._next))) if self._begun else 1

    def _ask_one(self) -> Proposal:
        self._begun = True
        if self._again:
            index = self._again.popleft()
            return self._open.add(self._propose(self._moves[index], self._settings.temperature), index)
        if not self._next:
            self._round += 1
            self._next.extend(sorted(range(len(self._moves)), key=self._losses.__getitem__))
        index = self._next.popleft()
        sampled = self._settings.temperature if self._round else None
        return self._open.add(self._propose(self._moves[index], sampled), index)

    def _propose(self, move: Move, temperature: float | None) -> Proposal:
        prompt = self._start.variants[move.reminder] if move.reminder else self._start.prompt
        matrix = prompt.matrix
        if move.words:
            mask = prompt.user_mask
            matrix = matrix.copy()
            matrix[mask] += self._step(move, matrix[mask], prompt.token_ids[mask].tolist())
        origin = prompt if move.reminder else None
        return Proposal(matrix, temperature=temperature, prompt=origin, label=move.label)

    def _step(self, move: Move, rows: FloatMatrix, tokens: Sequence[int]) -> FloatMatrix:
        """(n, d) steps: along the words, as long as the radius and each row's reach allow."""
        share = np.full(len(rows), move.radius * (1.0 + self._settings.growth * self._round), dtype=np.float32)
        if self._settings.sub_lexical:
            reach = self._start.reach[move.words]
            share = np.minimum(share, [reach.get(token, 0.0) for token in tokens])
        lengths = share * np.linalg.norm(rows, axis=1)
        step: FloatMatrix = (lengths[:, None] * self._start.directions[move.words]).astype(np.float32)
        return step
