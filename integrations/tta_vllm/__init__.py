"""vLLM as an engine, in this process or on servers; both decode from prompt embeddings.

TTAChatModel(model="vllm:/models/llama")                                  # in process
TTAChatModel(model="vllm-server:/models/llama@http://a:8000,http://b:8000")  # servers
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_vllm.in_process import VLLMEngine
    from tta_vllm.server import VLLMServerEngine

__all__ = ["VLLMEngine", "VLLMServerEngine"]


def __getattr__(name: str) -> Any:
    if name == "VLLMEngine":
        from tta_vllm.in_process import VLLMEngine

        return VLLMEngine
    if name == "VLLMServerEngine":
        from tta_vllm.server import VLLMServerEngine

        return VLLMServerEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
