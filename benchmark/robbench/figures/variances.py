"""Variances of random weights, and what an attack leaves, while a defense is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from robbench.datasets import Dataset
from robbench.defense import resolve
from robbench.figures import Drawing, Fields, Rows, Sources, checked, drawings
from robbench.figures.styles import (
    PUBLISHED,
    TEXT,
    Styles,
    curves_of,
    epochs,
    floats,
    span,
    stacked,
)
from robbench.figures.watching import Attacked, accuracies, variance, watch
from robbench.papers.cells import training_of
from robbench.papers.paper import Strict
from robbench.papers.reproduction import Reproduction
from robbench.runner import Training
from robbench.training import derive

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


class Watched(Strict):
    """A training that is looked at after every epoch. variance: the series of the sum of variances
    of its weights, with the panel that it stands in and what the legend calls it; published: the
    range in which it lies. attacked: the attack on the network of every epoch, whose accuracies are
    the series of these names."""

    defense: str
    dataset: str
    train_seed: int = 0
    panel: str = ""
    label: str = ""
    variance: str | None = None
    published: tuple[float, float] | None = None
    attacked: Attacked | None = None
    clean_name: str = "clean accuracy"
    attacked_name: str = "accuracy under attack"


class Looks(Strict):
    """What `variance-while-training` draws: panels of variances, and one of accuracies."""

    runs: tuple[Watched, ...]


def _watched_runs(reproduction: Reproduction, arguments: Fields) -> list[Training]:
    return [
        training_of(run.defense, run.dataset, reproduction.overlay, run.train_seed, watched=True)
        for run in checked(Looks, arguments).runs
    ]


def _looks_data(sources: Sources, arguments: Fields) -> Rows:
    """Variances from before the first epoch on, accuracies after every epoch."""
    rows: list[dict[str, Any]] = []
    for run in checked(Looks, arguments).runs:
        dataset = sources.dataset(run.dataset)
        rows += _look(sources, run, sources.defense(run.defense, run.dataset), dataset)
    return rows


def _look(sources: Sources, run: Watched, spec: str, dataset: Dataset) -> list[dict[str, Any]]:
    (defense,) = resolve(spec)
    named = (run.clean_name, run.attacked_name)
    variances: list[dict[str, Any]] = []
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in named}

    def row(series: str, epoch: int | str, y: float | str) -> dict[str, Any]:
        varies = series not in named
        return {
            "panel": run.panel if varies else "",
            "series": series,
            "label": run.label or str(run.variance) if varies else series,
            "kind": "measured",
            "x": epoch,
            "y": y,
            "low": "",
            "high": "",
        }

    def look(epoch: int, members: nn.ModuleList) -> None:
        if run.variance:
            variances.append(row(run.variance, epoch, variance(members)))
        if run.attacked and epoch:
            seed = derive("watched", spec, run.train_seed, epoch)
            measures = accuracies(defense, members, dataset, run.attacked, seed)
            for name, measure in zip(named, measures, strict=True):
                assert measure is not None
                low, high = (100 * bound for bound in measure.interval)
                found[name].append({**row(name, epoch, 100 * measure.value), "low": low,
                                    "high": high})  # fmt: skip

    shared = sources.shared
    watch(spec, dataset, run.train_seed, shared.device, shared.shelf.folders, look)
    if run.published:
        low, high = run.published
        printed = row(f"{run.variance} ({PUBLISHED})", "", "")
        variances.append({**printed, "kind": PUBLISHED, "low": low, "high": high})
    return [*variances, *(each for rows in found.values() for each in rows)]


def _plot_looks(rows: Rows, arguments: Fields) -> Canvas:
    ranges = [row for row in rows if row["kind"] == PUBLISHED]
    curves = [row for row in rows if row["kind"] != PUBLISHED]
    panels = list(dict.fromkeys(str(row["panel"]) for row in curves))
    panels.sort(key=lambda panel: not panel)  # that of the accuracies is the last
    figure, axes = stacked(len(panels), 1.5)
    styles = Styles(curves)
    runs = [run for run in checked(Looks, arguments).runs if run.attacked]
    attacked = "; ".join(", ".join(filter(None, (run.panel, run.label))) for run in runs)
    for axis, panel in zip(axes, panels, strict=True):
        here = [row for row in curves if row["panel"] == panel]
        for points in curves_of(here):
            styles.draw(axis, points)
        bands = [row for row in ranges if row["panel"] == panel]
        for row in bands:
            low, high = float(row["low"]), float(row["high"])
            color = styles.of(str(row["label"]))["color"]
            axis.axhspan(low, high, color=color, alpha=0.15, linewidth=0, label=PUBLISHED)
        axis.set_ylabel("sum of variances" if panel else "accuracy (%)", fontsize=TEXT)
        highest = max([*floats(here, "y"), *floats(bands, "high")]) if panel else 100
        axis.set_ylim(-0.04 * highest if not panel else 0, 1.08 * highest)
        span(axis, floats(here, "x"))
        epochs(axis)
        if len(panels) > 1:
            axis.set_title(panel or attacked, fontsize=TEXT)
    axes[-1].set_xlabel("epoch", fontsize=TEXT)
    styles.legend(figure, axes, columns=2)
    return figure


drawings.add("variance-while-training", Drawing(_looks_data, _plot_looks, trainings=_watched_runs))
