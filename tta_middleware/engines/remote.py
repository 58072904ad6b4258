"""What engines share whose model is not torch's: the embedding table here, the decoding elsewhere (vLLM, llama.cpp)."""

from __future__ import annotations

import asyncio
import math
import os
from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any, TypeAlias, cast

import anyio
import anyio.to_thread
import numpy as np
from anyio.from_thread import BlockingPortal, start_blocking_portal

from tta_middleware.aio import process as _process
from tta_middleware.aio.streams import first_error, unless_cancelled_within
from tta_middleware.engines.decoding.handoff import Mailbox
from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.prompt.detokenise import TextAssembler, deltas
from tta_middleware.engines.prompt.table import directions, nearest_tokens
from tta_middleware.engines.prompt.vocabulary import Vocabulary, load_vocabulary
from tta_middleware.engines.tokenised import TokenisedEngine
from tta_middleware.engines.torch_import import in_a_thread_that_ends
from tta_middleware.errors import ConfigurationError, EmbeddingShapeError, EngineError
from tta_middleware.types import (
    Collected,
    Completion,
    FinishReason,
    FloatMatrix,
    GenerationRequest,
    IntVector,
    PromptEmbeddings,
    Sampling,
    TextDelta,
)

Step: TypeAlias = tuple[Sequence[int], FinishReason | None]
"""New token ids, and why the sequence is over if it is."""

# Gemma: prompts that are tried to see where rows are scaled, and tokens of each and of what follows.
_PROBES, _PROBE_TOKENS = 3, 12

# What vLLM and servers of its kind say at the end of a sequence. A filter or a repetition that the server found cuts a
# text off, and so does a request that it gave up.
_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "abort": "aborted",
    "repetition": "aborted",
    "content_filter": "aborted",
}


