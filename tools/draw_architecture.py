"""Draw docs/architecture.svg from the imports of the source files.

Each box is a package, or a module of the top level, with the first line of its docstring. Boxes
are arranged by dependency depth: every arrow points down, to what is imported. Arrows that follow
from others are omitted (transitive reduction), as are those to the base modules.

    python tools/draw_architecture.py            # write docs/architecture.svg
    python tools/draw_architecture.py --check    # exit code 1 if it is out of date
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
FOLDERS = ("megatron_llmjp", "data_tools", "slurm")
BASE = ("arguments", "errors", "filesystem", "formatting", "retrying_file", "yaml_text")
"""Modules that every other one may import; drawn as one box."""

BOX_WIDTH, BOX_HEIGHT, GAP, ROW = 206, 88, 18, 130
FONT = "font-family='Helvetica, Arial, sans-serif'"

Graph = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Import:
    """One import between two parts of the program."""

    source: str
    target: str
    text: str
    """``module imports module``, for messages."""


def part_of(module: str) -> str | None:
    """Return the package or top-level module that a dotted module name belongs to."""
    words = module.split(".")
    if words[0] == "megatron_llmjp":
        return words[1] if len(words) > 1 else None
    return words[0] if words[0] in FOLDERS else None


def imports() -> Iterator[Import]:
    """Yield all imports between different parts, those inside functions included."""
    for importer, modules in module_graph().items():
        source = part_of(importer)
        for module in sorted(modules):
            target = part_of(module)
            if source not in (None, "__init__", target) and target is not None:
                yield Import(str(source), target, f"{importer} imports {module}")


def module_graph() -> Graph:
    """Return the modules that each module imports, those inside functions included."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    return {
        name: frozenset(_imported(ast.parse(path.read_text(encoding="utf-8")), paths)) - {name}
        for name, path in paths.items()
    }


def _imported(tree: ast.Module, known: Container[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found = full if full in known else node.module
                if found in known:
                    yield found


def dependency_graph() -> Graph:
    """Return the parts that each part imports, without the base modules."""
    graph: dict[str, set[str]] = {}
    for found in imports():
        if found.source not in BASE:
            graph.setdefault(found.source, set())
            if found.target not in BASE:
                graph[found.source].add(found.target)
                graph.setdefault(found.target, set())
    return {name: frozenset(targets) for name, targets in graph.items()}


def depths(graph: Graph) -> dict[str, int]:
    """Return the length of the longest chain of imports below each part.

    Raises:
        ValueError: imports form a circle.
    """
    found: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise ValueError(f"circular imports: {' -> '.join([*above, name])}")
        if name not in found:
            found[name] = max((depth(t, (*above, name)) + 1 for t in graph[name]), default=0)
        return found[name]

    for name in sorted(graph):
        depth(name, ())
    return found


def reduced(graph: Graph) -> list[tuple[str, str]]:
    """Return the edges that do not follow from longer paths."""
    below: dict[str, set[str]] = {}

    def reach(name: str) -> set[str]:
        if name not in below:
            below[name] = set(graph[name]).union(*(reach(target) for target in graph[name]))
        return below[name]

    return [
        (source, target)
        for source in sorted(graph)
        for target in sorted(graph[source])
        if not any(target in reach(other) for other in graph[source] - {target})
    ]


def summary(name: str) -> str:
    """Return the first line of the docstring of a part."""
    folder = ROOT / name if name in FOLDERS else ROOT / "megatron_llmjp" / name
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("``", "").rstrip(".")


def draw() -> str:
    """Return the picture as SVG."""
    graph = dependency_graph()
    depth = depths(graph)
    rows = [[n for n in sorted(graph) if depth[n] == d] for d in range(max(depth.values()), -1, -1)]
    width = max(len(row) for row in rows) * (BOX_WIDTH + GAP) + GAP
    height = (len(rows) + 1) * ROW
    places: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * (BOX_WIDTH + GAP) + GAP) / 2
        for column, name in enumerate(row):
            places[name] = (left + column * (BOX_WIDTH + GAP), GAP + number * ROW)
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"width='{width}' height='{height}'>",
        "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' "
        "markerHeight='7' orient='auto'><path d='M0 0L8 4L0 8z' fill='#778'/></marker></defs>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    lines += [_arrow(places[source], places[target]) for source, target in reduced(graph)]
    lines += [_box(name, summary(name), *places[name], BOX_WIDTH) for name in places]
    lines.append(
        _box(
            ", ".join(BASE),
            "Base modules, which every part may import",
            GAP,
            len(rows) * ROW + GAP,
            width - 2 * GAP,
        )
    )
    return "\n".join([*lines, "</svg>", ""])


def _arrow(source: tuple[float, float], target: tuple[float, float]) -> str:
    x1, y1 = source[0] + BOX_WIDTH / 2, source[1] + BOX_HEIGHT
    x2, y2 = target[0] + BOX_WIDTH / 2, target[1]
    middle = (y1 + y2) / 2
    return (
        f"<path d='M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}' fill='none' "
        "stroke='#99a' stroke-width='1.3' marker-end='url(#head)'/>"
    )


def _box(name: str, text: str, x: float, y: float, width: float) -> str:
    lines = textwrap.wrap(text, int(width / 6.6))[:4]
    spans = "".join(
        f"<text x='{x + 9:g}' y='{y + 34 + 14 * n:g}' {FONT} font-size='11' fill='#445'>"
        f"{escape(line)}</text>"
        for n, line in enumerate(lines)
    )
    return (
        f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{BOX_HEIGHT}' rx='6' "
        "fill='#eef3fa' stroke='#557'/>"
        f"<text x='{x + 9:g}' y='{y + 19:g}' {FONT} font-size='14' font-weight='bold'>"
        f"{escape(name)}</text>{spans}"
    )


def main(argv: list[str] | None = None) -> int:
    """Write the picture, or compare it with the file."""
    parser = argparse.ArgumentParser(description="Draw docs/architecture.svg from the imports.")
    parser.add_argument("--check", action="store_true", help="Compare; write nothing")
    arguments = parser.parse_args(argv)
    picture = draw()
    if not arguments.check:
        PICTURE.write_text(picture, encoding="utf-8")
        return 0
    if PICTURE.read_text(encoding="utf-8") == picture:
        return 0
    print(f"{PICTURE.name} is out of date: run python tools/draw_architecture.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
