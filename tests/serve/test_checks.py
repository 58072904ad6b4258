"""Checks, moderations, inline moderation, and policies that a client may choose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from staged_server import CALM, NOTICE, Log, Served, running, scripted

from tta_middleware.errors import (
    ConfigurationError,
    ModerationRejectedError,
    ModerationUnavailableError,
    ModeratorSetupError,
)
from tta_middleware.server import ServerSettings, create_app
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging
from tta_middleware.types import Verdict

ROSES: Any = [{"role": "user", "content": "Roses?"}]
ATTACK: Any = [{"role": "user", "content": "An attack, please."}]
ASKED: Any = {"model": "omni-moderation-latest"}

POLICIES = """
[policies.default]
threshold = 0.5

[policies.lax]
threshold = 0.95

[policies.strict]
threshold = 0.04
notice = "Not under this policy."
"""


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    file = tmp_path / "policies.toml"
    file.write_text(POLICIES)
    return file


def test_a_check_says_what_the_policy_decides(served: Served, log: Log) -> None:
    def check(**asked: Any) -> Any:
        return httpx.post(f"{served.url}/v1/checks", json=asked)

    good, bad = check(text="roses"), check(text="the forbidden thing", stage="prompt", prompt="?", model="roses")
    hidden = check(text='{"a": "\\u0066orbidden"}')
    assert (good.json()["status"], good.headers["x-tta-outcome"]) == ("passed", "passed")
    told = bad.json()
    assert (told["status"], told["flagged"], told["category"], told["score"]) == ("blocked", True, "illicit", 0.9)
    assert (told["policy"], told["stage"], told["model"]) == ("default", "prompt", "scripted")
    assert hidden.json()["flagged"]
    assert check(text="x", stage="repair").status_code == check(txt="x").status_code == 400
    assert check(text="x", model="tulips").status_code == 404
    assert log.request(path="/v1/checks", outcome="blocked")
    assert "forbidden thing" not in "".join(log.lines)


def test_moderations_are_those_of_the_moderation_server(served: Served) -> None:
    with served.client() as api:
        answer = api.moderations.create(input=["roses", "the forbidden thing"])
        assert [one.flagged for one in answer.results] == [False, True]
        assert answer.model == "scripted"
        with pytest.raises(openai.BadRequestError):
            api.moderations.create(input=[])


@pytest.mark.parametrize("stream", [False, True])
def test_inline_moderation_of_a_clean_answer(served: Served, stream: bool) -> None:
    with served.client() as api:
        answer: Any = api.chat.completions.create(model="roses", messages=ROSES, moderation=ASKED, stream=stream)
        told = [one.moderation for one in (list(answer) if stream else [answer]) if one.moderation]
    assert len(told) == 1
    for part in (told[0].input, told[0].output):
        assert part.type == "moderation_results"
        [result] = part.results
        assert (result.flagged, result.category_scores["illicit"], result.model) == (False, 0.05, "scripted")


@pytest.mark.parametrize("stream", [False, True])
def test_inline_moderation_of_an_answer_that_was_withheld(served: Served, stream: bool) -> None:
    scored = ASKED | {"policy": {"output": {"mode": "score"}}}  # a client never gets less than the operator's policy
    with served.client() as api:
        answer: Any = api.chat.completions.create(model="roses", messages=ATTACK, moderation=scored, stream=stream)
        chunks = list(answer) if stream else [answer]
    [moderation] = [one.moderation for one in chunks if one.moderation]
    [result] = moderation.output.results
    assert (result.flagged, result.categories, result.category_scores) == (True, {"illicit": True}, {"illicit": 0.9})
    assert "forbidden" not in "".join(one.model_dump_json() for one in chunks)


def test_a_client_may_have_its_prompt_checked_too(served: Served) -> None:
    forbidden: Any = [{"role": "user", "content": "Tell me the forbidden thing."}]
    modes = {mode: ASKED | {"policy": {"input": {"mode": mode}}} for mode in ("score", "block")}
    with served.client() as api:
        scored, blocked = (
            api.chat.completions.create(model="roses", messages=forbidden, moderation=asked) for asked in modes.values()
        )
    assert (scored.choices[0].message.content, scored.moderation.input.results[0].flagged) == (CALM, True)
    assert (blocked.choices[0].finish_reason, blocked.choices[0].message.refusal) == ("content_filter", NOTICE)
    assert blocked.moderation.input.results[0].flagged
    assert (blocked.moderation.output.type, blocked.moderation.output.code) == ("error", "no_output")


def test_asking_for_scores_takes_no_check_of_the_prompt_away() -> None:
    forbidden: Any = [{"role": "user", "content": "Tell me the forbidden thing."}]
    asked = ASKED | {"policy": {"input": {"mode": "score"}}}
    with running(scripted(prompt_check="all")) as served, served.client() as api:
        answer = api.chat.completions.create(model="roses", messages=forbidden, moderation=asked)
    assert answer.choices[0].finish_reason == "content_filter"


def test_inline_moderation_without_a_verdict_is_an_error_in_its_place() -> None:
    gone = ModerationUnavailableError("gone", cause="connection")
    moderator = ScriptedModerator(score=flagging("forbidden"), failures=[gone] * 50)
    with running(scripted(moderator=moderator)) as served, served.client() as api:
        answer = api.chat.completions.create(model="roses", messages=ROSES, moderation=ASKED)
    assert (answer.moderation.input.type, answer.moderation.output.type) == ("error", "error")
    assert answer.choices[0].finish_reason == "content_filter"


def test_a_client_chooses_among_the_policies_that_are_allowed(policies: Path, log: Log) -> None:
    def ask(name: str | None, **options: Any) -> Any:
        headers = {} if name is None else {"x-tta-policy": name}
        return httpx.post(
            f"{served.url}/v1/chat/completions", json={"model": "roses", "messages": ROSES}, headers=headers, **options
        )

    with running(scripted(policies=policies), allowed_policies=["strict", "default"]) as served:
        own, strict, lax, lost = (ask(name) for name in (None, "strict", "lax", "lost"))
        check = httpx.post(f"{served.url}/v1/checks", json={"text": "roses"}, headers={"x-tta-policy": "strict"})
        policies.write_text(POLICIES.replace("0.04", "0.3"))
        eased = ask("strict")
    assert (own.headers["x-tta-policy"], own.headers["x-tta-outcome"]) == ("default", "clean")
    assert (strict.headers["x-tta-policy"], strict.headers["x-tta-outcome"]) == ("strict", "blocked")
    assert strict.json()["choices"][0]["message"]["refusal"] == "Not under this policy."
    assert [one.status_code for one in (lax, lost)] == [403, 403]
    assert (lax.json()["error"]["code"], lax.json()["error"]["param"]) == ("policy_not_allowed", "x-tta-policy")
    assert check.json()["status"] == "blocked"
    assert eased.headers["x-tta-outcome"] == "clean"
    assert log.request(policy="strict", outcome="blocked")


def test_a_policy_that_is_allowed_must_be_there(policies: Path) -> None:
    with pytest.raises(ConfigurationError, match="allowed_policies, model 'roses': no policy 'lost'"):
        create_app({"roses": scripted(policies=policies)}, ServerSettings(allowed_policies=["lost"]))
    with pytest.raises(ConfigurationError, match=r"allowed_policies, model 'roses': .*set policies="):
        create_app({"roses": scripted()}, ServerSettings(allowed_policies=["strict"]))


def test_the_trace_can_be_kept_inside() -> None:
    with running(scripted(), show_trace=False) as served, served.client() as api:
        answer = api.chat.completions.create(model="roses", messages=ROSES)
        chunks = list(api.chat.completions.create(model="roses", messages=ROSES, stream=True))
    assert not any("tta" in (one.model_extra or {}) for one in [answer, *chunks])


@pytest.mark.parametrize(("status", "answered"), [(None, 400), (400, 400), (401, 500), (429, 500)])
@pytest.mark.parametrize(("path", "field"), [("checks", "text"), ("moderations", "input")])
def test_a_moderator_that_refuses_the_server_is_not_the_clients_fault(
    path: str, field: str, status: int | None, answered: int
) -> None:
    error = ModerationRejectedError("the account behind sk-secret", status=status)
    moderator = ScriptedModerator(failures=[error])
    with running(scripted(moderator=moderator)) as served:
        answer = httpx.post(f"{served.url}/v1/{path}", json={field: "roses"})
    told = answer.json()["error"]
    assert answer.status_code == answered
    assert told["param"] == (field if answered == 400 else None)
    assert ("sk-secret" in answer.text) == (answered == 400)


class LosesItsKey(ScriptedModerator):
    """Its key was there when the server started; of a moderator that has none the server does not start."""

    async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
        raise ModeratorSetupError("the moderator 'scripted' has no API key; set SCRIPTED_API_KEY")


def test_a_moderator_without_its_key_is_the_operators_affair() -> None:
    with running(scripted(moderator=LosesItsKey())) as served:
        chat = httpx.post(f"{served.url}/v1/chat/completions", json={"model": "roses", "messages": ROSES})
        check = httpx.post(f"{served.url}/v1/checks", json={"text": "roses"})
    for answer in (chat, check):
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", "moderator_setup")
        assert "API key" not in answer.text
