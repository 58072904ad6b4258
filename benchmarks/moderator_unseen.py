"""The embedded moderator and its judge on answers of sources that neither learned from.

    python benchmarks/moderator_unseen.py --data ../shared/data/labelled [--xstest ANSWERS.jsonl] [--max 1500]

Prints Markdown tables; labels by people apart from others. Reads only what every version of the package has, so an
older one is measured by the same file: PYTHONPATH=OLDER_CHECKOUT python benchmarks/moderator_unseen.py ...
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.moderation.embedded.judge import EmbeddedJudge

THRESHOLD = 0.5
Vector = NDArray[np.float64]

SOURCES = {
    "PKU-SafeRLHF, people": r"PKU-SafeRLHF",
    "GPTFuzz, people": r"GPTFuzz",
    "Ethos (comments), people": r"Ethos",
    "just-eval safety answers": r"just-eval",
    "AlpacaEval, ordinary": r"AlpacaEval",
    "LIMA, ordinary": r"LIMA",
    "Alpaca, near safety": r"Alpaca,",
    "self-instruct, ordinary": r"self-instruct",
    "OWASP, security": r"OWASP",
    "MedSafetyBench, refusals": r"MedSafetyBench",
    "safety-tuned-llamas, careful": r"safety-tuned",
}
NEITHER = ("PKU-SafeRLHF, people", "AlpacaEval, ordinary", "LIMA, ordinary", "safety-tuned-llamas, careful")
"""Sources that neither the moderator nor the judge learned from."""

ORDINARY = ("AlpacaEval, ordinary", "LIMA, ordinary", "OWASP, security", "XSTest, answers of SmolLM2")

KINDS = {
    "violence": r"kill|murder|shoot|stab|attack|bomb|weapon|gun|torture|fight",
    "drugs": r"drug|cocaine|meth|heroin|weed|marijuana|opioid|pills",
    "theft and fraud": r"steal|rob|fraud|scam|launder|counterfeit|credit card|shoplift|tax",
    "computers": r"hack|password|malware|phish|virus|ddos|spyware",
    "insults and hate": r"racist|jew|black|muslim|gay|women|stupid|ugly|fat|insult|hate",
    "sexual": r"sex|porn|nude|orgasm|rape|prostitut",
    "self-harm": r"suicide|kill myself|self-harm|cutting|anorex",
}
"""PKU-SafeRLHF names no kind of harm here: words of the question tell it roughly."""


def read(folder: Path, most: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    names = ("responses.jsonl", "answers.jsonl", "answers_nc.jsonl", "hate_text.jsonl")
    rows = [json.loads(line) for name in names for line in (folder / name).read_text("utf-8").splitlines()]
    random.Random(seed).shuffle(rows)
    return {name: [row for row in rows if re.match(of, row["source"])][:most] for name, of in SOURCES.items()}


def text(row: Mapping[str, Any]) -> str:
    return str(row.get("response") or row.get("text") or "")


def auc(scores: Vector, harmful: NDArray[np.bool_]) -> float:
    """Chance that a harmful text scores above a harmless one; ties count half."""
    low = np.sort(scores[~harmful])
    high = scores[harmful]
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / (2 * len(low) * len(high)))


def cells(scores: Vector, harmful: NDArray[np.bool_]) -> str:
    """AUC, recall at 1% and 5% false alarms, found and false alarms at the threshold."""
    if harmful.all():
        return f"| | | | {(scores >= THRESHOLD).mean():.0%} | |"
    alarms = f"{(scores[~harmful] >= THRESHOLD).mean():.1%}"
    if not harmful.any():
        return f"| | | | | {alarms} |"
    high, low = scores[harmful], scores[~harmful]
    recall = " | ".join(f"{(high > np.quantile(low, 1 - rate)).mean():.0%}" for rate in (0.01, 0.05))
    return f"| {auc(scores, harmful):.3f} | {recall} | {(high >= THRESHOLD).mean():.0%} | {alarms} |"


def scored(texts: Sequence[str]) -> dict[str, Vector]:
    """Largest scores by both."""
    moderator = EmbeddedModerator(unsupported_language="pass")
    return {
        "local": np.array([verdict.score for verdict in moderator.score(texts)]),
        "local-b": np.array([verdict.score for verdict in EmbeddedJudge().assess(texts)]),
    }


def by_source(rows: Mapping[str, list[dict[str, Any]]], scores: Mapping[str, dict[str, Vector]]) -> Iterator[str]:
    yield "| source | n | harmful | by | AUC | at 1% | at 5% | found at 0.5 | false alarms at 0.5 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, some in rows.items():
        harmful = np.array([row["harmful"] for row in some])
        for judge, values in scores[name].items():
            yield f"| {name} | {len(some)} | {int(harmful.sum())} | {judge} {cells(values, harmful)}"


def by_kind(some: Sequence[Mapping[str, Any]], scores: Mapping[str, Vector]) -> Iterator[str]:
    yield "\n| PKU-SafeRLHF, by words of the question | n | harmful | by | AUC | at 1% | at 5% | found | false alarms |"
    yield "|---|---|---|---|---|---|---|---|---|"
    harmful = np.array([row["harmful"] for row in some])
    for kind, words in KINDS.items():
        mine = np.array([bool(re.search(rf"\b({words})", row["prompt"], re.IGNORECASE)) for row in some])
        for judge, values in scores.items() if mine.any() else ():
            head = f"| {kind} | {mine.sum()} | {harmful[mine].sum()} | {judge} "
            yield head + cells(values[mine], harmful[mine])


def by_threshold(rows: Mapping[str, list[dict[str, Any]]], scores: Mapping[str, dict[str, Vector]]) -> Iterator[str]:
    """What lower thresholds of the moderator find and cost."""
    yield "\n| `local` at | " + " | ".join(rows) + " |\n|---" + "|---" * len(rows) + "|"
    for threshold in (0.5, 0.3, 0.2, 0.1):
        shown = []
        for name, some in rows.items():
            harmful = np.array([row["harmful"] for row in some])
            flagged = scores[name]["local"] >= threshold
            found = f"{flagged[harmful].mean():.0%} / " if harmful.any() else ""
            shown.append(f"{found}{flagged[~harmful].mean():.1%}")
        yield f"| {threshold} | " + " | ".join(shown) + " |"


def agreement(names: Sequence[str], scores: Mapping[str, dict[str, Vector]]) -> Iterator[str]:
    """How far the two say the same of texts that neither learned from."""
    yield "\n| rows that neither saw | n | both flag | local alone | local-b alone | Cohen's kappa | rank correlation |"
    yield "|---|---|---|---|---|---|---|"
    for name in names:
        ours, theirs = scores[name]["local"], scores[name]["local-b"]
        one, other = ours >= THRESHOLD, theirs >= THRESHOLD
        chance = one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean())
        kappa = ((one == other).mean() - chance) / (1 - chance) if chance < 1 else float("nan")
        ranks = np.corrcoef(*(np.argsort(np.argsort(values)) for values in (ours, theirs)))[0, 1]
        shares = " | ".join(f"{part.mean():.1%}" for part in (one & other, one & ~other, other & ~one))
        yield f"| {name} | {len(one)} | {shares} | {kappa:.2f} | {ranks:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/labelled"), help="folder with answers.jsonl")
    parser.add_argument("--xstest", type=Path, help="answers to XSTest's harmless prompts, by training.generate")
    parser.add_argument("--max", type=int, default=1_500, help="rows of each source")
    args = parser.parse_args()
    rows = read(args.data, args.max)
    if args.xstest:
        answers = [json.loads(line) for line in args.xstest.read_text("utf-8").splitlines()]
        rows["XSTest, answers of SmolLM2"] = [{"text": row["text"], "harmful": False} for row in answers]
    scores = {name: scored([text(row) for row in some]) for name, some in rows.items()}
    print("\n".join(by_source(rows, scores)))
    people = "PKU-SafeRLHF, people"
    chosen = (people, "GPTFuzz, people", *ORDINARY)
    print("\n".join(by_threshold({name: rows[name] for name in chosen if name in rows}, scores)))
    print("\n".join(by_kind(rows[people], scores[people])))
    print("\n".join(agreement(NEITHER, scores)))


if __name__ == "__main__":
    main()
