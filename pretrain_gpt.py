"""Pretrain a GPT: ``python pretrain_gpt.py --help`` shows how.

This file decides only who runs: the process that was started by hand checks the arguments and
starts the local ranks; a rank trains. torch is not imported before the arguments are right.
"""

from __future__ import annotations

import sys

from megatron_llmjp.cli import main

if __name__ == "__main__":  # checkpointing spawns processes that import this file again
    sys.exit(main(sys.argv[1:]))
