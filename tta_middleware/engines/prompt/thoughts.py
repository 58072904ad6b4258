"""Thoughts and answer of a model, told apart: text and marks in, pieces of a channel out. Pure: no model, no I/O.

Models that think write their thoughts before their answer, between marks. A mark that is one token of the vocabulary is
known by that token, so that nobody opens or closes a thought by spelling it; only marks that the vocabulary has no
token for are looked for in the text, and there only where one can stand: an opening mark before the answer's first
word, a closing one inside a thought.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from tta_middleware.tool_forms import TOOL_FORMS, ToolForm, begun_mark
from tta_middleware.types import AnswerState, Channel

Meaning: TypeAlias = Literal["thought", "answer", "header", "body"]
"""What follows a mark: a thought, the answer, or a channel's name, which ``body`` ends."""

Piece: TypeAlias = tuple[Channel, str]

_ADDRESS = "to=functions."
_TO_TOOL = re.compile(rf"\b{re.escape(_ADDRESS)}([^\s<>]+)")

_THOUGHTS = frozenset({"analysis", "thought"})
"""Names of channels that hold thoughts; all others are meant for the user."""


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """How a model marks its thoughts.

    Attributes:
        meanings: what each mark begins.
        opening: what is written before a thought, where the prompt does not end with it.
        closing: what is written behind a thought, before the answer.
        skipping: what is written where there is no thought at all, before the answer.
        tokens: the marks that are tokens of the vocabulary, which are known by them alone.
        named: text by which a channel's name ends, where no mark does it.
        wrapping: what some models put around the answer behind a thought, which is no part of it.
        calls: how a message to a tool stands in the answer, where headers name recipients.
        parting: between two messages of one answer: the mark that ends one to the user, and what begins the next; one
            to a tool ends with ``calls.close``.
    """

    meanings: Mapping[str, Meaning] = field(hash=False)
    opening: str
    closing: str
    skipping: str
    tokens: frozenset[str] = frozenset()
    named: str = ""
    wrapping: tuple[str, str] | None = None
    calls: ToolForm | None = None
    parting: tuple[str, str] = ("", "")

    @property
    def spelled(self) -> frozenset[str]:
        """The marks that are looked for in the text."""
        return frozenset(self.meanings) - self.tokens

    def ending(self, tail: str) -> AnswerState:
        """Where an answer stands behind ``tail``, with which a chat template begins it.

        Words before the first mark name a role.
        """
        splitter = ThoughtSplitter(replace(self, tokens=frozenset(self.meanings)))
        for index, part in enumerate(re.split(f"({_any_of(self.meanings)})", tail)):
            if index % 2:
                splitter.mark(part)
            elif index:
                splitter.text(part)
        return splitter.state


def between(begin: str, end: str, *, wrapping: tuple[str, str] | None = None) -> ThoughtMarks:
    """Thoughts between two marks, on lines of their own."""
    meanings: dict[str, Meaning] = {begin: "thought", end: "answer"}
    opening, closing = f"{begin}\n", f"\n{end}\n\n"
    return ThoughtMarks(meanings, opening, closing, opening + closing, wrapping=wrapping)


HARMONY = ThoughtMarks(
    {
        "<|start|>": "header",
        "<|channel|>": "header",
        "<|end|>": "header",
        "<|call|>": "header",
        "<|message|>": "body",
    },
    opening="<|channel|>analysis<|message|>",
    closing="<|end|><|start|>assistant<|channel|>final<|message|>",
    skipping="<|channel|>final<|message|>",
    calls=TOOL_FORMS["harmony"],
    parting=("<|end|>", "<|start|>assistant"),
)
"""GPT-OSS: every message has a header that names its channel, and the tool that it is for."""

GEMMA = ThoughtMarks(
    {"<|channel>": "header", "<channel|>": "answer"},
    opening="<|channel>thought\n",
    closing="<channel|>",
    skipping="<|channel>thought\n<channel|>",
    named="\n",
)
"""Gemma 4."""

SOLAR = ThoughtMarks(
    {"<|begin|>": "header", "<|think|>": "thought", "<|content|>": "answer", "<|end|>": "header"},
    opening="<|think|>",
    closing="<|end|><|begin|>assistant<|content|>",
    skipping="<|content|>",
)
"""Solar Open."""

_CHANNELLED = (HARMONY, SOLAR, GEMMA)
"""Their marks are told by a vocabulary that holds them all: templates name some of them for other ends."""

