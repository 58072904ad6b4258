"""Scores that go on from earlier ones are the scores that a fresh engine gives, for any order of texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.engines.decoding.scored import Scored
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
        found = scored.begin(rows, first)
        if found is not None:
            prefix, nats = found
            assert prefix.length < len(rows)
            assert nats == nats_of(text, first)[: len(nats)]
            assert len(nats) == max(0, prefix.length - first)
            assert torch.equal(prefix.layers[0][0][0, 0], rows[: prefix.length])
        keys = rows[None, None].clone()
        scored.keep(rows, Prefix([(keys, keys)], len(rows)), first, nats_of(text, first))


def test_memory_is_bounded() -> None:
    keys = torch.zeros(1, 1, 100, 1)
    scored = Scored(3 * (2 * keys.nbytes + 400))
    for number in range(50):
        scored.keep(torch.full((100, 1), float(number)), Prefix([(keys, keys)], 100), 0, [0.0] * 100)
    assert scored.nbytes <= 3 * (2 * keys.nbytes + 400)
    assert scored.begin(torch.full((100, 1), 49.0), 0) is not None
    assert scored.begin(torch.full((100, 1), 3.0), 0) is None


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


async def test_a_growing_text_runs_only_what_is_new(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(str(tiny_folder), dtype="float64")
    prompt = await engine.embed([Message("system", "Speak of the sea. " * 6), Message("user", "the fog")])
    whole = [(7 * index) % 4000 + 5 for index in range(60)]
    await engine.mean_nll(prompt, [whole[:30]])
    forward, columns = engine._loaded.forward, []

    def counted(rows, packed):
        columns.append(rows.shape[1])
        return forward(rows, packed)

    monkeypatch.setattr(engine._loaded, "forward", counted)
    await engine.mean_nll(prompt, [whole])
    assert sum(columns) == 60 - 30 + 1
    await engine.aclose()
