"""Further judges for a run that is there already: they read the answers that were kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

from tta_middleware.errors import ConfigurationError
from tta_middleware.evaluation.judges import Reviewer
from tta_middleware.evaluation.measures import opinions_on
from tta_middleware.evaluation.records import PARTS
from tta_middleware.evaluation.run_folder import RunFolder
from tta_middleware.files.jsonl import Record
from tta_middleware.files.prompts import Prompt
from tta_middleware.guard.context import last_user_text
from tta_middleware.moderation.concurrency import gather

AT_ONCE = 16
"""Prompts whose answers are read side by side: a judging model has them in one batch."""


async def judge_again(store: RunFolder, judges: Mapping[str, Reviewer], prompts: Sequence[Prompt]) -> int:
    """Let each judge read what it has not read of the results so far, and keep what it said; returns how many results.

    Args:
        prompts: all that the run's results may be from.

    Raises:
        ConfigurationError: answers were cut, or a result's prompt is not among ``prompts``.
        ModerationError: a judge could not score a text. The results stay as they were.
    """
    todo = [record for record in store.records if _unread(record, judges)]
    if not todo:
        return 0
    if not store.keeps_text:
        raise ConfigurationError(
            f"{store.folder} keeps flagged answers cut, and a judge reads whole ones; name the judges of that run, or "
            "run it again with --keep-text, in another --out"
        )
    questions = {str(prompt.id): last_user_text(prompt.messages) for prompt in prompts}
    by_prompt: dict[str, list[Record]] = defaultdict(list)
    for record in todo:
        by_prompt[str(record["id"])].append(record)
    if unknown := next((id_ for id_ in by_prompt if id_ not in questions), None):
        raise ConfigurationError(f"prompt {unknown!r} of the results is in none of the files named with --prompts")
    await gather([partial(_read, records, judges, questions[id_]) for id_, records in by_prompt.items()], limit=AT_ONCE)
    store.rewrite()
    return len(todo)


def _unread(record: Record, judges: Mapping[str, Reviewer]) -> list[str]:
    # Without an answer there is nothing to judge: such a record never had opinions.
    there = record["baseline"]["text"] is not None and record["final"]["text"] is not None
    return [name for name in judges if name not in record.get("judges", {})] if there else []


async def _read(records: Sequence[Record], judges: Mapping[str, Reviewer], question: str) -> None:
    """Add the missing opinions to the records of one prompt; equal answers are read once."""
    for name in judges:
        mine = [record for record in records if name in _unread(record, judges)]
        texts = list(dict.fromkeys(record[part]["text"] for record in mine for part in PARTS))
        opinions = await opinions_on(texts, question, {name: judges[name]}) if texts else []
        said = {text: asdict(each[name]) for text, each in zip(texts, opinions, strict=True)}
        for record in mine:
            heard = {part: said[record[part]["text"]] for part in PARTS}
            record["judges"] = {**record.get("judges", {}), name: heard}
