"""A turn of a conversation goes on from what the one before left, and says what it would have said alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware import Guard, Sampling
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, Verdict

SYSTEM = list(range(100, 140))
HEADER = [7, 8, 9]
Engines: TypeAlias = tuple[TransformersEngine, TransformersEngine]


def prompt_of(engine: TransformersEngine, before: Sequence[int], asked: Sequence[int]) -> PromptEmbeddings:
    """A conversation so far, by its tokens, and the user's next turn."""
    ids = [*before, *asked, *HEADER]
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[len(before) : len(before) + len(asked)] = True
    return PromptEmbeddings(engine._loaded.rows(ids), np.array(ids, dtype=np.int64), mask)


def moved(prompt: PromptEmbeddings) -> PromptEmbeddings:
    return prompt.moved(prompt.matrix + prompt.user_mask[:, None].astype(np.float32))


def greedy(prompt: PromptEmbeddings, tokens: int) -> GenerationRequest:
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens))


async def asked(engine: TransformersEngine, prompts: Sequence[PromptEmbeddings], tokens: int = 24) -> list[list[int]]:
    done = await engine.generate_batch([greedy(prompt, tokens) for prompt in prompts])
    return [list(completion.token_ids) for completion in done]


async def talk(engine: TransformersEngine, turns: int, tokens: int = 24) -> list[list[int]]:
    """A conversation of some turns with what the model says."""
    before, answers = list(SYSTEM), []
    for turn in range(turns):
        question = list(range(1000 + 50 * turn, 1030 + 50 * turn))
        prompt = prompt_of(engine, before, question)
        [answer] = await asked(engine, [prompt], tokens)
        answers.append(answer)
        before = [*prompt.token_ids.tolist(), *answer, 11, 12]
    return answers


def loaded(folder: Path, **options: Any) -> TransformersEngine:
    return TransformersEngine(str(folder), dtype="float32", **options)


@pytest.fixture
async def engines(tiny_folder: Path) -> AsyncIterator[Engines]:
    """One that keeps what has run, and one that runs all of it again; both loaded."""
    engine, without = loaded(tiny_folder), loaded(tiny_folder, prefix_cache_gib=0)
    await engine.load()
    await without.load()
    yield engine, without
    await engine.aclose()
    await without.aclose()


