"""A report tells nothing of the machine that it was made on."""

import pytest

from tta_middleware.evaluation.shown import shown_command, shown_path


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("/home/me/models/small.gguf", "small.gguf"),
        ("guard:/home/me/small.gguf", "guard:small.gguf"),
        ("../shared/data/prompts/a.jsonl", "../shared/data/prompts/a.jsonl"),
        ("vllm:meta/Model", "vllm:meta/Model"),
        ("smollm2", "smollm2"),
        ("/", "/"),
    ],
)
def test_absolute_paths_are_shown_by_their_last_part(word, shown):
    assert shown_path(word) == shown


def test_a_command_keeps_its_words():
    typed = "tta eval --out=/tmp/run --prompts '/home/my files/a.jsonl' --methods none,race --policy '{\"a\": 1}'"
    shown = "tta eval --out=run --prompts a.jsonl --methods none,race --policy '{\"a\": 1}'"
    assert shown_command(typed) == shown
    assert shown_command("tta 'unclosed") == "tta 'unclosed"


@pytest.mark.parametrize("way", ["--variant mine={}", "--variant=mine={}"])
def test_a_variants_file_is_shown_by_its_last_part(way):
    assert shown_command("tta eval " + way.format("/home/me/mine.json")) == "tta eval " + way.format("mine.json")
