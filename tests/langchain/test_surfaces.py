"""No surface of LangChain or LangGraph lets flagged or unchecked text out, and none leaves anything behind.

The moderator is the real openai client, and the server another thread of this process. Sockets and threads are counted
after the event loop of a call has ended, tasks before; what was recorded is searched as text. The quick run has every
surface that is not made of two others with a late flag and with a consumer who leaves, and every case on the surfaces
that all others are built on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

sys.path.insert(0, str(Path(__file__).parent))
from surface_calls import Surface, agent, surface
from surface_cases import ENDLESS, NOTICE, START, Case, case, engine, said, secrets, texts
from surface_cell import (
    EVENTS,
    Result,
    Stage,
    cells,
    check_nothing_is_left,
    delayed_cells,
    expected,
    listening,
    on_stage,
    parameters,
)

from tta_middleware import Policy

pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),
]

_CURED = {"early flag", "late flag", "flag over a boundary", "flag in the last window"}
_QUICK_CASES = {"late flag"}
_QUICK_SURFACES = {"ainvoke", "astream", "stream"}
_MADE_OF_OTHERS = {
    "chain.astream_events v2", "chain.astream_log", "graph.astream messages", "graph.astream updates",
    "graph.astream values", "graph.astream, sync node",
}  # fmt: skip


def _quick(called: Surface, staged: Case) -> bool:
    if called.name in _QUICK_SURFACES:
        return True
    return called.name not in _MADE_OF_OTHERS and staged.name in _QUICK_CASES


def _quick_if_delayed(called: Surface, staged: Case) -> bool:
    return called.name in _QUICK_SURFACES and staged.name.startswith("late flag")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with on_stage() as one:
        yield one


@pytest.mark.parametrize(("called", "staged"), parameters(cells(), _quick))
def test_nothing_leaks_and_nothing_is_left(stage: Stage, called: Surface, staged: Case) -> None:
    result = stage.play(called, staged)
    check_nothing_is_left(result)
    assert result.seen in expected(called, staged)
    if staged.leaving and not called.limit:
        assert result.steps < len(ENDLESS)
    _check_events(called, staged, result)


@pytest.mark.parametrize(("called", "staged"), parameters(delayed_cells(), _quick_if_delayed))
def test_nothing_leaks_whatever_is_slow(stage: Stage, called: Surface, staged: Case) -> None:
    result = stage.play(called, staged)
    check_nothing_is_left(result)
    assert result.seen in expected(called, staged)


def _check_events(called: Surface, staged: Case, result: Result) -> None:
    """A repair tells of itself wherever a run is around the model, without a word of the answer."""
    assert result.custom_words == set()
    if called.events and staged.name in _CURED:
        assert set(result.custom) == EVENTS
    if called.writes and staged.name in _CURED:
        assert result.written == EVENTS


def test_the_search_finds_what_leaks(stage: Stage) -> None:
    """The same cells under a policy that lets the marker pass: it turns up wherever the record looks."""
    open_door = replace(case("late flag"), model={"policy": Policy(threshold=0.95)})
    leaked = stage.play(surface("agent.astream"), open_door).leaked
    everywhere = {"consumer", "tracer", "checkpoints", "callback on_llm_new_token", "async callback on_llm_end"}
    assert everywhere <= set(leaked)
    assert all(
        words >= said(texts(open_door, "text", 0).own) - said(" ".join(START))
        for words in (leaked["consumer"], leaked["tracer"], leaked["checkpoints"])
    )


@pytest.mark.parametrize("named", ["late flag", "no repair method"])
async def test_an_agent_goes_on_after_a_flagged_turn_and_keeps_nothing_of_it(stage: Stage, named: str) -> None:
    flagged, clean = case(named), case("clean")
    scene = stage.scene(surface("agent.astream"), flagged)
    made, config = agent(scene), {**scene.config, "configurable": {"thread_id": "one"}}
    with listening(scene.record):
        for question in ("Please describe the old harbour town", "And its market?"):
            asked: Any = {"messages": [HumanMessage(question)]}
            async for event in made.astream_events(asked, config, version="v2"):
                scene.record.item(event)
            scene.model.model = engine(clean, "text", 0)
        await scene.model.moderator.aclose()
    state = [snapshot async for snapshot in made.aget_state_history(config)]
    scene.record.note("states", state)
    scene.record.note("checkpoints", vars(scene.kept["checkpoints"]))
    assert scene.record.places(lambda text: said(text) & secrets(flagged, "text", 0, stage.oracle)) == {}
    first, second = [message for message in state[0].values["messages"] if message.type == "ai"]
    assert (NOTICE in first.text) == (named == "no repair method")
    assert second.text == texts(clean, "text", 0).own
