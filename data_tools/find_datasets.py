"""Search for indexed datasets in folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_llmjp.data.indexed_dataset import bin_path, idx_path
from megatron_llmjp.errors import UserError


def find_datasets(words: Sequence[str]) -> list[str]:
    """Expand folders to the prefixes of all datasets below them, sorted by path.

    Raises:
        UserError: a folder has no dataset, or a dataset lacks one of its files.
    """
    found: dict[str, str] = {}
    for word in words:
        prefixes = [word.removesuffix(".idx").removesuffix(".bin")]
        if Path(word).is_dir():
            prefixes = list(_datasets_below(Path(word)))
            if not prefixes:
                raise UserError(f"{word}: no .bin and .idx files in this folder or below it")
        for prefix in prefixes:
            found.setdefault(os.path.realpath(prefix), prefix)
    missing = [
        str(path)
        for prefix in found.values()
        for path in (bin_path(prefix), idx_path(prefix))
        if not path.is_file()
    ]
    if missing:
        raise UserError(
            f"missing files of datasets: {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}. A dataset has a .bin "
            "and an .idx file; is a preprocess_data still running, or was a copy interrupted?"
        )
    return list(found.values())


def _datasets_below(folder: Path) -> Iterable[str]:
    prefixes = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if f[0] != "." and not f.endswith(".partial")]
        names = (Path(place) / name for name in files if not name.startswith("."))
        prefixes |= {str(path.with_suffix("")) for path in names if path.suffix in (".bin", ".idx")}
    return sorted(prefixes)
