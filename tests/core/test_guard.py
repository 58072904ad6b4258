"""The guard's two promises, on a scripted engine and moderators that fail in every way they can."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import count
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware import TSA, Budget, Guard, Message, Noise, Policy, QualityBounds, QualityGate, Repair, Resample
from tta_middleware.errors import (
    ConfigurationError,
    EmptyPromptError,
    EngineError,
    InvalidVerdictError,
    ModerationError,
    ModerationRejectedError,
    ModerationUnavailableError,
    UnsafeAnswerError,
)
from tta_middleware.guard.moderated import moderated
from tta_middleware.methods import Needs, Start
from tta_middleware.methods.base import Method
from tta_middleware.policy import StagePolicies
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator
from tta_middleware.types import GuardedAnswer, TextDelta, Verdict

HARM = "Certainly, here is how to do the forbidden thing in four steps."
SAFE = "I would rather help you find a lawful way to do that."
BABBLE = "one one one one one one one one one one one one one one"
ASK = [Message("user", "Please tell me how to do the thing")]


def words(fail: Callable[[int], ModerationError | None] = lambda call: None) -> ScriptedModerator:
    """Scores a text by its words; ``fail`` says what a call, counted from 1, raises."""
    return ScriptedModerator(
        score=lambda text: {"illicit": 0.9 if "forbidden" in text else 0.1, "hate": 0.01}, failures=map(fail, count(1))
    )


def far_is_safe(call: ScriptedCall) -> str:
    """Harmful near the prompt, babble a little further out, a usable refusal beyond."""
    return HARM if call.moved < 0.6 else BABBLE if call.moved < 0.8 else SAFE


def guard(
    script: Any = HARM,
    moderator: ScriptedModerator | None = None,
    *,
    method: Method | None = None,
    policy: Policy | None = None,
    **repair: Any,
) -> tuple[Guard, ScriptedEngine, ScriptedModerator]:
    engine, moderator = ScriptedEngine(script), moderator or words()
    settings = Repair(method=method, **repair)
    return Guard(engine, moderator, policy=policy, repair=settings), engine, moderator


async def ask(made: tuple[Guard, ScriptedEngine, ScriptedModerator]) -> GuardedAnswer:
    return await made[0].answer(ASK)


async def test_a_safe_answer_is_passed_on_unchanged() -> None:
    answer = await ask(guard(SAFE, method=Noise()))
    assert answer.text == SAFE
    assert answer.finish_reason == "stop"
    assert (answer.trace.outcome, answer.trace.generations, answer.trace.moderation_calls) == ("clean", 1, 1)


async def test_a_flagged_answer_is_repaired_into_a_safe_and_usable_one() -> None:
    answer = await ask(guard(far_is_safe, method=Noise()))
    trace = answer.trace
    assert answer.text == SAFE
    assert trace.outcome == trace.stop_reason == "neutralised"
    assert trace.baseline is not None
    assert trace.baseline.flagged
    assert trace.final is not None
    assert trace.final.usable
    assert not trace.final.flagged
    assert trace.relative_move >= 0.8
    assert 0.0 < trace.cosine < 1.0
    assert trace.generations == 1 + sum(len(step.scores) for step in trace.steps)
    assert trace.moderation_calls >= 1 + len(trace.steps)


async def test_the_text_that_was_checked_is_the_text_that_is_given_out() -> None:
    made = guard(far_is_safe, method=Noise())
    answer = await ask(made)
    assert answer.text in made[2].calls[-1]


async def test_safe_babble_is_not_called_neutralised() -> None:
    made = guard(lambda call: HARM if call.moved == 0 else BABBLE, method=Noise(), budget=Budget(generations=7))
    answer = await ask(made)
    assert answer.text == Policy().notice
    assert (answer.trace.outcome, answer.trace.stop_reason) == ("blocked", "budget: generations")
    assert answer.trace.final is not None
    assert not answer.trace.final.flagged
    assert answer.trace.final.problems == ("repetition",)


async def test_the_papers_method_stops_at_a_safe_base_point_even_if_it_babbles() -> None:
    """Faithful to the paper; the guard still calls it a failure."""
    answer = await ask(guard(lambda call: HARM if call.moved < 0.3 else BABBLE, method=TSA(mu=0.3, eta=1.0)))
    assert answer.trace.stop_reason == "optimiser: base point under the threshold"
    assert answer.trace.outcome == "blocked"
    assert answer.text == Policy().notice


async def test_probes_of_the_papers_method_are_never_given_out() -> None:
    seen: list[float] = []

    def script(call: ScriptedCall) -> str:
        seen.append(call.moved)
        return HARM if len(seen) % 9 == 1 else SAFE  # every base point is harmful, every probe is safe

    answer = await ask(guard(script, method=TSA(steps=3)))
    assert len(seen) == 19
    assert answer.trace.outcome == "blocked"


async def test_unfluent_text_is_not_usable() -> None:
    engine = ScriptedEngine(lambda call: HARM if call.moved == 0 else SAFE, nll=lambda text: 9.0)
    made = Guard(engine, words(), repair=Repair(method=Noise(), budget=Budget(generations=20)))
    answer = await made.answer(ASK)
    assert answer.trace.outcome == "blocked"
    assert answer.trace.final is not None
    assert answer.trace.final.problems == ("not_fluent",)


async def test_an_unknown_fluency_is_not_usable() -> None:
    engine = ScriptedEngine(far_is_safe, nll=lambda text: float("nan"))
    made = Guard(engine, words(), repair=Repair(method=Noise(), budget=Budget(generations=20)))
    assert (await made.answer(ASK)).trace.outcome == "blocked"


async def test_bounds_of_the_gate_can_be_set() -> None:
    quality = QualityGate(QualityBounds(max_repeated_share=1.0, max_compression=50.0, max_nll=50.0))
    engine = ScriptedEngine(lambda call: HARM if call.moved == 0 else BABBLE)
    answer = await Guard(engine, words(), quality=quality, repair=Repair(method=Noise())).answer(ASK)
    assert answer.text == BABBLE


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (Budget(generations=4), "generations"),
        (Budget(generated_tokens=60), "generated_tokens"),
        (Budget(moderation_calls=3), "moderation_calls"),
    ],
)
async def test_the_budget_ends_the_search(budget: Budget, reason: str) -> None:
    answer = await ask(guard(HARM, method=Resample(), budget=budget))
    assert answer.trace.stop_reason == f"budget: {reason}"
    assert answer.trace.generations <= budget.generations
    assert answer.text == Policy().notice
    assert answer.finish_reason == "content_filter"


async def test_seconds_cut_a_decode_that_hangs() -> None:
    """The engine's sleeper never returns after the first answer; the budget's clock does."""
    engine = ScriptedEngine(HARM)

    async def hang_later(_seconds: float) -> None:
        if engine.steps > 14:
            await anyio.sleep_forever()

    engine.sleep = hang_later
    made = Guard(engine, words(), repair=Repair(method=Resample(), budget=Budget(seconds=0.2)))
    answer = await made.answer(ASK)
    assert answer.trace.stop_reason == "budget: seconds"
    assert answer.text == Policy().notice


async def test_seconds_cut_the_first_answer_too() -> None:
    async def hang(_seconds: float) -> None:
        await anyio.sleep_forever()

    made = Guard(ScriptedEngine(SAFE, sleep=hang), words(), repair=Repair(budget=Budget(seconds=0.1)))
    answer = await made.answer(ASK)
    assert (answer.trace.stop_reason, answer.trace.outcome, answer.text) == (
        "budget: seconds",
        "blocked",
        Policy().notice,
    )


FAILURES = [ModerationUnavailableError("down"), ModerationRejectedError("no key"), InvalidVerdictError("NaN")]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
async def test_an_answer_that_could_not_be_scored_is_withheld(error: Exception) -> None:
    answer = await ask(guard(SAFE, words(lambda call: error), method=Noise()))
    assert answer.text == Policy().notice
    assert answer.trace.stop_reason == f"moderator: {type(error).__name__}"
    assert answer.trace.outcome == "blocked"


async def test_an_open_policy_lets_an_unscored_answer_pass_and_says_so() -> None:
    answer = await ask(guard(SAFE, words(lambda call: FAILURES[0]), policy=Policy(on_error="open")))
    assert answer.text == SAFE
    assert answer.trace.outcome == "unchecked"
    assert answer.trace.stop_reason == "moderator: ModerationUnavailableError, passed by policy"
    assert answer.trace.final is None


async def test_an_open_policy_never_lets_a_repair_pass_unscored() -> None:
    made = guard(far_is_safe, words(lambda call: FAILURES[0] if call > 1 else None), method=Noise(),
                 policy=Policy(on_error="open"))  # fmt: skip
    assert (await ask(made)).text == Policy().notice


async def test_a_repair_passes_unscored_only_where_its_own_policy_says_so() -> None:
    closed = Policy()
    stages = StagePolicies(prompt=closed, output=closed, repair=Policy(on_error="open"))
    moderator = words(lambda call: FAILURES[0] if call > 1 else None)
    engine = ScriptedEngine(lambda call: HARM if call.moved == 0 else SAFE)
    answer = await Guard(engine, moderator, policy=stages, repair=Repair(method=Noise())).answer(ASK)
    assert (answer.text, answer.trace.outcome) == (SAFE, "unchecked")
    assert answer.trace.final is None
    assert answer.trace.relative_move > 0.0
    assert answer.trace.stop_reason == "moderator: ModerationUnavailableError, passed by policy"


async def test_a_repair_may_have_stricter_thresholds_than_the_first_answer() -> None:
    stages = StagePolicies(prompt=Policy(), output=Policy(threshold=0.5), repair=Policy(threshold=0.05))
    engine = ScriptedEngine(lambda call: HARM if call.moved == 0 else SAFE)
    repair = Repair(method=Noise(), budget=Budget(generations=5))
    answer = await Guard(engine, words(), policy=stages, repair=repair).answer(ASK)
    assert answer.trace.outcome == "blocked"
    assert answer.trace.final is not None
    assert answer.trace.final.flagged


async def test_an_unmoved_answer_is_reported_by_the_output_policy() -> None:
    stages = StagePolicies(prompt=Policy(), output=Policy(threshold=0.5), repair=Policy(threshold=0.05))
    report = await Guard(ScriptedEngine(SAFE), words(), policy=stages).report(ASK, judge_all=True)
    assert report.answer.trace.final == report.answer.trace.baseline
    assert report.answer.trace.final is not None
    assert not report.answer.trace.final.flagged


async def test_a_shadow_category_is_reported_and_not_enforced() -> None:
    answer = await ask(guard(HARM, policy=Policy(shadow=("illicit",))))
    assert answer.text == HARM
    assert answer.trace.baseline is not None
    assert answer.trace.baseline.shadowed == ("illicit",)
    assert answer.trace.baseline.category == "hate"


async def test_too_few_verdicts_are_an_error_not_a_pass() -> None:
    class Short(ScriptedModerator):
        async def moderate(self, texts: Sequence[str], *, prompt: str | None = None) -> list[Verdict]:
            return []

    answer = await ask(guard(HARM, Short()))
    assert answer.text == Policy().notice
    assert answer.trace.stop_reason == "moderator: InvalidVerdictError"


async def test_the_fallback_may_raise_and_brings_the_trace() -> None:
    with pytest.raises(UnsafeAnswerError, match="no repair method") as caught:
        await ask(guard(HARM, fallback="raise"))
    assert caught.value.trace is not None
    assert caught.value.trace.outcome == "blocked"
    assert "forbidden" not in str(caught.value)


def says(text: str) -> Callable[[Sequence[Message]], Awaitable[str]]:
    async def fallback(messages: Sequence[Message]) -> str:
        return text

    return fallback


async def test_a_fallback_of_the_users_is_moderated_like_any_other_text() -> None:
    assert (await ask(guard(HARM, fallback=says("Ask the help desk.")))).text == "Ask the help desk."
    assert (await ask(guard(HARM, fallback=says(HARM)))).text == Policy().notice


async def test_a_fallback_that_gives_no_text_or_is_not_async_says_so() -> None:
    for fallback, said in (
        (lambda messages: "Ask the help desk.", "a guard's fallback is an async function"),
        (says(None), "a guard's fallback gives a text, not NoneType"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigurationError, match=said):
            await ask(guard(HARM, fallback=fallback))


def fails(error: Exception) -> Callable[[Sequence[Message]], Awaitable[str]]:
    async def fallback(messages: Sequence[Message]) -> str:
        raise error

    return fallback


async def test_an_error_of_a_fallback_is_moderated_like_its_text() -> None:
    with pytest.raises(ConnectionError, match="nobody here"):
        await ask(guard(HARM, fallback=fails(ConnectionError("nobody here"))))
    with pytest.raises(
        EngineError, match=r"the fallback failed with ValueError \(test_guard\.py:\d+\); its message is withheld"
    ):
        await ask(guard(HARM, fallback=fails(ValueError(f"no JSON: {HARM}"))))


class BreaksAt(ScriptedEngine):
    """Fails in the stream of that number, after its first piece; its error says something."""

    def __init__(self, script: str, said: str, number: int = 1) -> None:
        super().__init__(script)
        self._said, self._left = said, number

    async def stream(self, *args: Any, **options: Any) -> AsyncGenerator[TextDelta, None]:
        self._left -= 1
        breaks = not self._left
        async for piece in super().stream(*args, **options):
            yield piece
            if breaks:
                raise ValueError(self._said)


class BreaksAsItSearches:
    """A method of the user's whose error quotes what it was told."""

    name, needs = "breaks", Needs()

    def build(self, start: Start) -> Any:
        raise ValueError(HARM)


