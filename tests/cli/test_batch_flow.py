"""The stages of a batch between input and output."""

from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tta_middleware.batch.flow import WINDOW, Flow, Held
from tta_middleware.batch.input import Item, Source
from tta_middleware.batch.progress import Pace, PlainLines
from tta_middleware.batch.shard import Order, Shard
from tta_middleware.types import Sampling


async def items(count: int, taken: list[int]) -> AsyncIterator[Item]:
    for number in range(count):
        taken.append(number)
        yield Item(number, f"in:{number}", None, Sampling())


async def test_every_line_has_draws_of_its_own_which_a_seed_repeats(jsonl):
    own = {"prompt": "About trees", "sampling": {"seed": 7}}
    path = str(jsonl("in.jsonl", *({"prompt": f"About tree {at}"} for at in range(20)), own))

    async def seeds(seed):
        return [item.sampling.seed async for item in Source(path, Sampling(seed=seed)).items(Shard())]

    first = await seeds(0)
    assert len(set(first)) == 21
    assert first[-1] == 7
    assert await seeds(0) == first
    assert not set(first[:-1]) & set((await seeds(1))[:-1])


@pytest.mark.parametrize("order", Order)
async def test_one_slow_answer_does_not_let_the_whole_input_be_read(order):
    taken, written, slow = [], [], anyio.Event()

    async def answer(item):
        await (slow.wait() if item.number == 0 else anyio.lowlevel.checkpoint())
        return {"id": item.number}

    flow = Flow(answer, written.extend, lambda _count: None, 3, order)
    async with anyio.create_task_group() as group:
        group.start_soon(flow.run, items(1000, taken))
        with anyio.fail_after(60):
            await anyio.wait_all_tasks_blocked()
        if order is Order.INPUT:
            assert (len(taken), written) == (3 * WINDOW, [])
        slow.set()
    ids = [record["id"] for record in written]
    assert sorted(ids) == list(range(1000))
    assert (ids == list(range(1000))) or order is Order.COMPLETED


async def test_output_that_fails_ends_the_work_with_its_own_error():
    async def answer(item):
        await anyio.lowlevel.checkpoint()
        return {"id": item.number}

    def full(_records):
        raise OSError(28, "No space left on device")

    taken = []
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="No space left")):
        await Flow(answer, full, lambda _count: None, 4, Order.INPUT).run(items(10_000, taken))
    assert len(taken) < 1000


@given(st.permutations(range(12)), st.lists(st.booleans(), min_size=12, max_size=12))
def test_in_the_input_s_order_a_record_waits_for_its_predecessors_and_no_longer(places, asked):
    held, out = Held(Order.INPUT), []
    for done, place in enumerate(places):
        held.put(place, {"id": place})
        if asked[done]:
            out += [record["id"] for record in held.take()]
            arrived = set(places[: done + 1])
            assert out == list(range(next(i for i in range(13) if i not in arrived)))
    assert out + [record["id"] for record in held.take()] == list(range(12))


def test_pace_tells_rate_and_time_left():
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.words(9) == ""
    for _ in range(4):
        now[0] += 0.5
        pace.tick()
    assert pace.words(240) == "2.0/s, 0:02:00 left"
    now[0] += 118.0
    pace.tick()
    assert pace.words(None) == "2.5/min"


def test_without_a_known_end_the_log_tells_the_count_and_the_rate():
    now, written = [0.0], []
    lines = PlainLines("batch", 0, None, clock=lambda: now[0], write=written.append)
    for _ in range(3):
        now[0] += 20.0
        lines.advance("3 clean")
    assert written == ["batch: 2, 3.0/min, 3 clean"]
