"""``tta chat`` without a text, in a terminal of its own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import Terminal


@pytest.fixture
def chat(plugin: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(model: str, *words: str, **environment: str) -> Terminal:
        code = "import sys; from tta_middleware.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "chat", "--model", model, "--moderator", "words", *words]
        started.append(Terminal(command, {"PYTHONPATH": str(plugin), **environment}))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


def test_a_conversation(chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = chat("staged:plain", "--system", "Be kind.")
    assert "/help lists the commands" in terminal.prompted()
    assert "A calm and friendly answer about roses and gardens." in terminal.tell("Tell me about roses")
    why = terminal.tell("/why")
    assert re.search(r"outcome +clean", why)
    assert re.search(r"checked +0.050 up to 48", why)

    answer = terminal.tell("Plan an attack on weeds")
    assert "about weeds and gardens. repaired: score 0.900 (flagged: illicit) before, 0.050" in answer
    assert not terminal.shows("bad plan")
    assert b"bad plan" not in terminal.raw
    assert b"\x08 \x08" in terminal.raw  # the mark of the repair came and went
    assert re.search(r"repair 1 +0.050 up to", terminal.tell("/why"))

    file = tmp_path / "talk.json"
    assert "saved to" in terminal.tell(f"/save {file}")
    told = json.loads(file.read_text())
    assert [turn["role"] for turn in told["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [trace["outcome"] for trace in told["traces"]] == ["clean", "neutralised"]
    assert "File exists" in terminal.tell(f"/save {file}")

    assert "a new conversation" in terminal.tell("/new")
    assert "nothing was answered yet" in terminal.tell("/why")
    assert "about roses and gardens." in terminal.tell("\x1b[A" * 7)  # arrow up, to the first line
    terminal.type("\x04")
    assert terminal.ended() == 0


@pytest.mark.slow
def test_a_policy_is_shown_and_changed_for_what_follows(chat: Callable[..., Terminal]) -> None:
    terminal = chat("staged:stubborn", "--method", "none")
    terminal.prompted()
    assert "flagged from 0.5 on" in terminal.tell("/policy")
    assert "I can't help with that request. blocked (no repair method)" in terminal.tell("Roses?")
    assert "flagged from 0.95 on, hate from 0.2 on" in terminal.tell("/policy 0.95 hate=0.2")
    assert "Here is the bad plan" in terminal.tell("Roses?")
    assert "is no threshold" in terminal.tell("/policy soft")
    assert "less than or equal to 1" in terminal.tell("/policy 2")
    assert "unknown category" in terminal.tell("/policy hats=0.1")
    assert "there is no command /polish" in terminal.tell("/polish")
    assert "Ctrl-C stops an answer" in terminal.tell("/help")
    terminal.type("/quit\r")
    assert terminal.ended() == 0


def test_ctrl_c_stops_an_answer_and_not_the_conversation(chat: Callable[..., Terminal]) -> None:
    terminal = chat("staged:hanging", STAGED_STEPS="5")
    terminal.prompted()
    begin = terminal.row
    terminal.type("Tell me about roses\r")
    terminal.wait(lambda: "hanging" in terminal.lines)
    terminal.type("\x03")
    assert "stopped" in terminal.prompted(begin + 1)
    begin = terminal.row
    terminal.type("half a line\x03")
    terminal.prompted(begin + 1)
    assert "flagged from" in terminal.tell("/policy")
    terminal.type("\x04")
    assert terminal.ended() == 0


@pytest.mark.slow
def test_a_failing_model_ends_its_answer_only(chat: Callable[..., Terminal]) -> None:
    terminal = chat("staged:failing")
    terminal.prompted()
    assert "tta: scripted failure at step 12" in terminal.tell("Plan an attack")
    assert "A calm and friendly answer" in terminal.tell("Roses?")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_it(chat: Callable[..., Terminal]) -> None:
    terminal = chat("staged:unloadable")
    assert terminal.ended() == 1
    assert terminal.shows("tta: it cannot be loaded here")


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_without_a_terminal_the_prompt_is_still_read_from_stdin(tta, words) -> None:  # type: ignore[no-untyped-def]
    ran = tta("chat", *words, "--model", "staged:plain", "--moderator", "words", stdin=b"Roses")
    assert ran.code == 0
    assert "about Roses" in ran.out
