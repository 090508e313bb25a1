"""How a report looks: colours and fonts."""

from __future__ import annotations

from typing import Any

COLORS = ("#1f5a8c", "#d1772a", "#3f8f5f", "#9a4f8e", "#b8a12c", "#4aa5b8", "#a34a3f", "#6f6f6f")
"""Of lines; told apart with colour-blind eyes too."""
INK, EDGE, BOUNDARY, FAINT, RESTART = "#333333", "#b5b5b5", "#c4c4c4", "#8a8a8a", "#c0392b"

FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "IPAexGothic",
    "IPAGothic",
    "VL Gothic",
    "Hiragino Sans",
    "Yu Gothic",
)
"""Names of folds and validation sets may be Japanese: what is installed of these is used."""

STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 8.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # the reader's fonts: small files, and Japanese where they have it
    "svg.hashsalt": "megatron_llmjp",  # the same run gives the same file
    "path.simplify": True,
}
