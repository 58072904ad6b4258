"""What a method gets to know before its search begins, from an engine without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tta_middleware import Budget, Guard, Repair, Resample, Sampling
from tta_middleware.call_text import json_reading
from tta_middleware.guard import reminded
from tta_middleware.guard.context import Conversation, Meter, Question, RequestContext
from tta_middleware.guard.quality import QualityGate
from tta_middleware.guard.search import Reach, prepare
from tta_middleware.methods import Method, Move, Needs, Race, Start
from tta_middleware.policy import StagePolicies
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import FloatMatrix, IntVector, Message, PromptEmbeddings

TALK = [Message("user", "Tell me about the calm sea.")]
STEP = Race(ladder=(Move(label="step", words="harbour light", radius=0.5, reminder="Be kind."),))


async def begin(engine: ScriptedEngine, method: Method, prefix: str = "") -> tuple[PromptEmbeddings, Start, Reach]:
    context = RequestContext(
        engine=engine,
        moderator=ScriptedModerator(),
        quality=QualityGate(),
        policies=StagePolicies.of(0.5),
        reading=json_reading,
        conversation=Conversation(TALK),
        sampling=Sampling(),
        meter=Meter(Budget()),
    )
    prompt = await context.embed(prefix)
    question = Question(prompt, context.sampling, prefix)
    return prompt, *await prepare(context, question, method, 0.5, np.random.default_rng(0))


async def test_a_method_without_needs_gets_the_prompt_alone() -> None:
    prompt, start, _ = await begin(ScriptedEngine("fine"), Resample())
    assert start.prompt is prompt
    assert not start.directions
    assert not start.variants
    assert not start.reach


async def test_words_get_directions_and_reminders_variants_with_the_text_that_has_left() -> None:
    engine = ScriptedEngine("fine")
    prompt, start, _ = await begin(engine, STEP, prefix="The sea")
    variant = start.variants["Be kind."]
    assert np.linalg.norm(start.directions["harbour light"]) == pytest.approx(1.0, abs=1e-4)
    assert variant.token_ids[variant.user_mask].tolist() == prompt.token_ids[prompt.user_mask].tolist()
    assert engine.text(variant.token_ids.tolist()).endswith("The sea")
    assert "Be kind." in engine.text(variant.token_ids.tolist())


async def test_steps_within_reach_decode_to_their_own_tokens_and_a_step_further_does_not() -> None:
    engine = ScriptedEngine("fine", width=4)
    prompt, start, along = await begin(engine, STEP)
    await along.look_up(["harbour light"])
    mask, step = prompt.user_mask, start.directions["harbour light"]
    rows, tokens = prompt.matrix[mask], prompt.token_ids[mask]
    reach = np.array([start.reach["harbour light"][token] for token in tokens.tolist()])
    assert 0.0 < reach.min() < STEP.needs.reach
    inside = rows + (reach * np.linalg.norm(rows, axis=1))[:, None].astype(np.float32) * step
    assert (await engine.nearest_tokens(inside)).tolist() == tokens.tolist()
    short = reach < STEP.needs.reach
    outside = rows + ((reach + 0.125) * np.linalg.norm(rows, axis=1))[:, None].astype(np.float32) * step
    assert not (await engine.nearest_tokens(outside) == tokens)[short].any()


class Counting(ScriptedEngine):
    """Counts the rows that are compared with the whole table."""

    compared = 0

    async def nearest_tokens(self, rows: FloatMatrix) -> IntVector:
        self.compared += len(rows)
        return await super().nearest_tokens(rows)


async def test_how_far_rows_may_go_is_looked_up_for_rungs_that_are_tried_alone() -> None:
    """The reminder helps here, so that no step is tried; there only a step does."""
    race = Race(ladder=(Move(label="reminder", reminder="Be kind."), *Race().ladder[1:]))

    async def compared(reply: Callable[[ScriptedCall], str]) -> int:
        engine = Counting(reply, width=64)
        answer = await Guard(engine, ScriptedModerator(), repair=Repair(method=race)).answer(TALK)
        assert answer.trace.outcome == "neutralised"
        return engine.compared

    assert await compared(lambda call: "That is lovely and calm." if "system" in call.conversation else "flagme") == 0
    assert await compared(lambda call: "That is lovely and calm." if call.moved > 0.3 else "flagme") > 0


async def test_a_method_that_names_no_words_as_it_goes_has_its_reach_at_the_beginning() -> None:
    class AtOnce(Race):
        @property
        def needs(self) -> Needs:
            return replace(super().needs, reach_later=False)

    _, start, _ = await begin(ScriptedEngine("fine", width=4), AtOnce(ladder=STEP.ladder))
    assert start.reach["harbour light"]


def test_a_reminder_follows_the_system_prompt_or_stands_for_one() -> None:
    system = Message("system", "Answer in rhyme.")
    assert reminded(TALK, "Be kind.") == [Message("system", "Be kind."), *TALK]
    assert reminded([system, *TALK], "Be kind.") == [Message("system", "Answer in rhyme.\n\nBe kind."), *TALK]
