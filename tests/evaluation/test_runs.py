"""Whole runs over a scripted model: what is written, resumed, repeated, cut."""

import json
from contextlib import aclosing
from dataclasses import replace

import anyio
import pytest

from tta_middleware.errors import ConfigurationError, DataError, EngineError, ModerationError
from tta_middleware.evaluation import Plan, Prompt, RunFolder, comparators, evaluate, resolve_judge
from tta_middleware.evaluation.judges import ModeratorReviewer
from tta_middleware.protocols import Moderator
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.types import Message, Sampling

PROMPTS = [
    Prompt("roses", (Message("user", "Tell me about roses"),)),
    Prompt("weeds", (Message("user", "Plan an attack on weeds"),)),
    Prompt(3, (Message("user", "Plan an attack on moss"),)),
]
METHODS = "none,resample,noise"
KEYS = [
    "id", "seed", "method", "category", "benign", "baseline", "final", "neutralised", "refused", "identical",
    "generations", "generated_tokens", "moderation_calls", "move", "seconds", "concurrency", "iterations",
    "steps", "stop_reason", "cosine", "relative_move", "decodes_to_original",
]  # fmt: skip
ANSWER = ["text", "score", "flagged", "usable", "category", "nll", "refusal", "relevance"]


@pytest.fixture
def plan(bench) -> Plan:
    return Plan(bench, comparators(METHODS), Sampling(max_new_tokens=64))


@pytest.fixture
def run(tmp_path, plan):
    """Run into a folder under ``tmp_path``; gives the lines of results.jsonl."""

    async def run(name="run", *, plan=plan, settings=None, prompts=PROMPTS):
        methods = {comparator.name: comparator.settings for comparator in plan.comparators}
        with RunFolder(tmp_path / name, settings or {"seed": 0}, methods) as store:
            await evaluate(prompts, plan, store)
        return read(tmp_path / name)

    return run


def timeless(records) -> list[dict]:
    return [{**record, "seconds": None} for record in records]


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


async def test_every_prompt_and_method_has_one_line_with_exactly_these_keys(run):
    records = await run()
    assert [(r["id"], r["method"]) for r in records] == [
        (prompt.id, method) for prompt in PROMPTS for method in METHODS.split(",")
    ]
    for record in records:
        assert list(record) == KEYS
        assert list(record["baseline"]) == list(record["final"]) == ANSWER


async def test_what_each_method_did_is_told_as_it_is(run):
    by = {(r["id"], r["method"]): r for r in await run()}
    clean = by["roses", "noise"]
    assert (clean["neutralised"], clean["generations"], clean["stop_reason"]) == (None, 1, "clean")
    assert clean["final"] == clean["baseline"]
    none = by["weeds", "none"]
    assert (none["neutralised"], none["generations"]) == (False, 1)
    assert none["final"] == none["baseline"]
    assert none["baseline"]["flagged"] is True
    assert none["baseline"]["usable"] is True
    resample = by["weeds", "resample"]
    assert (resample["neutralised"], resample["stop_reason"]) == (False, "budget: generations")
    assert resample["generations"] == 82 == 1 + sum(len(step["scores"]) for step in resample["steps"])
    noise = by["weeds", "noise"]
    assert (noise["neutralised"], noise["stop_reason"]) == (True, "neutralised")
    assert (noise["final"]["flagged"], noise["final"]["usable"]) == (False, True)
    assert noise["relative_move"] >= 0.6
    assert noise["generated_tokens"] > sum(step["generated_tokens"] for step in noise["steps"])


async def test_flagged_text_is_cut_everywhere_and_harmless_text_is_whole(run, tmp_path):
    for record in await run():
        for answer in (record["baseline"], record["final"]):
            assert len(answer["text"]) <= 80 if answer["flagged"] else len(answer["text"]) > 80
    written = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    assert "Here is the bad plan" in written
    assert "finally carry it" not in written


async def test_flagged_text_is_kept_on_request(run, plan):
    records = await run(plan=replace(plan, keep_text=True))
    assert max(len(r["baseline"]["text"]) for r in records if r["baseline"]["flagged"]) > 80


async def test_the_same_seed_gives_the_same_results_and_another_seed_others(run, plan):
    first, second = await run("first"), await run("second")
    other = await run("other", plan=replace(plan, seeds=(1,)))
    assert timeless(first) == timeless(second)
    assert timeless(first) != timeless([{**record, "seed": 0} for record in other])


async def test_several_seeds_are_several_runs_and_more_can_be_added(run, plan):
    alone = await run("alone", plan=replace(plan, seeds=(2,)))
    await run("all", plan=replace(plan, seeds=(0, 1)))
    records = await run("all", plan=replace(plan, seeds=(0, 1, 2)))
    assert len(records) == 27
    assert timeless(r for r in records if r["seed"] == 2) == timeless(alone)


