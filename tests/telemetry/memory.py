"""Spans and metrics in memory, and guards over scripts that tell of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from tta_middleware import Budget, Guard, Message, Noise, Repair, Windows
from tta_middleware.errors import EngineError
from tta_middleware.guard.events import StreamEvent
from tta_middleware.testing.delays import Unequal, slow_even
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

START = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
HARM = f"{START} Then you do the forbidden thing in four steps and tell nobody about it at all."
SAFE = f"{START} Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."


def ask(text: str = "Please tell me about the old harbour town") -> list[Message]:
    return [Message("user", text)]


def story(call: ScriptedCall) -> str:
    """Prompts with 'attack' get harm, those with 'late' until the prompt is moved; a few break; the rest is safe."""
    if "broken" in call.text:
        raise EngineError("the script ends here")
    if "attack" in call.text or ("late" in call.text and call.moved < 0.6):
        return HARM[len(call.prefix) :]
    return SAFE[len(call.prefix) :]


def guard(moderator: Any = None, repair: Repair | None = None, **settings: Any) -> Guard:
    """Verdicts come out of order; repairs are random noise."""
    scorer = moderator or Unequal(ScriptedModerator(score=flagging("forbidden")), slow_even)
    repair = repair or Repair(method=Noise(), commit=30, budget=Budget(generations=12))
    given = {"repair": repair, "windows": Windows(first=20, largest=40)}
    return Guard(ScriptedEngine(story), scorer, **(given | settings))


async def read(stream: AsyncGenerator[StreamEvent, None], most: int = 10_000) -> list[StreamEvent]:
    """The first events of a stream, which is closed then."""
    found: list[StreamEvent] = []
    async with aclosing(stream) as events:
        async for event in events:
            found.append(event)
            if len(found) == most:
                break
    return found


class Memory(SpanProcessor):
    """Finished spans and metric points, and a check that each span that began has ended once."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []
        self._open: Counter[int] = Counter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(self)
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self._open[span.get_span_context().span_id] += 1

    def on_end(self, span: ReadableSpan) -> None:
        self._open[span.get_span_context().span_id] -= 1
        self.spans.append(span)

    def check_ends(self) -> None:
        """Every span has ended, none twice."""
        assert set(self._open.values()) <= {0}

    def named(self, beginning: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name.startswith(beginning)]

    def answer(self) -> dict[str, Any]:
        """The attributes of the one answer."""
        [span] = self.named("chat")
        return dict(span.attributes or {})

    def points(self, metric: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        found = [one for scope in scopes for one in scope.metrics if one.name == metric]
        return [point for one in found for point in one.data.data_points]

    def everything(self) -> str:
        """All that was told, as text."""
        data = self._reader.get_metrics_data()
        return "\n".join([*(span.to_json() for span in self.spans), data.to_json() if data else ""])
