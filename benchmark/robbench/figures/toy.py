"""How features move under center loss and the MMC loss: the toy demo of paper 003, by training a
network with two inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robbench import statistics
from robbench.defense import Defense, resolve
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
from robbench.figures.planes import DIGITS, Positive, marker, plain
from robbench.figures.styles import DASHES, GREY, SMALL
from robbench.papers.paper import Strict
from robbench.randomness import preserved_random_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


class Toy(Strict):
    """What `mmc-toy` trains: a network from two inputs over `hidden` units to two features.

    Inputs are Gaussian clouds of this spread around the corners of a regular polygon, one corner a
    label. batches: sizes of batches, of all points for the first. Both losses have the same inputs,
    batches, first weights, optimiser (plain SGD) and lr. lam, rate: of center loss; norm: of the
    centres of MMC. runs: seeds, over which the intervals are; end points and paths are those of the
    first.
    """

    labels: Annotated[int, Field(ge=2)] = 3
    points: Annotated[int, Field(ge=10)] = 1000
    batches: tuple[Annotated[int, Field(ge=1)], ...] = (1000, 20, 5)
    steps: Annotated[int, Field(ge=2)] = 400
    runs: Annotated[int, Field(ge=2)] = 3
    hidden: Annotated[int, Field(ge=1)] = 32
    spread: Positive = 0.35
    lr: Positive = 0.05
    lam: Annotated[float, Field(ge=0)] = 0.1
    rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    norm: Positive = 2.0
    kept: Annotated[int, Field(ge=1)] = 240  # end points that are kept as data

    @property
    def losses(self) -> dict[str, Defense]:
        specs = {
            "Center loss": f"center-loss(lam={self.lam}, rate={self.rate})",
            "MMC loss": f"mmc(dimension=2, centre_norm={self.norm})",
        }
        return {name: resolve(spec)[0] for name, spec in specs.items()}

    def batch_name(self, batch: int) -> str:
        return "full batch" if batch >= self.points else f"mini-batch {batch}/{self.points}"

    @property
    def seen(self) -> list[int]:
        """The steps after which all is measured, ever further apart."""
        return sorted({0, *(round(step) for step in np.geomspace(1, self.steps, 25))})


class Plane(nn.Module):
    """Two inputs (N, 1, 1, 2) -> two features -> labels, as a network of robbench."""

    def __init__(self, hidden: int, labels: int) -> None:
        super().__init__()
        linear = nn.Linear(2, hidden), nn.Linear(hidden, 2)
        self.layers = nn.Sequential(nn.Flatten(), linear[0], nn.ReLU(), linear[1])
        self.readout: nn.Module = nn.Linear(2, labels)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.features(x))


class Seen(NamedTuple):
    """After some step: features (N, 2), their mean by label and the centres, both (L, 2)."""

    features: Tensor
    means: Tensor
    centres: Tensor

    @property
    def distance(self) -> float:
        """Of the means from their centres, averaged over labels."""
        return self.until(self)

    def until(self, later: Seen) -> float:
        """Of the means from where the centres are later."""
        return float((self.means - later.centres).norm(dim=1).mean())


def clouds(made: Toy, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (N, 1, 1, 2) and labels (N,)."""
    y = torch.arange(made.points) % made.labels
    angle = 2 * math.pi * y / made.labels
    corners = torch.stack([angle.cos(), angle.sin()], dim=1)
    x = corners + made.spread * torch.randn(made.points, 2, generator=rng)
    return x.view(made.points, 1, 1, 2), y


def follow(made: Toy, defense: Defense, batch: int, seed: int) -> tuple[dict[int, Seen], Tensor]:
    """What is seen after each of these steps of training, and the labels."""
    with preserved_random_state():
        rng = torch.Generator().manual_seed(seed)
        x, y = clouds(made, rng)
        torch.manual_seed(seed)
        members = nn.ModuleList([defense.prepare(Plane(made.hidden, made.labels))])
        optimizer = torch.optim.SGD(members.parameters(), lr=made.lr)
        found = {0: _look(members[0], x, y, made.labels)}
        for step in range(1, made.steps + 1):
            picked = torch.randperm(made.points, generator=rng)[:batch]
            optimizer.zero_grad()
            defense.loss_on(members, x[picked], y[picked]).mean().backward()
            optimizer.step()
            if step in made.seen:
                found[step] = _look(members[0], x, y, made.labels)
    return found, y


@torch.no_grad()
def _look(member: Any, x: Tensor, y: Tensor, labels: int) -> Seen:
    hidden = member.features(x)
    if hasattr(member.readout, "embed"):  # MMC: z is a linear layer away
        features, placed = member.readout.embed(hidden), member.readout.centres
    else:
        features, placed = hidden, member.centres.centres
    means = torch.stack([features[y == label].mean(dim=0) for label in range(labels)])
    return Seen(features, means, placed.clone())


def _toy_data(sources: Sources, arguments: Fields) -> Rows:
    """Distances over steps under the names of loss and batch; then end points, paths, centres."""
    made = checked(Toy, arguments)
    rows: list[dict[str, Any]] = []
    for loss, defense in made.losses.items():
        for batch in made.batches:
            runs = [follow(made, defense, batch, seed) for seed in range(made.runs)]
            rows += _toy_rows(made, loss, made.batch_name(batch), runs)
    return rows