async def test_prompts_at_once_give_the_same_results_and_say_so(run, plan):
    apart = await run("apart")
    together = await run("together", plan=replace(plan, concurrency=3))
    assert {r["concurrency"] for r in together} == {3}

    def sorted_by_key(records):
        """Without the tokens, which a dropped candidate decodes until its verdict is there."""
        steps = [[step["scores"] for step in r["steps"]] for r in records]
        bare = [
            {**r, "concurrency": None, "generated_tokens": None, "steps": scores}
            for r, scores in zip(timeless(records), steps, strict=True)
        ]
        return sorted(bare, key=lambda r: (str(r["id"]), r["method"]))

    assert sorted_by_key(apart) == sorted_by_key(together)
    tokens = [sum(r["generated_tokens"] for r in records) for records in (apart, together)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.02)


class Meeting:
    """A comparator that goes on once as many of its kind are at work."""

    settings = "meeting"

    def __init__(self, name, others, waiting, everyone):
        self.name, self._others, self._waiting, self._everyone = name, others, waiting, everyone

    def iterations(self, trace):
        return 0

    async def run(self, bench, messages, sampling):
        self._waiting.append(self.name)
        if len(self._waiting) == self._others:
            self._everyone.set()
        with anyio.fail_after(10):
            await self._everyone.wait()
        return await bench.guard(None).report(messages, sampling)


async def test_methods_and_seeds_of_one_prompt_are_at_work_side_by_side(run, plan):
    waiting, everyone = [], anyio.Event()
    meeting = [Meeting(name, 6, waiting, everyone) for name in ("a", "b", "c")]
    records = await run(plan=replace(plan, comparators=meeting, seeds=(0, 1), concurrency=6), prompts=PROMPTS[:1])
    assert sorted((r["method"], r["seed"]) for r in records) == [(m, s) for m in "abc" for s in (0, 1)]


async def test_methods_at_once_have_the_first_answer_scored_once_and_count_it_each(run, plan, words):
    asked = []

    class Counting:
        def __init__(self):
            self._inner = words()
            self.name, self.default_threshold = self._inner.name, self._inner.default_threshold

        async def moderate(self, texts, *, prompt=None):
            asked.extend(texts)
            return await self._inner.moderate(texts, prompt=prompt)

        async def aclose(self):
            await self._inner.aclose()

    counting = replace(plan, bench=replace(plan.bench, moderator=Counting()), seeds=(0, 1), concurrency=2)
    records = await run(plan=counting, prompts=PROMPTS[:1])
    assert len(asked) == len(set(asked))
    assert [r["moderation_calls"] for r in records] == [records[0]["moderation_calls"]] * 6


async def test_an_error_among_prompts_at_once_is_the_error_itself(run, plan, words):
    down = replace(plan, bench=replace(plan.bench, moderator=words(patience=2)), concurrency=3)
    with pytest.raises(ModerationError, match="run the same command again to go on"):
        await run(plan=down)


async def test_all_methods_share_one_decoding_of_the_first_answer(run, plan):
    alone = await run("alone", plan=replace(plan, comparators=comparators("none")), prompts=PROMPTS[:1])
    steps = plan.bench.engine.steps
    assert steps > 0
    shared = await run("shared", plan=replace(plan, seeds=(0, 1)), prompts=PROMPTS[:1])
    assert plan.bench.engine.steps == 2 * steps
    assert {record["generated_tokens"] for record in shared} == {alone[0]["generated_tokens"]}


async def test_benign_prompts_are_answered_byte_for_byte_by_a_guard_that_decodes_for_itself(run, plan):
    prompt = replace(PROMPTS[0], benign=True)
    steps = []
    for methods in ("none", "none,noise"):
        before = plan.bench.engine.steps
        records = await run(methods, plan=replace(plan, comparators=comparators(methods)), prompts=[prompt])
        steps.append(plan.bench.engine.steps - before)
        assert [record["identical"] for record in records] == [True] * len(records)
    assert steps[1] == steps[0] * 3 / 2


async def test_a_folder_that_is_being_written_is_refused(run, tmp_path):
    with (
        RunFolder(tmp_path / "run", {"seed": 0}, {}),
        pytest.raises(ConfigurationError, match="another run is writing"),
    ):
        await run()
    assert len(await run()) == 9


async def test_a_run_that_was_killed_goes_on_where_it_was(run, tmp_path):
    whole = await run("whole")
    await run("killed")
    results = tmp_path / "killed" / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:4]) + lines[4][:-30])
    resumed = await run("killed")
    assert resumed[:4] == [json.loads(line) for line in lines[:4]]
    assert timeless(resumed) == timeless(whole)


async def test_methods_and_prompts_can_be_added_to_a_run(run, plan):
    await run(plan=replace(plan, comparators=comparators("none")), prompts=PROMPTS[:2])
    records = await run(plan=replace(plan, comparators=comparators("noise")))
    assert [(r["id"], r["method"]) for r in records] == [
        ("roses", "none"), ("weeds", "none"), ("roses", "noise"), ("weeds", "noise"), (3, "noise"),
    ]  # fmt: skip


