"""Scores texts one by one or line by line, in bounded memory."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import cast

from tta_middleware.aio import bridge
from tta_middleware.batch.records import as_error
from tta_middleware.batch.standard import emit
from tta_middleware.cli.output import say
from tta_middleware.errors import DataError
from tta_middleware.files.jsonl import Record, id_field, open_input, parse_object, text_field
from tta_middleware.files.lines import LONGEST, batches
from tta_middleware.policy import Policy, StagePolicies
from tta_middleware.policy.coverage import covering, told
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.profiles.store import judge_calibration
from tta_middleware.registry import resolve_moderator
from tta_middleware.types import Verdict

BATCH = 64
"""Texts that one moderation call gets at most."""


class Scorer:
    """A moderator behind a policy, for sync callers; closes the moderator at the end."""

    def __init__(self, moderator: str, policy: Policy) -> None:
        self._moderator = covering(
            resolve_moderator(moderator, calibration=judge_calibration), StagePolicies.of(policy)
        )
        self.policy = policy.with_default(self._moderator.default_threshold)
        self._told = told(self._moderator, self.policy)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bridge.run(self._moderator.aclose)

    def verdicts(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict per text."""
        return bridge.run(partial(verdicts_on, self._told, texts)) if texts else []

    def as_record(self, verdict: Verdict) -> Record:
        """``categories`` holds the scores."""
        flagged = self.policy.decide(verdict).reached
        return {"flagged": flagged, "score": verdict.score, "categories": dict(verdict.scores)}


@dataclass(frozen=True, slots=True)
class _Line:
    """What a line holds: an id to pass through if it has one, and a text or an error."""

    head: Record
    text: str | None
    error: DataError | None


def show_one(scorer: Scorer, text: str, *, as_json: bool) -> None:
    """One text's verdict: an object, or a few lines with the categories by score."""
    verdict = scorer.verdicts([text])[0]
    record = scorer.as_record(verdict)
    if as_json:
        emit(record)
        return
    word = "flagged" if record["flagged"] else "not flagged"
    say(f"{word}: {verdict.score:.3f} ({verdict.top_category})")
    for name, score in sorted(verdict.scores.items(), key=lambda item: -item[1]):
        say(f"  {score:.3f}  {name}")


def score_lines(scorer: Scorer, source: str) -> bool:
    """Print one object per line of a file or of stdin; says whether a line was broken."""
    broken = False
    name = "stdin" if source == "-" else source
    with _reading(source) as read:
        for group in batches(read, BATCH):
            lines = [_parse(number, raw, name) for number, raw in group]
            broken = broken or any(line.error for line in lines)
            for record in _scored(scorer, lines):
                emit(record)
    return broken


def _scored(scorer: Scorer, lines: Sequence[_Line]) -> Iterator[Record]:
    verdicts = iter(scorer.verdicts([line.text for line in lines if line.text is not None]))
    for line in lines:
        if line.error is not None:
            yield {**line.head, **as_error(line.error)}
        else:
            yield {**line.head, **scorer.as_record(next(verdicts))}


def _parse(number: int, raw: bytes | None, name: str) -> _Line:
    where = f"{name}:{number}"
    head: Record = {}
    try:
        if raw is None:
            raise DataError(f"{where}: longer than {LONGEST // 2**20} MiB")
        record = parse_object(raw, where)
        if "id" in record:
            head = {"id": id_field(record, number, where)}
        return _Line(head, text_field(record, "text", where, empty=True), None)
    except DataError as error:
        return _Line(head, None, error)


@contextmanager
def _reading(source: str) -> Iterator[Callable[[int], bytes]]:
    """Reads what is there instead of waiting until a buffer is full."""
    if source == "-":
        yield cast(io.BufferedReader, sys.stdin.buffer).read1
        return
    with open_input(Path(source)) as file:
        yield file.read
