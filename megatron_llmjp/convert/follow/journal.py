"""Journal of ``--follow``: ``follow.jsonl`` in the output folder, one JSON object per line.

The first line has the save folder and the format. The others record what is done with each
checkpoint, which is identified by its iteration and the SHA-256 of its manifest: a run that was
rolled back saves other checkpoints of the same iterations.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from megatron_llmjp.errors import UserError

JOURNAL = "follow.jsonl"


class CheckpointId(NamedTuple):
    """A checkpoint of a run: its iteration, and the SHA-256 of its manifest."""

    iteration: int
    digest: str


class Journal:
    """What was done in this and in earlier processes.

    Args:
        output: the output folder.
        save: the save folder that is followed.
        target: the format of the outputs.

    Raises:
        UserError: the folder belongs to another save folder or format, or cannot be read.
    """

    def __init__(self, output: Path, save: Path, target: str) -> None:
        self._path = output / JOURNAL
        self._begun: dict[int, str] = {}
        self._converted: dict[int, str] = {}
        self._commanded: dict[int, str] = {}
        header = {"save": str(save.resolve()), "to": target}
        lines = self._read()
        if not lines:
            self._append(header)
        for name, value in header.items():
            found = lines[0].get(name) if lines else value
            if found != value:
                raise UserError(
                    f"--output {output}: {JOURNAL} has {name} {found!r}, expected {value!r}; give "
                    "another --output"
                )
        for record in lines[1:]:
            self._apply(record)

    def begin(self, checkpoint: CheckpointId) -> None:
        """Record that a checkpoint is being converted, before its output appears."""
        self._record("begin", checkpoint)

    def has_begun(self, checkpoint: CheckpointId) -> bool:
        """Return whether the last conversion of the iteration was of this checkpoint."""
        return self._begun.get(checkpoint.iteration) == checkpoint.digest

    def was_written(self, iteration: int) -> bool:
        """Return whether an output of the iteration is one of this program."""
        return iteration in self._begun

    def convert(self, checkpoint: CheckpointId, seconds: float) -> None:
        """Record that a checkpoint was converted."""
        self._record("converted", checkpoint, seconds=round(seconds, 1))

    def is_converted(self, checkpoint: CheckpointId) -> bool:
        """Return whether a checkpoint was converted."""
        return self._converted.get(checkpoint.iteration) == checkpoint.digest

    def command(self, checkpoint: CheckpointId, exit_code: int, seconds: float) -> None:
        """Record that the command ended."""
        self._record("command", checkpoint, exit_code=exit_code, seconds=round(seconds, 1))

    def is_commanded(self, checkpoint: CheckpointId) -> bool:
        """Return whether the command succeeded for a checkpoint."""
        return self._commanded.get(checkpoint.iteration) == checkpoint.digest

    def converted(self) -> list[CheckpointId]:
        """Return the converted checkpoints by iteration."""
        return [CheckpointId(*item) for item in sorted(self._converted.items())]

    def _record(self, event: str, checkpoint: CheckpointId, **values: Any) -> None:
        record = {"event": event, **checkpoint._asdict(), **values}
        self._append(record)
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        event, iteration, digest = (record.get(key) for key in ("event", "iteration", "digest"))
        if type(iteration) is not int or not isinstance(digest, str):
            return
        if event == "begin":
            self._begun[iteration] = digest
        elif event == "converted":
            self._converted[iteration] = digest
        elif event == "command" and record.get("exit_code") == 0:
            self._commanded[iteration] = digest

    def _append(self, record: dict[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _read(self) -> list[dict[str, Any]]:
        """Return the records; an incomplete last line of a killed process is removed."""
        try:
            text = self._path.read_bytes()
            complete = text[: text.rfind(b"\n") + 1]
            if complete != text:
                os.truncate(self._path, len(complete))
            records = [json.loads(line) for line in complete.splitlines()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._path}: damaged ({error}); give another --output") from None
        if not all(isinstance(record, dict) for record in records):
            raise UserError(f"{self._path}: damaged; give another --output")
        return records
