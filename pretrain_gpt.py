"""Entry point of pretraining; ``python pretrain_gpt.py --help`` lists all options.

A process that is not a rank checks the arguments and starts the local ranks; a rank trains. torch
is imported only after the arguments are checked.
"""

from __future__ import annotations

import sys

from megatron_llmjp.cli import main

if __name__ == "__main__":  # spawned processes import this file again
    sys.exit(main(sys.argv[1:]))
