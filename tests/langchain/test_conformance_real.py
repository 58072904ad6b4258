"""LangChain's conformance suite on a real model that calls tools, where one is at hand.

python scripts/fetch_second_model.py models/
TTA_TOOL_MODEL=models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf pytest tests/langchain/test_conformance_real.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tta_middleware import TTAChatModel
from tta_middleware.assembly import Runtime

MODEL = os.environ.get("TTA_TOOL_MODEL", "")
_RUNTIME = Runtime()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL, reason="TTA_TOOL_MODEL names no model that calls tools"),
]


class TestReal(ChatModelIntegrationTests):
    """Tools and structured output by calls."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return TTAChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "max_new_tokens": 160, "dtype": "float32", "runtime": _RUNTIME}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def model_override_value(self) -> str:
        return MODEL

    @pytest.mark.xfail(reason="Qwen2.5-Coder-0.5B copies the empty schema into the arguments", strict=False)
    def test_tool_calling_with_no_arguments(self, model: BaseChatModel) -> None:
        super().test_tool_calling_with_no_arguments(model)

    @pytest.mark.xfail(reason="Qwen2.5-Coder-0.5B ends a string of the Japanese call too early", strict=False)
    def test_unicode_tool_call_integration(self, model: BaseChatModel) -> None:  # type: ignore[override]
        super().test_unicode_tool_call_integration(model)


class TestRealJson(TestReal):
    """Structured output by instruction."""

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}
