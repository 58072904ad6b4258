"""What users get wrong, and what they read then: one line that says what happened and what to do."""

import os
import pty
from pathlib import Path

import pytest

STAGED = ["--model", "staged:plain", "--moderator", "words"]
CHAT = ["chat", "Hello", *STAGED]
BATCH = ["batch", "{good}", "{tmp}/out.jsonl", *STAGED]
EVAL = ["eval", "--out", "{tmp}/run", *STAGED, "--methods", "none"]

FILES = {
    "good": b'{"id": "a", "prompt": "Tell me about roses"}\n',
    "empty": b"\n\n",
    "no_prompt": b'{"id": 1, "prompt": "one"}\n{"id": 2, "text": "two"}\n',
    "no_json": b'{"prompt": "one"}\n{"prompt": "two"\n',
    "no_object": b'["one"]\n',
    "no_utf8": b'{"prompt": "caf\xe9"}\n',
    "same_id": b'{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two"}\n{"id": "a", "prompt": "three"}\n',
    "no_role": b'{"messages": [{"role": "human", "content": "Hello"}]}\n',
    "prose": b"Dear diary,\ntoday was fine.\n",
}

MISTAKES = {
    "a command that is none": (["chatt"], 2, "No such command 'chatt'. Did you mean 'chat'? See: tta --help"),
    "an option that is none": ([*CHAT, "--modle", "x"], 2, "No such option: --modle"),
    "no prompt": (["chat", *STAGED], 2, "the text is empty"),
    "a prompt of white space": (["chat", "  ", *STAGED], 2, "the text is empty"),
    "an answer of no tokens": ([*CHAT, "--max-new-tokens", "0"], 2, "'--max-new-tokens': Input should be greater than"),
    "a device that is none": ([*CHAT, "--device", "gpu"], 2, "'gpu' is no device; give auto, cpu, cuda or cuda:1"),
    "a dtype that is none": ([*CHAT, "--dtype", "int8"], 2, "'--dtype': Value error, 'int8' is not one of 'auto',"),
    "a batch of no sequences": ([*CHAT, "--max-batch", "0"], 2, "'--max-batch': Input should be greater than"),
    "an engine without a device": (
        [*CHAT, "--device", "cpu"],
        2,
        "the engine 'staged' has no device to set; leave it out",
    ),
    "an engine without any of them": (
        ["batch", "{good}", "{tmp}/out.jsonl", *STAGED, "--max-batch", "2", "--dtype", "float32"],
        2,
        "the engine 'staged' has no dtype and no max_batch to set",
    ),
    "a dtype for another machine's model": (
        ["chat", "Hello", "--model", "vllm-server:smollm2@http://localhost:1", "--dtype", "float16"],
        2,
        "device and dtype are the servers' business",
    ),
    "words for a number": ([*CHAT, "--seed", "one"], 2, "'--seed': Input should be a valid integer"),
    "a temperature below 0": ([*CHAT, "--temperature", "-1"], 2, "temperature must be 0 (greedy) or more, not -1.0"),
    "a threshold above 1": (
        [*CHAT, "--threshold", "50"],
        2,
        "'--threshold': Input should be less than",
    ),
    "a threshold that is no number": ([*CHAT, "--threshold", "nan"], 2, "'--threshold': Input should be"),
    "a misspelt category": ([*CHAT, "--policy", '{"categories": {"hat": 0.1}}'], 2, "did you mean 'hate'?"),
    "a misspelt policy field": ([*CHAT, "--policy", '{"treshold": 0.1}'], 2, "Policy.treshold: unknown setting"),
    "a threshold for a policy": ([*CHAT, "--policy", "0.3"], 2, "a threshold is --threshold 0.3"),
    "a policy that is no JSON": ([*CHAT, "--policy", "{threshold: 0.1}"], 2, "--policy is not valid JSON"),
    "a policy file that is missing": (
        [*CHAT, "--policy", "nix.json"],
        2,
        "--policy: cannot read nix.json: No such file",
    ),
    "an unknown moderator": (["chat", "Hello", "--moderator", "nix"], 2, "unknown moderator 'nix'; known are"),
    "an unknown method": ([*CHAT, "--method", "nix"], 2, "unknown method 'nix'; known are noise, race, resample"),
    "an unknown model": (["chat", "Hello", "--model", "nix"], 1, "there is no model 'nix'"),
    "a model that is not here": (
        ["chat", "Hello", "--model", "no/model"],
        1,
        "run: hf download no/model or add --allow-download",
    ),
    "a text and a file": (["moderate", "text", "--jsonl", "-"], 2, "give a text or --jsonl, not both"),
    "a missing file of texts": (["moderate", "--jsonl", "{tmp}/nix"], 2, "no such file: {tmp}/nix"),
    "a folder instead of a file": (["moderate", "--jsonl", "{tmp}"], 2, "cannot read {tmp}: Is a directory"),
    "output over input": (["batch", "{good}", "{good}", *STAGED], 2, "input and output are the same file"),
    "output in no folder": (
        ["batch", "{good}", "{tmp}/no/out", *STAGED],
        2,
        "cannot write to {tmp}/no/out: No such file",
    ),
    "output that is something else": (["batch", "{good}", "{prose}", *STAGED], 2, "{prose}:1: not valid JSON"),
    "an empty batch": (["batch", "{empty}", "{tmp}/out.jsonl", *STAGED], 2, "{empty} holds no prompt"),
    "an id twice in a batch": (
        ["batch", "{same_id}", "{tmp}/out.jsonl", *STAGED],
        2,
        "{same_id}:3: the id 'a' was used before, in line 1",
    ),
    "no prompts": (EVAL, 2, "Missing option '--prompts'"),
    "a missing file of prompts": ([*EVAL, "--prompts", "{tmp}/nix"], 2, "no such file: {tmp}/nix"),
    "a file without a prompt": ([*EVAL, "--prompts", "{empty}"], 2, "{empty} holds no prompt"),
    "a line without prompt": (
        [*EVAL, "--prompts", "{no_prompt}"],
        2,
        "{no_prompt}:2: the field 'prompt' (or 'messages') is missing",
    ),
    "a line that is no JSON": ([*EVAL, "--prompts", "{no_json}"], 2, "{no_json}:2: not valid JSON (Expecting"),
    "a line that is no object": ([*EVAL, "--prompts", "{no_object}"], 2, "{no_object}:1: a JSON object is needed"),
    "a line that is not UTF-8": (
        [*EVAL, "--prompts", "{no_utf8}"],
        2,
        "{no_utf8}:1: not UTF-8 (byte 0xe9 at position 16)",
    ),
    "a role that is none": (
        [*EVAL, "--prompts", "{no_role}"],
        2,
        "{no_role}:1: message 1: 'role' must be one of system",
    ),
    "an id twice": ([*EVAL, "--prompts", "{same_id}"], 2, "{same_id}:3: the id 'a' was used before, in line 1"),
    "a misspelt method": ([*EVAL, "--prompts", "{good}", "--methods", "nois"], 2, "did you mean 'noise'?"),
    "a method twice": ([*EVAL, "--prompts", "{good}", "--methods", "tsa,tsa"], 2, "the method 'tsa' is given twice"),
    "no method": ([*EVAL, "--prompts", "{good}", "--methods", ","], 2, "no method given; known are none, block"),
    "the moderator as its own judge": ([*EVAL, "--prompts", "{good}", "--judge", "words"], 2, "the judge must not be"),
    "an unknown judge": ([*EVAL, "--prompts", "{good}", "--judge", "nix"], 2, "unknown judge 'nix'; known are"),
    "a file as run folder": (
        ["eval", "--prompts", "{good}", "--out", "{prose}", *STAGED],
        2,
        "cannot write to the folder {prose}: File exists",
    ),
    "a port that is none": (["serve-moderation", "--port", "99999"], 2, "'--port': Input should be less than"),
}


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return {"tmp": str(tmp_path), **{name: str(tmp_path / name) for name in FILES}}


