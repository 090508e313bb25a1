"""The report that a run leaves behind: whatever happens here, the run has ended well."""

from __future__ import annotations

from pathlib import Path

FOLDER = "report"
"""In the save folder."""


def draw_at_end(save: str | None) -> None:
    """Write ``SAVE/report/``, and say where; a failure is told, never raised."""
    if save is None:
        return
    try:
        from megatron_llmjp.report.page import write_report

        page = write_report(Path(save), Path(save) / FOLDER)[0]
    except Exception as error:
        print(f"note: no report was drawn: {type(error).__name__}: {error}", flush=True)
    else:
        print(f"report: {page}", flush=True)
