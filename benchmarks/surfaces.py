"""The matrix of LangChain surfaces and what may happen to an answer, as a Markdown table.

    python benchmarks/surfaces.py > docs/results/surfaces.md

Runs every cell of tests/langchain/test_surfaces.py on the scripted engine, with the openai client against a moderation
server on the loopback interface; then every surface again while one part is slower than usual. About five minutes on
two cores.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "langchain"))
from surface_calls import SURFACES, Surface
from surface_cases import CASES, DELAYED, DELAYS, MARK, Case, Oracle, serving
from surface_cell import Result, Stage, applies, delayed_cells, expected

_PACKAGES = ("tta-middleware", "langchain-core", "langchain", "langgraph", "openai")


def main() -> None:
    warnings.simplefilter("ignore")
    oracle = Oracle()
    with serving(oracle) as server:
        stage = Stage(oracle, server)
        rows = {surface: _row(stage, surface) for surface in SURFACES}
        slow = [(surface, case, stage.play(surface, case)) for surface, case in delayed_cells()]
    print("\n".join([*_report(rows), "", *_delays(slow)]))


def _delays(played: list[tuple[Surface, Case, Result]]) -> list[str]:
    """What the same surfaces let out while one part is slower than it usually is."""
    lines = ["| what is slow | cells | leaked characters | tasks | threads | sockets | not as they should be |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name in DELAYS:
        some = [(surface, case, result) for surface, case, result in played if case.name.endswith(name)]
        results = [result for _, _, result in some]
        counts = (
            len(results),
            sum(result.leaked_characters for result in results),
            sum(len(result.tasks) for result in results),
            sum(len(result.threads) for result in results),
            sum(result.sockets for result in results),
            sum(not _as_wanted(*one) for one in some),
        )
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    odd = [(s, c, r) for s, c, r in played if not _as_wanted(s, c, r)]
    notes = [f"- Not as it should be: {s.name}, {c.name}: {r.seen}; {_left(r)}." for s, c, r in odd]
    return ["## With unequal delays", "", f"Every surface, with {', '.join(DELAYED)}.", "", *lines, "", *notes]


def _row(stage: Stage, surface: Surface) -> dict[Case, Result | None]:
    print(surface.name, file=sys.stderr)
    return {case: stage.play(surface, case) if applies(surface, case) else None for case in CASES}


def _report(rows: dict[Surface, dict[Case, Result | None]]) -> list[str]:
    results = [result for row in rows.values() for result in row.values() if result is not None]
    odd = [(s, c, r) for s, row in rows.items() for c, r in row.items() if r and not _as_wanted(s, c, r)]
    return [
        "# What LangChain's surfaces let out and leave behind",
        "",
        f"Each cell: what the consumer saw; then leaked characters / tasks / threads / sockets left. `0` stands for "
        f"four zeros. {len(results)} cells: {sum(r.leaked_characters for r in results)} characters leaked, "
        f"{sum(len(r.tasks) for r in results)} tasks, {sum(len(r.threads) for r in results)} threads and "
        f"{sum(r.sockets for r in results)} sockets left; {len(odd)} cells are not as they should be.",
        "",
        *_table(rows),
        "",
        *_legend(rows),
        "",
        *[f"- Not as it should be: {s.name}, {c.name}: {r.seen}; {_left(r)}." for s, c, r in odd],
        "",
        "Command: `python benchmarks/surfaces.py`  ",
        f"Versions: {', '.join(f'{name} {version(name)}' for name in _PACKAGES)}, python {sys.version.split()[0]}",
    ]


def _table(rows: dict[Surface, dict[Case, Result | None]]) -> list[str]:
    head = ["surface", *(case.name for case in CASES), "events"]
    lines = [head, ["---"] * len(head)]
    for surface, row in rows.items():
        lines.append([surface.name, *(_cell(row[case]) for case in CASES), _events(row)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(result: Result | None) -> str:
    return "-" if result is None else f"{_short(result.seen)}; {_left(result)}"


def _left(result: Result) -> str:
    counts = (result.leaked_characters, len(result.tasks), len(result.threads), result.sockets)
    return "0" if not any(counts) else "/".join(map(str, counts))


def _short(seen: str) -> str:
    letters = {"beginning": "b", "rest": "r", "notice": "n", "substitute": "s", "nothing": "nothing"}
    return " ".join(letters.get(part, part.removesuffix("Error")) for part in seen.split(", "))


def _events(row: dict[Case, Result | None]) -> str:
    """Custom events of the late flag's repair."""
    late = next(result for case, result in row.items() if case.name == "late flag")
    return str(len(late.custom)) if late else "-"


def _legend(rows: dict[Surface, dict[Case, Result | None]]) -> list[str]:
    limits: dict[str, list[str]] = {}
    for surface in rows:
        if surface.limit:
            limits.setdefault(surface.limit, []).append(surface.name)
    kinds = Counter(surface.kind for surface in rows)
    return [
        "What was seen: `b` the answer's beginning, `r` its safe rest (its own, or a repair's), `n` the policy's",
        "notice, `s` another model's answer, or the error. `-`: a consumer of this surface cannot leave in this way.",
        "`events`: custom events that callbacks got of a late flag's repair; there are none where no run is around the",
        "model, or",
        "where the answer is not streamed.",
        "",
        "Leaked: characters of words that the engine wrote, that stand in no text which the oracle found safe",
        f"(`{MARK}` always among them), and that turned up in anything recorded: the consumer's items, arguments of",
        "all sync and async callbacks, runs of a tracer, what a downstream generator saw, errors with their",
        "tracebacks, logs at DEBUG, LangChain's cache, LangGraph's checkpoints. Tasks are counted before a call's",
        "event loop ends, threads and sockets (at the server) after it.",
        "",
        f"Surfaces: {kinds['acall'] + kinds['astream']} async, {kinds['call'] + kinds['stream']} sync. Where the",
        "framework itself goes on after its consumer has left, decoding goes on to its end, and what is left is",
        "counted then:",
        "",
        *[f"- {limit}: {', '.join(names)}." for limit, names in limits.items()],
    ]


def _as_wanted(surface: Surface, case: Case, result: Result) -> bool:
    left = result.leaked or result.tasks or result.threads or result.sockets or result.complaints
    return result.seen in expected(surface, case) and not left


if __name__ == "__main__":
    main()
