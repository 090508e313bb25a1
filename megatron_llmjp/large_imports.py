"""Imports of torch and megatron-core, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """Pause the garbage collector, and let it skip from then on all objects that exist.

    Imported modules are no garbage, but make the collector search two million objects again and
    again: a fifth of the time that a rank takes to start. For programs only: garbage of a caller's
    own, as in a notebook, would never be collected.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
