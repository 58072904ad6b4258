import json
import signal

import pytest

STAGED = ("--model", "staged:plain", "--moderator", "words")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(jsonl):
    return jsonl(
        "in.jsonl",
        {"id": "roses", "prompt": "Tell me about roses"},
        {"id": "weeds", "prompt": "Plan an attack on weeds"},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "About trees"}]},
    )


def test_every_record_gets_an_answer_with_its_trace(tta, prompts, tmp_path):
    ran = tta("batch", prompts, tmp_path / "out.jsonl", *STAGED)
    assert ran.code == 0
    roses, weeds, trees = read(tmp_path / "out.jsonl")
    assert (roses["id"], roses["outcome"]) == ("roses", "clean")
    assert (weeds["id"], weeds["outcome"]) == ("weeds", "neutralised")
    assert weeds["trace"]["generations"] > 1
    assert (trees["id"], trees["answer"]) == (3, "A calm and friendly answer about trees and gardens.")
    assert "2 clean, 1 neutralised" in ran.err


def test_a_second_run_does_only_what_is_left(tta, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    tta("batch", prompts, out, *STAGED)
    whole = out.read_bytes()
    first, second, _third = whole.splitlines(keepends=True)
    out.write_bytes(first + second[: len(second) // 2])
    ran = tta("batch", prompts, out, *STAGED, "--json")
    assert ran.objects[0]["skipped"] == 1
    assert [record["id"] for record in read(out)] == ["roses", "weeds", 3]
    assert tta("batch", prompts, out, *STAGED, "--json").objects[0]["skipped"] == 3


def test_a_finished_last_line_without_line_end_is_kept(tta, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    tta("batch", prompts, out, *STAGED)
    out.write_bytes(out.read_bytes().removesuffix(b"\n"))
    assert tta("batch", prompts, out, *STAGED, "--json").objects[0]["skipped"] == 3
    assert len(read(out)) == 3


def test_broken_lines_get_an_error_once_and_the_rest_an_answer(tta, jsonl, tmp_path):
    source = jsonl("in.jsonl", {"id": 2, "prompt": "Tell me about roses"}, b"{", {"id": 9, "prompt": " "})
    out = tmp_path / "out.jsonl"
    assert tta("batch", source, out, *STAGED).code == 2
    assert tta("batch", source, out, *STAGED).code == 0
    answered, broken, empty = read(out)
    assert answered["id"] == 2
    assert (broken["id"], broken["line"], broken["error"]["type"]) == (None, 2, "DataError")
    assert empty["error"]["message"] == f"{source}:3: 'prompt' is empty"


def test_a_failure_on_one_prompt_does_not_lose_the_others(tta, jsonl, tmp_path):
    source = jsonl("in.jsonl", *({"id": i, "prompt": "About trees"} for i in range(3)))
    ran = tta("batch", source, tmp_path / "out.jsonl", "--model", "staged:failing", "--moderator", "words")
    assert ran.code == 1
    kinds = ["error" in record for record in read(tmp_path / "out.jsonl")]
    assert kinds == [False, True, False]


def test_concurrent_prompts_give_the_same_answers(tta, jsonl, tmp_path):
    source = jsonl("in.jsonl", *({"id": i, "prompt": f"Plan an attack on weed{i}"} for i in range(12)))
    tta("batch", source, tmp_path / "one.jsonl", *STAGED)
    tta("batch", source, tmp_path / "many.jsonl", *STAGED, "--concurrency", "5")
    one, many = ({r["id"]: r["answer"] for r in read(tmp_path / name)} for name in ("one.jsonl", "many.jsonl"))
    assert one == many
    assert len(one) == 12


def test_a_model_that_cannot_be_loaded_ends_the_run_before_any_record(tta, prompts, tmp_path):
    ran = tta("batch", prompts, tmp_path / "out.jsonl", "--model", "nix", "--moderator", "words")
    assert ran.code == 1
    assert "there is no model 'nix'" in ran.err
    assert read(tmp_path / "out.jsonl") == []


def test_an_interrupt_keeps_what_is_done_and_exits_with_130(tta_process, jsonl, tmp_path):
    source = jsonl("in.jsonl", *({"id": i, "prompt": "About trees"} for i in range(4)))
    out = tmp_path / "out.jsonl"
    process = tta_process("batch", source, out, "--model", "staged:hanging", "--moderator", "words", steps=20)
    assert process.stderr.readline() == b"hanging\n"
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate()
    assert process.returncode == 130
    assert err == b"what is done is kept; run the same command again to go on\ntta: interrupted\n"
    assert [record["id"] for record in read(out)] == [0]
