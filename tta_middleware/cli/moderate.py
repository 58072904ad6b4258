"""``tta moderate``: scores for texts."""

from __future__ import annotations

from typing import Annotated

import typer

from tta_middleware.batch.exit_codes import OK, USAGE
from tta_middleware.cli import options as opt


def moderate(
    text: Annotated[str | None, typer.Argument(help="The text; without it or with '-', stdin.")] = None,
    jsonl: Annotated[
        str | None, typer.Option("--jsonl", metavar="FILE|-", help="One object a line with 'text'; '-' is stdin.")
    ] = None,
    moderator: opt.Moderator = "local",
    threshold: opt.Threshold = None,
    policy: opt.PolicyText = None,
    json: opt.Json = False,
) -> None:
    """Score a text, or one text a line: flagged, score, categories.

    With --jsonl one object a line is printed in the order of the input; a broken line gets an object with 'error' in
    its place, and the exit code is 2 at the end.
    """
    from tta_middleware.cli.moderate_job import Scorer, score_lines, show_one
    from tta_middleware.cli.typed import policy_of, text_or_stdin
    from tta_middleware.errors import ConfigurationError

    if jsonl is not None and text is not None:
        raise ConfigurationError("give a text or --jsonl, not both")
    decision = policy_of(policy, threshold)
    if jsonl is None:
        words = text_or_stdin(text)
    with Scorer(moderator, decision) as scorer:
        if jsonl is not None:
            raise typer.Exit(USAGE if score_lines(scorer, jsonl) else OK)
        show_one(scorer, words, as_json=json)
