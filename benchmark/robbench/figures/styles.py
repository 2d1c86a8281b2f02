"""How curves are drawn: panels, axes, and a look for each curve that is told apart in print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from robbench.figures import COLUMN, MARKERS, PALETTE, Rows, canvas
from robbench.threat import NORM_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))
SMALL, TEXT = 7, 8  # points in print
PANEL = 1.7  # inches: how high a panel is
GREY = "#555555"
MARGIN = 0.05  # of an axis, beside what it shows
NEAR = 0.05  # of an axis: labels of ticks closer than that would run into each other
PUBLISHED = "published"
# without a norm an attack's length is the largest change of a pixel
NORMS = dict(zip(NORM_NAMES, ("ℓ∞", "ℓ2", "ℓ1", "ℓ0", "ℓ∞"), strict=True))


def stacked(panels: int, height: float = PANEL) -> tuple[Canvas, list[Any]]:
    """Panels one above the other, as wide as a column."""
    figure, axes = canvas(COLUMN, 0.5 + height * panels, nrows=panels, squeeze=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=SMALL, width=0.6, length=2.5)
        axis.grid(color="#DDDDDD", linewidth=0.5)
        axis.set_axisbelow(True)
        for side in axis.spines.values():
            side.set_linewidth(0.6)
    return figure, list(axes.flat)


def curves_of(rows: Rows) -> list[list[Mapping[str, Any]]]:
    """The rows of each series in turn, in the order in which they first come."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row["series"]), []).append(row)
    return list(found.values())


def floats(points: Rows, column: str) -> list[float]:
    """A column as numbers; empty cells are nan."""
    return [float(row[column]) if row[column] != "" else float("nan") for row in points]


def ticks(axis: Any, labels: Mapping[float, str], log2: bool = False) -> None:
    """The x axis has ticks at these places alone; of two that are too close one has a label."""
    from matplotlib.ticker import NullLocator

    if log2:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_minor_locator(NullLocator())
    places = sorted(labels)
    apart, last, texts = NEAR * (places[-1] - places[0]), -math.inf, []
    for place in places:
        free = log2 or place - last >= apart
        texts.append(labels[place] if free else "")
        last = place if free else last
    axis.set_xticks(places, texts)


def span(axis: Any, x: Sequence[float], log2: bool = False) -> None:
    """The x axis holds these places, and a margin."""
    low, high = min(x), max(x)
    if log2:
        margin = (high / low) ** MARGIN if high > low else 2.0
        axis.set_xlim(low / margin, high * margin)
    else:
        margin = MARGIN * (high - low) or 0.5
        axis.set_xlim(low - margin, high + margin)


def epochs(axis: Any) -> None:
    """The x axis counts epochs: ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


class Styles:
    """Colour, marker and dashes by label, the same in all panels, told apart in grey as well."""

    def __init__(self, rows: Rows, aside: float = 0) -> None:
        self.shift = aside
        self.labels = list(dict.fromkeys(str(row["label"]) for row in rows))
        self.published = any(row["kind"] == "published" for row in rows)

    def of(self, label: str) -> dict[str, Any]:
        index = self.labels.index(label)
        return {
            "color": PALETTE[index % len(PALETTE)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4,
            "markeredgewidth": 0.9,
            "linewidth": 1.1,
        }

    def aside(self, axis: Any, label: str) -> Any:
        """A little to the left or right of the data, so that no curve covers another. The axes do
        not find their own limits then: see `span`."""
        from matplotlib.transforms import ScaledTranslation

        steps = self.labels.index(label) - (len(self.labels) - 1) / 2
        return axis.transData + ScaledTranslation(
            self.shift * steps / 72, 0, axis.figure.dpi_scale_trans
        )

    def draw(self, axis: Any, points: Rows) -> None:
        """One curve: with its interval where measured, hollow where published."""
        label, kind = str(points[0]["label"]), points[0]["kind"]
        style = {**self.of(label), "transform": self.aside(axis, label)}
        x, y = floats(points, "x"), floats(points, "y")
        if kind == "published":
            axis.plot(x, y, **{**style, "linestyle": "none", "markerfacecolor": "none"})
            return
        dashes = DASHES[self.labels.index(label) % len(DASHES)]
        if kind == "quoted":
            style |= {"markerfacecolor": "white", "label": f"{label} (quoted)"}
            axis.plot(x, y, **style, linestyle=dashes)
            return
        low, high = floats(points, "low"), floats(points, "high")
        axis.plot(x, y, **style, linestyle=dashes, label=label)
        bars = {"color": style["color"], "transform": style["transform"], "linewidth": 0.7}
        axis.vlines(x, low, high, **bars)

    def legend(
        self,
        figure: Canvas,
        axes: Sequence[Any],
        columns: int = 3,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """One for all panels, below them. more: further handles by their labels."""
        from matplotlib.lines import Line2D

        handles: dict[str, Any] = {}
        for axis in axes:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if self.published:
            handles[PUBLISHED] = Line2D(
                [], [], color=GREY, marker="o", markersize=4, linestyle="none",
                markerfacecolor="none",
            )  # fmt: skip
        handles |= more
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", fontsize=SMALL,
            ncols=min(columns, len(handles)), frameon=False, handlelength=2.4, columnspacing=1.2,
        )  # fmt: skip
