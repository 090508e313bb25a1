"""Files of the project outside its packages: job scripts, examples and documentation.

A wheel contains copies of them next to this module; a checkout has the originals. ``setup.py``
executes this module without the package, which is why it imports the standard library only.
"""

from __future__ import annotations

from pathlib import Path

INSTALLED_FOLDER = "project_files"
"""Folder of the copies in an installed package."""

COPIED = ("README.md", "README.ja.md", "docs", "examples", "pretrain_gpt.py", "slurm")
"""Files, and folders with all their files."""

SITE_SETTINGS = Path("slurm/site.sh")
"""The settings of one cluster, which may contain secrets: never copied."""


def source_folder() -> Path:
    """Return the folder with the files: in an installed package, or the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / INSTALLED_FOLDER
    return installed if installed.is_dir() else package.parent


def list_files(root: Path) -> list[Path]:
    """Return the paths of the files below ``root``, relative to it and sorted.

    Raises:
        FileNotFoundError: a file or folder of :data:`COPIED` is missing.
    """
    paths: list[Path] = []
    for name in COPIED:
        path = root / name
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        paths += [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    relative = sorted(path.relative_to(root) for path in paths)
    return [p for p in relative if p != SITE_SETTINGS and not _is_left_over(p)]


def _is_left_over(path: Path) -> bool:
    """Return whether a file was written by Python or an editor."""
    return "__pycache__" in path.parts or path.suffix in (".pyc", ".swp") or path.name[-1] == "~"
