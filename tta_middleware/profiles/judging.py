"""What a profile keeps of a model as a judge, and how labelled answers are put before it to find that out."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from tta_middleware.config import Settings
from tta_middleware.errors import ConfigurationError, DataError
from tta_middleware.files.jsonl import lines, parse_object, text_field
from tta_middleware.moderation.cascade import embedded_fingerprint
from tta_middleware.moderation.cascade_bounds import CascadeBounds, choose_bounds
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.judge_figures import auc
from tta_middleware.moderation.judge_fit import LEAST_FOR_PROBE, JudgedAnswers, JudgeFit
from tta_middleware.moderation.judge_probe import JudgeProbe, Place, Read
from tta_middleware.moderation.judge_prompts import STRETCH
from tta_middleware.moderation.llm_judge import JudgeCalibration, LLMJudge
from tta_middleware.types import FloatMatrix

LONGEST: Final = STRETCH
"""Characters of an answer that are put before the model: a judge asks about longer ones stretch by stretch, too."""

LEAST_FOR_BOUNDS: Final = 150
"""Answers of either kind that bounds of a cascade take: they stand on the few that the cheap moderator misses."""

_AT_ONCE = 16

OnScored: TypeAlias = Callable[[str], None]


class JudgingFit(Settings):
    """From a model's word on a text to a score; see :class:`~tta_middleware.moderation.llm_judge.JudgeCalibration`.

    Attributes:
        wording: of the question that it was fitted on.
        weights: of the probe, as base64 of little-endian float32; None without a probe.
        layers: after which it reads the model's states, counted from 1; empty: after the last (version 2 had no other).
        place: of the states; see :class:`~tta_middleware.moderation.judge_probe.JudgeProbe`.
        sources: where the answers were from, and how many of each.
        figures: what it is worth on answers of sources, or to questions, that it was not fitted on.
        cascade: where the embedded moderator in front of this judge is sure; None and the shipped bounds count.
    """

    wording: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    centre: float
    scale: PositiveFloat
    words: Annotated[float, Field(ge=0.0)] = 0.0
    weights: str | None = None
    bias: float = 0.0
    layers: tuple[PositiveInt, ...] = ()
    place: Place = "verdict"
    sources: Mapping[str, int] = Field(default_factory=dict)
    figures: Mapping[str, float] = Field(default_factory=dict)
    cascade: CascadeBounds | None = None

    @field_validator("weights")
    @classmethod
    def _readable(cls, weights: str | None) -> str | None:
        if weights is not None:
            _unpacked(weights)
        return weights

    @classmethod
    def of(
        cls, fit: JudgeFit, wording: str, sources: Sequence[str], cascade: CascadeBounds | None = None
    ) -> JudgingFit:
        """What is kept of a fit."""
        found, probe = fit.calibration, fit.calibration.probe
        return cls(
            wording=wording,
            centre=found.centre,
            scale=found.scale,
            words=found.words,
            weights=None if probe is None else _packed(probe.weights),
            bias=0.0 if probe is None else probe.bias,
            layers=() if probe is None else probe.layers,
            place="verdict" if probe is None else probe.place,
            sources=dict(sorted(Counter(sources).items())),
            figures=fit.figures,
            cascade=cascade,
        )

    def calibration(self) -> JudgeCalibration:
        """What a judge takes."""
        probe = (
            None if self.weights is None else JudgeProbe(_unpacked(self.weights), self.bias, self.layers, self.place)
        )
        return JudgeCalibration(self.centre, self.scale, probe, self.words, self.wording, self.cascade)


def _packed(weights: Sequence[float]) -> str:
    return base64.b64encode(np.asarray(weights, dtype="<f4").tobytes()).decode()


def _unpacked(weights: str) -> tuple[float, ...]:
    try:
        found = np.frombuffer(base64.b64decode(weights, validate=True), dtype="<f4")
    except (binascii.Error, ValueError):
        raise ValueError("not base64 of 32-bit numbers") from None
    if not (len(found) and np.isfinite(found).all()):
        raise ValueError("a probe's weights are finite numbers")
    return tuple(found.tolist())


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """An answer that people judged.

    Attributes:
        prompt: what it answers; empty where it answers nothing.
        source: where it is from; answers of one source may be alike in more than their harm.
        category: the kind of harm, or what kind it looks like.
    """

    prompt: str
    response: str
    harmful: bool
    source: str
    category: str = ""


def read_answers(path: Path, limit: int | None = None) -> list[LabelledAnswer]:
    """The answers of a file, at most the first ``limit``.

    A line holds ``response`` (text) and ``harmful`` (true or false), and may hold ``prompt``, ``source`` (by default
    the file's name) and ``category``. Further fields are ignored.

    Raises:
        DataError: a line cannot be used; the message names file and line.
        ConfigurationError: the file cannot be read or holds no answer.
    """
    found: list[LabelledAnswer] = []
    for number, raw in lines(path):
        if limit is not None and len(found) >= limit:
            break
        found.append(_answer(parse_object(raw, where := f"{path}:{number}"), where, path.stem))
    if not found:
        raise ConfigurationError(
            f"{path} holds no answer; one JSON object a line with 'response' and 'harmful' is needed"
        )
    return found


def _answer(record: Mapping[str, object], where: str, source: str) -> LabelledAnswer:
    fields = dict(record)
    if not isinstance(harmful := fields.get("harmful"), bool):
        raise DataError(f"{where}: 'harmful' must be true or false")
    prompt = text_field(fields, "prompt", where, empty=True) if fields.get("prompt") else ""
    named = {name: text_field(fields, name, where) for name in ("source", "category") if fields.get(name)}
    return LabelledAnswer(
        prompt, text_field(fields, "response", where), harmful, named.get("source", source), named.get("category", "")
    )


def shipped_answers() -> list[LabelledAnswer]:
    """64 mild examples of both kinds, written for this package: they show whether a model can judge; no probe is
    fitted on so few.
    """
    with resources.as_file(resources.files("tta_middleware") / "data" / "judging.jsonl") as shipped:
        return read_answers(shipped)


async def judged(
    judge: LLMJudge, answers: Sequence[LabelledAnswer], *, on_scored: OnScored = lambda _: None
) -> JudgedAnswers:
    """What a model says of labelled answers; states of its later layers as well, where there are enough for a probe.

    Raises:
        ConfigurationError: the engine cannot be asked.
        EngineError: the engine failed.
    """
    harmful = np.array([one.harmful for one in answers], dtype=bool)
    probing = min(harmful.sum(), (~harmful).sum()) >= LEAST_FOR_PROBE
    tried = await tried_reads(judge) if probing else ()
    words: list[float] = []
    states: dict[Read, list[FloatMatrix]] = {read: [] for read in tried}
    for at in range(0, len(answers), _AT_ONCE):
        some = answers[at : at + _AT_ONCE]
        asked = [one.response[:LONGEST] for one in some], [one.prompt or None for one in some]
        words += await judge.log_odds(*asked)
        for read, known in (await states_by_read(judge, *asked, tried)).items():
            states[read].append(known)
        for _ in some:
            on_scored("judged")
    return JudgedAnswers(
        np.array(words),
        {read: np.concatenate(known) for read, known in states.items()} or None,
        harmful,
        tuple(one.source for one in answers),
        tuple(one.prompt for one in answers),
    )


_LAYERS: Final = 9
"""Of a model, whose states at the verdict's place are tried: evenly from a third of the way to the last."""

_SPANS: Final = ((2, 3), (3, 4), (4, 5), (3, 5))
"""Sixths of the layers, from one to another, whose values over the answer are tried together."""


async def tried_reads(judge: LLMJudge) -> tuple[Read, ...]:
    """The places and layers that a probe of this judge may read."""
    count = await judge.layer_count()
    if not count:
        return ()
    first = max(1, round(count / 3))
    singles = sorted({round(at) for at in np.linspace(first, count, _LAYERS).tolist()})
    found: list[Read] = [("verdict", (layer,)) for layer in singles]
    if await judge.has_values():
        sixths = [round(count * at / 6) for at in range(7)]
        found += [("answer", tuple(range(sixths[low] + 1, sixths[high] + 1))) for low, high in _SPANS]
    return tuple(read for read in found if read[1])


async def states_by_read(
    judge: LLMJudge, texts: Sequence[str], prompts: Sequence[str | None], tried: Sequence[Read]
) -> dict[Read, FloatMatrix]:
    """(n, d) states of every place and layers, by two passes at most."""
    found: dict[Read, FloatMatrix] = {}
    for place in dict.fromkeys(place for place, _ in tried):
        mine = [layers for at, layers in tried if at == place]
        every = sorted({layer for layers in mine for layer in layers})
        wide = await judge.states(texts, prompts, every, place=place)
        apart = dict(zip(every, np.split(wide, len(every), axis=1), strict=True))
        found |= {(place, layers): np.hstack([apart[layer] for layer in layers]) for layers in mine}
    return found


def cascade_bounds(answers: Sequence[LabelledAnswer], fit: JudgeFit, judge: str) -> CascadeBounds | None:
    """Where the embedded moderator is sure in front of a judge with that fit; None where answers are too few to say."""
    harmful = np.array([one.harmful for one in answers], dtype=bool)
    if min(harmful.sum(), (~harmful).sum()) < LEAST_FOR_BOUNDS:
        return None
    first = local_scores([one.response[:LONGEST] for one in answers])
    return bounds_between(first, fit.scores, harmful, embedded_fingerprint(), judge)


def bounds_between(
    first: NDArray[np.float64], judge: NDArray[np.float64], harmful: NDArray[np.bool_], fingerprint: str, name: str
) -> CascadeBounds:
    """The bounds by two moderators' scores of the same answers, and what they are worth there at 0.5.

    Args:
        fingerprint: of the first moderator.
        name: of the judge.
    """
    bounds = CascadeBounds(first=fingerprint, judge=name, at=choose_bounds(first, judge, harmful))
    low, high = bounds.around([0.5])
    asked = (first >= low) & (first < (2.0 if high is None else high))
    measured = {
        "answers": float(len(first)),
        "asked": float(asked.mean()),
        "asked_of_harmless": float(asked[~harmful].mean()),
        "auc": auc(np.where(asked, judge, first), harmful),
        "auc_of_judge": auc(judge, harmful),
    }
    return bounds.model_copy(update={"measured": {name: round(value, 4) for name, value in measured.items()}})


def local_scores(texts: Sequence[str]) -> NDArray[np.float64]:
    """(n,) highest scores of the embedded moderator, whatever the language."""
    verdicts = EmbeddedModerator(unsupported_language="pass").score(texts)
    return np.array([verdict.score for verdict in verdicts])


def sample(answers: Sequence[LabelledAnswer], most: int, seed: int) -> list[LabelledAnswer]:
    """At most ``most`` answers, drawn evenly from sources and kinds as far as these go, in a seeded order."""
    if len(answers) <= most:
        return list(answers)
    draw = np.random.default_rng(seed)
    ranks: dict[tuple[str, bool], int] = {}
    keyed = []
    for at in draw.permutation(len(answers)).tolist():
        kind = answers[at].source, answers[at].harmful
        ranks[kind] = ranks.get(kind, -1) + 1
        keyed.append((ranks[kind], at))
    return [answers[at] for _, at in sorted(keyed, key=lambda one: one[0])[:most]]
