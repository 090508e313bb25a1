"""One task of an array that finishes all parts together with the other tasks.

A task first processes its own part, then those that nobody works on: not started yet, or lost with
their task. Each part is written by the one process that holds its work folder; a part whose holder
died is continued from its last saved point. Of the tasks that find nothing left to do, one waits
for the last parts and merges all of them; the others end. Nothing else coordinates the tasks: each
of them can be killed and submitted again at any time.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

from data_tools.preprocess.array.merge import ArrayOutput
from data_tools.preprocess.array.parts import ArrayParts, PartState, array_folder
from data_tools.preprocess.array.progress import add_up, format_line
from data_tools.preprocess.job.job import PreprocessJob
from data_tools.preprocess.job.work_folder import FolderHeldError, FolderLostError, WorkFolder
from megatron_llmjp.errors import EXIT_DONE, UserError

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_LOOKS = 5.0
"""Time between two looks at the parts of other tasks, while waiting for the last ones."""
SECONDS_AFTER_A_HELD_PART = 1.0
MAX_PARTS_NAMED = 50


class ArrayProgressLines:
    """Prints one line about all parts, once a minute."""

    def __init__(self, parts: ArrayParts) -> None:
        self._parts = parts
        self._printed = time.monotonic()

    def __call__(self) -> None:
        """Print the line if it is due."""
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            with contextlib.suppress(OSError, UserError):  # a file that another task replaces
                line = format_line(add_up(self._parts.read()), self._parts.count)
                print(line, file=sys.stderr, flush=True)


class ArrayTask:
    """One task of an array."""

    def __init__(
        self,
        number: int,
        output: ArrayOutput,
        parts: ArrayParts,
        make_job: Callable[[int], PreprocessJob],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Describe a task.

        Args:
            number: number of its own part.
            output: the merged output.
            parts: reader of the states of all parts.
            make_job: returns the job of a part.
            sleep: waits for a number of seconds.
        """
        self._number, self._output, self._parts = number, output, parts
        self._make_job, self._sleep = make_job, sleep
        self._lines = ArrayProgressLines(parts)
        self._recipe: dict[str, Any] = {}
        self._checked: set[int] = set()  # complete parts that belong to this array
        self._errors: dict[int, str] = {}

    def run(self) -> int:
        """Process parts until all are complete or in other tasks' hands; merge them if it is last.

        Raises:
            UserError: a part failed.
        """
        own = self._make_job(self._number)
        self._recipe = {name: own.recipe[name] for name in ("tokenizer", "options")}
        if self._output.is_complete(self._recipe):
            print("Already complete: all parts are merged.")
            self._output.print_table()
            return EXIT_DONE
        self._output.refuse_other_arrays()
        self._process(self._number, own)
        count = self._output.count
        while True:
            for number in (*range(self._number + 1, count), *range(self._number)):
                if self._is_free(state := self._parts.read_one(number)):
                    print(
                        f"Processing part {number} of {count} as well: {state.state} ({state.why})",
                        file=sys.stderr,
                    )
                    try:
                        self._process(number, self._make_job(number))
                    except UserError as error:
                        self._errors[number] = str(error)
            if self._finish():
                return EXIT_DONE

    def _process(self, number: int, job: PreprocessJob) -> None:
        """Process a part, unless it is complete or another task does."""
        try:
            if job.is_complete():
                self._checked.add(number)
            else:
                with job.output.name_output_in_errors():
                    job.run()
                self._checked.add(number)
        except (FolderHeldError, FolderLostError) as error:
            print(f"part {number}: {error}", file=sys.stderr)
            self._sleep(SECONDS_AFTER_A_HELD_PART)

    def _is_free(self, part: PartState) -> bool:
        """Return whether nobody works on a part that can be processed."""
        if part.state == "complete" and part.number not in self._checked:
            self._output.refuse_other_parts(part.number, self._recipe)
            self._checked.add(part.number)
        return part.retry and part.number not in self._errors

    def _finish(self) -> bool:
        """Wait for the last parts and merge; return False if a part has become free meanwhile.

        Raises:
            UserError: nobody works on parts that failed.
        """
        try:
            held = WorkFolder(array_folder(self._output.prefix))
        except FolderHeldError as error:
            waiting = error.owner or "another task"
            print(f"No part is left for this task; {waiting} merges the parts.", file=sys.stderr)
            return True
        try:
            while True:
                held.check()
                parts = self._parts.read()
                if any(map(self._is_free, parts)):
                    return False
                left = [part for part in parts if part.state != "complete"]
                if not left:
                    self._merge(held)
                    return True
                if all(part.state not in ("running", "stalled") for part in left):
                    raise self._failure(left)
                self._lines()
                self._sleep(SECONDS_BETWEEN_LOOKS)
        except FolderLostError as error:
            print(error, file=sys.stderr)
            return True
        finally:
            held.release()

    def _merge(self, held: WorkFolder) -> None:
        if not self._output.is_complete(self._recipe):  # else another task did in the meantime
            self._output.merge(self._recipe, held.check)
        held.remove()
        print(f"All {self._output.count} parts are complete and merged:")
        self._output.print_table()

    def _failure(self, left: list[PartState]) -> UserError:
        numbers = [part.number for part in left[:MAX_PARTS_NAMED]]
        reasons = "\n".join(
            f"  part {part.number} {part.state}: {self._errors.get(part.number) or part.why}"
            for part in left[:MAX_PARTS_NAMED]
        )
        return UserError(
            f"{len(left)} of {self._output.count} parts are not complete:\n{reasons}\nAfter fixing "
            f"the reason, submit them again: sbatch --array={','.join(map(str, numbers))} "
            f"slurm/preprocess_data.sh --shard slurm/{self._output.count} and the other arguments "
            "as before"
        )
