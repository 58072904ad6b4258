"""What goes where: results to stdout, everything about them to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import typer

from tta_middleware.files.jsonl import dump


def emit(record: Mapping[str, Any]) -> None:
    """One JSON object on a line of stdout, sent at once, so that a pipe's reader need not wait."""
    typer.echo(dump(dict(record)))


def say(text: str) -> None:
    """Text for people on stdout, without control characters in a terminal, which a model's answer could abuse."""
    typer.echo(printable(text) if sys.stdout.isatty() else text)


def note(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


def printable(text: str) -> str:
    """``text`` without control characters but line ends and tabs."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values on stderr: an aligned table in a terminal, else a line each."""
    if not sys.stderr.isatty():
        for name, value in rows:
            note(f"{name}: {value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), Text(value))
    console = Console(stderr=True, highlight=False)
    console.print()
    console.print(table)
