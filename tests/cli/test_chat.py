import json

import pytest

STAGED = ("--model", "staged:plain", "--moderator", "words")


def test_a_clean_answer_goes_to_stdout_and_its_story_to_stderr(tta):
    ran = tta("chat", "Tell me about roses", *STAGED)
    assert ran.code == 0
    assert ran.out == "A calm and friendly answer about roses and gardens.\n"
    assert "clean" in ran.err
    assert "1 generations" in ran.err


def test_a_flagged_answer_is_replaced_and_the_story_says_so(tta):
    ran = tta("chat", "Plan an attack on weeds", *STAGED, "--verbose")
    assert ran.code == 0
    assert ran.out == "A calm and friendly answer about weeds and gardens.\n"
    assert "neutralised" in ran.err
    assert "0.900 (flagged: illicit) before, 0.050 (safe, usable) after" in ran.err
    assert "wave 1: 0.900" in ran.err
    assert "bad plan" not in ran.out + ran.err


def test_a_blocked_answer_exits_with_3_and_shows_the_notice(tta):
    ran = tta("chat", "Hello", "--model", "staged:stubborn", "--moderator", "words", "--max-generations", "5")
    assert ran.code == 3
    assert ran.out == "I can't help with that request.\n"
    assert "blocked" in ran.err


def test_the_waves_of_a_long_repair_leave_the_outcome_in_sight(tta):
    ran = tta("chat", "Hello", "--model", "staged:stubborn", "--moderator", "words", "--verbose")
    waves = [line for line in ran.err.splitlines() if line.startswith(("wave", "..."))]
    assert len(waves) == 13
    assert waves[11].startswith("...: ")
    assert int(waves[12].split(":")[0].removeprefix("wave ")) == 12 + int(waves[11].split()[1])
    assert "budget: generations" in ran.err


def test_json_holds_answer_outcome_and_trace(tta):
    ran = tta("chat", "Plan an attack on weeds", *STAGED, "--json", "--seed", "3")
    (answer,) = ran.objects
    assert ran.code == 0
    assert ran.err == ""
    assert answer["answer"] == "A calm and friendly answer about weeds and gardens."
    assert answer["outcome"] == answer["trace"]["outcome"] == "neutralised"
    assert answer["trace"]["baseline"]["flagged"] is True
    assert answer["trace"]["seed"] == 3


@pytest.mark.parametrize("words", [(), ("-",)])
def test_the_prompt_may_come_from_stdin(tta, words):
    ran = tta("chat", *words, *STAGED, stdin="Tell me about café".encode())
    assert ran.code == 0
    assert "about café" in ran.out


def test_the_threshold_decides_what_is_flagged(tta):
    prompt = ("chat", "Plan an attack on weeds", *STAGED, "--json", "--method", "none")
    assert tta(*prompt, "--threshold", "0.95").objects[0]["outcome"] == "clean"
    assert tta(*prompt).objects[0]["outcome"] == "blocked"


def test_the_prompt_is_moderated_where_that_is_asked_for(tta):
    prompt = ("chat", "Write me a bad plan", *STAGED, "--method", "none")
    assert tta(*prompt).out != "I can't help with that request.\n"
    ran = tta(*prompt, "--prompt-check", "user")
    assert (ran.code, ran.out) == (3, "I can't help with that request.\n")
    assert "prompt: illicit" in ran.err


def test_a_policy_may_come_from_a_file_or_from_the_argument(tta, tmp_path):
    policy = {"categories": {"illicit": 0.95}, "notice": "Not this."}
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    prompt = ("chat", "Plan an attack on weeds", *STAGED, "--method", "none")
    assert tta(*prompt, "--policy", path).code == 0
    strict = json.dumps({**policy, "categories": {"illicit": 0.2}})
    ran = tta(*prompt, "--policy", strict)
    assert (ran.code, ran.out) == (3, "Not this.\n")


def test_an_unreachable_moderator_withholds_the_answer_and_says_why(tta):
    ran = tta("chat", "Tell me about roses", "--model", "staged:plain", "--moderator", "down")
    assert ran.code == 3
    assert "roses" not in ran.out
    assert "moderator: ModerationUnavailableError" in ran.err
    assert "tta doctor" in ran.err


def test_a_failing_model_is_one_line_and_exit_code_1(tta):
    words = ("chat", "attack", "--model", "staged:failing", "--moderator", "words")
    ran = tta(*words)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "tta: scripted failure at step 12\n"
    ran = tta(*words, "--json")
    assert ran.objects == [{"error": {"type": "EngineError", "message": "scripted failure at step 12"}}]
    assert ran.code == 1


def test_debug_shows_the_traceback(tta):
    ran = tta("chat", "attack", "--model", "staged:failing", "--moderator", "words", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err


def test_control_characters_of_an_answer_do_not_reach_a_terminal():
    from tta_middleware.cli.output import printable

    assert printable("a\x1b[31mb\n\tc\x07é") == "a[31mb\n\tcé"


THINKING = ("chat", "Tell me about roses", "--model", "staged:thinking", "--moderator", "words")


@pytest.mark.parametrize("mode", ["hide", "show", "off"])
def test_thoughts_stand_apart_from_the_answer(tta, mode):
    ran = tta(*THINKING, "--reasoning", mode)
    assert (ran.code, ran.out) == (0, "A calm answer about roses.\n")
    assert ("They ask about gardens, I think." in ran.err) == (mode == "show")
    told = {"hide": "tokens, hidden", "show": "tokens, shown", "off": "outcome: clean"}[mode]
    assert told in ran.err
    (answer,) = tta(*THINKING, "--reasoning", mode, "--json").objects
    assert answer.get("reasoning") == ("They ask about gardens, I think." if mode == "show" else None)


def test_a_thought_may_be_cut_and_one_without_an_answer_is_told(tta):
    ran = tta(*THINKING, "--max-reasoning-tokens", "2")
    assert ran.out == "A calm answer about roses.\n"
    assert "too long and closed" in ran.err
    assert "unanswered" in tta(*THINKING, "--max-new-tokens", "3").err


def test_arguments_of_the_template_are_json(tta):
    assert tta(*THINKING, "--chat-template-kwargs", '{"effort": "low"}').code == 0
    for wrong in ("low", "[1]", '{"other": 1}'):
        ran = tta(*THINKING, "--chat-template-kwargs", wrong)
        assert ran.code == 2
        assert "chat" in ran.err
