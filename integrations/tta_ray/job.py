"""A batch job on Ray: one prompts file in, one folder out, to be started again after whatever kills it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from tta_middleware.assembly import AnswerSettings
from tta_middleware.batch.input import Item, Source
from tta_middleware.batch.progress import Advance, progress
from tta_middleware.batch.records import as_error
from tta_middleware.batch.shard import Shard
from tta_middleware.batch.tally import Tally
from tta_middleware.batch.target import Output, output_to
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.files.jsonl import Record
from tta_middleware.files.prompts import Prompt, note_id
from tta_middleware.registry import ENGINES, METHODS, check_known, check_moderator, check_options, names
from tta_ray.dataset import COLUMN, Pool, answered
from tta_ray.worker import as_line

ANSWERS = "answers.jsonl"
"""The file in the output folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayJob:
    """What is asked for.

    Attributes:
        source: a file with one object a line, as for ``tta batch``; gzip is unpacked.
        target: a folder; answers are added to ``answers.jsonl`` in it, and the ids that are there are skipped.
        address: of a Ray cluster; without one ``RAY_ADDRESS`` or a cluster of this machine alone.
        retry_errors: whether prompts that ended in an error are tried again.
    """

    source: Path
    target: Path
    answering: AnswerSettings
    pool: Pool = field(default_factory=Pool)
    address: str | None = None
    retry_errors: bool = False


@dataclass(slots=True)
class _Work:
    """What the input holds that the output does not."""

    lines: dict[str, str] = field(default_factory=dict)
    broken: list[Record] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


def run_job(job: RayJob) -> dict[str, int]:
    """Answer what has no answer yet; counts by outcome, with ``failed``, ``broken`` and ``skipped``.

    Of the skipped ones ``skipped_failed`` and ``skipped_broken`` are errors of an earlier run.

    Every answer is on disk as soon as its task is done, so a job that dies goes on where it was. Work that dies with
    its actor is begun again elsewhere; a prompt that keeps killing actors becomes a record with an error.

    Raises:
        DataError: an id comes twice, or the folder holds answers to another file.
        ConfigurationError: an unknown part, a file that cannot be opened, or a second job on the same folder.
        EngineError: Ray could not start the actors, the model could not be loaded, or the cluster went away.
    """
    _check_parts(job.answering)
    job.target.mkdir(parents=True, exist_ok=True)
    with output_to(str(job.target / ANSWERS), retry_errors=job.retry_errors) as output:
        work = anyio.run(_survey, job, output)
        output.open()
        tally = work.tally
        tally["broken"] = len(work.broken)
        done = tally["skipped"] + len(work.broken)
        with progress("ray", done, done + len(work.lines)) as advance:
            output.write(work.broken)
            if work.lines:
                with _cluster(job.address):
                    _answer(job, work, output, tally, advance)
    return dict(tally)


def _check_parts(answering: AnswerSettings) -> None:
    engine, colon, _ = answering.model.partition(":")
    if colon and "/" not in engine and engine not in names(ENGINES):
        check_known(ENGINES, "engine", engine)
    check_options(answering.model, answering.settings)
    check_moderator(answering.moderator, answering.model)
    if answering.method != "none":
        check_known(METHODS, "method", answering.method)


async def _survey(job: RayJob, output: Output) -> _Work:
    source, work = Source(str(job.source), job.answering.sampling), _Work()
    if not source.rereadable:
        raise ConfigurationError(f"no such file: {job.source}; a Ray job reads a file, no pipe")
    seen: dict[str, int] = {}
    async with aclosing(source.items(Shard())) as items:
        async for item in items:
            if item.prompt is not None:
                note_id(seen, item.prompt.id, item.number, item.where)
            if output.done.holds(item, output.name):
                work.tally.skip(item, output.done)
            elif item.prompt is None:
                work.broken.append({"id": None, "line": item.number, **as_error(item.error)})
            else:
                work.lines[json.dumps(item.prompt.id)] = _line(item, item.prompt)
    if not source.lines_seen:
        raise ConfigurationError(f"{job.source} holds no prompt; one JSON object a line with 'prompt' is needed")
    return work


def _line(item: Item, prompt: Prompt) -> str:
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    return as_line(
        {
            "id": prompt.id,
            "input_hash": item.digest,
            "messages": messages,
            "sampling": asdict(item.sampling),
        }
    )


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """The cluster that is there, or one for this job."""
    if ray.is_initialized():
        yield
        return
    local = address is None and "RAY_ADDRESS" not in os.environ
    options: dict[str, Any] = {"include_dashboard": False} if local else {"address": address}
    try:
        ray.init(log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise EngineError(f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS')}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _answer(job: RayJob, work: _Work, output: Output, tally: Tally, advance: Advance) -> None:
    for records in _records(job, list(work.lines.values())):
        output.write(records)
        for record in records:
            work.lines.pop(json.dumps(record["id"]), None)
            tally["failed" if "error" in record else str(record["outcome"])] += 1
            advance(str(tally))
    lost = EngineError(f"lost with its worker {job.pool.retries + 1} times")
    output.write([{**_head(line), **as_error(lost)} for line in work.lines.values()])
    tally["failed"] += len(work.lines)


def _records(job: RayJob, lines: list[str]) -> Iterator[list[Record]]:
    """The records of each task, as tasks are done."""
    rows = job.pool.rows
    blocks = [pa.table({COLUMN: lines[start : start + rows]}) for start in range(0, len(lines), rows)]
    dataset = answered(ray.data.from_arrow(blocks), job.answering, job.pool)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.max_errored_blocks = -1  # what comes back from no task is known by its absence
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield [json.loads(line) for line in batch[COLUMN].to_pylist()]
    except ray.exceptions.RayError as error:
        raise EngineError(f"the Ray job broke off: {_reason(error)}") from error


def _head(line: str) -> Record:
    asked = json.loads(line)
    return {"id": asked["id"], "input_hash": asked["input_hash"]}


def _reason(error: BaseException) -> str:
    """The last line of what Ray says, which names the error in the actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
