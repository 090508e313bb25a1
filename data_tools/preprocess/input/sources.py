"""Input files of ``preprocess_data``: expansion of ``--input`` to an ordered list of files.

Files in an input folder that are not read are recorded with the reasons.
"""

from __future__ import annotations

import glob
import os
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.documents import MANIFEST_FORMAT
from data_tools.preprocess.input.remote.addresses import scheme_of
from data_tools.preprocess.input.remote.files import RemoteFile
from data_tools.preprocess.input.remote.listing import FolderRules, RemoteFinder
from data_tools.preprocess.input.remote.reading import open_remote, read_head
from megatron_llmjp.errors import UserError
from megatron_llmjp.filesystem import evenly_spaced_offsets

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED_SUFFIXES = ("", ".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4")
SUFFIXES = (*(t + c for t in JSON_SUFFIXES for c in COMPRESSED_SUFFIXES), ".parquet")
PLAIN_TEXT_SUFFIXES = tuple(f".txt{c}" for c in COMPRESSED_SUFFIXES)
MAX_NAMES_PRINTED = 3
MAX_NAMES_RECORDED = 100
MANIFEST_MARKER = f'"{MANIFEST_FORMAT.rpartition(" ")[0]}'.encode()
"""Start of the format in a manifest, in any version."""

STDIN = "-"


@dataclass(frozen=True)
class IgnoredFile:
    """A file or folder within an input folder that is not read."""

    name: str
    reason: str
    other: str = ""
    """The path that the reason refers to, such as another path of the same file."""

    @property
    def kind(self) -> str:
        """The reason without the path that it refers to."""
        return f"{self.reason} another" if self.other else self.reason

    @property
    def text(self) -> str:
        """The complete reason."""
        return f"{self.reason} {self.other}" if self.other else self.reason


def has_suffix(name: str, suffixes: Sequence[str] = SUFFIXES) -> bool:
    """Return whether a file name ends in one of these suffixes, ignoring case."""
    return name.lower().endswith(tuple(suffixes))


def find_input_files(folder: str, suffixes: Sequence[str]) -> tuple[list[str], list[IgnoredFile]]:
    """Return the input files below a folder, sorted by path, and all ignored files.

    Symbolic links are followed. A file that is reachable by several paths is read once.

    Raises:
        UserError: a folder is not readable.
    """
    files: list[str] = []
    ignored: list[IgnoredFile] = []
    seen: dict[str, str] = {}
    for name, skipped in sorted(
        _walk_folder(Path(folder), suffixes, {}), key=lambda found: found[0]
    ):
        first = name if skipped else seen.setdefault(os.path.realpath(name), name)
        if skipped is None and first != name:
            skipped = IgnoredFile(name, "the same file as", first)
        if skipped is None:
            files.append(name)
        else:
            ignored.append(skipped)
    return files, ignored


def _walk_folder(
    folder: Path, suffixes: Sequence[str], above: dict[str, Path]
) -> Iterator[tuple[str, IgnoredFile | None]]:
    """Yield each path, with the reason if it is ignored."""
    real = os.path.realpath(folder)
    if real in above:
        yield str(folder), IgnoredFile(str(folder), "a link back to", str(above[real]))
        return
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"--input: cannot read folder {folder}: {error.strerror}") from error
    for entry in entries:
        reason = (
            _why_folder_is_ignored(entry)
            if entry.is_dir()
            else _why_file_is_ignored(entry, suffixes)
        )
        if reason is not None:
            yield str(entry), IgnoredFile(str(entry), reason)
        elif entry.is_dir():
            yield from _walk_folder(entry, suffixes, above | {real: folder})
        else:
            yield str(entry), None


def _why_folder_is_ignored(folder: Path) -> str | None:
    if folder.name.startswith("."):
        return "a hidden folder"
    return "unfinished output" if folder.name.endswith(".partial") else None


def _why_file_is_ignored(file: Path, suffixes: Sequence[str]) -> str | None:
    """Return why a file is not read, or None if it is read."""
    if not file.name.startswith("."):
        if not file.exists():
            return "a broken link"
        if not file.is_file():
            return "not a regular file"
    if reason := _why_name_is_ignored(file.name, suffixes):
        return reason
    return "a dataset's manifest" if _is_manifest(file) else None


def _why_name_is_ignored(name: str, suffixes: Sequence[str]) -> str | None:
    if name.startswith("."):
        return "hidden"
    if not has_suffix(name, suffixes):
        return "no known suffix"
    return "lines rejected by preprocess_data" if name.endswith("_rejected.jsonl") else None