async def test_an_error_of_a_part_of_the_users_is_moderated_like_a_text() -> None:
    def parts(engine: ScriptedEngine, method: Method) -> Any:
        return Guard(engine, words(), repair=Repair(method)), None, None

    with pytest.raises(ValueError, match="out of paper"):
        await ask(parts(BreaksAt(SAFE, "out of paper"), Noise()))
    withheld = r"the engine, method or quality gate failed with ValueError \(test_guard\.py:\d+\); its message is withh"
    for broken in (
        parts(BreaksAt(SAFE, HARM), Noise()),
        parts(BreaksAt(HARM, HARM, 2), Noise()),
        parts(ScriptedEngine(HARM), BreaksAsItSearches()),
    ):
        with pytest.raises(EngineError, match=withheld) as failed:
            await ask(broken)
        assert failed.value.__cause__ is None


async def test_a_fallback_that_cannot_be_scored_is_withheld() -> None:
    moderator = words(lambda call: FAILURES[0] if call > 1 else None)
    assert (await ask(guard(HARM, moderator, fallback=says("anything")))).text == Policy().notice


async def test_an_engine_failure_reaches_the_caller() -> None:
    engine = ScriptedEngine(SAFE, fail_at_step=3)
    with pytest.raises(EngineError, match="step 3"):
        await Guard(engine, words()).answer(ASK)


