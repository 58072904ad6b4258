"""Options that several commands share, as annotations."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

DEFAULT_METHOD = "race"
"""The chat model's default, kept here so that the command line starts without LangChain."""

Model: TypeAlias = Annotated[str, typer.Option("--model", "-m", help="smollm2, a local folder, or a Hugging Face id.")]
Moderator: TypeAlias = Annotated[str, typer.Option(help="Who scores the answers: local, openai, or an installed one.")]
Method: TypeAlias = Annotated[str, typer.Option(help="Repair of flagged answers: race, noise, resample, tsa, none.")]
Threshold: TypeAlias = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Scores from here on are flagged; by default the moderator's own threshold."),
]
PolicyText: TypeAlias = Annotated[
    str | None,
    typer.Option("--policy", help="A policy as JSON, or a file with it: threshold, categories, on_error, notice."),
]
MaxNewTokens: TypeAlias = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature: TypeAlias = Annotated[float, typer.Option(help="0 is greedy.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="Equal seeds give equal answers.")]
System: TypeAlias = Annotated[str | None, typer.Option(help="A system message.")]
MaxGenerations: TypeAlias = Annotated[int, typer.Option(min=1, help="Answers decoded at most, the first one included.")]
AllowDownload: TypeAlias = Annotated[bool, typer.Option("--allow-download", help="Let a Hugging Face id be fetched.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="JSON on stdout for machines; errors, too.")]
