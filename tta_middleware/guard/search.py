"""The search for a repair: what its method starts from, wave after wave of attempts, and the one that is given out.

A wave is raced. Its attempts are decoded side by side, each under watch; one whose beginning is flagged is aborted
there. Of those that are safe and usable at their commit point one is chosen, the others are aborted, and its text flows
from then on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import anyio
import numpy as np

from tta_middleware.aio.streams import first_error
from tta_middleware.config import Windows
from tta_middleware.errors import ConfigurationError, ModerationError
from tta_middleware.guard.context import Decode, Question, RequestContext, reminded
from tta_middleware.guard.helpful import helpfulness
from tta_middleware.guard.settings import Preference
from tta_middleware.guard.watch import of_part
from tta_middleware.methods import geometry
from tta_middleware.methods.base import Method, Start, words_ahead
from tta_middleware.policy import Policy
from tta_middleware.protocols import Engine, Optimiser, SharesPlaces
from tta_middleware.trace import no_verdict
from tta_middleware.types import (
    AnswerScore,
    BoolVector,
    Candidate,
    Completion,
    FloatMatrix,
    IntVector,
    PromptEmbeddings,
    Proposal,
    QualityReport,
    StepTrace,
    WindowScore,
)

OnStep: TypeAlias = Callable[[StepTrace], Awaitable[None]]
Emit: TypeAlias = Callable[[str], Awaitable[object]]

LATE_FLAG = "late flag"

_GRID = 8

# Where a repair's candidates stand in the engine's queue (docs/decisions/021): before all others while its reader has
# nothing yet, and behind half as many more where he reads already.
_NOTHING_LEFT, _SOME_LEFT = -1.0, 0.5


async def prepare(
    context: RequestContext, question: Question, method: Method, loss: float, rng: np.random.Generator
) -> tuple[Start, Reach]:
    """What ``method`` starts from: the prompt, the directions of its words, and the prompt under its reminders.

    The reach along its words is looked up by the search where the method names them as it goes.

    A reminder that the conversation cannot take is left out of the variants: it makes the prompt longer than the
    model's context, or the chat template refuses it.

    Raises:
        ConfigurationError: a word is blank.
    """
    words = method.needs.words
    rows: Sequence[FloatMatrix] = list(await of_part(context.engine.directions(words))) if words else []
    variants = {}
    context.reminders.update(dict.fromkeys(method.needs.reminders))
    for reminder in method.needs.reminders:
        with suppress(ConfigurationError):
            turns = reminded(context.conversation.messages, reminder)
            variants[reminder] = await context.embed(question.prefix, turns, question.thought)
    directions = dict(zip(words, rows, strict=True))
    reach = Reach(context.engine, [question.prompt, *variants.values()], directions, method.needs.reach)
    if not method.needs.reach_later:
        await reach.look_up(words)
    return Start(question.prompt, loss, rng, directions, variants, reach.found), reach


async def bridge_proposals(context: RequestContext, question: Question, bridges: Sequence[str]) -> list[Proposal]:
    """Ways out of what has left already; none while nothing has, nor where the context has no room for one.

    One that holds a stop string is none either: the answer would have had to end before it.
    """
    found = []
    for text in bridges if question.prefix else ():
        if any(stop in text for stop in question.sampling.stop):
            continue
        with suppress(ConfigurationError):
            prompt = await context.embed(question.prefix + text, thought=question.thought)
            found.append(Proposal(prompt.matrix, prompt=prompt, opening=text, label="bridge"))
    return found


@dataclass(slots=True)
class Reach:
    """The reach of the user's rows, for the words that proposals step along.

    A look-up compares rows with the whole table in the thread that decodes, so it is put off until a word is wanted.

    Attributes:
        prompts: the conversation as it may be asked; their user rows are those that move.
        directions: per word, a (d,) row of length 1.
        most: the longest step that is asked about, as a share of a row's norm; 0 where nobody wants to know.
        found: per word that was looked up, the longest of ``_GRID`` evenly spaced steps for each of the user's token
            ids that leaves that token nearest. The search that owns this writes it; its optimiser reads it.
    """

    engine: Engine
    prompts: Sequence[PromptEmbeddings]
    directions: Mapping[str, FloatMatrix]
    most: float
    found: dict[str, Mapping[int, float]] = field(default_factory=dict)

    async def look_up(self, words: Iterable[str]) -> None:
        """Find the reach along each of ``words`` that is not known yet."""
        new = [word for word in dict.fromkeys(words) if word not in self.found]
        rows = {token: row for prompt in self.prompts for token, row in _user_rows(prompt)}
        if not (self.most and new and rows):
            return
        tokens, origin = np.array(list(rows)), np.array(list(rows.values()))
        lengths = self.most * np.linalg.norm(origin, axis=1)[:, None]
        full = np.array([lengths * self.directions[word] for word in new])
        share = np.where(await self._stays(origin + full, tokens), 1.0, 0.0)
        # Most rows can go all the way; only the others are worth a closer look.
        short = np.nonzero(share == 0.0)
        parts = np.linspace(0.0, 1.0, _GRID, endpoint=False, dtype=np.float32)[1:]
        if len(short[0]):
            points = origin[short[1]] + parts[:, None, None] * full[short]
            share[short] = (await self._stays(points, tokens[short[1]])).sum(axis=0) / _GRID
        for word, line in zip(new, (self.most * share).tolist(), strict=True):
            self.found[word] = dict(zip(rows, line, strict=True))

    async def _stays(self, points: FloatMatrix, tokens: IntVector) -> BoolVector:
        """Whether each of the (m, n, d) points is nearest to its own of the (n,) tokens."""
        nearest = await of_part(self.engine.nearest_tokens(points.reshape(-1, points.shape[-1])))
        stays: BoolVector = nearest.reshape(points.shape[:-1]) == tokens
        return stays


def _user_rows(prompt: PromptEmbeddings) -> Iterable[tuple[int, FloatMatrix]]:
    return zip(prompt.token_ids[prompt.user_mask].tolist(), prompt.matrix[prompt.user_mask], strict=True)


@dataclass(frozen=True, slots=True)
class Delivery:
    """How candidates are checked and where the chosen one goes.

    Attributes:
        windows: how candidates are cut; None checks each whole at its end, so none is aborted early.
        commit: choose a candidate as soon as its first window is safe and usable; otherwise at its end.
        emit: takes the chosen candidate's text as it is checked; None keeps it until its end.
        think: takes its thoughts, before the text that follows them; None keeps them.
    """

    windows: Windows | None = None
    commit: bool = False
    emit: Emit | None = None
    think: Emit | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        winner: a safe and usable answer with its verdict, or None.
        best: the best answer that may be given out: usable ones first, then safe ones, then the lowest loss.
        unscored: a usable answer that could not be scored and where it came from, if the repair policy lets such pass.
        stop_reason: ``neutralised``, ``optimiser: ...``, ``budget: ...``, ``moderator: ...``, or ``late flag``: part of
            a candidate has left that was chosen and then flagged.
        windows: the checks of the chosen candidate.
    """

    winner: Candidate | None
    best: Candidate | None
    steps: tuple[StepTrace, ...]
    stop_reason: str
    unscored: tuple[Proposal, Completion] | None = None
    windows: tuple[WindowScore, ...] = ()


