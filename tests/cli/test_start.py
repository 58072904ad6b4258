import subprocess
import sys

import pytest
import typer

from tta_middleware import __version__
from tta_middleware.cli.app import app

WATCH = "import sys; from tta_middleware.cli import main; main({words!r}); print(sorted(sys.modules), file=sys.stderr)"
HEAVY = {"torch", "transformers", "langchain_core", "openai", "numpy"}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["eval", "--help"], ["chat", "--nonsense"]])
def test_help_and_mistakes_load_nothing_heavy(words):
    done = subprocess.run([sys.executable, "-c", WATCH.format(words=words)], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert "typer" in loaded
    assert not HEAVY & loaded


def test_scoring_lines_needs_no_torch_and_no_langchain(jsonl):
    path = jsonl("in.jsonl", {"text": "Hello"})
    words = ["moderate", "--jsonl", str(path)]
    done = subprocess.run([sys.executable, "-c", WATCH.format(words=words)], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert not {"torch", "transformers", "langchain_core", "openai"} & loaded


def test_version(tta):
    assert tta("--version").out == f"tta {__version__}\n"


def test_the_package_is_the_command_where_no_script_is_on_the_path():
    words = [sys.executable, "-m", "tta_middleware", "--version"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == f"tta {__version__}\n"


GROUP = typer.main.get_command(app)


@pytest.mark.parametrize("name", ["", *GROUP.commands])
def test_the_help_says_all_that_is_written(tta, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "400")
    command = GROUP.commands.get(name, GROUP)
    shown = tta(*([name] if name else []), "--help").out.replace("`", "")
    written = [command.help, *(getattr(option, "help", None) for option in command.params)]
    words = {word for text in written for word in (text or "").replace("`", "").split()}
    assert len(words) > 20
    assert sorted(word for word in words if word not in shown) == []


def test_no_command_shows_the_help(tta):
    ran = tta()
    assert ran.code == 0
    assert "serve-moderation" in ran.out


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_says_otherwise(tta, monkeypatch, before, after):
    import os

    monkeypatch.delenv("OMP_WAIT_POLICY")
    if before:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    tta("--version")
    assert os.environ["OMP_WAIT_POLICY"] == after
