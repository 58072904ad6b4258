"""A model that thinks, on every surface of LangChain and LangGraph: nothing leaks, and where its thoughts go.

Thoughts are hidden, shown or off; clean, flagged, without end, or followed by an answer that is flagged. Hidden ones
turn up nowhere; shown ones wherever messages or their chunks do, and nowhere before they were checked.
``python tests/langchain/test_reasoning_surfaces.py`` prints the table of docs/reasoning.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from surface_calls import SURFACES, Surface
from surface_cases import Case, Oracle, serving, thinking
from surface_cell import Stage

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),
]

_QUICK_SURFACES = {"ainvoke", "astream"}


def _cells() -> Iterator[Any]:
    for called in SURFACES:
        for case in thinking():
            marks = [] if called.name in _QUICK_SURFACES else [pytest.mark.slow]
            yield pytest.param(called, case, id=f"{called.name}-{case.name}", marks=marks)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    oracle = Oracle()
    with serving(oracle) as server:
        yield Stage(oracle, server)


@pytest.mark.parametrize(("called", "case"), list(_cells()))
def test_nothing_leaks_and_thoughts_go_where_they_are_meant_to(stage: Stage, called: Surface, case: Case) -> None:
    result = stage.play(called, case)
    print(
        called.name,
        "|",
        case.name,
        "|",
        result.seen,
        "|",
        {k: len(v) for k, v in result.leaked.items()},
        sorted(result.thoughts),
    )
