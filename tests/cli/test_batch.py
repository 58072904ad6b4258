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
    assert tta("batch", source, out, *STAGED).code == 2
    answered, broken, empty = read(out)
    assert answered["id"] == 2
    assert (broken["id"], broken["line"], broken["error"]["type"]) == (None, 2, "DataError")
    assert empty["error"]["message"] == f"{source}:3: 'prompt' is empty"


def test_a_failure_on_one_prompt_does_not_lose_the_others(tta, jsonl, tmp_path):
    source = jsonl("in.jsonl", *({"id": i, "prompt": "About trees"} for i in range(3)))
    failing = ("--model", "staged:failing", "--moderator", "words", "--concurrency", "1")
    ran = tta("batch", source, tmp_path / "out.jsonl", *failing)
    assert ran.code == 1
    assert "2 clean, 1 failed" in ran.err
    kinds = ["error" in record for record in read(tmp_path / "out.jsonl")]
    assert kinds == [False, True, False]


def test_concurrent_prompts_give_the_same_answers(tta, jsonl, tmp_path):
    source = jsonl("in.jsonl", *({"id": i, "prompt": f"Plan an attack on weed{i}"} for i in range(12)))
    tta("batch", source, tmp_path / "one.jsonl", *STAGED, "--concurrency", "1")
    tta("batch", source, tmp_path / "many.jsonl", *STAGED, "--concurrency", "5")
    one, many = ({r["id"]: r["answer"] for r in read(tmp_path / name)} for name in ("one.jsonl", "many.jsonl"))
    assert one == many
    assert len(one) == 12


def test_answers_keep_the_order_of_the_input_or_come_as_they_are_done(tta, jsonl, tmp_path):
    slow, quick = {"id": "slow", "prompt": "Plan an attack on weeds"}, {"id": "quick", "prompt": "About trees"}
    source = jsonl("in.jsonl", slow, *({**quick, "id": f"quick{i}"} for i in range(20)))
    tta("batch", source, tmp_path / "input.jsonl", *STAGED, "--concurrency", "2")
    tta("batch", source, tmp_path / "done.jsonl", *STAGED, "--concurrency", "2", "--order", "completed")
    asked = [record["id"] for record in read(source)]
    kept, done = ([record["id"] for record in read(tmp_path / name)] for name in ("input.jsonl", "done.jsonl"))
    assert kept == asked
    assert done[0] != "slow"
    assert sorted(done) == sorted(asked)


def test_shards_divide_the_lines_between_them_and_stay_stable(tta, jsonl, tmp_path):
    source = jsonl("in.jsonl", *({"prompt": f"About tree{i}"} for i in range(7)), b"", {"prompt": "About roses"})
    parts = []
    for index in (1, 2, 3):
        assert tta("batch", source, tmp_path / f"{index}.jsonl", *STAGED, "--shard", f"{index}/3").code == 0
        parts.append([record["id"] for record in read(tmp_path / f"{index}.jsonl")])
    assert parts == [[1, 4, 7], [2, 5], [3, 6, 9]]


def test_content_may_be_parts_of_text(tta, jsonl, tmp_path):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "of roses"}]
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    source = jsonl("in.jsonl", *({"messages": [{"role": "user", "content": content}]} for content in (parts, image)))
    out = tmp_path / "out.jsonl"
    ran = tta("batch", source, out, "--model", "settable:a", "--moderator", "words")
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert (ran.code, first["answer"]) == (2, "A calm and friendly answer about roses and gardens.")
    assert "reads text only, not 'image_url'" in second["error"]["message"]


def test_a_line_may_say_how_it_is_decoded_but_not_how_it_is_checked(tta, jsonl, tmp_path):
    source = jsonl(
        "in.jsonl",
        {"prompt": "About trees"},
        {"prompt": "About trees", "sampling": {"max_new_tokens": 3}},
        {"prompt": "About trees", "sampling": {"stop": " friendly"}},
        {"prompt": "About trees", "sampling": {"threshold": 1.0}},
        {"prompt": "About trees", "sampling": {"max_new_tokens": True}},
        {"prompt": "About trees", "sampling": {"top_p": 3}},
        {"prompt": "About trees", "sampling": {"stop": [1]}},
        {"prompt": "About trees", "sampling": 7},
    )
    assert tta("batch", source, tmp_path / "out.jsonl", *STAGED).code == 2
    whole, short, stopped, *wrong = read(tmp_path / "out.jsonl")
    assert whole["answer"] == "A calm and friendly answer about trees and gardens."
    assert (short["answer"], short["finish_reason"]) == ("A calm and", "length")
    assert (stopped["answer"], stopped["finish_reason"]) == ("A calm and", "stop")
    assert [record["error"]["message"].removeprefix(f"{source}:") for record in wrong] == [
        "4: 'sampling' has no 'threshold'; known are max_new_tokens, temperature, top_p, seed, stop",
        "5: 'max_new_tokens' in 'sampling' has the wrong kind of value",
        "6: top_p must lie in (0, 1], not 3",
        "7: 'stop' in 'sampling' must be a text or a list of texts",
        "8: 'sampling' must be an object with max_new_tokens, temperature, top_p, seed, stop",
    ]


