"""vLLM servers: any OpenAI-compatible completions server that was started with ``--enable-prompt-embeds``."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import anyio
import numpy as np
import openai

from tta_middleware.aio import process as _process
from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.engines.remote import RemoteEngine, Step, ending
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.types import FloatMatrix, GenerationRequest

_PAUSE_SECONDS = 5.0
"""How long a server that failed is left alone, unless no other is up."""

_CONNECT_SECONDS = 10.0

_SECOND_ROUND_SECONDS = 0.25

_FAILURES = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
"""What another server may do better; a time-out is a connection error."""

_GIVEN_UP = ("abort", "error")
"""Ends of a sequence that nobody here has asked for: the server shuts down or has failed, and another may go on."""


@dataclass(eq=False)
class Server:
    """One server and what is known of it."""

    client: openai.AsyncOpenAI
    open_requests: int = 0
    down_until: float = 0.0


@dataclass
class ServerPool:
    """Picks the server with the fewest open requests among those that are up; pure but for ``clock``."""

    servers: Sequence[Server]
    clock: Callable[[], float] = time.monotonic
    pause_seconds: float = _PAUSE_SECONDS
    _turn: int = field(default=0, init=False)

    def pick(self, tried: Sequence[Server] = ()) -> Server | None:
        """A server that was not tried yet; one that is down only if no other is left. None if all were tried."""
        now = self.clock()
        self._turn += 1
        order = [self.servers[(self._turn + i) % len(self.servers)] for i in range(len(self.servers))]
        left = [server for server in order if server not in tried]
        return min(left, key=lambda server: (server.down_until > now, server.open_requests), default=None)

    def failed(self, server: Server) -> None:
        server.down_until = self.clock() + self.pause_seconds


class Tries:
    """The servers that one request is sent to, until all have failed it twice in a row.

    Once is not enough: a connection that idled may be closed by its server at the moment it is used again.
    """

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._failed: list[Server] = []
        self._second = False

    async def next(self) -> Server:
        """The next one to try.

        Raises:
            EngineError: all have failed.
        """
        server = self._pool.pick(self._failed)
        if server is None and not self._second:
            await anyio.sleep(_SECOND_ROUND_SECONDS)
            self._failed.clear()
            self._second = True
            server = self._pool.pick()
        if server is None:
            urls = ", ".join(_bare(str(server.client.base_url)) for server in self._pool.servers)
            raise EngineError(f"every server failed: {urls}; are they up?")
        return server

    def failed(self, server: Server) -> None:
        self._pool.failed(server)
        self._failed.append(server)

    def moved(self) -> None:
        """There was progress: a server that failed before may be back."""
        self._failed.clear()
        self._second = False


class VLLMServerEngine(RemoteEngine):
    """Decodes on one or several servers; requests go to the least loaded and move on when one fails.

    A sequence whose server dies goes on elsewhere from the tokens it has, which are put behind the prompt as their
    embeddings. Of the model only tokenizer and embedding table are loaded here.

    Args:
        target: ``MODEL@URL[,URL...]``, or only the model with ``urls`` given. MODEL is a short name, a folder or a
            Hugging Face id of the very model that the servers run.
        urls: the servers, such as ``http://gpu-1:8000``.
        served_name: the model's name on the servers; by default the first that a server lists.
        api_key: for servers that want one; read from ``VLLM_API_KEY`` by default.
        timeout_seconds: for a request to make progress, its time in the server's queue included.

    Raises:
        ConfigurationError: no server is named.
    """

    def __init__(
        self,
        target: str,
        *,
        urls: Sequence[str] = (),
        served_name: str | None = None,
        api_key: str | None = None,
        timeout_seconds: float = 300.0,
        device: str = "auto",
        dtype: str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        allow_download: bool = False,
    ) -> None:
        model, _, named = target.partition("@")
        super().__init__(model, cache_dir=cache_dir, allow_download=allow_download)
        self.urls = tuple(url.strip().rstrip("/") for url in (*urls, *named.split(",")) if url.strip())
        if not self.urls:
            raise ConfigurationError("name at least one server: vllm-server:MODEL@http://host:8000, or urls=[...]")
        if (device, dtype) != ("auto", "auto"):
            raise ConfigurationError("device and dtype are the servers' business; leave both at 'auto'")
        self._name = served_name
        self._api_key = api_key or os.environ.get("VLLM_API_KEY") or "none"
        self._timeout = timeout_seconds
        self._pool = ServerPool(())

    def after_fork(self) -> None:
        super().after_fork()
        _process.inherit(self._pool)
        self._pool = ServerPool(())

    def _start(self, folder: str, vocabulary: Vocabulary) -> None:
        async def connect() -> list[Server]:
            return [Server(self._client(url)) for url in self.urls]

        self._pool = ServerPool(self._own_loop.call(connect))
        card = self._own_loop.call(self._served_model)
        self._name = card.id
        limits = [limit for limit in (vocabulary.context, getattr(card, "max_model_len", None)) if limit is not None]
        vocabulary.context = min(limits, default=None)

    def _client(self, url: str) -> openai.AsyncOpenAI:
        timeout = openai.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_SECONDS))
        return openai.AsyncOpenAI(base_url=_v1(url), api_key=self._api_key, timeout=timeout, max_retries=0)

    async def _served_model(self) -> Any:
        """The model's entry in the list of the first server that answers."""
        for server in self._pool.servers:
            try:
                listed = (await server.client.models.list()).data
            except openai.OpenAIError:
                self._pool.failed(server)
                continue
            for card in listed:
                if self._name in (None, card.id):
                    return card
            served = ", ".join(card.id for card in listed)
            raise ConfigurationError(f"the servers have no model {self._name!r}; they have {served or 'none'}")
        raise EngineError(f"none of the servers answers: {', '.join(map(_bare, self.urls))}; are they up?")

    async def healthy(self) -> dict[str, bool]:
        """Which servers list their models now."""

        async def ask() -> dict[str, bool]:
            found = {}
            for url, server in zip(self.urls, self._pool.servers, strict=True):
                try:
                    await server.client.models.list()
                    found[url] = True
                except openai.OpenAIError:
                    self._pool.failed(server)
                    found[url] = False
            return found

        await self._ready()
        return cast(dict[str, bool], await self._on_own_loop(ask))

    async def _steps(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        done: list[int] = []
        tries = Tries(self._pool)
        while True:
            server = await tries.next()
            server.open_requests += 1
            try:
                async with aclosing(self._from(server, request, done)) as steps:
                    async for ids, reason in steps:
                        done += ids
                        if ids:
                            tries.moved()
                        yield ids, reason
                        if reason is not None:
                            return
                # A stream that ends without a reason was cut off.
                tries.failed(server)
            except openai.APIError as error:
                if not _worth_another(error):
                    raise EngineError(f"the server refused the request: {_said(error)}") from error
                tries.failed(server)
            finally:
                server.open_requests -= 1

    async def _from(
        self, server: Server, request: GenerationRequest, done: Sequence[int]
    ) -> AsyncGenerator[Step, None]:
        """Go on after ``done`` tokens."""
        vocabulary, sampling = self._words, request.sampling
        rows = request.prompt.matrix
        if done:
            rows = np.concatenate([rows, vocabulary.rows(done)])
        limit = sampling.max_new_tokens - len(done)
        if vocabulary.context is not None:
            limit = min(limit, vocabulary.context - len(rows))
        if limit < 1:  # its server died between the last token and the news that it was the last
            yield (), "length"
            return
        stream = await server.client.completions.create(
            model=cast(str, self._name),
            prompt=None,  # an empty text would be a second prompt, which is refused
            max_tokens=limit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed % 2**63,
            stream=True,
            extra_body={"prompt_embeds": encode(rows), "return_token_ids": True},
        )
        async with _read_out(stream):
            last: Step | None = None
            while (chunk := await anext(stream, None)) is not None:
                if not chunk.choices:
                    continue
                choice: Any = chunk.choices[0]
                given_up = choice.finish_reason in _GIVEN_UP
                step = list(choice.token_ids or ()), None if given_up else ending(choice.finish_reason)
                if step[1] is None:
                    yield step
                else:
                    last = step
        if last is not None:
            yield last

    async def _log_likelihoods(self, token_ids: Sequence[int]) -> list[float]:
        tries = Tries(self._pool)
        while True:
            server = await tries.next()
            try:
                answer: Any = await server.client.completions.create(
                    model=cast(str, self._name),
                    prompt=list(token_ids),
                    max_tokens=1,
                    temperature=0.0,
                    extra_body={"prompt_logprobs": 0},
                )
            except openai.APIError as error:
                if not _worth_another(error):
                    raise EngineError(f"the server refused the request: {_said(error)}") from error
                tries.failed(server)
                continue
            found = answer.choices[0].prompt_logprobs
            return [0.0 if one is None else one[str(i)]["logprob"] for one, i in zip(found, token_ids, strict=True)]

    async def _stop(self) -> None:
        for server in self._pool.servers:
            await server.client.close()


@asynccontextmanager
async def _read_out(stream: openai.AsyncStream[Any]) -> AsyncGenerator[None, None]:
    """Close a stream and end the client's generators, which are left to the garbage collector otherwise."""
    try:
        async with stream:
            yield
    finally:
        with suppress(Exception):
            await anext(stream, None)


def encode(rows: FloatMatrix) -> str:
    """(T, d) embeddings as the server takes them: a base64 torch tensor."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(np.ascontiguousarray(rows)), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _bare(url: str) -> str:
    """Without the name and password that a URL may hold, for errors."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _v1(url: str) -> str:
    return url if url.endswith("/v1") else f"{url}/v1"


def _worth_another(error: openai.APIError) -> bool:
    """Whether another server may do better; an error inside a stream has no status, but a code in its body."""
    if type(error) is not openai.APIError:
        return isinstance(error, _FAILURES)
    return not str(error.code).startswith("4")


def _said(error: openai.APIError) -> str:
    """Status and kind only: a server's message may quote the request, and so may what it gives as the kind."""
    kind = error.type if isinstance(error.type, str) and error.type.isidentifier() else type(error).__name__
    return f"{str(getattr(error, 'status_code', error.code))[:3]}: {kind}"
