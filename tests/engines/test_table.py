"""Measures on the embedding table: the nearest tokens are those of float32, and directions are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tta_middleware.engines.decoding.packing import can_pack
from tta_middleware.engines.models import resolve_model
from tta_middleware.engines.prompt import table as module
from tta_middleware.engines.prompt.table import directions, nearest_tokens
from tta_middleware.engines.prompt.vocabulary import Vocabulary, load_vocabulary
from tta_middleware.engines.transformers import TransformersEngine
from tta_middleware.errors import ConfigurationError
from tta_middleware.types import FloatMatrix, IntVector

WORDS = ("protect safe ethical help", "safe", "harbour light")
# Cosines that float32 cannot tell apart.
TIE = 1e-6


def over(table: torch.Tensor, tokenizer: Any) -> Vocabulary:
    embedding: Any = torch.nn.Embedding.from_pretrained(table)  # type: ignore[no-untyped-call]
    return Vocabulary(tokenizer, embedding, frozenset(), None)


@pytest.fixture(scope="module")
def real() -> Vocabulary:
    """SmolLM2's table in float32."""
    return load_vocabulary(resolve_model("smollm2"))


@pytest.fixture(scope="module")
def narrow(real: Vocabulary) -> Vocabulary:
    """The same in bfloat16, where the shortlist is at work on processors that multiply it."""
    return over(real.table.bfloat16(), real.tokenizer)


@pytest.fixture
def odd(tokenizer: Any) -> Vocabulary:
    """A bfloat16 table with what no good table has: rows of zeros, twins, near twins, very short and long rows."""
    rows = torch.randn((49155, 96), generator=torch.Generator().manual_seed(0))
    rows[100:110] = 0.0
    rows[200:210] = rows[300:310]
    rows[400:900] = rows[400] + 0.002 * rows[400:900]
    rows[1000:1010] *= 1e-6
    rows[1100:1110] *= 1e4
    return over(rows.bfloat16(), tokenizer)


def in_float32(model: Vocabulary, rows: FloatMatrix) -> tuple[IntVector, FloatMatrix]:
    """Nearest ids and all (n, V) cosines, as they are defined."""
    unit = torch.nn.functional.normalize(model.table.float(), dim=1)
    scores = (torch.nn.functional.normalize(torch.from_numpy(rows), dim=1) @ unit.T).numpy()
    return scores.argmax(axis=1), scores


def assert_nearest(model: Vocabulary, rows: FloatMatrix) -> None:
    found = nearest_tokens(model, rows)
    for at in range(0, len(rows), 256):
        part = found[at : at + 256]
        nearest, scores = in_float32(model, rows[at : at + 256])
        lost = scores.max(axis=1) - scores[np.arange(len(part)), part]
        assert lost.max() <= TIE
        clear = np.partition(scores, -2, axis=1)[:, -2] < scores.max(axis=1) - TIE
        assert part[clear].tolist() == nearest[clear].tolist()


def moved(model: Vocabulary, count: int) -> FloatMatrix:
    """Token rows: steps along words from none to past the reach, noise, and steps halfway to another token."""
    rng = np.random.default_rng(7)
    table, steps = model.table.float().cpu().numpy(), directions(model, WORDS)
    rows = table[rng.integers(0, len(table), count)]
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    along = rows + rng.uniform(0.0, 1.5, (count, 1)) * lengths * steps[rng.integers(0, len(steps), count)]
    noise = rng.standard_normal(rows.shape)
    noise *= rng.uniform(0.0, 3.0, (count, 1)) * lengths / np.linalg.norm(noise, axis=1, keepdims=True)
    halfway = (rows + table[rng.integers(0, len(table), count)]) / 2.0
    found: FloatMatrix = np.concatenate([along, rows + noise, halfway]).astype(np.float32)
    return found


@pytest.mark.slow
def test_moved_rows_of_the_real_model_have_the_nearest_tokens_of_float32(narrow: Vocabulary) -> None:
    assert_nearest(narrow, moved(narrow, 500))


def test_so_have_points_right_at_the_border_between_two_tokens(narrow: Vocabulary) -> None:
    """Bisected until the two cosines differ by less than bfloat16 can tell."""
    rng = np.random.default_rng(3)
    table = narrow.table.float().numpy()
    own, other = table[rng.integers(0, len(table), 64)], table[rng.integers(0, len(table), 64)]
    low, high = np.zeros((64, 1)), np.ones((64, 1))
    first = nearest_tokens(narrow, own)
    for _ in range(10):
        middle = (low + high) / 2.0
        stays = nearest_tokens(narrow, (own + middle * (other - own)).astype(np.float32)) == first
        low, high = np.where(stays[:, None], middle, low), np.where(stays[:, None], high, middle)
    border = np.concatenate([own + low * (other - own), own + high * (other - own)]).astype(np.float32)
    _, scores = in_float32(narrow, border)
    best = np.partition(scores, -2, axis=1)[:, -2:]
    assert np.median(best[:, 1] - best[:, 0]) < 2**-9
    assert_nearest(narrow, border)


