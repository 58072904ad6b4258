"""What the runs come to: leaked characters, medians, ratios over the unguarded stream, the table.

    python benchmarks/streaming/figures.py RESULTS.jsonl

prints the tables of the README.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Run:
    """One answer as its consumer met it.

    Attributes:
        kind: how the system was set up; ``baseline`` names the unguarded kind it is held against.
        latency: of the moderation service, in seconds.
        first: seconds to the first text; None if there was none.
        seconds: until the stream ended.
        calls: requests to the moderation service; ``characters`` were sent in them.
        leaked: characters of the flagged text that were released, from the mark on.
        intact: the consumer has the whole answer without the mark, and nothing else.
        kept: the mark is in what the system keeps as the conversation's state; None if it was not looked at.
        error: what was raised at the consumer.
        ending: the last that the consumer read.
    """

    system: str
    kind: str
    baseline: str
    scenario: str
    latency: float
    repeat: int
    first: float | None
    seconds: float
    calls: int
    characters: int
    leaked: int
    intact: bool
    kept: bool | None
    error: str | None
    ending: str


def leaked(flagged: str, mark: str, seen: str) -> int:
    """Characters of ``flagged`` that were seen, from where ``mark`` begins in it.

    Text before the mark may have been altered on its way (white space between sentences, say), so the mark is also
    looked for wherever it stands in ``seen``.
    """
    begin = flagged.index(mark)
    at = seen.find(mark)
    anywhere = _shared(flagged[begin:], seen[at:]) if at >= 0 else 0
    return max(_shared(flagged, seen) - begin, anywhere, 0)


def load(path: Path) -> list[Run]:
    return [Run(**json.loads(line)) for line in path.read_text().splitlines()]


def ratio(runs: Iterable[Run], run: Run) -> float:
    """Time over that of the unguarded stream of the same system, question and repeat."""
    key = (run.system, run.baseline, run.scenario, run.latency, run.repeat)
    base = next(r for r in runs if (r.system, r.kind, r.scenario, r.latency, r.repeat) == key)
    return run.seconds / base.seconds


def timing(runs: Sequence[Run]) -> str:
    """The clean answer: medians over the repeats."""
    latencies = sorted({run.latency for run in runs})
    head = [f"{what}, {at * 1000:.0f} ms" for at in latencies for what in ("first", "ratio", "calls")]
    lines = [["system", "set-up", *head, "whole"]]
    for system, kind, own in _by_kind(runs, "clean"):
        cells = [cell for at in latencies for cell in _timing(runs, [run for run in own if run.latency == at])]
        lines.append([system, kind, *cells, "yes" if all(run.intact for run in own) else "no"])
    return _markdown(lines)


def _timing(runs: Sequence[Run], own: Sequence[Run]) -> list[str]:
    if not own:
        return ["-"] * 3
    first = statistics.median(run.seconds if run.first is None else run.first for run in own)
    ratios = statistics.median(ratio(runs, run) for run in own)
    return [f"{first * 1000:.0f} ms", f"{ratios:.2f}", f"{statistics.median(run.calls for run in own):.0f}"]


def leaks(runs: Sequence[Run]) -> str:
    """The answer with the mark: the worst over all repeats and latencies, and what the last consumer was left with."""
    lines = [["system", "set-up", "leaked characters", "the consumer's end", "mark stays in state"]]
    for system, kind, own in _by_kind(runs, "flagged"):
        kept = {None: "-", False: "no", True: "yes"}[own[-1].kept]
        lines.append([system, kind, str(max(run.leaked for run in own)), _end(own[-1]), kept])
    return _markdown(lines)


def table(runs: Sequence[Run]) -> str:
    return f"{timing(runs)}\n\n{leaks(runs)}"


def _by_kind(runs: Sequence[Run], scenario: str) -> Iterator[tuple[str, str, list[Run]]]:
    for system, kind in dict.fromkeys((run.system, run.kind) for run in runs):
        yield system, kind, [run for run in runs if (run.system, run.kind, run.scenario) == (system, kind, scenario)]


def _end(run: Run) -> str:
    if run.error:
        return f"`{run.error.partition(':')[0]}` raised"
    return "the whole answer, repaired" if run.intact else f"`...{run.ending}`"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


def _shared(left: str, right: str) -> int:
    """Length of the common beginning."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


if __name__ == "__main__":
    print(table(load(Path(sys.argv[1]))))
