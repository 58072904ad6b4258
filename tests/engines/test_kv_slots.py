"""Slots in groups of one width hold what each sequence has left, whatever joins, grows and leaves, and waste little."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tta_middleware.engines.decoding import columns, kv_slots
from tta_middleware.engines.decoding.columns import Columns
from tta_middleware.engines.decoding.kv_slots import KVSlots, Prefix

COLUMN = 2 * 2 * 4  # two layers' key and value of one float32


def columns_of(number: int, start: int, end: int) -> torch.Tensor:
    return (torch.arange(start, end, dtype=torch.float32) + 10_000 * number)[None, None, :, None]


def prefix(number: int, length: int) -> Prefix:
    keys = columns_of(number, 0, length)
    return Prefix(Columns.of([(keys, keys + 0.5), (keys + 0.25, keys + 0.75)]), length)


class Sequences:
    """Slots with a list of what should be in them."""

    def __init__(self, most: int = 64, budget: int = 2**62) -> None:
        self.slots = KVSlots(most, COLUMN, budget)
        self.numbers: list[int] = []
        self._made = 0

    def join(self, length: int) -> None:
        self.slots.add(prefix(self._made, length))
        self.numbers.append(self._made)
        self._made += 1

    def leave(self, at: int) -> None:
        if self.numbers:
            at %= len(self.numbers)
            self.slots.remove(at)
            last = self.numbers.pop()
            if at < len(self.numbers):
                self.numbers[at] = last

    def step(self) -> None:
        if not self.numbers:
            return
        self.slots.reserve()
        wanted = [(self.numbers[slot], self.slots.lengths[slot]) for slot in self.slots.order]
        for layer, more in ((0, 0.0), (1, 0.25)):
            new = torch.cat([columns_of(number, length, length + 1)[0, 0] for number, length in wanted])[:, None] + more
            seen = self.slots.write(layer, new, new + 0.5)
            rows = [row for keys, _ in seen for row in keys]
            for (number, length), row in zip(wanted, rows, strict=True):
                assert torch.equal(row[:, : length + 1], columns_of(number, 0, length + 1)[0] + more)
        self.slots.advance()

    def check(self) -> None:
        for slot, number in enumerate(self.numbers):
            found, right = self.slots.prefix(slot), prefix(number, self.slots.lengths[slot])
            for (keys, values), (other, more) in zip(found.columns, right.columns, strict=True):
                assert torch.equal(keys, other)
                assert torch.equal(values, more)


happening = st.one_of(
    st.tuples(st.just("join"), st.sampled_from([1, 60, 127, 128, 510, 511, 512, 2046, 2047])),
    st.tuples(st.just("leave"), st.integers(0, 9)),
    st.tuples(st.just("step"), st.integers(1, 3)),
)


@settings(max_examples=60)
@given(st.lists(happening, max_size=14))
def test_every_slot_holds_what_its_sequence_has_left(plan: list[tuple[str, int]]) -> None:
    found = Sequences()
    for what, number in plan:
        if what == "join":
            found.join(number)
        elif what == "leave":
            found.leave(number)
        else:
            for _ in range(number):
                found.step()
        found.check()
        assert sorted(found.slots.order) == list(range(len(found.numbers)))
        assert (found.slots.nbytes == 0) == (not found.numbers)


def test_a_long_sequence_widens_none_but_its_like() -> None:
    found = Sequences()
    for _ in range(16):
        found.join(100)
    found.step()
    narrow = found.slots.nbytes
    found.join(4000)
    found.step()
    assert found.slots.nbytes - narrow == 4096 * COLUMN
    assert found.slots.rounded() == ((16, 128), (1, 4096))
    found.leave(16)
    assert found.slots.nbytes == narrow


def test_what_is_foretold_is_what_is_taken() -> None:
    found = Sequences(most=32, budget=0)
    for length in (100, 511, 30, 2047, 511):
        foretold = found.slots.bytes_for([length + 1])
        found.join(length)
        assert found.slots.nbytes <= foretold
    foretold = found.slots.bytes_after_step()
    found.step()
    assert found.slots.nbytes == foretold


@pytest.mark.parametrize("fails_at", range(1, 17))
def test_memory_that_runs_out_while_sequences_move_loses_nothing(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_BLOCK_TENSORS", 1)  # several blocks, as larger models have
    found, calls, real = Sequences(), 0, kv_slots._zeros
    for length in (100, 511, 510, 2046):
        found.join(length)

    def scarce(*arguments):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise MemoryError
        return real(*arguments)

    failed = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_slots, "_zeros", scarce)
        for _ in range(4):
            try:
                found.step()
            except MemoryError:
                failed += 1
                found.check()
                found.step()
            found.check()
    assert failed <= 1
