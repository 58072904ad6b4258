"""llama.cpp in this process, behind the Engine protocol."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path

import torch
import transformers

from tta_llama_cpp.batch import Batch
from tta_llama_cpp.library import library
from tta_llama_cpp.model import LlamaModel, embedding_table
from tta_middleware.config import check_count
from tta_middleware.engines.conversion import converted_tokenizer
from tta_middleware.engines.models import located_gguf
from tta_middleware.engines.prompt.template import chat_template
from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.engines.remote import RemoteEngine, Step
from tta_middleware.engines.torch_import import quiet_transformers
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.types import GenerationRequest, PromptEmbeddings

_SCALED_FAMILIES = ("gemma", "gemma2", "gemma3")


class LlamaCppEngine(RemoteEngine):
    """A GGUF file as it is: quantised weights on a processor, several sequences side by side.

    Prompts are embeddings of the file's own table, in float32; answers go on token by token.

    Args:
        model: ``smollm2`` or a ``.gguf`` file.
        device: ``auto`` or ``cpu``.
        dtype: ``auto``; the file says what its weights are.
        cache_dir: where the file's tokenizer is kept in a form that loads fast.
        allow_download: taken for the sake of other engines; nothing is downloaded.
        max_batch: most sequences decoded side by side; further ones wait their turn.
        context: most tokens of a sequence, its prompt included. Keys and values for ``max_batch + 1`` of them are set
            aside, the last for scores.
        threads: how many llama.cpp uses; by default one for each core that this process may use.

    Raises:
        MissingExtraError: at first use, if xllamacpp is not installed.
    """

    _what = "llama.cpp"
    _forkable = False

    def __init__(
        self,
        model: str = "smollm2",
        *,
        device: str = "auto",
        dtype: str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        allow_download: bool = False,
        max_batch: int = 8,
        context: int = 2048,
        threads: int | None = None,
    ) -> None:
        super().__init__(model, cache_dir=cache_dir, allow_download=allow_download)
        if device not in ("auto", "cpu") or dtype != "auto":
            raise ConfigurationError(
                "llama.cpp runs on the processor in the file's own types; leave device and dtype out"
            )
        for name, number in (("max_batch", max_batch), ("context", context), ("threads", threads)):
            check_count(name, number)
        self.max_batch = max_batch
        self._tokens, self._threads = context, threads
        self._model: LlamaModel | None = None
        self._batch: Batch | None = None
        self._passes: Future[None] | None = None

    def free_places(self) -> int:
        """How many more sequences would be decoded at once if they came now."""
        return self.max_batch if self._batch is None else self._batch.free

    async def mean_nll(self, prompt: PromptEmbeddings, completions: Sequence[Sequence[int]]) -> list[float]:
        """Mean negative log-likelihood in nats per token of each completion after ``prompt``; NaN if empty.

        The prompt runs once for all of them.
        """
        await self._ready()
        self._check_tokens(prompt, completions)
        found: list[list[float]] = await self._on_own_loop(self._running_batch.scores, prompt.matrix, completions)
        return [-sum(likely) / len(likely) if likely else math.nan for likely in found]

    async def next_token_logprobs(
        self,
        prompts: Sequence[PromptEmbeddings],
        token_ids: Sequence[int],
        *,
        shared: int = 0,
        owner: int | None = None,
    ) -> list[list[float]]:
        """Per prompt, the log-probability in nats of each of ``token_ids`` as the next token.

        One prompt after the other. What a prompt begins with does not run again if the one before it began so, too;
        ``shared`` and ``owner`` are not needed for that.

        Raises:
            EmbeddingShapeError: a prompt is not as wide as the model's embeddings.
            EngineError: the model failed, or a prompt is longer than ``context``.
        """
        await self._ready()
        self._words.check_ids(token_ids)
        for prompt in prompts:
            self._check_tokens(prompt)
        rows = [prompt.matrix for prompt in prompts]
        found: list[list[float]] = await self._on_own_loop(self._running_batch.following, rows, list(token_ids))
        return found

    async def chat_template(self) -> str:
        """The text of the model's chat template.

        Raises:
            ConfigurationError: it has none.
        """
        return chat_template((await self._ready()).tokenizer)

    def _found(self) -> tuple[Path, Vocabulary]:
        library()
        gguf, folder = located_gguf(self.model_id, cache_dir=self._cache_dir)
        kept = converted_tokenizer(gguf, folder)
        with quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(kept), local_files_only=True)
        model = LlamaModel(gguf, sequences=self.max_batch + 1, context=self._tokens, threads=self._threads)
        try:
            table = torch.from_numpy(embedding_table(gguf, model.tokens, model.width))
            embedding: torch.nn.Module = torch.nn.Embedding.from_pretrained(table)  # type: ignore[no-untyped-call]
            vocabulary = Vocabulary(tokenizer, embedding, model.endings(), model.context)
        except BaseException:
            model.close()
            raise
        if model.architecture in _SCALED_FAMILIES:
            vocabulary.family_scale = model.width**0.5
        self._model = model
        return gguf, vocabulary

    def _start(self, folder: str, vocabulary: Vocabulary) -> None:
        assert self._model is not None
        self._batch = Batch(self._model, self.max_batch, vocabulary.eos_ids)
        self._passes = self._own_loop.start_task_soon(self._batch.run)

    async def _steps(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        async with aclosing(self._running_batch.steps(request)) as steps:
            async for step in steps:
                yield step

    async def _log_likelihoods(self, token_ids: Sequence[int]) -> list[float]:
        rows = self._words.rows(token_ids[:1])
        [found] = await self._running_batch.scores(rows, [token_ids[1:]])
        return [0.0, *found]

    async def _stop(self) -> None:
        """On the loop that decodes, so no pass is under way."""
        if self._passes is not None:
            self._passes.cancel()
        if self._batch is not None:
            self._batch.close()
        if self._model is not None:
            self._model.close()
            self._model = None

    @property
    def _running_batch(self) -> Batch:
        if self._batch is None:
            raise EngineError("the engine is closed; build a new one")
        return self._batch
