"""The playground's page and what it is told; test_playground_browser.py uses it in a browser."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from staged_server import running, scripted
from starlette.applications import Starlette
from starlette.routing import Mount

from tta_middleware.policy import Policy
from tta_middleware.server import create_app
from tta_middleware.server.settings import ServerSettings, read_server_file
from tta_middleware.server.upstream import UpstreamModel, UpstreamSettings
from tta_middleware.testing.scripted_moderator import ScriptedModerator

PAGE = files("tta_middleware.server").joinpath("page")
NAMES = sorted(part.name for part in PAGE.iterdir())
SCRIPTS = [name for name in NAMES if name.endswith(".js")]


def client(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("at", ["/", "/ai/"])
async def test_every_part_of_the_page_is_served_from_beside_it(at: str) -> None:
    app = create_app({"roses": scripted()})
    async with client(app if at == "/" else Starlette(routes=[Mount("/ai", app)])) as http:
        page = await http.get(at)
        linked = re.findall(r'(?:src|href)="(?!#)([^"]+)"', page.text)
        parts = [await http.get(f"{at}{link}") for link in linked]
        imported = [await http.get(f"{at}playground/{name}") for name in SCRIPTS]
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert {part.status_code for part in [page, *parts, *imported]} == {200}
    assert all("nosniff" in part.headers["x-content-type-options"] for part in parts)


async def test_the_page_may_load_and_reach_nothing_else() -> None:
    async with client(create_app({"roses": scripted()})) as http:
        policy = (await http.get("/")).headers["content-security-policy"]
        for lost in ("/playground/index.html", "/playground/nothing.js", "/playground/..%2Fapp.py", "/playground/"):
            assert (await http.get(lost)).status_code == 404
    assert "unsafe" not in policy
    assert "*" not in policy
    for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "trusted-types 'none'"):
        assert rule in policy


@pytest.mark.parametrize("name", NAMES)
def test_no_part_makes_markup_of_text_or_names_another_host(name: str) -> None:
    text = PAGE.joinpath(name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|sessionStorage", text
    )
    assert not re.findall(r"https?:|//[\w-]+\.\w| on\w+=|style=\"", text)


async def test_it_can_be_switched_off(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('playground = false\n[models.a]\nmodel = "smollm2"\n')
    assert read_server_file(file)[0].playground is False
    async with client(create_app({"roses": scripted()}, ServerSettings(playground=False))) as http:
        for path in ("/", "/playground/app.js", "/playground/models"):
            assert (await http.get(path)).status_code == 404


async def test_it_is_told_how_far_each_policy_may_be_lowered(tmp_path: Path) -> None:
    policies = tmp_path / "policies.toml"
    policies.write_text("[policies.default]\nthreshold = 0.4\n[policies.children]\nthreshold = 0.1\n")
    model = scripted(policies=policies, prompt_check="user", max_new_tokens=90)
    settings = ServerSettings(allowed_policies=("children",), limits={"max_tokens": 50})
    async with client(create_app({"roses": model}, settings)) as http:
        [told] = (await http.get("/playground/models")).json()["models"]
    assert (told["name"], told["prompt_check"], told["most_tokens"]) == ("roses", "user", 50)
    assert [(policy["name"], policy["threshold"]) for policy in told["policies"]] == [
        ("default", 0.4),
        ("children", 0.1),
    ]
    assert told["policies"][0]["limits"]["violence"] == 0.4


async def test_shadow_categories_have_no_slider_and_their_own_thresholds_are_told() -> None:
    policy = Policy(threshold=0.4, categories={"violence": 0.2}, shadow=("hate",))
    async with client(create_app({"roses": scripted(policy=policy)})) as http:
        [told] = (await http.get("/playground/models")).json()["models"]
    limits = told["policies"][0]["limits"]
    assert limits["violence"] == 0.2
    assert "hate" not in limits


async def test_an_upstream_has_limits_and_no_settings_of_its_own() -> None:
    behind = UpstreamModel(UpstreamSettings(upstream="http://127.0.0.1:9/v1", moderator=ScriptedModerator()))
    async with client(create_app({"far": behind})) as http:
        [told] = (await http.get("/playground/models")).json()["models"]
    assert (told["temperature"], told["max_new_tokens"]) == (None, None)
    assert told["policies"][0]["threshold"] == 0.5


async def test_without_traces_it_is_told_no_thresholds() -> None:
    async with client(create_app({"roses": scripted()}, ServerSettings(show_trace=False))) as http:
        [told] = (await http.get("/playground/models")).json()["models"]
    assert told["policies"] == [{"name": "default", "threshold": None, "limits": {}}]


def test_the_page_needs_no_key_and_what_it_asks_for_does() -> None:
    with running(scripted(), keys="sk-one") as served:
        assert httpx.get(f"{served.url}/").is_success
        refused = httpx.get(f"{served.url}/playground/models")
        told = httpx.get(f"{served.url}/playground/models", headers={"authorization": "Bearer sk-one"})
    assert refused.status_code == 401
    assert "roses" not in refused.text
    assert told.json()["models"][0]["name"] == "roses"