KNOWN: tuple[ThoughtMarks, ...] = (
    *_CHANNELLED,
    between("<think>", "</think>"),
    between("[THINK]", "[/THINK]"),
    between("<seed:think>", "</seed:think>"),
    between("<|START_THINKING|>", "<|END_THINKING|>"),
    between("<thought>", "</thought>"),
    between("<|inner_prefix|>", "<|inner_suffix|>"),
    between("◁think▷", "◁/think▷"),
    between("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", wrapping=("", "[END FINAL RESPONSE]")),
    between("Here is my thought process:", "Here is my response:"),
)
"""GPT-OSS; Solar Open; Gemma 4; Qwen 3, DeepSeek R1, SmolLM3 and most others; Magistral; Seed-OSS; Command A; EXAONE
Deep; Apertus; Kimi-VL; Apriel; Granite 3.2."""

# Others of the first kind that a vocabulary holds: MiniMax M3's <mm:think>, Hunyuan 3's <think:opensource>.
_LIKE_THINK = re.compile(r"</?(?:\w+:)?think(?::\w+)?>")
_MARKS = frozenset(mark for marks in KNOWN for mark in marks.meanings)
# Hunyuan; Granite 3.3 and ERNIE 4.5.
_WRAPPINGS = (("<answer>", "</answer>"), ("<response>", "</response>"))


