"""The way of one streamed request that is flagged and repaired: which modules it crosses, and how large they are.

    python scripts/request_way.py

Prints every module of the package that runs a line for it, in the order of their first calls, and then figures of
``tta_middleware/guard``: functions, modules, arguments, and comment lines per hundred lines of code.
"""

from __future__ import annotations

import ast
import asyncio
import io
import statistics
import sys
import tokenize
from pathlib import Path
from typing import Any

from tta_middleware import Guard, Message, Noise, Repair, Windows
from tta_middleware.testing.scripted_engine import ScriptedEngine
from tta_middleware.testing.scripted_moderator import ScriptedModerator, flagging

PACKAGE = Path(sys.modules["tta_middleware"].__file__ or "").parent
START = "The old harbour town lies where the river meets the sea. Its market opens at dawn."
HARM = f"{START} Then you do the forbidden thing in four steps and tell nobody about it at all."
SAFE = " Visitors like the lighthouse, the fish stalls and the quiet path along the dunes best."


def answer(call: Any) -> str:
    """Flagged late near the prompt, safe further out."""
    return HARM[len(call.prefix) :] if call.moved < 0.6 else SAFE


def guarded() -> Guard:
    return Guard(
        ScriptedEngine(answer),
        ScriptedModerator(score=flagging("forbidden")),
        windows=Windows(first=20, largest=40),
        repair=Repair(Noise(), commit=30),
    )


async def stream(guard: Guard) -> str:
    outcome = ""
    async for event in guard.stream([Message("user", "Please tell me about the old harbour town")]):
        finished = getattr(event, "answer", None)
        outcome = finished.trace.outcome if finished else outcome
    return outcome


def crossed() -> list[str]:
    """The package's modules in the order of their first calls."""
    seen: dict[str, None] = {}

    def note(frame: Any, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_name != "<module>" and file.is_relative_to(PACKAGE):
            seen.setdefault(str(file.relative_to(PACKAGE)))

    guard = guarded()  # its settings are checked as it is made, which is no part of a request's way
    sys.setprofile(note)
    try:
        outcome = asyncio.run(stream(guard))
    finally:
        sys.setprofile(None)
    if outcome != "neutralised":
        raise SystemExit(f"the request was to be repaired, and is {outcome}")
    return list(seen)


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Its lines, the docstring left out."""
    doc = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    return (function.end_lineno or 0) - function.lineno + 1 - ((doc.end_lineno or 0) - doc.lineno + 1 if doc else 0)


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def figures(folder: Path) -> None:
    sizes, functions, comments, code = dict[str, int](), list[Any](), 0, 0
    for file in sorted(folder.glob("*.py")):
        text = file.read_text()
        sizes[file.name] = len(text.splitlines())
        tree = ast.walk(ast.parse(text))
        functions += [(file.name, node) for node in tree if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        kinds = [(token.type, token.start[0]) for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        comments += sum(kind == tokenize.COMMENT for kind, _ in kinds)
        code += sum(bool(line.strip()) for line in text.splitlines())
    lengths = sorted(length(node) for _, node in functions)
    print(
        f"{len(sizes)} modules, {sum(sizes.values())} lines: median {statistics.median(sizes.values()):.0f},", end=" "
    )
    print("largest {1} ({0})".format(*max(sizes.items(), key=lambda item: item[1])))
    print(f"{len(lengths)} functions: median {statistics.median(lengths):.0f} lines, nine in ten", end=" ")
    print(f"<= {lengths[len(lengths) * 9 // 10]}, largest {lengths[-1]}")
    print(f"{100 * comments / code:.1f} comment lines per 100 lines")
    many = [f"{name}:{node.name} ({arguments(node)})" for name, node in functions if arguments(node) > 5]
    print(f"more than five arguments: {', '.join(many) or 'none'}")


def main() -> None:
    way = crossed()
    inside = [module for module in way if module.startswith("guard/")]
    print(f"{len(way)} modules, {len(inside)} of them in guard/: {' -> '.join(inside)}")
    print(f"the others: {', '.join(module for module in way if module not in inside)}\n\ntta_middleware/guard:")
    figures(PACKAGE / "guard")


if __name__ == "__main__":
    main()
