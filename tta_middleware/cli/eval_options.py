"""Options that only ``tta eval`` has, as annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Prompts: TypeAlias = Annotated[
    list[Path], typer.Option(metavar="FILE.jsonl", help="One object a line: prompt, maybe id, category, benign.")
]
Out: TypeAlias = Annotated[Path, typer.Option(metavar="DIR", help="Where results.jsonl and the summary go.")]
Methods: TypeAlias = Annotated[str, typer.Option(help="Names with commas between them.")]
Variant: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE.json",
        help="A method with other settings, such as {'method': 'race', 'wave': 2}; may come again.",
    ),
]
Judge: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="A judge that no search sees, for the report; may come again: local-b, local, guard:MODEL."),
]
Relevance: TypeAlias = Annotated[bool, typer.Option("--relevance", help="Measure how close answers are to prompts.")]
Limit: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Only the first prompts of each file.")]
BenignOnly: TypeAlias = Annotated[
    bool, typer.Option("--benign-only", help="Only prompts marked benign, for over-refusal; --limit counts these.")
]
Jailbreak: TypeAlias = Annotated[
    str | None, typer.Option(help="Wrap each question: role-play, hypothetical, prefix or many-shot.")
]
Seeds: TypeAlias = Annotated[
    str, typer.Option("--seeds", "--seed", metavar="0,1,2", help="Whole numbers with commas between them.")
]
Concurrency: TypeAlias = Annotated[int, typer.Option(min=1, help="Runs at once; above 1 seconds do not compare.")]
ReportFile: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write a page with tables and plots, and FILE.md.")
]
Examples: TypeAlias = Annotated[
    int, typer.Option(min=0, help="Beginnings of answers shown there per method, 80 letters at most.")
]
Reference: TypeAlias = Annotated[str | None, typer.Option(help="Test the other methods against this one.")]
KeepText: TypeAlias = Annotated[
    bool, typer.Option("--keep-text", help="Do not cut flagged texts in results.jsonl to 80 characters.")
]
