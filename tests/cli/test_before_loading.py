"""What can be known to be wrong is told before a model is loaded, which may take minutes."""

from __future__ import annotations

import socket

import pytest

UNLOADABLE = ("--model", "settable:unloadable")
UNSCORED = '{"categories": {"privacy": 0.3}}'


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("batch", "missing.jsonl", "out.jsonl"), "no such file: missing.jsonl"),
        (("batch", ".", "out.jsonl"), ". is a folder"),
        (("chat", "Hello", "--method", "rase"), "unknown method 'rase'"),
        (("chat", "Hello", "--moderator", "opnai"), "unknown moderator 'opnai'"),
        (("chat", "Hello", "--moderator", "openai"), "set OPENAI_API_KEY"),
        (("chat", "Hello", "--moderator", "local", "--policy", UNSCORED), "'local' does not score"),
        (("bench", "--quick", "--method", "rase"), "unknown method 'rase'"),
    ],
)
def test_what_is_wrong_is_told_first(tta, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ran = tta(*words, *UNLOADABLE)
    assert (ran.code, said in ran.err) == (2, True), ran.err


def test_an_address_that_cannot_be_listened_on(tta):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = tta("serve", "--model", "a=settable:unloadable", "--moderator", "words", "--port", port)
    assert (ran.code, f"cannot listen on 127.0.0.1:{port}" in ran.err) == (2, True)


@pytest.mark.parametrize("command", ["serve", "serve-moderation"])
def test_a_server_whose_moderator_has_no_key_does_not_start(tta_process, monkeypatch, command):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    models = ("--model", "a=settable:a") if command == "serve" else ()
    process = tta_process(command, *models, "--moderator", "openai", "--port", "0")
    said = process.communicate()[1].decode()
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("tta: no API key for the OpenAI API: set OPENAI_API_KEY")
    assert "Traceback" not in said