@dataclass(slots=True)
class Search:
    """Asks an optimiser for proposals and tells it their losses, until one answer is safe and usable.

    Keeps the best checked answer on the way. ``on_step`` hears of each wave once it is over. With ``free_places`` a
    wave is no larger than what the engine can decode beside everything else, one at least. ``reach`` is looked up along
    the words of the proposals that come next; ``prefer`` says which of several good answers of a wave is chosen.
    """

    context: RequestContext
    question: Question
    optimiser: Optimiser
    delivery: Delivery
    on_step: OnStep
    free_places: bool = False
    reach: Reach | None = None
    prefer: Preference = "first"
    # All of these belong to the task that runs the search. The attempts of a wave run in tasks of their own, write to
    # themselves only, and have ended before _record and _conclude read them.
    steps: list[StepTrace] = field(default_factory=list)
    best: Candidate | None = None
    winner: Candidate | None = None
    unscored: tuple[Proposal, Completion] | None = None
    chosen: Attempt | None = None
    reason: str = ""

    async def run(self) -> SearchResult:
        """Until a releasable answer is safe and usable, the optimiser stops, or the budget ends."""
        with anyio.move_on_after(self.context.meter.seconds_left) as scope:
            try:
                while not self.reason:
                    await self._wave()
            except ModerationError as error:
                self.reason = no_verdict(error)
        # The deadline may cut a wave anywhere; what was found before it stands in the result all the same.
        if scope.cancelled_caught:
            self.reason = "budget: seconds"
        windows = tuple(self.chosen.watch.windows) if self.chosen else ()
        return SearchResult(self.winner, self.best, tuple(self.steps), self.reason, self.unscored, windows)

    async def _wave(self) -> None:
        limit = self.context.meter.exhausted()
        rule = self.optimiser.stop()
        if rule or limit:
            self.reason = f"optimiser: {', '.join(rule)}" if rule else f"budget: {limit}"
            return
        most = self._most()
        if self.reach is not None:
            await self.reach.look_up(words_ahead(self.optimiser, most))
        proposals = self.optimiser.ask(most)
        if not proposals:
            self.reason = "optimiser: nothing left to try"
            return
        decodes = self.context.decode_all(self.question, proposals, self._patience())
        wave = [Attempt(self.context, *parts, self.delivery) for parts in zip(proposals, decodes, strict=True)]
        with self.context.observer.repairing([proposal.label for proposal in proposals]) as observer:
            try:
                await self._race(wave)
            finally:
                step = self._record(wave)  # what a wave cost stands in the trace, whatever ended it
                observer.tried(step)
        await self.on_step(step)
        self._conclude(wave)

    def _patience(self) -> float:
        if self.delivery.emit is None:
            return 0.0  # whoever takes whole answers reads nothing in the meantime, repaired or not
        return _SOME_LEFT if self.question.prefix else _NOTHING_LEFT

    def _most(self) -> int:
        left, engine = self.context.meter.generations_left, self.context.engine
        if self.free_places and isinstance(engine, SharesPlaces):
            return max(1, min(left, engine.free_places()))
        return left

    async def _race(self, wave: Sequence[Attempt]) -> None:
        """Side by side; one that is safe and usable at its commit point goes on alone."""
        try:
            async with anyio.create_task_group() as group:
                for attempt in wave:
                    group.start_soon(attempt.run)
                if (best := await self._best(wave)) is not None:
                    await self._choose(best, wave)
                group.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        finally:
            # A decode whose task was cancelled before its first step is still the engine's; its signal ends it there.
            for attempt in wave:
                attempt.abort()

    async def _best(self, wave: Sequence[Attempt]) -> Attempt | None:
        """Of those that are safe and usable the most helpful one, or the first; of equals the first."""
        good: list[Attempt] = []
        # In the order of asking, not of finishing: what is chosen must not depend on which decode was faster.
        for attempt in wave:
            await attempt.decided.wait()
            if await attempt.passes():
                good.append(attempt)
                if self.prefer == "first":
                    break
        # What went on while the others were waited for may be flagged by now.
        going = [attempt for attempt in good if attempt.alive]
        if len(going) < 2:
            return going[0] if going else None
        asked = self.context.conversation.user_text
        return max(going, key=lambda attempt: helpfulness(asked, attempt.opening))

    async def _choose(self, attempt: Attempt, wave: Sequence[Attempt]) -> None:
        self.chosen = attempt
        # Before the first character flows: the others' decode steps would slow the chosen one down.
        for other in wave:
            if other is not attempt:
                other.abort()
        await attempt.follow()

    def _record(self, wave: Sequence[Attempt]) -> StepTrace:
        scores = tuple(attempt.watch.verdict.score for attempt in wave if attempt.watch.verdict is not None)
        step = StepTrace(scores, sum(len(attempt.watch.collected.token_ids) for attempt in wave))
        self.steps.append(step)
        return step

    def _conclude(self, wave: Sequence[Attempt]) -> None:
        told = [(attempt, loss) for attempt in wave if (loss := attempt.loss) is not None]
        self.optimiser.tell([attempt.proposal for attempt, _ in told], [loss for _, loss in told])
        for attempt, _ in told:
            self._remember(attempt)
        chosen = self.chosen
        if self.winner is not None:
            self.reason = "neutralised"
        elif chosen is not None and chosen.won and chosen.watch.unchecked:
            self.unscored = (chosen.proposal, chosen.watch.completion)
            self.reason = no_verdict(chosen.watch.error)
        elif chosen is not None and (chosen.released or chosen.shown):
            self.reason = LATE_FLAG
        else:
            self._give_up_unscored(wave)

    def _give_up_unscored(self, wave: Sequence[Attempt]) -> None:
        error = next((a.watch.error for a in wave if a.watch.ending == "unscored"), None)
        if error is not None:
            raise error

    def _remember(self, attempt: Attempt) -> None:
        candidate = attempt.candidate
        if candidate is None or not attempt.proposal.releasable:
            return
        if self.best is None or self._rank(candidate) < self._rank(self.best):
            self.best = candidate
        if attempt.won and attempt is self.chosen and not attempt.watch.unchecked:
            self.best = self.winner = candidate

    def _rank(self, candidate: Candidate) -> tuple[bool, float]:
        usable = candidate.quality is not None and candidate.quality.usable
        return (not usable, self.context.policies.repair.decide(candidate.verdict).excess)


