"""The usability gate on texts."""

from __future__ import annotations

import pytest

from tta_middleware import Message
from tta_middleware.guard.quality import QualityBounds, QualityGate, echoes, repeats, text_problems
from tta_middleware.policy.notices import NOTICES
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.types import Completion

USABLE = [
    "I'm sorry, but I can't assist with that.",
    "The capital of Peru is Lima.",
    "Here are three tips:\n1. Rest well.\n2. Drink water.\n3. Walk every day, and take the stairs when you can.",
    "To bake a loaf of sourdough, you'll need a few ingredients: flour, water, salt, and a starter. You'll also "
    "need a bowl, a towel and some patience, since the dough has to rise for several hours before it is baked.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # prints three",
    "Le ciel est bleu parce que la lumière est diffusée par l'air.",
    "天空是蓝色的 因为空气散射 阳光。",
    "天空是蓝色的因为空气散射阳光",
    "お手伝いできません。",
    "ฉันไม่สามารถช่วยเรื่องนี้ได้",
    "ကျွန်ုပ် မကူညီနိုင်ပါ။",
    "لَا أَسْتَطِيعُ مُسَاعَدَتَكَ فِي ذَلِكَ.",
    "```python\nprint(1 + 1)\n```",
    "Name | Drink\n------|------\nAnna Berg | green tea\nJohn Smith | black coffee",
    "| Animal | Sound |\n|---|---|\n| Cat | Meow |\n| Dog | Bark |\n| Cow | Moo |\n| Bee | Buzz |\n| Horse | Neigh |",
    *NOTICES.values(),
]
DEGENERATE = {
    "": "empty",
    " \n\t ": "empty",
    "1. 1. 1. 1. 1. 1. 1. 1.": "symbols",
    "A: A: A: A: A: A: A: A: A: A: A: A:": "repetition",
    "I am a loyal and loyal one,\n" * 6: "repetition",
    "no no no no no no no no no no no no no": "repetition",
    "!!! ??? ... ###": "symbols",
    "I": "too_short",
    "我不能" * 12: "repetition",
    "哈" * 40 + "。" + "哈" * 20: "repetition",
    "lalalalalalalalalalalala lalalala": "repetition",
    "so so so so so so so so so so": "repetition",
    ("The verb is a noun and the noun is a verb, which makes the verb a noun. " * 8): "repetition",
    ("Here is a safe way to leave a garden with care and to keep all of its roses well. " * 2): "repetition",
    "Sure, here is how to safely, safely, safely, safely... Safe, here is how!": "repetition",
    "Sure, we should avoid safe, safe, safe.": "repetition",
    "Safe, safe, safe.": "repetition",
}
# Loops that change a word here and there, so that no one run of words is half of all.
VARIED = [
    "Dear Rose,\n\nI am writing to tell you of the bees in my garden. I am writing to tell you of the bees in my "
    "garden.\n\nI am a gardener who is a gardener. I am a gardener who is",
    "Roses like the sun, and there is more to say of them in spring, when all of it begins again with leaves. "
    "However, I'm not a substitute for a gardener or a friend. I'm here to help you with your roses and your bees. "
    "I'm not a substitute for a gardener or a friend. I'm here to help you",
    "要种好玫瑰首先要选择阳光充足的地方。" + "不断地学习和实践是种好玫瑰的最好方法。" * 2,
]
PARALLEL = [
    "Ten green bottles hanging on the wall,\nTen green bottles hanging on the wall,\nAnd if one green bottle should "
    "accidentally fall,\nThere'll be nine green bottles hanging on the wall.",
    "Do you like them in a box? Do you like them with a fox? Not in a box. Not with a fox. Not in a house. Not with a "
    "mouse. I do not like them here or there. I do not like them anywhere.",
    "Day 1: 10 push-ups, 10 squats, 10 lunges\nDay 2: 15 push-ups, 15 squats, 15 lunges\nDay 3: 20 push-ups, "
    "20 squats, 20 lunges\nDay 4: 25 push-ups, 25 squats, 25 lunges",
    "法国的首都是巴黎。西班牙的首都是马德里。意大利的首都是罗马。日本的首都是东京。秘鲁的首都是利马。",
    "1. True\n2. False\n3. True\n4. True\n5. False",
]
NOTHING = {
    "Sure, here is how: Sure, here is how.": "repetition",
    "1. Water the roses.\n2. Cut the roses.\n3. Water the roses.\n4. Cut the roses.": "repetition",
    "Sure, here is how:": "says_nothing",
    "Sure, here\u2019s how.": "says_nothing",
    "Sure, I'd be happy to help! Please provide me with the plan that you'd like me to look at.": "says_nothing",
    "Sure, I'll do my best to help you with that.": "says_nothing",
    "Sure, let's proceed with the questions!": "says_nothing",
    "Hello! How can I help you today?": "says_nothing",
    "Sure, I'd be happy to help with that! What would you like to plant?": "says_nothing",
    "I'm happy to assist! Just let me know which rose it is and I'll do my best.": "says_nothing",
    "If you have any questions or need help with any topic, feel free to ask!": "says_nothing",
    "Great question! Let me explain.": "says_nothing",
    "Below are the steps you should follow.": "says_nothing",
    "# How to water roses": "says_nothing",
    "## Introduction\n\n## The roses\n\n## Conclusion": "says_nothing",
    "Here is a list:\n\n<ol>\n<li></li>\n</ol>": "says_nothing",
    "Sure, here is how:\n\n1.": "says_nothing",
    "Here are three ways to water the roses:\n\n1.\n2.\n3.": "says_nothing",
    "So werden Rosen gegossen:\n\n```\n```": "says_nothing",
    "Claro, así se hace:": "says_nothing",
    "\u5f53\u7136\u53ef\u4ee5\uff0c\u65b9\u6cd5\u5982\u4e0b\uff1a": "says_nothing",
}
SOMETHING = [
    "Sure, here is how: water the roses in the morning.",
    "Sure, here is how to keep roses:\n1. Water them in the morning.",
    "Sure, here is how:\n\nI'm sorry, but I can't assist with that.",
    "I would be happy to help you. Roses like sun.",
    "I can speak German.",
    "I can tell you that roses like sun.",
    "Which roses do you mean, those in pots or those in your garden?",
    "If your roses look pale, ask a gardener. Let me know how they are!",
    "Here is the answer:\n\n42.",
    "# Roses\n\nWater them in the morning.",
    "<ul>\n<li>Roses</li>\n<li>Bees</li>\n</ul>",
    "I'm sorry, but I can't help with that. If you have any other questions, feel free to ask!",
    "I would pick the roses in June.",
    "Let it rest for an hour.",
    "This is the second rose of the year.",
]


