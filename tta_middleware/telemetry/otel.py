"""Answers as OpenTelemetry's spans and metrics. The one module that imports OpenTelemetry, and Prometheus' client.

A span is current while its work runs, so that what is done there, such as a moderator's HTTP request under an
instrumented client, is its child. Each begins and ends in one task. No error is recorded with its message, which may
quote a text.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from opentelemetry import context as otel_context
from opentelemetry import metrics, propagate, trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
from opentelemetry.sdk.metrics import MeterProvider as SdkMeterProvider
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from tta_middleware.errors import UnsafeAnswerError
from tta_middleware.moderation.breaker import WithBreaker
from tta_middleware.observing import AnyStage, Asked, observed_by
from tta_middleware.policy import Decision, Policy
from tta_middleware.telemetry import format as names
from tta_middleware.telemetry.settings import TelemetrySettings
from tta_middleware.types import AnswerScore, GuardedAnswer, Message, StepTrace, Trace, Verdict

Attributes: TypeAlias = dict[str, Any]

CANCELLED = "cancelled"

_BREAKER_STATES = {"closed": 0, "half-open": 1, "open": 2}


class Telemetry:
    """Tells of answers; an :class:`~tta_middleware.observing.Observer`.

    Args:
        tracer_provider: None takes the global one.
        meters: who is told of metrics; None tells the global provider.
    """

    def __init__(
        self,
        *,
        capture_content: bool = False,
        tracer_provider: TracerProvider | None = None,
        meters: Sequence[MeterProvider] | None = None,
    ) -> None:
        self.capture_content = capture_content
        self.tracer = trace.get_tracer(names.SCOPE, names.FORMAT_VERSION, tracer_provider)
        providers = [metrics.get_meter_provider()] if meters is None else meters
        self.instruments = Instruments(
            [provider.get_meter(names.SCOPE, names.FORMAT_VERSION) for provider in providers]
        )

    def answering(self, asked: Asked) -> AnswerSpan:
        return AnswerSpan(self, asked)

    def checking_alone(self, moderator: str, stage: AnyStage) -> CheckSpan:
        return CheckSpan(self, moderator, stage)


class Instruments:
    """The metrics, in every meter that wants them."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = meters
        self._tell: dict[str, list[Callable[[float, Attributes], None]]] = {}
        for name, about in names.METRICS.items():
            if about.kind == "counter":
                counters = [meter.create_counter(name, about.unit, about.about) for meter in meters]
                self._tell[name] = [counter.add for counter in counters]
            elif about.kind == "histogram":
                self._tell[name] = [_histogram(meter, name).record for meter in meters]
        self.observe(names.BREAKER, breaker_states)

    def tell(self, name: str, value: float, attributes: Attributes) -> None:
        """One measurement."""
        known = {label: content for label, content in attributes.items() if content is not None}
        for tell in self._tell[name]:
            tell(value, known)

    def observe(self, name: str, read: Callable[[], Iterable[tuple[float, Attributes]]]) -> None:
        """A gauge that is read when somebody asks for it."""

        def callback(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, attributes) for value, attributes in read()]

        about = names.METRICS[name]
        for meter in self._meters:
            meter.create_observable_gauge(name, [callback], about.unit, about.about)


def _histogram(meter: Meter, name: str) -> metrics.Histogram:
    about = names.METRICS[name]
    return meter.create_histogram(name, about.unit, about.about, explicit_bucket_boundaries_advisory=about.buckets)


def breaker_states() -> list[tuple[float, Attributes]]:
    """The worst state of each moderator's breakers."""
    worst: dict[str, int] = {}
    for guarded in WithBreaker.living():
        worst[guarded.name] = max(worst.get(guarded.name, 0), _BREAKER_STATES[guarded.breaker.state])
    return [(state, {names.MODERATOR: name}) for name, state in worst.items()]