class Attempt:
    """One proposal on its way to an answer: decided at its commit point, followed to its end if chosen.

    Attributes:
        watch: its stream.
        decided: set when the commit point is reached or the stream is over.
        released: what was emitted of it, and ``shown`` of its thoughts.
        won: it was chosen, and its whole text is safe and usable.
    """

    def __init__(self, context: RequestContext, proposal: Proposal, decode: Decode, delivery: Delivery) -> None:
        # Shared by two tasks on one event loop, so that only an ``await`` hands over between them: the attempt's own
        # (``run``, which calls _take) and the search's (passes, follow, abort).
        # - _checked: written by _take alone, before it sets ``decided``; _thought by _take_thought alone.
        # - _followed: set by the search, once, with nothing awaited before its first _emit. Until then only the search
        #   assesses, afterwards _take does for each window, and the search again when ``_over`` is set.
        # - _judged, _quality, _assessed: written by whichever of the two assesses; _judged only grows.
        # - released, shown: both emit. They are moved on together with cutting the piece, before anything is awaited,
        #   so no piece goes out twice, and the receiver takes pieces in the order in which they were cut.
        # - won: written by the search; read by it after ``_over``.
        self.proposal = proposal
        self.decided = anyio.Event()
        self.released = self.shown = ""
        self.won = False
        self._context, self._question, self._delivery = context, decode.question, delivery
        self._abort, self._scope = decode.abort, anyio.CancelScope()
        self._over = anyio.Event()
        self._checked = self._thought = ""
        self._judged = 0
        self._quality: QualityReport | None = None
        self._assessed: Completion | None = None
        self._followed = False
        windows = None if proposal.whole else delivery.windows
        self.watch = context.watch(decode, "repair", windows, self._take, self._take_thought)

    async def run(self) -> None:
        """Decode until the end, a flag, or :meth:`abort`."""
        try:
            with self._scope:
                await self.watch.run()
        finally:
            self.abort()
            self.decided.set()
            self._over.set()

    def abort(self) -> None:
        """Stop decoding within one step; what was emitted stays."""
        self._abort.set()
        # The signal alone ends the decode at its next step; the scope ends checks and sends that are waited for, too.
        if not self._over.is_set():
            self._scope.cancel()

    async def passes(self) -> bool:
        """Safe and usable as far as it was checked, and one that may be given out."""
        if not self.proposal.releasable or not self.alive:
            return False
        return (self.watch.ending == "done" or bool(self._checked)) and await self._usable()

    async def follow(self) -> None:
        """Emit what was checked and judged, and the rest as it is, until the end."""
        self._followed = True
        await self._emit()
        await self._over.wait()
        self.won = self.watch.ending == "done" and await self._usable()
        if self.won:
            await self._emit()

    @property
    def alive(self) -> bool:
        """Nothing of it was flagged or left without a verdict so far."""
        return self.watch.ending in (None, "done")

    @property
    def opening(self) -> str:
        """What it is chosen by: all that was checked, up to its commit point, however far it has got since."""
        windows = self._delivery.windows
        return self._checked[: windows.first if self._delivery.commit and windows else None]

    @property
    def loss(self) -> float | None:
        """Excess over the threshold by the newest verdict; None without one."""
        verdict = self.watch.verdict
        return None if verdict is None else self._context.policies.repair.decide(verdict).excess

    @property
    def candidate(self) -> Candidate | None:
        """The whole answer with its newest verdict; None without one."""
        if self.watch.verdict is None:
            return None
        done = self.watch.completion
        whole = replace(done, text=self._question.prefix + done.text)
        return Candidate(self.proposal, whole, self.watch.verdict, self._quality)

    async def _take(self, text: str) -> bool:
        """Checked text, in order. What follows a commit must be usable, too."""
        self._checked += text
        if self._followed:
            if not await self._usable():
                return False
            await self._emit()
        elif self._delivery.commit:
            self.decided.set()
        return True

    async def _take_thought(self, text: str) -> bool:
        """Checked thoughts: they leave with the text that they lead to, once that is chosen."""
        self._thought += text
        if self._followed:
            await self._emit()
        return True

    async def _emit(self) -> None:
        thought = self._thought[len(self.shown) :]
        if self._delivery.think is not None and thought:
            self.shown += thought
            await self._delivery.think(thought)
        piece = self._checked[len(self.released) : self._judged]
        if self._delivery.emit is not None and piece:
            self.released += piece
            await self._delivery.emit(piece)

    async def _usable(self) -> bool:
        whole = self.watch.completion
        # Before the end only what was checked is judged: what is decoded ahead of the checks may still be flagged.
        seen = whole if self.watch.finish_reason else replace(whole, text=self._checked)
        if self._quality is not None and seen == self._assessed:
            return self._quality.usable
        self._assessed = seen
        prompt, judged = self._question.prompt, seen
        if opening := self.proposal.opening:
            prompt = self.proposal.prompt or prompt
            # Well-chosen words of ours would make up for what the model itself has to say once it is over.
            judged = replace(seen, text=seen.text.removeprefix(opening)) if self.watch.finish_reason else seen
        self._quality = await self._context.assess(prompt, judged)
        if self._quality.usable:
            self._judged = len(seen.text)
        return self._quality.usable


