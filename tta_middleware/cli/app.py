"""The command tree and the way in and out of the process."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from tta_middleware import __version__
from tta_middleware.batch.exit_codes import FAILED, INTERRUPTED, OK, exit_code, show, unwrapped
from tta_middleware.cli.batch import batch
from tta_middleware.cli.bench import bench
from tta_middleware.cli.calibrate import calibrate
from tta_middleware.cli.chat import chat
from tta_middleware.cli.doctor import doctor
from tta_middleware.cli.evaluate import COMMAND, evaluate
from tta_middleware.cli.moderate import moderate
from tta_middleware.cli.serve import serve, serve_moderation
from tta_middleware.defaults import PASSIVE, WAIT_POLICY

app = typer.Typer(name="tta", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
app.command("chat")(chat)
app.command("moderate")(moderate)
app.command("batch")(batch)
app.command("bench")(bench)
app.command("eval")(evaluate)
app.command("calibrate")(calibrate)
app.command("doctor")(doctor)
app.command("serve")(serve)
app.command("serve-moderation")(serve_moderation)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand after a command, too.")] = False,
) -> None:
    """Makes open-weight chat models safe while they answer.

    Exit codes: 0 done, 1 failure, 2 bad usage or input, 3 answer blocked, 130 interrupted.
    """
    if version:
        typer.echo(f"tta {__version__}")
        raise typer.Exit(OK)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tta`` and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    debug, as_json = "--debug" in words[:end], "--json" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    try:
        code = _run(words)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        return _without_reader()
    except Exception as error:  # noqa: BLE001 - the one place that turns every error into a line and an exit code
        if debug:
            traceback.print_exc()
        show(unwrapped(error), as_json=as_json)
        code = exit_code(unwrapped(error))
    if code == INTERRUPTED:
        typer.echo("tta: interrupted", err=True)
    return code


def _run(words: list[str]) -> int:
    chosen = os.environ.get(WAIT_POLICY)
    # Spinning OpenMP threads stall small matrix products when a neighbour is busy; torch reads this at its import.
    os.environ.setdefault(WAIT_POLICY, PASSIVE)
    code = app(
        words, prog_name="tta", standalone_mode=False, obj={WAIT_POLICY: chosen, COMMAND: shlex.join(["tta", *words])}
    )
    sys.stdout.flush()
    return int(code or OK)


def _without_reader() -> int:
    """Nobody reads stdout any more: what is still buffered must not raise again when Python exits."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED
