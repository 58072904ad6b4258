"""Every name that telemetry uses, with what it means: what docs/telemetry.md lists and dashboards ask for.

Names under ``gen_ai.`` are OpenTelemetry's for generative AI, which have no release yet; those under ``tta.`` are ours.
They have one version together, :data:`FORMAT_VERSION`: a name that goes or changes its meaning raises its first number,
a new one its second. The version of the package says nothing about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

FORMAT_VERSION = "1.1"
SCOPE = "tta_middleware"

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
ERROR = "error.type"
POLICY = "tta.policy"
OUTCOME = "tta.outcome"
MODE = "tta.mode"
MODERATOR = "tta.moderator"
STAGE = "tta.moderation.stage"
CATEGORY = "tta.category"
DROPPED = "tta.cancelled"
GATE = "tta.gate"
TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105 - the name of an attribute

ANSWER: Mapping[str, str] = {
    OPERATION: "`chat`",
    PROVIDER: (
        "`tta_middleware`; of an upstream `openai`, whose protocol it speaks; of an inner model LangChain's name; of a "
        "stream that `moderated` checks `unknown`"
    ),
    REQUEST_MODEL: (
        "the name that clients use; without a server the model's own; of `moderated` what its argument `model` says"
    ),
    RESPONSE_MODEL: "the model's own name",
    "gen_ai.request.max_tokens": "most tokens of an answer",
    "gen_ai.request.temperature": "0 is greedy",
    "gen_ai.request.top_p": "nucleus mass",
    "gen_ai.request.seed": "of the first answer and of the repair",
    "gen_ai.request.stream": "text leaves as it is checked, not all of it at the end",
    "gen_ai.response.finish_reasons": "one of `stop`, `length`, `content_filter`",
    "gen_ai.response.time_to_first_chunk": "seconds until the first checked text left; of streams",
    "gen_ai.usage.input_tokens": "tokens of the prompt",
    "gen_ai.usage.output_tokens": "every token that was decoded, those of a repair included",
    "gen_ai.input.messages": "the conversation as JSON; only with `capture_content`",
    "gen_ai.output.messages": "what left, as JSON; only with `capture_content`",
    ERROR: "the error's class, or `cancelled`; not set by a block, which is an answer",
    "tta.format.version": "the version of these names",
    POLICY: "what the operator calls the policy; of a server",
    OUTCOME: "`clean`, `neutralised`, `blocked`, `unchecked` or `unanswered`",
    MODE: "`enforce`, or `observe` where the policy withholds nothing",
    "tta.observed": "what would have been withheld but for that: stages and categories",
    "tta.stop_reason": "why the work ended",
    MODERATOR: "who scores",
    "tta.method": "how a flagged answer is repaired",
    "tta.generations": "answers that were begun, the first one included",
    "tta.moderation_calls": "requests to the moderator",
    "tta.repairs": "searches that were run",
    "tta.seam": "characters that had left before the last repair began",
    "tta.move": "the kind of move that gave the answer",
    "tta.cosine": "between the moved and the original user rows",
    "tta.first.score": "the largest score of the model's first answer",
    "tta.first.category": "the category that decided on it",
    "tta.first.flagged": "whether it was flagged",
    "tta.final.score": "the largest score of what was given out",
    "tta.reasoning.tokens": "those of the output that were thought",
    "tta.load_seconds": "how long the answer waited for the model to be loaded",
}
"""Of the span ``chat {model}``."""

MODERATION: Mapping[str, str] = {
    MODERATOR: "who was asked",
    STAGE: "`prompt`, `output`, `reasoning`, `repair`, `fallback`, `tool_result`, or `text` (`/v1/moderations`)",
    "tta.score": "the largest score",
    "tta.flagged": "whether the policy flags it",
    CATEGORY: "the category that decided",
    DROPPED: "true where nobody needed it any more before it was there",
    ERROR: "why there is no verdict: the error's class",
}
"""Of the span ``moderate {moderator}``, a child of the answer or of a wave; outside of answers of what is current."""

WAVE: Mapping[str, str] = {
    "tta.wave.moves": "the kinds of move that were tried side by side",
    "tta.wave.scores": "the newest score of each candidate that has one",
    "tta.wave.generated_tokens": "tokens decoded for them",
    DROPPED: "true where the budget of seconds or the request ended before it was over",
    ERROR: "the error's class",
}
"""Of the span ``repair wave``, a child of the answer."""

EVALUATION: Mapping[str, str] = {
    "gen_ai.evaluation.name": "`moderation`",
    "gen_ai.evaluation.score.value": "the largest score",
    "gen_ai.evaluation.score.label": (
        "`passed`, `doubtful` (held for the next verdict), `flagged`, or `observed` (flagged, not enforced)"
    ),
    CATEGORY: "the category that decided",
    STAGE: "as above",
    "tta.window.end": "characters of the answer up to the window's end; of answers that are checked while they come",
}
"""Of the event ``gen_ai.evaluation.result``, one for each verdict, on the span that the check is a child of."""

REQUEST: Mapping[str, str] = {
    "http.request.method": "the method",
    "http.route": "the path as the server knows it",
    "url.path": "the path as it came",
    "url.scheme": "`http`, or what a proxy says",
    "http.response.status_code": "the status, once there is one",
    "tta.request.id": "the one in `x-request-id` and in the log",
    ERROR: (
        "the status from 500 on, the error of a broken stream, `disconnected`, or `cancelled` where the server broke "
        "it off"
    ),
}
"""Of the server's span ``{method} {route}``, which goes on from the client's ``traceparent``."""

EVALUATION_EVENT = "gen_ai.evaluation.result"

Kind: TypeAlias = Literal["counter", "histogram", "gauge"]

_ANSWERS = (OPERATION, PROVIDER, REQUEST_MODEL, POLICY, MODE, OUTCOME)


@dataclass(frozen=True, slots=True)
class Metric:
    """One instrument.

    Attributes:
        attributes: what its points may be told apart by; each takes few values.
        buckets: upper bounds of a histogram's buckets.
        server: only ``tta serve`` and applications of its kind have it.
    """

    kind: Kind
    unit: str
    about: str
    attributes: tuple[str, ...]
    buckets: tuple[float, ...] = ()
    server: bool = False


_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FINE_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

DURATION = "gen_ai.client.operation.duration"
FIRST_CHUNK = "gen_ai.client.operation.time_to_first_chunk"
TOKENS = "gen_ai.client.token.usage"
ANSWERS = "tta.answers"
FLAGGED = "tta.answers.flagged"
REPAIR_GENERATIONS = "tta.repair.generations"
MODERATION_DURATION = "tta.moderation.duration"
BREAKER = "tta.moderation.breaker.state"
REQUEST_DURATION = "http.server.request.duration"
ACTIVE = "tta.server.active"
WAITING = "tta.server.waiting"

METRICS: Mapping[str, Metric] = {
    DURATION: Metric(
        "histogram", "s", "time of an answer, loading and the consumer's pace included", (*_ANSWERS, ERROR), _SECONDS
    ),
    FIRST_CHUNK: Metric(
        "histogram", "s", "time until the first checked text of a stream left", _ANSWERS, _FINE_SECONDS
    ),
    TOKENS: Metric(
        "histogram",
        "{token}",
        "tokens of an answer, by `gen_ai.token.type`: `input` or `output`",
        (*_ANSWERS, TOKEN_TYPE),
        tuple(4.0**power for power in range(11)),
    ),
    ANSWERS: Metric(
        "counter",
        "{answer}",
        "answers by outcome: those of the trace, or `failed` or `cancelled` where there is none",
        (*_ANSWERS, ERROR),
    ),
    FLAGGED: Metric(
        "counter",
        "{answer}",
        "answers whose prompt, first thoughts or first text were flagged",
        (*_ANSWERS, STAGE, CATEGORY),
    ),
    REPAIR_GENERATIONS: Metric(
        "histogram",
        "{generation}",
        "answers that were begun for a repair",
        _ANSWERS,
        (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0),
    ),
    MODERATION_DURATION: Metric(
        "histogram",
        "s",
        "time of a request to the moderator, its retries included",
        (MODERATOR, STAGE, ERROR),
        _FINE_SECONDS,
    ),
    BREAKER: Metric("gauge", "{state}", "circuit breaker: 0 closed, 1 half-open, 2 open", (MODERATOR,)),
    REQUEST_DURATION: Metric(
        "histogram",
        "s",
        "time of an HTTP request",
        ("http.request.method", "http.route", "http.response.status_code", ERROR),
        _SECONDS,
        server=True,
    ),
    ACTIVE: Metric("gauge", "{request}", "requests that hold a place", (GATE,), server=True),
    WAITING: Metric("gauge", "{request}", "requests that wait for a place", (GATE,), server=True),
}
"""All metrics by name; ``tta.gate`` is ``chat`` or ``checks``."""


def prometheus_name(metric: str) -> str:
    """What Prometheus calls a metric: dots become underscores, seconds and counters have endings."""
    about = METRICS[metric]
    name = metric.replace(".", "_")
    return f"{name}_seconds" if about.unit == "s" else f"{name}_total" if about.kind == "counter" else name
