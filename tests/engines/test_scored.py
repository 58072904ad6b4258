"""Scores that go on from earlier ones are the scores that a fresh engine gives, for any order of texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.engines.decoding.columns import Columns
from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.engines.decoding.scored import MarkTable, Scored, common, marks
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.types import Message

texts = st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=9), min_size=1, max_size=8)


def nats_of(rows: list[int], first: int) -> list[float]:
    """A stand-in for a model: what follows a column depends on all up to it, and on the next one."""
    return [hash((*rows[: column + 1], rows[column + 1])) % 997 / 10 for column in range(first, len(rows) - 1)]


@given(texts, st.integers(0, 2))
def test_what_is_taken_over_is_what_would_have_been_computed(stream: list[list[int]], first: int) -> None:
    scored = Scored(10**9)
    for text in stream:
        # The last token is predicted, never read.
        rows = torch.tensor(text[:-1], dtype=torch.float32)[:, None]
        found = scored.begin(marks(rows), first)
        if found is not None:
            prefix, nats = found
            assert prefix.length < len(rows)
            assert nats == nats_of(text, first)[: len(nats)]
            assert len(nats) == max(0, prefix.length - first)
            assert torch.equal(prefix.columns[0][0][0, 0], rows[: prefix.length])
        keys = rows[None, None].clone()
        scored.keep(marks(rows), Prefix(Columns.of([(keys, keys)]), len(rows)), first, nats_of(text, first))


def test_memory_is_bounded() -> None:
    keys = torch.zeros(1, 1, 100, 1)
    scored = Scored(3 * (2 * keys.nbytes + 800))
    for number in range(50):
        scored.keep(marks(torch.full((100, 1), float(number))), Prefix(Columns.of([(keys, keys)]), 100), 0, [0.0] * 100)
    assert scored.nbytes <= 3 * (2 * keys.nbytes + 800)
    assert scored.begin(marks(torch.full((100, 1), 49.0)), 0) is not None
    assert scored.begin(marks(torch.full((100, 1), 3.0)), 0) is None


async def test_a_growing_text_and_its_rivals_score_as_on_a_fresh_engine(tiny_folder: Path) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompt = await engine.embed([Message("system", "Speak of the sea. " * 6), Message("user", "the fog")])
    other = await engine.embed([Message("system", "Speak of the sea. " * 6), Message("user", "the tide")])
    whole = [(7 * index) % 4000 + 5 for index in range(60)]
    asked = [
        (prompt, whole[:20]),
        (prompt, whole[:45]),
        (prompt, whole),
        (prompt, [*whole[:20], 9, 9, 9]),
        (other, whole[:20]),
        (prompt, whole[:20]),
        (prompt, whole[:1]),
    ]
    for question, ids in asked:
        [score] = await engine.mean_nll(question, [ids])
        fresh = TransformersEngine(str(tiny_folder), dtype="float64")
        assert [score] == pytest.approx(await fresh.mean_nll(question, [ids]), rel=1e-6)
        await fresh.aclose()
    await engine.aclose()


async def test_a_growing_text_runs_only_what_is_new(
    tiny_folder: Path, count_columns: Callable[[TransformersEngine], list[int]]
) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompt = await engine.embed([Message("system", "Speak of the sea. " * 6), Message("user", "the fog")])
    whole = [(7 * index) % 4000 + 5 for index in range(60)]
    await engine.mean_nll(prompt, [whole[:30]])
    columns = count_columns(engine)
    await engine.mean_nll(prompt, [whole])
    assert sum(columns) == 60 - 30 + 1
    await engine.aclose()


def kept(scored: Scored, text: list[int], owner: int | None = None) -> None:
    rows = torch.tensor(text, dtype=torch.float32)[:, None]
    keys = rows[None, None].clone()
    scored.keep(marks(rows), Prefix(Columns.of([(keys, keys)]), len(rows)), len(rows) - 1, [], owner)


def knows(scored: Scored, text: list[int]) -> int:
    return scored.shared_with(marks(torch.tensor(text, dtype=torch.float32)[:, None]))


def test_of_a_text_that_grows_only_the_newest_is_kept() -> None:
    scored, closing = Scored(10**9), [-1] * 20
    for length in range(50, 500, 50):
        kept(scored, [*range(length), *closing], owner=1)
        kept(scored, [*range(1000, 1000 + length), *closing], owner=2)
    assert len(scored) == 2
    assert knows(scored, [*range(500)]) == 450
    kept(scored, [*range(450), -2, -2], owner=1)  # another question on the same text
    assert len(scored) == 2
    kept(scored, [*range(90), *range(2000, 2200)], owner=1)  # another text of the same owner
    assert len(scored) == 3


def test_an_owner_that_is_forgotten_leaves_nothing_and_the_others_everything() -> None:
    scored = Scored(10**9)
    for owner in (1, 2, None):
        kept(scored, [owner or 0] * 100, owner)
    scored.forget(1)
    assert [knows(scored, [owner] * 100) for owner in (1, 2, 0)] == [0, 100, 100]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(20, 300)), min_size=1, max_size=40))
def test_whoever_holds_most_gives_way(texts: list[tuple[int, int]]) -> None:
    scored, room = Scored(8 * 16 * 400), 8 * 16 * 400
    for at, (owner, length) in enumerate(texts):
        kept(scored, [1000 * at + owner, *range(length)], owner)
        assert scored.nbytes <= room
    # A short text of a fifth owner stays whatever the first one asks for.
    kept(scored, [7] * 30, owner=5)
    for at in range(20):
        kept(scored, [-at, *range(300)], owner=1)
    assert knows(scored, [7] * 30) == 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_told_apart_by_every_number(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 24).to(dtype)
    changed = rows.clone()
    changed[31, 7] += 1
    assert common(marks(rows), marks(rows.clone())) == 50
    assert common(marks(rows), marks(changed)) == 31
    assert common(marks(rows[:20]), marks(rows)) == 20


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=20), st.lists(st.integers(0, 2), max_size=30), st.data()
)
def test_a_table_compares_one_text_with_all_as_each_alone(
    texts: list[list[int]], asked: list[int], data: st.DataObject
) -> None:
    known, mine = [np.array(text, dtype=np.int64) for text in texts], np.array(asked, dtype=np.int64)
    table = MarkTable(known)
    wanted = data.draw(st.lists(st.booleans(), min_size=len(known), max_size=len(known)))
    assert table.common(mine).tolist() == [common(text, mine) for text in known]
    table.keep(wanted)
    left = [text for text, stays in zip(known, wanted, strict=True) if stays]
    for text in known:
        table.add(text)
    assert len(table) == len(left) + len(known)
    assert table.common(mine).tolist() == [common(text, mine) for text in [*left, *known]]