@pytest.mark.parametrize(
    "dtype", [torch.float16, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (torch.float32, torch.float64))]
)
def test_other_types_have_them_as_well(real: Vocabulary, dtype: torch.dtype) -> None:
    model = over(real.table.to(dtype), real.tokenizer)
    assert_nearest(model, moved(model, 50))


def test_so_has_bfloat16_where_the_processor_cannot_multiply_it(
    narrow: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "can_pack", lambda device, dtype: False)
    assert_nearest(narrow, moved(narrow, 50))


def test_odd_tables_and_rows_are_no_exception(odd: Vocabulary) -> None:
    rows = odd.table.float().numpy()
    noise = np.random.default_rng(1).standard_normal(rows.shape).astype(np.float32)
    assert_nearest(odd, rows[110:420])
    assert_nearest(odd, rows[990:1120])
    assert_nearest(odd, noise[:300])
    assert_nearest(odd, rows[110:400] + 0.01 * noise[110:400])
    # About as near to all rows of the group: a long shortlist.
    assert_nearest(odd, rows[400:401] + 1e-5 * noise[:50])


def test_length_makes_no_difference_and_zeros_and_nothing_have_an_answer(odd: Vocabulary) -> None:
    rows = moved(odd, 100)
    expected = nearest_tokens(odd, rows).tolist()
    for factor in (1e-20, 2.0**10, 1e25):
        assert nearest_tokens(odd, (rows * factor).astype(np.float32)).tolist() == expected
    assert 0 <= nearest_tokens(odd, np.zeros((1, 96), dtype=np.float32))[0] < len(odd.table)
    assert nearest_tokens(odd, np.zeros((0, 96), dtype=np.float32)).shape == (0,)


def test_many_rows_are_taken_in_blocks(odd: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = moved(odd, 100)
    whole = nearest_tokens(odd, rows).tolist()
    monkeypatch.setattr(module, "_SCORES", 7 * len(odd.table))
    monkeypatch.setattr(module, "_ROWS", 3)
    assert nearest_tokens(odd, rows[:40]).tolist() == whole[:40]


def test_a_moved_row_has_a_short_shortlist(narrow: Vocabulary) -> None:
    """What makes it cheap; a processor without bfloat16 products never makes one."""
    if not can_pack(narrow.device, narrow.dtype):
        pytest.skip("no bfloat16 products on this processor")
    rows = torch.from_numpy(moved(narrow, 40)[:40])
    with torch.inference_mode():
        assert len(module._shortlist(narrow, rows)) < 10 * len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_are_the_words_mean_less_the_tables(real: Vocabulary, dtype: torch.dtype) -> None:
    model = over(real.table.to(dtype), real.tokenizer)
    centre = model.table.double().mean(dim=0)
    for word, found in zip(WORDS, directions(model, WORDS), strict=True):
        ids = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        step = model.table[ids].double().mean(dim=0) - centre
        assert found == pytest.approx((step / step.norm()).numpy(), abs=1e-5)
    assert directions(model, []).shape == (0, model.width)
    with pytest.raises(ConfigurationError, match="blank"):
        directions(model, ["safe", " "])


def test_directions_are_kept_and_safe_from_their_readers(odd: Vocabulary) -> None:
    model = odd
    first = directions(model, WORDS)
    expected = first.copy()
    first[:] = 0.0
    tokenizer, model.tokenizer = model.tokenizer, None
    assert np.array_equal(directions(model, WORDS), expected)
    model.tokenizer = tokenizer
    directions(model, [f"word {number}" for number in range(300)])
    assert len(model.facts._directions) == module._WORDS
    assert np.array_equal(directions(model, WORDS), expected)


def test_threads_that_ask_at_once_compute_the_facts_once(odd: Vocabulary) -> None:
    together = threading.Barrier(6)

    def ask(fact: Callable[[], Any]) -> Any:
        together.wait(timeout=30)
        return fact()

    wanted = [lambda: odd.facts.centre, lambda: odd.facts.inverse_norms] * 3
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, wanted))
    assert len({id(fact) for fact in found}) == 2


async def test_the_engine_gives_what_the_table_gives(tiny: TransformersEngine) -> None:
    model = await tiny._ready()
    rows = moved(model, 10)
    assert np.array_equal(await tiny.nearest_tokens(rows), nearest_tokens(model, rows))
    assert np.array_equal(await tiny.directions(WORDS), directions(model, WORDS))
