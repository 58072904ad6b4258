"""What people read in a terminal: results on stdout, everything about them on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from tta_middleware.batch.standard import note

if TYPE_CHECKING:
    from tta_middleware.assembly import Loading

_NOTICEABLE_SECONDS = 1.0


def say(text: str) -> None:
    """Text for people on stdout, without control characters in a terminal, which a model's answer could abuse."""
    typer.echo(printable(text) if sys.stdout.isatty() else text)


def loaded(loading: Loading, seconds: float) -> None:
    """A line on what loading took, where that is noticeable."""
    if seconds >= _NOTICEABLE_SECONDS:
        note(f"{loading.model} loaded in {seconds:.1f} s")


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
