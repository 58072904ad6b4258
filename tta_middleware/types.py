"""Frozen value objects that every layer shares.

Nothing here does I/O, and nothing here imports torch: embedding matrices cross the seams as float32 numpy
arrays (docs/decisions/001-numpy-at-the-seams.md).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tta_middleware.errors import ConfigurationError, EmbeddingShapeError, InvalidVerdictError
from tta_middleware.trace import AnswerScore as AnswerScore
from tta_middleware.trace import Outcome as Outcome
from tta_middleware.trace import ReasoningTrace as ReasoningTrace
from tta_middleware.trace import StepTrace as StepTrace
from tta_middleware.trace import Trace as Trace
from tta_middleware.trace import WindowScore as WindowScore

FloatMatrix: TypeAlias = NDArray[np.float32]
IntVector: TypeAlias = NDArray[np.int64]
BoolVector: TypeAlias = NDArray[np.bool_]
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
FinishReason: TypeAlias = Literal["stop", "length", "aborted"]
Channel: TypeAlias = Literal["answer", "reasoning"]
"""What a text of a model's is: meant for the user, or a thought before it."""

AnswerState: TypeAlias = Literal["before", "open", "inside", "closed", "said"]
"""Where an answer stands: ``before`` anything, behind the mark of a thought (``open``), ``inside`` one, behind it
(``closed``), or behind words of the answer (``said``)."""

SEAM = "\n\n"
"""Between what has left of an answer and what stands in for the rest."""

ToolFormat: TypeAlias = Literal[
    "hermes",
    "llama",
    "mistral",
    "mistral_v11",
    "qwen3_coder",
    "seed_oss",
    "glm45",
    "minimax_m2",
    "deepseek_v3",
    "deepseek_v31",
    "kimi_k2",
    "gemma4",
    "harmony",
    "apriel",
]
"""How a model writes a tool call; :data:`tta_middleware.tool_forms.TOOL_FORMS` describes each."""

