"""What was found out about datasets, kept for the next start.

Keys of contents and numbers of tokens take reads of every dataset of a run, whichever fold is due.
They are remembered under the stamp of the files: sizes, inodes, times of modification and of
change, which the kernel sets at every write and no copy preserves. Without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from megatron_llmjp.data.folds import DatasetInfo
from megatron_llmjp.system import write_durably

FOLDER = "facts"
_KEYS = ("key", "earlier_key", "checksums")
_FORMAT = 4  # from 2 on every entry of the index was checked; 3 has another key, 4 the largest id


def stamp(prefix: str) -> str:
    """What changes whenever one of the dataset's files is written or replaced."""
    found: list[object] = [_FORMAT, str(Path(prefix).resolve())]
    for suffix in (".idx", ".bin", ".json"):
        with suppress(OSError):
            file = Path(f"{prefix}{suffix}").stat()
            found.append((suffix, file.st_size, file.st_ino, file.st_mtime_ns, file.st_ctime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


def recall(stamp: str, splits: Iterable[str], cache: Path) -> DatasetInfo | None:
    """What is known of the dataset with this stamp, if the parts of these splits are."""
    try:
        known = json.loads(_place(stamp, cache).read_text())
        parts = {(split, part): int(tokens) for split, part, tokens in known["parts"]}
        key, earlier, checksums = (str(known[name]) for name in _KEYS)
        largest = None if known["largest_id"] is None else int(known["largest_id"])
        tokens = int(known["tokens"])
        info = DatasetInfo(key, tokens, parts, stamp, earlier, checksums, largest)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return info if set(splits) <= {split for split, _ in parts} else None


def remember(datasets: Mapping[str, DatasetInfo], cache: Path) -> None:
    """Keep what is known. A cache that cannot be written costs time at the next start only."""
    with suppress(OSError):
        (cache / FOLDER).mkdir(parents=True, exist_ok=True)
        for info in datasets.values():
            place = _place(info.stamp, cache)
            if place.exists() and recall(info.stamp, {split for split, _ in info.parts}, cache):
                continue
            parts = [[split, part, tokens] for (split, part), tokens in info.parts.items()]
            keys = {name: getattr(info, name) for name in _KEYS}
            found = {"tokens": info.tokens, "largest_id": info.largest_id, "parts": parts}
            write_durably(place, json.dumps({**keys, **found}))


def _place(stamp: str, cache: Path) -> Path:
    return cache / FOLDER / f"{stamp}.json"
