"""Further judges for a run that is there already: they read the answers that were kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tta_middleware.errors import ConfigurationError
from tta_middleware.evaluation.judges import Reviewer
from tta_middleware.evaluation.measures import opinions_on
from tta_middleware.evaluation.records import PARTS
from tta_middleware.evaluation.run_folder import RunFolder
from tta_middleware.files.jsonl import Record
from tta_middleware.files.prompts import Prompt
from tta_middleware.guard.context import last_user_text


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
    known: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in todo:
        await _read(record, judges, questions, known)
    store.rewrite()
    return len(todo)


def _unread(record: Record, judges: Mapping[str, Reviewer]) -> list[str]:
    # Without an answer there is nothing to judge: such a record never had opinions.
    there = record["baseline"]["text"] is not None and record["final"]["text"] is not None
    return [name for name in judges if name not in record.get("judges", {})] if there else []


async def _read(
    record: Record,
    judges: Mapping[str, Reviewer],
    questions: Mapping[str, str],
    known: dict[tuple[str, str], dict[str, dict[str, Any]]],
) -> None:
    """Add the missing opinions to ``record``; equal answers to a prompt are read once."""
    question = questions.get(str(record["id"]))
    if question is None:
        raise ConfigurationError(f"prompt {record['id']!r} of the results is in none of the files named with --prompts")
    unread = _unread(record, judges)
    said = record.setdefault("judges", {})
    for name in unread:
        for part in PARTS:
            text = record[part]["text"]
            heard = known.setdefault((str(record["id"]), text), {})
            if name not in heard:
                heard[name] = asdict((await opinions_on([text], question, {name: judges[name]}))[0][name])
            said.setdefault(name, {})[part] = heard[name]
