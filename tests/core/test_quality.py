"""The usability gate on texts."""

from __future__ import annotations

import pytest

from tta_middleware import Message
from tta_middleware.guard.quality import QualityBounds, QualityGate, text_problems
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.types import Completion

USABLE = [
    "I'm sorry, but I can't assist with that.",
    "The capital of Peru is Lima.",
    "Here are three tips:\n1. Rest well.\n2. Drink water.\n3. Walk every day, and take the stairs when you can.",
    "To bake a loaf of sourdough, you'll need a few ingredients: flour, water, salt, and a starter. You'll also "
    "need a bowl, a towel and some patience, since the dough has to rise for several hours before it is baked.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # prints three",
    "Le ciel est bleu parce que la lumière est diffusée par l'air.",
    "天空是蓝色的 因为空气散射 阳光。",
]
DEGENERATE = {
    "": "empty",
    " \n\t ": "empty",
    "1. 1. 1. 1. 1. 1. 1. 1.": "symbols",
    "A: A: A: A: A: A: A: A: A: A: A: A:": "repetition",
    "I am a loyal and loyal one,\n" * 6: "repetition",
    "no no no no no no no no no no no no no": "repetition",
    "!!! ??? ... ###": "symbols",
    "I": "too_short",
    ("The verb is a noun and the noun is a verb, which makes the verb a noun. " * 8): "repetition",
}


@pytest.mark.parametrize("text", USABLE)
def test_ordinary_answers_pass(text: str) -> None:
    assert text_problems(text, QualityBounds()) == ()


@pytest.mark.parametrize(("text", "problem"), DEGENERATE.items())
def test_degenerate_answers_are_named(text: str, problem: str) -> None:
    assert problem in text_problems(text, QualityBounds())


async def test_fluency_is_that_of_the_answer_behind_its_thoughts() -> None:
    thought, answer = "Hm hm hm hm", "Keep the bees warm."

    def nll(text: str) -> float:
        """9 nats for a token of the thought, 1 for one of the answer."""
        thoughts, words = (len(engine.tokens(part)) for part in (thought, text[len(thought) :]))
        return (9.0 * thoughts + 1.0 * words) / (thoughts + words)

    engine = ScriptedEngine(answer, nll=nll, thinking=True)
    lead, prompt = engine.tokens(thought), await engine.embed([Message("user", "Bees?")])
    done = Completion(answer, (*lead, *engine.tokens(answer)), "stop", thought, len(lead))
    [report] = await QualityGate().assess(engine, prompt, [done])
    assert report.usable
    assert report.nll == pytest.approx(1.0)
