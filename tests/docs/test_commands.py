"""What the documentation says to type: commands are understood, and what can run here does, on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "serve"), str(ROOT / "tests" / "docs")]
from staged_server import CALM, running, scripted  # noqa: E402
from test_snippets import blocks  # noqa: E402

from tta_middleware.cli.app import app  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ABRIDGED = {page.name for page in (ROOT / "README.md", *(ROOT / "docs" / "results").glob("*.md"))}
"""Pages that say once what their commands have in common."""

CONTINUED = re.compile(r"\\\n\s*")


def commands(page: Path) -> Iterator[list[str]]:
    """The ``tta`` commands of a page that stand on lines of their own, without what they are piped to."""
    text = CONTINUED.sub("", page.read_text(encoding="utf-8"))
    shell = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = "\n".join(line[4:] for line in text.splitlines() if re.match(r"    (tta |.*\btta serve)", line))
    for line in f"{shell}\n{indented}".splitlines():
        for part in line.split("|"):
            words = shlex.split(part, comments=True)
            if "tta" in words:
                yield words[words.index("tta") + 1 :]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


def test_there_are_some() -> None:
    assert len(COMMANDS) > 15
    assert {"serve", "chat", "batch", "eval"} <= {words[0] for _, words in COMMANDS}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}-{words[0]}" for page, words in COMMANDS])
def test_a_command_is_understood(page: str, words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    name, arguments = words[0], words[1:]
    assert name in group.commands, f"{page}: no command {name}"
    command = group.commands[name]
    if "..." in arguments or page in ABRIDGED:
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known
        return
    with command.make_context(name, arguments):
        pass


def shell(code: str, folder: Path, environment: Mapping[str, str]) -> str:
    """What a snippet prints; ``tta`` is this tree's."""
    begin = "import sys; from tta_middleware.cli import main; sys.exit(main())"
    (folder / "tta").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{begin}' \"$@\"\n")
    (folder / "tta").chmod(0o755)
    known = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env=known | dict(environment),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_guarded_stream(tmp_path: Path) -> None:
    [code] = blocks("server.md", "sh")
    with running({"small": scripted()}, keys="sk-one") as served:
        told = shell(code, tmp_path, {"OPENAI_BASE_URL": f"{served.url}/v1", "OPENAI_API_KEY": "sk-one"})
    events = [json.loads(event[6:]) for event in told.strip().split("\n\n")[:-1]]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == CALM
    assert told.endswith("data: [DONE]\n\n")


@pytest.fixture(scope="session")
def with_openai(request: pytest.FixtureRequest) -> Path:
    """A folder in which npm has installed the openai package; kept between runs."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder: Path = request.config.cache.mkdir("openai-for-node")  # type: ignore[union-attr]
    if not (folder / "node_modules" / "openai").exists():
        (folder / "package.json").write_text("{}")
        command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "openai@6"]
        got = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if got.returncode != 0:
            pytest.skip(f"npm cannot get the openai package: {got.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
def test_the_javascript_client_gets_an_answer(with_openai: Path) -> None:
    [code] = blocks("integrations.md", "js")
    written = "http://127.0.0.1:8080/v1"
    assert written in code
    with running({"small": scripted()}) as served:
        script = with_openai / "snippet.mjs"
        script.write_text(
            code.replace(written, f"{served.url}/v1") + "console.log(answer.choices[0].message.content);\n"
        )
        ran = subprocess.run(["node", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.stderr, ran.stdout.strip()) == ("", CALM)


@pytest.mark.slow
def test_a_file_is_moderated(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "A rose."}\n')
    lines = blocks("how-to.md", "sh")[0].splitlines()
    [moderate] = [line for line in lines if line.startswith("tta moderate")]
    assert json.loads(shell(moderate, tmp_path, {}))
