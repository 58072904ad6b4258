"""LangChain's own conformance suites: on the embedded model, and on one that calls tools by a script.

What is skipped, and why:

- ``test_init_from_env``: no setting is read from the environment.
- ``test_serdes``: a chat model holds engines and sockets, so ``is_lc_serializable`` is false.
- image, audio and PDF inputs, Anthropic's blocks: the models are text models.
- the standard parameter ``max_retries``: a local model is not asked again, and a setting without effect is refused.
- ``test_stream_time``: a benchmark of recorded HTTP; nothing here speaks HTTP.
- another model for one call, where the same calls are made with a tool already.
- tools and structured output of the embedded model: its chat template takes no tools, and a model of 135M parameters
  does not write JSON reliably. The scripted model stands in for one that does; everything but the words is real.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from tta_middleware import TTAChatModel
from tta_middleware.assembly import Runtime
from tta_middleware.engines.models import resolve_model
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine

_RUNTIME = Runtime()
_ARGUMENTS = {
    "input": 3,
    "a": 1,
    "b": 2,
    "location": "San Francisco, CA",
    "answer_style": "Pirate",
    "description": "a technology company",
    "setup": "Why did the cat sit on the computer?",
    "punchline": "To keep an eye on the mouse.",
}


def _capable(call: ScriptedCall) -> str:
    """What a model that is good at tools writes: a call of the first tool, its result in words, JSON if asked."""
    tools = _tools(call.conversation)
    if call.prefix or (tools and "<|tool|>" not in call.conversation):
        return _call(tools, call)
    if "JSON object" in call.conversation:
        return json.dumps({key: _ARGUMENTS[key] for key in ("setup", "punchline")})
    return "Hello there, this is the answer."


def _tools(conversation: str) -> dict[str, Any]:
    if not conversation.startswith("<|tools|>"):
        return {}
    found, _ = json.JSONDecoder().raw_decode(conversation.removeprefix("<|tools|>"))
    return {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in found}


def _call(tools: dict[str, Any], call: ScriptedCall) -> str:
    begun, quoted = call.prefix, re.search(r"'(.+?)'", call.text)
    name = next((name for name in tools if f'"{name}"' in begun), next(iter(tools)))
    known = _ARGUMENTS | ({"customer_name": quoted[1]} if quoted else {})
    arguments = {key: known[key] for key in tools[name].get("properties", {})}
    whole = f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'
    assert whole.startswith(begun)
    return whole.removeprefix(begun)


class _Embedded:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return TTAChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2", "dtype": "float32", "runtime": _RUNTIME}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """LangChain's, with few tokens and without ``max_retries``."""
        return {"temperature": 0, "max_tokens": 8, "timeout": 60, "stop": []}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def model_override_value(self) -> str | None:
        return str(resolve_model("smollm2"))


class _Scripted(_Embedded):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": ScriptedEngine(_capable), "runtime": _RUNTIME}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {**super().standard_chat_model_params, "max_tokens": 100}

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestUnit(_Embedded, ChatModelUnitTests):
    pass


@pytest.mark.slow
class TestIntegration(_Embedded, ChatModelIntegrationTests):
    pass


class TestToolsUnit(_Scripted, ChatModelUnitTests):
    pass


class TestToolsIntegration(_Scripted, ChatModelIntegrationTests):
    @property
    def model_override_value(self) -> str | None:
        """Calls of another model load it, and are asked of the class below."""


@pytest.mark.slow
class TestToolsIntegrationOfTwoModels(_Scripted, ChatModelIntegrationTests):
    pass


class TestJsonIntegration(_Scripted, ChatModelIntegrationTests):
    """Structured output by instruction instead of by a tool."""

    @property
    def model_override_value(self) -> str | None:
        """As above."""

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "json_schema"}
