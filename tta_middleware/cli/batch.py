"""``tta batch``: guarded answers for a file of prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from tta_middleware.batch.shard import Order, parse_shard
from tta_middleware.batch.tally import exit_code_of
from tta_middleware.cli import options as opt

_SOURCE = "One object a line: prompt or messages; id and sampling if wanted. gzip is unpacked; '-' is stdin."
_TARGET = "One object a line is added here; .gz is packed; '-' is stdout."
_CONCURRENCY = (
    "Prompts under way at once; by default as many as the engine decodes side by side. In bfloat16 the rounding of a "
    "larger batch may change the wording of answers."
)
_TELEMETRY = "Tell OpenTelemetry of every answer, under opentelemetry-instrument (docs/telemetry.md; extra otel)."
_ORDER = "'input' keeps the input's order and holds answers back for it; 'completed' writes them as they are done."


@opt.grouped(opt.AnswerOptions)
def batch(
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help=_SOURCE)],
    target: Annotated[str, typer.Argument(metavar="OUT.jsonl", help=_TARGET)],
    asked: opt.AnswerOptions,
    concurrency: Annotated[int | None, typer.Option(min=1, help=_CONCURRENCY)] = None,
    order: Annotated[Order, typer.Option(help=_ORDER)] = Order.INPUT,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only every n-th line, from the i-th on.")] = "1/1",
    retry_errors: opt.RetryErrors = False,
    telemetry: Annotated[bool, typer.Option("--telemetry", help=_TELEMETRY)] = False,
    json: opt.Json = False,
) -> None:
    """Answer every prompt of a file; run it again to go on where it was cut off.

    Prompts whose id is in OUT.jsonl are skipped. A line that cannot be read gets an object with 'error'; the exit code
    is then 2, or 1 if the model failed on a prompt, also where that was in an earlier run.
    """
    from tta_middleware.cli.batch_job import BatchRequest, run_batch
    from tta_middleware.telemetry import instrument

    if telemetry:
        instrument()
    request = BatchRequest(
        source=source,
        target=target,
        answering=asked.answering(),
        concurrency=concurrency,
        order=order,
        shard=parse_shard(shard),
        retry_errors=retry_errors,
        as_json=json,
    )
    tally = run_batch(request)
    raise typer.Exit(exit_code_of(tally))
