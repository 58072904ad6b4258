import pytest


def checks(ran) -> dict[str, dict]:
    return {check["name"]: check for check in ran.objects[0]["checks"]}


def test_a_working_installation_is_fine(tta):
    ran = tta("doctor", "--json")
    assert ran.code == 0
    assert ran.objects[0]["ok"] is True
    found = checks(ran)
    assert "torch" in found["local models"]["detail"]
    assert "smollm2" in found["model"]["detail"]
    assert "local answers" in found["moderator"]["detail"]


def test_a_missing_model_names_the_command_that_brings_it(tta):
    ran = tta("doctor", "--model", "nobody/nothing")
    assert ran.code == 1
    assert "hf download nobody/nothing" in ran.out


def test_an_unreachable_moderator_fails(tta):
    ran = tta("doctor", "--json", "--moderator", "down", "--online")
    assert ran.code == 1
    assert checks(ran)["moderator"]["status"] == "fail"
    assert "could not be reached" in checks(ran)["moderator"]["detail"]


def test_an_unknown_moderator_fails(tta):
    ran = tta("doctor", "--json", "--moderator", "nix")
    assert ran.code == 1
    assert "unknown moderator 'nix'; known are" in checks(ran)["moderator"]["detail"]


def test_a_moderator_on_the_network_is_only_called_when_asked(tta, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    ran = tta("doctor", "--json", "--moderator", "openai")
    assert ran.code == 0
    assert "not called" in checks(ran)["moderator"]["detail"]
    assert "sk-not" not in ran.out


def test_a_missing_key_fails(tta, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    ran = tta("doctor", "--json", "--moderator", "openai")
    assert ran.code == 1
    assert checks(ran)["moderator"]["fix"] == "set OPENAI_API_KEY"


@pytest.mark.parametrize(("chosen", "status"), [(None, "hint"), ("ACTIVE", "hint"), ("PASSIVE", "ok")])
def test_the_wait_policy_is_the_users_and_not_ours(tta, monkeypatch, chosen, status):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    assert checks(tta("doctor", "--json", "--moderator", "words"))["openmp"]["status"] == status


@pytest.mark.parametrize(
    "asked",
    [
        ("--moderator", "self"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in [("--judging",), ("--moderator", "guard:staged:judging")]
        ),
    ],
)
def test_a_model_that_judges_is_asked_about_examples(tta, monkeypatch, tmp_path, asked):
    monkeypatch.setenv("TTA_PROFILE_DIR", str(tmp_path))
    ran = tta("doctor", "--json", "--model", "staged:judging", *asked)
    judge = checks(ran)["judge"]
    assert judge["status"] == "hint"
    assert "staged:judging without a profile: AUC 0." in judge["detail"]
    assert "tta calibrate --only judging" in judge["fix"]
    tta("calibrate", "--model", "staged:judging", "--only", "judging")
    judge = checks(tta("doctor", "--json", "--model", "staged:judging", *asked))["judge"]
    assert judge["status"] == "ok"
    assert "with its profile" in judge["detail"]


def test_a_model_that_cannot_judge_is_warned_of(tta):
    judge = checks(tta("doctor", "--json", "--model", "staged:contrary", "--judging"))["judge"]
    assert judge["status"] == "warn"
    assert "cannot tell harm" in judge["fix"]


def test_a_model_that_cannot_be_asked_fails_as_judge(tta):
    ran = tta("doctor", "--json", "--model", "staged:plain", "--moderator", "guard:staged:plain")
    assert ran.code == 1
    assert "so its model cannot judge" in checks(ran)["judge"]["detail"]


@pytest.mark.slow
def test_the_embedded_model_is_no_judge(tta, monkeypatch, tmp_path):
    monkeypatch.setenv("TTA_PROFILE_DIR", str(tmp_path))
    judge = checks(tta("doctor", "--json", "--judging"))["judge"]
    assert judge["status"] == "warn"
    assert "smollm2 without a profile" in judge["detail"]


@pytest.mark.slow
def test_a_model_that_is_named_says_which_way_it_runs_and_why(tta):
    assert "engine" not in checks(tta("doctor", "--json", "--moderator", "words"))
    engine = checks(tta("doctor", "--json", "--moderator", "words", "--model", "smollm2"))["engine"]
    assert engine["status"] == "ok"
    assert engine["detail"].startswith("packed: its layers attend to the columns before")


@pytest.mark.slow
def test_an_engine_option_says_how_and_the_template_what_it_takes(tta):
    found = checks(tta("doctor", "--json", "--moderator", "words", "--engine-option", "path=plain"))
    assert found["engine"]["detail"].startswith("plain: that was asked for")
    assert found["template"]["detail"].startswith("thoughts: no marks of any; tools: not taken, for the model's chat")


def test_an_engine_option_that_is_none_fails(tta):
    ran = tta("doctor", "--json", "--moderator", "words", "--engine-option", "paht=plain")
    assert ran.code == 1
    assert "paht" in checks(ran)["engine"]["detail"]
