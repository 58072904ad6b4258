"""``tta chat``: one guarded answer."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from tta_middleware.cli import options as opt
from tta_middleware.cli.failures import BLOCKED, OK


def chat(
    text: Annotated[str | None, typer.Argument(help="The prompt; without it or with '-', stdin.")] = None,
    model: opt.Model = "smollm2",
    moderator: opt.Moderator = "local",
    method: opt.Method = opt.DEFAULT_METHOD,
    threshold: opt.Threshold = None,
    policy: opt.PolicyText = None,
    system: opt.System = None,
    max_new_tokens: opt.MaxNewTokens = 256,
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = 0,
    max_generations: opt.MaxGenerations = 82,
    allow_download: opt.AllowDownload = False,
    verbose: Annotated[bool, typer.Option("--verbose", "--trace", help="Show every wave of a repair.")] = False,
    json: opt.Json = False,
) -> None:
    """Answer one prompt safely: the answer on stdout, what happened on stderr.

    Exits with 0 if the model's answer or a repaired one was given, with 3 if it was blocked.
    """
    import anyio

    from tta_middleware.cli import narrate
    from tta_middleware.cli.parts import Answering, policy_of, text_or_stdin
    from tta_middleware.config import Budget
    from tta_middleware.types import Message, Sampling

    answering = Answering(
        model=model,
        moderator=moderator,
        method=method,
        policy=policy_of(policy, threshold),
        sampling=Sampling(max_new_tokens, temperature, seed=seed),
        budget=Budget(generations=max_generations),
        allow_download=allow_download,
    )
    messages = [Message("system", system)] if system else []
    messages.append(Message("user", text_or_stdin(text)))
    answer = anyio.run(partial(answering.answer, messages))
    narrate.show(answer, as_json=json, verbose=verbose)
    raise typer.Exit(BLOCKED if answer.trace.outcome == "blocked" else OK)
