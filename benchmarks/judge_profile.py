"""Fits what a profile keeps of a judging model on scores that ``moderator_splits.py score`` collected.

    python benchmarks/judge_profile.py --data ../shared/data/labelled --scores FILE.jsonl --model MODEL \\
        --harmless training/negatives/qwen_answers.jsonl --profile tta_middleware/data/profiles

Does what ``tta calibrate --only judging`` does, on at most 150 answers of either label from each source of
:data:`labelled_answers.FITTED_ON`; the bounds of the cascade on those of them that ``local`` was not trained on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from labelled_answers import ANSWER, OF_EACH, SEEN_BY_LOCAL, Row, harmless_rows, read_rows, spread
from moderator_splits import Said

from tta_middleware.moderation.cascade import embedded_fingerprint
from tta_middleware.moderation.judge_fit import fit_judge
from tta_middleware.moderation.llm_judge import LLMJudge
from tta_middleware.profiles.fingerprint import model_hash
from tta_middleware.profiles.judging import LEAST_FOR_BOUNDS, JudgingFit, bounds_between, local_scores
from tta_middleware.profiles.store import Profile, load_profile, save_profile
from tta_middleware.testing.judging_engine import JudgingEngine


def fit(rows: Sequence[Row], scores: Path, model: str, folder: Path) -> None:
    """Write the model's profile."""
    said = Said.of(scores, list(rows))
    taken = spread(said.rows, OF_EACH)
    answers = said.answers(taken, probed=True)
    found = fit_judge(answers)
    here = [row for row, there in zip(said.rows, taken, strict=True) if there]
    unseen = ~np.isin(answers.sources, SEEN_BY_LOCAL)
    first = local_scores([row.text[:ANSWER] for row in here])
    enough = min(answers.harmful[unseen].sum(), (~answers.harmful[unseen]).sum()) >= LEAST_FOR_BOUNDS
    of_both = first[unseen], found.scores[unseen], answers.harmful[unseen]
    bounds = bounds_between(*of_both, embedded_fingerprint(), Path(model).stem) if enough else None
    digest = model_hash(model)
    known = load_profile(digest) or Profile(model=Path(model).stem, model_hash=digest)
    # The wording is the same for every model, so a scripted one tells it.
    judging = JudgingFit.of(found, LLMJudge(JudgingEngine()).wording(), answers.sources, bounds)
    save_profile(known.model_copy(update={"judging": judging, "version": 3}), folder=folder)
    print(digest, found.figures, bounds and bounds.measured)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--harmless", type=Path, action="append", default=[], help="more answers, all of them harmless")
    parser.add_argument("--profile", type=Path, required=True)
    chosen = parser.parse_args()
    more = [row for path in chosen.harmless for row in harmless_rows(path)]
    fit([*read_rows(chosen.data), *more], chosen.scores, chosen.model, chosen.profile)
