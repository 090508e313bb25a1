#!/usr/bin/env python3
"""Preflight check of all nodes of a job; see ``--help`` and docs/slurm.md."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_llmjp.preflight.cli import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process that waits for a hung driver or disk would not end
