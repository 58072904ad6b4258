"""What runs in each Ray actor: one guard, and as many prompts at once as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import anyio

from tta_middleware.assembly import AnswerSettings
from tta_middleware.batch.exit_codes import unwrapped
from tta_middleware.batch.records import as_batch_record, as_error
from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.files.jsonl import Record, dump, parse_object
from tta_middleware.files.prompts import parse_prompt
from tta_middleware.profiles.store import judge_calibration
from tta_middleware.registry import resolve_moderator
from tta_middleware.types import Message, Sampling


class GuardActor:
    """A stateful callable for ``Dataset.map_batches``: the model is loaded once, when the actor starts.

    Args:
        answering: how answers are made.
        concurrency: prompts under way at once in this actor, over all batches that it works on.
        column: holds a JSON object a row, as a line of ``tta batch``, and then the answer's.

    Raises:
        TTAError: the model or the moderator cannot be had.
    """

    def __init__(self, answering: AnswerSettings, concurrency: int, column: str) -> None:
        self._answering, self._column = answering, column
        engine = answering.engine()
        self._guard = answering.guard_over(
            engine, resolve_moderator(answering.moderator, engine=engine, calibration=judge_calibration)
        )
        self._slots = asyncio.Semaphore(concurrency)
        # A model that cannot be loaded ends the job, instead of becoming every record's error.
        anyio.run(engine.embed, [Message("user", "Hello")])

    async def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        lines = [str(line) for line in batch[self._column]]
        records = await asyncio.gather(*map(self._record, lines))
        return {**batch, self._column: [dump(record) for record in records]}

    async def _record(self, line: str) -> Record:
        """The answer or the error; whatever one prompt does, the others go on."""
        head: Record = {"id": None}
        async with self._slots:
            try:
                asked = parse_object(line.encode(), "row")
                head = {name: asked.get(name) for name in ("id", "input_hash") if name == "id" or name in asked}
                prompt = parse_prompt(asked, 0, "row")
                answer = await self._guard.answer(prompt.messages, self._sampling(asked))
            except Exception as error:  # noqa: BLE001 - the record's boundary
                return {**head, **as_error(unwrapped(error))}
        return {**head, **as_batch_record(answer)}

    def _sampling(self, asked: Record) -> Sampling:
        """The job's sampling under the row's own ``sampling``."""
        fields = asked.get("sampling") or {}
        try:
            stop = fields.get("stop", self._answering.sampling.stop)
            stops = (stop,) if isinstance(stop, str) else tuple(stop)
            return replace(self._answering.sampling, **fields | {"stop": stops})
        except (AttributeError, TypeError, ConfigurationError) as error:
            raise DataError(f"'sampling' cannot be used: {error}") from None


def as_line(record: Record) -> str:
    """One row for :class:`GuardActor`."""
    return json.dumps(record)
