"""The server engine against real vLLM servers; faults that only a script can stage are in ../test_vllm_server.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest
from tta_vllm import VLLMServerEngine

from tta_middleware import Message, Sampling
from tta_middleware.errors import ConfigurationError
from tta_middleware.testing.engine import EngineContract
from tta_middleware.types import GenerationRequest, GuardedAnswer

PATIENCE_SECONDS = 240.0


@pytest.fixture(scope="module")
def shared(servers: list[Any]) -> Iterator[VLLMServerEngine]:
    engine = VLLMServerEngine("smollm2", urls=[servers[0].url])
    yield engine
    anyio.run(engine.aclose)


class TestVLLMServer(EngineContract):
    @pytest.fixture
    async def engine(self, shared: VLLMServerEngine) -> VLLMServerEngine:
        return shared


async def wanted(engine: VLLMServerEngine, tokens: int) -> GenerationRequest:
    prompt = await engine.embed([Message("user", "Tell me a long story about a lighthouse.")])
    return GenerationRequest(prompt, Sampling(max_new_tokens=tokens))


async def test_closing_a_stream_ends_it_on_the_server_within_a_step(
    shared: VLLMServerEngine, servers: list[Any]
) -> None:
    generated = "vllm:generation_tokens_total"
    before, aborted = servers[0].metric(generated), servers[0].metric("vllm:request_success_total")
    stream = shared.stream(await wanted(shared, 1500))
    read = sum([len((await anext(stream)).token_ids) for _ in range(5)])
    await stream.aclose()
    with anyio.fail_after(PATIENCE_SECONDS):
        while servers[0].metric("vllm:num_requests_running"):  # noqa: ASYNC110  the server tells when asked
            await anyio.sleep(0.05)
    # Some may have been on their way to the reader when it left.
    assert read <= servers[0].metric(generated) - before <= read + 8
    assert servers[0].metric("vllm:request_success_total") <= aborted + 1


async def test_rows_that_are_no_tokens_are_decoded_from(shared: VLLMServerEngine) -> None:
    request = await wanted(shared, 8)
    moved = request.prompt.matrix.copy()
    moved[request.prompt.user_mask] *= -1.0
    other = GenerationRequest(request.prompt.moved(moved), request.sampling)
    unmoved, answer = await shared.generate_batch([request, other])
    assert answer.token_ids != unmoved.token_ids


async def test_the_context_is_the_servers(shared: VLLMServerEngine) -> None:
    with pytest.raises(ConfigurationError, match="context is 2048"):
        await shared.embed([Message("user", "word " * 3000)])


async def test_a_model_that_is_not_served_is_refused(servers: list[Any]) -> None:
    engine = VLLMServerEngine("smollm2", urls=[servers[0].url], served_name="other")
    with pytest.raises(ConfigurationError, match="they have smollm2"):
        await engine.embed([Message("user", "Hello")])
    await engine.aclose()


async def test_repairs_through_the_server_end_as_in_process(
    shared: VLLMServerEngine, repaired_in_process: list[GuardedAnswer], repaired: Callable[..., Any]
) -> None:
    answers = await repaired(shared)
    assert [answer.trace.outcome for answer in answers] == [answer.trace.outcome for answer in repaired_in_process]
    assert [answer.text for answer in answers] == [answer.text for answer in repaired_in_process]
    assert "neutralised" in {answer.trace.outcome for answer in answers}


@pytest.fixture
async def both(servers: list[Any]) -> AsyncIterator[VLLMServerEngine]:
    engine = VLLMServerEngine("smollm2", urls=[server.url for server in servers])
    yield engine
    await engine.aclose()


async def test_killed_under_load_no_request_is_lost(both: VLLMServerEngine, servers: list[Any]) -> None:
    """Last, since one server is gone afterwards. Greedy float32, so a sequence that moves ends with the same text."""
    prompts = [f"Write about the number {n}." for n in range(24)]
    requests = [
        GenerationRequest(await both.embed([Message("user", text)]), Sampling(max_new_tokens=24)) for text in prompts
    ]
    [alone] = await both.generate_batch(requests[:1])
    before = servers[1].metric("vllm:generation_tokens_total")

    async def kill() -> None:
        while servers[1].metric("vllm:generation_tokens_total") < before + 40:  # noqa: ASYNC110
            await anyio.sleep(0.02)
        servers[1].kill()

    with anyio.fail_after(PATIENCE_SECONDS):
        async with anyio.create_task_group() as group:
            group.start_soon(kill)
            done = await both.generate_batch(requests)
    assert not servers[1].healthy()
    assert [answer.finish_reason in ("stop", "length") for answer in done] == [True] * len(prompts)
    assert all(len(answer.token_ids) == 24 for answer in done if answer.finish_reason == "length")
    assert done[0].text == alone.text
    assert list((await both.healthy()).values()) == [True, False]
