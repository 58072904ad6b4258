"""A picture of one streamed answer with a repair, from its OpenTelemetry spans (docs/telemetry.md).

    python scripts/trace_picture.py docs/results/trace.svg

The embedded model answers a mild question under a low threshold, so that its answer is flagged and repaired. Needs the
extras local and otel.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from xml.sax.saxutils import escape

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tta_middleware import Guard, Message, Race, Repair, Sampling
from tta_middleware.policy import Policy
from tta_middleware.registry import resolve_engine, resolve_moderator
from tta_middleware.telemetry import instrument

ROW, LEFT, RIGHT, WIDTH = 18, 330, 130, 560
COLOURS = {"chat": "#3b6ea5", "repair": "#b5762a", "moderate": "#5b8c5a"}
SHOWN = ("tta.moderation.stage", "tta.score", "tta.outcome", "tta.generations", "tta.wave.moves")


async def spans(model: str, question: str, threshold: float) -> list[ReadableSpan]:
    """Those of one answer."""
    exporter, tracers = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    instrument(tracer_provider=tracers)
    engine, moderator = resolve_engine(model), resolve_moderator("local")
    await engine.load()
    guard = Guard(engine, moderator, policy=Policy(threshold=threshold), repair=Repair(method=Race()))
    async with aclosing(guard.stream([Message("user", question)], Sampling(max_new_tokens=120))) as events:
        async for _ in events:
            pass
    await engine.aclose()
    return list(exporter.get_finished_spans())


def tree(found: list[ReadableSpan]) -> Iterator[tuple[int, ReadableSpan]]:
    """Depth and span, parents first, in the order of their beginnings."""

    def below(parent: int | None, depth: int) -> Iterator[tuple[int, ReadableSpan]]:
        mine = [span for span in found if (span.parent.span_id if span.parent else None) == parent]
        for span in sorted(mine, key=lambda one: one.start_time or 0):
            yield depth, span
            yield from below(span.context.span_id, depth + 1)

    return below(None, 0)


def label(span: ReadableSpan) -> str:
    """What a row says beside the span's name."""
    about = {name: value for name, value in (span.attributes or {}).items() if name in SHOWN}
    if (span.attributes or {}).get("tta.cancelled"):
        about["tta.cancelled"] = True
    told = []
    for name, value in about.items():
        words = ", ".join(value) if isinstance(value, tuple) else f"{value:.2f}" if isinstance(value, float) else value
        told.append(f"{name.rpartition('.')[2]} {words}")
    return "; ".join(told)


def picture(found: list[ReadableSpan]) -> str:
    """Rows under one another over one axis of time, as SVG."""
    rows = list(tree(found))
    begin = min(span.start_time or 0 for _, span in rows)
    seconds = max((span.end_time or 0) - begin for _, span in rows) / 1e9
    height = ROW * (len(rows) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="{height}" fill="#ffffff"/>',
    ]
    for number, (depth, span) in enumerate(rows):
        y, start = ROW * (number + 1), ((span.start_time or 0) - begin) / 1e9
        long = ((span.end_time or 0) - (span.start_time or 0)) / 1e9
        x, width = LEFT + WIDTH * start / seconds, max(1.5, WIDTH * long / seconds)
        colour = COLOURS[span.name.split(" ", maxsplit=1)[0]]
        text = escape(f"{span.name.removesuffix(' local')}  {label(span)}"[:64])
        lines += [
            f'<text x="{6 + 12 * depth}" y="{y}" fill="#222222">{text}</text>',
            f'<rect x="{x:.1f}" y="{y - 10}" width="{width:.1f}" height="11" fill="{colour}"/>',
            *(
                f'<circle cx="{LEFT + WIDTH * ((event.timestamp - begin) / 1e9) / seconds:.1f}" cy="{y - 4.5}" r="2.5" '
                f'fill="{"#b3261e" if _flagged(event.attributes) else "#ffffff"}" stroke="#222222" stroke-width="0.5"/>'
                for event in span.events
            ),
            f'<text x="{LEFT + WIDTH + 8}" y="{y}" fill="#444444">{1000 * long:.0f} ms</text>',
        ]
    note = "dots: gen_ai.evaluation.result, red where flagged"
    lines.append(f'<text x="6" y="{height - 6}" fill="#444444">{note}; {seconds:.2f} s in all</text></svg>')
    return "\n".join(lines) + "\n"


def _flagged(attributes: Mapping[str, object] | None) -> bool:
    return (attributes or {}).get("gen_ai.evaluation.score.label") == "flagged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--question", default="Write a short story in which two brothers fight in a street and one is hurt."
    )
    parser.add_argument("--threshold", type=float, default=0.1)
    asked = parser.parse_args()
    found = asyncio.run(spans(asked.model, asked.question, asked.threshold))
    asked.out.write_text(picture(found), encoding="utf-8")
    for depth, span in tree(found):
        print(f"{'  ' * depth}{span.name}  {label(span)}")


if __name__ == "__main__":
    main()
