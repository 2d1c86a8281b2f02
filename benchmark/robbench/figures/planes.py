"""Sketches of feature spaces in paper 003: Max-Mahalanobis centres, contours of losses, the domains
of reverse cross-entropy. All closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from robbench.defense import resolve
from robbench.figures import (
    COLUMN,
    MARKERS,
    PALETTE,
    Drawing,
    Rows,
    Sources,
    canvas,
    drawings,
    no_cells,
)
from robbench.figures.curves import DASHES, GREY, SMALL, TEXT, checked
from robbench.papers.paper import Strict
from robbench.randomness import preserved_random_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Fields = Mapping[str, Any]
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


def _panels(rows: Rows) -> list[str]:
    return list(dict.fromkeys(str(row["panel"]) for row in rows))


def plain(axis: Any) -> None:
    """Two features at one scale: no ticks, since only the shape matters."""
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_linewidth(0.5)


# Max-Mahalanobis centres


class Centres(Strict):
    """What `max-mahalanobis-centres` draws: centres of these numbers of labels, with draws of the
    mixture around them, and all distances between the centres of `many` labels."""

    labels: tuple[Annotated[int, Field(ge=2, le=4)], ...] = (2, 3, 4)
    many: Annotated[int, Field(ge=3)] = 10
    norm: Positive = 4.0
    draws: Annotated[int, Field(ge=1)] = 40
    seed: int = 0


def centres(labels: int, norm: float, name: str = "mmc") -> NDArray[np.float64]:
    """(L, d) of a defense with fixed centres, in L - 1 dimensions, or 2 if that is more."""
    dimension = max(2, labels - 1)
    spec = f"{name}(network=mlp(hidden=[2]), dimension={dimension}, centre_norm={norm})"
    with preserved_random_state():
        torch.manual_seed(0)
        (member,) = resolve(spec)[0].build((1, 1, 2), labels)
    assert isinstance(member.readout, nn.Module)
    found = member.readout.centres
    assert isinstance(found, Tensor)
    return found.double().numpy()


def _centres_data(sources: Sources, arguments: Fields) -> Rows:
    made = checked(Centres, arguments)
    random = np.random.default_rng(made.seed)
    rows: list[dict[str, Any]] = []
    for labels in made.labels:
        placed = centres(labels, made.norm)
        for label, centre in enumerate(placed):
            drawn = centre + random.standard_normal((made.draws, len(centre)))
            rows += _spots(f"L = {labels}", "centre", label, centre[None])
            rows += _spots(f"L = {labels}", "draw", label, drawn)
    for series, name in (("maximal", "mmc"), ("random", "mmc-rand")):
        placed = centres(made.many, made.norm, name)
        distances = sorted(math.dist(a, b) for a, b in combinations(placed, 2))
        points = np.array(list(enumerate(distances, start=1)), dtype=np.float64)
        rows += [
            {**row, "z": ""} for row in Line(f"L = {made.many}", "distance", series, points).rows()
        ]
    return rows


def _spots(panel: str, kind: str, label: int, spots: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Rows of points (N, d) with d = 2 or 3."""
    line = Line(panel, kind, f"{panel}, label {label}: {kind}", spots[:, :2], label=label)
    deep = spots[:, 2] if spots.shape[1] > 2 else np.zeros(len(spots))
    return [{**row, "z": round(float(z), DIGITS)} for row, z in zip(line.rows(), deep, strict=True)]


# (2, 3) space from the side
VIEW = np.array([[-0.766, 0.643, 0.0], [-0.199, -0.237, 0.951]])


def _centres_plot(rows: Rows, arguments: Fields) -> Canvas:
    *spaces, last = _panels(rows)
    figure, axes = canvas(COLUMN, 3.4, nrows=2, ncols=2, squeeze=False)
    *places, distances = axes.flat
    for axis, panel in zip(places, spaces, strict=False):
        plain(axis)
        spots = [row for row in rows if row["panel"] == panel]
        flat = all(float(row["z"]) == 0 for row in spots)
        view = np.eye(3)[:2] if flat else VIEW
        for row in spots:
            _spot(axis, row, view)
        middles = [_space(row) for row in spots if row["kind"] == "centre"]
        for a, b in combinations(middles, 2):
            axis.plot(*(view @ np.stack([a, b]).T), color=GREY, linewidth=0.7, zorder=2)
        between = [math.dist(a, b) for a, b in combinations(middles, 2)]
        axis.set_title(f"{panel}: all {min(between):.2f} apart", fontsize=SMALL)
    for axis in places[len(spaces) :]:
        axis.set_visible(False)
    for index, (row, points) in enumerate(lines_of(rows, last, "distance")):
        distances.plot(
            *points.T, MARKERS[index], color=PALETTE[index], markersize=2.5, label=row["series"]
        )
    distances.set_title(f"{last}: distances of centres", fontsize=SMALL)
    distances.set_xlabel("pair, nearest first", fontsize=SMALL)
    distances.set_ylim(bottom=0)
    distances.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    distances.legend(fontsize=SMALL, frameon=False, loc="lower right", title_fontsize=SMALL)
    return figure


def _spot(axis: Any, row: Mapping[str, Any], view: NDArray[np.float64]) -> None:
    label, centre = int(row["label"]), row["kind"] == "centre"
    axis.plot(
        *(view @ _space(row)),
        MARKERS[label],
        color=PALETTE[label],
        markersize=6 if centre else 2,
        markeredgecolor="black" if centre else "none",
        markeredgewidth=0.7,
        alpha=1 if centre else 0.5,
        zorder=3 if centre else 1,
    )


def _space(row: Mapping[str, Any]) -> NDArray[np.float64]:
    return np.array([float(row[axis]) for axis in "xyz"])


# contours of losses


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
    panels = _panels(rows)
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
            _named(axis, name, points[0], (3, 4))
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


def _named(axis: Any, text: str, point: Sequence[float], offset: tuple[float, float]) -> None:
    """What a point is called, beside it, so many print points away."""
    axis.annotate(
        text, point, offset, textcoords="offset points", fontsize=TEXT, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )  # fmt: skip


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def marker(kind: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"color": "black", "linestyle": "none", "marker": kind, **style})


# the domains of reverse cross-entropy


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
    (panel,) = _panels(rows)
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
        _named(axis, f"${name[0]}_{name[1]}$", point, (-14, 4) if name == "z1" else (5, 3))
    shown = ", ".join(f"{level:g}" for level in levels)
    handles = [marker("", linestyle="--"), marker("", color=PALETTE[0], linestyle="-")]
    names = ["non-ME largest, log 2", f"non-ME {shown} of it (thick to thin)"]
    figure.legend(handles, names, fontsize=SMALL, frameon=False, loc="outside lower center")
    return figure


# center loss against the MMC loss


drawings.add("max-mahalanobis-centres", Drawing(no_cells, _centres_data, _centres_plot))
drawings.add("loss-contours", Drawing(no_cells, _shells_data, _shells_plot))
drawings.add("rce-domains", Drawing(no_cells, _domains_data, _domains_plot))