def test_errors_are_tried_again_where_that_is_asked_for(tta, jsonl, tmp_path):
    source = jsonl("in.jsonl", *({"id": i, "prompt": "About trees"} for i in range(3)), b"{")
    out = tmp_path / "out.jsonl"
    failing = ("--model", "staged:failing", "--moderator", "words", "--concurrency", "1")
    assert tta("batch", source, out, *failing).code == 2
    again = tta("batch", source, out, *STAGED)
    assert again.code == 2
    assert "4 skipped, 2 of them errors of an earlier run, which --retry-errors tries again" in again.err
    assert sum("error" in record for record in read(out)) == 2
    jsonl("in.jsonl", *({"id": i, "prompt": "About trees"} for i in range(3)), {"id": 3, "prompt": "About roses"})
    ran = tta("batch", source, out, *STAGED, "--retry-errors", "--json")
    assert (ran.code, ran.objects[0]["skipped"], ran.objects[0]["clean"]) == (0, 2, 2)
    assert sorted(record["id"] for record in read(out)) == [0, 1, 2, 3]
    assert not any("error" in record for record in read(out))


def test_a_cut_off_run_does_not_lose_its_errors_exit_code(tta, jsonl, tmp_path):
    """The first line fails, the job is killed, and the run that goes on has only answers left to give."""
    source = jsonl("in.jsonl", *({"id": i, "prompt": "About trees"} for i in range(3)))
    out = tmp_path / "out.jsonl"
    assert (
        tta("batch", source, out, "--model", "staged:failing", "--moderator", "words", "--concurrency", "1").code == 1
    )
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(line for line in lines if b'"error"' in line))
    ran = tta("batch", source, out, *STAGED, "--json")
    assert (ran.code, ran.objects[0]["skipped"], ran.objects[0]["skipped_failed"]) == (1, 1, 1)


def test_answers_are_never_taken_for_those_of_another_prompt(tta, jsonl, tmp_path):
    source = jsonl("in.jsonl", {"prompt": "About trees"}, {"prompt": "About roses"})
    out = tmp_path / "out.jsonl"
    tta("batch", source, out, *STAGED)
    before = out.read_bytes()
    jsonl("in.jsonl", {"prompt": "About lawns"}, {"prompt": "About trees"}, {"prompt": "About roses"})
    ran = tta("batch", source, out, *STAGED)
    assert ran.code == 2
    assert f"{source}:1: {out} holds the answer to another prompt under this line's id" in ran.err
    assert out.read_bytes() == before


def test_a_model_that_cannot_be_loaded_ends_the_run_before_any_record(tta, prompts, tmp_path):
    ran = tta("batch", prompts, tmp_path / "out.jsonl", "--model", "nix", "--moderator", "words")
    assert ran.code == 1
    assert "there is no model 'nix'" in ran.err
    assert read(tmp_path / "out.jsonl") == []


def test_an_interrupt_keeps_what_is_done_and_exits_with_130(tta_process, jsonl, tmp_path):
    source = jsonl("in.jsonl", *({"id": i, "prompt": "About trees"} for i in range(4)))
    out = tmp_path / "out.jsonl"
    hanging = ("--model", "staged:hanging", "--moderator", "words", "--concurrency", "1")
    process = tta_process("batch", source, out, *hanging, steps=20)
    assert process.stderr.readline() == b"hanging\n"
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate()
    assert process.returncode == 130
    assert err == b"what is done is kept; run the same command again to go on\ntta: interrupted\n"
    assert [record["id"] for record in read(out)] == [0]


def test_a_fault_that_nobody_foresaw_costs_one_record_and_tells_no_secret(tta, jsonl, tmp_path, monkeypatch):
    import tta_middleware.testing.scripted_engine as scripted

    plain = scripted.ScriptedEngine._call

    def call(engine, request):
        found = plain(engine, request)
        if "roses" in found.text:
            raise KeyError(found.text)
        return found

    monkeypatch.setattr(scripted.ScriptedEngine, "_call", call)
    source = jsonl("in.jsonl", {"prompt": "About trees"}, {"prompt": "About roses"}, {"prompt": "About lawns"})
    assert tta("batch", source, tmp_path / "out.jsonl", *STAGED).code == 1
    trees, roses, lawns = read(tmp_path / "out.jsonl")
    assert "answer" in trees
    assert "answer" in lawns
    assert roses["error"] == {
        "type": "KeyError",
        "message": "unexpected KeyError; ask it of tta chat with --debug for the traceback",
    }


def test_answers_without_a_verdict_are_errors_that_another_run_tries_again(tta, jsonl, tmp_path):
    source, out = jsonl("in.jsonl", *({"id": i, "prompt": "About trees"} for i in range(5))), tmp_path / "out.jsonl"
    ran = tta("batch", source, out, "--model", "staged:plain", "--moderator", "downlater", "--concurrency", "1")
    assert (ran.code, "3 clean, 2 failed" in ran.err) == (1, True)
    *_, last = read(out)
    assert last["error"]["type"] == "ModerationUnavailableError"
    assert "could not be checked and was withheld" in last["error"]["message"]
    assert (last["trace"]["outcome"], "answer" in last) == ("blocked", False)
    again = tta("batch", source, out, *STAGED, "--retry-errors")
    assert (again.code, [record["id"] for record in read(out)]) == (0, [0, 1, 2, 3, 4])
    assert "2 clean" in again.err


def test_max_tokens_is_understood_and_an_empty_shard_has_nothing_to_do(tta, jsonl, tmp_path):
    lines = [{"prompt": "About trees", "sampling": {"max_tokens": 3, **more}} for more in ({}, {"max_new_tokens": 4})]
    source, out = jsonl("in.jsonl", *lines), tmp_path / "out.jsonl"
    ran = tta("batch", source, out, *STAGED)
    short, twice = read(out)
    assert short["finish_reason"] == "length"
    assert (ran.code, "another name of 'max_new_tokens'" in twice["error"]["message"]) == (2, True)
    idle = tta("batch", source, tmp_path / "none.jsonl", *STAGED, "--shard", "3/3")
    assert (idle.code, idle.err.strip().endswith("none.jsonl: nothing to do")) == (0, True)
