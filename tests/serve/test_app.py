"""The application by itself: in another one, without a start, from a settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from staged_server import CALM, scripted
from starlette.applications import Starlette
from starlette.routing import Mount

from tta_middleware.errors import ConfigurationError
from tta_middleware.server import create_app
from tta_middleware.server.settings import read_server_file
from tta_middleware.testing.scripted_engine import ScriptedEngine

BODY: Any = {"model": "roses", "messages": [{"role": "user", "content": "Roses?"}]}


def client(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_mounted_in_another_application() -> None:
    app = create_app({"roses": scripted()})
    outer = Starlette(routes=[Mount("/ai", app)], lifespan=lambda _: app.router.lifespan_context(app))
    async with client(outer) as http:
        waiting = await http.get("/ai/ready")
        async with outer.router.lifespan_context(outer):
            ready = await http.get("/ai/ready")
            answer = await http.post("/ai/v1/chat/completions", json=BODY)
    assert (waiting.status_code, ready.status_code) == (503, 200)
    assert answer.json()["choices"][0]["message"]["content"] == CALM


async def test_without_a_start_the_model_is_loaded_at_its_first_request() -> None:
    async with client(create_app({"roses": scripted(engine=ScriptedEngine(CALM, load_seconds=0.001))})) as http:
        assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await http.post("/v1/chat/completions", json=BODY)).status_code == 200


def test_a_settings_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        """
        allowed_policies = ["calm"]
        show_trace = false
        [limits]
        concurrency = 3
        [models.small]
        model = "smollm2"
        temperature = 0.5
        [models.other]
        model = "smollm2"
        moderator = "local"
        """
    )
    settings, models = read_server_file(file)
    assert (settings.limits.concurrency, settings.allowed_policies, settings.show_trace) == (3, ("calm",), False)
    assert (models["small"].temperature, list(models)) == (0.5, ["small", "other"])
    assert models["small"].runtime is models["other"].runtime


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[limit]\n", "did you mean 'limits'"),
        ("[limits]\nqueues = 1\n", "did you mean 'queue'"),
        ("[models.a]\ntemprature = 1\n", "model 'a'"),
        ("[models.a]\nupstream_model = 'b'\n", "model 'a': upstream_model is for a model of another server"),
        ("models = 3\n", "tables"),
        ("x = \n", "not valid TOML"),
    ],
)
def test_a_settings_file_with_a_mistake(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        read_server_file(file)


def test_a_server_needs_a_model() -> None:
    with pytest.raises(ConfigurationError, match="at least one model"):
        create_app({})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": {"small": "smollm2"}}, "model 'small': a served model is a TTAChatModel .* str is neither"),
        ({"models": {"raw": FakeListChatModel(responses=["Hello."])}}, "FakeListChatModel is neither"),
        ({"models": scripted()}, "models are by name"),
        ({"settings": {"limits": {}}}, "settings are ServerSettings"),
        ({"keys": "sk-one"}, "keys are Keys.parse"),
    ],
)
def test_what_cannot_be_served_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        create_app(**{"models": {"small": scripted()}} | given)
