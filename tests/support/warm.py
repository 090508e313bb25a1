"""Last module of the warm process: the garbage collector of its forks skips what it imported."""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
