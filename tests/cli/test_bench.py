import pytest

from tta_middleware.cli.bench_prompts import harmless_prompts
from tta_middleware.errors import ConfigurationError

STAGED = ("--model", "staged:plain", "--moderator", "words")


def test_it_measures_raw_and_guarded_and_prints_one_object(tta):
    ran = tta("bench", *STAGED, "--sequences", "1,3", "--chats", "6", "--concurrency", "2", "--max-new-tokens", "5")
    assert ran.code == 0
    (found,) = ran.objects
    assert [(level["sequences"], level["tokens"]) for level in found["raw"]] == [(1, 5), (3, 15)]
    assert found["unguarded_chats"]["tokens"] == found["guarded_chats"]["tokens"] == 30
    assert found["guarded_chats"]["outcomes"] == {"clean": 6}
    for part in (*found["raw"], found["unguarded_chats"], found["guarded_chats"]):
        assert part["tokens_per_second"] > 0
        assert 0 < part["first_token_seconds"]["p50"] <= part["first_token_seconds"]["p95"] <= part["seconds"]
    assert found["guarded_against_unguarded"]["by_clock"] > 0
    assert 0 < found["peak_memory"]["after_load"]["resident_mib"] <= found["peak_memory"]["at_the_end"]["resident_mib"]
    assert "raw, 3 sequences" in ran.err


def test_tokens_spent_on_repairs_count(tta):
    stubborn = ("--model", "staged:stubborn", "--moderator", "words", "--quick")
    found = tta("bench", *stubborn, "--chats", "2", "--sequences", "1").objects[0]
    assert found["guarded_chats"]["outcomes"] == {"blocked": 2}
    assert found["guarded_chats"]["tokens"] > found["unguarded_chats"]["tokens"]


@pytest.mark.slow
def test_the_embedded_model_is_measured_quickly(tta):
    hardware = ("--device", "cpu", "--dtype", "float32", "--max-batch", "2")
    found = tta("bench", "--quick", "--sequences", "1,2,32", "--chats", "2", *hardware).objects[0]
    assert [level["sequences"] for level in found["raw"]] == [1, 2]
    assert found["model"] == "smollm2"
    assert (found["device"], found["dtype"], found["max_batch"]) == ("cpu", "float32", 2)
    assert found["guarded_chats"]["outcomes"] == {"clean": 2}


@pytest.mark.parametrize("levels", ["", "0", "1,x", "-1"])
def test_numbers_of_sequences_that_are_none(tta, levels):
    ran = tta("bench", *STAGED, f"--sequences={levels}")
    assert (ran.code, ran.out) == (2, "")
    assert "--sequences takes whole numbers from 1" in ran.err


def test_prompts_are_drawn_by_the_seed():
    assert harmless_prompts(64, 7) == harmless_prompts(64, 7)
    assert harmless_prompts(64, 7) != harmless_prompts(64, 8)
    assert len(set(harmless_prompts(700, 0))) == 700
    with pytest.raises(ConfigurationError, match="there are 768 prompts to measure with, not 1000"):
        harmless_prompts(1000, 0)