async def move_of(engine: Engine, question: PromptEmbeddings, point: Proposal | None) -> tuple[float, float, bool]:
    """Cosine and relative norm of a move, and whether its rows still decode to their tokens."""
    prompt = (point.prompt if point else None) or question
    if point is None or point.matrix.shape != prompt.matrix.shape:
        return 1.0, 0.0, True
    changed = (point.matrix != prompt.matrix).any(axis=1)
    if not changed.any():
        return 1.0, 0.0, True
    rows = changed | prompt.user_mask
    moved, origin = point.matrix[rows], prompt.matrix[rows]
    nearest = await of_part(engine.nearest_tokens(moved))
    decodes = bool((nearest == prompt.token_ids[rows]).all())
    return geometry.cosine(moved, origin), geometry.relative_move(moved, origin), decodes


def answer_score(candidate: Candidate | None, policy: Policy) -> AnswerScore | None:
    """A candidate as the trace reports it, held against ``policy``."""
    if candidate is None:
        return None
    decision = policy.decide(candidate.verdict)
    quality = candidate.quality
    return AnswerScore(
        score=candidate.verdict.score,
        flagged=decision.reached,
        category=decision.category,
        usable=quality.usable if quality else None,
        problems=quality.problems if quality else (),
        shadowed=decision.shadowed,
    )
