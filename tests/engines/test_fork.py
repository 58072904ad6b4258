"""Processes that are forked after the model was used; each case is a program of its own, since pytest has threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

BEGIN = """
import asyncio, os, sys, threading, traceback
from tta_middleware import TTAChatModel

settings = {"moderator": "local", "policy": 1.0, "max_new_tokens": 12, "dtype": "float32", "device": "cpu"}
model = TTAChatModel(model=sys.argv[1], **settings)

def forked(work):
    sys.stdout.flush()  # or the child prints its copy of the buffer, too
    child = os.fork()
    if child == 0:
        code = 1
        try:
            print(work(), flush=True)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
"""


def output(program: str, folder: Path) -> list[str]:
    """What a program prints; a child that hangs, fails or warns fails the test."""
    # Python 3.12 warns of every fork with threads; what comes of it here is what these tests are about.
    quiet = ("-W", "ignore:This process:DeprecationWarning")
    done = subprocess.run(
        [sys.executable, *quiet, "-c", BEGIN + program, str(folder)], capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_child_answers_as_its_parent_does(tiny_folder: Path) -> None:
    lines = output(
        """
first = model.invoke("Hello").content
forked(lambda: model.invoke("Hello").content == first)
forked(lambda: asyncio.run(model.ainvoke("Hello")).content == first)
forked(lambda: "".join(chunk.content for chunk in model.stream("Hello")) == first)
print(model.invoke("Hello").content == first)
""",
        tiny_folder,
    )
    assert lines == ["True"] * 4


@pytest.mark.slow
def test_a_child_that_was_forked_in_the_middle_of_a_stream_asks_anew(tiny_folder: Path) -> None:
    lines = output(
        """
model.max_new_tokens = 400
first = model.invoke("Hello").content
chunks = model.stream("Hello")
begun = next(chunks).content

def go_on():
    try:
        next(chunks)
    except Exception as error:
        return type(error).__name__, "forked" in str(error), model.invoke("Hello").content == first

forked(go_on)
print(begun + "".join(chunk.content for chunk in chunks) == first)
""",
        tiny_folder,
    )
    assert lines == ["('EngineError', True, True)", "True"]


@pytest.mark.slow
def test_a_child_of_a_process_whose_threads_hold_every_lock_answers(tiny_folder: Path) -> None:
    lines = output(
        """
import tta_middleware.aio.process as process

first = model.invoke("Hello").content
held, done = threading.Event(), threading.Event()

def hold():
    locks = [lock for lock in process._forkable if isinstance(lock, process.Lock)]
    for lock in locks:
        lock.__enter__()
    held.set()
    done.wait()
    for lock in locks:
        lock.__exit__()

holder = threading.Thread(target=hold)
holder.start()
held.wait()
forked(lambda: model.invoke("Hello").content == first)
done.set()
holder.join()
print(model.invoke("Hello").content == first)
""",
        tiny_folder,
    )
    assert lines == ["True", "True"]


@pytest.mark.slow
def test_a_child_that_was_forked_while_the_model_was_read_says_so(tiny_folder: Path) -> None:
    lines = output(
        """
import tta_middleware.engines.transformers as engines

engine = engines.TransformersEngine(sys.argv[1])
reading, go_on, resolve = threading.Event(), threading.Event(), engines.resolve_model

def slow(*arguments, **options):
    reading.set()
    go_on.wait()
    return resolve(*arguments, **options)

engines.resolve_model = slow
loading = threading.Thread(target=lambda: asyncio.run(engine.load()))
loading.start()
reading.wait()

def load():
    try:
        asyncio.run(engine.load())
    except Exception as error:
        return error

forked(load)
go_on.set()
loading.join()
""",
        tiny_folder,
    )
    assert lines == [
        "the process was forked while the model was being loaded; "
        "load it after the fork, or start processes with 'spawn'"
    ]


@pytest.mark.slow
def test_a_child_opens_connections_of_its_own(tiny_folder: Path) -> None:
    lines = output(
        """
from tta_middleware.aio import bridge
from tta_middleware.moderation.stack import StackSettings, production_moderator
from tta_middleware.testing.fault_server import FaultServer

with FaultServer() as server:
    moderator = production_moderator(
        StackSettings(base_url=server.base_url, limits={"max_in_flight": 1}, cache=None), api_key="k"
    )

    async def ask():
        return (await moderator.moderate(["Hello"]))[0].flagged

    print(bridge.run(ask), server.connections)
    forked(lambda: (bridge.run(ask), asyncio.run(ask())))
    print(bridge.run(ask), len(server.requests))
    bridge.run(moderator.aclose)
""",
        tiny_folder,
    )
    assert lines == ["False 1", "(False, False)", "False 4"]


def test_a_slot_that_the_parent_holds_does_not_count_in_the_child(tiny_folder: Path) -> None:
    lines = output(
        """
from tta_middleware.aio.semaphore import SharedSemaphore

slots = SharedSemaphore(1)

async def hold(work):
    async with slots.hold():
        return work()

asyncio.run(hold(lambda: forked(lambda: slots.taken)))
""",
        tiny_folder,
    )
    assert lines == ["0"]


@pytest.mark.slow
def test_a_child_asks_vllm_servers_anew(tiny_folder: Path) -> None:
    lines = output(
        f"""
sys.path.insert(0, {str(Path(__file__).parents[1] / "integrations")!r})
from test_vllm_server import Scripted, serving, wanted
from tta_vllm import VLLMServerEngine

with serving(Scripted([330, 8354, 28899], 0)) as url:
    engine = VLLMServerEngine(sys.argv[1], urls=[url])

    async def ask():
        stream = engine.stream(await wanted(engine, 2))
        return [delta.finish_reason async for delta in stream][-1]

    print(asyncio.run(ask()))
    forked(lambda: asyncio.run(ask()))
    print(asyncio.run(ask()))
    asyncio.run(engine.aclose())
""",
        tiny_folder,
    )
    assert lines == ["stop"] * 3


@pytest.mark.slow
def test_children_of_a_process_that_used_the_embedded_model_multiply_with_all_their_threads() -> None:
    lines = output(
        """
import torch
torch.set_num_threads(2)
from multiprocessing import get_context

first = model.invoke("Why is the sky blue?").content

def work(queue):
    queue.put((model.invoke("Why is the sky blue?").content == first, torch.get_num_threads()))

context = get_context("fork")
queue = context.Queue()
children = [context.Process(target=work, args=(queue,)) for _ in range(2)]
for child in children:
    child.start()
for child in children:
    print(*queue.get(timeout=100))
for child in children:
    child.join()
    assert child.exitcode == 0
""",
        Path("smollm2"),
    )
    assert lines == ["True 2", "True 2"]