def _toy_rows(
    made: Toy, loss: str, batch: str, runs: Sequence[tuple[dict[int, Seen], Tensor]]
) -> list[dict[str, Any]]:
    series = f"{loss}, {batch}"
    shared = {"loss": loss, "batch": batch}
    rows: list[dict[str, Any]] = []
    for kind, name in (("curve", series), ("arrival", f"{series}: from the last centres")):
        for step in made.seen:
            distances = [
                found[step].distance if kind == "curve" else found[step].until(found[made.steps])
                for found, _ in runs
            ]
            low, high = statistics.runs(distances)
            shown = {"y": sum(distances) / len(distances), "low": max(0.0, low), "high": high}
            rows.append(
                {
                    **shared,
                    "kind": kind,
                    "series": name,
                    "label": "",
                    "x": step,
                    **{key: round(value, DIGITS) for key, value in shown.items()},
                }
            )
    found, y = runs[0]
    last = found[made.steps]
    spots = [("feature", int(y[i]), last.features[i]) for i in range(made.points)][: made.kept]
    spots += [("path", k, seen.means[k]) for k in range(made.labels) for seen in found.values()]
    spots += [("centre", k, last.centres[k]) for k in range(made.labels)]
    for kind, label, spot in spots:
        rows.append(
            {
                **shared,
                "kind": kind,
                "series": f"{series}: {kind} of label {label}",
                "label": label,
                "x": round(float(spot[0]), DIGITS),
                "y": round(float(spot[1]), DIGITS),
                "low": "",
                "high": "",
            }
        )
    return rows


def _toy_plot(rows: Rows, arguments: Fields) -> Canvas:
    losses = list(dict.fromkeys(str(row["loss"]) for row in rows))
    batches = list(dict.fromkeys(str(row["batch"]) for row in rows))
    figure, axes = canvas(COLUMN, 4.0, nrows=1 + len(losses), ncols=len(batches), squeeze=False)
    for column, batch in enumerate(batches):
        here = [row for row in rows if row["batch"] == batch]
        _curves(axes[0, column], here, losses)
        axes[0, column].set_title(batch, fontsize=SMALL)
        if column:
            axes[0, column].set_yticklabels([])
        for line, loss in enumerate(losses, start=1):
            plain(axes[line, column])
            _ended(axes[line, column], [row for row in here if row["loss"] == loss])
    highest = max(axis.get_ylim()[1] for axis in axes[0])
    for axis in axes[0]:
        axis.set_ylim(0, highest)
    for axis, loss in zip(axes[1:, 0], losses, strict=True):
        axis.set_ylabel(f"{loss}: end", fontsize=SMALL)
    axes[0, 0].set_ylabel("mean to centre", fontsize=SMALL)
    axes[0, len(batches) // 2].set_xlabel("step", fontsize=SMALL)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles += [marker("X", markerfacecolor="white"), marker("", linestyle="-", color=GREY)]
    labels += ["centre", "path of a mean"]
    figure.legend(
        handles, labels, fontsize=SMALL, frameon=False, loc="outside lower center", ncols=2
    )
    return figure


def _curves(axis: Any, rows: Rows, losses: Sequence[str]) -> None:
    drawn = [(losses[0], "curve"), *((loss, "arrival") for loss in losses)]  # MMC's never move
    for index, (loss, kind) in enumerate(drawn):
        curve = [row for row in rows if row["loss"] == loss and row["kind"] == kind]
        x, y, low, high = ([float(row[k]) for row in curve] for k in ("x", "y", "low", "high"))
        axis.fill_between(x, low, high, color=PALETTE[index], alpha=0.25, linewidth=0)
        label = f"{loss}, centres now" if kind == "curve" else f"{loss}, last centres"
        if loss != losses[0]:
            label = f"{loss}, fixed centres"
        axis.plot(x, y, linestyle=DASHES[index], color=PALETTE[index], linewidth=1.2, label=label)
    axis.set_xscale("symlog", linthresh=1)
    places = [0, *(10**power for power in range(4) if 10**power <= max(x))]
    axis.set_xticks(places, [str(place) for place in places])
    axis.set_xlim(0, max(x))
    axis.minorticks_off()
    axis.tick_params(labelsize=6, width=0.6, length=2.5)


def _ended(axis: Any, rows: Rows) -> None:
    """Features at the end, the way of their means, and where the centres are."""
    for label in sorted({int(row["label"]) for row in rows if row["label"] != ""}):
        spots = {
            kind: np.array(
                [
                    (float(row["x"]), float(row["y"]))
                    for row in rows
                    if row["kind"] == kind and row["label"] != "" and int(row["label"]) == label
                ]
            )
            for kind in ("feature", "path", "centre")
        }
        style = {"color": PALETTE[label % len(PALETTE)], "marker": MARKERS[label % len(MARKERS)]}
        axis.plot(*spots["feature"].T, **style, linestyle="none", markersize=1.5, alpha=0.5)
        axis.plot(*spots["path"].T, color=GREY, linewidth=0.8)
        axis.plot(*spots["centre"].T, "X", color="black", markerfacecolor="white", markersize=6)


drawings.add("mmc-toy", Drawing(_toy_data, _toy_plot, defenses=("center-loss", "mmc"), version=3))
