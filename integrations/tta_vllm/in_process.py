"""vLLM in this process: ``AsyncLLM`` with prompt embeddings."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from tta_middleware.engines.prompt.vocabulary import Vocabulary
from tta_middleware.engines.remote import RemoteEngine, Step, ending
from tta_middleware.errors import ConfigurationError, MissingExtraError
from tta_middleware.types import GenerationRequest


class VLLMEngine(RemoteEngine):
    """vLLM's own continuous batching, paged cache and parallelism, behind the Engine protocol.

    Args:
        model: a short name, a folder or a Hugging Face id.
        device: ``auto``; vLLM picks the device by its build.
        dtype: as vLLM takes it.
        max_batch: most sequences decoded side by side, vLLM's ``max_num_seqs``; by default its own number.
        engine_options: any other ``AsyncEngineArgs`` (``tensor_parallel_size``, ...).

    Raises:
        MissingExtraError: at first use, if vLLM is not installed.
    """

    _forkable = False

    def __init__(
        self,
        model: str = "smollm2",
        *,
        device: str = "auto",
        dtype: str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        allow_download: bool = False,
        max_batch: int | None = None,
        **engine_options: Any,
    ) -> None:
        super().__init__(model, cache_dir=cache_dir, allow_download=allow_download)
        if device != "auto":
            raise ConfigurationError(f"vLLM picks the device by its build; leave device='auto', not {device!r}")
        self.max_batch = max_batch
        bound = {} if max_batch is None else {"max_num_seqs": max_batch}
        self._options = {"dtype": dtype, "disable_log_stats": True, **bound, **engine_options}
        self._llm: Any = None
        self._dtype: Any = None

    @property
    def open_requests(self) -> int:
        """Sequences that vLLM is working on or has queued."""
        return int(self._llm.output_processor.get_num_unfinished_requests()) if self._llm is not None else 0

    def _start(self, folder: str, vocabulary: Vocabulary) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MissingExtraError(
                "vLLM is not installed; it wants an environment of its own (docs/scaling.md)"
            ) from error
        arguments = AsyncEngineArgs(model=folder, enable_prompt_embeds=True, **self._options)

        async def build() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        self._llm = self._own_loop.call(build)
        self._dtype = self._llm.model_config.dtype
        vocabulary.context = int(self._llm.model_config.max_model_len)

    async def _steps(self, request: GenerationRequest) -> AsyncGenerator[Step, None]:
        import torch
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        room = (self._words.context or 2**31) - len(request.prompt.matrix)
        parameters = SamplingParams(
            max_tokens=min(sampling.max_new_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed % 2**63 if sampling.temperature > 0 else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        rows = torch.from_numpy(np.ascontiguousarray(request.prompt.matrix)).to(self._dtype)
        outputs = self._llm.generate({"prompt_embeds": rows}, parameters, request_id=uuid.uuid4().hex)
        async with aclosing(outputs):
            async for output in outputs:
                sequence = output.outputs[0]
                yield list(sequence.token_ids), ending(sequence.finish_reason)

    async def _log_likelihoods(self, token_ids: Sequence[int]) -> list[float]:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": list(token_ids)}
        last = None
        async for output in self._llm.generate(prompt, parameters, request_id=uuid.uuid4().hex):
            last = output.prompt_logprobs or last
        return [0.0 if found is None else found[i].logprob for found, i in zip(last or [], token_ids, strict=True)]

    async def _stop(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
