"""The scripted engine's own features; the contract is in test_contract."""

from __future__ import annotations

import math

import anyio
import pytest

from tta_middleware import Guard
from tta_middleware.errors import EngineError
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling


def request(prompt: PromptEmbeddings, tokens: int = 50, **sampling: int) -> GenerationRequest:
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens, **sampling))


async def answer(engine: ScriptedEngine, prompt: PromptEmbeddings) -> str:
    return (await engine.generate_batch([request(prompt)]))[0].text


async def test_a_script_may_look_at_the_prompt_the_move_the_prefix_and_the_seed() -> None:
    seen: list[ScriptedCall] = []

    def script(call: ScriptedCall) -> str:
        seen.append(call)
        return "safe" if call.moved > 0.5 else "not safe"

    engine = ScriptedEngine(script)
    prompt = await engine.embed([Message("user", "Is  it 🙂?")], assistant_prefix="Well, it")
    assert await answer(engine, prompt) == "not safe"
    moved = prompt.matrix.copy()
    moved[prompt.user_mask] *= 1.75
    assert await answer(engine, prompt.moved(moved)) == "safe"
    assert seen[0] == ScriptedCall("Is  it 🙂?", 0.0, "Well, it", 0)
    assert seen[1].moved == pytest.approx(0.75)


async def test_a_mapping_answers_by_user_text() -> None:
    engine = ScriptedEngine({"one": "first", "two": "second"})
    for text, expected in (("two", "second"), ("one", "first")):
        assert await answer(engine, await engine.embed([Message("user", text)])) == expected


async def test_half_a_surrogate_pair_is_a_character_like_any() -> None:
    engine = ScriptedEngine("half \ud83d of a pair")
    assert await answer(engine, await engine.embed([Message("user", "and \ude42?")])) == "half \ud83d of a pair"
    guarded = await Guard(engine, ScriptedModerator()).answer([Message("user", "and \ude42?")])
    assert guarded.text == "half \ud83d of a pair"


async def test_the_fault_comes_at_its_step_and_only_then() -> None:
    engine = ScriptedEngine("one two three", fail_at_step=2)
    prompt = await engine.embed([Message("user", "Hi")])
    stream = engine.stream(request(prompt))
    assert (await anext(stream)).text == "one"
    with pytest.raises(EngineError, match="step 2"):
        await anext(stream)
    assert await answer(engine, prompt) == "one two three"


async def test_every_step_pauses_through_the_given_sleeper() -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await anyio.lowlevel.checkpoint()

    engine = ScriptedEngine("a b c", step_seconds=0.25, sleep=sleep)
    prompt = await engine.embed([Message("user", "Hi")])
    await engine.generate_batch([request(prompt, 2), request(prompt, 3)])
    assert pauses == [0.25] * 3
    assert engine.steps == 3


async def test_likelihoods_are_the_scripts_own_and_a_closed_engine_refuses() -> None:
    engine = ScriptedEngine("fine", nll=lambda text: 9.0 if "soup" in text else 1.5)
    prompt = await engine.embed([Message("user", "Hi")])
    scores = await engine.mean_nll(prompt, [engine.tokens("a meal"), engine.tokens("soup soup"), []])
    assert scores[:2] == [1.5, 9.0]
    assert math.isnan(scores[2])
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        await engine.generate_batch([request(prompt)])
