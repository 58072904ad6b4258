"""The choice of threads, fed with times of machines that never were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.engines.decoding.threads import ThreadChoice

IDLE = {4: 0.020, 2: 0.028, 1: 0.041}
BUSY = {4: 0.400, 2: 0.105, 1: 0.041}


def run(choice: ThreadChoice, steps: int, seconds: Callable[[int], float], columns: int = 8) -> Counter[int]:
    used: Counter[int] = Counter()
    for _ in range(steps):
        used[choice.threads] += 1
        choice.record_pass(columns, (1 + columns / 100) * seconds(choice.threads))
    return used


def test_an_idle_machine_keeps_all_threads() -> None:
    used = run(ThreadChoice([4, 2, 1]), 1000, IDLE.__getitem__)
    assert used[4] > 950


def test_a_busy_machine_ends_with_one_and_an_idle_one_gets_them_back() -> None:
    choice = ThreadChoice([4, 2, 1])
    run(choice, 200, IDLE.__getitem__)
    assert run(choice, 300, BUSY.__getitem__)[1] > 200
    run(choice, 600, IDLE.__getitem__)
    assert run(choice, 100, IDLE.__getitem__)[4] > 80


def test_sudden_slowness_is_looked_into_at_once() -> None:
    choice = ThreadChoice([2, 1])
    run(choice, 500, IDLE.__getitem__)
    assert run(choice, 20, BUSY.__getitem__)[1] > 10


def test_one_number_leaves_no_choice() -> None:
    assert run(ThreadChoice([1]), 100, lambda _: 0.1) == {1: 100}


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(1e-4, 10.0)), max_size=300))
def test_any_times_give_one_of_the_numbers(steps: list[tuple[int, float]]) -> None:
    choice = ThreadChoice([8, 4, 2, 1])
    for columns, seconds in steps:
        choice.record_pass(columns, seconds)
        assert choice.threads in (8, 4, 2, 1)
