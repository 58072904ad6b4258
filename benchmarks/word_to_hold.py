"""Flagged streams: from the first harmful word to the hold, what had left by then, and how long the consumer waited.

    python benchmarks/word_to_hold.py PROMPTS.jsonl [--model MODEL] [--moderator local] [--threshold 0.3] [--flagged 30]
        [--flagged-in RUN] [--out FIGURES.jsonl]

The first harmful word is the one with which the answer's beginning, scored alone, first reaches the threshold; a window
may pass it or stop before it, since a window is scored with its context only. The hold is the moment at which the guard
knows: from there on nothing of that answer leaves. Characters and tokens depend on no machine's load, seconds do. With
``--flagged-in`` only those prompts are asked whose answer was flagged in that folder of ``tta eval``; an answer may
differ from the one there, since it is decoded alone, and counts only if it is flagged here, too. Prints counts and
percentiles, no text. ``--replay RUN`` decodes nothing: the flagged answers that a run with ``--keep-text`` kept come
again word by word, which gives the characters alone. A run that was cut off goes on from FIGURES.jsonl, a line a
prompt; ``--flagged 0`` sums it up.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import numpy as np

from tta_middleware import Finished, Guard, Policy, Released, Repair, RepairStarted, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.files.prompts import Prompt, read_prompts
from tta_middleware.policy.verdicts import verdicts_on
from tta_middleware.profiles.store import judge_calibration
from tta_middleware.protocols import Moderator
from tta_middleware.registry import resolve_method, resolve_moderator
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.types import GenerationRequest, TextDelta


class Clocked(TransformersEngine):
    """Notes when each character of an answer came, of the first answer since :meth:`begin`.

    Attributes:
        tokens: of all answers since then that have been read.
        moments: for each character of the first answer, the seconds and the tokens at which it came.
    """

    def begin(self) -> None:
        self.text, self.moments, self.tokens, self._first = "", list[tuple[float, int]](), 0, True

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        mine, self._first = self._first, False
        async with aclosing(super().stream(request)) as deltas:
            async for delta in deltas:
                if mine:
                    self.text += delta.text
                    self.moments += [self.now()] * len(delta.text)
                yield delta

    def stream_batch(self, requests: Sequence[GenerationRequest]) -> list[AsyncGenerator[TextDelta, None]]:
        return [self._counted(deltas) for deltas in super().stream_batch(requests)]

    def now(self) -> tuple[float, int]:
        return time.monotonic(), self.tokens

    async def _counted(self, deltas: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[TextDelta, None]:
        async with aclosing(deltas):
            async for delta in deltas:
                self.tokens += len(delta.token_ids)
                yield delta


@dataclass(frozen=True)
class Held:
    """One flagged stream. ``since`` counts from the harmful word to the hold, ``waited`` from there to the next text;
    both are seconds and tokens.

    Attributes:
        word: where the first harmful word ends; None where no beginning that was decoded reaches the threshold alone.
        hold: where the flagged window ends.
        left: characters that had left when the guard knew.
    """

    word: int | None
    hold: int
    left: int
    since: tuple[float, int] | None
    waited: tuple[float, int] | None


def between(early: tuple[float, int], late: tuple[float, int]) -> tuple[float, int]:
    return late[0] - early[0], late[1] - early[1]


async def first_word(moderator: Moderator, policy: Policy, text: str, prompt: str) -> int | None:
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    verdicts = await verdicts_on(moderator, [text[:end] for end in ends], prompt=prompt)
    return next((end for end, verdict in zip(ends, verdicts, strict=True) if policy.decide(verdict).flagged), None)


async def held(
    engine: Clocked, guard: Guard, moderator: Moderator, policy: Policy, prompt: Prompt, sampling: Sampling
) -> Held | None:
    """What happened, or None where the answer was not flagged."""
    engine.begin()
    left, knew, waited = 0, None, None
    async for event in guard.stream(prompt.messages, sampling):
        now = engine.now()
        if isinstance(event, Released) and knew is None:
            left += len(event.text)
        elif isinstance(event, Released):
            waited = waited or between(knew, now)
        elif isinstance(event, RepairStarted):
            knew = knew or now
        elif isinstance(event, Finished):
            trace = event.answer.trace
    window = next((window for window in trace.windows if window.flagged and not window.repair), None)
    if knew is None or window is None:
        return None
    word = await first_word(moderator, policy, engine.text, prompt.messages[-1].content)
    since = between(engine.moments[word - 1], knew) if word is not None else None
    return Held(word, window.end, left, since, waited)


async def replay(args: argparse.Namespace) -> list[Held]:
    """Kept answers as the guard holds them; tokens and seconds are those of no model, so they are left out."""
    moderator = resolve_moderator(args.moderator, calibration=judge_calibration)
    policy = Policy(threshold=args.threshold)
    questions = {str(prompt.id): prompt for path in args.prompts for prompt in read_prompts(path)}
    found = []
    for id_, text in flagged_in(args.replay).items():
        guard = Guard(ScriptedEngine(text), moderator, policy=policy, repair=Repair(method=None))
        async for event in guard.stream(questions[id_].messages, Sampling(max_new_tokens=len(text) + 1)):
            if isinstance(event, Finished):
                windows = event.answer.trace.windows
        window = next((window for window in windows if window.flagged), None)
        if window is not None:
            word = await first_word(moderator, policy, text, questions[id_].messages[-1].content)
            found.append(Held(word, window.end, window.released, None, None))
    return found


def middle(values: Sequence[float]) -> str:
    return f"{np.percentile(values, 50):.1f} | {np.percentile(values, 95):.1f} | {max(values):.1f}"


def report(found: Sequence[Held]) -> None:
    known = [one for one in found if one.word is not None]
    rows = {
        "characters from the word's end to the end of the flagged window": [one.hold - one.word for one in known],
        "characters that had left by then": [float(one.left) for one in found],
        "of these behind the word's end": [float(max(0, one.left - one.word)) for one in known],
        "tokens decoded from the word to the hold": [one.since[1] for one in found if one.since],
        "seconds from the word to the hold": [one.since[0] for one in found if one.since],
        "tokens decoded from the hold to the next text": [one.waited[1] for one in found if one.waited],
        "seconds from the hold to the next text": [one.waited[0] for one in found if one.waited],
    }
    late = sum(one.left > 0 for one in found)
    never = sum(one.waited is None for one in found)
    print(f"{len(found)} flagged streams, {late} after text had left, {len(known)} with a harmful word")
    timed = [one for one in found if one.since or one.waited]
    print(f"{never} had no text after the hold\n" if timed else "")
    print("| measure | p50 | p95 | most |\n|---|---:|---:|---:|")
    for name, values in rows.items():
        if values:
            print(f"| {name} | {middle(values)} |")


def flagged_in(folder: Path) -> dict[str, str]:
    """The undefended answers that were flagged in a run of ``tta eval``, by prompt."""
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return {str(row["id"]): row["baseline"]["text"] for row in map(json.loads, lines) if row["baseline"]["flagged"]}


class Figures:
    """What was found so far, by prompt, in a file if there is one; None where an answer was not flagged."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.by_id: dict[str, Held | None] = {}
        if path is not None and path.exists():
            for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                self.by_id[row["id"]] = None if row["held"] is None else Held(**row["held"])

    @property
    def found(self) -> list[Held]:
        return [one for one in self.by_id.values() if one is not None]

    def add(self, id_: str, one: Held | None) -> None:
        self.by_id[id_] = one
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"id": id_, "held": None if one is None else asdict(one)}) + "\n")


