"""Runs ``tta`` in this process or in one of its own, with staged parts beside the real ones."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tta_middleware.cli import main

sys.path.append(str(Path(__file__).parent))
from staged_plugin import installed

ENTRY_POINTS = """
[tta_middleware.engines]
staged = staged_parts:engine
settable = staged_parts:settable

[tta_middleware.moderators]
words = staged_parts:words
strict = staged_parts:strict
down = staged_parts:down
downlater = staged_parts:downlater

[tta_middleware.judges]
gardener = staged_parts:Judge
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="session")
def plugin(tmp_path_factory) -> Path:
    """A folder that holds the staged parts as an installed distribution."""
    return installed(tmp_path_factory.mktemp("plugin"), Path(__file__).with_name("staged_parts.py"), ENTRY_POINTS)


@pytest.fixture
def tta(plugin, monkeypatch, capsys):
    """``tta("chat", "hello", stdin=...)`` in this process."""
    monkeypatch.syspath_prepend(str(plugin))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def run(*words: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def tta_process(plugin):
    """``tta_process("moderate", "-")``: a Popen of the real command; ``steps`` is when ``staged:hanging`` hangs."""
    started = []

    def start(*words: object, steps: int = sys.maxsize, **options) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(plugin), "STAGED_STEPS": str(steps)}
        command = [sys.executable, "-c", "import sys; from tta_middleware.cli import main; sys.exit(main())"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*command, *map(str, words)], env=environment, **{**pipes, **options})
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
