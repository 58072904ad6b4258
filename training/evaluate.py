"""Measures on rows that the judged model never saw: ``python -m training.evaluate`` after ``training.build``.

Every moderator score here is out of fold: folds by goal or source (answers) or by the beginning of the text (other
sets), and calibrations fitted on the other folds. Sources that training never read: benchmarks/moderator_unseen.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

from training import baselines, build
from training.calibrate import calibrate, expected_calibration_error, shifted, subdued
from training.data import LABELLED, NEGATIVES, OPENAI, Row, fold, read
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.embedded.judge import EmbeddedJudge

Vector = NDArray[np.float64]
GOALS = ("jailbreakbench", "refusal_direction", "refusal_direction/benign")
"""Sources whose requests are known, with JailbreakBench's categories."""

MIXED = ("jailbreakbench", "refusal_direction", "latent", "safetext")
"""Sources with harmful and harmless answers."""


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """What was measured, as Markdown and as plot data."""

    lines: list[str]
    reliability: dict[str, tuple[Vector, Vector]]


def recall_at(scores: Vector, labels: Vector, rate: float) -> float:
    """Share of positives above the threshold that lets ``rate`` of the negatives through."""
    return float((scores[labels == 1] > np.quantile(scores[labels == 0], 1 - rate)).mean())


def line(name: str, scores: Vector, labels: Vector) -> str:
    """One table line: n, positives, AUC, AUPRC, recall at 1% and 5% false positives."""
    cells = (
        roc_auc_score(labels, scores),
        average_precision_score(labels, scores),
        recall_at(scores, labels, 0.01),
        recall_at(scores, labels, 0.05),
    )
    numbers = " | ".join(f"{cell:.3f}" for cell in cells)
    return f"| {name} | {len(labels)} | {int(labels.sum())} | {numbers} |"


HEAD = [
    "| rows | n | positive | AUC | AUPRC | recall at 1% FPR | recall at 5% FPR |",
    "|---|---|---|---|---|---|---|",
]


def cross_calibrated(rows: Sequence[Row], logits: Vector) -> dict[str, Vector]:
    """(rows,) probabilities per head; each fold's calibration is fitted on the other folds."""
    parts = np.array([fold(row.group, build.FOLDS) for row in rows])
    made = {}
    for column, head in enumerate(build.CALIBRATED):
        index, target, weight = build.calibration_set(rows, head)
        made[head] = np.full(len(rows), np.nan)
        for part in range(build.FOLDS):
            used = parts[index] != part
            knots = calibrate(logits[index[used], column], target[used], weight[used])
            mine = parts == part
            if head == "harm":
                others = np.flatnonzero(~mine)
                knots = shifted(knots, build.half([rows[i] for i in others], logits[others, column]))
            else:
                knots = subdued(knots)
            made[head][mine] = np.interp(logits[mine, column], *knots)
    return made


def harm_section(rows: Sequence[Row], scores: Vector, profanity: Path | None) -> Iterable[str]:
    """Harmful answers per source, beside the baselines and the judge, which learned from none of these sources."""
    index = [i for i, row in enumerate(rows) if row.source in build.ANSWERS]
    texts = [rows[i].text for i in index]
    labels = np.array([rows[i].targets["harm"] for i in index])
    sources = np.array([rows[i].source.split("/")[0] for i in index])
    parts = np.array([fold(rows[i].group, build.FOLDS) for i in index])
    linear = baselines.one_linear_model(texts, labels.astype(int), parts)
    judged = np.array([verdict.scores["harm"] for verdict in EmbeddedJudge().assess(texts)])
    models = {"local": scores[index], "local-b": judged, "one TF-IDF model": linear}
    models["keywords"] = baselines.keyword_scores(texts)
    if profanity:
        models["alt-profanity-check"] = baselines.profanity_scores(profanity, texts)
    yield from ["## Harmful answers, split by goal", "", *HEAD]
    for source in ("all", *MIXED):
        mine = np.ones(len(index), bool) if source == "all" else sources == source
        yield from (line(f"{source}: {name}", value[mine], labels[mine]) for name, value in models.items())


