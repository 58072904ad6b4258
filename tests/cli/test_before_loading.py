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


@pytest.mark.parametrize("command", ["serve", pytest.param("serve-moderation", marks=pytest.mark.slow)])
def test_a_server_whose_moderator_has_no_key_does_not_start(tta_process, monkeypatch, command):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    models = ("--model", "a=settable:a") if command == "serve" else ()
    process = tta_process(command, *models, "--moderator", "openai", "--port", "0")
    said = process.communicate()[1].decode()
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("tta: no API key for the OpenAI API: set OPENAI_API_KEY")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('model = "settable:a"\ntreshold = 0.3', "model 'small': TTAChatModel has no setting 'treshold'; known are "),
        ('model = "settable:a"\ntemperature = "hot"', "model 'small'.temperature: Input should be a valid number"),
        (
            'model = "settable:a"\npolicy = {treshold = 0.3}',
            "no setting 'treshold'; did you mean 'threshold'?",
        ),
        ('model = "settable:a"\nengine_options = "sk-secret"', "model 'small'.engine_options: Input should be a valid"),
        (
            'upstream = "http://127.0.0.1:1/v1"\ntemperature = 0.3',
            "temperature: unknown setting; known are ",
        ),
        ('model = "settable:a"\n[keys.alice]\nmodels = "small"', "Rights.models: give a list"),
    ],
)
def test_a_mistake_in_a_settings_file_is_told_in_words_of_ours(tta, tmp_path, table, said):
    config = tmp_path / "server.toml"
    config.write_text(f'[models.small]\nmoderator = "words"\n{table}\n')
    ran = tta("serve", "--config", config, "--port", "0")
    assert (ran.code, said in ran.err) == (2, True), ran.err
    assert not [word for word in ("pydantic", "input_value", "sk-secret", "validation error") if word in ran.err]
