"""The copy of a fold file that a checkpoint keeps, so that its samples can be told for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_llmjp.data.fold_file import FoldFile


def dump_fold_file(file: FoldFile) -> str:
    """A fold file as text, complete and with absolute paths.

    Reading it back gives the same schedule from any folder.
    """
    content = file.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(_absolute(content), sort_keys=False, allow_unicode=True)


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(Path(entry).absolute())
        if key == "path" and isinstance(entry, str)
        else _absolute(entry)
        for key, entry in value.items()
    }
