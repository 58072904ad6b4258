"""``tta chat``: one guarded answer, or a conversation."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from tta_middleware.batch.exit_codes import BLOCKED, OK
from tta_middleware.cli import options as opt


@opt.grouped(opt.AnswerOptions)
def chat(
    asked: opt.AnswerOptions,
    text: Annotated[str | None, typer.Argument(help="The prompt; '-' is stdin; without it a conversation.")] = None,
    system: opt.System = None,
    verbose: Annotated[bool, typer.Option("--verbose", "--trace", help="Show every wave of a repair.")] = False,
    json: opt.Json = False,
) -> None:
    """Answer one prompt safely: the answer on stdout, what happened on stderr. Without a prompt: a conversation.

    Exits with 0 if the model's answer or a repaired one was given, with 3 if it was blocked. Without a terminal and
    without a prompt, the prompt is read from stdin.
    """
    import anyio

    if text is None and not json and sys.stdin.isatty() and sys.stdout.isatty():
        from tta_middleware.cli.chat_session import converse

        anyio.run(converse, asked.answering(), system)
        return

    from tta_middleware.cli import narrate, output
    from tta_middleware.cli.typed import text_or_stdin
    from tta_middleware.types import Message

    answering = asked.answering()
    messages = [Message("system", system)] if system else []
    messages.append(Message("user", text_or_stdin(text)))
    answer = anyio.run(partial(answering.answer, messages, loaded=output.loaded))
    narrate.show(answer, as_json=json, verbose=verbose)
    raise typer.Exit(BLOCKED if answer.trace.outcome == "blocked" else OK)
