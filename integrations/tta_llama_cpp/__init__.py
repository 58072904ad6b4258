"""llama.cpp as an engine: GGUF files on a processor, as they are, from prompt embeddings.

TTAChatModel(model="llama-cpp:smollm2")
TTAChatModel(model="llama-cpp:/models/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta_llama_cpp.engine import LlamaCppEngine

__all__ = ["LlamaCppEngine"]


def __getattr__(name: str) -> Any:
    if name == "LlamaCppEngine":
        from tta_llama_cpp.engine import LlamaCppEngine

        return LlamaCppEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
