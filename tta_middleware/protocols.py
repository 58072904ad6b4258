"""The whole contract between the parts, on one page.

An implementation needs no base class: these are structural types. Every method may be called from any event
loop and from several at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tta_middleware.types import (
    Completion,
    FloatMatrix,
    GenerationRequest,
    IntVector,
    Message,
    ModerationContext,
    PromptEmbeddings,
    Proposal,
    QualityReport,
    TextDelta,
    ToolFormat,
    Verdict,
)


@runtime_checkable
class Engine(Protocol):
    """A language model that decodes from input embeddings."""

    model_id: str

    async def load(self) -> None:
        """Load what answering needs, if that is still to be done; idempotent. :meth:`embed` does it by itself.

        A guard awaits it before an answer's clock starts, so that loading is not charged to the first answer.

        Raises:
            ConfigurationError, EngineError: the model cannot be loaded.
        """
        ...

    async def embed(
        self, messages: Sequence[Message], *, assistant_prefix: str = "", tools: Sequence[Mapping[str, Any]] = ()
    ) -> PromptEmbeddings:
        """Render the chat template and look the tokens up; T x d rows, mask on the last user turn.

        ``assistant_prefix`` is text the answer already begins with; its rows are never in the mask. ``tools`` are
        descriptions in OpenAI's form; callers leave the argument out when there are none. Engines of models that think
        take two more, see :class:`ReasoningEngine`.

        Raises:
            EmptyPromptError: no message holds user text.
            ConfigurationError: the model takes no tools.
        """
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """Decode one sequence; closing the generator stops decoding within one step.

        Raises:
            EngineError: it failed; the message quotes no text. A guard judges the words of any other error before it
                lets it out.
        """
        ...

    def stream_batch(self, requests: Sequence[GenerationRequest]) -> list[AsyncGenerator[TextDelta, None]]:
        """One stream per request, decoded side by side from the first one's start on.

        Each is closed or has its ``abort`` set in the end, those that were never started included.
        """
        ...

    async def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Decode sequences side by side; answers come in the order of the requests.

        A request whose ``abort`` is set leaves the batch within one step with ``finish_reason="aborted"``.
        """
        ...

    async def mean_nll(self, prompt: PromptEmbeddings, completions: Sequence[Sequence[int]]) -> list[float]:
        """Mean negative log-likelihood in nats per token of each completion after ``prompt``; NaN if empty."""
        ...

    async def nearest_tokens(self, rows: FloatMatrix) -> IntVector:
        """For (n, d) rows, the (n,) ids of the vocabulary's nearest embeddings by cosine."""
        ...

    async def directions(self, words: Sequence[str]) -> FloatMatrix:
        """(n, d) rows of length 1: each word's mean token embedding less the mean of the model's whole table.

        Raises:
            ConfigurationError: a word is blank.
        """
        ...

    async def aclose(self) -> None:
        """Stop decoding and free the model; idempotent."""
        ...


@runtime_checkable
class ToolEngine(Protocol):
    """What an engine offers besides when its model may call tools."""

    async def tool_format(self) -> ToolFormat:
        """How the model writes a tool call.

        Raises:
            ConfigurationError: the model takes no tools, or writes calls in a form that is not known.
        """
        ...


@runtime_checkable
class ReasoningEngine(Protocol):
    """What an engine offers besides when its model may think before it answers.

    Its deltas and completions tell thoughts from the answer. Its ``embed`` takes two more keyword arguments, which
    callers leave out when they say nothing: ``thought`` (:class:`~tta_middleware.types.Thought`), with which the answer
    begins, before ``assistant_prefix``; and ``template``, arguments of the chat template such as ``enable_thinking``.
    It raises ConfigurationError for an argument that the template does not read.
    """

    async def thinks(self) -> bool:
        """Whether the model marks thoughts in a way that is known, so that ``thought`` may be given."""
        ...

    async def close_thought(self, prompt: PromptEmbeddings, token_ids: Sequence[int]) -> PromptEmbeddings:
        """``prompt`` with the first tokens of an answer to it, which end inside a thought, and the mark that closes it.

        Raises:
            ConfigurationError: the prompt fills the context then.
        """
        ...


@runtime_checkable
class SharesPlaces(Protocol):
    """What an engine offers besides that decodes a limited number of sequences side by side."""

    def free_places(self) -> int:
        """How many more would be decoded at once if they came now."""
        ...


@runtime_checkable
class TokenCounter(Protocol):
    """What an engine offers besides when callers may ask how long a text or a conversation is for its model."""

    async def token_ids(self, text: str) -> list[int]:
        """The tokens of a text by itself, without any that a template or a tokenizer adds."""
        ...

    async def count_prompt(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of the prompt that :meth:`Engine.embed` gives, its template included.

        Other than there, a conversation may be longer than the model's context, or a part of one without user text.
        """
        ...


@runtime_checkable
class Moderator(Protocol):
    """A black box that scores texts.

    Further attributes are optional. ``max_characters`` is the longest text that it takes: longer ones are handed over
    in parts that overlap by ``overlap`` characters (:mod:`tta_middleware.policy.verdicts`). ``categories`` are those
    that it scores; a policy with a threshold for another one is refused (:mod:`tta_middleware.policy.coverage`).
    ``under(policies)`` gives the moderator for the thresholds in force, where these matter to it.
    ``async load()`` loads what scoring needs and raises what would make every text fail, such as a key that is missing.
    ``undisguises`` is true for one that judges disguised texts by what they say itself, so nobody does it around it.
    ``grows`` is true for one to which a growing text costs only what is new, so that windows of a stream bring it all
    the text before them. One that is a :class:`ContextModerator` is told more of a request than its texts.
    """

    name: str
    default_threshold: float

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        """One verdict per text, in order; ``prompt`` is what the texts answer, for moderators that read it.

        Raises:
            ModerationError: any text could not be scored; the message quotes none. A text is never passed for want of a
                score.
        """
        ...

    async def aclose(self) -> None:
        """Release sockets; idempotent."""
        ...


@runtime_checkable
class ContextModerator(Moderator, Protocol):
    """A moderator that wants to know what texts are, and what of them is not allowed.

    Attributes:
        reads_rules: whether it judges by :attr:`~tta_middleware.types.ModerationContext.rules`. A policy with rules is
            refused where nobody does.
    """

    reads_rules: bool

    def in_context(self, context: ModerationContext) -> Moderator:
        """The same moderator, told of ``context``. It is not closed; what it keeps goes with the context's scope."""
        ...


@runtime_checkable
class Quality(Protocol):
    """Judges whether answers are usable."""

    async def assess(
        self, engine: Engine, prompt: PromptEmbeddings, completions: Sequence[Completion]
    ) -> list[QualityReport]:
        """One report per completion; ``prompt`` is the unmoved prompt, whose ``assistant_prefix`` they go on from.

        An answer that goes on from a bridge has its words at its beginning until it is over, and then no more.
        """
        ...


@runtime_checkable
class Optimiser(Protocol):
    """Ask/tell search over prompt embeddings; pure and seeded, no model and no I/O."""

    name: str

    def ask(self, limit: int) -> list[Proposal]:
        """At most ``limit`` points to evaluate next; at least one unless :meth:`stop` gives a reason."""
        ...

    def tell(self, proposals: Sequence[Proposal], losses: Sequence[float]) -> None:
        """Report losses (lower is better, negative is safe) of points that :meth:`ask` gave, in any grouping."""
        ...

    def stop(self) -> tuple[str, ...]:
        """Why the search is over by its own rule; empty while it goes on."""
        ...
