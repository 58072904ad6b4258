"""The tree of beginnings: whatever was kept, dropped or failed, what is found is what ran, and memory stays bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.engines.decoding import prefix_tree
from tta_middleware.engines.decoding.columns import Columns
from tta_middleware.engines.decoding.kv_slots import Prefix
from tta_middleware.engines.decoding.prefix_tree import WORTH_SHARING, PrefixTree
from tta_middleware.engines.decoding.scored import marks
from tta_middleware.types import IntVector

# Texts of a few long words, so that many begin alike, some end inside of others, and few are too short to be kept.
WORDS = {"a": [1] * 20, "b": [2] * 33, "c": list(range(3, 30)), "d": [9] * 5}
text = st.text("abcd", min_size=1, max_size=7)


def rows_of(words: str) -> torch.Tensor:
    return torch.tensor([number for word in words for number in WORDS[word]], dtype=torch.float32)[:, None]


def told_apart(words: str) -> IntVector:
    return marks(rows_of(words))


def run(words: str) -> Prefix:
    """A stand-in for a model: what a column leaves depends on all up to it."""
    sums = rows_of(words).cumsum(dim=0)[None, None]
    return Prefix(Columns.of([(sums, sums + 1)]), sums.shape[2])


def agrees(found: Prefix | None, words: str) -> bool:
    if found is None:
        return True
    ran = run(words).cut(found.length)
    pairs = zip(found.whole().columns, ran.columns, strict=True)
    return all(torch.equal(keys, other) and torch.equal(values, more) for (keys, values), (other, more) in pairs)


def held(tree: PrefixTree) -> int:
    return sum(piece.nbytes for piece in tree._root.below())


@given(st.lists(st.tuples(text, st.integers(0, 300)), max_size=12), st.integers(0, 6000))
def test_what_is_found_is_what_ran_and_memory_is_bounded(asked: list[tuple[str, int]], most_bytes: int) -> None:
    tree = PrefixTree(most_bytes)
    for words, most in asked:
        of_rows = told_apart(words)
        found = tree.find(of_rows, most)
        assert agrees(found, words)
        assert found is None or WORTH_SHARING <= found.length <= min(most, len(of_rows))
        tree.keep(of_rows, run(words))
        assert tree.nbytes == held(tree) <= most_bytes


@given(st.lists(text, min_size=1, max_size=12))
def test_with_room_for_all_the_longest_common_beginning_is_found(kept: list[str]) -> None:
    tree, before = PrefixTree(10**9), []
    for words in kept:
        of_rows = told_apart(words)
        longest = max((prefix_tree.common(of_rows, other) for other in before), default=0)
        found = tree.find(of_rows, len(of_rows))
        # Stretches of a few rows at a fork are left out.
        assert longest - (found.length if found else 0) < WORTH_SHARING
        tree.keep(of_rows, run(words))
        before.append(of_rows)


@given(st.lists(st.tuples(text, st.integers(0, 9)), min_size=1, max_size=12))
def test_a_failed_allocation_leaves_a_tree_that_is_right(asked: list[tuple[str, int]]) -> None:
    tree, real, left = PrefixTree(4000), Columns.copied, 0

    def scarce(columns):
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        return real(columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Columns, "copied", scarce)
        for words, left in asked:  # noqa: B007  the copy that fails, counted down by it
            tree.keep(told_apart(words), run(words))
            assert tree.nbytes == held(tree)
            assert agrees(tree.find(told_apart(words), 10**6), words)


def chat(number: int, rows: int) -> tuple[IntVector, Prefix]:
    numbers = torch.full((rows, 1), float(number))
    return marks(numbers), Prefix(Columns.of([(numbers[None, None], numbers[None, None])]), rows)


def size(rows: int) -> int:
    return rows * (8 + 4 + 4)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(20, 120)), min_size=1, max_size=30))
def test_nobody_gives_way_to_who_holds_more_and_has_been_idle_longer(asked: list[tuple[int, int]]) -> None:
    tree, last, rows_of_chat = PrefixTree(size(200)), {}, {}
    for turn, (number, rows) in enumerate(asked):
        of_rows, prefix = chat(number, max(rows, rows_of_chat.get(number, 0)))
        tree.keep(of_rows, prefix)
        last[number], rows_of_chat[number] = turn, len(of_rows)
        there = {number: tree.shared_with(chat(number, 200)[0]) for number in last}
        for gone in [number for number, rows in there.items() if not rows]:
            assert not any(there[other] > rows_of_chat[gone] and last[other] < last[gone] for other in there)


def test_one_long_conversation_does_not_push_out_the_short_ones() -> None:
    tree = PrefixTree(size(1000))
    for number in range(8):
        tree.keep(*chat(number, 50))
    for turn in range(1, 40):
        numbers = torch.arange(turn * 100, dtype=torch.float32)[:, None] + 1000
        tree.keep(marks(numbers), Prefix(Columns.of([(numbers[None, None], numbers[None, None])]), len(numbers)))
        for number in range(8):
            assert tree.find(chat(number, 50)[0], 50) is not None
    assert tree.nbytes <= size(1000)


def test_prompts_that_nobody_goes_on_from_take_no_more_than_the_first_room() -> None:
    tree = PrefixTree(size(1000), size(250))
    for number in range(30):
        tree.keep(*chat(number, 50))
        assert tree.find(chat(100 + number, 50)[0], 50) is None
    assert tree.nbytes == size(250)
    # Number 0 is gone, and asked for again: there are conversations.
    assert tree.find(chat(0, 50)[0], 50) is None
    for number in range(30):
        tree.keep(*chat(number, 50))
    assert tree.nbytes == size(1000)


def test_a_fork_in_the_middle_keeps_each_row_once() -> None:
    tree = PrefixTree(10**9)
    for words in ("aabc", "aabb", "aac", "aa"):
        tree.keep(told_apart(words), run(words))
    # aa, then b and c behind it, then behind b the two that differ.
    assert tree.nbytes == size(sum(map(len, (*[WORDS["a"]] * 2, *[WORDS["b"]] * 2, *[WORDS["c"]] * 2))))
    tree.shrink(0)
    assert (len(tree), tree.nbytes) == (0, 0)


def test_what_is_found_costs_the_same_however_many_begin_with_one_system_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree, system = PrefixTree(10**9), torch.zeros((30, 1))
    chats = [torch.cat([system, torch.full((20, 1), float(number))]) for number in range(1, 301)]
    for rows in chats:
        tree.keep(marks(rows), Prefix(Columns.of([(rows[None, None], rows[None, None])]), 50))
    compared: list[int] = []
    common = prefix_tree.common

    def counted(one: IntVector, other: IntVector) -> int:
        compared.append(len(one))
        return common(one, other)

    monkeypatch.setattr(prefix_tree, "common", counted)
    assert [tree.shared_with(marks(rows)) for rows in chats[::50]] == [50] * 6
    assert compared == [30, 20] * 6


def test_a_chain_of_hundreds_of_pieces_is_one_beginning() -> None:
    tree, numbers = PrefixTree(10**9), torch.arange(16 * 400, dtype=torch.float32)[:, None]
    for turn in range(1, 401):
        part = numbers[: 16 * turn]
        tree.keep(marks(part), Prefix(Columns.of([(part[None, None], part[None, None])]), len(part)))
    found = tree.find(marks(numbers), 16 * 400 - 5)
    assert found is not None
    assert found.length == 16 * 399
    assert torch.equal(found.whole().columns[0][0][0, 0], numbers[: found.length])
    assert found.cut(100).whole().length == 100
