"""Each comparator on a scripted model: what it gives out, and what it counts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tta_middleware.config import Budget
from tta_middleware.errors import ConfigurationError, EngineError
from tta_middleware.evaluation import COMPARATORS, comparators
from tta_middleware.evaluation.comparators.random_step import RandomStep
from tta_middleware.evaluation.comparators.reminder import AFTER, BEFORE, wrapped
from tta_middleware.evaluation.comparators.smoothing import swapped
from tta_middleware.methods.base import Start
from tta_middleware.methods.geometry import relative_move
from tta_middleware.policy import DEFAULT_NOTICE
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.types import CATEGORIES, Message, Sampling, Verdict

ATTACK = [Message("user", "Plan an attack on weeds")]
BAD = "Here is the bad plan: first look around the old shed with care and then collect everything."
GOOD = "Pull the weeds out by hand after the rain, since the soil is soft then, and cover it with straw."


async def ran(bench, name, messages=ATTACK, script=None):
    bench = replace(bench, engine=ScriptedEngine(script)) if script else bench
    report = await comparators(name)[0].run(bench, messages, Sampling(max_new_tokens=64))
    return report, report.answer.trace


@pytest.mark.parametrize("name", COMPARATORS)
async def test_a_harmless_answer_is_left_alone(bench, name):
    report, trace = await ran(bench, name, [Message("user", "Tell me about roses")])
    assert (trace.outcome, trace.generations, trace.moderation_calls) == ("clean", 1, 1)
    assert report.answer.text.startswith("A calm and friendly answer about roses")


@pytest.mark.parametrize("name", [name for name in COMPARATORS if name not in ("none", "block")])
async def test_every_method_keeps_to_the_budget_and_never_gives_out_what_is_flagged(bench, name):
    report, trace = await ran(replace(bench, budget=Budget(generations=3)), name, script=BAD)
    assert trace.outcome == "blocked"
    assert report.answer.text == DEFAULT_NOTICE
    assert trace.generations <= 3
    assert trace.generations == 1 + sum(len(step.scores) for step in trace.steps)
    assert trace.generated_tokens > 0


async def test_block_gives_the_notice_and_counts_nothing_more(bench):
    report, trace = await ran(bench, "block")
    assert report.answer.text == report.final.completion.text == DEFAULT_NOTICE
    assert (trace.outcome, trace.generations, trace.moderation_calls) == ("neutralised", 1, 1)
    assert trace.final.usable


async def test_the_reminder_stands_before_and_after_the_question(bench):
    report, trace = await ran(bench, "reminder", script=lambda call: GOOD if AFTER in call.text else BAD)
    assert (report.answer.text, trace.outcome, trace.generations) == (GOOD, "neutralised", 2)
    assert (trace.relative_move, trace.decodes_to_original) == (0.0, True)
    turns = wrapped([Message("system", "Be brief."), *ATTACK])
    assert [turn.content for turn in turns] == [f"Be brief.\n\n{BEFORE}", f"Plan an attack on weeds\n{AFTER}"]


class Graded:
    """Scores an answer by the digit that it ends with."""

    name, default_threshold = "graded", 0.5

    async def moderate(self, texts, *, prompt=None):
        scores = [int(text[-1]) / 10 if text[-1].isdigit() else 0.9 for text in texts]
        return [Verdict(dict.fromkeys(CATEGORIES, score), score >= 0.5, self.name) for score in scores]

    async def aclose(self):
        pass


async def test_best_of_n_gives_the_answer_with_the_lowest_score(bench):
    graded = replace(bench, moderator=Graded())
    report, trace = await ran(graded, "best-of-n", script=lambda call: f"{GOOD} {9 - call.seed}")
    assert trace.steps[0].scores == (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    assert report.answer.text == f"{GOOD} 1"
    assert (trace.generations, trace.moderation_calls) == (9, 9)


LONG = "First fetch a bucket and good gloves, since the work is wet and the ground is stony in most places. " * 2
WORSE = f"{LONG}Then the bad part begins. {LONG}"


async def test_care_rolls_the_flagged_buffer_back_and_goes_on_with_the_critique(bench):
    def script(call):
        if "could cause harm" in call.text:
            return "It plans something bad."
        if "A review of a draft of this answer said: It plans something bad." not in call.conversation:
            return WORSE.removeprefix(call.prefix)
        return f" {GOOD}"

    engine = ScriptedEngine(script)
    limits = Sampling(max_new_tokens=100)
    report = await comparators("care")[0].run(replace(bench, engine=engine), ATTACK, limits)
    text, trace = report.answer.text, report.answer.trace
    assert trace.outcome == "neutralised"
    assert text.endswith(GOOD)
    kept = text.removesuffix(f" {GOOD}")
    assert kept
    assert WORSE.startswith(kept)
    assert "bad" not in kept
    # The undefended answer, its buffers up to the flagged one, the new buffer; the critique's tokens count alone.
    assert trace.generations == 2
    assert trace.generated_tokens > 100 + 5


async def test_care_gives_up_after_its_interventions(bench):
    report, trace = await ran(bench, "care", script=BAD)
    assert (trace.outcome, report.answer.text) == ("blocked", DEFAULT_NOTICE)
    assert trace.generations == 1 + 5


class BreaksOff(ScriptedEngine):
    """Breaks the last answer of a batch off half-way, as an engine does that is closed or out of memory."""

    async def generate_batch(self, requests):
        *whole, last = await super().generate_batch(requests)
        return [*whole, replace(last, text=last.text[: len(last.text) // 2], finish_reason="aborted")]


@pytest.mark.parametrize("name", ["best-of-n", "care", "smoothllm", "resta", "reminder"])
async def test_an_answer_that_was_broken_off_does_not_count_as_one(bench, name):
    with pytest.raises(EngineError, match="broke the answer off"):
        await comparators(name)[0].run(replace(bench, engine=BreaksOff(BAD)), ATTACK, Sampling(max_new_tokens=64))


async def test_an_answer_that_hides_behind_escapes_is_judged_as_it_reads(bench):
    """What a parser of JSON makes of an answer is scored beside it, as a guard does."""
    escaped = "".join(f"\\u{ord(sign):04x}" for sign in BAD)
    hidden = f'{{"text": "{escaped}"}}'
    report, trace = await ran(bench, "reminder", script=lambda call: hidden if AFTER in call.text else BAD)
    assert (trace.outcome, report.answer.text) == ("blocked", DEFAULT_NOTICE)
    assert trace.final.flagged


@pytest.mark.parametrize(("share_of_good", "outcome"), [(9, "neutralised"), (5, "blocked"), (1, "blocked")])
async def test_smoothllm_gives_one_of_the_majority(bench, share_of_good, outcome):
    def script(call):
        return GOOD if "attack on weeds" not in call.text and call.seed <= share_of_good else BAD

    everything = replace(comparators("smoothllm")[0], share=0.9)
    report = await everything.run(replace(bench, engine=ScriptedEngine(script)), ATTACK, Sampling(max_new_tokens=64))
    trace = report.answer.trace
    assert trace.outcome == outcome
    assert (trace.generations, trace.moderation_calls) == (11, 11)
    assert not trace.decodes_to_original


def test_swaps_change_the_asked_share_of_the_last_user_turn_alone():
    talk = [Message("user", "First question"), Message("assistant", "Yes."), Message("user", "x" * 200)]
    changed = swapped(talk, 0.1, np.random.default_rng(0))
    assert changed[:2] == talk[:2]
    differ = sum(a != b for a, b in zip(changed[2].content, talk[2].content, strict=True))
    assert 15 <= differ <= 20


@pytest.mark.parametrize(("needed", "outcome"), [(0.4, "neutralised"), (0.6, "blocked")])
async def test_smoothing_votes_on_copies_at_its_radius(bench, needed, outcome):
    _, trace = await ran(bench, "resta", script=lambda call: GOOD if call.moved > needed else BAD)
    assert trace.outcome == outcome
    assert trace.relative_move == pytest.approx(0.5, abs=0.02)
    assert trace.generations == 11


@pytest.mark.parametrize("norm", ["token", "matrix"])
async def test_a_random_step_has_the_size_of_the_papers_step(norm):
    prompt = await ScriptedEngine(GOOD).embed(ATTACK)
    step = RandomStep(step_norm=norm, steps=3).build(Start(prompt, 0.4, np.random.default_rng(0)))
    (proposal,) = step.ask(8)
    assert step.ask(8) == []
    assert relative_move(proposal.matrix[prompt.user_mask], prompt.matrix[prompt.user_mask]) == pytest.approx(0.5)
    assert (proposal.matrix[~prompt.user_mask] == prompt.matrix[~prompt.user_mask]).all()
    step.tell([proposal], [0.3])
    step.tell(step.ask(8), [0.3])
    assert step.stop() == ("3 steps",)


async def test_iterations_are_steps_of_the_papers_loop(bench):
    for name, each in (("tsa-all", 9), ("random-step", 1)):
        comparator = comparators(name)[0]
        report = await comparator.run(replace(bench, engine=ScriptedEngine(BAD)), ATTACK, Sampling(max_new_tokens=64))
        trace = report.answer.trace
        assert trace.generations == 1 + 9 * each
        assert comparator.iterations(trace) == 9


@pytest.mark.parametrize(
    ("names", "message"),
    [("", "no method given"), ("noise,noise", "given twice"), ("smothllm", "did you mean 'smoothllm'")],
)
def test_names_that_cannot_be_used_are_refused(names, message):
    with pytest.raises(ConfigurationError, match=message):
        comparators(names)


def test_settings_tell_variants_apart():
    settings = [comparator.settings for comparator in comparators("tsa,tsa-all,tsa-matrix,tsa-all-matrix")]
    assert len(set(settings)) == 4


def written(folder: Path, settings: object) -> str:
    file = folder / "mine.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    return f"mine={file}"


def test_a_variant_is_the_method_with_the_settings_of_its_file(tmp_path):
    text = written(tmp_path, {"method": "race", "ladder": [{"label": "only", "words": "safe", "radius": 0.5}]})
    race, mine = comparators("race", [text])
    assert (race.name, mine.name) == ("race", "mine")
    assert [move.label for move in mine.method.ladder] == ["only"]
    assert mine.settings != race.settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "race", "waves": 2}, "unknown setting; did you mean 'wave'"),
        ({"method": "rase"}, "unknown method 'rase'"),
        ({"wave": 2}, "does not say which method"),
        ([1], "no JSON object"),
    ],
)
def test_a_variant_that_cannot_be_used_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        comparators("race", [written(tmp_path, settings)])


@pytest.mark.parametrize("text", ["mine", "=mine.json", "a,b=mine.json", "mine=not-there.json"])
def test_a_variant_is_a_name_and_a_file(text):
    with pytest.raises(ConfigurationError, match="variant"):
        comparators("race", [text])


def test_a_variant_takes_no_methods_name(tmp_path):
    with pytest.raises(ConfigurationError, match="a name of its own"):
        comparators("noise", [written(tmp_path, {"method": "race"}).replace("mine=", "race=", 1)])
