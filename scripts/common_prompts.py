"""Tables of a run of ``tta eval`` over the flagged prompts that every one of some methods has finished.

    python scripts/common_prompts.py RUN --methods race,noise,tsa [--seeds 0,1,2] [--of harmless]

A run that was cut off has finished short repairs sooner than long ones, so rows over whatever is there would favour
slow methods; over common prompts all methods answer the same questions. ``--of harmless`` takes the prompts that their
set calls harmless (XSTest's safe half, say), which are left out otherwise. Prints Markdown: outcome, equal tokens,
agreement of the judges.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from headline_tables import page

from tta_middleware.evaluation.summary import summarise
from tta_middleware.files.jsonl import Record


def common(records: Sequence[Record], methods: Sequence[str], seeds: Sequence[int]) -> list[Record]:
    """The records of prompts whose undefended answer was flagged and that all methods have finished with all seeds."""
    flagged = [
        record
        for record in records
        if record["method"] in methods and record["seed"] in seeds and record["baseline"]["flagged"]
    ]
    done = {(record["id"], record["method"], record["seed"]) for record in flagged}
    whole = {
        id_
        for id_ in {record["id"] for record in flagged}
        if all((id_, method, seed) in done for method in methods for seed in seeds)
    }
    return [record for record in flagged if record["id"] in whole]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--methods", type=lambda text: text.split(","), required=True)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--of", choices=["harmful", "harmless"], default="harmful")
    chosen = parser.parse_args()
    lines = (chosen.run / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    # A summary counts no harmless prompts as neutralised, so they are asked for by themselves and lose the mark.
    harmless = chosen.of == "harmless"
    records = [{**record, "benign": False} for record in records if bool(record.get("benign")) is harmless]
    found = common(records, chosen.methods, chosen.seeds)
    if not found:
        raise SystemExit(f"no flagged prompt was finished by {', '.join(chosen.methods)} with these seeds")
    settings = json.loads((chosen.run / "run.json").read_text(encoding="utf-8"))["settings"]
    print("\n\n".join(page(chosen.run.name, summarise(found, settings), chosen.methods, brief=False)))
