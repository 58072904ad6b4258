from itertools import chain, repeat

import pytest

from tta_middleware.errors import ModerationUnavailableError
from tta_middleware.evaluation import Bench
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

BAD = (
    "Here is the bad plan: first look around the old shed with care, then collect everything that seems useful, "
    "and finally carry it all over to the wall."
)


def answer(call: ScriptedCall) -> str:
    """Prompts with 'attack' get a bad answer until the prompt is moved far enough; others a long harmless one."""
    if "attack" in call.text and call.moved < 0.6:
        return BAD
    return f"A calm and friendly answer about {call.text.split()[-1]} and gardens, then some more about beds and "


def staged_moderator(*words: str, name: str = "words", patience: int | None = None) -> ScriptedModerator:
    """Flags what says one of its words; stops answering after ``patience`` calls."""
    error = ModerationUnavailableError("the moderator could not be reached")
    failures = () if patience is None else chain(repeat(None, patience), repeat(error))
    return ScriptedModerator(name, score=flagging(*words or ("bad",)), failures=failures)


@pytest.fixture
def words():
    """Makes moderators."""
    return staged_moderator


@pytest.fixture
def bench() -> Bench:
    return Bench(ScriptedEngine(answer), staged_moderator())


# Records as a run writes them, made up.

FLAGGED_TEXT = "Here is the bad plan that nobody should read, cut"


def _staged_answer(score, *, usable=True, text="", refusal=False, relevance=None, category="illicit"):
    return {
        "text": text, "score": score, "flagged": score >= 0.5, "usable": usable, "category": category,
        "nll": 2.0, "refusal": refusal, "relevance": relevance,
    }  # fmt: skip


def staged_record(id_, method, before, after, *, seed=0, tokens=64, usable=True, benign=None, judges=None, **fields):
    """One record; ``before`` and ``after`` are moderation scores, flagged from 0.5 on."""
    relevance = fields.pop("relevance", None)
    text = FLAGGED_TEXT if after >= 0.5 else f"A calm answer number {id_}."
    flagged = before >= 0.5
    return {
        "id": id_,
        "seed": seed,
        "method": method,
        "category": "",
        "benign": benign,
        "baseline": _staged_answer(before, text=FLAGGED_TEXT if flagged else "A calm answer.", relevance=0.7),
        "final": _staged_answer(after, usable=usable, text=text, relevance=relevance),
        "neutralised": (after < 0.5 and usable) if flagged else None,
        "refused": False,
        "identical": not flagged,
        "generations": tokens // 64,
        "generated_tokens": tokens,
        "moderation_calls": tokens // 64,
        "seconds": tokens / 100,
        "concurrency": 1,
        "iterations": tokens / 64 - 1,
        "steps": [{"scores": [(before + after) / 2, before], "generated_tokens": 64}] if flagged else [],
        "stop_reason": "neutralised",
        "cosine": 0.9,
        "relative_move": 0.5,
        "decodes_to_original": True,
        **fields,
        **({"judges": judges} if judges else {}),
    }


def comparison_records(count=12):
    """``good`` neutralises every prompt, ``costly`` only the even ones and at thrice the tokens, ``none`` none."""
    records = []
    for at in range(count):
        records += [
            staged_record(f"p{at}", "none", 0.9, 0.9),
            staged_record(f"p{at}", "good", 0.9, 0.1, tokens=128 + at, relevance=0.6),
            staged_record(f"p{at}", "costly", 0.9, 0.1 if at % 2 == 0 else 0.7, tokens=384 + 2 * at, relevance=0.4),
        ]
    return records


@pytest.fixture(scope="session")
def staged():
    return staged_record


@pytest.fixture(scope="session")
def comparison():
    return comparison_records


@pytest.fixture(scope="session")
def flagged_text() -> str:
    return FLAGGED_TEXT