class ThoughtSplitter:
    """One answer, told apart as it comes; any chunks of one text give the same pieces when joined.

    White space around a thought belongs to neither channel, nor does what a model wraps its answer in. Thoughts that
    follow one another are parted by an empty line.

    Args:
        marks: None passes everything on as the answer.
        state: where the answer stands that is gone on from.
    """

    def __init__(self, marks: ThoughtMarks | None, state: AnswerState = "before") -> None:
        self._marks = marks
        self._spelled = marks.spelled if marks is not None else frozenset()
        self._mode: Meaning = "thought" if state in ("open", "inside") else "answer"
        self._held = ""
        self._name = ""
        self._space = ""
        # Whether the first word of this stretch is there, of an answer or a thought; _thoughts and _answered say it of
        # all stretches before, _spaced whether the answer ends with a blank.
        self._said = state in ("inside", "said")
        self._thought = state != "before"
        self._thoughts, self._answered = state == "inside", state == "said"
        self._spaced = False
        # The tool that the header names, whether a message to one is being read, and whether the answer goes on from
        # words in which a header may have begun.
        self._tool, self._calling, self._resumed = "", False, state == "said"
        # Whether a header that the prompt begins may go on before any mark.
        self._leads = marks is not None and marks.calls is not None and state == "before"
        self._wrapping = self._wrapped(begun=state == "said")

    @property
    def channel(self) -> Channel:
        """What the next token belongs to, as far as is known."""
        return "answer" if self._mode == "answer" else "reasoning"

    @property
    def state(self) -> AnswerState:
        """Where the answer stands; what goes on from it begins there."""
        if self._mode == "thought":
            return "inside" if self._said else "open"
        if self._mode == "header":
            return "before"
        return "said" if self._said else "closed" if self._thought else "before"

    def text(self, text: str) -> list[Piece]:
        """What became certain with this text."""
        if self._marks is None:
            return [("answer", text)] if text else []
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return self._bare(pieces)

    def mark(self, mark: str) -> list[Piece]:
        """A mark came as a token; text that is held does not belong to one."""
        pieces: list[Piece] = []
        self._take(self._held, pieces)
        self._held = ""
        # Whether an answer is bare depends on what came before it, so it is settled before the mark counts.
        pieces = self._bare(pieces)
        if self._quoted():
            said: list[Piece] = []
            self._take(mark, said)
            pieces += self._bare(said)
        elif self._marks is not None:
            turned: list[Piece] = []
            self._turn(self._marks.meanings[mark], turned)
            pieces += self._bare(turned)
        return _joined(pieces)

    def _quoted(self) -> bool:
        """Whether a mark is a word of the answer: one that comes behind a thought and the answer's first words.

        A model that is asked about its marks writes them by their tokens. Channels may follow one another at any place.
        """
        if self._marks is None or "header" in self._marks.meanings.values():
            return False
        return self._mode == "answer" and self._said and self._thought

    def finish(self) -> list[Piece]:
        """The rest; the splitter is used up."""
        pieces: list[Piece] = []
        self._take(self._held, pieces)
        self._held = ""
        calls = None if self._marks is None else self._marks.calls
        led, self._leads = self._leads, False
        if calls is not None and (led or self._mode == "header"):
            self._address(calls, pieces, inside=True)
            # Cut off before the message: the beginning of a call, which is not to be lost.
            begun = f"{calls.opening[0]}{self._tool}" if self._tool else self._name if led else ""
            self._speak(begun, pieces)
        if self._mode == "answer" and not self._thought and self._space:
            pieces.append(("answer", self._space))
            self._space = ""
        pieces = self._bare(pieces)
        if self._wrapping is not None and (rest := self._wrapping.finish()):
            pieces.append(("answer", rest))
        return _joined(pieces)

    def _wrapped(self, *, begun: bool = False) -> _Wrapping | None:
        found = None if self._marks is None else self._marks.wrapping
        return None if found is None else _Wrapping(*found, begun=begun)

    def _bare(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces without what wraps an answer behind a thought."""
        joined = _joined(pieces)
        if self._wrapping is None:
            return joined
        found: list[Piece] = []
        for channel, text in joined:
            if channel == "answer":
                found.append((channel, self._wrapping.take(text) if self._thought else text))
            else:
                found += [("answer", self._wrapping.finish()), (channel, text)]
                self._wrapping = self._wrapped() or self._wrapping
        return [piece for piece in found if piece[1]]

    def _step(self, pieces: list[Piece]) -> bool:
        """Take what is certain of the held text; whether a mark was among it, so that there may be more."""
        marks = self._expected()
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if not found:
            held = begun_mark(self._held, marks)
            self._take(self._held[: len(self._held) - held], pieces)
            self._held = self._held[len(self._held) - held :]
            return False
        at, mark = min(found)
        before, after = self._held[:at], self._held[at + len(mark) :]
        if self._mode == "answer" and before.strip():
            # The first word is there, so that a mark behind it is a part of the answer.
            self._take(before, pieces)
            self._held = self._held[at:]
            return True
        self._take(before, pieces)
        self._held = after
        self._turn(self._meaning(mark), pieces)
        return True

    def _expected(self) -> list[str]:
        """The marks that the text may hold here."""
        if self._marks is None:
            return []
        if self._mode == "header":
            named = [self._marks.named] if self._marks.named else []
            return [*named, *(mark for mark in self._spelled if self._marks.meanings[mark] in ("header", "body"))]
        if self._mode == "thought":
            return [mark for mark in self._spelled if self._marks.meanings[mark] in ("answer", "header")]
        return [] if self._said else list(self._spelled)

    def _meaning(self, mark: str) -> Meaning:
        return "body" if self._marks is None or mark == self._marks.named else self._marks.meanings[mark]

    def _turn(self, meaning: Meaning, pieces: list[Piece]) -> None:
        """What follows is something else."""
        resumed, self._resumed = self._resumed, False
        led, self._leads = self._leads, False
        calls = None if self._marks is None else self._marks.calls
        if calls is not None and meaning == "body" and resumed:
            # The answer was begun with a header, which ends here.
            self._speak(calls.opening[1], pieces)
            return
        if calls is not None and meaning in ("header", "body"):
            self._address(calls, pieces, inside=led or self._mode == "header")
        tool = self._tool if meaning == "body" else ""
        if meaning == "body":
            named, self._name = self._name.split(), ""
            meaning = "thought" if named and named[0] in _THOUGHTS and not tool else "answer"
        if meaning == "header":
            self._name = ""
        elif meaning == "answer" and self._mode == "answer" and not tool:
            # A thought that was never opened is closed: the mark is dropped.
            self._space = "" if not self._said else self._space
            self._thought = self._thought or not self._said
            return
        if meaning == self._mode == "thought":
            return
        self._thought = self._thought or self._mode == "thought" or meaning == "thought"
        self._mode, self._said, self._space = meaning, False, ""
        if calls is not None and tool:
            self._speak(f"{calls.opening[0]}{tool}{calls.opening[1]}", pieces)
            self._tool, self._calling = "", True

    def _address(self, calls: ToolForm, pieces: list[Piece], *, inside: bool) -> None:
        """End a message to a tool, or hear from a header, ``inside`` which this is, what tool the next one is for."""
        if self._calling:
            self._speak(calls.close, pieces)
            self._calling = False
        found = _TO_TOOL.search(self._name) if inside else None
        self._tool = found[1] if found else self._tool if inside else ""

    def _take(self, text: str, pieces: list[Piece]) -> None:
        """Text without marks, in the channel that it is in."""
        if self._mode == "header":
            self._name += text
        elif self._mode == "thought":
            self._think(text, pieces)
        elif text:
            self._speak(text, pieces)

    def _think(self, text: str, pieces: list[Piece]) -> None:
        kept = (self._space + text).rstrip() if self._said else text.strip()
        whole = self._space + text if self._said else text.lstrip()
        self._space = whole[len(kept) :] if kept or self._said else ""
        if not kept:
            return
        lead = "\n\n" if self._thoughts and not self._said else ""
        self._said = self._thoughts = True
        pieces.append(("reasoning", lead + kept))

    def _speak(self, text: str, pieces: list[Piece]) -> None:
        if self._leads:
            text, self._name = self._name + text, ""
            begun = text.lstrip()
            if _ADDRESS.startswith(begun) or (begun.startswith(_ADDRESS) and len(begun.split()) < 2):
                self._name = text
                return
            self._leads = False
        if not text:
            return
        if not self._said:
            text = self._space + text
            if not text.strip():
                # White space behind a thought is dropped; before a possible one it waits.
                self._space = "" if self._thought else text
                return
            text = text.lstrip() if self._thought else text
            if self._answered and not self._spaced:
                text = f"\n\n{text}"
            self._space, self._said, self._answered = "", True, True
        self._spaced = text[-1].isspace()
        pieces.append(("answer", text))


class _Wrapping:
    """Takes two marks off an answer: one before its first word, and one behind its last if the first was there.

    Args:
        first: empty where the answer begins without one.
        begun: the answer's beginning is gone already.
    """

    def __init__(self, first: str, last: str, *, begun: bool) -> None:
        self._first, self._last = first, last
        self._decided = self._inside = begun or not first
        self._lead = False
        self._held = ""

    def take(self, text: str) -> str:
        """What became certain with this text."""
        self._held += text
        if not self._decided and not self._decide():
            return ""
        if not self._inside:
            return self._release(len(self._held))
        if self._lead:
            self._held = self._held.lstrip()
            self._lead = not self._held
        words = self._held.rstrip()
        held = len(self._last) if words.endswith(self._last) else begun_mark(self._held, [self._last])
        end = len(words) if words.endswith(self._last) else len(self._held)
        return self._release(len(self._held[: end - held].rstrip()))

    def finish(self) -> str:
        """The rest; used up."""
        words = self._held.rstrip()
        wrapped = self._inside and words.endswith(self._last)
        rest = words.removesuffix(self._last).rstrip() if wrapped else self._held
        self._held = ""
        return rest

    def _decide(self) -> bool:
        """Whether it is certain by now that the first mark is there or is not."""
        words = self._held.lstrip()
        if len(words) < len(self._first) and self._first.startswith(words):
            return False
        self._decided = True
        if words.startswith(self._first):
            self._inside = self._lead = True
            self._held = words[len(self._first) :]
        return True

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one channel as one piece."""
    found: list[Piece] = []
    for channel, text in pieces:
        if found and found[-1][0] == channel:
            found[-1] = (channel, found[-1][1] + text)
        else:
            found.append((channel, text))
    return found


def _any_of(marks: Mapping[str, Meaning]) -> str:
    return "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))


def is_thought_mark(token: str) -> bool:
    """Whether a token of some vocabulary may mark a thought."""
    return token in _MARKS or _LIKE_THINK.fullmatch(token) is not None


def find_marks(tokens: Collection[str], template: str, declared: Any = None) -> ThoughtMarks | None:
    """How a model marks its thoughts, by its tokenizer and chat template; None for one that does not think.

    Args:
        tokens: the tokenizer's added tokens.
        declared: the tokenizer's ``response_template``, as transformers 5.13 and later read it.
    """
    marks = next((marks for marks in KNOWN if _knows(marks, tokens, template)), None) or _like_think(tokens)
    if marks is None or marks not in _CHANNELLED:
        marks = _declared(declared) or marks
        wrapping = next((pair for pair in _WRAPPINGS if all(mark in template for mark in pair)), None)
        if marks is not None and marks.wrapping is None and wrapping is not None:
            marks = replace(marks, wrapping=wrapping)
    return None if marks is None else replace(marks, tokens=frozenset(marks.meanings) & frozenset(tokens))


def _knows(marks: ThoughtMarks, tokens: Collection[str], template: str) -> bool:
    """Whether all of them are tokens, or the template writes or reads one that tells them from words."""
    return all(mark in tokens for mark in marks.meanings) or any(
        mark in template for mark in marks.meanings if marks not in _CHANNELLED
    )


def _like_think(tokens: Collection[str]) -> ThoughtMarks | None:
    begins = sorted(token for token in tokens if _LIKE_THINK.fullmatch(token) and f"</{token[1:]}" in tokens)
    return between(begins[0], f"</{begins[0][1:]}") if begins else None


def _declared(response: Any) -> ThoughtMarks | None:
    """The marks of a response template, where it names them; patterns are no marks that one could write."""
    fields = response.get("fields") if isinstance(response, Mapping) else None
    for name in ("reasoning_content", "thinking", "reasoning"):
        about = fields.get(name) if isinstance(fields, Mapping) else None
        if isinstance(about, Mapping):
            begin, end = (_first(about.get(key)) for key in ("open", "close"))
            if begin and end:
                return between(begin, end)
    return None


def _first(value: Any) -> str:
    found = value[0] if isinstance(value, list) and value else value
    return found.strip() if isinstance(found, str) else ""
