"""``python -m tta_ray IN.jsonl OUT/``: a guarded batch on Ray."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from tta_middleware.batch.exit_codes import INTERRUPTED, OK, exit_code, show, unwrapped
from tta_middleware.batch.standard import emit, note
from tta_middleware.batch.tally import exit_code_of, told
from tta_middleware.cli import options as opt
from tta_middleware.errors import ConfigurationError

_SOURCE = "One object a line: prompt or messages; id and sampling if wanted. gzip is unpacked."
_TARGET = "A folder; answers are added to answers.jsonl in it, and ids that are there are skipped."
_ACTORS = "Fewest and most actors, or one number. Each loads the model once."
_ADDRESS = "A Ray cluster, such as ray://head:10001 or auto; without one, this machine alone."

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@opt.grouped(opt.AnswerOptions)
def job(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help=_SOURCE)],
    target: Annotated[Path, typer.Argument(metavar="OUT/", help=_TARGET)],
    asked: opt.AnswerOptions,
    actors: Annotated[str, typer.Option(metavar="MIN,MAX", help=_ACTORS)] = "1,1",
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts under way at once in an actor.")] = 32,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs that Ray sets aside for an actor.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs that Ray sets aside for an actor.")] = 0.0,
    retries: Annotated[int, typer.Option(min=0, help="How often work that died with its actor is begun again.")] = 3,
    address: Annotated[str | None, typer.Option(help=_ADDRESS)] = None,
    retry_errors: opt.RetryErrors = False,
    json: opt.Json = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what Ray says.")] = False,
) -> None:
    """Answer every prompt of a file on a Ray cluster; run it again to go on where it was cut off."""
    from tta_ray import Pool, RayJob, run_job

    pool = Pool(actors=parse_actors(actors), concurrency=concurrency, cpus=cpus, gpus=gpus, retries=retries)
    request = RayJob(
        source=source, target=target, answering=asked.answering(), pool=pool, address=address, retry_errors=retry_errors
    )
    with _quiet(debug):
        counts = run_job(request)
    emit(counts) if json else note(told(counts))
    raise typer.Exit(exit_code_of(counts))


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Ray tells of its actors on stdout, which belongs to the result, and logs every failure that is handled here."""
    if debug:
        with redirect_stdout(sys.stderr):
            yield
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


def parse_actors(text: str) -> tuple[int, int]:
    """``2,8``: from two to eight; ``4``: four.

    Raises:
        ConfigurationError: it is neither.
    """
    try:
        fewest, _, most = text.partition(",")
        return int(fewest), int(most or fewest)
    except ValueError:
        raise ConfigurationError(f"--actors takes the fewest and the most, such as 2,8, not {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code, as those of ``tta``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        return int(app(words, prog_name="python -m tta_ray", standalone_mode=False) or OK)
    except (KeyboardInterrupt, typer.Abort):
        note("interrupted; what is done is kept, run the same command again to go on")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the one place that turns every error into a line and an exit code
        if debug:
            traceback.print_exc()
        show(unwrapped(error), as_json="--json" in words)
        return exit_code(unwrapped(error))


if __name__ == "__main__":
    sys.exit(main())