async def test_cancelling_stops_decoding_and_is_not_swallowed() -> None:
    engine = ScriptedEngine(HARM)
    guarded = Guard(engine, words(), repair=Repair(method=Resample(), budget=Budget(generations=10_000)))
    finished = False

    async def ask_for_ever() -> None:
        nonlocal finished
        await guarded.answer(ASK)
        finished = True

    async with anyio.create_task_group() as group:
        group.start_soon(ask_for_ever)
        while engine.steps < 40:
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    stopped_at = engine.steps
    await anyio.lowlevel.checkpoint()
    assert not finished
    assert engine.steps == stopped_at


async def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(EmptyPromptError):
        await Guard(ScriptedEngine(SAFE), words()).answer([Message("user", "  ")])


async def test_instructions_alone_are_asked_as_a_users_words_and_checked_as_such() -> None:
    def answers(call: ScriptedCall) -> str:
        return f"You said {call.text}"

    talk = [Message("system", "Be kind."), Message("system", "Tell me of roses."), Message("assistant", "Well.")]
    guard = Guard(ScriptedEngine(answers), words(), prompt_check="user")
    assert (await guard.answer(talk)).text == "You said Tell me of roses."
    refused = await guard.answer([Message("system", "A forbidden thing.")])
    assert (refused.trace.outcome, refused.trace.generations) == ("blocked", 1)
    assert "forbidden" not in refused.text
    with pytest.raises(EmptyPromptError):
        await guard.answer([Message("assistant", "Well.")])


