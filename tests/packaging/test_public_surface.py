"""What users import, and what importing costs them."""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import tta_middleware
from tta_middleware import errors, registry
from tta_middleware.types import Trace

PACKAGE = Path(tta_middleware.__file__).parent


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in tta_middleware.__all__:
        assert getattr(tta_middleware, name) is not None
    assert set(tta_middleware.__all__) <= set(dir(tta_middleware))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="TTAChatMode"):
        tta_middleware.TTAChatMode  # noqa: B018


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "langchain", "langchain_core", "langgraph", "openai", "pydantic", "numpy")
    code = f"import sys, tta_middleware; print([m for m in {heavy!r} if m in sys.modules])"
    assert python(code) == "[]"


def test_the_chat_model_is_made_without_torch_or_openai_and_leaves_the_environment_alone() -> None:
    code = (
        "import os, sys; before = dict(os.environ); from tta_middleware import TTAChatModel; "
        "print(before == dict(os.environ)); TTAChatModel(moderator='openai'); "
        "print([m for m in ('torch', 'transformers', 'openai', 'langgraph') if m in sys.modules])"
    )
    assert python(code).splitlines() == ["True", "[]"]


def test_the_distribution_is_complete() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert distribution("tta-middleware").version == tta_middleware.__version__


@pytest.mark.skipif("TTA_EXPECT_WHEEL" not in os.environ, reason="only where the wheel is under test")
def test_the_wheel_is_what_is_tested() -> None:
    assert "site-packages" in str(PACKAGE)


@pytest.mark.parametrize("group", [registry.ENGINES, registry.MODERATORS, registry.METHODS])
def test_every_declared_part_can_be_loaded(group: str) -> None:
    assert registry.names(group)
    for name in registry.names(group):
        assert callable(registry._load(group, "part", name))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_nothing_is_validated_by_assert() -> None:
    """``python -O`` removes asserts; the shipped test classes are tests and may use them."""
    for path in sources():
        if path.parent.name == "testing":
            continue
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert found == [], f"{path.name}: {found}"


def test_house_sizes() -> None:
    for path in sources():
        text = path.read_text()
        assert len(text.splitlines()) <= 600, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or node.lineno) - node.lineno < 60, f"{path.name}: {node.name}"


ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_form_one_tree_drawn_in_the_docstring_and_pickle(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.TTAError)
    assert errors.__doc__ is not None
    assert kind.__name__ in errors.__doc__
    copy = pickle.loads(pickle.dumps(kind("what happened; what to do")))
    assert type(copy) is kind
    assert str(copy) == "what happened; what to do"


def test_an_unsafe_answer_error_keeps_its_trace_when_pickled() -> None:
    trace = Trace("tsa", "blocked", "budget: generations", None, None, 1, 2, 3, 4.0)
    copy = pickle.loads(pickle.dumps(errors.UnsafeAnswerError("nothing found", trace)))
    assert copy.trace == trace


def test_all_modules_import_alone() -> None:
    kept = [path for path in sources() if "_moved" not in path.parts]  # those warn: see test_moved.py
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in kept]
    for name in names:
        importlib.import_module(name.removesuffix(".__init__"))