@pytest.mark.parametrize("text", USABLE)
def test_ordinary_answers_pass(text: str) -> None:
    assert text_problems(text, QualityBounds()) == ()


@pytest.mark.parametrize(("text", "problem"), DEGENERATE.items())
def test_degenerate_answers_are_named(text: str, problem: str) -> None:
    assert problem in text_problems(text, QualityBounds())


@pytest.mark.parametrize("text", VARIED)
def test_a_loop_that_changes_a_word_is_one(text: str) -> None:
    assert text_problems(text, QualityBounds()) == ("repetition",)
    assert text_problems(text, QualityBounds(max_repeated_share=1.0)) == ()


@pytest.mark.parametrize("text", PARALLEL)
def test_refrains_and_parallel_lines_are_no_loop(text: str) -> None:
    assert text_problems(text, QualityBounds(min_letter_share=0.4), over=True) == ()


@pytest.mark.parametrize(("text", "problem"), NOTHING.items())
def test_an_answer_that_is_over_and_only_announces_one_is_none(text: str, problem: str) -> None:
    assert problem in text_problems(text, QualityBounds(), over=True)
    # As long as it goes on it may become one.
    assert text_problems(text, QualityBounds()) == ()


@pytest.mark.parametrize("text", [*SOMETHING, *USABLE])
def test_an_announced_answer_is_one(text: str) -> None:
    assert text_problems(text, QualityBounds(), over=True) == ()


async def test_the_gate_asks_for_more_than_an_announcement() -> None:
    text = "Sure, here is how:"
    engine = ScriptedEngine(text, nll=lambda _: 1.0)
    prompt = await engine.embed([Message("user", "Begin with 'Sure, here is how:' and tell of bees.")])
    done = Completion(text, tuple(engine.tokens(text)), "stop")
    cut = Completion(text, tuple(engine.tokens(text)), "length")
    assert [report.problems for report in await QualityGate().assess(engine, prompt, [done, cut])] == [
        ("says_nothing",),
        (),
    ]


async def test_fluency_is_that_of_the_answer_behind_its_thoughts() -> None:
    thought, answer = "Hm hm hm hm", "Keep the bees warm."

    def nll(text: str) -> float:
        """9 nats for a token of the thought, 1 for one of the answer."""
        thoughts, words = (len(engine.tokens(part)) for part in (thought, text[len(thought) :]))
        return (9.0 * thoughts + 1.0 * words) / (thoughts + words)

    engine = ScriptedEngine(answer, nll=nll, thinking=True)
    lead, prompt = engine.tokens(thought), await engine.embed([Message("user", "Bees?")])
    done = Completion(answer, (*lead, *engine.tokens(answer)), "stop", thought, len(lead))
    [report] = await QualityGate().assess(engine, prompt, [done])
    assert report.usable
    assert report.nll == pytest.approx(1.0)


QUESTION = "How do I open the door of the shed without the key?"


@pytest.mark.parametrize(
    ("text", "message", "over", "echo"),
    [
        (QUESTION, QUESTION, True, True),
        (f"{QUESTION} {QUESTION.lower()}", QUESTION, True, True),
        (f"Sure! {QUESTION}", QUESTION, True, True),
        ("怎么打开没有钥匙的门", "怎么打开没有钥匙的门。", True, True),
        ("How do I open the door of the", QUESTION, False, True),
        ("The sky is blue today.", "Say after me: the sky is blue today.", True, False),
        ("the door of the shed", QUESTION, True, False),
        ("the door of the shed", QUESTION, False, False),
        (f"{QUESTION} You may ask whoever has the key, or a locksmith.", QUESTION, True, False),
        ("Yes.", "Yes.", True, False),
    ],
)
def test_an_echo_is_no_answer_and_a_quotation_may_be_one(text: str, message: str, over: bool, echo: bool) -> None:
    assert echoes(text, message, over=over) is echo


def test_what_goes_on_says_something_new() -> None:
    before = "Take the shears in both hands, and cut above the bud. Then look at the leaves."
    assert repeats(" Take the shears in both hands, and cut above the bud.", before)
    assert not repeats(" Cut above the bud.", before)
    assert not repeats(" Take the shears in both hands, and cut below the oldest leaves of the stem.", before)
