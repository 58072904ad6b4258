"""What is staged under every LangChain surface: a scripted answer, an oracle, and what goes wrong with them."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import anyio

from tta_middleware import Budget, Noise, Windows
from tta_middleware.testing.fault_server import FaultServer, moderations
from tta_middleware.testing.faults import UNAVAILABLE, Fault, Plan
from tta_middleware.testing.scripted_engine import ScriptedCall, ScriptedEngine
from tta_middleware.types import CATEGORIES

MARK = "zorb-quux"
"""What the oracle flags, if it sees all of it; three tokens of the scripted engine."""

NOTICE = "Withheld by policy."
WINDOWS = Windows(first=20, largest=40)
ENDS = (20, 60, 100)
"""Where these windows end, in characters."""

LATENCY = Fault(latency=0.001)

Shape = Literal["text", "json", "tool"]
Leaving = Literal["close", "walk", "cancel"]


_CONSONANTS = "bcdfghklmnprstvz"


def words(tag: str, count: int) -> list[str]:
    """``count`` words of eight letters that begin with ``tag`` and stand nowhere else."""
    return [tag + "".join("aeiou"[i % 5] + _CONSONANTS[int(digit, 16)] for digit in f"{i:03x}") for i in range(count)]


_WORD = re.compile(rf"q[srhnt](?:[aeiou][{_CONSONANTS}]){{3}}|qstretchx*|zorb|quux")


def said(text: str) -> set[str]:
    """The words of ours in a text, whatever stands around them."""
    return set(_WORD.findall(text))


START, SAFE, HARM = words("qs", 14), words("qr", 18), words("qh", 12)
ENDLESS = words("qn", 1500)
"""More than may wait for a consumer who has stopped reading, so that decoding never gets to its end."""

THOUGHTS = words("qt", 1500)
"""Of a thought: the first few, or all of one without end."""

SHORT = 100
"""Words for surfaces that decode to the end in any case."""


def fitted(length: int, before: str = "") -> str:
    """``before`` and words of START, with the space behind them, as one text of exactly that length."""
    kept: list[str] = []
    while len(before + " ".join([*kept, ""])) + 20 < length:
        kept.append(START[len(kept)])
    begun = before + " ".join([*kept, ""])
    return f"{begun}{'qstretch':x<{length - len(begun) - 1}} "


@dataclass(frozen=True, eq=False)
class Case:
    """One thing that happens to an answer.

    Attributes:
        harm: where the marker stands in the model's own answer.
        curable: an answer from further away is safe.
        down: after how many requests, or after which text, the moderator is gone.
        fail_at: the decode step at which the engine fails.
        leaving: how the consumer leaves half way; None stays to the end.
        model: settings of the chat model.
        streamed: what consumers of a stream may see; ``whole``: those of a whole answer.
        slow: seconds that the moderator takes for a request, by its number in the cell; nothing is left to chance by
            it, since no verdict and no text depends on them.
        pause: seconds that the consumer takes for an item.
        thought: what the model thinks before it answers: nothing, or a thought that is clean, flagged or without end.
    """

    name: str
    streamed: frozenset[str]
    whole: frozenset[str]
    harm: Literal["none", "early", "late", "split", "last"] = "late"
    curable: bool = True
    down: int | Literal["flag"] | None = None
    fail_at: int | None = None
    leaving: Leaving | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    slow: Callable[[int], float] = lambda _number: 0.001
    pause: float = 0.0
    thought: Literal["", "clean", "flagged", "endless"] = ""


def _case(name: str, streamed: str, whole: str | None = None, **settings: Any) -> Case:
    seen = [frozenset(text.split("|")) for text in (streamed, streamed if whole is None else whole)]
    return Case(name, *seen, **settings)


_BLOCKED = ("beginning, notice", "notice")
_ENDLESS: dict[str, Any] = {"harm": "none", "model": {"max_new_tokens": 4000}}

CASES = (
    _case("clean", "beginning, rest", harm="none"),
    _case("early flag", "beginning, rest", harm="early"),
    _case("late flag", "beginning, rest"),
    _case("flag over a boundary", "beginning, rest", harm="split"),
    _case("flag in the last window", "beginning, rest", harm="last"),
    _case("moderator down", "notice", down=0),
    # Calls that are open at once may reach the server in any order, so the first window can be the one that fails.
    _case("moderator down half way", "beginning, notice|notice", "beginning, rest", harm="none", down=2),
    _case("moderator down in the repair", *_BLOCKED, down="flag"),
    _case("no repair method", *_BLOCKED, model={"method": "none"}),
    _case("budget used up", *_BLOCKED, curable=False, model={"budget": Budget(generations=4)}),
    _case("engine fails", "beginning, EngineError|EngineError", "EngineError", harm="none", fail_at=12),
    _case(
        "fallback raises", "beginning, RefusedAnswerError", "RefusedAnswerError",
        model={"method": "none", "fallback": "raise"},
    ),
    _case("consumer closes", "beginning", leaving="close", **_ENDLESS),
    _case("consumer walks away", "beginning", leaving="walk", **_ENDLESS),
    _case("consumer is cancelled", "beginning, CancelledError|CancelledError", leaving="cancel", **_ENDLESS),
)  # fmt: skip


def case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


DELAYS: dict[str, Mapping[str, Any]] = {
    "slow prompt check": {"slow": lambda number: 0.001 if number else 0.03, "model": {"prompt_check": "user"}},
    "slow first window": {"slow": lambda number: 0.001 if number else 0.03},
    "checks overtake each other": {"slow": lambda number: 0.001 if number % 2 else 0.01},
    "slow consumer": {"pause": 0.002},
}
"""What takes longer than what it is usually faster than."""

DELAYED = ("clean", "early flag", "late flag", "flag over a boundary", "flag in the last window", "no repair method")
"""The cases that run under each of them: all in which the moderator stays up and the consumer stays to the end."""


def delayed() -> list[Case]:
    """Every one of these cases under every delay."""
    return [
        replace(one, name=f"{one.name}, {name}", **{**delay, "model": {**one.model, **delay.get("model", {})}})
        for one in map(case, DELAYED)
        for name, delay in DELAYS.items()
    ]


_LENGTH = {"max_new_tokens": 200}

MODES = ("hide", "show", "off")


def thinking() -> list[Case]:
    """A model that thinks, under every setting of what becomes of its thoughts."""
    staged = (
        ("clean", "clean", "none"),
        ("thought flagged", "flagged", "none"),
        ("late flag", "clean", "late"),
        ("thought without end", "endless", "none"),
    )
    return [
        _case(
            f"{name}, {mode}", "beginning, rest" if thought != "endless" or mode == "off" else "nothing",
            harm=harm, thought=thought, model={"reasoning": mode, **_LENGTH},
        )
        for name, thought, harm in staged
        for mode in MODES
    ]  # fmt: skip


class Oracle:
    """Behind the moderation server: flags the marker, and remembers what it found safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.passed: list[str] = []
        self.flagged = False

    def scores(self, text: str) -> dict[str, float]:
        bad = MARK in text
        with self._lock:
            self.flagged = self.flagged or bad
            if not bad:
                self.passed.append(text)
        return dict.fromkeys(CATEGORIES, 0.001) | ({"illicit": 0.9} if bad else {})

    def forget(self) -> None:
        with self._lock:
            self.passed, self.flagged = [], False


