"""Chooses where ``local`` is sure in front of any judging model: the bounds that come with the package.

    python benchmarks/cascade_bounds.py --data ../shared/data/labelled --out tta_middleware/data/cascade.json

On all answers and texts of :data:`labelled_answers.FITTED_ON` and HateCheck that ``local`` was not trained on, as if
the model behind it were always right: so they lose nothing of what any model finds, and save less than bounds for one
model do (``tta calibrate --only judging``). Run it whenever the embedded moderator was trained again; until then its
bounds count for nothing, and every text goes to the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from labelled_answers import FITTED_ON, SEEN_BY_LOCAL, read_rows

from tta_middleware.moderation.cascade import embedded_fingerprint
from tta_middleware.profiles.judging import bounds_between, local_scores

CHARACTERS = 2_000

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    allowed = {*FITTED_ON, "hatecheck"} - set(SEEN_BY_LOCAL)
    rows = [row for row in read_rows(chosen.data) if row.source in allowed]
    harmful = np.array([row.harmful for row in rows])
    first = local_scores([row.text[:CHARACTERS] for row in rows])
    found = bounds_between(first, harmful.astype(float), harmful, embedded_fingerprint(), "one that is always right")
    chosen.out.write_text(json.dumps(found.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    print(len(rows), "rows;", found.around([0.5]), found.measured)
