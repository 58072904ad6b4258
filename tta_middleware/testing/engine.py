"""A conformance suite for engines: subclass :class:`EngineContract` and give it an ``engine`` fixture.

    class TestMyEngine(EngineContract):
        @pytest.fixture
        async def engine(self):
            engine = MyEngine()
            yield engine
            await engine.aclose()

The engine should answer ``prompts`` with at least six tokens each. Needs pytest and pytest-asyncio in auto mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import anyio
import numpy as np
import pytest

from tta_middleware.errors import ConfigurationError, EmbeddingShapeError, EmptyPromptError
from tta_middleware.protocols import Engine, ReasoningEngine, TokenCounter, ToolEngine
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Sampling, TextDelta, Thought, ToolCall

if TYPE_CHECKING:
    from tta_middleware.types import FloatMatrix

_PATIENCE_SECONDS = 60.0
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "read_page",
        "description": "Reads one page of a book.",
        "parameters": {"type": "object", "properties": {"page": {"type": "integer"}}, "required": ["page"]},
    },
}


class EngineContract:
    """What every :class:`tta_middleware.protocols.Engine` must do."""

    prompts: Sequence[str] = (
        "Write a short story about a lighthouse.",
        "Explain how bread is baked.",
        "Zähle drei Städte auf 🏙️ und beschreibe sie.",
    )

    async def test_satisfies_the_protocol(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)

    async def test_loading_again_changes_nothing(self, engine: Engine) -> None:
        await engine.load()
        before = await _embed(engine, self.prompts[0])
        await engine.load()
        assert np.array_equal((await _embed(engine, self.prompts[0])).matrix, before.matrix)

    async def test_embeds_one_float32_row_per_token(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        assert prompt.matrix.dtype == np.float32
        assert np.isfinite(prompt.matrix).all()
        assert 0 < prompt.user_mask.sum() < len(prompt.token_ids)

    async def test_mask_covers_only_the_last_user_turn(self, engine: Engine) -> None:
        first, last = self.prompts[0], self.prompts[1]
        turns = [Message("user", first), Message("assistant", last), Message("user", last)]
        long, short = await engine.embed(turns), await _embed(engine, last)
        assert long.token_ids[long.user_mask].tolist() == short.token_ids[short.user_mask].tolist()
        assert np.flatnonzero(long.user_mask).min() > len(short.token_ids) - short.user_mask.sum()

    async def test_assistant_prefix_follows_the_prompt_outside_the_mask(self, engine: Engine) -> None:
        bare = await _embed(engine, self.prompts[0])
        begun = await engine.embed([Message("user", self.prompts[0])], assistant_prefix="Once upon a time")
        added = len(begun.token_ids) - len(bare.token_ids)
        assert added > 0
        assert begun.token_ids[:-added].tolist() == bare.token_ids.tolist()
        assert begun.user_mask.tolist() == bare.user_mask.tolist() + [False] * added

    async def test_tools_are_shown_outside_the_mask_or_refused(self, engine: Engine) -> None:
        turns = [Message("user", self.prompts[0])]
        bare = await engine.embed(turns)
        if not await _takes_tools(engine):
            with pytest.raises(ConfigurationError):
                await engine.embed(turns, tools=[_TOOL])
            return
        shown = await engine.embed(turns, tools=[_TOOL])
        assert len(shown.token_ids) > len(bare.token_ids)
        assert shown.token_ids[shown.user_mask].tolist() == bare.token_ids[bare.user_mask].tolist()

    async def test_calls_and_results_of_tools_are_part_of_the_conversation(self, engine: Engine) -> None:
        if not await _takes_tools(engine):
            pytest.skip("the model takes no tools")
        asked = Message("user", self.prompts[0])
        call = Message("assistant", "", (ToolCall("read_page", {"page": 7}, "123456789"),))
        result = Message("tool", "It is blank.", name="read_page", tool_call_id="123456789")
        talks = [[asked], [asked, call], [asked, call, result]]
        lengths = [len((await engine.embed(talk, tools=[_TOOL])).token_ids) for talk in talks]
        assert lengths == sorted(set(lengths))

    @pytest.mark.parametrize("content", [None, "", " \n\t "])
    async def test_refuses_a_prompt_without_user_text(self, engine: Engine, content: str | None) -> None:
        messages = [Message("system", "Be kind.")] + ([] if content is None else [Message("user", content)])
        with pytest.raises(EmptyPromptError):
            await engine.embed(messages)

    async def test_deltas_add_up_to_the_completion(self, engine: Engine) -> None:
        for text in self.prompts:
            prompt = await _embed(engine, text)
            deltas = await _collect(engine, _request(prompt, tokens=12))
            [completion] = await engine.generate_batch([_request(prompt, tokens=12)])
            assert _answer(deltas) == completion.text
            assert tuple(i for delta in deltas for i in delta.token_ids) == completion.token_ids
            assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            assert deltas[-1].finish_reason == completion.finish_reason

    async def test_streams_of_a_batch_are_read_side_by_side_in_any_order(self, engine: Engine) -> None:
        prompts = [await _embed(engine, text) for text in self.prompts]
        requests = [_request(prompt, tokens=6) for prompt in prompts]
        streams = engine.stream_batch(requests)
        texts = {at: _answer([delta async for delta in streams[at]]) for at in (2, 0, 1)}
        whole = await engine.generate_batch([_request(prompt, tokens=6) for prompt in prompts])
        assert [texts[at] for at in range(3)] == [completion.text for completion in whole]

    async def test_a_stream_of_a_batch_that_is_aborted_unread_holds_nobody_up(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        unread, read = _request(prompt, tokens=10_000), _request(prompt, tokens=6)
        _, stream = engine.stream_batch([unread, read])
        unread.abort.set()
        with anyio.fail_after(_PATIENCE_SECONDS):
            deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason == "length"

    async def test_batch_answers_come_in_the_order_of_the_requests(self, engine: Engine) -> None:
        prompts = [await _embed(engine, text) for text in self.prompts]
        lengths = [5, 1, 3]
        requests = [_request(prompt, tokens=n) for prompt, n in zip(prompts, lengths, strict=True)]
        completions = await engine.generate_batch(requests)
        assert [len(completion.token_ids) for completion in completions] == lengths
        assert {completion.finish_reason for completion in completions} == {"length"}

    async def test_an_empty_batch_is_answered_at_once(self, engine: Engine) -> None:
        assert await engine.generate_batch([]) == []

    async def test_a_seed_fixes_a_sampled_answer_whatever_its_batch(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        warm = [_request(prompt, tokens=6, temperature=0.8, seed=seed) for seed in (1, 2, 1)]
        first, _, again = await engine.generate_batch(warm)
        [alone] = await engine.generate_batch([_request(prompt, tokens=6, temperature=0.8, seed=1)])
        assert first.token_ids == again.token_ids == alone.token_ids

    async def test_text_ends_before_a_stop_string(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        [whole] = await engine.generate_batch([_request(prompt, tokens=12)])
        stop = whole.text[len(whole.text) // 2 :][:4]
        deltas = await _collect(engine, _request(prompt, tokens=12, stop=(stop,)))
        assert _answer(deltas) == whole.text[: whole.text.index(stop)]
        assert deltas[-1].finish_reason == "stop"

    async def test_refuses_rows_of_another_width(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        narrow = _narrow(prompt)
        with pytest.raises(EmbeddingShapeError):
            await engine.generate_batch([_request(prompt), _request(narrow)])
        with pytest.raises(EmbeddingShapeError):
            await _collect(engine, _request(narrow))
        with pytest.raises(EmbeddingShapeError):
            await engine.nearest_tokens(narrow.matrix)
        with pytest.raises(EmbeddingShapeError):
            await engine.mean_nll(narrow, [[1]])

    async def test_an_aborted_request_leaves_the_others_alone(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        dropped, kept = _request(prompt, tokens=6), _request(prompt, tokens=6)
        dropped.abort.set()
        aborted, finished = await engine.generate_batch([dropped, kept])
        assert aborted.finish_reason == "aborted"
        assert len(finished.token_ids) == 6

    async def test_abort_ends_a_stream(self, engine: Engine) -> None:
        request = _request(await _embed(engine, self.prompts[0]), tokens=400)
        deltas: list[TextDelta] = []
        async for delta in engine.stream(request):
            deltas.append(delta)
            request.abort.set()
        assert deltas[-1].finish_reason == "aborted"

    async def test_a_closed_stream_leaves_the_engine_usable(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        stream = engine.stream(_request(prompt, tokens=400))
        await anext(stream)
        await stream.aclose()
        [completion] = await engine.generate_batch([_request(prompt, tokens=3)])
        assert len(completion.token_ids) == 3

    async def test_cancellation_ends_a_batch_and_is_not_swallowed(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        requests = [_request(prompt, tokens=400), _request(prompt, tokens=400)]
        with anyio.fail_after(_PATIENCE_SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(engine.generate_batch, requests)
                async for _ in engine.stream(_request(prompt, tokens=3)):
                    pass
                tasks.cancel_scope.cancel()
        assert tasks.cancel_scope.cancelled_caught

    async def test_likelihood_is_finite_and_empty_completions_have_none(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[0])
        [answer] = await engine.generate_batch([_request(prompt, tokens=6)])
        likely, empty = await engine.mean_nll(prompt, [answer.token_ids, ()])
        assert math.isfinite(likely)
        assert likely > 0
        assert math.isnan(empty)

    async def test_tokens_are_counted_as_they_are_embedded(self, engine: Engine) -> None:
        if isinstance(engine, TokenCounter):
            talk = [Message("user", self.prompts[0]), Message("assistant", "Yes."), Message("user", self.prompts[1])]
            assert await engine.count_prompt(talk) == len((await engine.embed(talk)).token_ids)
            assert 0 < await engine.count_prompt(talk[1:2]) <= await engine.count_prompt(talk)
            assert 0 < len(await engine.token_ids(self.prompts[0])) < await engine.count_prompt(talk)

    async def test_a_thought_is_closed_behind_what_was_thought(self, engine: Engine) -> None:
        if not isinstance(engine, ReasoningEngine):
            return
        prompt = await _embed(engine, self.prompts[0])
        if not await engine.thinks():
            assert prompt.ends == "before"
            return
        asked, thinking = [Message("user", self.prompts[0])], cast(Any, engine)
        begun = await thinking.embed(asked, thought=Thought("Well", closed=False))
        shut = await thinking.embed(asked, thought=Thought("Well"))
        assert (begun.ends, shut.ends) == ("inside", "closed")
        added = begun.token_ids[len(prompt.token_ids) :].tolist()
        closed = await engine.close_thought(prompt, added)
        assert closed.ends == "closed"
        assert closed.token_ids.tolist() == shut.token_ids.tolist()
        assert closed.user_mask.tolist() == shut.user_mask.tolist()

    async def test_directions_have_length_one_and_tell_words_apart(self, engine: Engine) -> None:
        found = await engine.directions(["bread", "lighthouse", "bread"])
        assert found.dtype == np.float32
        assert found.shape == (3, (await _embed(engine, self.prompts[0])).matrix.shape[1])
        assert np.linalg.norm(found, axis=1) == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)
        assert found[0] @ found[2] == pytest.approx(1.0, abs=1e-4)
        assert found[0] @ found[1] < 0.9
        assert len(await engine.directions([])) == 0

    async def test_a_blank_word_has_no_direction(self, engine: Engine) -> None:
        with pytest.raises(ConfigurationError):
            await engine.directions(["bread", " "])

    async def test_unmoved_rows_are_nearest_to_their_own_tokens(self, engine: Engine) -> None:
        prompt = await _embed(engine, self.prompts[2])
        nearest = await engine.nearest_tokens(prompt.matrix)
        assert nearest.tolist() == prompt.token_ids.tolist()


async def _takes_tools(engine: Engine) -> bool:
    if not isinstance(engine, ToolEngine):
        return False
    try:
        await engine.tool_format()
    except ConfigurationError:
        return False
    return True


async def _embed(engine: Engine, text: str) -> PromptEmbeddings:
    return await engine.embed([Message("user", text)])


def _request(prompt: PromptEmbeddings, *, tokens: int = 4, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens, **sampling))


async def _collect(engine: Engine, request: GenerationRequest) -> list[TextDelta]:
    return [delta async for delta in engine.stream(request)]


def _answer(deltas: Sequence[TextDelta]) -> str:
    """The answer's text, without thoughts before it."""
    return "".join(delta.text for delta in deltas if delta.channel == "answer")


def _narrow(prompt: PromptEmbeddings) -> PromptEmbeddings:
    matrix: FloatMatrix = prompt.matrix[:, :-1]
    return PromptEmbeddings(matrix, prompt.token_ids, prompt.user_mask)
