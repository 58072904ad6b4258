"""Is an answer usable? Not empty, not degenerate, fluent (docs/concepts.md)."""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tta_middleware.config import Settings
from tta_middleware.guard.announcement import announces
from tta_middleware.protocols import Engine
from tta_middleware.types import Completion, PromptEmbeddings, QualityReport

# Scripts in which no space tells words apart: Thai, Lao, Burmese, Khmer, kana, ideographs.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_MARKER = re.compile(r"^[\s>*#-]*\d{1,3}[.)]", re.MULTILINE)
"""The number of a line of a list, which makes no other line of it."""

_SPOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_UNIT = re.compile(rf"{_SPOKEN.pattern}|([^\w\s])\1*")
_WORD = re.compile(rf"[{_UNSPACED}]{{2}}|[^\W\d_{_UNSPACED}]{{2,}}")
_STUTTER = re.compile(r"(\S{1,8}?)\1{5,}")

# Words in a row that tell a quotation from chance, the share of a text that is one, and the words of a sentence.
_ECHO, _ECHOED, _LEAST_REPEATED = 4, 0.9, 8

_PART = 32
"""Units, about two lines of text."""

# Words in a row that come again by a loop rather than by chance, from how many words on that is asked, and the share of
# the words in such runs: of 21,628 answers of labelled data sets three in a thousand have more, and they are loops.
_LOOP, _LOOP_FROM, _LOOP_SHARE = 8, 24, 0.75
# A loop may also change a word each time, so that only short phrases come again, but then they do so nearby: words of a
# phrase, words of a part that is held against itself, and the share of its phrases that were there before. Of 15,388
# harmless answers of those sets that the other checks pass 48 have more, and four of five of these are loops.
_PHRASE, _NEARBY, _REPHRASED = 3, 40, 0.3
# One word, whatever its ending, that is there so often and so large a share of all is what the text was pushed towards:
# two of those answers have one.
_SAME_SHARES = ((5, 0.25), (3, 0.34))
_STEM, _ENDING, _FORMS = 4, 3, 8

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class QualityBounds(Settings):
    """Bounds of the usability gate; for models without a profile (docs/profiles.md) the defaults.

    Attributes:
        min_words: fewer words than this is not an answer; a word has two letters or more, and where a script knows no
            spaces every two letters count as one.
        min_letter_share: least share of letters among the characters that are not white space.
        max_repeated_share: largest share of the units (words and signs), of the text or of any two lines of it, covered
            by the most frequent repeated sequence of one to eight units, from ``repetition_from`` units on; and of the
            characters, covered by sequences that follow upon themselves six times. Loops of whole sentences, also of
            ones that change a word each time, and texts in which one word is a quarter of all, are repetition as well;
            1 allows everything.
        max_compression: largest ratio of plain to deflated length, from 200 characters on; loops of long
            sentences compress better than prose does.
        max_nll: largest mean negative log-likelihood in nats per token under the unmoved model and prompt, for answers
            of ``short_below`` tokens or more; babble lies above it. Of an answer of twice as many that is over the last
            ``short_below`` are held to it by themselves, too.
        short_margin: what is added to ``max_nll`` for a shorter answer, in full for none and evenly less up to
            ``short_below`` tokens: the first words of an answer are its least likely, those of a refusal above all.
    """

    min_words: PositiveInt = 2
    min_letter_share: Share = 0.5
    max_repeated_share: Share = 0.5
    repetition_from: PositiveInt = 12
    max_compression: PositiveFloat = 4.0
    max_nll: PositiveFloat = 3.0
    short_margin: NonNegativeFloat = 2.0
    short_below: PositiveInt = 48

    def nll_limit(self, tokens: int) -> float:
        """The largest mean negative log-likelihood of an answer of so many tokens."""
        return self.max_nll + self.short_margin * max(0.0, 1.0 - tokens / self.short_below)


def text_problems(text: str, bounds: QualityBounds, *, over: bool = False) -> tuple[str, ...]:
    """Names of the checks that ``text`` fails by itself; empty when it passes them all.

    Args:
        over: it goes no further. Until then what is short may become an answer yet.
    """
    if not text.strip():
        return ("empty",)
    text, problems = _without_marks(text), []
    if len(_WORD.findall(text)) < bounds.min_words:
        problems.append("too_short")
    if letter_share(text) < bounds.min_letter_share:
        problems.append("symbols")
    repeated = max(repeated_share(text, bounds.repetition_from), stutter_share(text))
    looping = repeated > bounds.max_repeated_share or compression(text) > bounds.max_compression
    if looping or (bounds.max_repeated_share < 1.0 and _loops(text, over=over)):
        problems.append("repetition")
    if over and announces(text):
        problems.append("says_nothing")
    return tuple(problems)


