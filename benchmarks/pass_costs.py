"""What prompts and texts to score cost beside a decode step: processor time of single passes of the in-process engine.

    OMP_NUM_THREADS=1 python benchmarks/pass_costs.py

A pass decodes one token for each of so many sequences of 60 columns; beside them run segments of so many columns behind
a beginning of 30. Given is the least of ``--repeat`` passes, in milliseconds of processor time over all threads: with
one thread neighbours on the machine change it little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import anyio
import torch

from tta_middleware.engines.decoding.beside import Segment
from tta_middleware.engines.decoding.kv_slots import KVSlots, Prefix
from tta_middleware.engines.decoding.loaded import PackedModel
from tta_middleware.engines.decoding.packed import Pass
from tta_middleware.engines.transformers import TransformersEngine

SEQUENCES = (1, 4, 8, 16, 32, 48)
BESIDE = ((), (20,), (40,), (80,), (20, 20), (20, 20, 20, 20))
_COLUMNS, _BEGINNING = 60, 30


def forward(model: PackedModel, slots: KVSlots, segments: Sequence[Segment]) -> None:
    parts = [segment.rows for segment in segments]
    if slots.lengths:
        slots.reserve()
        parts.insert(0, rows(model, len(slots.lengths)))
    model.forward(torch.cat(parts)[None], Pass(slots, segments))


def rows(model: PackedModel, count: int) -> torch.Tensor:
    return model.token_columns([100 + index for index in range(count)])


def milliseconds(model: PackedModel, whole: Prefix, sequences: int, beside: Sequence[int], repeat: int) -> float:
    """The least processor time of a pass."""
    slots, found = KVSlots(sequences, model.column_bytes), []
    for _ in range(sequences):
        slots.add(whole)
    for _ in range(repeat):
        segments = [Segment(rows(model, count), whole.cut(_BEGINNING), keep=1) for count in beside]
        begun = time.process_time()
        forward(model, slots, segments)
        found.append(time.process_time() - begun)
    return 1000 * min(found)


async def main(options: argparse.Namespace) -> None:
    engine = TransformersEngine(options.model, dtype=options.dtype, path="packed")
    await engine.load()
    model = engine._loaded
    if not isinstance(model, PackedModel):
        raise SystemExit("the engine runs this model plainly")
    begin = Segment(rows(model, _COLUMNS), None, keep=1)
    forward(model, KVSlots(0), [begin])
    print(f"{model.dtype}, {torch.get_num_threads()} threads\n\n| sequences | columns beside | ms |\n|---|---|---|")
    for sequences in SEQUENCES:
        for beside in BESIDE if sequences == 32 else BESIDE[:2]:
            cost = milliseconds(model, begin.prefix(), sequences, beside, options.repeat)
            print(f"| {sequences} | {' + '.join(map(str, beside)) or 'none'} | {cost:.0f} |", flush=True)
    await engine.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeat", type=int, default=4)
    anyio.run(main, parser.parse_args())
