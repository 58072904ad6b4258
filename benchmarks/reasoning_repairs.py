"""Repairs of a model that thinks: what its candidates are let think, on a staged model.

    python benchmarks/reasoning_repairs.py ../shared/data/prompts/advbench.jsonl --flagged 24 --threshold 0.2

No model that thinks is at hand, so one is staged: the end of a model's chat template opens a thought (``<think>``),
the model writes into it what it would have written as its answer, and the guard closes it after ``--thought`` tokens.
So its thoughts are as harmful as its answers would be, and it never closes one itself. Prompts are asked in their
order, eight at once, until enough thoughts or answers were flagged; these prompts are then asked with every setting.
Prints a markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from tta_middleware import Guard, Repair, Sampling
from tta_middleware.assembly import Budget
from tta_middleware.config import Reasoning
from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.torch_import import import_transformers
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.files.prompts import Prompt, read_prompts
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.registry import resolve_method
from tta_middleware.types import Trace

AT_ONCE = 8

OPENING = "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"

LET_THINK: dict[str, int | None] = {"not at all": 0, "briefly": 16, "as the first answer": None}
"""What a row of the table lets candidates think, in tokens."""


def staged(model: str, folder: Path) -> str:
    """A copy of a model's folder whose chat template ends with an open thought; weights are linked."""
    source = resolve_model(model)
    for file in source.iterdir():
        if file.name not in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
            (folder / file.name).symlink_to(file)
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    tokenizer.chat_template += OPENING
    tokenizer.save_pretrained(str(folder))
    return str(folder)


@dataclass(frozen=True)
class Row:
    """One prompt that was flagged."""

    trace: Trace

    @property
    def in_thought(self) -> bool:
        score = self.trace.reasoning.score if self.trace.reasoning else None
        return score is not None and score.flagged


def guarded(engine: TransformersEngine, arguments: argparse.Namespace, tokens: int | None) -> Guard:
    repair = Repair(
        method=resolve_method(arguments.method),
        budget=Budget(generations=arguments.generations),
        reasoning_tokens=tokens,
    )
    reasoning = Reasoning(max_tokens=arguments.thought)
    return Guard(engine, EmbeddedModerator(), policy=arguments.threshold, repair=repair, reasoning=reasoning)


async def answered(guard: Guard, prompts: Sequence[Prompt], sampling: Sampling) -> list[tuple[Prompt, Row]]:
    """The prompts that were flagged, and what became of them."""
    found: dict[int, Row] = {}

    async def ask(at: int) -> None:
        found[at] = Row((await guard.answer(prompts[at].messages, sampling)).trace)

    async with anyio.create_task_group() as tasks:
        for at in range(len(prompts)):
            tasks.start_soon(ask, at)
    flagged = [at for at in sorted(found) if (told := found[at].trace.baseline) is not None and told.flagged]
    return [(prompts[at], found[at]) for at in flagged]


async def run(arguments: argparse.Namespace, folder: str) -> dict[str, list[Row]]:
    engine = TransformersEngine(folder)
    prompts = list(read_prompts(Path(arguments.prompts)))
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
    kept: list[Prompt] = []
    found: dict[str, list[Row]] = {}
    try:
        for name, tokens in LET_THINK.items():
            guard = guarded(engine, arguments, tokens)
            # The first answers are the same for every setting, so the first one finds out which are flagged.
            asked, rows = kept or prompts, list[tuple[Prompt, Row]]()
            for start in range(0, len(asked), AT_ONCE):
                rows += await answered(guard, asked[start : start + AT_ONCE], sampling)
                if not kept and len(rows) >= arguments.flagged:
                    break
            kept = kept or [prompt for prompt, _ in rows]
            found[name] = [row for _, row in rows]
            print(f"{name}: {len(rows)} flagged of {min(start + AT_ONCE, len(asked))}", file=sys.stderr, flush=True)
    finally:
        await engine.aclose()
    return found


def report(found: dict[str, list[Row]]) -> None:
    print("| candidates think | flagged, in the thought | neutralised | generations | tokens |")
    print("|---|---|---|---|---|")
    for name, rows in found.items():
        for where, some in (("", rows), (" (flagged thoughts)", [row for row in rows if row.in_thought])):
            if not some:
                continue
            done = sum(row.trace.outcome == "neutralised" for row in some)
            traces = [row.trace for row in some]
            generations = statistics.mean(trace.generations for trace in traces)
            tokens = statistics.mean(trace.generated_tokens for trace in traces)
            flagged = f"{len(some)}, {sum(row.in_thought for row in some)}"
            print(f"| {name}{where} | {flagged} | {done} | {generations:.1f} | {tokens:.0f} |")
    closed = sum(row.trace.move == "thought closed" for row in found["not at all"])
    print(f"\nOf the first row, {closed} were mended by closing the thought alone.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--flagged", type=int, default=24, help="ask until so many prompts were flagged")
    parser.add_argument("--thought", type=int, default=48)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--generations", type=int, default=12)
    parser.add_argument("--method", default="race")
    parser.add_argument("--threshold", type=float, default=0.5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(anyio.run(run, arguments, staged(arguments.model, Path(folder))))


if __name__ == "__main__":
    main()
