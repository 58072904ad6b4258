"""What an auditor keeps: one call with what was scored for it and what left, and the moderators that it hears.

Where it listens is in :mod:`tta_middleware.testing.auditor` and, for LangChain's surfaces, in
:mod:`tta_middleware.testing.audit_langchain`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import wraps
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

from tta_middleware.config import Windows
from tta_middleware.guard.events import Finished, Released, RepairFinished, RepairStarted, StreamEvent
from tta_middleware.guard.ledger import LONGEST
from tta_middleware.policy import STAGES, Policy, Stage, StagePolicies
from tta_middleware.testing.audit_rules import (
    below,
    call_covered,
    covered_loosely,
    covered_until,
    covered_whole,
    passes,
)
from tta_middleware.types import SEAM, GuardedAnswer, Verdict

T = TypeVar("T")

_EXCERPT = 80

_OVERLAP = 1_000
"""Characters that parts of a text share where the moderator does not say."""

_request: ContextVar[AuditedRequest | None] = ContextVar("tta_audited_request", default=None)
_open: list[Hearing] = []


class AuditError(AssertionError):
    """Something left that no passing verdict covers, or a whole answer was not scored whole."""


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text and the moderator's verdict on it."""

    text: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Terms:
    """What a guard promised its callers.

    Attributes:
        policies: with a threshold in each.
        context: characters before a window that are scored along with it.
        prompts: the texts whose check had to pass first.
        notices: texts of the operator, which nobody scores.
        speaks: a fallback of the user's may stand in.
        limit: characters beyond which a text is scored in parts, which share ``shared``; None if it never is.
    """

    policies: StagePolicies
    context: int = Windows().context
    prompts: tuple[str, ...] = ()
    notices: frozenset[str] = frozenset()
    speaks: bool = False
    limit: int | None = None
    shared: int = 0

    @classmethod
    def of(cls, policies: StagePolicies, **more: Any) -> Terms:
        """Terms with the notices of ``policies``, and those of ``more``."""
        notices: frozenset[str] = frozenset().union(*(policies.at(stage).every_notice() for stage in STAGES))
        return cls(policies, notices=notices | more.pop("notices", frozenset()), **more)

    def taken_by(self, moderator: Any, largest: int = 0) -> Terms:
        """These terms with the longest text that the moderator takes; windows may go to it in parts, too."""
        limit = getattr(moderator, "max_characters", None)
        if limit is None:
            return self
        overlap = getattr(moderator, "overlap", None)
        shared = min(_OVERLAP, limit // 4) if overlap is None else min(overlap, limit // 2)
        context = self.context if self.context + largest <= limit else min(self.context, shared)
        return replace(self, limit=limit, shared=shared, context=context)


class AuditedRequest:
    """One call of something guarded: what was scored for it, and what left.

    A request that is made inside another one belongs to it: what is scored for the inner counts for the outer.
    """

    def __init__(self, auditor: Hearing, label: str, terms: Terms | None, *, whole: bool = False) -> None:
        self.auditor, self.label, self.whole = auditor, label, whole
        self.parent = _request.get()
        if self.parent is not None:
            self.parent.inner.append(self)
        self.scored: list[ScoredText] = []
        self.inner: list[AuditedRequest] = []
        self.failures = 0
        self.left = self.thought = ""
        self.stage: Stage = "output"
        self.terms: Terms | None = None
        self._unproven: list[tuple[str, str]] = []
        self._over = False
        self._passing: dict[Stage, tuple[int, list[str]]] = {}
        self.take_terms(terms)

    def take_terms(self, terms: Terms | None) -> None:
        """What was promised; an outer request that promised nothing itself takes it over."""
        self.terms = self.terms or terms
        if self.parent is not None and self.terms is not None:
            self.parent.take_terms(self.terms)

    def stand_on(self, terms: Terms | None) -> None:
        """This request's own terms, in place of what requests inside it were promised."""
        if terms is not None:
            self.terms, self._passing = terms, {}

    @contextmanager
    def current(self) -> Iterator[None]:
        """What runs or is started inside belongs to this request."""
        token = _request.set(self)
        try:
            yield
        finally:
            _request.reset(token)

    def score(self, scored: Sequence[ScoredText]) -> None:
        """Some texts were scored, for this request and for those around it."""
        request: AuditedRequest | None = self
        while request is not None:
            request.scored += scored
            request = request.parent

    def fail(self) -> None:
        """Some texts could not be scored."""
        request: AuditedRequest | None = self
        while request is not None:
            request.failures += 1
            request = request.parent

    def let_out(self) -> Iterator[str]:
        """What the requests inside this one gave out; each of them is audited for it."""
        for request in self.inner:
            yield request.left
            yield request.thought
            yield from request.let_out()

    def said_inside(self) -> Iterator[str]:
        """The text, without thoughts, that the requests inside this one gave out, in order."""
        for request in self.inner:
            yield request.left
            yield from request.said_inside()

    def passing(self, stage: Stage) -> list[str]:
        """The texts that were scored and passed the policy of a stage."""
        if self.terms is None:
            return []
        known, texts = self._passing.get(stage, (0, []))
        policy = self.terms.policies.at(stage)
        new = self.scored[known:]
        texts += [one.text for one in new if passes(one.verdict, policy)]
        self._passing[stage] = (known + len(new), texts)
        return texts

    def event(self, event: StreamEvent) -> None:
        """A guard's event left."""
        match event:
            case Released(text, "reasoning"):
                self.think(text)
            case Released(text):
                self.piece(text)
            case RepairStarted():
                self.stage = "repair"
            case RepairFinished(outcome="blocked"):
                self.stage = "output"
            case Finished(answer):
                if answer.text != self.left:
                    self._find("the last event says something else than what was released", answer.text)
                if answer.reasoning != self.thought:
                    self._find("the last event has other thoughts than were released", answer.reasoning)
                if answer.trace.outcome != "blocked":
                    self.ended()
                self.marked(answer.trace.mode, answer.trace.observed)
                self._conclude(unchecked=answer.trace.outcome == "unchecked")

    def ended(self) -> None:
        """All of an answer has left, and nothing stands in for any of it: its last check saw the whole of it."""
        terms = self.terms
        if terms is None or self.whole or self._over:
            return
        if not covered_whole(_encodable(self.left), self.passing(self.stage), terms.limit, terms.shared):
            self._unproven.append(("a whole answer was not scored whole", self.left))
        # A thought that was flagged in a window ends where it was cut.
        if self.stage == "output" and not self._all_scored(self.thought):
            self._unproven.append(("whole thoughts were not scored whole", self.thought))

    def think(self, text: str) -> None:
        """The next piece of the thoughts left."""
        terms, begin = self.terms, len(_encodable(self.thought))
        if not self.thought and text:
            self.auditor.thoughtful.append(self)
        self.thought += text
        self.auditor.count(text)
        if terms is None or not text:
            return
        self._prompt_gate(text)
        if self.whole:
            covered = self._all_scored(self.thought)
        else:
            left = _encodable(self.thought)
            covered = covered_until(left, begin, self.passing("reasoning"), terms.context) == len(left)
        if not covered:
            self._unproven.append(("thoughts were released before any verdict covered them", text))

    def _all_scored(self, thought: str) -> bool:
        terms = self.terms
        return terms is None or covered_whole(_encodable(thought), self.passing("reasoning"), terms.limit, terms.shared)

    def piece(self, text: str) -> None:
        """The next piece of an answer left."""
        terms, begin = self.terms, len(_encodable(self.left))
        self.left += text
        self.auditor.count(text)
        if terms is None or self._constant(text):
            return
        self._prompt_gate(text)
        scored, left = self.passing(self.stage), _encodable(self.left)
        if self.whole:
            covered = covered_whole(left, scored, terms.limit, terms.shared)
        else:
            covered = covered_until(left, begin, scored, terms.context) == len(left)
        if not covered and terms.speaks:
            covered = covered_whole(
                _encodable(text.removeprefix(SEAM)), self.passing("output"), terms.limit, terms.shared
            )
        if not covered:
            what = "a whole answer was not scored whole" if self.whole else "released before any verdict covered it"
            self._unproven.append((what, text))

    def answer(self, answer: GuardedAnswer) -> None:
        """A whole answer was returned."""
        trace = answer.trace
        self.stage = "repair" if trace.outcome == "neutralised" else "output"
        self.think(answer.reasoning)
        self.piece(answer.text)
        self.marked(trace.mode, trace.observed)
        self._conclude(unchecked=trace.outcome == "unchecked")

    def marked(self, mode: object, observed: Sequence[object]) -> None:
        """An answer that was flagged may leave under a policy that only observes, if its trace says so."""
        terms = self.terms
        if terms is None or not terms.policies.output.observes:
            return
        if mode != "observe":
            self._find("left under a policy that only observes, and its trace does not say so", self.left)
        policy = terms.policies.output
        if any(one.text.strip() and one.text in self.left and not below(one.verdict, policy) for one in self.scored):
            self.auditor.observed += 1
            if not observed:
                self._find("a flagged text was only observed, and its trace does not say so", self.left)

    def end(self) -> None:
        """Nothing more leaves; what was left open is decided as if the policy had let it pass."""
        self._conclude(unchecked=True)

    def loose(self, place: str, text: str) -> None:
        """Text left by a surface, which may have put it together from checked pieces."""
        if not text.strip() or self.terms is None or self._constant(text):
            return
        known = self._known()
        if not all(covered_loosely(part.strip(), known) for part in self._between_notices(text)):
            self._unproven.append((f"{place} left without a verdict", text))

    def all_of(self, text: str) -> None:
        """All of an answer left by a surface in which nothing stands in for any of it, however it was put together."""
        terms = self.terms
        if terms and not covered_whole(_encodable(text), self.passing("output"), terms.limit, terms.shared):
            self._unproven.append(("a whole answer was not scored whole", text))

    def as_read(self, text: str) -> None:
        """All of an answer left by a surface that puts it together from pieces which something else may have parted."""
        terms = self.terms
        if terms and not covered_whole(
            _encodable(text), self._known(), terms.limit or LONGEST, terms.shared or _OVERLAP
        ):
            self._unproven.append(("an answer was not judged as it is read", text))

    def stood_in_for(self, text: str, stand_ins: Sequence[str | None], *, ended: bool) -> None:
        """All of an answer left by a surface: what was released inside it, a seam, and what stands in for the rest.

        Args:
            stand_ins: what may stand there beside the operator's notices, which is held against its own verdicts.
            ended: whether the answer came to its end; else ``text`` may be any beginning of it.
        """
        terms = self.terms
        if terms is None:
            return
        own = "".join(one.left for one in self.inner if one.label == "moderated")
        # Of an answer whose prompt is refused nothing has left, though some of it may have been on its way.
        begun = {own, ""} if terms.prompts else {own}
        behind = "".join(one.left for one in self.inner if one.label == "moderated, behind")
        # What another model says behind it may be flagged there, and end with the notice as well.
        ends = [
            *self._ends(stand_ins),
            *(f"{behind}{end}" for end in ("", *(SEAM + n for n in terms.notices)) if behind),
        ]
        whole = {f"{before}{SEAM if before and end else ''}{end}" for before in begun for end in ends}
        exact = text in whole if ended else any(one.startswith(text) for one in whole)
        if not (exact or (not ended and covered_whole(_encodable(text), self.passing("output")))):
            self._unproven.append(("something else left than what was released and what stands in for the rest", text))

    def _ends(self, stand_ins: Sequence[str | None]) -> list[str]:
        notices = self.terms.notices if self.terms else frozenset[str]()
        return [*notices, *(text for text in stand_ins if text is not None)]

    def call(self, name: str, arguments: Any) -> None:
        """A tool call left, decoded; ``name`` is empty where it is one that the user gave."""
        if self.terms is not None and not call_covered(name, arguments, self._known()):
            self._unproven.append(("a tool call left without a verdict on what it says", f"{name} {arguments}"))

    def gate(self, text: str) -> None:
        """Text left by a surface that promises a checked prompt itself."""
        if text.strip() and not self._constant(text):
            self._prompt_gate(text)

    def _known(self) -> list[str]:
        """What surfaces may be made of.

        Where nothing was asked of anyone, the text comes out of a cache, and an earlier verdict has to cover it.
        """
        if not (self.inner or self.scored):
            return self.auditor.passing(self)
        return [*self.passing("output"), *self.let_out()]

    def _between_notices(self, text: str) -> list[str]:
        parts = [text]
        for notice in self.terms.notices if self.terms else ():
            parts = [piece for part in parts for piece in part.split(notice)]
        return parts

    def _constant(self, text: str) -> bool:
        """Whether these are the operator's own words."""
        return self.terms is not None and text.removeprefix(SEAM) in self.terms.notices

    def _prompt_gate(self, text: str) -> None:
        """Nothing but the notice leaves before the prompt has passed, and no answer after it was flagged."""
        terms = self.terms
        if terms is None or not terms.prompts:
            return
        known = [one.text for one in self.scored]
        for scored in [self.passing("prompt"), *([known] if terms.speaks else ())]:
            prompts = map(_encodable, terms.prompts)
            if all(covered_whole(prompt, scored, terms.limit, terms.shared) for prompt in prompts):
                return
        prompt = terms.policies.prompt
        if not (self.failures and (prompt.on_error == "open" or prompt.observes)):
            self._find("left before the prompt had passed", text)

    def _conclude(self, *, unchecked: bool) -> None:
        """Unproven text is forgiven where the policy lets unscored text pass, a check failed, and the trace says so."""
        terms = self.terms
        if terms is None or self._over:
            return
        self._over = True
        answers = [terms.policies.at(stage) for stage in ("output", "repair", "reasoning")]
        opens = any(policy.on_error == "open" or policy.observes for policy in answers)
        if not (unchecked and opens and self.failures):
            for what, text in self._unproven:
                self._find(what, text)
        self._unproven.clear()
        self._look_for_flagged()

    def _look_for_flagged(self) -> None:
        parts: tuple[tuple[str, Stage], ...] = ((self.left, "output"), (self.thought, "reasoning"))
        for left, stage in parts:
            if self.terms is None or not left.strip():
                continue
            policy = self.terms.policies.at(stage)
            for one in self.scored:
                if one.text.strip() and one.text in left and not passes(one.verdict, policy):
                    self._find("a text that was flagged left", one.text)
                    return

    def _find(self, what: str, text: str) -> None:
        self.auditor.find(self.label, what, text)


@dataclass(eq=False)
class Hearing:
    """Hears moderators from ``__enter__`` to ``__exit__``, which raises what was found unless something else was.

    Attributes:
        findings: what left uncovered, a line each, with the first 80 characters.
        requests: calls that were audited.
        characters: of all text that they gave out.
        scored: every text that was scored.
        observed: answers that were flagged and left, marked, since their policy only observes.
        thoughtful: the requests that gave out thoughts.
    """

    findings: list[str] = field(default_factory=list)
    requests: int = 0
    characters: int = 0
    scored: list[ScoredText] = field(default_factory=list)
    observed: int = 0
    thoughtful: list[AuditedRequest] = field(default_factory=list)
    _terms: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary)
    _heard: dict[int, Any] = field(default_factory=dict)
    _named: dict[str, Any] = field(default_factory=dict)
    _types: set[type] = field(default_factory=set)
    _undo: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        if _open:
            raise RuntimeError("one auditor at a time: the one that is open hears everything")
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()
        _open.clear()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raises what was found so far, once.

        Raises:
            AuditError: something left uncovered.
        """
        found, self.findings = self.findings, []
        if found:
            raise AuditError("\n".join(["text left that no passing verdict covers:", *found]))

    def find(self, label: str, what: str, text: str) -> None:
        """Something left that should not have."""
        self.findings.append(f"{label}: {what}: {text[:_EXCERPT]!r}")

    def count(self, text: str) -> None:
        self.characters += len(text)

    def request(self, label: str, terms: Terms | None = None, *, whole: bool = False) -> AuditedRequest:
        """A new request, inside the one that is under way in this task."""
        self.requests += 1
        return AuditedRequest(self, label, terms, whole=whole)

    def passing(self, request: AuditedRequest) -> list[str]:
        """What passes the terms of ``request`` of all that was scored: for answers that come out of a cache."""
        policy = request.terms.policies.output if request.terms else Policy(threshold=0.0)
        return [one.text for one in self.scored if passes(one.verdict, policy)]

    def hear(self, moderator: Any, name: Any = None) -> None:
        """Listen to every call of this moderator, whoever makes it; ``name`` is what it was asked for by."""
        if isinstance(name, str):
            self._named[name] = moderator
        if id(moderator) in self._heard or not hasattr(moderator, "moderate"):
            return
        self._heard[id(moderator)] = moderator
        kind = type(moderator)
        if kind not in self._types:
            self._types.add(kind)
            self.replace(kind, "moderate", _heard_moderate)

    def replace(self, owner: Any, name: str, around: Callable[[Hearing, Any], Any]) -> None:
        """Put a listener around an attribute until the auditor is closed."""
        original = getattr(owner, name)
        own = vars(owner).get(name)
        setattr(owner, name, around(self, original))
        if own is None:
            self._undo.callback(delattr, owner, name)
        else:
            self._undo.callback(setattr, owner, name, own)

    def named(self, name: str) -> Any:
        """The moderator that was last made for this name; None if none was."""
        return self._named.get(name)

    def hears(self, moderator: Any) -> bool:
        """Whether it is one of those, or one of those that was told of a request."""
        origin = getattr(moderator, "origin", None)
        return id(moderator) in self._heard or (origin is not None and self.hears(origin))

    def keep_terms(self, owner: Any, terms: Any) -> None:
        self._terms[owner] = terms

    def terms_of(self, owner: Any) -> Any:
        return self._terms.get(owner)


def _encodable(text: str) -> str:
    """``text`` as it can be sent: without halves of surrogate pairs."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _heard_moderate(auditor: Hearing, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def moderate(self: Any, texts: Sequence[str], **more: Any) -> list[Verdict]:
        if not auditor.hears(self):
            verdicts: list[Verdict] = await original(self, texts, **more)
            return verdicts
        request, asked = _request.get(), list(texts)
        try:
            verdicts = await original(self, texts, **more)
        except Exception:
            if request is not None:
                request.fail()
            raise
        # Fewer or more verdicts than texts say nothing of any text.
        fit = len(verdicts) == len(asked)
        scored = [ScoredText(text, verdict) for text, verdict in zip(asked, verdicts, strict=False)] if fit else []
        auditor.scored += scored
        if request is not None:
            request.score(scored)
            if not fit:
                request.fail()
        return verdicts

    return moderate


async def heard(
    request: AuditedRequest,
    items: AsyncGenerator[T, None],
    take: Callable[[T], object],
    end: Callable[[], object] | None = None,
) -> AsyncGenerator[T, None]:
    """What ``items`` yields, shown to ``take`` first; it runs as a part of ``request``, its consumer does not."""
    try:
        async with aclosing(items):
            while True:
                with request.current():
                    try:
                        item = await anext(items)
                    except StopAsyncIteration:
                        request.ended()
                        return
                take(item)
                yield item
    finally:
        (end or request.end)()
