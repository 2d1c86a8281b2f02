"""What sketches of feature spaces have in common: lines of points in a plane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from robbench.figures import Rows
from robbench.figures.styles import TEXT

Points = NDArray[np.float64]  # (N, 2)
Positive = Annotated[float, Field(gt=0)]
CORNERS = 181  # points of a line that is drawn
DIGITS = 5


class Line(NamedTuple):
    """Points of one kind under one name; level: of the loss or of the non-ME."""

    panel: str
    kind: str
    series: str
    points: Points
    level: float | str = ""
    label: int | str = ""

    def rows(self) -> Iterator[dict[str, Any]]:
        for x, y in self.points:
            yield {
                "panel": self.panel,
                "kind": self.kind,
                "series": self.series,
                "label": self.label,
                "level": self.level,
                "x": round(float(x), DIGITS),
                "y": round(float(y), DIGITS),
            }


def lines_of(rows: Rows, panel: str, kind: str) -> list[tuple[Mapping[str, Any], Points]]:
    """Of each line of a kind its first row and its points."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["panel"] == panel and row["kind"] == kind:
            found.setdefault(str(row["series"]), []).append(row)
    return [
        (line[0], np.array([(float(row["x"]), float(row["y"])) for row in line]))
        for line in found.values()
    ]


def panels_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(str(row["panel"]) for row in rows))


def plain(axis: Any) -> None:
    """Two features at one scale: no ticks, since only the shape matters."""
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_linewidth(0.5)


def named(axis: Any, text: str, point: Sequence[float], offset: tuple[float, float]) -> None:
    """What a point is called, beside it, so many print points away."""
    axis.annotate(
        text, point, offset, textcoords="offset points", fontsize=TEXT, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )  # fmt: skip


def marker(kind: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"color": "black", "linestyle": "none", "marker": kind, **style})