class _SpanOf:
    """A span around a ``with`` block of one task, ended once however that ends."""

    def __init__(
        self,
        telemetry: Telemetry,
        name: str,
        attributes: Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: otel_context.Context | None = None,
    ) -> None:
        self.telemetry, self._name, self._attributes, self._kind = telemetry, name, attributes, kind
        self._parent = parent
        self.span: Span = trace.INVALID_SPAN
        self.around: Span = trace.INVALID_SPAN
        self.began = 0.0

    def __enter__(self) -> Self:
        self.began = time.perf_counter()
        self.around = trace.get_current_span()
        self.span = self.telemetry.tracer.start_span(self._name, self._parent, self._kind, self._attributes)
        self._token = otel_context.attach(trace.set_span_in_context(self.span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        otel_context.detach(self._token)
        problem = None if error is None else error_type(error)
        try:
            self.ending(time.perf_counter() - self.began, error, problem)
        finally:
            self.span.end()

    def ending(self, seconds: float, error: BaseException | None, problem: str | None) -> None:
        """The work is over. A check or a wave is cancelled where nobody needs it any more, which is no error."""
        if problem == CANCELLED:
            self.note({names.DROPPED: True})
        elif problem is not None:
            self.fail(problem)

    def fail(self, problem: str) -> None:
        self.span.set_attribute(names.ERROR, problem)
        self.span.set_status(StatusCode.ERROR)

    def note(self, attributes: Mapping[str, Any]) -> None:
        """Attributes whose value is known."""
        if self.span.is_recording():
            self.span.set_attributes({name: value for name, value in attributes.items() if value is not None})


class AnswerSpan(_SpanOf):
    """One answer: the span ``chat {model}``, and its metrics at the end.

    Args:
        model: the name that clients use; by default the model's own.
        policy: what the operator calls the policy; empty where that is not known.
    """

    # The tasks of a request share it. ``_first`` and ``_answer`` are written by the one that speaks, and read when all
    # have ended.

    def __init__(self, telemetry: Telemetry, asked: Asked, model: str = "", policy: str = "") -> None:
        self._asked, self._first = asked, 0.0
        self._answer: GuardedAnswer | None = None
        self._common: Attributes = {
            names.OPERATION: "chat",
            names.PROVIDER: asked.provider,
            names.REQUEST_MODEL: model or asked.model or None,
            names.POLICY: policy or None,
        }
        known = {name: value for name, value in self._common.items() if value is not None}
        super().__init__(telemetry, f"chat {model or asked.model}".strip(), known)

    def __enter__(self) -> Self:
        super().__enter__()
        asked = self._asked
        if sampling := asked.sampling:
            self.note(
                {
                    "gen_ai.request.max_tokens": sampling.max_new_tokens,
                    "gen_ai.request.temperature": sampling.temperature,
                    "gen_ai.request.top_p": sampling.top_p,
                    "gen_ai.request.seed": sampling.seed,
                }
            )
        self.note(
            {
                names.RESPONSE_MODEL: asked.model or None,
                "gen_ai.request.stream": asked.stream,
                "tta.format.version": names.FORMAT_VERSION,
                names.MODERATOR: asked.moderator,
                "tta.method": asked.method,
            }
        )
        if self.telemetry.capture_content:
            self.note({"gen_ai.input.messages": _as_json(map(_told, asked.messages))})
        return self

    def released(self) -> None:
        self._first = self._first or time.perf_counter()

    def checking(self, stage: AnyStage) -> CheckSpan:
        return CheckSpan(self.telemetry, self._asked.moderator, stage)

    def repairing(self, moves: Sequence[str]) -> WaveSpan:
        return WaveSpan(self.telemetry, moves)

    def answered(self, answer: GuardedAnswer) -> None:
        self._answer = answer

    def ending(self, seconds: float, error: BaseException | None, problem: str | None) -> None:
        answer = self._answer
        told = answer.trace if answer else error.trace if isinstance(error, UnsafeAnswerError) else None
        problem = None if answer else problem  # whoever leaves after the last event has all of it
        outcome = told.outcome if told else "cancelled" if problem == CANCELLED else "failed"
        labels = self._common | {names.OUTCOME: outcome, names.MODE: told.mode if told else None}
        if problem is not None:
            self.fail(problem)
        if told is not None:
            self.note(_traced(told))
        if answer is not None:
            self._note_answer(answer)
        self._tell(labels, seconds, problem, told)

    def _note_answer(self, answer: GuardedAnswer) -> None:
        first = self._first - self.began if self._first and self._asked.stream else None
        self.note(
            {
                "gen_ai.response.finish_reasons": [answer.finish_reason],
                "gen_ai.response.time_to_first_chunk": first,
                "gen_ai.usage.input_tokens": answer.prompt_tokens or None,
                "gen_ai.usage.output_tokens": answer.trace.generated_tokens or None,
            }
        )
        if self.telemetry.capture_content:
            said = _told(Message("assistant", answer.text)) | {"finish_reason": answer.finish_reason}
            self.note({"gen_ai.output.messages": _as_json([said])})

    def _tell(self, labels: Attributes, seconds: float, problem: str | None, told: Trace | None) -> None:
        tell = self.telemetry.instruments.tell
        tell(names.DURATION, seconds, labels | {names.ERROR: problem})
        tell(names.ANSWERS, 1, labels | {names.ERROR: problem})
        if self._first and self._asked.stream:
            tell(names.FIRST_CHUNK, self._first - self.began, labels)
        # None are counted where other models and streams do not tell.
        if self._answer is not None and self._answer.prompt_tokens:
            tell(names.TOKENS, self._answer.prompt_tokens, labels | {names.TOKEN_TYPE: "input"})
        if told is None:
            return
        if told.generated_tokens:
            tell(names.TOKENS, told.generated_tokens, labels | {names.TOKEN_TYPE: "output"})
        for flagged in _flagged(told):
            tell(names.FLAGGED, 1, labels | flagged)
        if told.repairs:
            tell(names.REPAIR_GENERATIONS, max(0, told.generations - 1), labels)


class CheckSpan(_SpanOf):
    """One request to the moderator, an event for each verdict, and how long it took."""

    def __init__(self, telemetry: Telemetry, moderator: str, stage: AnyStage) -> None:
        self._about: Attributes = {names.MODERATOR: moderator, names.STAGE: stage}
        self._worst: Decision | None = None
        super().__init__(telemetry, f"moderate {moderator}", self._about)

    def scored(self, verdict: Verdict, policy: Policy, end: int | None = None) -> None:
        if not (self.span.is_recording() or self.around.is_recording()):
            return
        decision, score = policy.decide(verdict), verdict.score
        if self._worst is None or decision.excess > self._worst.excess:  # of several texts in one request
            self._worst = decision
            self.note({"tta.score": score, "tta.flagged": decision.flagged, names.CATEGORY: decision.category})
        result: Attributes = {
            "gen_ai.evaluation.name": "moderation",
            "gen_ai.evaluation.score.value": score,
            "gen_ai.evaluation.score.label": _label(decision),
            names.CATEGORY: decision.category,
            names.STAGE: self._about[names.STAGE],
        }
        self.around.add_event(names.EVALUATION_EVENT, result if end is None else result | {"tta.window.end": end})

    def ending(self, seconds: float, error: BaseException | None, problem: str | None) -> None:
        super().ending(seconds, error, problem)
        self.telemetry.instruments.tell(names.MODERATION_DURATION, seconds, self._about | {names.ERROR: problem})


class WaveSpan(_SpanOf):
    """Candidates side by side."""

    def __init__(self, telemetry: Telemetry, moves: Sequence[str]) -> None:
        super().__init__(telemetry, "repair wave", {"tta.wave.moves": list(moves)})

    def tried(self, step: StepTrace) -> None:
        self.note({"tta.wave.scores": list(step.scores), "tta.wave.generated_tokens": step.generated_tokens})


def _label(decision: Decision) -> str:
    if decision.flagged:
        return "flagged"
    return "observed" if decision.observed else "doubtful" if decision.doubtful else "passed"


def _traced(told: Trace) -> Attributes:
    first = told.baseline or AnswerScore(0.0, flagged=False)
    return {
        names.OUTCOME: told.outcome,
        "tta.stop_reason": told.stop_reason,
        "tta.generations": told.generations,
        "tta.moderation_calls": told.moderation_calls,
        "tta.repairs": told.repairs,
        "tta.seam": told.seam,
        "tta.move": told.move,
        "tta.cosine": told.cosine,
        "tta.first.score": first.score if told.baseline else None,
        "tta.first.category": first.category if told.baseline else None,
        "tta.first.flagged": first.flagged if told.baseline else None,
        "tta.final.score": told.final.score if told.final else None,
        "tta.load_seconds": told.load_seconds,
        names.MODE: told.mode,
        "tta.observed": list(told.observed) or None,
        "tta.reasoning.tokens": told.reasoning.tokens if told.reasoning else None,
    }


def _flagged(told: Trace) -> Iterator[Attributes]:
    """What was flagged of prompt, first thoughts and first answer; under observation, what would have been."""
    for reason in (told.stop_reason, *told.observed):
        stage, _, category = reason.partition(": ")
        if stage == "prompt":
            yield {names.STAGE: "prompt", names.CATEGORY: category}
    thought = told.reasoning.score if told.reasoning else None
    if thought is not None and thought.flagged:
        yield {names.STAGE: "reasoning", names.CATEGORY: thought.category}
    # A thought that is flagged ends the first answer, so its score is that answer's, too.
    elif told.baseline is not None and told.baseline.flagged:
        yield {names.STAGE: "output", names.CATEGORY: told.baseline.category}


def _told(message: Message) -> Attributes:
    """A message as the conventions write it."""
    parts: list[Attributes] = [{"type": "text", "content": message.content}] if message.content else []
    parts += [
        {"type": "tool_call", "name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls
    ]
    return {"role": message.role, "parts": parts}


def _as_json(value: Iterable[Attributes]) -> str:
    return json.dumps(list(value), ensure_ascii=False, default=str)


def error_type(error: BaseException) -> str:
    """What telemetry calls an error: its class, never its message."""
    return CANCELLED if isinstance(error, asyncio.CancelledError) else type(error).__name__


class RequestRecord(Protocol):
    """What a server knows of one HTTP request; filled in while it is answered."""

    id: str
    method: str
    path: str
    status: int | None
    model: str | None
    policy: str | None
    error: str | None
    disconnected: bool


class Gate(Protocol):
    """Places for requests under way, and a queue before them."""

    @property
    def taken(self) -> int: ...

    @property
    def waiting(self) -> int: ...


class _OfRequest:
    """The observer of one request's answers: it knows what the client calls the model, and which policy holds."""

    def __init__(self, telemetry: Telemetry, record: RequestRecord) -> None:
        self._telemetry, self._record = telemetry, record

    def answering(self, asked: Asked) -> AnswerSpan:
        return AnswerSpan(self._telemetry, asked, self._record.model or "", self._record.policy or "")

    def checking_alone(self, moderator: str, stage: AnyStage) -> CheckSpan:
        return CheckSpan(self._telemetry, moderator, stage)


class _RequestSpan(_SpanOf):
    """One HTTP request; how it ended its record says."""

    def ending(self, seconds: float, error: BaseException | None, problem: str | None) -> None:
        return None


class ServerTelemetry:
    """Telemetry of one server: spans of its requests, its answers' telemetry, gauges, and the page for Prometheus.

    Metrics go to OpenTelemetry's global provider as well.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        self.settings, self._registry = settings, CollectorRegistry()
        reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=self._registry)
        # It has no thread: Prometheus' reader collects when the page is asked for.
        own = SdkMeterProvider([reader], shutdown_on_exit=False)
        meters = [own, metrics.get_meter_provider()]
        self._telemetry = Telemetry(capture_content=settings.capture_content, meters=meters)

    def gates(self, gates: Mapping[str, Gate]) -> None:
        """Tell how full these are, by what they are in front of."""
        observe = self._telemetry.instruments.observe
        observe(names.ACTIVE, lambda: [(gate.taken, {names.GATE: name}) for name, gate in gates.items()])
        observe(names.WAITING, lambda: [(gate.waiting, {names.GATE: name}) for name, gate in gates.items()])

    @contextmanager
    def request(self, record: RequestRecord, route: str, scheme: str, headers: Mapping[str, str]) -> Iterator[None]:
        """Around one request: its span goes on from the one that is current, else from the client's ``traceparent``."""
        around = None if trace.get_current_span().get_span_context().is_valid else propagate.extract(headers)
        about = {
            "http.request.method": record.method,
            "http.route": route,
            "url.path": record.path,
            "url.scheme": scheme,
            "tta.request.id": record.id,
        }
        span = _RequestSpan(self._telemetry, f"{record.method} {route}", about, SpanKind.SERVER, around)
        try:
            with span, observed_by(_OfRequest(self._telemetry, record)):
                try:
                    yield
                finally:
                    self._note(span, record)
        finally:
            labels: Attributes = {name: about[name] for name in ("http.request.method", "http.route")}
            labels |= {"http.response.status_code": record.status, names.ERROR: _problem(record)}
            self._telemetry.instruments.tell(names.REQUEST_DURATION, time.perf_counter() - span.began, labels)

    def _note(self, span: _SpanOf, record: RequestRecord) -> None:
        span.note({"http.response.status_code": record.status})
        if problem := _problem(record):
            span.fail(problem)

    def page(self) -> tuple[bytes, str]:
        """All metrics in Prometheus' text format, and the media type of that."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


def _problem(record: RequestRecord) -> str | None:
    if record.disconnected:
        return "disconnected"
    if record.status is None or record.status >= 500:
        return str(record.status or record.error or CANCELLED)
    return record.error if record.status == 200 else None  # a stream that broke after its status had left
