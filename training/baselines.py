"""What the moderator is measured against, on the same rows."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

KEYWORDS = frozenset(
    [
        *("attack", "bomb", "bombs", "bribe", "cocaine", "counterfeit", "deadly", "drugs", "exploit", "explosive"),
        *("fake", "fraud", "gun", "guns", "hack", "hacking", "hate", "heroin", "idiot", "illegal", "kill", "killed"),
        *("launder", "malware", "meth", "murder", "naked", "phishing", "poison", "porn", "ransomware", "rape"),
        *("scam", "sex", "shoot", "stab", "steal", "stupid", "suicide", "terrorist", "threaten", "torture"),
        *("virus", "weapon", "weapons", "worthless"),
    ]
)

_PROFANITY = "import json,sys,warnings; warnings.simplefilter('ignore'); from profanity_check import predict_prob\n"
_PROFANITY += "print(json.dumps(predict_prob(json.load(sys.stdin)).tolist()))"


def keyword_scores(texts: Sequence[str]) -> NDArray[np.float64]:
    """(n,) how many of the keywords occur."""
    return np.array([len(KEYWORDS & set(re.findall("[a-z]+", text.lower()))) for text in texts], dtype=float)


def profanity_scores(python: Path, texts: Sequence[str]) -> NDArray[np.float64]:
    """(n,) probabilities of alt-profanity-check, run by an interpreter that has it installed."""
    done = subprocess.run(
        [str(python), "-c", _PROFANITY], input=json.dumps(list(texts)), capture_output=True, text=True, check=True
    )
    return np.array(json.loads(done.stdout))


def one_linear_model(texts: Sequence[str], labels: NDArray[np.int64], parts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) out-of-fold probabilities of the first try: TF-IDF with logistic regression on whole responses only."""
    scores = np.empty(len(texts))
    for part in np.unique(parts):
        inside = np.flatnonzero(parts != part)
        model = pipeline().fit([texts[i] for i in inside], labels[inside])
        outside = np.flatnonzero(parts == part)
        scores[outside] = model.predict_proba([texts[i] for i in outside])[:, 1]
    return scores


def pipeline() -> Pipeline:
    """TF-IDF of word 1-2-grams with logistic regression."""
    return make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=300, class_weight="balanced"),
    )