CATEGORIES: tuple[str, ...] = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""The category names of the OpenAI moderation API, in alphabetical order."""


def valid_text(text: str) -> str:
    """The text with U+FFFD in place of every lone surrogate, which no encoding, tokenizer or API takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # By UTF-16, so that two halves of one character find each other.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def valid_value(value: Any) -> Any:
    """As :func:`valid_text`, for every text in a plain value; the same object where nothing is replaced."""
    match value:
        case str():
            return valid_text(value)
        case Mapping():
            made: Any = {valid_value(key): valid_value(item) for key, item in value.items()}
        case list() | tuple():
            made = type(value)(map(valid_value, value))
        case _:
            return value
    return value if made == value else made


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, as an assistant turn asked for it; its texts are made valid as those of a message."""

    name: str
    arguments: Mapping[str, Any] = field(hash=False)
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "arguments", "id"):
            object.__setattr__(self, name, valid_value(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. Lone surrogates in its texts become U+FFFD.

    Attributes:
        tool_calls: what an assistant turn asked for, besides its text.
        reasoning: what an assistant turn thought before it, for chat templates that want to be told.
        name: the tool that a tool turn is the result of.
        tool_call_id: the call that a tool turn is the result of.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str = ""

    def __post_init__(self) -> None:
        for name in ("content", "name", "tool_call_id", "reasoning"):
            object.__setattr__(self, name, valid_value(getattr(self, name)))


def as_asked(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation; where no user says anything, a user says the last instruction, as OpenAI's API has it."""
    last = max((at for at, message in enumerate(messages) if message.role == "system"), default=None)
    if last is None or any(message.role == "user" for message in messages):
        return messages
    return [*messages[:last], replace(messages[last], role="user"), *messages[last + 1 :]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a moderator says of one text: a score in [0, 1] per category.

    ``flagged`` is the moderator's own opinion. Policies decide on ``scores``, because the OpenAI API flags at
    internal thresholds that differ between categories.

    Raises:
        InvalidVerdictError: a score is missing, not finite, or outside [0, 1].
    """

    scores: Mapping[str, float]
    flagged: bool
    model: str

    def __post_init__(self) -> None:
        if not self.scores:
            raise InvalidVerdictError(f"moderator {self.model!r} returned no category scores")
        scores: Mapping[str, Any] = self.scores
        for category, score in scores.items():
            is_number = isinstance(score, Real)
            # Compared as it is: a whole number may be too large for a float, and even to be written out.
            if not (is_number and 0 <= score <= 1):
                what = repr(float(score)) if isinstance(score, float) else f"a {type(score).__name__}"
                raise InvalidVerdictError(
                    f"moderator {self.model!r} scored {category!r} as {what}; scores must lie in [0, 1]"
                )

    @property
    def score(self) -> float:
        """The largest category score: h(y) of the paper (arXiv 2604.26167)."""
        return max(self.scores.values())

    @property
    def top_category(self) -> str:
        """The category with the largest score; the first by name on a tie."""
        return min(self.scores, key=lambda name: (-self.scores[name], name))


def stricter(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict on what has several, at least one: the highest score of each category."""
    if len(verdicts) == 1:
        return verdicts[0]
    names = {name: None for verdict in verdicts for name in verdict.scores}
    scores = {name: max(verdict.scores.get(name, 0.0) for verdict in verdicts) for name in names}
    return Verdict(scores, any(verdict.flagged for verdict in verdicts), verdicts[0].model)


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbeddings:
    """A prompt as the model sees it: one embedding row per token.

    Attributes:
        matrix: (T, d) float32 input embeddings.
        token_ids: (T,) int64 ids of the tokens the unmoved rows stand for.
        user_mask: (T,) bool, True on the content tokens of the last user turn: the rows a repair may move.
        assistant_prefix: the text that an answer to it goes on from, as the guard asked for it; its rows are the last.
        ends: where in an answer the prompt ends, for models that think.

    Raises:
        EmbeddingShapeError: the three arrays do not describe the same T tokens.
    """

    matrix: FloatMatrix
    token_ids: IntVector
    user_mask: BoolVector
    assistant_prefix: str = ""
    ends: AnswerState = "before"

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise EmbeddingShapeError(f"prompt embeddings must be a T x d matrix, not {self.matrix.shape}")
        length = self.matrix.shape[0]
        if self.token_ids.shape != (length,) or self.user_mask.shape != (length,):
            raise EmbeddingShapeError(
                f"{length} embedding rows need as many token ids and mask entries, not "
                f"{self.token_ids.shape} and {self.user_mask.shape}"
            )

    def moved(self, matrix: FloatMatrix) -> PromptEmbeddings:
        """The same prompt at another point of embedding space.

        Raises:
            EmbeddingShapeError: ``matrix`` has not the shape of this prompt's matrix.
        """
        if matrix.shape != self.matrix.shape:
            raise EmbeddingShapeError(f"cannot move a {self.matrix.shape} prompt to {matrix.shape} embeddings")
        return replace(self, matrix=matrix)


_tickets = itertools.count()


def next_ticket() -> int:
    """A number that tells a request from others and is higher than all before it; thread-safe."""
    return next(_tickets)


class RequestScope:
    """One request's life, for parts that keep something for it; used in one event loop.

    Attributes:
        owner: a number that no other request has (:func:`next_ticket`).
        closed: whether the request is over.
    """

    __slots__ = ("_at_end", "closed", "owner")

    def __init__(self) -> None:
        self.owner = next_ticket()
        self.closed = False
        self._at_end: dict[Hashable, Callable[[], object]] = {}

    def at_end(self, key: Hashable, let_go: Callable[[], object]) -> None:
        """Have ``let_go`` called when the request is over; once for a ``key``."""
        self._at_end[key] = let_go

    def close(self) -> None:
        """The request is over; idempotent."""
        self.closed = True
        while self._at_end:
            self._at_end.popitem()[1]()


Subject: TypeAlias = Literal["answer", "prompt", "tool result"]
"""What a text is that a moderator is asked about."""


@dataclass(frozen=True, slots=True)
class ModerationContext:
    """What moderators are told besides the texts, those that ask for it.

    Attributes:
        subject: what the texts are.
        rules: what is not allowed, in the operator's words; empty for nothing besides what the moderator knows.
        least: the lowest score that decides anything, in [0, 1]; None is not known. Of texts below it nobody asks which
            kind of harm they hold.
        kinds: the categories that are decided on by themselves, by a threshold of their own or as shadows.
        conversation: the turns before the texts.
        scope: the request that they belong to; None for none.
    """

    subject: Subject = "answer"
    rules: str = ""
    least: float | None = None
    kinds: tuple[str, ...] = ()
    conversation: tuple[Message, ...] = ()
    scope: RequestScope | None = None

    @property
    def key(self) -> str:
        """Equal where equal texts get equal verdicts: a hash of all but the scope."""
        parts = (
            self.subject,
            self.rules,
            repr((self.least, self.kinds)),
            *(repr(message) for message in self.conversation),
        )
        return hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()[:32]


class AbortSignal:
    """A one-way, thread-safe flag: once set, the engine drops the sequence within one decode step."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()


def stop_strings(value: str | Sequence[str]) -> tuple[str, ...]:
    """One string, or several, as a tuple; a string's letters are no stop strings."""
    return (value,) if isinstance(value, str) else tuple(value)


_NUMBERS: Mapping[str, type] = {"max_new_tokens": Integral, "temperature": Real, "top_p": Real, "seed": Integral}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence is decoded.

    Attributes:
        max_new_tokens: upper bound on generated tokens, at least 1.
        temperature: 0 means greedy.
        top_p: nucleus mass in (0, 1].
        seed: makes a sampled sequence reproducible, whatever else is in its batch.
        stop: the text ends before the first of these strings; one string stands for itself.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", stop_strings(self.stop))
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ConfigurationError(f"{name} takes a number, not {type(value).__name__}")
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ConfigurationError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigurationError(f"top_p must lie in (0, 1], not {self.top_p}")
        if "" in self.stop:
            raise ConfigurationError("a stop string must not be empty")

    def apart(self, name: str) -> Sampling:
        """The same with draws of its own, for one of many prompts under one seed.

        Under the same draws, where prompts have much the same probabilities for a first word, one lucky draw is one
        for all of them. Seeds are of 31 bits, and those of names lie apart, since the answers of one search take
        consecutive ones.
        """
        mixed = hashlib.blake2b(f"{self.seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=4).digest()
        return replace(self, seed=int.from_bytes(mixed) >> 1)


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One sequence to decode.

    Sequences with the same ``ticket`` (:func:`next_ticket`) belong to one user's request and share its turn where
    places are few; a lower one came earlier. Without a ticket the sequences of one call share one.

    ``patience`` is for engines with a queue of their own: how many of the sequences that are asked for later may have a
    place first, as a share of those that wait already; below 0, how many of the latter it should go before.
    """

    prompt: PromptEmbeddings
    sampling: Sampling
    abort: AbortSignal = field(default_factory=AbortSignal)
    ticket: int | None = None
    patience: float = 0.0


@dataclass(frozen=True, slots=True)
class Thought:
    """How an answer begins: with a thought that is there already, empty for none.

    ``closed``: its mark stands behind it, and the answer comes next; otherwise the model goes on thinking.
    """

    text: str = ""
    closed: bool = True


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of a streaming answer, or of the thoughts before it.

    ``text`` never ends inside a multi-byte character and never holds part of a stop string. The last delta
    of a stream, and only that one, carries ``finish_reason``; its ``text`` may be empty. The tokens that mark a thought
    belong to it and give no text.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    channel: Channel = "answer"


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished sequence: its text, without stop strings and special tokens, and all generated ids.

    Attributes:
        reasoning: what was thought before and within the answer.
        lead: how many of the ids come before the answer's first text; 0 without thoughts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    reasoning: str = ""
    lead: int = 0


@dataclass(slots=True)
class Collected:
    """What has come of a sequence so far."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    lead: int = 0
    reasoning_tokens: int = 0

    def add(self, delta: TextDelta) -> None:
        """The next piece."""
        if delta.channel == "reasoning":
            self.reasoning += delta.text
            self.reasoning_tokens += len(delta.token_ids)
        else:
            if not self.text and delta.text and self.reasoning_tokens:
                self.lead = len(self.token_ids)
            self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason or self.finish_reason

    @property
    def thoughts_only(self) -> bool:
        """Whether nothing came but thoughts."""
        return self.reasoning_tokens > 0 and not self.text.strip()

    @property
    def completion(self) -> Completion:
        return Completion(self.text, tuple(self.token_ids), self.finish_reason or "aborted", self.reasoning, self.lead)


@dataclass(frozen=True, slots=True)
class QualityReport:
    """Whether an answer is usable, and if not, why (docs/concepts.md).

    Attributes:
        problems: names of the checks that failed, empty when the answer is usable.
        nll: mean negative log-likelihood per token (nats) under the unmoved prompt; None if not measured.
    """

    problems: tuple[str, ...] = ()
    nll: float | None = None

    @property
    def usable(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A point that an optimiser wants evaluated.

    Attributes:
        matrix: (T, d) float32 embeddings to generate from.
        releasable: False marks a probe that only feeds a gradient; its answer is never given out.
        temperature: overrides the request's sampling temperature when set.
        prompt: the prompt whose rows ``matrix`` moves, where that is not the question itself (one with a
            self-reminder, say).
        opening: text that the answer begins with, which stands at the end of ``prompt`` already: the bridge from what
            has left to what follows.
        whole: decode to the end even if the answer's beginning is flagged already, as a gradient's probes need.
        label: what kind of move this is, for the trace; the method's name where it has one kind only.
    """

    matrix: FloatMatrix
    releasable: bool = True
    temperature: float | None = None
    prompt: PromptEmbeddings | None = None
    opening: str = ""
    whole: bool = False
    label: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A proposal with the answer it gave and the verdict on exactly that text."""

    proposal: Proposal
    completion: Completion
    verdict: Verdict
    quality: QualityReport | None = None


@dataclass(frozen=True, slots=True)
class GuardedAnswer:
    """The text that may be shown, and the trace of how it came to be.

    ``finish_reason`` is ``content_filter`` when the text is, or ends with, the policy's notice or the fallback's text
    instead of the model's. There is none for an answer that its engine broke off: that is an
    :class:`~tta_middleware.errors.EngineError`, since a part must not pass for the whole. ``reasoning`` is what may be
    shown of the model's thoughts, empty where they are hidden.
    """

    text: str
    finish_reason: Literal["stop", "length", "content_filter"]
    trace: Trace
    prompt_tokens: int
    reasoning: str = ""


Messages: TypeAlias = Sequence[Message]
