"""SVG pictures: rectangles, lines and text on a white background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

DARK, GREY = "#223", "#667"
FILLS = ("#9ecae9", "#ffbf79", "#a8d99a", "#f4a6a1", "#cbb3dd", "#d9c0a3", "#f2b5d4", "#c4c9d1")
"""Light colours, on which dark text is readable."""


def number(value: float) -> str:
    """Return a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass
class Picture:
    """One picture; coordinates are pixels from the upper left corner."""

    width: float
    height: float
    description: str
    """What the picture shows, for readers who do not see it."""
    _elements: list[str] = field(default_factory=list)

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        stroke: str = "none",
        line: float = 1,
    ) -> None:
        """Draw a rectangle."""
        self._elements.append(
            f"<rect x='{number(x)}' y='{number(y)}' width='{number(w)}' height='{number(h)}' "
            f"fill='{fill}' stroke='{stroke}' stroke-width='{number(line)}'/>"
        )

    def line(self, points: Sequence[tuple[float, float]], stroke: str, width: float = 1) -> None:
        """Draw connected straight lines."""
        path = "L".join(f"{number(x)} {number(y)}" for x, y in points)
        self._elements.append(
            f"<path d='M{path}' fill='none' stroke='{stroke}' stroke-width='{number(width)}'/>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        anchor: str = "start",
        fill: str = DARK,
        bold: bool = False,
    ) -> None:
        """Write a line of text; ``y`` is its baseline, ``anchor`` start, middle or end."""
        weight = " font-weight='bold'" if bold else ""
        self._elements.append(
            f"<text x='{number(x)}' y='{number(y)}' font-size='{number(size)}' fill='{fill}' "
            f"text-anchor='{anchor}'{weight}>{escape(text)}</text>"
        )

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]], step: float) -> None:
        """Draw a row of (fill, text) entries."""
        for index, (fill, text) in enumerate(entries):
            self.rect(x + index * step, y - 10, 12, 12, fill, GREY, 0.5)
            self.text(x + index * step + 17, y, text)

    def render(self) -> str:
        """Return the picture as SVG."""
        return "\n".join(
            [
                f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {number(self.width)} "
                f"{number(self.height)}' width='{number(self.width)}' "
                f"height='{number(self.height)}' role='img' "
                "font-family='Helvetica, Arial, sans-serif'>",
                f"<title>{escape(self.description)}</title>",
                f"<rect width='{number(self.width)}' height='{number(self.height)}' fill='white'/>",
                *self._elements,
                "</svg>",
                "",
            ]
        )
