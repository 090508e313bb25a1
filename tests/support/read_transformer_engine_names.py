"""Names and signatures of a release of Transformer Engine, read from its sources without import.

The table that tests compare the stand-in with is written by

    pip download --no-deps --dest /tmp/te transformer_engine==2.20.2
    unzip -q /tmp/te/transformer_engine-2.20.2-*.whl -d /tmp/te
    python -m tests.support.read_transformer_engine_names /tmp/te 2.20.2

It contains the names that megatron-core imports, as far as the release has them, and the arguments
of the functions and methods of the stand-in.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "transformer_engine_names.json"
PACKAGE = "transformer_engine"
METHODS = (
    "__init__", "__call__", "forward", "step", "get_extra_state", "set_extra_state",
    "set_tensor_parallel_group", "add", "fork", "get_states", "set_states", "reset",
)  # fmt: skip


def stand_in_modules() -> list[str]:
    """Return the names of the stand-in's modules; its folder is on ``sys.path``."""
    package = importlib.import_module(PACKAGE)
    found = [m.name for m in pkgutil.walk_packages(package.__path__, f"{PACKAGE}.")]
    return [PACKAGE, *found]


def stand_in_signatures() -> Iterator[tuple[str, list[str]]]:
    """Yield the arguments of each public function and method that the stand-in defines."""
    for module_name in stand_in_modules():
        if module_name.rpartition(".")[2].startswith("_"):
            continue
        module = importlib.import_module(module_name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != module_name:
                continue
            if inspect.isfunction(value):
                yield f"{module_name}.{name}", _arguments(value)
            if inspect.isclass(value):
                for method in METHODS:
                    if inspect.isfunction(vars(value).get(method)):
                        key = f"{module_name}.{name}.{method}"
                        yield key, _arguments(vars(value)[method])


def _arguments(function: Any) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return [stars.get(p.kind, "") + p.name for p in parameters if p.name != "self"]


def megatron_imports() -> dict[str, list[str]]:
    """Return the names that megatron-core imports from Transformer Engine, by module."""
    found: dict[str, set[str]] = {}
    root = Path(next(iter(importlib.import_module("megatron").__path__))) / "core"
    for file in root.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "from transformer_engine." in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                    names = found.setdefault(str(node.module), set())
                    names |= {alias.name for alias in node.names}
    return {module: sorted(names) for module, names in sorted(found.items())}


def published(root: Path, release: str) -> dict[str, Any]:
    """Return the table of a release whose wheel was extracted to ``root``."""
    imports = {
        module: [name for name in names if name in _names(root, module)]
        for module, names in megatron_imports().items()
    }
    signatures = {}
    for key, _ in stand_in_signatures():
        found = _signature(root, key)
        if found is not None:
            signatures[key] = found
    return {"release": release, "imports": imports, "signatures": signatures}


def _tree(root: Path, module: str) -> ast.Module:
    path = root / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")) if file.exists() else ast.Module([], [])


def _names(root: Path, module: str) -> set[str]:
    """Return the names of a module: definitions, imports and submodules."""
    found = {path.stem for path in (root / module.replace(".", "/")).glob("*.py")}
    for node in _tree(root, module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def _signature(root: Path, key: str) -> list[str] | None:
    """Return the arguments of a function or method, searched for in the imported modules too."""
    module, _, name = key.rpartition(".")
    method = None
    if module.rsplit(".", 1)[-1][:1].isupper() or name in METHODS:
        (module, _, name), method = module.rpartition("."), name
    files = [path for path in root.rglob("pytorch/**/*.py") if "debug" not in path.parts]
    files += (root / PACKAGE / "common").rglob("*.py")
    wanted = module.removeprefix(f"{PACKAGE}.").replace(".", "/")
    # The module of this name first, then those from which it may import.
    for file in sorted(files, key=lambda path: (wanted not in path.as_posix(), len(path.parts))):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if getattr(node, "name", None) != name:
                continue
            if method is None and isinstance(node, ast.FunctionDef):
                return _ast_arguments(node)
            if method is not None and isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and item.name == method:
                        return _ast_arguments(item)
    return None


def _ast_arguments(node: ast.FunctionDef) -> list[str]:
    found = node.args
    names = [a.arg for a in [*found.posonlyargs, *found.args] if a.arg not in ("self", "cls")]
    names += [f"*{found.vararg.arg}"] if found.vararg else []
    names += [a.arg for a in found.kwonlyargs]
    return names + ([f"**{found.kwarg.arg}"] if found.kwarg else [])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))
    table = published(Path(sys.argv[1]), sys.argv[2])
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
