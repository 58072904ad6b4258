"""Programs that end in the middle of an answer: the exit code is their own, and nothing is said but what they say.

Every case is a process of its own with the embedded model, which is inside torch most of the time. The quick run has
one, an interrupt, which finds out what the others do where the interpreter's end does not stop what is calculated.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

BEGIN = """
import asyncio, os, signal, sys, threading
from tta_middleware import TTAChatModel

model = TTAChatModel(model="smollm2", moderator="local", policy=1.0, max_new_tokens=4000)
chunks = model.stream("Why is the sky blue?")
"""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def ended(program: str) -> Ended:
    """How a program ended that prints ``begun`` once the first chunk is there."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", BEGIN + program], capture_output=True, text=True, timeout=120
    )
    return Ended(done.returncode, done.stdout, done.stderr)


QUIET = {
    "a stream that is left": """
for chunk in chunks:
    print("begun")
    break
""",
    "a stream that is held to the end": """
next(chunks)
print("begun")
""",
    "an exit in the middle": """
for chunk in chunks:
    print("begun")
    sys.exit()
""",
    "an async stream that is left open": """
held = []

async def main():
    stream = model.astream("Why is the sky blue?")
    held.append(stream)
    await anext(stream)
    print("begun")

asyncio.run(main())
""",
    "a daemon thread that reads on": """
begun = threading.Event()

def read():
    for chunk in chunks:
        begun.set()

threading.Thread(target=read, daemon=True).start()
begun.wait()
print("begun")
""",
    "a daemon thread with an event loop of its own": """
begun = threading.Event()

async def read():
    async for chunk in model.astream("Why is the sky blue?"):
        begun.set()

threading.Thread(target=lambda: asyncio.run(read()), daemon=True).start()
begun.wait()
print("begun")
""",
    "several streams in several threads": """
others = [model.stream(f"Count to {number} in words.") for number in (900, 800)]
for stream in (chunks, *others):
    next(stream)
print("begun")
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", QUIET)
def test_a_program_that_ends_in_the_middle_of_an_answer_ends_quietly(case: str) -> None:
    assert ended(QUIET[case]) == Ended(0, "begun\n", "")


@pytest.mark.parametrize(
    ("program", "code", "last"),
    [
        pytest.param("for chunk in chunks:\n    print('begun')\n    sys.exit(7)\n", 7, None, marks=pytest.mark.slow),
        pytest.param(
            "for chunk in chunks:\n    print('begun')\n    raise ValueError('mine')\n",
            1,
            "ValueError: mine",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "for chunk in chunks:\n    print('begun')\n    os.kill(os.getpid(), signal.SIGINT)\n",
            -2,
            "KeyboardInterrupt",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["exit code", "exception", "interrupt"],
)
def test_its_own_ending_is_the_only_one(program: str, code: int, last: str | None) -> None:
    done = ended(program)
    assert (done.code, done.out) == (code, "begun\n")
    assert done.err.splitlines()[-1:] == ([last] if last else [])
    assert done.err.count("Traceback") == (last is not None)


@pytest.mark.slow
def test_a_call_after_the_end_is_refused_with_a_reason() -> None:
    done = ended(
        "import atexit, tta_middleware.aio.process as process\n"
        "atexit.unregister(process._end)\n"
        "def late():\n"
        "    try:\n"
        "        model.invoke('Hello')\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
        "atexit.register(late)\n"
        "atexit.register(process._end)\n"
        "next(chunks)\n"
        "print('begun')\n"
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("begun\nEngineError the interpreter is shutting down")
