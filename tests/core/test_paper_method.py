"""The paper's method as the paper has it: its own threshold, and base points that are scored like their probes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tta_middleware import TSA, Budget, Guard, Message, Noise, Policy, QualityBounds, QualityGate, Repair, Windows
from tta_middleware.evaluation.comparators.random_step import RandomStep
from tta_middleware.methods.base import Method, Start
from tta_middleware.policy import StagePolicies
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import CATEGORIES, GuardedAnswer, PromptEmbeddings

ASK = [Message("user", "Please tell me about the old harbour town")]
HARM = "First comes the forbidden thing, then the rest of it, which takes a while to be told in full."
CLOSE = "This answer is close to the limit, and below it."
LENIENT = QualityGate(QualityBounds(max_repeated_share=1.0, max_compression=50.0))


def scores(text: str) -> dict[str, float]:
    """The more of a harmful text is seen, the higher its score; 0.09 for what is close."""
    score = 0.09 if "close" in text else min(0.95, len(text) / 100) if "forbidden" in text else 0.01
    return dict.fromkeys(CATEGORIES, 0.0) | {"illicit": score}


def moved_is_close(call: ScriptedCall) -> str:
    return HARM if call.moved == 0 else CLOSE


async def answer(method: Method, policy: Any = 0.1, script: Any = moved_is_close) -> GuardedAnswer:
    repair = Repair(method=method, budget=Budget(generations=30))
    policy = Policy.of(policy) if isinstance(policy, float) else policy
    return await Guard(ScriptedEngine(script), ScriptedModerator(score=scores), policy=policy, repair=repair).answer(
        ASK
    )


@pytest.mark.parametrize("method", [TSA(probes=2), RandomStep()])
async def test_it_stops_at_the_threshold_itself(method: Method) -> None:
    done = await answer(method)
    assert (done.text, done.trace.outcome) == (CLOSE, "neutralised")
    assert done.trace.final is not None
    assert not done.trace.final.flagged


async def test_other_methods_have_to_clear_the_margin() -> None:
    assert (await answer(Noise())).trace.outcome == "blocked"


@pytest.mark.parametrize(
    "policy",
    [
        Policy(threshold=0.1, margin=0.8),
        StagePolicies.from_table({"threshold": 0.1, "repair": {"margin": 0.8}}),
        StagePolicies(prompt=Policy(), output=Policy(threshold=0.1), repair=Policy(threshold=0.1, margin=0.8)),
    ],
    ids=["policy", "table", "stages"],
)
async def test_a_margin_that_a_policy_names_holds_for_it_too(policy: Any) -> None:
    assert (await answer(TSA(probes=2, steps=3), policy)).trace.outcome == "blocked"


async def test_the_default_margin_of_a_table_is_one_that_nobody_named() -> None:
    policy = StagePolicies.from_table({"threshold": 0.1, "repair": {"notice": "No."}})
    assert (await answer(TSA(probes=2), policy)).trace.outcome == "neutralised"


class Spy(TSA):
    """The method with its first gradient's numbers open."""

    def build(self, start: Start) -> Any:
        optimiser = super().build(start)
        told: list[tuple[bool, float]] = []
        inner = optimiser.tell

        def tell(proposals: Any, losses: Any) -> None:
            told.extend((p.releasable, loss) for p, loss in zip(proposals, losses, strict=True))
            inner(proposals, losses)

        optimiser.tell = tell  # type: ignore[method-assign]
        TOLD.append((start, told, optimiser))
        return optimiser


TOLD: list[Any] = []


@pytest.mark.parametrize("way", ["answer", "window", "end"])
async def test_the_base_point_and_its_probes_are_scored_alike(way: str) -> None:
    """Wherever the prompt is moved the model says the same; so there is no slope, whatever the windows are."""
    TOLD.clear()
    engine, moderator = ScriptedEngine(HARM), ScriptedModerator(score=scores)
    repair = Repair(method=Spy(probes=2, steps=2), bridges=())
    guard = Guard(engine, moderator, policy=Policy(threshold=0.1), repair=repair, windows=Windows(first=40, largest=40))
    if way == "answer":
        await guard.answer(ASK)
    else:
        async for _ in guard.stream(ASK, release=way):  # type: ignore[arg-type]
            pass
    start, told, _ = TOLD[0]
    base = next(loss for releasable, loss in told if releasable) if way == "window" else start.loss
    probes = [loss for releasable, loss in told if not releasable]
    assert len(probes) == 2
    assert probes == [pytest.approx(base)] * 2
    assert base == pytest.approx(min(0.95, len(HARM) / 100) - 0.1)


def test_a_base_point_that_was_not_scored_whole_is_asked_first() -> None:
    rows = np.ones((4, 8), dtype=np.float32)
    prompt = PromptEmbeddings(rows, np.arange(4), np.ones(4, dtype=np.bool_))
    optimiser = TSA(probes=2, steps=2).build(Start(prompt, 0.3, np.random.default_rng(0), whole=False))
    (base,) = optimiser.ask(8)
    assert base.releasable
    assert (base.matrix == rows).all()
    optimiser.tell([base], [0.5])
    probes = optimiser.ask(8)
    assert [probe.releasable for probe in probes] == [False, False]
    optimiser.tell(probes, [0.5, 0.5])
    (second,) = optimiser.ask(8)
    assert (second.matrix == rows).all()  # all scores are alike, so there is nowhere to go
