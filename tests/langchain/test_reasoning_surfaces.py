"""A model that thinks, on every surface of LangChain and LangGraph: nothing leaks, and where its thoughts go.

Thoughts are hidden, shown or off; clean, flagged, without end, or followed by an answer that is flagged. Hidden ones
turn up nowhere; shown ones wherever messages or their chunks do, and nowhere before they were checked.
``python tests/langchain/test_reasoning_surfaces.py`` prints the table of docs/reasoning.md.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from surface_calls import SURFACES, Surface
from surface_cases import MODES, Case, thinking
from surface_cell import Result, Stage, check_nothing_is_left, expected, on_stage, parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),
]

_SEEN = {
    "graph.astream custom": dict.fromkeys(["thought flagged", "thought without end"], frozenset({"nothing"})),
    "ainvoke, structured output": {"thought without end": frozenset({"OutputParserException"})},
    "astream, structured output": {"thought without end": frozenset({"OutputParserException"})},
}
"""What consumers see besides: of repairs alone there, and of no JSON at all here."""


def _named(case: Case) -> tuple[str, str]:
    """What happens, and what becomes of thoughts."""
    what, _, mode = case.name.partition(", ")
    return what, mode


def _expected(called: Surface, case: Case) -> frozenset[str]:
    what, mode = _named(case)
    special = _SEEN.get(called.name, {}).get(what)
    if special is None or (mode == "off" and called.name != "graph.astream custom"):
        return expected(called, case)
    return special


def _quick(called: Surface, case: Case) -> bool:
    return called.name == "astream" or (called.name == "ainvoke" and case.thought == "flagged")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with on_stage() as one:
        yield one


@pytest.mark.parametrize(("called", "case"), parameters(product(SURFACES, thinking()), _quick))
def test_nothing_leaks_and_thoughts_go_where_they_are_meant_to(stage: Stage, called: Surface, case: Case) -> None:
    result, (what, mode) = stage.play(called, case), _named(case)
    check_nothing_is_left(result)
    assert result.seen in _expected(called, case)
    if mode != "show":
        assert result.thoughts == frozenset()
    elif what in ("clean", "thought without end"):
        assert "tracer" in result.thoughts


def table(results: dict[tuple[str, str], list[Result]]) -> Iterator[str]:
    """Where thoughts turned up, in how many of the surfaces."""
    yield "| | thoughts | cells | leaked characters | at the consumer | at callbacks and tracers | in checkpoints |"
    yield "|---|---|---|---|---|---|---|"
    for (what, mode), cells in results.items():
        leaked = sum(result.leaked_characters for result in cells)
        consumer, kept = (sum(place in result.thoughts for result in cells) for place in ("consumer", "checkpoints"))
        told = sum(any(place not in ("consumer", "checkpoints") for place in result.thoughts) for result in cells)
        yield f"| {what} | {mode} | {len(cells)} | {leaked} | {consumer} | {told} | {kept} |"


def main() -> None:
    found: dict[tuple[str, str], list[Result]] = {}
    with warnings.catch_warnings(), on_stage() as stage:
        warnings.simplefilter("ignore")
        for case in thinking():
            found[_named(case)] = [stage.play(called, case) for called in SURFACES]
    print("\n".join(table(found)))
    assert {mode for _, mode in found} == set(MODES)


if __name__ == "__main__":
    main()
