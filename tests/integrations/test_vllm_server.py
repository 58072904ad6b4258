"""The vLLM server engine against loopback completions servers that die, refuse and come back.

The servers are scripted, so that faults can be staged; tests/integrations/vllm runs the real one.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tta_vllm import VLLMServerEngine
from tta_vllm.server import Server, ServerPool, encode

from tta_middleware import Message, Sampling
from tta_middleware.engines.remote import ending
from tta_middleware.errors import ConfigurationError, EmbeddingShapeError, EngineError
from tta_middleware.testing.loopback import on_loopback
from tta_middleware.types import GenerationRequest

BROKEN_AT = 3
WORDS = " A quiet harbour lies behind the old wall, and the boats come home at dusk when the bell rings twice."


@dataclass
class Scripted:
    """Answers every prompt with the same tokens, going on where the prompt's rows say it was broken off."""

    answer: list[int]
    prompt_rows: int
    die_after: int | None = None
    break_off: int | None = None
    refuse: int | None = None
    alive: bool = True
    silent: bool = False
    stale: int = 0
    hangs_up: bool = False
    ends_as: str = ""
    ends_at: int = BROKEN_AT
    started: int = 0
    delivered: int = 0
    rows_seen: list[int] = field(default_factory=list)

    def app(self) -> Starlette:
        return Starlette(
            routes=[Route("/v1/models", self.models), Route("/v1/completions", self.complete, methods=["POST"])]
        )

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if self.refuse:
            error = {"message": "no embeddings here", "type": "what you asked: tell me about a harbour"}
            return JSONResponse({"error": error}, status_code=self.refuse)
        if self.stale:
            self.stale -= 1
            return JSONResponse({"error": {"message": "not yet"}}, status_code=503)
        if not self.alive:
            return JSONResponse({"error": {"message": "gone"}}, status_code=503)
        self.started += 1
        rows = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        self.rows_seen.append(len(rows))
        return StreamingResponse(self.tokens(len(rows), body["max_tokens"]), media_type="text/event-stream")

    async def tokens(self, rows: int, limit: int) -> AsyncIterator[str]:
        left = self.answer[rows - self.prompt_rows :][: limit + self.silent]
        for at, token_id in enumerate(left):
            if at == self.die_after or not self.alive:
                self.alive = False
                raise ConnectionAbortedError
            if at == BROKEN_AT and self.hangs_up:
                self.hangs_up = False
                return
            if at == BROKEN_AT and self.break_off:
                yield f"data: {json.dumps({'error': {'message': 'it broke', 'code': self.break_off}})}\n\n"
                return
            reason = "length" if at + 1 == limit and not self.silent else None
            if at == self.ends_at and self.ends_as:
                yield event({"index": 0, "text": "", "token_ids": [], "finish_reason": self.ends_as})
                return
            yield event({"index": 0, "text": "", "token_ids": [token_id], "finish_reason": reason})
            self.delivered += 1
            await anyio.sleep(0.001)
        if len(left) < limit:
            yield event({"index": 0, "text": "", "token_ids": [], "finish_reason": "stop"})
        yield "data: [DONE]\n\n"


def event(choice: dict[str, Any]) -> str:
    chunk = {"id": "c", "object": "text_completion", "created": 0, "model": "scripted", "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n"


@contextmanager
def serving(script: Scripted) -> Iterator[str]:
    with on_loopback(script.app(), log_level="critical", lifespan="off") as served:
        yield served.url


@pytest.fixture(scope="module")
def facts() -> tuple[list[int], int]:
    """The answer's token ids and the number of rows of the prompt, by the embedded model's own tokenizer."""
    from tta_middleware.engines.models import resolve_model
    from tta_middleware.engines.prompt.template import render_prompt
    from tta_middleware.engines.prompt.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(resolve_model("smollm2"))
    rows = len(render_prompt(vocabulary.tokenizer, [Message("user", "Tell me about a harbour.")]).token_ids)
    return vocabulary.tokenizer(WORDS, add_special_tokens=False)["input_ids"], rows


@pytest.fixture(scope="module")
def running(facts: tuple[list[int], int]) -> Iterator[tuple[list[Scripted], VLLMServerEngine]]:
    scripts = [Scripted(*facts), Scripted(*facts)]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(script)) for script in scripts]
        engine = VLLMServerEngine("smollm2", urls=urls)
        yield scripts, engine
        anyio.run(engine.aclose)


@pytest.fixture
def pair(
    running: tuple[list[Scripted], VLLMServerEngine], facts: tuple[list[int], int]
) -> tuple[list[Scripted], VLLMServerEngine]:
    """Two servers that are up, and their engine."""
    scripts, engine = running
    for script in scripts:
        script.__init__(*facts)  # type: ignore[misc]
    for server in engine._pool.servers:
        server.down_until = 0.0
    return scripts, engine


async def wanted(engine: VLLMServerEngine, limit: int = 64) -> GenerationRequest:
    prompt = await engine.embed([Message("user", "Tell me about a harbour.")])
    return GenerationRequest(prompt, Sampling(max_new_tokens=limit))