def fill(text: str, places: dict[str, str]) -> str:
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", path)
    return text


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(tta, places, mistake):
    words, code, message = MISTAKES[mistake]
    ran = tta(*(fill(word, places) for word in words))
    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("tta: ")
    assert ran.err.count("\n") == 1
    assert fill(message, places) in ran.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_machines_get_the_mistake_as_an_object(tta, places, mistake):
    words, code, message = MISTAKES[mistake]
    ran = tta(words[0], "--json", *(fill(word, places) for word in words[1:]))
    assert ran.code == code
    (only,) = ran.objects
    assert set(only["error"]) == {"type", "message"}
    if words[0] != "serve-moderation":
        assert fill(message, places) in only["error"]["message"]


def test_a_prompt_that_is_not_utf8(tta):
    ran = tta("chat", *STAGED, stdin=b"caf\xe9")
    assert (ran.code, ran.err) == (2, "tta: the text is not UTF-8\n")


def test_nothing_piped_in_on_a_terminal(tta_process):
    ours, its_stdin = pty.openpty()
    process = tta_process("moderate", "--moderator", "words", stdin=its_stdin)
    _out, err = process.communicate()
    os.close(ours)
    os.close(its_stdin)
    assert (process.returncode, err) == (2, b"tta: no text; give it as an argument or pipe it in\n")


def test_another_setting_in_the_folder_of_a_run(tta, places):
    words = ["eval", "--prompts", places["good"], "--out", f"{places['tmp']}/run", *STAGED, "--methods", "none"]
    assert tta(*words).code == 0
    ran = tta(*words, "--max-new-tokens", "7")
    assert ran.code == 2
    assert "holds a run with other settings (max_new_tokens 64 before, 7 now)" in ran.err
    ran = tta(*words, "--policy", '{"threshold": 0.2}')
    assert "holds a run with other settings (policy.threshold 0.5 before, 0.2 now)" in ran.err
    with Path(places["good"]).open("a") as prompts:
        prompts.write('{"prompt": "Tell me about moss"}\n')
    assert "holds a run with other settings (other prompt files, or other lines in them)" in tta(*words).err


def test_examples_without_a_report_are_refused(tta, places):
    words = ["eval", "--prompts", places["good"], "--out", f"{places['tmp']}/run", *STAGED, "--report-examples", "2"]
    assert tta(*words).err == "tta: --report-examples changes nothing without --report; leave it out\n"


def test_an_unexpected_error_names_its_type_alone(tta, monkeypatch):
    def fail(*_):
        raise KeyError("the user's secret prompt")

    monkeypatch.setattr("tta_middleware.cli.typed.policy_of", fail)
    ran = tta(*CHAT)
    assert (ran.code, ran.err) == (1, "tta: unexpected KeyError; run again with --debug for the traceback\n")
