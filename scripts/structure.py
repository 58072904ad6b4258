"""The package's structure in figures: rooms, cycles, arrows against the layers, sizes, comments.

    python scripts/structure.py                      # this checkout; `make lint` runs it
    git worktree add ../before COMMIT && python scripts/structure.py ../before

Imports for type checking and inside functions count like all others; the package's own ``__init__`` is left out, since
it names everything and imports nothing until it is used. Ends with 1 where there is a cycle or an arrow back up.
"""

from __future__ import annotations

import ast
import io
import os
import statistics
import sys
import tokenize
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import grimp

PACKAGE = "tta_middleware"
Arrows: TypeAlias = Mapping[str, set[str]]
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


def arrows(root: Path) -> dict[str, set[str]]:
    """What each module of the package imports of it, whenever it does."""
    sys.path.insert(0, str(root))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    modules = {module for module in graph.modules if module != PACKAGE and not moved(module)}
    return {module: graph.find_modules_directly_imported_by(module) & modules for module in sorted(modules)}


def moved(module: str) -> bool:
    """Whether it only stands for a module that has another name now."""
    return module.startswith(f"{PACKAGE}._moved")


def room(module: str) -> str:
    """The module or package at the top level that a module is in."""
    return module.split(".")[1]


def cycles(graph: Arrows) -> list[list[str]]:
    """Groups of nodes that can reach each other."""
    reached = {node: reachable(graph, node) for node in graph}
    groups = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reachable(graph: Arrows, start: str) -> set[str]:
    """Nodes at the end of a way from ``start``, itself among them only where there is a way back."""
    found, left = set[str](), list(graph[start])
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += graph[node]
    return found


def between_rooms(graph: Arrows) -> dict[str, set[str]]:
    """The same by rooms."""
    found = defaultdict[str, set[str]](set)
    for module, imported in graph.items():
        found[room(module)] |= {room(other) for other in imported} - {room(module)}
    return dict(found)


def ranks(root: Path) -> dict[str, int]:
    """The place of each room in the contract of layers, from the top; siblings share one."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers")
    names = [layer.translate(str.maketrans("|:()", "    ")).split() for layer in layers]
    return {name.removeprefix(f"{PACKAGE}."): rank for rank, layer in enumerate(names) for name in layer}


def back_arrows(graph: Arrows, rank: Mapping[str, int]) -> list[str]:
    """Imports from a lower room to a higher one."""
    return [
        f"{module} -> {other}"
        for module, imported in graph.items()
        for other in sorted(imported)
        if rank.get(room(module), -1) > rank.get(room(other), len(rank))
    ]


def files(folder: Path) -> dict[Path, str]:
    """The package's modules and their text, those that moved left out."""
    paths = [path for path in sorted(folder.rglob("*.py")) if "_moved" not in path.parts]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def functions(texts: Mapping[Path, str]) -> Iterator[tuple[int, str]]:
    """Lines of each function, docstring included, and where it is."""
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                yield (node.end_lineno or 0) - node.lineno + 1, f"{path.stem}.{node.name}"


def comments(text: str) -> int:
    """Comments, on lines of their own or behind code."""
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def by_room(texts: Mapping[Path, str], package: Path) -> Iterator[str]:
    """Each room's comments per hundred lines that are not blank."""
    code, noted = Counter[str](), Counter[str]()
    for path, text in texts.items():
        name = path.relative_to(package).parts[0].removesuffix(".py")
        for place in (name, "all"):
            code[place] += sum(bool(line.strip()) for line in text.splitlines())
            noted[place] += comments(text)
    yield from (f"{name} {100 * noted[name] / code[name]:.1f}" for name in sorted(code) if code[name])


def sizes(what: str, found: Iterable[tuple[int, str]]) -> str:
    ordered = sorted(found)
    lengths = [length for length, _ in ordered]
    ninth = lengths[len(lengths) * 9 // 10]
    median = statistics.median(lengths)
    return f"{len(ordered)} {what}: median {median:.0f} lines, nine in ten <= {ninth}, largest {ordered[-1]}"


def show(root: Path) -> bool:
    """Print the figures; says whether the arrows are as they should be."""
    package, graph, rank = root / PACKAGE, arrows(root), ranks(root)
    texts, rooms = files(package), between_rooms(graph)
    unplaced = sorted(set(rooms) - set(rank))
    loops: list[Any] = [*cycles(graph), *cycles(rooms)]
    back = back_arrows(graph, rank)
    inside = [name for name in rooms if (package / name).is_dir()]
    print(f"rooms at the top level: {len(rooms)} ({len(rooms) - len(inside)} modules, {len(inside)} packages)")
    print(f"rooms in no layer: {', '.join(unplaced) or 'none'}")
    print(f"import cycles: {len(cycles(graph))} of modules, {len(cycles(rooms))} of rooms")
    print(*[f"    {' <-> '.join(loop)}" for loop in loops], f"arrows back up: {len(back)}", sep="\n")
    print(*[f"    {arrow}" for arrow in back], sep="\n", end="\n" if back else "")
    print(f"lines of the package: {sum(len(text.splitlines()) for text in texts.values())}")
    print(sizes("modules", ((len(text.splitlines()), str(path.relative_to(package))) for path, text in texts.items())))
    print(sizes("functions", functions(texts)))
    print(f"comments per 100 lines: {', '.join(by_room(texts, package))}")
    return not (loops or back or unplaced)


if __name__ == "__main__":
    chosen = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()
    os.chdir(chosen)
    sys.exit(not show(chosen))