def _is_manifest(file: Path) -> bool:
    # A dataset's .idx may be about to be written, by another task of an array.
    is_named = file.name.endswith("_document.json") or file.with_suffix(".idx").exists()
    if file.suffix != ".json" or not is_named:
        return False
    with file.open("rb") as stream:
        return MANIFEST_MARKER in stream.read(200)


def describe_ignored(ignored: Sequence[IgnoredFile]) -> str:
    """Return one line on the ignored files, grouped by reason; empty if there are none."""
    if not ignored:
        return ""
    by_reason = {
        reason: [Path(entry.name).name for entry in ignored if entry.kind == reason]
        for reason, _ in Counter(entry.kind for entry in ignored).most_common()
    }
    parts = []
    for reason, names in by_reason.items():
        more = ", ..." if len(names) > MAX_NAMES_PRINTED else ""
        parts.append(f"{len(names):,} {reason} ({', '.join(names[:MAX_NAMES_PRINTED])}{more})")
    return f"ignored: {len(ignored):,} files: {'; '.join(parts)}"


def ignored_record(ignored: Sequence[IgnoredFile]) -> dict[str, Any]:
    """Return the manifest entry on ignored files: counts, and the first names."""
    return {
        "files": len(ignored),
        "reasons": dict(sorted(Counter(entry.kind for entry in ignored).items())),
        "first": {entry.name: entry.text for entry in ignored[:MAX_NAMES_RECORDED]},
    }


SAMPLES, SAMPLE_BYTES = 16, 64 * 1024  # number and size of the blocks that identify a file


@dataclass(frozen=True)
class InputSource:
    """An input file, or a part of one, as it was when the program started.

    Attributes:
        name: the path as given, or ``-`` for standard input; of a remote file the address without
            credentials.
        size: bytes on disk; 0 if unknown (standard input, a pipe).
        start, end: byte range ``[start, end)`` in which the lines begin; all lines without an end.
        mtime: modification time in nanoseconds, to detect changes during the run.
        seekable: it can be read again, unlike a pipe.
        remote: the remote file, if it is one; it is read by the main process only.
    """

    name: str
    size: int = 0
    mtime: int = 0
    seekable: bool = False
    start: int = 0
    end: int | None = None
    remote: RemoteFile | None = field(default=None, repr=False)

    def open(self) -> BinaryIO:
        """Open the file; standard input has no path and is not opened here."""
        if self.remote is None:
            return Path(self.name).open("rb")
        return open_remote(self.remote, self.start, self.end)

    def read_head(self, count: int) -> bytes:
        """Return the first bytes of the file."""
        if self.remote is not None:
            return read_head(self.remote, count)
        with self.open() as file:
            return file.read(count)

    @property
    def label(self) -> str:
        """The name, with the byte range if this is a part of a file."""
        return self.name if self.end is None else f"{self.name}[bytes {self.start}-{self.end}]"

    @property
    def length(self) -> int:
        """Number of bytes of this source."""
        return self.size if self.end is None else self.end - self.start

    def identity(self) -> dict[str, Any]:
        """Return the name and the properties that must be the same when a run is resumed.

        These are the size and a checksum of blocks spread over the file; the modification time and
        the path may change. Both are None for a pipe. A remote file has a version instead of the
        checksum, such as its ETag.
        """
        if not self.seekable:
            return {"name": self.name, "size": None, "content": None}
        content = _sampled_checksum(self) if self.remote is None else self.remote.version
        whole = {"name": self.name, "size": self.size, "content": content}
        return whole if self.end is None else whole | {"bytes": [self.start, self.end]}

    def is_same(self, identity: dict[str, Any], earlier: dict[str, Any]) -> bool:
        """Return whether this source is the one of an earlier run; False for a pipe.

        Earlier versions recorded the modification time instead of a checksum.
        """
        if not self.seekable:
            return False
        if "mtime" in earlier:
            return earlier == {"name": self.name, "size": self.size, "mtime": self.mtime}
        return all(earlier.get(key) == identity.get(key) for key in ("size", "content", "bytes"))

    def refuse_changed(self, identity: dict[str, Any]) -> None:
        """Raise UserError if the file was changed or removed since ``identity`` was computed.

        Remote files are checked while they are read.
        """
        if not self.seekable or self.remote is not None:
            return
        try:
            now = Path(self.name).stat()
        except FileNotFoundError as error:
            raise UserError(f"{self.name}: the file was removed while it was being read") from error
        if (now.st_size, now.st_mtime_ns) == (self.size, self.mtime):
            return
        if now.st_size != self.size or _sampled_checksum(self) != identity["content"]:
            raise UserError(
                f"{self.name}: the file changed while it was being read ({self.size:,} bytes at "
                f"the start, {now.st_size:,} now). Wait until no program writes to it, then run "
                "the same command again: it repeats this file and the following ones."
            )


