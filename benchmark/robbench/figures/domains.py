"""The decision domains of reverse cross-entropy (paper 003), in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from robbench.figures import (
    COLUMN,
    MARKERS,
    PALETTE,
    Drawing,
    Fields,
    Rows,
    Sources,
    canvas,
    checked,
    drawings,
)
from robbench.figures.planes import CORNERS, Line, Positive, lines_of, marker, named, panels_of
from robbench.figures.styles import SMALL, TEXT
from robbench.papers.paper import Strict

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


class Domains(Strict):
    """What `rce-domains` draws, of softmax(W z) with three unit rows of W at equal angles.

    levels, normal: of the non-ME, as shares of its largest value log 2; `normal` is what a detector
    lets through. start: how far z0 is from where all three labels are alike.
    """

    radius: Positive = 4.0
    start: Positive = 3.0
    levels: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.95, 0.7, 0.4, 0.15)
    normal: Annotated[float, Field(gt=0, lt=1)] = 0.95


TURN = 2 * math.pi / 3
SHARE = math.sqrt(3)  # the logits of two labels differ by √3 times the distance from their tie


def direction(angle: float) -> NDArray[np.float64]:
    return np.array([math.cos(angle), math.sin(angle)])


def toward(label: int) -> float:
    """The angle of a label's row of W."""
    return math.pi / 2 + label * TURN


def non_me(offset: float) -> float:
    """The entropy of the two other labels where their tie is so far away, at most log 2."""
    p = 1 / (1 + math.exp(SHARE * offset))
    return -(p * math.log(p) + (1 - p) * math.log(1 - p)) if p else 0.0


def offset_of(level: float) -> float:
    """How far from the tie the non-ME is this share of log 2."""
    from scipy.optimize import brentq

    return float(brentq(lambda offset: non_me(offset) / math.log(2) - level, 0, 40))


def attacked(made: Domains) -> dict[str, NDArray[np.float64]]:
    """z0 where label 0 is surest that the others are alike; z1, the nearest point of label 1; z2,
    the nearest one of it with a normal non-ME. Both lie on the border, which is their limit."""
    border = direction(toward(0) + TURN / 2)
    nearest = made.start / 2
    allowed = offset_of(made.normal) / math.sin(TURN / 2)
    return {
        "z0": made.start * direction(toward(0)),
        "z1": nearest * border,
        "z2": min(nearest, allowed) * border,
    }


def _domains_data(sources: Sources, arguments: Fields) -> Rows:
    made = checked(Domains, arguments)
    panel = "domains"
    lines = []
    for label in range(3):
        middle = toward(label)
        arc = np.linspace(middle - TURN / 2, middle + TURN / 2, CORNERS // 3)
        rim = made.radius * np.stack([np.cos(arc), np.sin(arc)], axis=1)
        sector = np.concatenate([np.zeros((1, 2)), rim, np.zeros((1, 2))])
        lines.append(Line(panel, "domain", f"domain {label}", sector, label=label))
        ray = np.stack([np.zeros(2), made.radius * direction(middle)])
        lines.append(Line(panel, "largest", f"non-ME largest, label {label}", ray, 1.0, label))
        for level in made.levels:
            offset = offset_of(level)
            start, end = offset / math.tan(TURN / 2), math.sqrt(made.radius**2 - offset**2)
            if abs(start) >= end:
                continue
            for side in (-1, 1):
                across = side * offset * direction(middle + math.pi / 2)
                ends = np.stack([abs(start) * direction(middle), end * direction(middle)]) + across
                name = f"non-ME {level:g} log 2, label {label}, side {side:+d}"
                lines.append(Line(panel, "level", name, ends, level, label))
    lines += [Line(panel, "point", name, at[None]) for name, at in attacked(made).items()]
    return [row for line in lines for row in line.rows()]


def _domains_plot(rows: Rows, arguments: Fields) -> Canvas:
    (panel,) = panels_of(rows)
    figure, axis = canvas(COLUMN, 3.1)
    axis.set_aspect("equal")
    axis.axis("off")
    shades = ("#DCEAF5", "#FBE3D3", "#D8EFE6")
    for (row, points), shade in zip(lines_of(rows, panel, "domain"), shades, strict=True):
        axis.fill(*points.T, color=shade, zorder=0)
        axis.plot(*points.T, color="black", linewidth=1)
        middle = points[len(points) // 2]
        side = "center" if abs(middle[0]) < 1e-3 else "left" if middle[0] > 0 else "right"
        axis.annotate(f"label {row['label']}", 1.08 * middle, ha=side, va="center", fontsize=TEXT)
    levels = sorted({float(row["level"]) for row, _ in lines_of(rows, panel, "level")})[::-1]
    for row, points in lines_of(rows, panel, "level"):
        index = levels.index(float(row["level"]))
        axis.plot(*points.T, color=PALETTE[0], linewidth=1.3 / (1 + index), alpha=0.9)
    for _, points in lines_of(rows, panel, "largest"):
        axis.plot(*points.T, "--", color="black", linewidth=1)
    points_of = {row["series"]: points[0] for row, points in lines_of(rows, panel, "point")}
    for name in ("z1", "z2"):
        axis.annotate(
            "", points_of[name], points_of["z0"],
            arrowprops={"arrowstyle": "->", "color": PALETTE[1], "shrinkB": 3, "lw": 1},
        )  # fmt: skip
    for (name, point), mark in zip(points_of.items(), MARKERS, strict=False):
        axis.plot(*point, mark, color=PALETTE[1], markeredgecolor="black", markersize=5, zorder=4)
        named(axis, f"${name[0]}_{name[1]}$", point, (-14, 4) if name == "z1" else (5, 3))
    shown = ", ".join(f"{level:g}" for level in levels)
    handles = [marker("", linestyle="--"), marker("", color=PALETTE[0], linestyle="-")]
    names = ["non-ME largest, log 2", f"non-ME {shown} of it (thick to thin)"]
    figure.legend(handles, names, fontsize=SMALL, frameon=False, loc="outside lower center")
    return figure


drawings.add("rce-domains", Drawing(_domains_data, _domains_plot))
