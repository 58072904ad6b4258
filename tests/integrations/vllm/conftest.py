"""vLLM on the CPU build; the whole folder is skipped where vLLM is not installed (`make test-vllm` installs it)."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