@pytest.mark.parametrize(
    "talk", ["Hello", {"role": "user", "content": "Hello"}, [{"role": "user"}], [("user", "Hello")]]
)
async def test_other_forms_of_a_conversation_are_refused_with_what_to_give(talk: Any) -> None:
    guard = Guard(ScriptedEngine("Hello."), ScriptedModerator())
    with pytest.raises(ConfigurationError, match="list of Message"):
        await guard.answer(talk)
    with pytest.raises(ConfigurationError, match="list of Message"):
        [event async for event in guard.stream(talk)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt_check": "usr"}, "prompt_check is one of off, user, all, not 'usr'"),
        ({"repair": "noise"}, "repair is Repair"),
        ({"windows": {"first": 3}}, "windows is Windows"),
        ({"reasoning": "hide"}, "reasoning is Reasoning"),
    ],
)
def test_settings_of_other_kinds_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Guard(ScriptedEngine("-"), ScriptedModerator(), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "noise"}, "method is an object"),
        ({"budget": 3}, "budget is Budget"),
        ({"fallback": "shrug"}, "fallback is one of refuse, raise, or an async function"),
        ({"prefer": "best"}, "prefer is one of helpful, first"),
    ],
)
def test_a_repair_of_other_kinds_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Repair(**settings)


async def test_sampling_and_a_missing_method_are_told_in_words() -> None:
    with pytest.raises(ConfigurationError, match="sampling is Sampling"):
        await Guard(ScriptedEngine("-"), ScriptedModerator()).answer(ASK, {"seed": 3})  # type: ignore[arg-type]
    blocked = Guard(ScriptedEngine(HARM), words(), repair=Repair(method=None, fallback="raise"))
    with pytest.raises(UnsafeAnswerError, match="there is no repair method; choose one"):
        await blocked.answer(ASK)


