"""Import paths that the documentation named before the modules were moved: one release long they warn and work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import tta_middleware

PACKAGE = Path(tta_middleware.__file__).parent
MOVED = PACKAGE / "_moved"
ROOT = Path(__file__).parents[2]

DOCUMENTED = {
    "tta_middleware.bridge": "tta_middleware.aio.bridge.shutdown",
    "tta_middleware.engines.scripted": "tta_middleware.testing.scripted_engine.ScriptedEngine",
    "tta_middleware.events": "tta_middleware.guard.events.Released",
    "tta_middleware.optimise.presets": "tta_middleware.methods.presets.paper_preset",
    "tta_middleware.quality": "tta_middleware.guard.quality.QualityGate",
    "tta_middleware.streaming": "tta_middleware.guard.moderated.moderated",
}
UNDOCUMENTED = {
    "tta_middleware.optimise": "tta_middleware.methods.Race",
    "tta_middleware.policies": "tta_middleware.policy.file.PolicyFile",
    "tta_middleware.repair": "tta_middleware.guard.settings.Repair",
    "tta_middleware.holdback": "tta_middleware.guard.holdback.HoldBack",
}


def old_names() -> list[str]:
    paths = [path.relative_to(MOVED).with_suffix("") for path in MOVED.rglob("*.py") if path.parent != MOVED]
    paths += [path.relative_to(MOVED).with_suffix("") for path in MOVED.glob("*.py") if path.stem != "__init__"]
    names = {".".join(["tta_middleware", *path.parts]).removesuffix(".__init__") for path in paths}
    return sorted(names - {"tta_middleware.engines"})


def python(code: str, *, warning: str = "always") -> str:
    command = [sys.executable, "-W", f"{warning}::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout + done.stderr


WATCHED = """
import importlib, warnings
for old in {names!r}:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        importlib.import_module(old)
        importlib.import_module(old)
    mine = [str(each.message) for each in told if str(each.message).startswith(old + " is ")]
    print(old, len(mine), *mine)
"""


def test_each_old_path_imports_and_warns_once_naming_the_new_place() -> None:
    said = dict(line.split(" ", 1) for line in python(WATCHED.format(names=old_names())).splitlines())
    assert set(said) == set(old_names())
    assert set(DOCUMENTED) | set(UNDOCUMENTED) <= set(said)
    for old, words in said.items():
        assert re.fullmatch(rf"1 {old} is tta_middleware\.[a-z_.]+ now; the old path goes with the next release", words)


def test_an_old_path_gives_the_very_objects() -> None:
    code = "from importlib import import_module as module\n"
    for old, new in (DOCUMENTED | UNDOCUMENTED).items():
        home, name = new.rsplit(".", 1)
        code += f"if module({old!r}).{name} is not module({home!r}).{name}: print({old!r})\n"
    assert python(code, warning="ignore") == ""


def test_the_warning_points_at_who_imports() -> None:
    assert "<string>:3: DeprecationWarning: tta_middleware.events is" in python("\n\nimport tta_middleware.events")
    code = "\n\n\nfrom tta_middleware.optimise import Race"
    assert "<string>:4: DeprecationWarning: tta_middleware.optimise is tta_middleware.methods" in python(code)


def test_nothing_else_uses_an_old_path() -> None:
    old = "|".join(re.escape(name.removeprefix("tta_middleware.")) for name in old_names())
    used = re.compile(rf"tta_middleware\.({old})\b|from tta_middleware import ({old})\b")
    folders = ["tta_middleware", "integrations", "docs", "examples", "benchmarks", "training", "scripts"]
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".toml")
    ]
    for path in [*files, ROOT / "README.md", ROOT / "pyproject.toml"]:
        if "_moved" not in path.parts and path.is_file():
            assert used.findall(path.read_text(encoding="utf-8")) == [], path