def harmless_section(rows: Sequence[Row], scores: Mapping[str, Vector]) -> Iterable[str]:
    """Texts that nobody should flag: what the first try makes of them, and what the moderator does (any category)."""
    answers = [row for row in rows if row.source in build.ANSWERS]
    first = baselines.pipeline().fit([row.text for row in answers], [int(row.targets["harm"]) for row in answers])
    largest = np.max([scores[name] for name in build.CALIBRATED], axis=0)
    yield from ["", "## Share of harmless texts flagged at 0.5", ""]
    yield from ["| texts | n | one TF-IDF model | local |", "|---|---|---|---|"]
    for source in ("refusal", "babble", "fragment"):
        index = [i for i, row in enumerate(rows) if row.source == source]
        flagged = (first.predict_proba([rows[i].text for i in index])[:, 1] >= 0.5).mean()
        yield f"| {source} (ours, out of fold) | {len(index)} | {flagged:.1%} | {(largest[index] >= 0.5).mean():.1%} |"
    for source in build.ORDINARY:
        index = [i for i, row in enumerate(rows) if row.source == source and not row.targets["harm"]]
        yield f"| {source} (out of fold) | {len(index)} | | {(largest[index] >= 0.5).mean():.1%} |"
    held = [row["text"] for row in read(NEGATIVES / "answers_held_out.jsonl")]
    ours = np.mean([verdict.flagged for verdict in EmbeddedModerator().score(held)])
    flagged = (first.predict_proba(held)[:, 1] >= 0.5).mean()
    yield f"| harmless answers of the embedded model, unseen topics | {len(held)} | {flagged:.1%} | {ours:.1%} |"


def jailbreak_categories(rows: Sequence[Row], scores: Vector) -> Iterable[str]:
    """Per category of JailbreakBench: its harmful answers against all harmless ones of the same two sources."""
    yield from ["", "## Harmful answers by JailbreakBench category", "", *HEAD]
    index = [i for i, row in enumerate(rows) if row.source in GOALS]
    labels = np.array([rows[i].targets["harm"] for i in index])
    names = np.array([str(rows[i].extra["category"]) for i in index])
    for name in sorted(set(names) - {"benign"}):
        mine = (labels == 0) | (names == name)
        yield line(name, scores[index][mine], labels[mine])


def prefix_section(rows: Sequence[Row], scores: Vector) -> Iterable[str]:
    """The first 80 to 700 characters of the answers, as a stream shows them."""
    index = [i for i, row in enumerate(rows) if row.source == "prefix" and not row.group.startswith("own:")]
    labels = np.array([rows[i].extra["harm"] for i in index])
    texts = [rows[i].text for i in index]
    whole = [i for i, row in enumerate(rows) if row.source in build.ANSWERS]
    parts = np.array([fold(rows[i].group, build.FOLDS) for i in whole])
    linear = _first_try_on(texts, [rows[i] for i in index], [rows[i] for i in whole], parts)
    yield from ["", "## Beginnings of answers (80 to 700 characters), split by goal", "", *HEAD]
    yield line("local", scores[index], labels)
    yield line("one TF-IDF model", linear, labels)
    yield line("keywords", baselines.keyword_scores(texts), labels)


def _first_try_on(texts: Sequence[str], rows: Sequence[Row], whole: Sequence[Row], parts: NDArray[np.int64]) -> Vector:
    own = np.array([fold(row.group, build.FOLDS) for row in rows])
    labels = np.array([row.targets["harm"] for row in whole], dtype=int)
    scores = np.empty(len(rows))
    for part in range(build.FOLDS):
        inside = np.flatnonzero(parts != part)
        mine = np.flatnonzero(own == part)
        model = baselines.pipeline().fit([whole[i].text for i in inside], labels[inside])
        scores[mine] = model.predict_proba([texts[i] for i in mine])[:, 1]
    return scores