class Letters:
    """An endless source that is no generator, and is closed as a response is."""

    def __init__(self) -> None:
        self.closed = self.stopped = False

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            while True:
                yield "la "
        finally:
            self.stopped = True

    async def aclose(self) -> None:
        self.closed = True


async def test_a_moderated_stream_that_is_left_closes_whatever_source_it_had() -> None:
    source = Letters()
    async with aclosing(moderated(source, ScriptedModerator())) as pieces:
        await anext(pieces)
    assert source.stopped
    assert source.closed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": ["a", "b"]}, "async iterable of texts, not list"),
        ({"moderator": "local"}, "a moderator is an object here"),
        ({"moderator": object()}, "is no Moderator"),
        ({"windows": 3}, "windows is Windows"),
        ({"policy": "strict"}, "a policy is a threshold"),
    ],
)
async def test_a_moderated_stream_says_what_it_takes(given: dict[str, Any], said: str) -> None:
    async def texts() -> AsyncIterator[str]:
        yield "All is well."

    parts: dict[str, Any] = {"source": texts(), "moderator": ScriptedModerator(), "policy": 0.3}
    assert [text async for text in moderated(**parts)] == ["All is well."]
    with pytest.raises(ConfigurationError, match=said):
        [text async for text in moderated(**parts | {"source": texts()} | given)]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("smollm2", ScriptedModerator()), "takes parts, not names"),
        ((ScriptedEngine("-"), "local"), "takes parts, not names"),
        ((None, ScriptedModerator()), "is no Engine"),
        ((ScriptedEngine("-"), print), "PlainModerator"),
    ],
)
def test_what_is_no_part_is_refused(parts: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Guard(*parts)


def test_trio_is_told_what_to_do_instead() -> None:
    trio = pytest.importorskip("trio")
    guard = Guard(ScriptedEngine("Hello."), ScriptedModerator())
    with pytest.raises(ConfigurationError, match=r"trio\.to_thread"):
        trio.run(guard.answer, [Message("user", "Hello")])

    async def stream() -> None:
        async for _ in guard.stream([Message("user", "Hello")]):
            pass

    with pytest.raises(ConfigurationError, match=r"trio\.to_thread"):
        trio.run(stream)


async def test_equal_seeds_give_equal_repairs() -> None:
    first = await ask(guard(far_is_safe, method=Noise(), seed=5))
    again = await ask(guard(far_is_safe, method=Noise(), seed=5))
    other = await ask(guard(far_is_safe, method=Noise(), seed=6))
    assert (first.text, first.trace.cosine) == (again.text, again.trace.cosine)
    assert first.trace.cosine != other.trace.cosine


async def test_every_generation_has_a_seed_of_its_own() -> None:
    seeds: list[int] = []

    def script(call: ScriptedCall) -> str:
        seeds.append(call.seed)
        return HARM

    await ask(guard(script, method=Resample(wave=3), budget=Budget(generations=8)))
    assert len(set(seeds)) == len(seeds) == 8


async def test_a_report_judges_the_first_answer_too() -> None:
    made = guard(BABBLE)[0]
    plain, judged = await made.report(ASK), await made.report(ASK, judge_all=True)
    assert plain.answer.trace.baseline is not None
    assert plain.answer.trace.baseline.usable is None
    assert judged.answer.trace.baseline is not None
    assert judged.answer.trace.baseline.usable is False
    assert plain.answer.text == judged.answer.text == BABBLE


WAYS = st.sampled_from([HARM, SAFE, BABBLE, "forbidden", "", "forbidden fruit " * 9])
FAULTS = st.sets(st.integers(1, 6), max_size=3)


@given(st.lists(WAYS, min_size=1, max_size=8), FAULTS, st.sampled_from([None, Noise(), Resample(), TSA(probes=2)]))
def test_no_flagged_text_ever_leaves(answers: list[str], faults: set[int], method: Method | None) -> None:
    """Whatever the model says and whichever moderation calls fail."""
    said: list[str] = []

    def script(call: ScriptedCall) -> str:
        said.append(answers[len(said) % len(answers)])
        return said[-1]

    moderator = words(lambda call: FAILURES[call % 3] if call in faults else None)
    made = guard(script, moderator, method=method, budget=Budget(generations=12))
    answer = anyio.run(ask, made)
    assert "forbidden" not in answer.text
    checked = {text for number, texts in enumerate(moderator.calls, 1) if number not in faults for text in texts}
    assert answer.text == Policy().notice or answer.text in checked
    if answer.trace.outcome == "neutralised":
        assert answer.text == SAFE
