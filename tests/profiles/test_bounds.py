"""What the quality gate's fluency bound lets through, by length, and on the embedded model with its own profile."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from tta_middleware import Message, QualityBounds, QualityGate, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import EngineError
from tta_middleware.profiles.calibration import measure
from tta_middleware.profiles.store import quality_for
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.types import Completion, FinishReason, GenerationRequest, QualityReport

BOUNDS = QualityBounds(max_nll=2.5, short_margin=2.0, short_below=40)


async def judged(words: int, nll: float) -> QualityReport:
    """The gate's report on an answer of so many tokens, each as likely as ``nll`` says."""
    engine = ScriptedEngine("unused", nll=lambda _: nll)
    prompt = await engine.embed([Message("user", "Hello")])
    text = " ".join(f"word{'abcdefghij'[i % 10]}{'klmnopqrstu'[i % 11]}" for i in range(words))
    answer = Completion(text, tuple(engine.tokens(text)), "stop")
    (report,) = await QualityGate(BOUNDS).assess(engine, prompt, [answer])
    return report


@pytest.mark.parametrize(
    ("words", "nll", "usable"),
    [(40, 2.5, True), (40, 2.6, False), (100, 2.6, False), (10, 3.9, True), (10, 4.1, False), (2, 4.3, True)],
)
async def test_short_answers_have_more_room(words: int, nll: float, usable: bool) -> None:
    report = await judged(words, nll)
    assert report.usable is usable
    assert report.nll == nll


async def test_an_answer_of_unknown_fluency_is_not_usable() -> None:
    assert (await judged(40, float("nan"))).problems == ("not_fluent",)


@pytest.mark.parametrize(
    ("good", "bad", "reason", "usable"),
    [(100, 20, "stop", False), (100, 20, "length", False), (100, 20, "aborted", True), (100, 4, "stop", True)],
)
async def test_a_good_beginning_hides_no_babble_at_the_end(
    good: int, bad: int, reason: FinishReason, usable: bool
) -> None:
    def nll(text: str) -> float:
        """1 nat for a word that makes sense, 9 for one that makes none."""
        return 1.0 + 8.0 * text.count("zz") / len(text.split())

    engine = ScriptedEngine("unused", nll=nll)
    prompt = await engine.embed([Message("user", "Hello")])
    words = [f"word{'abcdefghij'[i % 10]}{'klmnopqrstu'[i % 11]}" for i in range(good + bad)]
    text = " ".join([*words[:good], *(f"{word}zz" for word in words[good:])])
    lead = tuple(engine.tokens("Hm hm "))
    for done in (
        Completion(text, tuple(engine.tokens(text)), reason),
        Completion(text, (*lead, *engine.tokens(text)), reason, "Hm hm ", len(lead)),
    ):
        [report] = await QualityGate(BOUNDS).assess(engine, prompt, [done])
        assert report.usable is usable
        assert report.nll == pytest.approx(1.0 + 8.0 * bad / (good + bad), rel=0.05)


class BreaksOff(ScriptedEngine):
    """Breaks every answer off, as an engine does that is closed."""

    async def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        return [replace(done, finish_reason="aborted") for done in await super().generate_batch(requests)]


async def test_bounds_are_not_measured_on_answers_that_were_broken_off() -> None:
    with pytest.raises(EngineError, match="broke the answer off"):
        await measure(BreaksOff("A calm answer about gardens."), [[Message("user", "Hello")]])


@pytest.fixture
async def engine() -> AsyncIterator[TransformersEngine]:
    made = TransformersEngine("smollm2")
    yield made
    await made.aclose()


@pytest.mark.slow
async def test_the_embedded_models_profile_tells_answers_from_babble(engine: TransformersEngine) -> None:
    texts = ("Explain how a lighthouse works.", "How do I water a cactus?")
    prompts = [await engine.embed([Message("user", text)]) for text in texts]
    answers = await engine.generate_batch([GenerationRequest(p, Sampling(max_new_tokens=48)) for p in prompts])
    hot = Sampling(max_new_tokens=48, temperature=2.0)
    babble = await engine.generate_batch([GenerationRequest(p, hot) for p in prompts])
    mixed = [Completion("some words", _shuffled(done), "stop") for done in answers]
    gate = quality_for(engine)
    for prompt, usable, *unusable in zip(prompts, answers, babble, mixed, strict=True):
        first, *others = await gate.assess(engine, prompt, [usable, *unusable])
        assert first.usable
        assert [other.problems for other in others] == [("not_fluent",)] * 2


def _shuffled(answer: Completion) -> tuple[int, ...]:
    return tuple(random.Random(0).sample(answer.token_ids, len(answer.token_ids)))
