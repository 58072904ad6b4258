"""What is told of one answer: below the errors, which carry it; part of :mod:`tta_middleware.types` for all others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Outcome: TypeAlias = Literal["clean", "neutralised", "blocked", "unchecked", "unanswered"]


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """One checked text as the trace reports it.

    Attributes:
        score: the largest category score.
        category: the category that decided: the one furthest above, or least below, its threshold.
        usable: None where it was not measured.
        problems: why it is not usable.
        shadowed: categories at or above their threshold that the policy does not enforce.
    """

    score: float
    flagged: bool
    category: str = ""
    usable: bool | None = None
    problems: tuple[str, ...] = ()
    shadowed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepTrace:
    """One wave of a search: how many answers, and the moderation score of each."""

    scores: tuple[float, ...]
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class WindowScore:
    """One check of an answer while it came; positions are characters of the whole answer, or of all its thoughts.

    Attributes:
        end: where the window ends.
        score: the score of the category that decided; None where the moderator gave no verdict.
        category: the category that decided, as in :class:`AnswerScore`.
        limit: the score from which on that category is flagged, the policy's margin included.
        flagged: the answer ended here, and nothing behind ``released`` ever left.
        released: how far the text was free to leave once this was decided.
        repair: 0 for the model's own answer, n for what the n-th search chose.
        channel: whether a part of the answer or of the thoughts before it was checked.
    """

    end: int
    score: float | None
    category: str
    limit: float
    flagged: bool
    released: int
    repair: int = 0
    channel: Literal["answer", "reasoning"] = "answer"


@dataclass(frozen=True, slots=True)
class ReasoningTrace:
    """What became of a model's thoughts.

    Attributes:
        mode: ``show``, ``hide`` or ``off``, as asked for.
        tokens: that were thought, over all generations.
        checked: False where hidden thoughts were left unchecked by the policy.
        score: the first answer's thoughts as they were last scored; None if they were not.
        closed: ``flagged`` or ``too long`` where the guard ended a thought and had the model answer; empty elsewhere.
    """

    mode: str
    tokens: int
    checked: bool
    score: AnswerScore | None = None
    closed: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened to one answer; plain data, without any prompt or answer text.

    Attributes:
        outcome: ``clean``: the model's own answer was safe. ``neutralised``: another answer of it is safe and usable.
            ``blocked``: the fallback stands in. ``unchecked``: nothing could be scored and the policy let it pass.
            ``unanswered``: the model thought until its tokens were used up, or ended there, so there is no answer.
        stop_reason: why the work ended, such as ``clean``, ``neutralised``, ``optimiser: ...``,
            ``budget: generations``, ``moderator: ...``.
        seconds: what the answer took, from its prompt to its decision; loading the model is not part of it.
        load_seconds: how long the answer waited before that for the model to be loaded; 0 once it is.
        cosine: cosine between the moved and the original user rows, each set flattened; 1 if unmoved.
        relative_move: Frobenius norm of the move over that of the original user rows.
        decodes_to_original: whether every row's nearest token embedding (by cosine) is still its own token.
        repairs: searches that were run; more than one if a repair was flagged in turn after part of it had left.
        seam: characters that had left before the last repair began; they stay, and the repair goes on from them.
        move: the kind of move that gave the answer, in the method's own words; empty for the model's own answer.
        mode: ``observe`` if the policy withholds nothing, in some stage at least; then a text that is flagged leaves.
        observed: what would have been withheld but for that: stage and category, such as ``output: violence``.
        windows: every check of the model's own answer, then those of the candidates that searches chose, in the order
            of the text.
        reasoning: what became of the model's thoughts; None where it had none.
    """

    method: str
    outcome: Outcome
    stop_reason: str
    baseline: AnswerScore | None
    final: AnswerScore | None
    generations: int
    generated_tokens: int
    moderation_calls: int
    seconds: float
    steps: tuple[StepTrace, ...] = ()
    cosine: float = 1.0
    relative_move: float = 0.0
    decodes_to_original: bool = True
    seed: int = 0
    moderator: str = ""
    model: str = ""
    repairs: int = 0
    seam: int = 0
    move: str = ""
    load_seconds: float = 0.0
    windows: tuple[WindowScore, ...] = ()
    reasoning: ReasoningTrace | None = None
    mode: Literal["enforce", "observe"] = "enforce"
    observed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data."""
        return asdict(self)


_NO_VERDICT = "moderator: "


def no_verdict(error: BaseException | None) -> str:
    """A trace's reason where the moderator failed: the kind of error alone, since its words may quote the text."""
    return f"{_NO_VERDICT}{type(error).__name__}"


def not_checked(stop_reason: str) -> str:
    """What is said of an answer that was withheld for want of a verdict, by its trace's reason; empty for others."""
    if not stop_reason.startswith(_NO_VERDICT):
        return ""
    return f"the answer could not be checked and was withheld ({stop_reason}); see to the moderator"
