"""What happens while a defense is trained: accuracies by epoch, variances of random weights, and
what an attack leaves after every epoch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robbench.access import Access
from robbench.attacks import Configured
from robbench.checkpoints import Shelf, Trained, attacker_losses, key_of, recipe_of
from robbench.datasets import Dataset
from robbench.defense import Defense, resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.figures import Drawing, Rows, Sources, drawings, no_cells
from robbench.figures.curves import (
    DASHES,
    GREY,
    PUBLISHED,
    TEXT,
    Fields,
    Styles,
    checked,
    curves_of,
    floats,
    span,
    stacked,
)
from robbench.judge import SCORING_DRAWS, check, score
from robbench.metrics import Measure, share
from robbench.networks.sampled import laws
from robbench.papers.cells import training_of
from robbench.papers.paper import Strict
from robbench.papers.reproduction import Reproduction
from robbench.randomness import preserved_random_state, sandboxed
from robbench.runner import Training
from robbench.threat import Eps, Norm, Threat
from robbench.training import LOOKED_AT, derive

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Part = Literal["training", "validation"]
COLUMNS: Mapping[Part, str] = {"training": "train_accuracy", "validation": "validation_accuracy"}
HEIGHT = 2.0  # inches of a panel of training curves
MARKS = 8  # markers on a curve, so that they do not cover it
Look = Callable[[int, nn.ModuleList], None]  # epochs done, members as deployed


class _Watching(Shelf):
    """A shelf that trains the defense of one key in a folder of its own, whatever the others hold,
    and keeps hold of what is being trained."""

    def __init__(self, folders: Iterable[Path], own: Path, key: str) -> None:
        super().__init__([*folders, own])
        self.own, self.key = own, key
        self.members_in_training = nn.ModuleList()
        self.begun: Callable[[], None] = lambda: None

    def find(self, key: str) -> Path | None:
        return Shelf([self.own]).find(key) if key == self.key else super().find(key)

    def _start(
        self,
        defense: Defense,
        members: nn.ModuleList,
        dataset: Dataset,
        train_seed: int,
        device: torch.device,
    ) -> None:
        super()._start(defense, members, dataset, train_seed, device)
        self.members_in_training = members  # the last of all: bases were started within
        self.begun()


def watch(
    spec: str,
    dataset: Dataset,
    train_seed: int,
    device: torch.device,
    folders: Iterable[Path],
    look: Look,
) -> nn.ModuleList:
    """Train a defense as any run does, to the same weights, and look at it before the first epoch
    and after each. `look` sees copies in evaluation mode, under random streams of its own.

    What is trained is not kept. InputError for members that are trained one after the other: there
    is no ensemble before the last of them.
    """
    (defense,) = resolve(spec)
    if not defense.joint and defense.members > 1:
        raise InputError(f"{spec}: its members are trained one by one; watch one of them")

    def seen(epoch: int) -> None:
        with preserved_random_state(), torch.no_grad():
            copies = defense.build(dataset.shape, len(dataset.labels))
            copies.load_state_dict(shelf.members_in_training.state_dict())
            copies.to(device).eval()
            defense.calibrate(copies, dataset)
            with torch.enable_grad():
                look(epoch, copies)

    def progress(done: int, total: int) -> None:
        if done % (total // defense.epochs) == 0:
            seen(done * defense.epochs // total)

    with tempfile.TemporaryDirectory() as own:
        key = key_of(defense, dataset, train_seed)
        shelf = _Watching(folders, Path(own), key)
        shelf.begun = lambda: seen(0)
        members, _, _ = shelf.members(defense, dataset, train_seed, device, progress)
    return members


def variance(members: nn.ModuleList) -> float:
    """The sum of the variances of all random weights."""
    with torch.no_grad():
        return sum(
            float(law.deviation(mean).double().square().sum()) for mean, law in laws(members)
        )


class Attacked(Strict):
    """An attack on the first n validation images. eot: draws behind a gradient of the attacker who
    knows the defense; none: the white box through one draw."""

    attack: str = "fgsm"
    norm: Norm = "linf"
    eps: Eps
    eot: int | None = None
    n: int = LOOKED_AT


def accuracies(
    defense: Defense,
    members: nn.ModuleList,
    dataset: Dataset,
    attacked: Attacked | None,
    seed: int,
    answers: int = SCORING_DRAWS,
) -> tuple[Measure, Measure | None]:
    """Of members as they would be deployed, on validation images: clean, and on x'. answers: of a
    random defense to each image."""
    deployed = Deployed(members, defense.rule(), dataset.shape, len(dataset.labels), defense.draws)
    losses = attacker_losses((defense,))
    trained = Trained(deployed, (), losses)
    x, y = (part[: attacked.n if attacked else LOOKED_AT] for part in dataset.validation)
    x, y = x.to(deployed.device), y.to(deployed.device)
    draws = answers if deployed.stochastic else 1

    def measured(images: Tensor, role: str) -> Measure:
        right = score(trained, images, y, draws, derive(seed, role)).ok
        return share(right / draws, draws)

    clean = measured(x, "clean")
    if attacked is None:
        return clean, None
    attack = Configured.of(attacked.attack)
    if attack.entry.minimal or attack.entry.suite:
        raise InputError(f"{attacked.attack} has no one ε; watch with an attack such as fgsm")
    threat = Threat(norm=attacked.norm, eps=attacked.eps)
    access = Access(deployed, losses=losses, knows=False)
    if attacked.eot:
        access = Access(deployed, losses=losses, draws=attacked.eot)
    role = derive(seed, "attack")
    with sandboxed(deployed, role):
        rng = torch.Generator().manual_seed(role)
        found = attack(access, x.clone(), y.clone(), threat, rng)
    check(found, x, threat)
    return clean, measured(found, "attacked")


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
    """Of members that are trained one after the other the mean, with the lowest and the highest."""
    made = checked(Courses, arguments)
    names = [learner.name for panel in made.panels for learner in panel.series]
    rows: list[dict[str, Any]] = []
    for panel in made.panels:
        for learner in panel.series:
            behind = f" {panel.name}" if names.count(learner.name) > 1 else ""
            for part in made.parts:
                suffix = f" {part}" if len(made.parts) > 1 else ""
                for epoch, values in _course(sources, learner, part):
                    rows.append({
                        "panel": panel.name,
                        "series": learner.name + suffix + behind,
                        "label": learner.name,
                        "kind": "measured",
                        "part": part,
                        "x": epoch,
                        "y": 100 * sum(values) / len(values),
                        "low": 100 * min(values) if len(values) > 1 else "",
                        "high": 100 * max(values) if len(values) > 1 else "",
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
        _epochs(axis)
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


def _epochs(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


drawings.add("training-curves", Drawing(no_cells, _curves_data, _plot_curves, _learners))


class Watched(Strict):
    """A training that is looked at after every epoch. variance: the series of the sum of variances
    of its weights, with the panel that it stands in and what the legend calls it; published: points
    beside it, by epoch. attacked: the attack on the network of every epoch, whose accuracies are
    the series of these names."""

    defense: str
    dataset: str
    train_seed: int = 0
    panel: str = ""
    label: str = ""
    variance: str | None = None
    published: Mapping[int, float] = {}
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

    def row(series: str, epoch: int, y: float, kind: str = "measured") -> dict[str, Any]:
        varies = series not in named
        return {
            "panel": run.panel if varies else "",
            "series": series,
            "label": run.label or str(run.variance) if varies else series,
            "kind": kind,
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
    printed = [
        row(f"{run.variance} ({PUBLISHED})", epoch, y, PUBLISHED)
        for epoch, y in run.published.items()
    ]
    return [*variances, *printed, *(each for rows in found.values() for each in rows)]


def _plot_looks(rows: Rows, arguments: Fields) -> Canvas:
    panels = list(dict.fromkeys(str(row["panel"]) for row in rows))
    panels.sort(key=lambda panel: not panel)  # that of the accuracies is the last
    figure, axes = stacked(len(panels), 1.5)
    styles = Styles(rows)
    for axis, panel in zip(axes, panels, strict=True):
        here = [row for row in rows if row["panel"] == panel]
        for points in curves_of(here):
            styles.draw(axis, points)
        axis.set_ylabel("sum of variances" if panel else "accuracy (%)", fontsize=TEXT)
        highest = max(floats(here, "y")) if panel else 100
        axis.set_ylim(-0.04 * highest if not panel else 0, 1.08 * highest)
        span(axis, floats(here, "x"))
        _epochs(axis)
        if panel and len(panels) > 1:
            axis.set_title(panel, fontsize=TEXT)
    axes[-1].set_xlabel("epoch", fontsize=TEXT)
    styles.legend(figure, axes, columns=2)
    return figure


drawings.add("variance-while-training", Drawing(no_cells, _looks_data, _plot_looks, _watched_runs))
