"""Identity of this job, from the variables of Slurm or PBS."""

from __future__ import annotations

import os
from collections.abc import Mapping


def job_id(env: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of this job; None outside of jobs."""
    return env.get("SLURM_JOB_ID") or env.get("PBS_JOBID")


def restart_count(env: Mapping[str, str] = os.environ) -> int:
    """Return how often the scheduler has restarted this job; ``pbs.sh`` sets it under PBS."""
    return int(env.get("SLURM_RESTART_COUNT") or env.get("PBS_RESTART_COUNT") or 0)