def _without_marks(text: str) -> str:
    """``text`` without the vowel signs and accents that belong to its letters, which are no letters by themselves."""
    return text if text.isascii() else "".join(one for one in text if not unicodedata.category(one).startswith("M"))


def letter_share(text: str) -> float:
    """Share of letters among the characters that are not white space; 0 for none."""
    dense = "".join(_without_marks(text).split())
    return sum(char.isalpha() for char in dense) / len(dense) if dense else 0.0


def repeated_share(text: str, least_units: int) -> float:
    """Largest share of the units that one repeated sequence of one to eight covers, in the text or a part of it.

    The parts are of 32 units, since a good beginning hides a loop at the end from a count over the whole. 0 for texts
    below ``least_units`` units.
    """
    # The bars of a table say nothing, and with short cells there are as many of them as of words.
    units = [unit.group() for unit in _UNIT.finditer(text.lower().replace("|", " "))]
    if len(units) < least_units:
        return 0.0
    starts = [*range(0, len(units) - _PART, _PART // 2), max(0, len(units) - _PART)]
    parts = [units, *(units[start : start + _PART] for start in starts)]
    return max(_cover(part, size) for part in parts for size in range(1, 9))


def _loops(text: str, *, over: bool) -> bool:
    """Whether sentences come again, one word is too many of all, or all that is said is said over again."""
    words, unnumbered = _readings(text)
    if over and (_says_all_again(words) or _says_all_again(unnumbered)):
        return True
    if _go_round(words, unnumbered):
        return True
    same = _most_alike(words)
    return any(same >= least and same > share * len(words) for least, share in _SAME_SHARES)


def goes_round(text: str) -> bool:
    """Whether sentences or phrases come again and again; of words alone, so this may be asked of what is no prose."""
    return _go_round(*_readings(text))


def _readings(text: str) -> tuple[list[str], list[str]]:
    """The words of a text, and those without the numbers of its lists."""
    return _words(text), _words(_MARKER.sub(" ", text))


def _go_round(words: Sequence[str], unnumbered: Sequence[str]) -> bool:
    return _looped_share(words) > _LOOP_SHARE or _rephrased_share(unnumbered) > _REPHRASED


def _most_alike(words: Sequence[str]) -> int:
    """How many of the words are the most frequent one, or it with an ending."""
    known = Counter(word for word in words if len(word) >= _STEM and word.isalpha())
    ordered, most = sorted(known), 0
    for at, stem in enumerate(ordered):
        # Words with its beginning stand right behind it.
        same = (
            word for word in ordered[at : at + _FORMS] if word.startswith(stem) and len(word) <= len(stem) + _ENDING
        )
        most = max(most, sum(known[word] for word in same))
    return most


def _looped_share(words: Sequence[str]) -> float:
    """Share of the words in runs of eight that come again."""
    if len(words) < _LOOP_FROM:
        return 0.0
    runs = [tuple(words[at : at + _LOOP]) for at in range(len(words) - _LOOP + 1)]
    often = Counter(runs)
    return len({at + ahead for at, run in enumerate(runs) if often[run] > 1 for ahead in range(_LOOP)}) / len(words)


def _rephrased_share(words: Sequence[str]) -> float:
    """Share of the phrases that came shortly before: in the last part, or the mean over all parts, if that is more.

    No model leaves a loop by itself, so one that matters goes on to the end; a part in the middle may quote itself.
    """
    if len(words) < _LOOP_FROM:
        return 0.0
    last = max(0, len(words) - _NEARBY)
    shares = [_said_before(words[at : at + _NEARBY]) for at in (*range(0, last, _NEARBY // 2), last)]
    return max(shares[-1], sum(shares) / len(shares))


def _said_before(words: Sequence[str]) -> float:
    """Share of the phrases of a part that it has before; where letters are words a phrase is of twice as many."""
    letters = sum(len(word) == 1 for word in words) > len(words) / 2
    size = _PHRASE * 2 if letters else _PHRASE
    phrases = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    return (len(phrases) - len(set(phrases))) / len(phrases)


def _says_all_again(words: Sequence[str]) -> bool:
    """Whether a text is one run of words twice or more, of one word three times or more."""
    for run in range(1, len(words) // 2 + 1):
        if len(words) > max(2, run) and all(words[at] == words[at - run] for at in range(run, len(words))):
            return True
    return False


def stutter_share(text: str) -> float:
    """Share of the characters, white space aside, in sequences of one to eight that come six times or more in a row."""
    dense = "".join(text.lower().split())
    return sum(len(run.group()) for run in _STUTTER.finditer(dense)) / len(dense) if dense else 0.0


def _cover(units: Sequence[str], size: int) -> float:
    """Share of the units that the most frequent sequence of ``size`` units covers, if it comes three times."""
    grams = Counter(tuple(units[i : i + size]) for i in range(len(units) - size + 1))
    if not grams:
        return 0.0
    count = grams.most_common(1)[0][1]
    return min(1.0, count * size / len(units)) if count >= 3 else 0.0


def echoes(text: str, message: str, *, over: bool) -> bool:
    """Whether an answer says nothing but a message of the conversation over again.

    A part of a message may well answer a question about it, so all of it has to be there; of an answer that is not
    ``over`` yet, its beginning.
    """
    said, heard = _words(text), _words(message)
    if _echoed_share(said, heard) < _ECHOED:
        return False
    return _echoed_share(heard, said) >= _ECHOED if over else said[:_ECHO] == heard[:_ECHO]


def repeats(text: str, before: str) -> bool:
    """Whether an answer that goes on from ``before`` says some sentence or more of it again, and nothing else."""
    said = _words(text)
    return len(said) >= _LEAST_REPEATED and _echoed_share(said, _words(before)) >= _ECHOED


def _words(text: str) -> list[str]:
    return _SPOKEN.findall(_without_marks(text).lower())


def _echoed_share(said: Sequence[str], heard: Sequence[str]) -> float:
    """Share of the words of ``said`` that stand in ``heard`` with the same neighbours, four in a row at least."""
    known = {tuple(heard[at : at + _ECHO]) for at in range(len(heard) - _ECHO + 1)}
    starts = (at for at in range(len(said) - _ECHO + 1) if tuple(said[at : at + _ECHO]) in known)
    covered = {at + ahead for at in starts for ahead in range(_ECHO)}
    return len(covered) / len(said) if said else 0.0


def compression(text: str) -> float:
    """Ratio of plain to deflated length; 1 below 200 bytes, where it says nothing."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw, 9)) if len(raw) >= 200 else 1.0


class QualityGate:
    """The text checks, then one batched forward pass for the fluency of the texts that passed them."""

    def __init__(self, bounds: QualityBounds | None = None) -> None:
        self.bounds = bounds or QualityBounds()

    async def assess(
        self, engine: Engine, prompt: PromptEmbeddings, completions: Sequence[Completion]
    ) -> list[QualityReport]:
        """One report per completion, in order; ``prompt`` must be the unmoved prompt."""
        reports = [
            QualityReport(text_problems(done.text, self.bounds, over=done.finish_reason == "stop"))
            for done in completions
        ]
        passed = [i for i, report in enumerate(reports) if report.usable]
        for i, report in zip(passed, await self.fluency(engine, prompt, [completions[i] for i in passed]), strict=True):
            reports[i] = report
        return reports

    async def fluency(
        self, engine: Engine, prompt: PromptEmbeddings, completions: Sequence[Completion]
    ) -> list[QualityReport]:
        """One report per completion on how likely its answer is alone, from one batched forward pass."""
        if not completions:
            return []
        heads = [self._heads(done) for done in completions]
        parts = [done.token_ids[:head] for done, cuts in zip(completions, heads, strict=True) for head in cuts]
        nlls = await engine.mean_nll(prompt, [*(done.token_ids for done in completions), *parts])
        of_heads = iter(nlls[len(completions) :])
        return [
            self._fluent(done, nll, {head: next(of_heads) for head in cuts})
            for done, nll, cuts in zip(completions, nlls[: len(completions)], heads, strict=True)
        ]

    def _heads(self, done: Completion) -> list[int]:
        """Up to which tokens an answer is asked about beside the whole: its thoughts, and all but a long one's end."""
        before_end = len(done.token_ids) - self.bounds.short_below
        long = done.finish_reason != "aborted" and before_end - done.lead >= self.bounds.short_below
        return [*([done.lead] if done.lead else []), *([before_end] if long else [])]

    def _fluent(self, done: Completion, nll: float, heads: Mapping[int, float]) -> QualityReport:
        """``heads``: means over beginnings of the answer, by their length in tokens."""
        count, rests = len(done.token_ids), {head: _of_the_rest(done, nll, head, mean) for head, mean in heads.items()}
        said = rests.pop(done.lead) if done.lead else nll
        # A good beginning hides babble at the end from a mean over all. Written so that a NaN fails: an answer whose
        # fluency is unknown is not called usable.
        fluent = said <= self.bounds.nll_limit(count - done.lead) and all(
            rest <= self.bounds.nll_limit(count - head) for head, rest in rests.items()
        )
        return QualityReport(() if fluent else ("not_fluent",), said)


def _of_the_rest(done: Completion, whole: float, head: int, mean: float) -> float:
    """The mean of what follows the first ``head`` tokens, from the means over all and over these; NaN of nothing."""
    count = len(done.token_ids)
    return (whole * count - mean * head) / (count - head) if count > head else math.nan
