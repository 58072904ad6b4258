"""The queue: nobody is lost, nobody waits for ever, and places are shared by requests."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.engines.decoding.admission import FairQueue
from tta_middleware.errors import EngineBusyError, EngineError

groups = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=12)


def filled(queue: FairQueue[tuple[int, int]], wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
    items = []
    for number, (ticket, count) in enumerate(wanted):
        group = [(ticket, 100 * number + index) for index in range(count)]
        queue.put(ticket, group)
        items += group
    return items


@given(groups, st.integers(1, 8))
def test_every_sequence_gets_its_place_once(wanted: list[tuple[int, int]], room: int) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    items, taken = filled(queue, wanted), []
    while len(queue):
        now = queue.take({}, room)
        assert 0 < len(now) <= room
        taken += now
    assert sorted(taken) == sorted(items)
    for ticket in range(7):
        assert [item for item in taken if item[0] == ticket] == [item for item in items if item[0] == ticket]


@given(groups, st.dictionaries(st.integers(0, 6), st.integers(0, 5)), st.integers(1, 8))
def test_no_request_gets_a_second_place_while_another_waits_for_its_first(
    wanted: list[tuple[int, int]], active: dict[int, int], room: int
) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    waiting = Counter(ticket for ticket, _ in filled(queue, wanted))
    taken = Counter(ticket for ticket, _ in queue.take(active, room))
    after = {ticket: active.get(ticket, 0) + taken[ticket] for ticket in waiting}
    for gained in taken:
        for left in (ticket for ticket in waiting if waiting[ticket] > taken[ticket]):
            assert after[gained] <= after[left] + 1


def test_a_thousand_sequences_of_one_request_leave_a_place_to_the_next_one() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(1, ["bulk"] * 1000)
    queue.put(2, ["single"])
    assert queue.take({1: 31}, 1) == ["single"]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 3))
def test_a_repair_lets_answers_begin_that_waited_before_it_and_none_that_came_later(
    before: int, later: int, room: int
) -> None:
    """Its request is the oldest of all, and has nothing at work between two candidates."""
    queue: FairQueue[str] = FairQueue()
    for ticket in range(1, 1 + before):
        queue.put(ticket, ["before"])
    queue.put(0, ["candidate"])
    for ticket in range(100, 100 + later):
        queue.put(ticket, ["later"])
    order: list[str] = []
    while len(queue):
        order += queue.take({}, room)
    assert order == ["before"] * before + ["candidate"] + ["later"] * later


@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from([0.5, 1.0, -0.5, -1.0]))
def test_how_patient_a_sequence_is_says_how_many_go_first(before: int, later: int, patience: float) -> None:
    queue: FairQueue[str] = FairQueue()
    for ticket in range(before):
        queue.put(ticket, ["answer"])
    queue.put(100, ["candidate"], patience)
    for ticket in range(200, 200 + later):
        queue.put(ticket, ["answer"])
    order = queue.take({}, len(queue))
    ahead = order.index("candidate")
    # At most one off, where half a sequence cannot wait.
    assert abs(ahead - min(before + later, before + patience * before)) <= 1
    assert order.count("answer") == before + later


@given(st.integers(1, 5), st.integers(1, 30))
def test_a_repair_gets_on_however_many_new_answers_come(room: int, rounds: int) -> None:
    """Every round brings more answers than there are places; each candidate waits for those before it only."""
    queue: FairQueue[str] = FairQueue()
    ticket, waited = 0, 0
    queue.put(ticket, ["candidate"])
    for _ in range(rounds):
        for _ in range(room + 1):
            ticket += 1
            queue.put(ticket, ["answer"])
        ahead = len(queue)
        taken = queue.take({}, room)
        waited += 1
        if "candidate" in taken:
            assert waited <= 1 + ahead // room
            queue.put(0, ["candidate"])
            waited = 0
    assert waited <= 1 + len(queue) // room


def test_what_does_not_fit_keeps_its_turn() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.put(1, [900])
    queue.put(2, [1])
    assert queue.take({}, 8, lambda sizes: sum(sizes) < 100) == []
    assert queue.take({}, 8) == [900, 1]


def test_what_a_round_has_taken_counts_for_the_next_one_of_the_round() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.put(1, [60, 30, 20])
    assert queue.take({}, 8, lambda sizes: sum(sizes) < 100) == [60, 30]


def test_what_gave_its_place_up_comes_before_the_rest_of_its_request() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(1, ["waiting"])
    queue.put_back(1, "set aside")
    assert queue.take({}, 2) == ["set aside", "waiting"]


def test_what_gave_its_place_up_comes_before_what_never_had_one() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(1, ["waiting"])
    queue.put_back(3, "set aside later")
    queue.put_back(2, "set aside")
    assert queue.take({}, 3) == ["set aside", "set aside later", "waiting"]


def test_a_full_queue_refuses_and_loses_nothing() -> None:
    queue: FairQueue[int] = FairQueue(most=3)
    queue.put(1, [1, 2, 3])
    with pytest.raises(EngineBusyError, match=r"3 sequences wait.*limit is 3.*max_waiting") as caught:
        queue.put(2, [4])
    assert isinstance(caught.value, EngineError)
    assert queue.remove(lambda item: item == 2) == [2]
    queue.put(2, [4])
    assert queue.take({}, 9) == [1, 4, 3]
    assert len(queue) == 0
