"""``tta eval``: methods compared on a set of prompts."""

from __future__ import annotations

import typer

from tta_middleware.cli import eval_options as own
from tta_middleware.cli import options as opt

COMMAND = "command"
"""Where the context keeps the command as it was typed, for the report."""


@opt.grouped(opt.LoadingOptions)
def evaluate(
    context: typer.Context,
    prompts: own.Prompts,
    out: own.Out,
    asked: opt.LoadingOptions,
    methods: own.Methods = "none,resample,noise,race,tsa",
    variant: own.Variant = None,
    moderator: opt.Moderator = "local",
    judge: own.Judge = None,
    relevance: own.Relevance = False,
    limit: own.Limit = None,
    benign_only: own.BenignOnly = False,
    jailbreak: own.Jailbreak = None,
    seeds: own.Seeds = "0",
    concurrency: own.Concurrency = 1,
    max_new_tokens: opt.MaxNewTokens = 64,
    temperature: opt.Temperature = 0.0,
    threshold: opt.Threshold = None,
    policy: opt.PolicyText = None,
    max_generations: opt.MaxGenerations = 82,
    report: own.ReportFile = None,
    report_examples: own.Examples = 0,
    reference: own.Reference = None,
    keep_text: own.KeepText = False,
    json: opt.Json = False,
) -> None:
    """Compare methods: how many flagged answers become safe and usable, and at what cost.

    Writes results.jsonl, summary.json and summary.md to DIR. Run it again to go on where it was cut off, or to add
    methods, seeds, prompts or, with --keep-text, judges. The report, the tests and their intervals need the extra:
    tta-middleware[eval].
    """
    from tta_middleware.cli.eval_job import EvaluationOutput, EvaluationRequest, Scope, parse_seeds, run_eval
    from tta_middleware.cli.typed import policy_of
    from tta_middleware.config import Budget
    from tta_middleware.types import Sampling

    if report is None:
        opt.refuse_useless(context, ["report_examples"], "without --report")
    run_eval(
        EvaluationRequest(
            scope=Scope(prompts, limit, benign_only, jailbreak, parse_seeds(seeds), concurrency),
            methods=methods,
            variants=tuple(variant or ()),
            loading=asked.loading(),
            moderator=moderator,
            judges=tuple(judge or ()),
            relevance=relevance,
            policy=policy_of(policy, threshold),
            sampling=Sampling(max_new_tokens, temperature),
            budget=Budget(generations=max_generations),
            output=EvaluationOutput(out, report, report_examples, reference, keep_text, json),
            command=context.obj[COMMAND],
        )
    )