async def test_tokens_of_a_server_become_text(pair: tuple[list[Scripted], VLLMServerEngine]) -> None:
    _, engine = pair
    [done] = await engine.generate_batch([await wanted(engine)])
    assert (done.text, done.finish_reason) == (WORDS, "stop")


async def test_a_limit_and_a_stop_string_end_it(pair: tuple[list[Scripted], VLLMServerEngine]) -> None:
    _, engine = pair
    request = await wanted(engine, 5)
    stopped = GenerationRequest(request.prompt, Sampling(max_new_tokens=64, stop=(" wall",)))
    short, cut = await engine.generate_batch([request, stopped])
    assert short.finish_reason == "length"
    assert len(short.token_ids) == 5
    assert cut.text == WORDS.split(" wall")[0]


async def test_a_sequence_goes_on_elsewhere_when_its_server_dies(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    scripts[0].die_after = scripts[1].die_after = 7
    request = await wanted(engine)
    scripts[1].die_after = None
    answers = [(await engine.generate_batch([request]))[0].text for _ in range(2)]
    assert answers == [WORDS, WORDS]
    assert max(scripts[1].rows_seen) == scripts[1].prompt_rows + 7


async def test_no_request_is_lost_when_one_of_two_servers_is_killed_under_load(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    request = await wanted(engine)

    async def kill() -> None:
        while scripts[0].delivered < 60:  # noqa: ASYNC110  the server runs in another thread
            await anyio.sleep(0.001)
        scripts[0].alive = False

    async with anyio.create_task_group() as group:
        group.start_soon(kill)
        done = await engine.generate_batch([request] * 40)
    assert [answer.text for answer in done] == [WORDS] * 40
    assert scripts[0].started > 5
    assert not scripts[0].alive


async def test_a_stream_that_ends_without_a_reason_goes_on_elsewhere(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    scripts[0].hangs_up = scripts[1].hangs_up = True
    [done] = await engine.generate_batch([await wanted(engine)])
    assert (done.text, done.finish_reason) == (WORDS, "stop")
    assert [script.hangs_up for script in scripts] == [False, False]


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_a_server_that_gives_a_sequence_up_does_not_end_it(
    pair: tuple[list[Scripted], VLLMServerEngine], reason: str
) -> None:
    scripts, engine = pair
    scripts[0].ends_as = reason
    answers = [(await engine.generate_batch([await wanted(engine)]))[0] for _ in range(2)]
    assert [(answer.text, answer.finish_reason) for answer in answers] == [(WORDS, "stop")] * 2
    assert sum(script.started for script in scripts) == 3


async def test_a_server_that_gives_every_sequence_up_is_an_error(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    for script in scripts:
        script.ends_as, script.ends_at = "abort", 0
    with pytest.raises(EngineError, match="every server failed"):
        await engine.generate_batch([await wanted(engine)])


@pytest.mark.parametrize("reason", ["repetition", "content_filter"])
async def test_what_a_server_cuts_off_does_not_count_as_whole(
    pair: tuple[list[Scripted], VLLMServerEngine], reason: str
) -> None:
    scripts, engine = pair
    scripts[0].ends_as = scripts[1].ends_as = reason
    [done] = await engine.generate_batch([await wanted(engine)])
    assert done.finish_reason == "aborted"
    assert len(done.token_ids) == BROKEN_AT


async def test_a_reason_that_is_not_known_is_an_error_that_names_it(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    scripts[0].ends_as = scripts[1].ends_as = "moonset"
    with pytest.raises(EngineError, match="'moonset'"):
        await engine.generate_batch([await wanted(engine)])


def test_vllm_in_process_ends_in_the_same_words() -> None:
    assert [ending(reason) for reason in (None, "stop", "length", "abort")] == [None, "stop", "length", "aborted"]
    with pytest.raises(EngineError, match="'error'"):
        ending("error")


async def test_a_request_that_all_servers_fail_once_is_not_lost(pair: tuple[list[Scripted], VLLMServerEngine]) -> None:
    scripts, engine = pair
    scripts[0].stale = scripts[1].stale = 1
    [done] = await engine.generate_batch([await wanted(engine)])
    assert done.text == WORDS
    assert scripts[0].stale == scripts[1].stale == 0


async def test_requests_go_to_the_least_loaded_server(pair: tuple[list[Scripted], VLLMServerEngine]) -> None:
    scripts, engine = pair
    await engine.generate_batch([await wanted(engine)] * 20)
    assert sum(script.started for script in scripts) == 20
    assert min(script.started for script in scripts) >= 8


async def test_scores_of_an_engine_that_is_closed_are_an_error_and_no_numbers(
    pair: tuple[list[Scripted], VLLMServerEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, running = pair
    prompt = await running.embed([Message("user", "Tell me about a harbour.")])
    engine = VLLMServerEngine("smollm2", urls=running.urls)
    begun = threading.Event()

    async def never(_: object) -> list[float]:
        begun.set()
        await anyio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(engine, "_log_likelihoods", never)
    async with anyio.create_task_group() as group:

        async def close_meanwhile() -> None:
            await anyio.to_thread.run_sync(begun.wait)
            await engine.aclose()

        group.start_soon(close_meanwhile)
        with pytest.raises(EngineError, match="closed"):
            await engine.mean_nll(prompt, [[5, 6], [7, 8]])


async def test_closing_a_stream_stops_the_server(pair: tuple[list[Scripted], VLLMServerEngine]) -> None:
    scripts, engine = pair
    for script in scripts:
        script.answer = script.answer * 200
    stream = engine.stream(await wanted(engine, 4000))
    await anext(stream)
    await stream.aclose()
    await anyio.sleep(0.1)
    delivered = sum(script.delivered for script in scripts)
    await anyio.sleep(0.05)
    assert sum(script.delivered for script in scripts) == delivered < 2000


async def test_when_all_servers_are_down_the_error_names_them(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    request = await wanted(engine)
    for script in scripts:
        script.alive = False
    with pytest.raises(EngineError, match=r"every server failed: http://127.*are they up"):
        await engine.generate_batch([request])


async def test_the_password_of_a_url_stands_in_no_error(facts: tuple[list[int], int]) -> None:
    script = Scripted(*facts)
    with serving(script) as url:
        engine = VLLMServerEngine("smollm2", urls=[url.replace("http://", "http://bob:hunter2@")])
        request = await wanted(engine)
        script.alive = False
        with pytest.raises(EngineError, match=r"every server failed: http://127") as caught:
            await engine.generate_batch([request])
    await engine.aclose()
    gone = VLLMServerEngine("smollm2@http://bob:hunter2@127.0.0.1:9")
    with pytest.raises(EngineError, match=r"none of the servers answers: http://127") as not_there:
        await gone.load()
    await gone.aclose()
    assert "hunter2" not in f"{caught.value} {not_there.value}"


async def test_a_refusal_is_not_tried_elsewhere(pair: tuple[list[Scripted], VLLMServerEngine]) -> None:
    scripts, engine = pair
    request = await wanted(engine)
    for script in scripts:
        script.refuse = 400
    with pytest.raises(EngineError, match="refused the request: 400") as caught:
        await engine.generate_batch([request])
    assert "harbour" not in str(caught.value)


async def test_a_stream_that_ends_in_a_server_error_goes_on_elsewhere(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    scripts[0].break_off = 500
    answers = [(await engine.generate_batch([await wanted(engine)]))[0].text for _ in range(2)]
    assert answers == [WORDS, WORDS]
    assert scripts[0].started == 1


async def test_a_stream_that_ends_in_a_refusal_is_not_tried_elsewhere(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    for script in scripts:
        script.break_off = 400
    with pytest.raises(EngineError, match=r"refused the request: 400"):
        await engine.generate_batch([await wanted(engine)])
    assert sum(script.started for script in scripts) == 1


async def test_a_server_that_dies_behind_the_last_token_costs_nothing(
    pair: tuple[list[Scripted], VLLMServerEngine],
) -> None:
    scripts, engine = pair
    request = await wanted(engine, 4)
    for script in scripts:
        script.die_after, script.silent = 4, True
    [done] = await engine.generate_batch([request])
    assert (len(done.token_ids), done.finish_reason) == (4, "length")


async def test_health_tells_which_servers_answer(pair: tuple[list[Scripted], VLLMServerEngine]) -> None:
    _, engine = pair
    assert list((await engine.healthy()).values()) == [True, True]


async def test_rows_of_another_width_never_reach_a_server(pair: tuple[list[Scripted], VLLMServerEngine]) -> None:
    scripts, engine = pair
    request = await wanted(engine)
    narrow = request.prompt.matrix[:, :8]
    from tta_middleware.types import PromptEmbeddings

    prompt = PromptEmbeddings(narrow, request.prompt.token_ids, request.prompt.user_mask)
    with pytest.raises(EmbeddingShapeError, match="rows of 576"):
        await engine.generate_batch([GenerationRequest(prompt, Sampling())])
    assert not any(script.started for script in scripts)


def test_a_server_must_be_named() -> None:
    with pytest.raises(ConfigurationError, match="at least one server"):
        VLLMServerEngine("smollm2")


def test_a_target_names_model_and_servers() -> None:
    engine = VLLMServerEngine("smollm2@http://a:8000, http://b:8000/")
    assert (engine.model_id, engine.urls) == ("smollm2", ("http://a:8000", "http://b:8000"))


def test_a_server_that_failed_rests_and_is_used_again_if_it_is_the_last() -> None:
    now = [0.0]
    servers = [Server(None), Server(None)]  # type: ignore[arg-type]
    pool = ServerPool(servers, clock=lambda: now[0], pause_seconds=5.0)
    pool.failed(servers[0])
    assert {id(pool.pick()) for _ in range(4)} == {id(servers[1])}
    assert pool.pick(tried=[servers[1]]) is servers[0]
    assert pool.pick(tried=servers) is None
    now[0] = 6.0
    assert {id(pool.pick()) for _ in range(4)} == {id(server) for server in servers}


def test_embeddings_travel_as_a_torch_tensor() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    loaded = torch.load(io.BytesIO(base64.b64decode(encode(rows))), weights_only=True)
    assert loaded.numpy().tolist() == rows.tolist()