@dataclass(frozen=True)
class InputFiles:
    """The files to read, in order, and the ignored files in input folders."""

    sources: list[InputSource]
    ignored: list[IgnoredFile]

    def report(self) -> None:
        """Print the number of ignored files, and the reasons."""
        if self.ignored:
            print(describe_ignored(self.ignored), file=sys.stderr)


def find_input(words: Iterable[str], suffixes: Sequence[str] = SUFFIXES) -> InputFiles:
    """Expand files, folders, glob patterns, remote addresses and ``-`` to input sources, in order.

    A folder is expanded to all files below it with one of the suffixes, a pattern to its matches,
    both sorted by name.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a file is given twice.
    """
    found = InputFiles([], [])
    seen: dict[str, str] = {}
    rules = FolderRules(lambda name: _why_name_is_ignored(name, suffixes), MANIFEST_MARKER)
    finder = RemoteFinder(rules)
    for word in words:
        if scheme_of(word) is not None and not Path(word).exists():
            found.sources.extend(
                InputSource(file.name, file.size, seekable=True, remote=file)
                for file in finder.expand(word)
            )
            continue
        for name in _expand(word, suffixes, found.ignored):
            real = name if name == STDIN else os.path.realpath(name)
            if real in seen:
                raise UserError(
                    f"--input {word}: {name} is already included as {seen[real]}. Its documents "
                    "would be written twice: give it once."
                )
            seen[real] = name
            found.sources.append(_input_source(name))
    found.ignored.extend(IgnoredFile(name, reason) for name, reason in finder.ignored)
    return found


def _expand(word: str, suffixes: Sequence[str], ignored: list[IgnoredFile]) -> list[str]:
    if word == STDIN:
        return [STDIN]
    path = Path(word)
    if path.is_dir():
        files, not_read = find_input_files(word, suffixes)
        ignored += not_read
        if not files:
            plain = " ".join(suffix for suffix in suffixes if suffix.count(".") == 1)
            compressed = " ".join(filter(None, COMPRESSED_SUFFIXES))
            message = (
                f"--input {word}: no file in this folder has one of the suffixes {plain} (or "
                f"compressed: {compressed}). {describe_ignored(not_read)}"
            )
            raise UserError(message.rstrip(". "))
        return files
    if path.exists():
        return [word]
    if glob.has_magic(word):
        return _expand_pattern(word, suffixes, ignored)
    raise UserError(f"--input {word}: no such file or folder{_hint_of_existing_files(path)}")


def _expand_pattern(word: str, suffixes: Sequence[str], ignored: list[IgnoredFile]) -> list[str]:
    """Return the files that match a pattern, and those in folders that match it."""
    found: list[str] = []
    for name in sorted(glob.glob(word, recursive=True)):  # noqa: PTH207
        if Path(name).is_file():
            found.append(name)
        elif "**" not in word and Path(name).is_dir():  # ** matches the files in the folder itself
            files, not_read = find_input_files(name, suffixes)
            found += files
            ignored += not_read
        elif not Path(name).is_dir():
            ignored.append(IgnoredFile(name, "a broken link or not a regular file"))
    if not found:
        raise UserError(
            f"--input {word}: the pattern matches no file. {describe_ignored(ignored)}".rstrip()
        )
    return found


def _sampled_checksum(source: InputSource) -> str:
    """Return a checksum of blocks spread over a file; small files are read completely."""
    crc = 0
    with Path(source.name).open("rb", buffering=0) as file:
        for offset in evenly_spaced_offsets(source.size, SAMPLE_BYTES, SAMPLES):
            file.seek(offset)
            crc = zlib.crc32(file.read(min(SAMPLE_BYTES, source.size - offset)), crc)
    return f"{crc:08x}"


def _hint_of_existing_files(path: Path) -> str:
    """Return a hint on the input files that exist in the folder."""
    if not path.parent.is_dir():
        return f" (the folder {path.parent} does not exist either)"
    names = sorted(p.name for p in path.parent.iterdir() if has_suffix(p.name))[:5]
    return f". {path.parent} contains {', '.join(names)}" if names else ""


def _input_source(name: str) -> InputSource:
    if name == STDIN:
        return InputSource(STDIN)
    status = Path(name).stat()
    if not os.access(name, os.R_OK):
        raise UserError(f"--input {name}: not readable; check its permissions")
    if stat.S_ISREG(status.st_mode):
        return InputSource(name, status.st_size, status.st_mtime_ns, seekable=True)
    return InputSource(name)
