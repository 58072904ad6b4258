"""LangChain's own conformance suites on the embedded model."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from tta_middleware import TTAChatModel
from tta_middleware.chat_model.runtime import Runtime

_RUNTIME = Runtime()


class _Settings:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return TTAChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2", "max_new_tokens": 8, "dtype": "float32", "runtime": _RUNTIME}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestUnit(_Settings, ChatModelUnitTests):
    pass


class TestIntegration(_Settings, ChatModelIntegrationTests):
    pass
