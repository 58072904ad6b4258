"""Which rung gave a repair, read from what a run kept; and what other orders of the rungs would have cost."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tta_middleware import Guard, Message, Repair
from tta_middleware.evaluation.comparators.variants import variant
from tta_middleware.evaluation.measures import Measured
from tta_middleware.evaluation.records import Setting, to_record
from tta_middleware.files.prompts import Prompt
from tta_middleware.methods import Race
from tta_middleware.methods.race import INSTEAD, RESPONSIBLE
from tta_middleware.policy import Policy
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

ROOT = Path(__file__).parents[2]
HARM = "Certainly, flagme is done in four steps."
LOOP = "one one one one one one one one one one one one one one"
SAFE = "I would rather help you find a lawful way to do that."


def loaded(path: str) -> dict[str, Any]:
    script = ROOT / path
    sys.path.insert(0, str(script.parent))
    try:
        return runpy.run_path(str(script))
    finally:
        sys.path.remove(str(script.parent))


def second_try() -> Callable[[ScriptedCall], str]:
    """The step loops at first."""
    seen: list[int] = []

    def say(call: ScriptedCall) -> str:
        if call.moved < 0.3:
            return HARM
        seen.append(call.seed)
        return SAFE if len(seen) > 1 else LOOP

    return say


SCRIPTS: dict[str, Callable[[ScriptedCall], str]] = {
    "the first rung": lambda call: SAFE if INSTEAD in call.conversation else HARM,
    "the fourth": lambda call: SAFE if RESPONSIBLE in call.conversation else HARM,
    "the last": lambda call: SAFE if call.moved > 0.6 else HARM,
    "a second try": second_try(),
    "a later round": lambda call: SAFE if call.moved > 0.8 else HARM,
}


async def record(say: Callable[[ScriptedCall], str]) -> dict[str, Any]:
    asked = Prompt("a", (Message("user", "Please tell me how to do the thing"),))
    moderator = ScriptedModerator(score=flagging("flagme"))
    guard = Guard(ScriptedEngine(say, width=64), moderator, policy=0.3, repair=Repair(method=Race()))
    report = await guard.report(asked.messages)
    return to_record(asked, Setting(0, "race"), report, [Measured(refusal=False)] * 2)


@pytest.mark.parametrize("say", SCRIPTS.values(), ids=SCRIPTS)
async def test_a_walk_over_the_scores_ends_at_the_move_that_won(say: Callable[[ScriptedCall], str]) -> None:
    script, kept = loaded("scripts/rungs_won.py"), await record(say)
    walk = script["walked"](kept, 0.7 * 0.3)
    assert kept["neutralised"]
    assert walk[-1].rung == kept["move"]
    assert len(walk) == kept["generations"] - 1


async def test_runs_side_by_side_and_a_walk_that_fits_no_record_is_left_out(tmp_path: Path) -> None:
    script, folder = loaded("scripts/rungs_won.py"), tmp_path / "run"
    folder.mkdir()
    settings = {"policy": Policy(threshold=0.3).model_dump(mode="json")}
    run = {"settings": settings, "methods": {"race": repr(Race())}}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    first, last = await record(SCRIPTS["the first rung"]), await record(SCRIPTS["the last"])
    odd = {**last, "move": "", "relative_move": 0.0}
    old = {name: value for name, value in last.items() if name != "move"}
    other = [{**first, "seed": 1}, {**first, "method": "noise"}, {**first, "neutralised": False}]
    lines = [json.dumps(one) + "\n" for one in [first, old, odd, *other]]
    (folder / "results.jsonl").write_text("".join(lines) + '{"cut', encoding="utf-8")
    counts = script["counted"](folder)
    assert dict(counts.won) == {first["move"]: 1, last["move"]: 1}
    assert counts.asked[first["move"]] == 2
    assert counts.odd == 1
    assert "| 1 / 2 | 50% |" in script["table"]({"Model": counts})


async def test_a_race_of_other_settings_is_refused(tmp_path: Path) -> None:
    run = {"settings": {}, "methods": {"race": repr(Race(growth=0.5))}}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    with pytest.raises(SystemExit, match="not the one of this version"):
        loaded("scripts/rungs_won.py")["counted"](tmp_path)


def test_what_another_order_would_have_cost() -> None:
    """One prompt is mended by the last rung alone, the other by none."""
    pytest.importorskip("scipy")
    script = loaded("benchmarks/rung_order.py")
    rungs = [move.label for move in Race().ladder]
    records = [
        {"id": id_, "rung": rung, "won": id_ == "a" and rung == rungs[-1], "tokens": 10}
        for id_ in "ab"
        for rung in rungs
    ]
    records.append({"id": "cut off", "rung": rungs[0], "won": True, "tokens": 10})
    with pytest.raises(SystemExit, match="run `ask` again"):
        script["costs"](records[-1:], rungs)
    cost = script["costs"](records, rungs)
    assert cost.shape == (2, 720)
    assert (cost[0, 0], cost[0].min(), set(cost[1])) == (60, 10, {60})
    assert "| the order asked | 60 |" in script["table"]({"Model": records})


def test_what_the_answers_of_a_rung_are_worth() -> None:
    script = loaded("benchmarks/rung_order.py")
    good = {"rung": "one", "won": True, "tokens": 10, "relevance": 0.5, "refusal": False, "judged": True}
    records = [{"id": "a", **good}, {"id": "b", "rung": "one", "won": False, "tokens": 30}]
    assert "| one | 1 of 2 | 0 | 0 | 0.50 | 20 |" in script["worth"](records)


def test_so_many_rungs_have_too_many_orders() -> None:
    script = loaded("benchmarks/rung_order.py")
    with pytest.raises(SystemExit, match="too many orders"):
        script["rungs_in"]([{"rung": str(at)} for at in range(8)])


def test_the_ladders_that_were_held_against_each_other_can_still_be_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "data" / "ladders"
    ladders = {path.stem: variant(f"{path.stem}={path}").method for path in sorted(folder.glob("*.json"))}
    assert len(ladders) >= 6
    assert all(isinstance(method, Race) for method in ladders.values())
    assert ladders["reminder-first"] != Race(), "the ladder before (docs/decisions/028)"
