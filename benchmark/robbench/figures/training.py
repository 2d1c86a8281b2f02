"""Accuracies after each epoch of a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from robbench import statistics
from robbench.checkpoints import recipe_of
from robbench.datasets import Dataset
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.figures import Drawing, Fields, Rows, Sources, checked, drawings
from robbench.figures.styles import DASHES, GREY, TEXT, Styles, curves_of, epochs, floats, stacked
from robbench.figures.watching import accuracies, watch
from robbench.papers.cells import training_of
from robbench.papers.paper import Strict
from robbench.papers.reproduction import Reproduction
from robbench.runner import Training
from robbench.training import derive

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Part = Literal["training", "validation"]
COLUMNS: Mapping[Part, str] = {"training": "train_accuracy", "validation": "validation_accuracy"}
HEIGHT = 2.0  # inches of a panel of training curves
MARKS = 8  # markers on a curve, so that they do not cover it


class Learner(Strict):
    """A defense whose training is drawn. watched: it is trained once more and looked at after every
    epoch as it is deployed, for what no checkpoint holds: a vote of many draws."""

    name: str
    defense: str
    dataset: str
    train_seed: int = 0
    watched: bool = False


class Course(Strict):
    """The learners of one panel."""

    name: str = ""
    series: tuple[Learner, ...]


class Courses(Strict):
    """What `training-curves` draws. parts: of the data; where there are two, a series is called by
    the name of its learner with the part behind it, and by the name alone where there is one. The
    name of the panel stands behind names that several panels have."""

    panels: tuple[Course, ...]
    parts: tuple[Part, ...] = ("training", "validation")


class Point(NamedTuple):
    """Accuracies after so many epochs, in [0, 1]; several where members are trained in turn."""

    epoch: int
    values: tuple[float, ...]


def curve(path: Path, part: Part) -> list[Point]:
    """The accuracy after each epoch from the recipe beside a checkpoint."""
    found: dict[int, list[float]] = {}
    for point in recipe_of(path)["curve"]:
        if COLUMNS[part] in point:
            found.setdefault(int(point["epoch"]) + 1, []).append(float(point[COLUMNS[part]]))
    return [Point(epoch, tuple(values)) for epoch, values in sorted(found.items())]


def _curves_data(sources: Sources, arguments: Fields) -> Rows:
    """Of members that are trained one after the other the mean, with the interval over them."""
    made = checked(Courses, arguments)
    names = [learner.name for panel in made.panels for learner in panel.series]
    rows: list[dict[str, Any]] = []
    for panel in made.panels:
        for learner in panel.series:
            behind = f" {panel.name}" if names.count(learner.name) > 1 else ""
            for part in made.parts:
                suffix = f" {part}" if len(made.parts) > 1 else ""
                for epoch, found in _course(sources, learner, part):
                    values = [100 * value for value in found]
                    spread = statistics.runs(values) if len(values) > 1 else None
                    rows.append({
                        "panel": panel.name,
                        "series": learner.name + suffix + behind,
                        "label": learner.name,
                        "kind": "measured",
                        "part": part,
                        "x": epoch,
                        "y": sum(values) / len(values),
                        "low": max(0.0, spread.low) if spread else "",
                        "high": min(100.0, spread.high) if spread else "",
                    })  # fmt: skip
    return rows


def _learners(reproduction: Reproduction, arguments: Fields) -> list[Training]:
    return [
        training_of(each.defense, each.dataset, reproduction.overlay, each.train_seed, each.watched)
        for panel in checked(Courses, arguments).panels
        for each in panel.series
    ]


def _course(sources: Sources, learner: Learner, part: Part) -> list[Point]:
    dataset, spec = (
        sources.dataset(learner.dataset),
        sources.defense(learner.defense, learner.dataset),
    )
    shared = sources.shared
    if learner.watched:
        return _watched(sources, learner, spec, dataset) if part == "validation" else []
    keys = shared.deploy(spec, dataset, learner.train_seed).keys
    path = shared.shelf.find(keys[0])
    if len(keys) > 1 or path is None:
        raise InputError(f"{spec} has no training of its own; draw one of what it is made of")
    return curve(path, part)


def _watched(sources: Sources, learner: Learner, spec: str, dataset: Dataset) -> list[Point]:
    (defense,) = resolve(spec)
    found: list[Point] = []

    def look(epoch: int, members: nn.ModuleList) -> None:
        if epoch:
            seed = derive("watched", spec, learner.train_seed, epoch)
            clean, _ = accuracies(defense, members, dataset, None, seed, answers=1)
            found.append(Point(epoch, (clean.value,)))

    shared = sources.shared
    folders = shared.shelf.folders
    watch(spec, dataset, learner.train_seed, shared.device, folders, look)
    return found


def _plot_curves(rows: Rows, arguments: Fields) -> Canvas:
    made = checked(Courses, arguments)
    figure, axes = stacked(len(made.panels), HEIGHT if len(made.panels) > 1 else 2.4)
    styles = Styles(rows)
    for axis, panel in zip(axes, made.panels, strict=True):
        for points in curves_of([row for row in rows if row["panel"] == panel.name]):
            _draw_course(axis, points, styles, len(made.parts) > 1)
        axis.set_ylabel("accuracy (%)", fontsize=TEXT)
        epochs(axis)
        if len(made.panels) > 1:
            axis.set_title(panel.name, fontsize=TEXT)
    axes[-1].set_xlabel("epoch", fontsize=TEXT)
    styles.legend(figure, axes, more=_parts() if len(made.parts) > 1 else {})
    return figure


def _draw_course(axis: Any, points: Rows, styles: Styles, several: bool) -> None:
    """Validation is a line with markers, training a thin dashed one without."""
    style = styles.of(str(points[0]["label"]))
    x, y = floats(points, "x"), floats(points, "y")
    if several and points[0]["part"] == "training":
        axis.plot(x, y, color=style["color"], linewidth=0.7, linestyle="--")
        return
    offset = styles.labels.index(str(points[0]["label"]))  # markers of close curves side by side
    every = max(1, len(x) // MARKS)
    dashes = "-" if several else DASHES[offset % len(DASHES)]
    begin = offset * every // len(styles.labels)
    axis.plot(x, y, **style, linestyle=dashes, markevery=(begin, every), label=points[0]["label"])
    axis.fill_between(
        x, floats(points, "low"), floats(points, "high"), color=style["color"], alpha=0.15,
        linewidth=0,
    )  # fmt: skip


def _parts() -> dict[str, Any]:
    """Which line stands for which part of the data."""
    from matplotlib.lines import Line2D

    return {
        "validation": Line2D([], [], color=GREY, linewidth=1.1),
        "training": Line2D([], [], color=GREY, linewidth=0.7, linestyle="--"),
    }


drawings.add("training-curves", Drawing(_curves_data, _plot_curves, trainings=_learners))
