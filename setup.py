"""Build step that pyproject.toml cannot express: files outside the packages, in the wheel.

Job scripts, examples and documentation are copied into the package, from where ``copy_examples``
copies them to a folder of the user.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
_spec = importlib.util.spec_from_file_location(
    "project_files", ROOT / "megatron_llmjp/project_files.py"
)
assert _spec and _spec.loader
project_files = importlib.util.module_from_spec(_spec)  # without importing the package
_spec.loader.exec_module(project_files)


class BuildPackages(build_py):
    """Builds the packages, and copies the files for ``copy_examples`` into one of them."""

    def run(self) -> None:
        """Build; an editable install needs no copies."""
        super().run()
        if not self.editable_mode:
            for source, target in self._copies():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return all files that :meth:`run` writes."""
        outputs = super().get_outputs(include_bytecode)
        copies = [] if self.editable_mode else self._copies()
        return [*outputs, *(str(target) for _, target in copies)]

    def _copies(self) -> list[tuple[Path, Path]]:
        folder = Path(self.build_lib) / "megatron_llmjp" / project_files.INSTALLED_FOLDER
        return [(ROOT / path, folder / path) for path in project_files.list_files(ROOT)]


setup(cmdclass={"build_py": BuildPackages})
