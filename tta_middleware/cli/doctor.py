"""``tta doctor``: is everything there?"""

from __future__ import annotations

from typing import Annotated

import typer

from tta_middleware.batch.exit_codes import FAILED, OK
from tta_middleware.cli import options as opt
from tta_middleware.defaults import WAIT_POLICY


def doctor(
    context: typer.Context,
    model: opt.Model = "smollm2",
    moderator: opt.Moderator = "local",
    judging: Annotated[
        bool, typer.Option("--judging", help="Ask the model about 64 mild examples: can it judge? Loads it.")
    ] = False,
    engine_option: opt.EngineOptions = None,
    online: Annotated[bool, typer.Option("--online", help="Make one real call to a moderator on the network.")] = False,
    json: opt.Json = False,
) -> None:
    """Check what is installed, where the model is and whether the moderator answers.

    With --model the model is loaded, to say which way it runs here and why, and what its chat template takes; an
    --engine-option says how. A moderator that is a model (self, guard:MODEL) is loaded and asked about 64 mild
    examples. Exits with 1 if `tta chat` could not run here.
    """
    from tta_middleware.batch.standard import emit
    from tta_middleware.cli import checks
    from tta_middleware.cli.typed import engine_options

    found = checks.run(model, moderator, online=online, judging=judging, wait_policy=context.obj.get(WAIT_POLICY))
    if engine_option or opt.was_given(context, "model"):
        found += checks.way(model, engine_options(engine_option))
    fine = all(check.status != "fail" for check in found)
    if json:
        emit({"ok": fine, "checks": [check.as_dict() for check in found]})
    else:
        checks.show(found)
    raise typer.Exit(OK if fine else FAILED)