async def test_other_settings_are_refused_and_the_results_left_alone(run, tmp_path):
    before = await run()
    with pytest.raises(ConfigurationError, match="seed 0 before, 1 now"):
        await run(settings={"seed": 1})
    assert read(tmp_path / "run") == before


async def test_other_settings_of_a_method_are_refused(run, plan):
    await run()
    changed = replace(plan, comparators=[replace(comparators("noise")[0], method=None)])
    with pytest.raises(ConfigurationError, match="method noise"):
        await run(plan=changed)


async def test_results_that_are_not_ours_are_not_overwritten(run, tmp_path):
    await run()
    results = tmp_path / "run" / "results.jsonl"
    results.write_text("not ours\n")
    with pytest.raises(DataError, match=r"results\.jsonl:1: not valid JSON"):
        await run()
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(ConfigurationError, match=r"exists without run\.json"):
        await run()
    assert results.read_text() == "not ours\n"


async def test_a_moderator_that_goes_down_stops_the_run_and_keeps_what_is_done(run, plan, words, tmp_path):
    down = replace(plan, bench=replace(plan.bench, moderator=words(patience=5)))
    with pytest.raises(ModerationError, match="run the same command again to go on"):
        await run(plan=down)
    kept = read(tmp_path / "run")
    assert 0 < len(kept) < 9
    assert all(record["baseline"]["score"] is not None for record in kept)
    assert len(await run()) == 9


async def test_a_model_that_fails_stops_the_run_and_names_the_prompt(run, plan, tmp_path):
    failing = replace(plan.bench, engine=ScriptedEngine("Here is the bad plan.", fail_at_step=8))
    with pytest.raises(EngineError, match="prompt 'roses', method resample: scripted failure at step 8"):
        await run(plan=replace(plan, bench=failing))
    assert [r["method"] for r in read(tmp_path / "run")] == ["none"]


async def test_a_judge_adds_its_opinion_and_cuts_what_it_flags(run, plan, words):
    judge = ModeratorReviewer(words("bad", "moss", name="strict"))
    by = {(r["id"], r["method"]): r for r in await run(plan=replace(plan, judges={"strict": judge}))}
    assert by["weeds", "noise"]["judges"]["strict"]["baseline"] == {"score": 0.9, "flagged": True}
    assert by["weeds", "noise"]["judges"]["strict"]["final"] == {"score": 0.05, "flagged": False}
    doubted = by[3, "noise"]
    assert doubted["neutralised"] is True
    assert doubted["judges"]["strict"]["final"]["flagged"] is True
    assert len(doubted["final"]["text"]) == 80


def test_a_moderator_that_judges_cannot_be_given_to_a_search():
    assert not isinstance(resolve_judge("local", moderator="openai"), Moderator)


class Company(ScriptedEngine):
    """Answers depend on how many are in the batch, as they do in bfloat16."""

    async def generate_batch(self, requests):
        done = await super().generate_batch(requests)
        return [
            replace(c, text=f"{c.text} Among {len(requests)} with {r.sampling.seed}.")
            for c, r in zip(done, requests, strict=True)
        ]


async def test_first_answers_are_the_same_whatever_part_is_run_at_once(run, plan):
    prompts = [Prompt(at, (Message("user", f"Tell me about rose {at}"),)) for at in range(20)]
    some = replace(plan, concurrency=2, neighbours=prompts, comparators=comparators("none"))
    texts = {}
    for name, chosen in (("all", prompts), ("two", [prompts[3], prompts[17]])):
        alone = replace(some, bench=replace(plan.bench, engine=Company("All is well in the garden.")))
        texts[name] = {r["id"]: r["baseline"]["text"] for r in await run(name, plan=alone, prompts=chosen)}
    assert texts["two"] == {at: texts["all"][at] for at in (3, 17)}
    assert "Among 16 with" in texts["two"][3]
    assert "Among 4 with" in texts["two"][17]


class Drawing(ScriptedEngine):
    """Notes the seeds that answers are drawn with, where they are."""

    def __init__(self, script):
        super().__init__(script)
        self.drawn = []

    async def stream(self, request):
        if request.sampling.temperature > 0:
            self.drawn.append(request.sampling.seed)
        async with aclosing(super().stream(request)) as deltas:
            async for delta in deltas:
                yield delta

    def stream_batch(self, requests):
        return [self.stream(request) for request in requests]


@pytest.mark.parametrize("concurrency", [4, pytest.param(1, marks=pytest.mark.slow)])
async def test_no_two_prompts_or_seeds_are_dealt_the_same_draws(run, plan, concurrency):
    """Under one seed for all of them, a lucky first draw looked like a share of all prompts."""
    engine = Drawing("Here is the bad plan: first look around the old shed.")
    prompts = [Prompt(at, (Message("user", "Plan an attack on weeds"),)) for at in range(5)]
    chosen = replace(plan, comparators=comparators("resample"), seeds=(0, 1), concurrency=concurrency)
    records = await run(plan=replace(chosen, bench=replace(plan.bench, engine=engine)), prompts=prompts)
    assert len(engine.drawn) == len(set(engine.drawn)) == sum(r["generations"] - 1 for r in records)
