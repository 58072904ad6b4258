"""Tells what happened to an answer."""

from __future__ import annotations

from collections.abc import Iterator

from tta_middleware.batch.records import as_record
from tta_middleware.batch.standard import emit, note
from tta_middleware.cli.output import facts, say
from tta_middleware.trace import not_checked
from tta_middleware.types import AnswerScore, GuardedAnswer, ReasoningTrace, Trace, WindowScore

_OUTCOMES = {
    "clean": "clean: the model's own answer",
    "neutralised": "neutralised: the model's answer was flagged and replaced by a safe one of its own",
    "blocked": "blocked: the notice stands in for the answer",
    "unchecked": "unchecked: the answer could not be scored and the policy let it pass",
    "unanswered": "unanswered: the model thought and never answered; raise --max-new-tokens, or give "
    "--max-reasoning-tokens",
}

_SHOWN = 12
"""Lines for the waves of a repair; of more the middle ones are left out, so that the outcome stays in sight."""

_LONG_LOAD = 0.05
"""Seconds of loading that are worth a line."""


def show(answer: GuardedAnswer, *, as_json: bool, verbose: bool) -> None:
    """The answer on stdout and, for people, its story on stderr."""
    if as_json:
        emit(as_record(answer))
        return
    if answer.reasoning:
        note(answer.reasoning)
    say(answer.text)
    facts(story(answer.trace, verbose=verbose))


def remark(trace: Trace) -> str:
    """A few words on an answer that is not simply the model's own; empty for one that is."""
    if trace.outcome == "clean":
        return ""
    if trace.outcome == "neutralised":
        return f"repaired: score {_scores(trace)}"
    return f"{trace.outcome} ({trace.stop_reason})"


def story(trace: Trace, *, verbose: bool) -> Iterator[tuple[str, str]]:
    """What happened to an answer: names and values. ``verbose`` has every wave and every window."""
    yield "outcome", _OUTCOMES[trace.outcome]
    if trace.outcome != "clean":
        yield "method", f"{trace.method} ({trace.stop_reason})"
    yield "score", _scores(trace)
    yield (
        "work",
        (
            f"{trace.generations} generations, {trace.generated_tokens} tokens, "
            f"{trace.moderation_calls} moderation calls, {trace.seconds:.1f} s"
        ),
    )
    if trace.reasoning is not None:
        yield "thoughts", _thoughts(trace.reasoning)
    if trace.load_seconds >= _LONG_LOAD:
        yield "loading", f"{trace.load_seconds:.1f} s before that, once"
    if trace.outcome == "neutralised":
        yield "move", _move(trace)
    if trace.outcome == "blocked" and not_checked(trace.stop_reason):
        yield "hint", "the moderator gave no verdict, so nothing may be shown; see: tta doctor --online"
    if verbose:
        yield from _waves(trace)
        yield from _windows(trace)
        yield "parts", f"model {trace.model}, moderator {trace.moderator}, seed {trace.seed}"


def _thoughts(thought: ReasoningTrace) -> str:
    done = {"show": "shown", "hide": "hidden", "off": "not asked for"}[thought.mode]
    closed = {"flagged": ", flagged and closed", "too long": ", too long and closed"}.get(thought.closed, "")
    return f"{thought.tokens} tokens, {done}{closed}{'' if thought.checked else ', unchecked by policy'}"


def _scores(trace: Trace) -> str:
    if trace.baseline is None:
        return "none: the answer could not be scored"
    if trace.outcome == "clean" or trace.final is None:
        return _score(trace.baseline)
    return f"{_score(trace.baseline)} before, {_score(trace.final)} after"


def _score(score: AnswerScore) -> str:
    words = [f"flagged: {score.category}" if score.flagged else "safe"]
    if score.usable is not None:
        words.append("usable" if score.usable else f"not usable: {', '.join(score.problems)}")
    return f"{score.score:.3f} ({', '.join(words)})"


def _move(trace: Trace) -> str:
    kept = "still decodes" if trace.decodes_to_original else "no longer decodes"
    size = f"cosine {trace.cosine:.2f}, relative norm {trace.relative_move:.2f}"
    return f"{trace.move or trace.method}: {size}; the prompt {kept} to its own words"


def _waves(trace: Trace) -> Iterator[tuple[str, str]]:
    for number, step in enumerate(trace.steps, start=1):
        if _SHOWN <= number < len(trace.steps):
            if number == _SHOWN:
                yield "...", f"{len(trace.steps) - _SHOWN} waves more, before the last"
            continue
        yield f"wave {number}", " ".join(f"{score:.3f}" for score in step.scores)


def _windows(trace: Trace) -> Iterator[tuple[str, str]]:
    for repair in sorted({window.repair for window in trace.windows}):
        checks = [_window(window) for window in trace.windows if window.repair == repair]
        yield (f"repair {repair}" if repair else "checked"), ", ".join(checks)


def _window(window: WindowScore) -> str:
    score = "no verdict" if window.score is None else f"{window.score:.3f}"
    flagged = f" ({window.category}, {window.released} had left)" if window.flagged else ""
    return f"{score} up to {window.end}{flagged}"
