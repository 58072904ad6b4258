"""What the model would say next, asked without decoding: judges live on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import torch

from tta_middleware import Budget, Guard, Policy, Repair, TTAChatModel
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError, EmbeddingShapeError, EngineError
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.policy.coverage import told
from tta_middleware.types import GenerationRequest, Message, PromptEmbeddings, RequestScope, Sampling

ANSWER = "The harbour opens at dawn, and the boats go out one after the other while the town is still asleep. " * 3
CHOICES = [5, 17, 300]


def judging(answer: str) -> list[Message]:
    return [Message("user", f"Somebody wrote this: {answer}\n\nIs it about the sea? Answer yes or no.")]


async def test_they_are_the_models_own_log_probabilities(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompts = [await engine.embed(judging(ANSWER[:length])) for length in (20, 200)]
    found = await engine.next_token_logprobs(prompts, CHOICES)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_folder), dtype=torch.float64)
    for prompt, logprobs in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(prompt.token_ids)[None]).logits[0, -1]
        assert logprobs == pytest.approx(logits.float().log_softmax(-1)[CHOICES].tolist(), abs=1e-4)
    await engine.aclose()


async def test_a_growing_text_is_judged_as_from_scratch_and_runs_only_what_is_new(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    grown = [await engine.embed(judging(ANSWER[:length])) for length in (60, 130, 290, 130)]
    await engine.next_token_logprobs(grown[:1], CHOICES)
    columns = count_columns(engine)
    before = grown[0].token_ids
    for prompt in grown[1:]:
        del columns[:]
        [found] = await engine.next_token_logprobs([prompt], CHOICES)
        fresh = TransformersEngine(str(tiny_folder), dtype="float64")
        [scratch] = await fresh.next_token_logprobs([prompt], CHOICES)
        assert found == pytest.approx(scratch, abs=1e-4)
        await fresh.aclose()
        shared = int(np.argmin(np.append(before[: len(prompt.token_ids)] == prompt.token_ids[: len(before)], False)))
        assert sum(columns) <= len(prompt.token_ids) - shared
        before = prompt.token_ids
    await engine.aclose()


async def test_it_runs_in_the_passes_that_decode(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompt = await engine.embed([Message("user", "the fog")])
    question = await engine.embed(judging(ANSWER))
    request = GenerationRequest(prompt, Sampling(max_new_tokens=40))
    [alone] = await engine.generate_batch([request])
    answers, columns = [], count_columns(engine)

    async with anyio.create_task_group() as group:

        async def decode() -> None:
            answers.extend(await engine.generate_batch([GenerationRequest(prompt, Sampling(max_new_tokens=40))]))

        group.start_soon(decode)
        while len(columns) < 5:
            await anyio.lowlevel.checkpoint()
        await engine.next_token_logprobs([question], CHOICES)
        at_verdict = len(columns)
    assert answers[0].token_ids == alone.token_ids
    assert at_verdict < len(columns)  # decoding went on after the verdict, and did not stand still for it
    assert any(width > len(question.token_ids) // 2 and width > 1 for width in columns)
    await engine.aclose()


async def test_whoever_leaves_costs_nothing_and_a_closed_engine_says_so(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompt = await engine.embed(judging(ANSWER))
    with anyio.move_on_after(0):
        await engine.next_token_logprobs([prompt] * 3, CHOICES)
    assert len(await engine.next_token_logprobs([prompt], CHOICES)) == 1
    narrow = PromptEmbeddings(prompt.matrix[:, :-1], prompt.token_ids, prompt.user_mask)
    with pytest.raises(EmbeddingShapeError):
        await engine.next_token_logprobs([narrow], CHOICES)
    await engine.aclose()
    with pytest.raises(EngineError, match="closed"):
        await engine.next_token_logprobs([prompt], CHOICES)


async def test_the_hidden_states_of_any_layers_are_the_models_own_whatever_ran_before(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompts = [await engine.embed(judging(ANSWER[:length])) for length in (20, 200, 120)]
    await engine.next_token_logprobs(prompts[:1], CHOICES)
    found = await engine.hidden_states(prompts)
    count = await engine.layer_count()
    early, late = await engine.hidden_states(prompts, [1]), await engine.hidden_states(prompts, [count])
    both = await engine.hidden_states(prompts, [count, 1])
    model = AutoModelForCausalLM.from_pretrained(str(tiny_folder), dtype=torch.float64)
    for at, prompt in enumerate(prompts):
        with torch.inference_mode():
            states = model(input_ids=torch.tensor(prompt.token_ids)[None], output_hidden_states=True).hidden_states
        assert found[at] == pytest.approx(states[-1][0, -1].float().numpy(), abs=1e-4)
        assert early[at] == pytest.approx(states[1][0, -1].float().numpy(), abs=1e-4)
    assert late == pytest.approx(found, abs=1e-4)
    assert both == pytest.approx(np.hstack([late, early]), abs=1e-4)
    assert await engine.hidden_states(prompts) == pytest.approx(found, abs=1e-4)
    assert (await engine.hidden_states([])).size == 0
    for layer in (0, count + 1):
        with pytest.raises(ConfigurationError, match=f"layers 1 to {count}"):
            await engine.hidden_states(prompts, [layer])
    await engine.aclose()


async def test_values_over_a_span_are_the_models_own_and_cost_a_growing_text_nothing(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    from transformers import AutoModelForCausalLM

    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompts = [await engine.embed(judging(ANSWER[:length])) for length in (60, 200)]
    spans, columns = [(8, 20), (8, 50)], count_columns(engine)
    found = []
    for prompt, span in zip(prompts, spans, strict=True):
        await engine.next_token_logprobs([prompt], CHOICES)
        del columns[:]
        found += [(await engine.hidden_states([prompt], [1, 2], spans=[[span]]))[0]]
        assert sum(columns) == 1
    model = AutoModelForCausalLM.from_pretrained(str(tiny_folder), dtype=torch.float64)
    for prompt, (start, end), values in zip(prompts, spans, found, strict=True):
        with torch.inference_mode():
            kept = model(input_ids=torch.tensor(prompt.token_ids)[None], use_cache=True).past_key_values.layers[:2]
        own = [layer.values[0, :, start:end].float().mean(dim=1).flatten() for layer in kept]
        assert values == pytest.approx(torch.cat(own).numpy(), abs=1e-4)
    at_once = await engine.hidden_states(prompts, [1, 2], spans=[[(8, 20), (0, 5)], [(8, 50)]])
    assert at_once[[0, 2]] == pytest.approx(np.stack(found), abs=1e-6)
    assert len(at_once) == 3
    with pytest.raises(ConfigurationError, match="at least one span"):
        await engine.hidden_states(prompts, [1], spans=[[(8, 20)], []])
    for span in ((5, 5), (0, 10_000)):
        with pytest.raises(ConfigurationError, match="at least one"):
            await engine.hidden_states(prompts[:1], [1], spans=[[span]])
    await engine.aclose()


async def test_windows_that_are_asked_about_at_once_run_what_they_share_once(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    windows = [await engine.embed(judging(ANSWER[:length])) for length in (60, 130, 290)]
    apart = [(await engine.next_token_logprobs([prompt], CHOICES))[0] for prompt in windows]
    await engine.aclose()
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    await engine.load()
    columns = count_columns(engine)
    together = await engine.next_token_logprobs(windows, CHOICES, owner=1)
    assert together == [pytest.approx(one, abs=1e-4) for one in apart]
    closing = 20
    assert sum(columns) <= len(windows[-1].token_ids) + 2 * closing
    await engine.aclose()


async def test_what_is_kept_for_an_owner_goes_when_it_is_forgotten(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompt = await engine.embed(judging(ANSWER))
    engine.forget(3)  # nothing is loaded yet
    await engine.next_token_logprobs([prompt], CHOICES, owner=3)
    columns = count_columns(engine)
    await engine.next_token_logprobs([prompt], CHOICES, owner=3)
    assert sum(columns) == 1
    engine.forget(3)
    del columns[:]
    await engine.next_token_logprobs([prompt], CHOICES, owner=3)
    assert sum(columns) == len(prompt.token_ids)
    await engine.aclose()
    engine.forget(3)


async def test_a_beginning_that_is_said_to_be_shared_outlives_its_owner(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    rules = "No word about the tides, the moon, or the colour of the boats. " * 3
    asked = [await engine.embed([Message("user", f"{rules}\n\nAnswer: {text}")]) for text in ("gulls", "the fog")]
    shared = int(np.argmin(asked[0].token_ids[:60] == asked[1].token_ids[:60]))
    [first] = await engine.next_token_logprobs(asked[:1], CHOICES, owner=1, shared=shared)
    engine.forget(1)
    columns = count_columns(engine)
    await engine.next_token_logprobs(asked[1:], CHOICES, owner=2, shared=shared)
    assert sum(columns) == len(asked[1].token_ids) - shared
    [again] = await engine.next_token_logprobs(asked[:1], CHOICES)
    assert again == pytest.approx(first, abs=1e-4)
    await engine.aclose()


def kept_texts(engine: TransformersEngine) -> Any:
    decoder: Any = engine._decoder
    return decoder._batch._scored


async def grown_verdicts(engine: TransformersEngine, texts: list[str], *, cache: bool) -> list[list[float]]:
    """Scores of growing answers that take turns, by judges of one request each; or each window by one of its own."""
    judge, found = LLMJudge(engine), [list[float]() for _ in texts]
    scopes = [RequestScope() for _ in texts]
    judges = [told(judge, Policy(threshold=1.0), scope=scope) for scope in scopes]
    for end in range(40, max(map(len, texts)), 90):
        for at, text in enumerate(texts):
            scope = RequestScope()
            one = judges[at] if cache else told(judge, Policy(threshold=1.0), scope=scope)
            [verdict] = await one.moderate([text[:end]], prompt="What is it like there?")
            found[at].append(verdict.score)
            scope.close()
    for scope in scopes:
        scope.close()
    return found


async def test_growing_answers_that_take_turns_score_as_from_scratch_even_where_there_is_no_room_to_keep_them(
    tiny_folder: Path,
) -> None:
    texts = [f"{name}: {ANSWER}" for name in ("One", "Two", "Three")]
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    scratch = await grown_verdicts(engine, texts, cache=False)
    assert await grown_verdicts(engine, texts, cache=True) == [pytest.approx(one, abs=1e-4) for one in scratch]
    await engine.aclose()
    tight = TransformersEngine(str(tiny_folder), dtype="float64", cache_gib=2e-3)
    assert await grown_verdicts(tight, texts, cache=True) == [pytest.approx(one, abs=1e-4) for one in scratch]
    most = 0.06 * 2e-3 * 2**30
    assert kept_texts(tight).nbytes <= most
    await tight.aclose()


@pytest.mark.parametrize("ends", ["at its end", "when it is left"])
async def test_a_guarded_stream_leaves_nothing_in_the_engine(tiny_folder: Path, ends: str) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    guard = Guard(engine, LLMJudge(engine), policy=Policy(threshold=1.0), repair=Repair(method=None))
    seen = 0
    async with aclosing(guard.stream([Message("user", "the fog")], Sampling(max_new_tokens=150))) as events:
        async for _ in events:
            seen = max(seen, len(kept_texts(engine)))
            if ends == "when it is left" and seen:
                break
    assert seen
    await engine.directions(["sea"])  # is done after what was forgotten before it
    assert len(kept_texts(engine)) == 0
    await engine.aclose()


@pytest.mark.slow
async def test_a_real_model_judges_a_growing_answer_as_from_scratch() -> None:
    engine = TransformersEngine("smollm2", dtype="float32")
    texts = [
        "Bread is made of flour, water, salt and time. " * 6,
        "First open the window, then wait for the wind. " * 6,
    ]
    scratch = await grown_verdicts(engine, texts, cache=False)
    assert await grown_verdicts(engine, texts, cache=True) == [pytest.approx(one, abs=1e-4) for one in scratch]
    await engine.aclose()


async def test_a_chat_model_that_judges_itself_loads_its_weights_once_and_repairs_what_it_flags(
    tiny_folder: Path,
) -> None:
    settings: dict[str, Any] = {"model": str(tiny_folder), "dtype": "float64", "max_new_tokens": 60}
    model = TTAChatModel(**settings, moderator="self", policy=Policy(threshold=1.0), prompt_check="all")
    text = "".join([chunk.text async for chunk in model.astream("the fog")])
    assert text
    assert len(model.runtime._engines) == len(model.runtime._moderators) == 1
    [engine] = model.runtime._engines.values()
    assert engine.stats().tokens <= 61  # type: ignore[attr-defined]
    strict = TTAChatModel(**settings, moderator="self", policy=0.0, budget=Budget(generations=3), runtime=model.runtime)
    withheld = await strict.ainvoke("the fog")
    assert withheld.text == Policy().notice
    assert withheld.response_metadata["tta"]["generations"] == 3
    assert len(model.runtime._engines) == 1
    await engine.directions(["sea"])
    owners = {text.owner for text in kept_texts(engine)._texts}
    assert owners <= {None}  # of the quality gate
    await model.aclose()
