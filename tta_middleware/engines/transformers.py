"""The embedded engine: a Hugging Face decoder that runs in this process."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import groupby
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np

from tta_middleware.aio import process as _process
from tta_middleware.config import check_count
from tta_middleware.engines.decoding.handoff import BatchSink, Chore, Mailbox, ScoreSink, StreamGroup, StreamSink
from tta_middleware.engines.models import resolve_adapter, resolve_model
from tta_middleware.engines.prompt.template import chat_template
from tta_middleware.engines.prompt.tool_template import tool_format
from tta_middleware.engines.tokenised import TokenisedEngine
from tta_middleware.engines.torch_import import import_torch, import_transformers, in_a_thread_that_ends
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.types import (
    Completion,
    GenerationRequest,
    PromptEmbeddings,
    TextDelta,
    ToolFormat,
    next_ticket,
)

if TYPE_CHECKING:
    from tta_middleware.engines.decoding.decoder import Decoder, DecoderStats
    from tta_middleware.engines.decoding.feeds import Reading
    from tta_middleware.engines.decoding.loaded import LoadedModel
    from tta_middleware.engines.decoding.row import Row, Sink
    from tta_middleware.types import FloatMatrix, IntVector

T = TypeVar("T")


class TransformersEngine(TokenisedEngine):
    """Decodes a local open-weight model from input embeddings; one model, one decode thread, many callers.

    The model is loaded at first use, in a worker thread. Every method may be called from several asyncio event
    loops at once: their sequences share one batch, which sequences join and leave at any step.

    Every causal language model of transformers that takes embeddings works. One whose attention lets sequences lie
    side by side (Llama, Qwen, Mistral, Phi, Gemma, GPT-OSS, ...) runs packed; another (recurrent layers, compressed
    keys and values) runs plainly, by its own cache. Which way is chosen by looking at the model, see
    :mod:`tta_middleware.engines.decoding.path`, and docs/models.md has the families.

    Args:
        model: a known short name (``smollm2``), a folder, a ``.gguf`` file, or a Hugging Face id.
        device: ``auto`` (CUDA, Apple's GPU or the CPU, the first that there is) or a torch device.
        dtype: ``auto`` (bfloat16 where the hardware multiplies it, else float32) or a torch floating type.
        cache_dir: where a converted GGUF is kept; by default ``$TTA_CACHE_DIR`` or the user's cache folder.
        allow_download: let a Hugging Face id be fetched from the hub; without it nothing goes to the network.
        max_batch: most sequences decoded at once; further ones wait their turn, see
            :class:`tta_middleware.engines.decoding.admission.FairQueue`. By default 32, on a CUDA device 128; None
            until the model is loaded.
        max_waiting: most sequences that wait; further ones are refused.
        cache_gib: GiB that keys and values may take, of running sequences and of what is kept of earlier ones; by
            default half of what is free when the model is loaded. Sequences that do not fit wait.
        prefix_cache_gib: of these, the most that turns of conversations keep for the next one; by default a quarter, in
            main memory at most 1 GiB, and less where running sequences need it. With 0 nothing is kept.
        path: ``auto``, ``packed`` or ``plain``; a model that cannot run packed is refused for ``packed``.
        device_map: as transformers takes it, in place of ``device``: ``auto`` spreads layers over what there is.
        quantization: ``bnb-4bit`` or ``bnb-8bit`` quantises while loading. Checkpoints that are quantised (GPTQ, AWQ,
            compressed-tensors, bitsandbytes, MXFP4) load without; a package that is missing is named.
        adapter: a PEFT adapter, folder or Hugging Face id, that is merged into the weights.
        revision: branch, tag or commit of a Hugging Face id.
        trust_remote_code: run Python code that comes with the model; otherwise such a model is refused.
        weights: how linear layers keep their weights on a CPU: ``loaded`` as they are, or ``float16``, half of the
            bytes with all sums in float32. ``auto`` is ``float16`` where ``dtype`` is ``auto`` and the processor has no
            bfloat16, else ``loaded``.

    Raises:
        ConfigurationError: a number is out of range. What is wrong with the model shows at first use.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        device: str = "auto",
        dtype: str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        allow_download: bool = False,
        max_batch: int | None = None,
        max_waiting: int | None = 10_000,
        cache_gib: float | None = None,
        prefix_cache_gib: float | None = None,
        path: str = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        quantization: str | None = None,
        adapter: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        weights: str = "auto",
    ) -> None:
        if weights not in ("auto", "loaded", "float16"):
            raise ConfigurationError(f"weights is auto, loaded or float16, not {weights!r}")
        if path not in ("auto", "packed", "plain"):
            raise ConfigurationError(f"path is auto, packed or plain, not {path!r}")
        for name, number in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            check_count(name, number)
        sizes: Mapping[str, object] = {"cache_gib": cache_gib, "prefix_cache_gib": prefix_cache_gib}
        for name, gib in sizes.items():
            if gib is not None and not isinstance(gib, Real):
                raise ConfigurationError(f"{name} is a number, not {gib!r:.40}")
        if cache_gib is not None and not cache_gib > 0:
            raise ConfigurationError(f"cache_gib must be above 0, not {cache_gib}")
        if prefix_cache_gib is not None and not 0 <= prefix_cache_gib < math.inf:
            raise ConfigurationError(f"prefix_cache_gib must be 0 or more, not {prefix_cache_gib}")
        self.model_id = model
        self._device, self._dtype = device, dtype
        self._cache_dir, self._allow_download = cache_dir, allow_download
        self.max_batch = self._asked_batch = max_batch
        self._max_waiting, self._cache_gib, self._prefix_cache_gib = max_waiting, cache_gib, prefix_cache_gib
        self._path, self._device_map = path, device_map
        self._weights, self._quantization = weights, quantization
        self._adapter, self._revision, self._trust_remote_code = adapter, revision, trust_remote_code
        self._lock = _process.Lock()
        self._loaded: LoadedModel | None = None
        self._decoder: Decoder | None = None
        self._closed = self._loading = False
        self._lost = ""
        _process.forget_after_fork(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the same settings and loads the model by itself."""
        settings: dict[str, Any] = {
            "device": self._device,
            "dtype": self._dtype,
            "cache_dir": self._cache_dir,
            "allow_download": self._allow_download,
            "max_batch": self._asked_batch,
            "max_waiting": self._max_waiting,
            "cache_gib": self._cache_gib,
            "prefix_cache_gib": self._prefix_cache_gib,
            "path": self._path,
            "device_map": self._device_map,
            "quantization": self._quantization,
            "adapter": self._adapter,
            "revision": self._revision,
            "trust_remote_code": self._trust_remote_code,
            "weights": self._weights,
        }
        return partial(type(self), **settings), (self.model_id,)

    async def load(self) -> None:
        """Load the model now instead of at first use.

        Raises:
            ModelNotFoundError: the model is not on this machine; the message says what to run.
            MissingExtraError: torch or transformers is not installed.
            ConfigurationError: device, dtype or architecture is not supported.
            EngineError: the files cannot be read, or the engine is closed.
        """
        await self._ready()

    async def way(self) -> tuple[str, str]:
        """Whether the model runs ``packed`` or ``plain``, and why; loads it if need be.

        Raises:
            ConfigurationError, EngineError: as :meth:`load`.
        """
        model = await self._ready()
        return model.path, model.describe()

    async def tool_format(self) -> ToolFormat:
        """How the model writes a tool call, by its chat template; see :class:`tta_middleware.protocols.ToolEngine`.

        Raises:
            ConfigurationError: the template takes no tools, or teaches a form that is not known.
        """
        model = await self._ready()
        return tool_format(chat_template(model.tokenizer, tools=True))

    async def chat_template(self) -> str:
        """The text of the model's chat template.

        Raises:
            ConfigurationError: it has none.
        """
        model = await self._ready()
        return chat_template(model.tokenizer)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """Decode one sequence; closing the generator, from any task, stops decoding within one step.

        A step is one forward pass: the next token of every sequence, or the prompts of those that join.

        Raises:
            EmbeddingShapeError: the prompt is of another model: not as wide, or of other tokens.
            EngineError: the model failed.
            EngineBusyError: too many sequences wait already.
        """
        async with aclosing(self.stream_batch([request])[0]) as deltas:
            async for delta in deltas:
                yield delta

    def stream_batch(self, requests: Sequence[GenerationRequest]) -> list[AsyncGenerator[TextDelta, None]]:
        """One stream per request; their sequences join the running batch at one step, when the first is started.

        A sequence stops within one step when its stream is closed or its ``abort`` is set. A stream that is never
        started has no end of its own, so its ``abort`` must be set.

        Raises:
            EmbeddingShapeError: a prompt is of another model: not as wide, or of other tokens; nothing is decoded then.
            EngineError: the model failed.
            EngineBusyError: too many sequences wait already; nothing is decoded then.
        """
        group = StreamGroup(self._begin, requests)
        return [group.stream(index) for index in range(len(requests))]

    async def _begin(self, requests: Sequence[GenerationRequest]) -> list[tuple[Row, Mailbox[TextDelta]]]:
        model = await self._ready()
        mailboxes = [Mailbox[TextDelta]() for _ in requests]
        ticket = next_ticket()
        rows = [_row(model, request, StreamSink(box), ticket) for request, box in zip(requests, mailboxes, strict=True)]
        try:
            self._submit(rows)
        except EngineError:
            for row in rows:
                row.cancel()
            raise
        return list(zip(rows, mailboxes, strict=True))

    async def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Decode sequences side by side; they join the running batch at one step.

        Raises:
            EmbeddingShapeError: a prompt is of another model: not as wide, or of other tokens; nothing is decoded then.
            EngineError: the model failed; the sequences of this call that still run are given up.
            EngineBusyError: too many sequences wait already.
        """
        model = await self._ready()
        mailbox: Mailbox[tuple[int, Completion]] = Mailbox()
        ticket = next_ticket()
        rows = [_row(model, request, BatchSink(mailbox, at), ticket) for at, request in enumerate(requests)]
        try:
            self._submit(rows)
            done = dict([await mailbox.get() for _ in rows])
        finally:
            for row in rows:
                row.cancel()
        return [done[index] for index in range(len(rows))]

    async def mean_nll(self, prompt: PromptEmbeddings, completions: Sequence[Sequence[int]]) -> list[float]:
        """Mean negative log-likelihood in nats per token of each completion after ``prompt``; NaN if empty.

        Raises:
            EmbeddingShapeError: the prompt is of another model: not as wide, or of other tokens.
        """
        model = await self._ready()
        model.check_prompt(prompt)
        for ids in completions:
            model.check_ids(ids)
        from tta_middleware.engines.decoding.feeds import Scoring

        asked = [index for index, ids in enumerate(completions) if len(ids) > 0]
        mailbox: Mailbox[tuple[int, float]] = Mailbox()
        found = await self._read(
            [Scoring(prompt, completions[index], ScoreSink(mailbox, index)) for index in asked], mailbox
        )
        return [found.get(index, math.nan) for index in range(len(completions))]

    async def next_token_logprobs(
        self,
        prompts: Sequence[PromptEmbeddings],
        token_ids: Sequence[int],
        *,
        shared: int = 0,
        owner: int | None = None,
    ) -> list[list[float]]:
        """Per prompt, the log-probability in nats of each of ``token_ids`` as the next token.

        Runs in the passes that decode; what a prompt shares with one that ran lately does not run again.

        Args:
            shared: how many rows the prompts have in common with those of other callers; run once for all of them.
            owner: a number (:func:`~tta_middleware.types.next_ticket`) under which what has run is kept for the next
                prompt, until :meth:`forget`; without one it is kept while there is room.

        Raises:
            EmbeddingShapeError: a prompt is of another model: not as wide, or of other tokens.
            ConfigurationError: a prompt fills the context.
        """
        return await self._asked(prompts, token_ids, shared, owner)

    def forget(self, owner: int) -> None:
        """Let go of what is kept for ``owner``, within one step; thread-safe, does not wait, never fails."""
        if self._decoder is not None:
            self._decoder.forget(owner)

    async def layer_count(self) -> int:
        """How many layers the model has."""
        return (await self._ready()).layers

    async def hidden_states(
        self,
        prompts: Sequence[PromptEmbeddings],
        layers: Sequence[int] = (),
        *,
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
        shared: int = 0,
        owner: int | None = None,
    ) -> FloatMatrix:
        """(n, k * d) float32: per prompt, the state at its last row after each of k layers, side by side.

        With ``spans`` there is a row for each of them, those of the first prompt first.

        Args:
            layers: from 1 to :meth:`layer_count`, whose state is taken after the norm behind it. Without any, that one.
            spans: per prompt some of its rows, each from one to before another: in place of a state, the mean of what
                a layer's attention keeps of them as values. They stand in the cache, so nothing runs again.

        Raises:
            EmbeddingShapeError: a prompt is of another model: not as wide, or of other tokens.
            ConfigurationError: a prompt fills the context; or see :func:`.feeds.check_reading`.
            EngineError: this model's states cannot be read at such a layer.
        """
        model = await self._ready()
        from tta_middleware.engines.decoding.feeds import check_reading

        check_reading(model, prompts, layers, spans)
        found = await self._asked(prompts, None, shared, owner, layers, spans)
        rows = [len(one) for one in spans] if spans else [1] * len(prompts)
        if not found:
            return np.zeros((0, 0), dtype=np.float32)
        return np.concatenate([np.array(one, np.float32).reshape(n, -1) for one, n in zip(found, rows, strict=True)])

    async def _asked(
        self,
        prompts: Sequence[PromptEmbeddings],
        token_ids: Sequence[int] | None,
        shared: int,
        owner: int | None,
        layers: Sequence[int] = (),
        spans: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> list[list[float]]:
        model = await self._ready()
        model.check_ids(token_ids or ())
        for prompt in prompts:
            model.check_prompt(prompt)
            model.check_length(len(prompt.matrix))
        from tta_middleware.engines.decoding.feeds import Asking

        mailbox: Mailbox[tuple[int, list[float]]] = Mailbox()
        read = spans or [()] * len(prompts)
        jobs = [
            Asking(prompt, token_ids, ScoreSink(mailbox, at), layers=layers, spans=mine, shared=shared, owner=owner)
            for at, (prompt, mine) in enumerate(zip(prompts, read, strict=True))
        ]
        found = await self._read(jobs, mailbox)
        return [found[index] for index in range(len(prompts))]

    async def _read(self, jobs: Sequence[Reading], mailbox: Mailbox[tuple[int, T]]) -> dict[int, T]:
        """What was worked out of each job's text, by its place; jobs whose caller leaves are dropped."""
        try:
            self._running().score(jobs)
            return dict([await mailbox.get() for _ in jobs])
        finally:
            for job in jobs:
                job.cancelled = True

    async def nearest_tokens(self, rows: FloatMatrix) -> IntVector:
        """For (n, d) rows, the (n,) ids of the vocabulary's nearest input embeddings by cosine.

        Raises:
            EmbeddingShapeError: the rows are not as wide as the model's embeddings.
        """
        model = await self._ready()
        model.check_width(rows)
        from tta_middleware.engines.prompt.table import nearest_tokens

        return await self._beside_decoding(lambda: nearest_tokens(model, rows))

    async def directions(self, words: Sequence[str]) -> FloatMatrix:
        """(n, d) rows of length 1: each word's mean token embedding less the mean of the model's whole table.

        A word is read as it stands inside a sentence, with a space before it.

        Raises:
            ConfigurationError: a word is blank.
        """
        model = await self._ready()
        from tta_middleware.engines.prompt.table import directions

        return await self._beside_decoding(lambda: directions(model, list(words)))

    def stats(self) -> DecoderStats:
        """Sequences at work and waiting, steps done and tokens generated so far."""
        from tta_middleware.engines.decoding.decoder import DecoderStats

        return self._decoder.stats() if self._decoder is not None else DecoderStats()

    def free_places(self) -> int:
        """See :class:`tta_middleware.protocols.SharesPlaces`."""
        stats = self.stats()
        return max(0, (self.max_batch or 1) - stats.active - stats.queued)

    async def aclose(self) -> None:
        """Stop decoding within one step, wait for the decode thread, free the model; idempotent.

        Calls that still wait get an EngineError; so do later ones.
        """
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._close)

    def after_fork(self) -> None:
        """A model in main memory is the child's, too; one on a device is not, and a half-read one is nobody's."""
        loaded = self._loaded
        if loaded is not None and loaded.device.type != "cpu":
            self._lost = f"a model on {loaded.device} does not outlive a fork"
        elif loaded is None and self._loading:
            self._lost = "the process was forked while the model was being loaded"

    async def _ready(self) -> LoadedModel:
        if self._lost:
            raise EngineError(f"{self._lost}; load it after the fork, or start processes with 'spawn'")
        loaded = self._loaded
        if loaded is not None:
            return loaded
        # A caller that is cancelled goes at once; the load goes on for the next one.
        return await anyio.to_thread.run_sync(self._load_once, abandon_on_cancel=True)

    def _load_once(self) -> LoadedModel:
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed; build a new one")
            if self._loaded is None:
                self._loading = True
                try:
                    self._loaded = in_a_thread_that_ends(self._load)
                finally:
                    self._loading = False
            return self._loaded

    def _load(self) -> LoadedModel:
        import_torch()
        import_transformers()
        from tta_middleware.engines.decoding.capacity import default_batch, default_budget
        from tta_middleware.engines.decoding.decoder import Decoder
        from tta_middleware.engines.decoding.loading import HowToLoad, load_model

        download = self._allow_download
        folder = resolve_model(
            self.model_id,
            cache_dir=self._cache_dir,
            allow_download=download,
            revision=self._revision,
            code=self._trust_remote_code,
        )
        how = HowToLoad(
            device=self._device,
            dtype=self._dtype,
            path=self._path,
            device_map=self._device_map,
            quantization=self._quantization,
            adapter=resolve_adapter(self._adapter, allow_download=download) if self._adapter else None,
            trust_remote_code=self._trust_remote_code,
            weights=self._weights,
        )
        loaded = load_model(folder, how)
        self.max_batch = self._asked_batch or default_batch(loaded.device)
        self._decoder = Decoder(
            loaded,
            self.max_batch,
            max_waiting=self._max_waiting,
            memory_budget=int(self._cache_gib * 2**30) if self._cache_gib else default_budget(loaded.device),
            prefix_budget=None if self._prefix_cache_gib is None else int(self._prefix_cache_gib * 2**30),
        )
        return loaded

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            self._loaded = None
            decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()

    def _submit(self, rows: Sequence[Row]) -> None:
        """Queue the sequences of one call, by the requests that they belong to."""
        decoder = self._running()
        for ticket, group in groupby(rows, key=lambda row: row.ticket):
            decoder.submit(ticket, list(group))

    async def _beside_decoding(self, work: Callable[[], T]) -> T:
        chore = Chore(work)
        self._running().run(chore)
        return await chore.result()

    def _running(self) -> Decoder:
        if self._decoder is None:
            raise EngineError("the engine is closed; build a new one")
        return self._decoder


def _row(model: LoadedModel, request: GenerationRequest, sink: Sink, ticket: int) -> Row:
    from tta_middleware.engines.decoding.row import Row

    prompt, sampling = request.prompt, request.sampling
    model.check_prompt(prompt)
    model.check_length(len(prompt.matrix))
    limit = sampling.max_new_tokens
    if model.context is not None:
        limit = min(limit, model.context - len(prompt.matrix))
    text = model.assembler(prompt, sampling.stop)
    return Row(request, sink, ticket=ticket if request.ticket is None else request.ticket, limit=limit, text=text)
