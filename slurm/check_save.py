"""Check of the save folder before a job writes logs to it: refuse foreign checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_llmjp.checkpoint.save_folder import check_save_folder
from megatron_llmjp.errors import EXIT_DONE, EXIT_USER_ERROR, UserError


def main() -> int:
    """Check the folder given on the command line; the run itself prints the notes."""
    try:
        check_save_folder(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