class RemoteEngine(TokenisedEngine):
    """An engine whose model decodes on one event loop of its own, whichever loop asks.

    Args:
        model: a short name, a folder or a Hugging Face id, as for the transformers engine. Only the tokenizer and the
            embedding table are read here.
        cache_dir: where a converted GGUF is kept.
        allow_download: let a Hugging Face id be fetched from the hub.
    """

    def __init__(
        self, model: str, *, cache_dir: str | os.PathLike[str] | None = None, allow_download: bool = False
    ) -> None:
        self.model_id = model
        self._cache_dir, self._allow_download = cache_dir, allow_download
        self._lock = _process.Lock()
        self._stack = ExitStack()
        self._vocabulary: Vocabulary | None = None
        self._starting: Vocabulary | None = None
        self._portal: BlockingPortal | None = None
        self._closed = False
        self._lost = ""
        # A forgotten aclose must not leave vLLM's process to die of a torn pipe, with its tracebacks, nor a thread
        # inside llama.cpp when the interpreter ends.
        _process.at_exit(_process.ANSWERING, self._close)
        _process.forget_after_fork(self)

    _what = "vLLM"
    """What decodes, in words."""

    _forkable = True
    """Whether a forked child may bring up for itself what its parent has brought up."""

    def _found(self) -> tuple[Path, Vocabulary]:
        """Where the model is and what is known of it here; runs in a worker thread, once, before :meth:`_start`."""
        folder = resolve_model(self.model_id, cache_dir=self._cache_dir, allow_download=self._allow_download)
        return folder, load_vocabulary(folder)

    @abstractmethod
    def _start(self, folder: str, vocabulary: Vocabulary) -> None:
        """Bring up what decodes; runs in a worker thread, once."""

    @abstractmethod
    def _steps(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        """Decode on the engine's own loop; closing the generator stops decoding."""

    @abstractmethod
    async def _log_likelihoods(self, token_ids: Sequence[int]) -> list[float]:
        """Of each token given those before it; the first one's is ignored."""

    @abstractmethod
    async def _stop(self) -> None:
        """Release what :meth:`_start` brought up, if only in part; runs on the engine's own loop."""

    async def load(self) -> None:
        """Bring up what decodes and read the vocabulary now instead of at first use.

        Raises:
            ModelNotFoundError: the model is not on this machine; the message says what to run.
            ConfigurationError, EngineError: what decodes cannot be brought up, or the engine is closed.
        """
        await self._ready()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """Decode one sequence; closing the generator, from any task, stops decoding.

        Raises:
            EmbeddingShapeError: the prompt is not as wide as the model's embeddings.
            ContextLengthError: it fills the model's context.
            EngineError: the model or its server failed.
        """
        vocabulary = await self._ready()
        self._check_prompt(request.prompt)
        mailbox: Mailbox[TextDelta] = Mailbox()
        work = self._spawn(request, vocabulary, mailbox)
        try:
            finished = False
            while not finished:
                delta = await mailbox.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            work.cancel()

    def stream_batch(self, requests: Sequence[GenerationRequest]) -> list[AsyncGenerator[TextDelta, None]]:
        """One stream per request; the scheduler batches whatever is there."""
        return [self.stream(request) for request in requests]

    async def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Decode sequences side by side; answers come in the order of the requests."""
        done: dict[int, Completion] = {}

        async def one(index: int, request: GenerationRequest) -> None:
            async with aclosing(self.stream(request)) as pieces:
                collected = Collected()
                async for delta in pieces:
                    collected.add(delta)
            done[index] = collected.completion

        await self._ready()
        for request in requests:
            self._check_prompt(request.prompt)
        try:
            async with anyio.create_task_group() as group:
                for index, request in enumerate(requests):
                    group.start_soon(one, index, request)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        return [done[index] for index in range(len(requests))]

    async def mean_nll(self, prompt: PromptEmbeddings, completions: Sequence[Sequence[int]]) -> list[float]:
        """Mean negative log-likelihood in nats per token, after the prompt's own tokens; NaN if empty.

        The prompt is taken as its token ids: likelihoods are only asked for the unmoved one.
        """
        await self._ready()
        self._check_tokens(prompt, completions)
        prefix = prompt.token_ids.tolist()
        scores = [math.nan] * len(completions)

        async def one(index: int, ids: Sequence[int]) -> None:
            found = await self._on_own_loop(self._log_likelihoods, [*prefix, *ids])
            scores[index] = -sum(found[len(prefix) :]) / len(ids)

        try:
            async with anyio.create_task_group() as group:
                for index, ids in enumerate(completions):
                    if ids:
                        group.start_soon(one, index, ids)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        return scores

    async def nearest_tokens(self, rows: FloatMatrix) -> IntVector:
        """For (n, d) rows, the (n,) ids of the vocabulary's nearest embeddings by cosine."""
        vocabulary = await self._ready()
        self._check_width(rows)
        return await _process.calculate(nearest_tokens, vocabulary, rows)

    async def directions(self, words: Sequence[str]) -> FloatMatrix:
        """(n, d) rows of length 1: each word's mean token embedding less the mean of the whole table."""
        return await _process.calculate(directions, await self._ready(), list(words))

    async def aclose(self) -> None:
        """Stop decoding and release model or connections; idempotent. Later calls get an EngineError."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._close)

    def after_fork(self) -> None:
        """What decodes is the parent's; the child brings up its own where that can be had."""
        if self._portal is None:
            return
        _process.inherit(self._portal, self._stack)
        self._stack, self._portal, self._vocabulary = ExitStack(), None, None
        if not self._forkable:
            self._lost = f"the process was forked after {self._what} was started in it and does not outlive a fork"

    async def _ready(self) -> Vocabulary:
        if self._lost:
            raise EngineError(f"{self._lost}; load it after the fork, or start processes with 'spawn'")
        if self._vocabulary is not None and not self._closed:
            return self._vocabulary
        return await anyio.to_thread.run_sync(self._load_once, abandon_on_cancel=True)

    @property
    def _own_loop(self) -> BlockingPortal:
        if self._portal is None or self._closed:
            raise EngineError("the engine is closed; build a new one")
        return self._portal

    def _load_once(self) -> Vocabulary:
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed; build a new one")
            if self._vocabulary is None:
                folder, vocabulary = in_a_thread_that_ends(self._found)
                with ExitStack() as stack:
                    self._portal = portal = stack.enter_context(start_blocking_portal(name="tta-remote"))
                    stack.callback(portal.call, portal.stop, True)
                    stack.callback(portal.call, self._stop)
                    self._starting = vocabulary
                    self._start(str(folder), vocabulary)
                    if vocabulary.family_scale != 1.0:
                        portal.call(self._find_scale, vocabulary)
                    self._stack = stack.pop_all()
                self._vocabulary = vocabulary
            return self._vocabulary

    @property
    def _words(self) -> Vocabulary:
        """The vocabulary, while the engine is being brought up as well."""
        return cast(Vocabulary, self._vocabulary or self._starting)

    async def _find_scale(self, vocabulary: Vocabulary) -> None:
        """Find out whether rows are to be scaled before they are sent (Gemma), by what is decoded from either.

        vLLM multiplies the rows that it is given in Gemma 1 and 2 and not in Gemma 3, and versions differ. The right
        rows go on as the tokens themselves do: where the two ways part, theirs is the likelier token.

        Raises:
            ConfigurationError: both give the same, so it cannot be told.
        """
        for start in range(_PROBES):
            ids = [(start * 7919 + at * 104_729) % len(vocabulary.table) for at in range(_PROBE_TOKENS)]
            told = {scale: await self._told(vocabulary, ids, scale) for scale in (1.0, vocabulary.family_scale)}
            (one, first), (other, second) = told.items()
            parts = [at for at, (left, right) in enumerate(zip(first, second, strict=False)) if left[0] != right[0]]
            if parts:
                vocabulary.scale = one if first[parts[0]][1] > second[parts[0]][1] else other
                return
        raise ConfigurationError(
            f"it cannot be told whether {self._what} scales this model's rows; use the transformers engine"
        )

    async def _told(self, vocabulary: Vocabulary, ids: Sequence[int], scale: float) -> list[tuple[int, float]]:
        """What follows rows that are scaled so, and how likely each token is behind the tokens themselves."""
        vocabulary.scale = scale
        token_ids = np.array(ids, dtype=np.int64)
        prompt = PromptEmbeddings(vocabulary.rows(ids), token_ids, np.ones(len(ids), dtype=np.bool_))
        found: list[int] = []
        async with aclosing(self._steps(GenerationRequest(prompt, Sampling(max_new_tokens=_PROBE_TOKENS)))) as steps:
            async for new, _ in steps:
                found += new
        likely = await self._log_likelihoods([*ids, *found])
        return list(zip(found, likely[len(ids) :], strict=True))

    def _close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._stack.close()

    def _spawn(self, request: GenerationRequest, vocabulary: Vocabulary, mailbox: Mailbox[TextDelta]) -> Future[None]:
        text = vocabulary.assembler(request.prompt, request.sampling.stop)
        return self._own_loop.start_task_soon(self._pump, request, text, mailbox)

    async def _pump(self, request: GenerationRequest, text: TextAssembler, mailbox: Mailbox[TextDelta]) -> None:
        """Token ids to deltas, on the engine's own loop."""
        try:
            async with aclosing(self._steps(request)) as steps:
                async for ids, reason in steps:
                    told = self._deltas(text, ids, "aborted" if request.abort.is_set() else reason)
                    heard = [mailbox.put(delta) for delta in told]
                    if not all(heard) or told[-1].finish_reason is not None:
                        return
            mailbox.put(EngineError("the model's stream ended without a reason"))
        except asyncio.CancelledError:
            mailbox.put(EngineError("the engine was closed while it decoded"))
            raise
        except EngineError as error:
            mailbox.put(error)
        except Exception as error:  # noqa: BLE001  the thread boundary: the caller gets the error
            mailbox.put(_as_engine_error(error))

    def _deltas(self, text: TextAssembler, ids: Sequence[int], reason: FinishReason | None) -> list[TextDelta]:
        eos = cast(Vocabulary, self._vocabulary).eos_ids
        pieces = [piece for token_id in ids if token_id not in eos for piece in text.push(token_id)]
        if any(token_id in eos for token_id in ids) and reason != "aborted":
            reason = "stop"
        if reason is not None:
            pieces += text.flush()
        if text.stopped:
            reason = "stop"
        return deltas(pieces, ids, reason)

    async def _on_own_loop(self, function: Any, *arguments: Any) -> Any:
        try:
            work = asyncio.wrap_future(self._own_loop.start_task_soon(function, *arguments))
            return await unless_cancelled_within(work, EngineError("the engine was closed while it worked"))
        except EngineError:
            raise
        except Exception as error:
            raise _as_engine_error(error) from error

    def _check_prompt(self, prompt: PromptEmbeddings) -> None:
        self._check_tokens(prompt)
        self._words.check_length(len(prompt.matrix))

    def _check_tokens(self, prompt: PromptEmbeddings, completions: Sequence[Sequence[int]] = ()) -> None:
        self._check_width(prompt.matrix)
        self._words.check_ids(prompt.token_ids)
        for ids in completions:
            self._words.check_ids(ids)

    def _check_width(self, rows: FloatMatrix) -> None:
        self._words.check_width(rows)
        if len(rows) == 0:
            raise EmbeddingShapeError("a prompt needs at least one embedding row")


def ending(reason: str | None) -> FinishReason | None:
    """Why a sequence is over, in our words; None while it goes on.

    Raises:
        EngineError: the model failed, or the reason is not known: its text may be whole or cut off.
    """
    if reason is None:
        return None
    if reason not in _REASONS:
        raise EngineError(f"decoding ended with the reason {reason[:40]!r}; known are: {', '.join(_REASONS)}")
    return _REASONS[reason]


def _as_engine_error(error: Exception) -> EngineError:
    wrapped = EngineError(f"decoding failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