def category_section(rows: Sequence[Row], scores: Mapping[str, Vector], profanity: Path | None) -> Iterable[str]:
    """The OpenAI set, per category, split by the beginning of the text."""
    index = [i for i, row in enumerate(rows) if row.source == "openai"]
    texts = [rows[i].text for i in index]
    others = {"keywords": baselines.keyword_scores(texts)}
    if profanity:
        others["alt-profanity-check"] = baselines.profanity_scores(profanity, texts)
    yield from ["", "## Categories on the OpenAI set", "", *HEAD]
    for key, name in OPENAI.items():
        labels = np.array([rows[i].extra["labels"].get(key, np.nan) for i in index])
        known = ~np.isnan(labels)
        for model, value in ({"local": scores[name][index]} | others).items():
            yield line(f"{name}: {model}", value[known], labels[known])
    labels = np.array([float(any(rows[i].extra["labels"].values())) for i in index])
    largest = np.max([scores[name][index] for name in build.CALIBRATED], axis=0)
    for model, value in ({"local (largest score)": largest} | others).items():
        yield line(f"any label: {model}", value, labels)


def toxicity_section(rows: Sequence[Row], scores: Mapping[str, Vector], profanity: Path | None) -> Iterable[str]:
    """Perspective's attributes on continuations of web text."""
    largest = np.max([scores[name] for name in build.CALIBRATED[1:]], axis=0)
    yield from ["", "## Toxicity on other sets", "", *HEAD]
    index = [i for i, row in enumerate(rows) if row.source == "perspective"]
    labels = np.array([float(rows[i].extra["scores"].get("toxicity", 0.0) >= 0.5) for i in index])
    texts = [rows[i].text for i in index]
    models = {"local (largest category head)": largest[index], "local (hate)": scores["hate"][index]}
    models["keywords"] = baselines.keyword_scores(texts)
    if profanity:
        models["alt-profanity-check"] = baselines.profanity_scores(profanity, texts)
    yield from (line(f"perspective: {name}", value, labels) for name, value in models.items())
    toxicity = np.array([rows[i].extra["scores"].get("toxicity", 0.0) for i in index])
    pearson = np.corrcoef(largest[index], toxicity)[0, 1]
    yield f"\nPearson of the largest score with Perspective's toxicity: {pearson:.3f}"


def calibration_section(
    rows: Sequence[Row], scores: Mapping[str, Vector], reliability: dict[str, tuple[Vector, Vector]]
) -> Iterable[str]:
    """Expected calibration error, ten bins, on held-out rows."""
    yield from ["", "## Expected calibration error (ten bins, held-out rows)", "", "| score | rows | n | ECE |"]
    yield "|---|---|---|---|"
    groups = [("harm", "answers", build.ANSWERS)] + [
        ("harm", source, {source, f"{source}/benign"}) for source in ("jailbreakbench", "refusal_direction")
    ]
    groups += [("harm", "beginnings of answers", {"prefix"})]
    groups += [(name, "OpenAI set", {"openai"}) for name in build.CALIBRATED[1:]]
    for head, label, sources in groups:
        index = [i for i, row in enumerate(rows) if row.source in sources and head in row.targets]
        truth = np.array([float(rows[i].extra.get(head, rows[i].targets[head])) for i in index])
        reliability[f"{head}, {label}"] = (scores[head][index], truth)
        yield f"| {head} | {label} | {len(index)} | {expected_calibration_error(scores[head][index], truth):.3f} |"


def evaluate(folder: Path, work: Path, profanity: Path | None) -> Report:
    rows = build.corpus(folder)
    scores = cross_calibrated(rows, np.load(work / "local_logits.npy"))
    reliability: dict[str, tuple[Vector, Vector]] = {}
    lines = [
        *harm_section(rows, scores["harm"], profanity),
        *harmless_section(rows, scores),
        *jailbreak_categories(rows, scores["harm"]),
        *prefix_section(rows, scores["harm"]),
        *category_section(rows, scores, profanity),
        *toxicity_section(rows, scores, profanity),
        *calibration_section(rows, scores, reliability),
    ]
    return Report(lines, reliability)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=LABELLED)
    parser.add_argument("--work", type=Path, default=build.WORK)
    parser.add_argument("--profanity-python", type=Path, help="interpreter with alt-profanity-check installed")
    parser.add_argument("--plots", type=Path, help="folder for the calibration plots (needs matplotlib)")
    args = parser.parse_args()
    report = evaluate(args.data, args.work, args.profanity_python)
    text = "\n".join(report.lines)
    (args.work / "report.md").write_text(text + "\n", "utf-8")
    print(text)
    if args.plots:
        from training.plots import draw

        draw(report.reliability, args.plots)


if __name__ == "__main__":
    main()