async def test_a_turn_runs_what_is_new_in_it(
    engines: Engines, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine, without = engines
    columns, all_columns = count_columns(engine), count_columns(without)
    answers = await talk(engine, 6)
    assert answers == await talk(without, 6)
    # The system prompt once; then each turn's question, what frames it, and the answer's tokens but the last, which
    # runs with the next turn.
    assert sum(columns) == len(SYSTEM) + 6 * (30 + len(HEADER) + 23) + 5 * 3
    assert sum(all_columns) > 2.5 * sum(columns)
    assert engine.stats().reused == sum(len(SYSTEM) + turn * (30 + 3 + 26) - 3 for turn in range(1, 6))
    assert without.stats().kept_bytes == without.stats().reused == 0 < engine.stats().kept_bytes


async def test_the_same_question_finds_the_same_numbers(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    """What runs for a question does not depend on whether it was asked before, so neither do its low bits."""
    engine = loaded(tiny_folder)
    await engine.load()
    [answer] = await asked(engine, [first := prompt_of(engine, SYSTEM, range(500, 540))])
    second = prompt_of(engine, [*first.token_ids.tolist(), *answer], range(600, 640))
    columns, runs = count_columns(engine), []
    for _ in range(3):
        del columns[:]
        await asked(engine, [second])
        runs.append(list(columns))
    assert runs[0] == runs[1] == runs[2]
    await engine.aclose()


async def test_an_answer_that_comes_back_in_other_tokens_is_shared_up_to_there(
    engines: Engines, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine, without = engines
    [answer] = await asked(engine, [first := prompt_of(engine, SYSTEM, range(500, 540))], 40)
    spelled = [*answer[:20], 4000, *answer[22:]]
    second = prompt_of(engine, [*first.token_ids.tolist(), *spelled], range(600, 640))
    columns = count_columns(engine)
    assert await asked(engine, [second], 5) == await asked(without, [second], 5)
    # From the token that differs on, the rest of the answer is a beginning that runs by itself, then the question.
    assert columns[:2] == [len(spelled) - 20, 40 + len(HEADER)]


async def test_candidates_of_a_repair_are_not_taken_for_the_prompt_that_was_not_moved(engines: Engines) -> None:
    engine, without = engines
    first = prompt_of(engine, SYSTEM, range(500, 540))
    [answer] = await asked(engine, [moved(first)])
    kept = engine.stats().kept_bytes
    # What a moved prompt left is not kept: nobody goes on from it.
    assert kept == len(SYSTEM) * (engine._loaded.column_bytes + 8)
    second = prompt_of(engine, [*first.token_ids.tolist(), *answer], range(600, 640))
    far = moved(second)
    both = await asked(engine, [second, far, far, second])
    assert both == await asked(without, [second, far, far, second])
    assert both[0] != both[1]


async def test_a_turn_after_a_repair_goes_on_from_what_was_judged(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine = loaded(tiny_folder)
    await engine.load()
    first = prompt_of(engine, SYSTEM, range(500, 540))
    [answer] = await asked(engine, [moved(first)])
    await engine.mean_nll(first, [answer])
    second = prompt_of(engine, [*first.token_ids.tolist(), *answer], range(600, 640))
    columns = count_columns(engine)
    await asked(engine, [second], 3)
    assert columns[0] == 1 + 40 + len(HEADER)
    await engine.aclose()


@pytest.mark.parametrize("left", [0, 12])
async def test_a_candidate_is_judged_behind_the_question_as_the_first_answer_ran_it(
    engines: Engines, count_columns: Callable[[TransformersEngine], list[int]], left: int
) -> None:
    """Behind what has left of that answer, too."""
    engine, without = engines
    first = prompt_of(engine, SYSTEM, range(500, 540))
    [answer] = await asked(engine, [first])
    judged = first
    if left:
        ids = np.array([*first.token_ids.tolist(), *answer[:left]], dtype=np.int64)
        mask = np.concatenate([first.user_mask, np.zeros(left, dtype=np.bool_)])
        judged = PromptEmbeddings(engine._loaded.rows(ids.tolist()), ids, mask)
    columns = count_columns(engine)
    candidate = list(range(700, 730))
    found = await engine.mean_nll(judged, [candidate])
    # The column that predicts its first token, and its tokens but the last.
    assert sum(columns) == len(candidate)
    assert found == pytest.approx(await without.mean_nll(judged, [candidate]), rel=1e-5)


async def test_a_bridge_goes_on_from_what_the_first_answer_ran(
    engines: Engines, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    """Neither its question nor what has left runs again, for the bridge or for its judgement; moved rows run."""
    engine, without = engines
    first = prompt_of(engine, SYSTEM, range(500, 540))
    [answer] = await asked(engine, [first])
    ids = np.array([*first.token_ids.tolist(), *answer[:12], *range(800, 820)], dtype=np.int64)
    mask = np.concatenate([first.user_mask, np.zeros(32, dtype=np.bool_)])
    bridge = PromptEmbeddings(engine._loaded.rows(ids.tolist()), ids, mask, assistant_prefix="what has left")
    columns = count_columns(engine)
    [said] = await asked(engine, [bridge], 8)
    assert columns == [20, *[1] * 7]
    assert [said] == await asked(without, [bridge], 8)
    assert await asked(engine, [moved(bridge)], 8) == await asked(without, [moved(bridge)], 8)
    assert columns[8] == len(ids) - len(SYSTEM)
    del columns[:]
    found = await engine.mean_nll(bridge, [said])
    assert sum(columns) == len(said)
    assert found == pytest.approx(await without.mean_nll(bridge, [said]), rel=1e-5)


async def test_an_agent_that_works_on_goes_on_from_its_last_step(
    engines: Engines, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine, without = engines
    [call] = await asked(engine, [first := prompt_of(engine, SYSTEM, range(500, 540))], 40)
    ids = [*first.token_ids.tolist(), *call, *range(700, 790), *HEADER]
    mask = np.array([500 <= token < 540 for token in ids])
    result = PromptEmbeddings(engine._loaded.rows(ids), np.array(ids), mask)
    columns = count_columns(engine)
    assert await asked(engine, [result], 5) == await asked(without, [result], 5)
    assert columns[0] == 1 + 90 + len(HEADER)


class Notes:
    """A moderator that lets everything pass and notes what it was asked."""

    name, default_threshold = "notes", 0.5

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        self.asked += texts
        return [Verdict({"violence": 0.0}, flagged=False, model="notes") for _ in texts]

    async def aclose(self) -> None: ...


async def test_keys_are_reused_and_verdicts_never(tiny_folder: Path) -> None:
    told = []
    for cache in (None, 0.0):
        engine, notes = loaded(tiny_folder, prefix_cache_gib=cache), Notes()
        guard, sampling = Guard(engine, notes), Sampling(max_new_tokens=20)
        chat = [Message("system", "Speak of the sea. " * 6), Message("user", "Tell me of the fog.")]
        first = await guard.answer(chat, sampling)
        chat += [Message("assistant", first.text), Message("user", "Tell me of the fog.")]
        second = await guard.answer(chat, sampling)
        again = await guard.answer(chat, sampling)
        told.append((first.text, second.text, again.text, notes.asked))
        await engine.aclose()
    assert told[0] == told[1]
    assert told[0][1] == told[0][2]
    assert len(told[0][3]) >= 3


@pytest.mark.parametrize("number", [-1.0, float("nan")])
def test_a_cache_of_less_than_nothing_is_refused(number: float) -> None:
    with pytest.raises(ConfigurationError, match="prefix_cache_gib"):
        TransformersEngine(prefix_cache_gib=number)


@dataclass
class Step:
    """What happens next: who asks, and what stands in the way."""

    chats: list[int]
    moved: list[int]
    room: float
    fails_at: int
    respelled: bool


step = st.builds(
    Step,
    chats=st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True),
    moved=st.lists(st.integers(0, 3), max_size=1),
    room=st.sampled_from([1.0, 1.0, 1.0, 0.6, 0.2, 0.0]),
    fails_at=st.sampled_from([0, 0, 0, 1, 2, 3, 5, 8]),
    respelled=st.booleans(),
)


@dataclass
class Both:
    """The engine, one that keeps nothing and runs one sequence at a time, and what that one has said so far."""

    engine: TransformersEngine
    alone: TransformersEngine
    known: dict[bytes, list[int]] = field(default_factory=dict, repr=False)

    async def alone_says(self, prompt: PromptEmbeddings) -> list[int]:
        key = prompt.matrix.tobytes()
        if key not in self.known:
            [self.known[key]] = await asked(self.alone, [prompt], 8)
        return self.known[key]

    async def play(self, plan: Sequence[Step]) -> None:
        tree = self.engine._decoder._batch
        histories = {chat: [*SYSTEM, *range(2000, 2000 + 5 * chat)] for chat in range(4)}
        for at, step in enumerate(plan):
            if step.room < 1.0:
                shrink_to(tree, int(step.room * self.engine.stats().kept_bytes))
            question = range(3000 + 40 * at, 3020 + 40 * at)
            prompts = [prompt_of(self.engine, histories[chat], question) for chat in step.chats]
            prompts = [
                moved(prompt) if chat in step.moved else prompt
                for chat, prompt in zip(step.chats, prompts, strict=True)
            ]
            try:
                with failing(self.engine, step.fails_at):
                    answers = await asked(self.engine, prompts, 8)
            except EngineError as error:
                if "out of memory with a single sequence" not in str(error):
                    raise
                answers = await asked(self.engine, prompts, 8)
            for chat, prompt, answer in zip(step.chats, prompts, answers, strict=True):
                assert answer == await self.alone_says(prompt)
                spelled = [*answer[:3], 4001, *answer[4:]] if step.respelled else answer
                histories[chat] = [*prompt.token_ids.tolist(), *spelled, 11, 12]
            assert self.engine.stats().kept_bytes <= int(0.001 * 2**30)


def shrink_to(batch: Any, size: int) -> None:
    (batch._heads._tree if hasattr(batch, "_heads") else batch._kept).shrink(size)


@contextmanager
def failing(engine: TransformersEngine, fails_at: int) -> Iterator[None]:
    """Lets the n-th pass find no memory; none for 0."""
    name = "forward" if hasattr(engine._loaded, "forward") else "run"
    real, left = getattr(engine._loaded, name), fails_at

    def scarce(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        return real(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._loaded, name, scarce)
        yield


@pytest.fixture(scope="module", params=["tiny_folder", pytest.param("hybrid_folder", marks=pytest.mark.slow)])
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    folder = request.getfixturevalue(request.param)
    # Room for some of the turns of four chats.
    found = Both(loaded(folder, prefix_cache_gib=0.001, max_batch=3), loaded(folder, prefix_cache_gib=0, max_batch=1))
    asyncio.run(found.engine.load())
    asyncio.run(found.alone.load())
    yield found
    asyncio.run(found.engine.aclose())
    asyncio.run(found.alone.aclose())


@settings(max_examples=3)
@given(plan=st.lists(step, min_size=2, max_size=3))
def test_in_any_order_with_evictions_and_failures_every_chat_says_what_it_says_alone(
    both: Both, plan: list[Step]
) -> None:
    asyncio.run(both.play(plan))


@pytest.mark.slow
@settings(max_examples=25)
@given(plan=st.lists(step, min_size=1, max_size=6))
def test_in_many_orders_every_chat_says_what_it_says_alone(both: Both, plan: list[Step]) -> None:
    asyncio.run(both.play(plan))
