"""A quiet call is heard by nobody, and the names that this takes are where they were."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler, dispatch_custom_event
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.context import _configure_hooks, register_configure_hook
from langgraph._internal._constants import CONFIG_KEY_CHECKPOINTER, CONFIG_KEY_STREAM
from tta_langchain_agents import GuardedChatModel, TTAMiddleware
from tta_langchain_agents.testing import ScriptedChatModel

from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import Verdict

sys.path.insert(0, str(Path(__file__).parent))
from staged_agent import BAD, HELLO, call, look_up_or_worse

PRIVATE = [
    ("langchain_core.tracers.context", "_configure_hooks", list),
    ("langchain_core.tracers.context", "tracing_v2_callback_var", ContextVar),
    ("langgraph.pregel._tools", "_tool_call_writer", ContextVar),
]


@pytest.mark.parametrize(("module", "name", "kind"), PRIVATE, ids=[name for _, name, _ in PRIVATE])
def test_what_no_public_name_stands_for_is_still_there(module: str, name: str, kind: type) -> None:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        found = None
    assert isinstance(found, kind), (
        f"{module}.{name} is gone or has changed; tta_langchain_agents.quiet needs it so that nobody hears what was "
        "not checked: find out where LangChain keeps it now, or whether there is a public way by now"
    )


def test_the_settings_of_a_run_have_their_names() -> None:
    assert (CONFIG_KEY_STREAM, CONFIG_KEY_CHECKPOINTER) == ("__pregel_stream", "__pregel_checkpointer"), (
        "LangGraph calls them something else now: see tta_middleware.chat_model.quiet"
    )


def test_a_hook_is_a_variable_and_three_more_things() -> None:
    assert all(isinstance(hook[0], ContextVar) and len(hook) == 4 for hook in _configure_hooks), (
        "hooks have a new form: see tta_langchain_agents.quiet and langchain_core's register_configure_hook"
    )


HEARD: list[str] = []


class Hears(BaseCallbackHandler):
    """Made by LangChain itself wherever a setting of the environment asks for it."""

    def on_llm_end(self, response: Any, **kwargs: Any) -> None:
        HEARD.append(response.generations[0][0].text)

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        HEARD.append(token)


@pytest.fixture
def hook() -> Iterator[ContextVar[Any]]:
    variable: ContextVar[Any] = ContextVar("heard", default=None)
    register_configure_hook(variable, True, Hears, "HEARS_EVERYTHING")
    HEARD.clear()
    yield variable
    del _configure_hooks[-1]


@pytest.mark.parametrize("by", ["environment", "variable"])
async def test_an_observer_by_hook_hears_what_was_checked(
    hook: ContextVar[Any], by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "environment":
        monkeypatch.setenv("HEARS_EVERYTHING", "true")
    else:
        hook.set(Hears())
    model = GuardedChatModel(inner=ScriptedChatModel(answers=["This is flagme."]), moderator=ScriptedModerator())
    await model.ainvoke("hello")
    model.invoke("hello")
    assert [chunk async for chunk in model.astream("hello")]
    assert HEARD
    assert "flagme" not in "".join(HEARD)


class AsksAModel(ScriptedModerator):
    """A moderator that has a chat model read each text."""

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        for text in texts:
            await ScriptedChatModel(answers=["I have read flagme"]).ainvoke(f"Is this fine? {text}")
        return await super().moderate(texts, prompt=prompt)


@pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainBetaWarning")
@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
async def test_a_moderator_that_asks_a_model_is_not_heard(watched: Any, surface: Any) -> None:
    run = watched([call(), BAD], tools=[look_up_or_worse], middleware=[TTAMiddleware(AsksAModel(), check_prompt=True)])
    await surface(run, HELLO)
    assert not run.leaks()
    assert not run.leaks("I have read")


class SendsEvents(ScriptedChatModel):
    """A model that tells of its progress."""

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        dispatch_custom_event("progress", {"of": BAD})
        return super()._generate(*args, **kwargs)

    def _stream(self, *args: Any, **kwargs: Any) -> Any:
        dispatch_custom_event("progress", {"of": BAD})
        yield from super()._stream(*args, **kwargs)


async def test_a_model_that_sends_events_is_heard_by_nobody_and_fails_no_more_than_alone() -> None:
    model = GuardedChatModel(inner=SendsEvents(answers=["fine"]), moderator=ScriptedModerator())
    chain = RunnableLambda(lambda given: given) | model
    assert chain.invoke("hello").text == (await chain.ainvoke("hello")).text == "fine"
    heard = [event async for event in chain.astream_events("hello", version="v2")]
    assert "fine" in repr(heard)
    assert "flagme" not in repr(heard)
