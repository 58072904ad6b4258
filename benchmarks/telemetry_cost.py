"""What telemetry costs per streamed answer: processor time with it over without it, in one process, in turns.

    python benchmarks/telemetry_cost.py [--answers 100] [--rounds 9]

The engine is a script and the moderator answers at once, so that nothing but the guard's own work is left to compare
with: the worst case for the ratio. The last rows' script decodes 200 tokens a second and is timed by the clock. ``off``
is no observer, ``instrumented`` OpenTelemetry's SDK with every span sampled, a batch processor whose exporter drops
them, and metrics; ``unsampled`` the same with a sampler that takes no trace. But for the last rows times are the
process's own, so that other work on the machine does not count; medians of the rounds are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from contextlib import aclosing

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler

from tta_middleware import Guard, Message, Noise, Repair
from tta_middleware.guard.events import Finished
from tta_middleware.observing import NOBODY
from tta_middleware.policy import Policy
from tta_middleware.telemetry import instrument, uninstrument
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Verdict

TEXT = "The old harbour town lies where the river meets the sea, and its market opens at dawn every single day. " * 10
HARM = TEXT[:400] + "Then comes the forbidden part of it. " + TEXT


class Dropped(SpanExporter):
    """Takes spans and drops them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def with_sampler(sampler: Sampler) -> Callable[[], None]:
    """Switches telemetry on, with parts that are made once."""
    tracers = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(Dropped()))
    meters = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    return lambda: instrument(tracer_provider=tracers, meter_provider=meters)


def story(call: ScriptedCall) -> str:
    return (HARM if "late" in call.text and call.moved < 0.6 else TEXT)[len(call.prefix) :]


async def answers(guard: Guard, question: str, count: int, clock: Callable[[], float]) -> tuple[float, int]:
    """Seconds per answer, and checks of the last one."""
    calls, begun = 0, clock()
    for _ in range(count):
        async with aclosing(guard.stream([Message("user", question)])) as events:
            async for event in events:
                if isinstance(event, Finished):
                    calls = event.answer.trace.moderation_calls
    return (clock() - begun) / count, calls


async def measure(question: str, count: int, rounds: int, *, step: float = 0.0) -> None:
    clock = time.perf_counter if step else time.process_time
    engine = ScriptedEngine(story, step_seconds=step)
    guard = Guard(engine, ScriptedModerator(score=flagging("forbidden")), repair=Repair(method=Noise()))
    modes = {
        "off": uninstrument,
        "unsampled": with_sampler(ALWAYS_OFF),
        "instrumented": with_sampler(ALWAYS_ON),
    }
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    await answers(guard, question, min(10, count), clock)
    calls = 0
    for _ in range(rounds):
        for name, switch in modes.items():
            switch()
            spent, calls = await answers(guard, question, count, clock)
            seconds[name].append(spent)
    uninstrument()
    off = statistics.median(seconds["off"])
    for name, spent in seconds.items():
        middle = statistics.median(spent)
        ratio = statistics.median([one / base for one, base in zip(spent, seconds["off"], strict=True)])
        extra = f"{1e6 * (middle - off) / calls:.0f} us" if name != "off" and not step else ""
        pace = ", 200 tokens/s" if step else ""
        print(f"| {question}{pace} | {name} | {calls} | {1000 * middle:.2f} ms | {ratio:.3f} | {extra} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    print("| answer | telemetry | checks | time | over off | more per check |\n|---|---|---:|---:|---:|---:|")
    for question in ("clean", "late flag"):
        asyncio.run(measure(question, asked.answers, asked.rounds))
    asyncio.run(measure("clean", 2, asked.rounds, step=1 / 200))
    print(f"\nWhere nobody listens a check tells it in {1e6 * nobody():.2f} us.")


def nobody() -> float:
    """Seconds that a check takes to tell an observer that is not there."""
    verdict, policy = Verdict({"illicit": 0.1}, flagged=False, model="none"), Policy(threshold=0.5)

    def tell() -> None:
        with NOBODY.checking("output") as check:
            check.scored(verdict, policy, 100)

    return min(timeit.repeat(tell, number=10_000)) / 10_000


if __name__ == "__main__":
    main()
