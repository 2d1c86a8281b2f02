"""Max-Mahalanobis centres of paper 003, with draws of the mixture around them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

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
    Fields,
    Rows,
    Sources,
    canvas,
    checked,
    drawings,
)
from robbench.figures.planes import DIGITS, Line, Positive, lines_of, panels_of, plain
from robbench.figures.styles import GREY, SMALL
from robbench.papers.paper import Strict
from robbench.randomness import preserved_random_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


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
    *spaces, last = panels_of(rows)
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


drawings.add(
    "max-mahalanobis-centres",
    Drawing(_centres_data, _centres_plot, defenses=("mmc", "mmc-rand")),
)
