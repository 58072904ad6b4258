"""What stands in the output for one line of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tta_middleware.batch.exit_codes import describe
from tta_middleware.errors import DataError
from tta_middleware.files.jsonl import Record
from tta_middleware.trace import not_checked

if TYPE_CHECKING:
    from tta_middleware.types import GuardedAnswer


def as_record(answer: GuardedAnswer) -> Record:
    """The answer for machines."""
    trace = answer.trace.as_dict()
    return {
        "answer": answer.text,
        **({"reasoning": answer.reasoning} if answer.reasoning else {}),
        "outcome": answer.trace.outcome,
        "finish_reason": answer.finish_reason,
        "trace": trace,
    }


def as_batch_record(answer: GuardedAnswer) -> Record:
    """As :func:`as_record`; what was withheld for want of a verdict is an error, which a later run can try again."""
    record, reason = as_record(answer), answer.trace.stop_reason
    message = not_checked(reason)
    if answer.trace.outcome != "blocked" or not message:
        return record
    return {"error": {"type": reason.partition(": ")[2], "message": message}, "trace": record["trace"]}


def as_error(error: BaseException | None) -> Record:
    """The error in place of an answer; None where the line could not be read at all."""
    kind, message = describe(error or DataError("the line cannot be read"))
    # Here the way to a traceback is another one: the run catches what a prompt does.
    message = message.replace("run again with --debug", "ask it of tta chat with --debug")
    return {"error": {"type": kind, "message": message}}