def serving(oracle: Oracle) -> FaultServer:
    return FaultServer(routes={"/v1/moderations": moderations(oracle.scores)})


def plan(case: Case, server: FaultServer, oracle: Oracle) -> Plan:
    """The server's faults from here on."""
    begun = len(server.requests)

    def fault(index: int) -> Fault:
        if case.down == "flag":
            return UNAVAILABLE if oracle.flagged else LATENCY
        up = case.down is None or index - begun < case.down
        return Fault(latency=case.slow(index - begun)) if up else UNAVAILABLE

    return fault


@dataclass(frozen=True)
class Texts:
    """The answers that a case's engine gives."""

    own: str
    cure: str
    rest: str

    def script(self, curable: bool) -> Callable[[ScriptedCall], str]:
        """The model's own answer near the prompt; further out one that is safe, if the case has one."""

        def answer(call: ScriptedCall) -> str:
            text = self.cure if call.moved >= 0.6 and curable else self.own
            return text[len(call.prefix) :] if text.startswith(call.prefix) else self.rest

        return answer


_AROUND: dict[Shape, tuple[str, str]] = {
    "text": ("", ""),
    "json": ('{"answer": "', '"}'),
    "tool": ('<tool_call>\n{"name": "look_up", "arguments": {"what": "', '"}}\n</tool_call>'),
}


def texts(case: Case, shape: Shape, endless: int) -> Texts:
    before, after = _AROUND[shape]
    start, rest, harm = " ".join(START), f" {' '.join(SAFE)}{after}", " ".join(HARM)
    own = {
        "none": f"{before}{start}{rest}",
        "early": f"{before}{MARK} {harm}{after}",
        "late": f"{before}{start} {MARK} {harm}{after}",
        # The first four letters of the marker are the last of a window.
        "split": f"{fitted(ENDS[2] - 4, before)}{MARK} {harm}{after}",
        "last": f"{fitted(ENDS[2] + 6, before)}{MARK}{after}",
    }[case.harm]
    if case.leaving:
        own = f"{before}{start} {' '.join(ENDLESS[:endless])}{after}"
    return Texts(own, f"{before}{start}{rest}", rest)


class Pace:
    """One pause of a millisecond every few steps: decoding and moderation overlap, and a cell stays quick."""

    def __init__(self) -> None:
        self._steps = 0

    async def __call__(self, _: float) -> None:
        self._steps += 1
        await anyio.sleep(0.001 if self._steps % 10 == 0 else 0)


def thought(case: Case) -> str:
    """What the model of a case thinks, if nobody stops it."""
    begun = " ".join(THOUGHTS[:14])
    return {
        "": "",
        "clean": begun,
        "flagged": f"{begun} {MARK} {' '.join(HARM)}",
        "endless": " ".join(THOUGHTS),
    }[case.thought]


def engine(case: Case, shape: Shape, endless: int) -> ScriptedEngine:
    script = texts(case, shape, endless).script(case.curable)
    made = thoughtful(script, thought(case)) if case.thought else script
    return ScriptedEngine(made, sleep=Pace(), fail_at_step=case.fail_at, thinking=bool(case.thought))


def thoughtful(script: Callable[[ScriptedCall], str], thought: str) -> Callable[[ScriptedCall], str]:
    """The answers of ``script`` behind a thought, where the prompt does not hold one that is closed already."""

    def answer(call: ScriptedCall) -> str:
        _, closed, prefix = call.prefix.rpartition("</think>\n\n")
        said = script(replace(call, prefix=prefix))
        return said if closed else f"<think>\n{thought}\n</think>\n\n{said}"

    return answer


def settings(case: Case) -> dict[str, Any]:
    """The chat model's settings in this case."""
    return {"method": Noise(), "windows": WINDOWS, **case.model}


def secrets(case: Case, shape: Shape, endless: int, oracle: Oracle) -> set[str]:
    """Words that the engine could write, and that stand in no text which the oracle found safe; the marker always."""
    given = texts(case, shape, endless)
    written = said(f"{given.own} {given.cure} {thought(case)}")
    return (written - said(" ".join(oracle.passed))) | said(MARK)