async def run(args: argparse.Namespace) -> list[Held]:
    figures = Figures(args.out)
    if len(figures.found) >= args.flagged:
        return figures.found
    engine = Clocked(args.model)
    moderator = resolve_moderator(args.moderator, engine=engine, calibration=judge_calibration)
    policy, sampling = Policy(threshold=args.threshold), Sampling(max_new_tokens=args.max_new_tokens)
    guard = Guard(engine, moderator, policy=policy, repair=Repair(method=resolve_method(args.method)))
    try:
        await engine.load()
        wanted = None if args.flagged_in is None else flagged_in(args.flagged_in)
        prompts = [prompt for path in args.prompts for prompt in read_prompts(path)[:: args.every]]
        for prompt in prompts:
            id_ = str(prompt.id)
            if (wanted is not None and id_ not in wanted) or id_ in figures.by_id:
                continue
            figures.add(id_, await held(engine, guard, moderator, policy, prompt, sampling))
            if len(figures.found) == args.flagged:
                break
    finally:
        await engine.aclose()
    return figures.found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, nargs="+")
    parser.add_argument("--flagged-in", type=Path, metavar="RUN")
    parser.add_argument("--replay", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FIGURES.jsonl")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--moderator", default="local")
    parser.add_argument("--method", default="race")
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--flagged", type=int, default=30)
    arguments = parser.parse_args()
    report(anyio.run(replay if arguments.replay else run, arguments))
