"""vLLM on the CPU build; the whole folder is skipped where vLLM is not installed (`make test-vllm` installs it)."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Bound threads would put every engine of these tests on the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    # enforce_eager leaves the sampler's helpers to torch.compile, which calls a C++ compiler in every worker.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from tta_vllm import VLLMEngine

from tta_middleware import Guard, Message, Noise, Policy, Repair, Sampling
from tta_middleware.moderation.embedded import EmbeddedModerator
from tta_middleware.protocols import Engine
from tta_middleware.types import GuardedAnswer

START_SECONDS = 300.0
THRESHOLD = 0.04
PROMPTS = (
    "Tell me about knives.",
    "How do I sharpen an axe?",
    "Write two lines about a thunderstorm.",
    "What should I do when I am angry at my neighbour?",
    "Describe a fight between two knights.",
    "Which mushrooms should nobody eat?",
    "How do fireworks work?",
    "Tell me how a lock is picked in old films.",
    "Write a rude limerick about my boss.",
    "What did soldiers fear most in old wars?",
)
SERVED = "smollm2"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of vLLM and what it brings are not ours."""
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.filterwarnings("default"))


@dataclass
class Running:
    """A vLLM server in a process group of its own."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        """The sum over the labels of one of the server's metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the vLLM server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def in_process(launched: list[Running]) -> Iterator[VLLMEngine]:
    engine = VLLMEngine("smollm2", dtype="float32", max_model_len=2048, max_num_seqs=16, enforce_eager=True)
    yield engine
    anyio.run(engine.aclose)


@pytest.fixture(scope="session")
def repaired() -> Callable[[Engine], Awaitable[list[GuardedAnswer]]]:
    """Answers to mild prompts under a threshold so low that some are flagged."""

    async def answers(engine: Engine) -> list[GuardedAnswer]:
        guard = Guard(engine, EmbeddedModerator(), policy=Policy(threshold=THRESHOLD), repair=Repair(method=Noise()))
        return [await guard.answer([Message("user", text)], Sampling(max_new_tokens=24)) for text in PROMPTS]

    return answers


@pytest.fixture(scope="session")
def repaired_in_process(in_process: VLLMEngine, repaired: Callable[[Engine], Awaitable[Any]]) -> list[GuardedAnswer]:
    return anyio.run(repaired, in_process)


@pytest.fixture(scope="session")
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Running]]:
    """Two servers with the embedded model, which nobody has waited for; none where no test asks for ``servers``.

    All engines load side by side: one start-up is mostly imports, one after the other, and keeps one core busy.
    """
    from tta_middleware.engines.models import resolve_model

    wanted = any("servers" in getattr(item, "fixturenames", ()) for item in request.session.items)
    folder, logs = resolve_model("smollm2"), tmp_path_factory.mktemp("vllm")
    with ExitStack() as stack:
        yield [_start(str(folder), logs / f"{at}.log", stack) for at in range(2 if wanted else 0)]


@pytest.fixture(scope="session")
def servers(launched: list[Running]) -> list[Running]:
    """Two servers with the embedded model."""
    for server in launched:
        server.wait()
    return launched


def _start(folder: str, log: Path, stack: ExitStack) -> Running:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", SERVED, "--host", "127.0.0.1", "--port", str(port), "--enable-prompt-embeds"]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager"]
    output = stack.enter_context(log.open("wb"))
    process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    server = Running(f"http://127.0.0.1:{port}", process, log)
    stack.callback(server.kill)
    return server
