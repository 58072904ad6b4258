"""What a key may do: policies, models, places; enforced keys and policies that only observe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from staged_server import BAD, CALM, NOTICE, Log, Served, running, scripted
from staged_upstream import saying, upstream

from tta_middleware.errors import ConfigurationError
from tta_middleware.http_api import ApiError
from tta_middleware.policy import Policy
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.server.gate import Shares
from tta_middleware.server.keys import Caller, KeyFile, Keys, Rights

POLICIES = """
[policies.default]
threshold = 0.5
[policies.mild]
threshold = 0.95
[policies.strict]
threshold = 0.01
[policies.seen]
threshold = 0.5
mode = "observe"
"""
KEYS = """
free sk-free
alice sk-alice policy=strict allow=strict allow=mild model=roses max_tokens=5
bob sk-bob policy=mild concurrency=1
carol sk-carol enforced
dave sk-dave policy=seen
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("policies") / "policies.toml"
    file.write_text(POLICIES)
    models = {"tulips": scripted(policies=file), "roses": scripted(policies=file)}
    with running(models, keys=KEYS, allowed_policies=("mild", "seen")) as one:
        yield one


def ask(served: Served, who: str, text: str = "Roses?", policy: str = "", **more: Any) -> httpx.Response:
    body = {"model": "roses", "messages": [{"role": "user", "content": text}]} | more
    headers = {"authorization": f"Bearer sk-{who}"} | ({"x-tta-policy": policy} if policy else {})
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize(
    ("who", "policy", "expected"),
    [
        ("free", "", "default"),
        ("free", "mild", "mild"),
        ("free", "strict", 403),
        ("alice", "", "strict"),
        ("alice", "mild", "mild"),
        ("alice", "seen", 403),
        ("bob", "", "mild"),
        ("bob", "mild", "mild"),
        ("bob", "seen", 403),
        ("carol", "seen", 403),
        ("dave", "", "seen"),
    ],
)
def test_the_policy_is_the_keys_and_so_is_the_choice(guarded: Served, who: str, policy: str, expected: Any) -> None:
    answer = ask(guarded, who, policy=policy)
    found = answer.headers["x-tta-policy"] if answer.status_code == 200 else answer.status_code
    assert found == expected
    assert ("x-tta-mode" in answer.headers) == (expected == "seen")


def test_models_and_tokens_are_the_keys(guarded: Served) -> None:
    headers = {"authorization": "Bearer sk-alice"}
    listed = httpx.get(f"{guarded.url}/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == ["roses"]
    assert ask(guarded, "alice", model="tulips").status_code == 404
    assert ask(guarded, "free", model="tulips").status_code == 200
    assert ask(guarded, "alice", max_tokens=6).status_code == 400
    assert ask(guarded, "free", max_tokens=6).status_code == 200
    check = httpx.post(f"{guarded.url}/v1/checks", json={"text": "roses"}, headers=headers).json()
    assert (check["status"], check["policy"]) == ("blocked", "strict")


def test_a_key_has_its_share_of_places() -> None:
    shares, bob, free = Shares(3), Caller("bob", Rights(concurrency=1)), Caller("free")
    for _ in range(2):
        with shares.hold(bob), shares.hold(free), shares.hold(free):
            with pytest.raises(ApiError) as found, shares.hold(bob):
                pass
            assert (found.value.status, (found.value.headers or {})["retry-after"]) == (429, "3")


def test_what_is_observed_leaves_and_says_so(guarded: Served, log: Log) -> None:
    answer = ask(guarded, "dave", "An attack, please.")
    told = answer.json()
    assert told["choices"][0]["message"]["content"] == BAD
    assert (answer.headers["x-tta-mode"], told["tta"]["mode"], told["tta"]["observed"]) == (
        "observe", "observe", ["output: illicit"]
    )  # fmt: skip
    streamed = ask(guarded, "dave", "An attack, please.", stream=True)
    assert streamed.headers["x-tta-mode"] == "observe"
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert "content_filter" not in streamed.text
    assert log.request(key="dave", mode="observe")
    enforced = ask(guarded, "free", "An attack, please.")
    assert enforced.json()["choices"][0]["message"]["content"] == NOTICE


def test_a_check_says_what_it_observes(guarded: Served) -> None:
    headers = {"authorization": "Bearer sk-dave"}
    answer = httpx.post(f"{guarded.url}/v1/checks", json={"text": "forbidden"}, headers=headers)
    told = answer.json()
    assert (told["status"], told["flagged"], told["observed"], told["mode"]) == ("passed", False, True, "observe")
    assert answer.headers["x-tta-mode"] == "observe"


def test_an_upstream_is_observed_as_well() -> None:
    with upstream(saying(BAD)) as behind, running({"far": behind.model(policy=Policy(mode="observe"))}) as served:
        for stream in (False, True):
            answer = ask(served, "any", model="far", stream=stream)
            assert "forbidden" in answer.text
            assert answer.headers["x-tta-mode"] == "observe"
            assert '"observed":["output: illicit"]' in answer.text


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("a sk policy=none", "none"),
        ("a sk allow=none", "none"),
        ("a sk model=none", "none"),
        ("a sk enforced policy=seen", "enforced"),
    ],
)
def test_keys_that_cannot_be_kept_are_refused_at_the_start(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "policies.toml"
    file.write_text(POLICIES)
    with pytest.raises(ConfigurationError, match=why):
        create_app({"roses": scripted(policies=file)}, keys=Keys.parse(line))


def test_an_enforced_key_and_a_model_that_observes() -> None:
    with pytest.raises(ConfigurationError, match="enforced"):
        create_app({"roses": scripted(policy=Policy(mode="observe"))}, keys=Keys.parse("a sk enforced"))


def test_rights_may_stand_in_the_servers_settings() -> None:
    settings = ServerSettings(keys={"alice": {"models": ["roses"], "enforced": True}})
    keys = Keys.parse("alice sk-one").with_rights(settings.keys)
    assert keys.caller({"authorization": "Bearer sk-one"}).rights == Rights(models=("roses",), enforced=True)
    for text in ("bob sk-one", "alice sk-one enforced"):
        with pytest.raises(ConfigurationError, match="alice"):
            Keys.parse(text).with_rights(settings.keys)


def test_a_key_that_is_bound_to_nothing_later_is_told_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("alice sk-one\nbob sk-two\n")
    with running(keys=KeyFile(file)) as served:
        assert ask(served, "two").status_code == 200
        file.write_text("alice sk-one model=rosse\n")
        os.utime(file, (1, 1))
        assert ask(served, "two").status_code == 401
        assert ask(served, "one").status_code == 404
    assert "keys: key 'alice': no model 'rosse' is served" in caplog.text


def test_keys_are_read_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("alice sk-one\n")
    keys = KeyFile(file, {"alice": Rights(concurrency=2)})
    with running(keys=keys) as served:
        assert ask(served, "one").status_code == 200
        assert ask(served, "two").status_code == 401
        file.write_text("bob sk-two\n")
        os.utime(file, (1, 1))
        assert ask(served, "one").status_code == 401
        assert ask(served, "two").json()["choices"][0]["message"]["content"] == CALM
        file.write_text("\n")
        assert ask(served, "two").status_code == 200
    assert "last good ones stay in force" in caplog.text
    file.write_text("bob sk-two\n")
    with pytest.raises(ConfigurationError, match=r"nobody.*write 'nobody KEY'"):
        KeyFile(file, {"nobody": Rights()})
