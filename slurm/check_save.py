"""Refuses a save folder that holds other checkpoints, before a job writes its logs to it."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_llmjp.checkpoint.save_folder import check_save_folder
from megatron_llmjp.errors import EXIT_DONE, EXIT_USER_ERROR, UserError


def main() -> int:
    """Check the folder that the command line names; the notes are the run's to print."""
    try:
        check_save_folder(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
