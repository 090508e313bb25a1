"""Import of one module from changed source text, in this process and in Python programs it starts.

No changed file is written: a finder at the front of ``sys.meta_path`` compiles the text.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

VARIABLE = "MUTANT"
"""Environment variable with the JSON file of the mutant: name, path and source of its module."""


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self._code = compile(source, path, "exec", dont_inherit=True)

    def get_code(self, fullname: str) -> CodeType:
        return self._code


class _Finder(MetaPathFinder):
    def __init__(self, name: str, loader: _Loader) -> None:
        self._name, self._loader = name, loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self._loader.path, loader=self._loader
        )


def install(file: str | Path) -> None:
    """Install the mutant that a JSON file describes."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    loader = _Loader(content["name"], content["path"], content["source"])
    sys.meta_path.insert(0, _Finder(content["name"], loader))


def install_in_programs(file: Path, root: Path) -> None:
    """Install the mutant in all Python programs that inherit the environment of this process."""
    site = file.parent / "site"
    site.mkdir()
    text = "from tools.mutants import hook\nhook.install(hook.os.environ[hook.VARIABLE])\n"
    (site / "sitecustomize.py").write_text(text)
    os.environ[VARIABLE] = str(file)
    os.environ["PYTHONPATH"] = f"{site}:{root}"
