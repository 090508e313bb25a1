"""Expansion of remote addresses to files: single files, folders and glob patterns."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from data_tools.preprocess.input.remote.addresses import check_address, scheme_of, shown
from data_tools.preprocess.input.remote.files import RemoteFile, Store
from data_tools.preprocess.input.remote.http_store import HttpStore
from data_tools.preprocess.input.remote.hub_store import HubStore
from data_tools.preprocess.input.remote.reading import read_head
from data_tools.preprocess.input.remote.s3_store import S3Store
from megatron_llmjp.errors import UserError

_STORES: dict[str, Callable[[str], Store]] = {
    "s3": S3Store,
    "hf": HubStore,
    "https": HttpStore,
    "http": HttpStore,
}


@dataclass(frozen=True)
class FolderRules:
    """Which files of a folder are read.

    Attributes:
        why_ignored: the reason not to read a file of this name, or None.
        manifest_marker: beginning of a dataset's manifest, which is not read.
    """

    why_ignored: Callable[[str], str | None]
    manifest_marker: bytes


class RemoteFinder:
    """Finds the files of all remote addresses of one program, through one store per scheme."""

    def __init__(self, rules: FolderRules) -> None:
        self._rules = rules
        self._stores: dict[Callable[[str], Store], Store] = {}
        self.ignored: list[tuple[str, str]] = []
        """Names and reasons of the files in folders that are not read."""
        self._seen: set[tuple[type[Store], str]] = set()
        self._names: Counter[str] = Counter()

    def expand(self, address: str) -> list[RemoteFile]:
        """Return the files of an address: itself, those of a folder, or the matches of a pattern.

        Their names are unique: web addresses may differ only in the query, which is no part of the
        name.

        Raises:
            UserError: the address is not supported, not accessible, there is no such file, or one
                was found before.
        """
        check_address(address)
        files = []
        for file in self._find(address):
            key = (type(file.store), file.path)
            if key in self._seen:
                raise UserError(
                    f"--input {shown(address)}: {file.name} is already included. Its documents "
                    "would be written twice: give it once."
                )
            self._seen.add(key)
            self._names[file.name] += 1
            number = self._names[file.name]
            files.append(file if number == 1 else replace(file, name=f"({number}) {file.name}"))
        return files

    def _find(self, address: str) -> list[RemoteFile]:
        store = self._store(address)
        is_pattern = glob.has_magic(_path_of(address))
        if not store.can_list and ("*" in _path_of(address) or _path_of(address).endswith("/")):
            return store.files_below(address)  # refuses
        try:
            found = store.find(address)
            return self._below(store, address) if found is None else [found]
        except FileNotFoundError:
            if is_pattern and store.can_list:
                return self._matches(store, address)
            raise UserError(f"--input {shown(address)}: no such file or folder") from None

    def _store(self, address: str) -> Store:
        new = _STORES[str(scheme_of(address))]
        if new not in self._stores:
            self._stores[new] = new(address)
        return self._stores[new]

    def _matches(self, store: Store, pattern: str) -> list[RemoteFile]:
        try:
            matched, folders = store.matches(pattern)
        except FileNotFoundError:
            matched, folders = [], []
        files = []
        for file in matched:
            hidden = file.name.rpartition("/")[2].startswith(".")
            if hidden and not pattern.rpartition("/")[2].startswith("."):
                self.ignored.append((file.name, "hidden"))
            else:
                files.append(file)
        for folder in folders if "**" not in pattern else []:
            files += self._read_of(folder, store.files_below(folder))
        if not files:
            raise UserError(f"--input {shown(pattern)}: the pattern matches no file")
        return sorted(files, key=lambda file: file.name)

    def _below(self, store: Store, folder: str) -> list[RemoteFile]:
        found = store.files_below(folder)
        files = self._read_of(folder, found)
        if not files:
            raise UserError(
                f"--input {shown(folder)}: none of the {len(found):,} files in this folder has a "
                "suffix that is read, such as .jsonl, .jsonl.gz or .parquet"
            )
        return files

    def _read_of(self, folder: str, found: list[RemoteFile]) -> list[RemoteFile]:
        """Return the files of a folder that are read, and note the others."""
        files, names = [], {file.name for file in found}
        for file in found:
            reason = self._why_ignored(shown(folder), file, names)
            if reason is None:
                files.append(file)
            else:
                self.ignored.append((file.name, reason))
        return files

    def _why_ignored(self, folder: str, file: RemoteFile, names: set[str]) -> str | None:
        *above, name = file.name.removeprefix(folder).strip("/").split("/")
        if any(part.startswith(".") for part in above):
            return "in a hidden folder"
        if any(part.endswith(".partial") for part in above):
            return "unfinished output"
        if reason := self._rules.why_ignored(name):
            return reason
        if name.endswith(".json") and f"{file.name.removesuffix('.json')}.idx" in names:
            marker = self._rules.manifest_marker
            return "a dataset's manifest" if marker in read_head(file, 200) else None
        return None


def _path_of(address: str) -> str:
    """Return the part of an address after the host, without the query of a web address."""
    path = address.partition("://")[2].partition("/")[2]
    is_web = scheme_of(address) in ("http", "https")
    return path.partition("?")[0] if is_web else path
