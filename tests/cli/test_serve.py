import contextlib
import http.client
import json
import re
import signal
import sys
import urllib.request

import pytest


def refused_socket(address):
    """A WebSocket, as clients of realtime APIs open one that cannot send a header, is refused; gives the status."""
    host, port = address.removeprefix(b"http://").decode().split(":")
    line = http.client.HTTPConnection(host, int(port))
    headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    line.request("GET", "/v1/realtime?api_key=sk-typed", headers=headers | {"Sec-WebSocket-Key": "c" * 22 + "=="})
    with line.getresponse() as answer:
        answer.read()
    line.close()
    return answer.status


def test_the_server_answers_and_ends_on_an_interrupt(tta_process):
    process = tta_process("serve-moderation", "--port", "0")
    address = next(found for line in process.stderr if (found := re.search(rb"http://127\.0\.0\.1:\d+", line)))
    body = json.dumps({"input": ["Water the tomatoes.", "Hello"]}).encode()
    request = urllib.request.Request(
        f"{address[0].decode()}/v1/moderations", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        results = json.load(response)["results"]
    assert [result["flagged"] for result in results] == [False, False]
    assert refused_socket(address[0]) == 404
    process.send_signal(signal.SIGINT)
    assert b"sk-typed" not in b"".join(process.communicate())
    assert process.returncode == 0


def test_guarded_models_are_served_until_sigterm(tta_process, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("alice sk-one\n")
    process = tta_process(
        "serve", "--model", "calm=settable:a", "--moderator", "words", "--port", "0", "--api-keys", keys,
        "--metrics-open",
    )  # fmt: skip
    address = next(found for line in process.stderr if (found := re.search(rb"http://127\.0\.0\.1:\d+", line)))
    body = json.dumps({"model": "calm", "messages": [{"role": "user", "content": "Tell me of roses"}]}).encode()
    request = urllib.request.Request(
        f"{address[0].decode()}/v1/chat/completions",
        data=body,
        headers={"Content-Type": "application/json", "Authorization": "Bearer sk-one"},
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    assert answer["choices"][0]["message"]["content"] == "A calm and friendly answer about roses and gardens."
    with urllib.request.urlopen(f"{address[0].decode()}/metrics") as page:
        assert b'gen_ai_request_model="calm"' in page.read()
    assert refused_socket(address[0]) == 404
    process.send_signal(signal.SIGTERM)
    lines = [json.loads(line) for line in process.communicate()[1].splitlines() if line.startswith(b"{")]
    assert process.returncode in (0, -signal.SIGTERM)
    [told] = [line for line in lines if line["message"] == "request" and line["path"].startswith("/v1/chat")]
    assert (told["key"], told["outcome"], told["status"]) == ("alice", "clean", 200)
    assert not any(word in str(lines) for word in ("roses", "sk-one", "sk-typed"))


@pytest.mark.parametrize(
    "options",
    [
        ("--config", "--threshold", "0.1"),
        ("--config", "--threshold", "0"),
        ("--config", "--observe"),
        ("--config", "--prompt-check", "all"),
        ("--config", "--moderator", "openai"),
        ("--config", "--policies", "policies.toml"),
        ("--config", "--upstream-model", "llama"),
        ("--model", "smollm2", "--hand-over", "smollm2"),
        ("--upstream", "http://far/v1", "--max-new-tokens", "20"),
        ("--upstream", "http://far/v1", "--engine-option", "path=plain"),
    ],
)
def test_an_option_that_goes_to_no_model_is_refused(tta, tmp_path, options):
    config = tmp_path / "server.toml"
    config.write_text('[models.own]\nmodel = "smollm2"\n')
    ran = tta("serve", "--port", "0", *(word for given in options for word in _with_file(given, config)))
    assert (ran.code, "is of no use to those that are served" in ran.err) == (2, True)


def _with_file(option, config):
    return (option, config) if option == "--config" else (option,)


def test_serving_a_model_that_is_none(tta, tmp_path):
    assert tta("serve", "--model", "a=").code == 2
    assert tta("serve", "--model", "a=smollm2", "--model", "a=smollm2").code == 2
    assert tta("serve", "--config", tmp_path / "missing.toml").code == 2
    assert tta("serve", "--upstream", "far=ftp://far/v1", "--port", "0").code == 2
    assert tta("serve", "--observe", "--policies", tmp_path / "policies.toml", "--port", "0").code == 2
    assert tta("serve", "--upstream", "http://far/v1", "--hand-over", "nobody", "--port", "0").code == 2
    ran = tta("serve", "--allow-policy", "strict", "--port", "0")
    assert (ran.code, "policies=" in ran.err) == (2, True)


def test_a_model_that_cannot_be_loaded_is_told_in_a_line(tta_process):
    process = tta_process("serve", "--model", "a=settable:unloadable", "--moderator", "words", "--port", "0")
    lines = process.communicate()[1].decode().splitlines()
    assert process.returncode == 1
    assert lines[-1] == "tta: it cannot be loaded here"


def test_telemetry_without_its_extra_names_the_command(tta, monkeypatch):
    monkeypatch.setitem(sys.modules, "tta_middleware.telemetry.otel", None)
    ran = tta("serve", "--model", "calm=settable:a", "--moderator", "words", "--port", "0", "--telemetry")
    assert (ran.code, "tta-middleware[otel]" in ran.err) == (1, True)


def test_a_server_without_its_extra_names_the_command(tta, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("tta_middleware.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "tta_middleware.moderation.server", raising=False)
    for command in ("serve-moderation", "serve"):
        ran = tta(command)
        assert ran.code == 1
        assert re.search(r"pip install .tta-middleware\[server\]", ran.err)


@pytest.mark.slow
def test_what_hangs_when_the_server_is_told_to_stop_ends_with_an_error_and_a_line(tta_process, tmp_path):
    config = tmp_path / "server.toml"
    config.write_text("[limits]\ndrain_seconds = 1\n")
    process = tta_process(
        "serve", "--model", "calm=settable:hanging", "--moderator", "words", "--port", "0", "--config", config, steps=3
    )
    address = next(found for line in process.stderr if (found := re.search(rb"http://127\.0\.0\.1:\d+", line)))
    host, port = address[0].decode().removeprefix("http://").split(":")
    body = json.dumps({"model": "calm", "messages": [{"role": "user", "content": "Tell me of roses"}]})
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", body)
        assert b"hanging\n" in process.stderr
        process.send_signal(signal.SIGTERM)
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["error"]["code"]) == (503, "server_stopping")
    lines = [json.loads(line) for line in process.communicate()[1].splitlines() if line.startswith(b"{")]
    assert [line["status"] for line in lines if line["message"] == "request"] == [503]
