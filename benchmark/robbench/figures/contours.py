"""Contours of g-SCE and of the MMC loss (paper 003), in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from robbench.figures import (
    COLUMN,
    PALETTE,
    Drawing,
    Fields,
    Rows,
    Sources,
    canvas,
    checked,
    drawings,
)
from robbench.figures.planes import (
    CORNERS,
    Line,
    Points,
    Positive,
    lines_of,
    marker,
    named,
    panels_of,
    plain,
)
from robbench.figures.styles import DASHES, SMALL, TEXT
from robbench.papers.paper import Strict

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


class Shells(Strict):
    """What `loss-contours` draws, of a label k at 0 and the runner-up k~ at a distance from it.

    sigmas: the larger and the smaller of σ_k and σ_k~. losses: the contours. shell: C and C + ΔC,
    between which the neighbourhood ΔB lies.
    """

    sigmas: tuple[Positive, Positive] = (2.0, 1.0)
    distance: Positive = 3.0
    losses: tuple[Positive, ...] = (0.01, 0.1, 1.0, 4.0)
    shell: tuple[Positive, Positive] = (0.1, 1.0)


class Ball(NamedTuple):
    """A contour: a circle in two dimensions."""

    middle: tuple[float, float]
    radius: float

    def points(self) -> Points:
        angle = np.linspace(0, 2 * np.pi, CORNERS)
        around = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        return np.asarray(self.middle) + self.radius * around


def shared_contour(sigma: float, other: float, distance: float, loss: float) -> Ball:
    """Where log(exp(h_k~ - h_k) + 1) is the loss, h_i = -σ_i ‖z - μ_i‖², μ_k = 0, σ_k ≠ σ_k~ (paper
    003, theorem 1 on sample density, with B = 0)."""
    apart = sigma - other
    square = sigma * other * distance**2 / apart**2 + math.log(math.expm1(loss)) / apart
    return Ball((-other * distance / apart, 0.0), math.sqrt(max(square, 0.0)))


def centre_contour(loss: float) -> Ball:
    """Where ½ ‖z - μ_k‖² is the loss, μ_k = 0."""
    return Ball((0.0, 0.0), math.sqrt(2 * loss))


def _shells_data(sources: Sources, arguments: Fields) -> Rows:
    made = checked(Shells, arguments)
    large, small = max(made.sigmas), min(made.sigmas)
    cases: list[tuple[str, tuple[float, float] | None]] = [
        ("g-SCE, σ_k > σ_k~", (large, small)),
        ("g-SCE, σ_k < σ_k~", (small, large)),
        ("MMC", None),
    ]
    lines = []
    for panel, sigmas in cases:
        for loss in sorted({*made.losses, *made.shell}):
            ball = shared_contour(*sigmas, made.distance, loss) if sigmas else centre_contour(loss)
            lines.append(Line(panel, "contour", f"{panel}: C = {loss:g}", ball.points(), loss))
        middle = np.array([ball.middle])  # of any loss
        lines.append(Line(panel, "middle", f"{panel}: middle of contours", middle))
        lines.append(Line(panel, "centre", f"{panel}: label", np.zeros((1, 2)), label="k"))
        other = np.array([[made.distance, 0.0]])
        lines.append(Line(panel, "centre", f"{panel}: runner-up", other, label="k~"))
    return [row for line in lines for row in line.rows()]


def _shells_plot(rows: Rows, arguments: Fields) -> Canvas:
    made = checked(Shells, arguments)
    panels = panels_of(rows)
    figure, axes = canvas(COLUMN, 3.5, nrows=2, ncols=2, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        plain(axis)
        contours = lines_of(rows, panel, "contour")
        inner, outer = (
            next(points for row, points in contours if math.isclose(float(row["level"]), loss))
            for loss in made.shell
        )
        axis.fill(*np.concatenate([inner, outer[::-1]]).T, color="#D9D9D9", zorder=0)
        for index, (row, points) in enumerate(contours):
            axis.plot(
                *points.T,
                color=PALETTE[index],
                linestyle=DASHES[index],
                linewidth=1,
                label=f"loss {float(row['level']):g}",
            )
        for row, points in lines_of(rows, panel, "centre"):
            here = row["label"] == "k"
            axis.plot(*points.T, "o", color="black", markersize=4, mfc="black" if here else "white")
            name = "$\\mu_k$" if here else "$\\mu_{\\tilde{k}}$"
            named(axis, name, points[0], (3, 4))
        for _, points in lines_of(rows, panel, "middle"):
            axis.plot(*points.T, "+", color="black", markersize=5)
        title = panel.replace("σ_k~", "$\\sigma_{\\tilde{k}}$").replace("σ_k", "$\\sigma_k$")
        axis.set_title(title.replace("<", "$<$").replace(">", "$>$"), fontsize=TEXT)
        axis.margins(0.15)
    legend = list(axes.flat)[len(panels)]
    legend.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    handles += [_patch("#D9D9D9"), marker("+")]
    labels += [f"ΔB: {made.shell[0]:g} to {made.shell[1]:g}", "middle of contours"]
    legend.legend(handles, labels, fontsize=SMALL, frameon=False, loc="center")
    return figure


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


drawings.add("loss-contours", Drawing(_shells_data, _shells_plot))
