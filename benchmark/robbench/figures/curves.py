"""Accuracies as curves over ε or over a parameter of a defense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from robbench.figures import Drawing, Fields, Rows, Sources, checked, drawings
from robbench.figures.styles import NORMS, TEXT, Styles, curves_of, floats, span, stacked, ticks
from robbench.papers.paper import Strict
from robbench.threat import parse_eps

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

At = str | int | float  # an ε or another parameter, as written
Points = Mapping[At, float]  # percent
Kind = Literal["measured", "published", "quoted"]
ASIDE = 1.8  # points by which curves are drawn side by side


class Series(Strict):
    """One curve: its name, and what it adds to the binding."""

    name: str
    bind: Fields = {}


class Panel(Strict):
    """One pair of axes, with fields that all its curves have. Its name stands in the data, its
    title above it. eps: 0 is the clean accuracy. log2: x doubles from tick to tick.

    published: points beside the series of this name; quoted: whole curves that others measured.
    """

    name: str = ""
    title: str | None = None
    bind: Fields = {}
    eps: tuple[At, ...] = ()
    log2: bool = False
    published: Mapping[str, Points] = {}
    quoted: Mapping[str, Points] = {}


class OverEps(Strict):
    """What `accuracy-over-eps` draws: every series in every panel, those of `everywhere` measured
    once and drawn in all panels. bind, panel and series are laid over each other.

    In the data a series is called by its name, with the panel's behind it where there are several;
    one of `everywhere` by its name alone.
    """

    bind: Fields = {}
    panels: tuple[Panel, ...] = (Panel(),)
    series: tuple[Series, ...]
    everywhere: tuple[Series, ...] = ()
    label: str = "accuracy (%)"


class OverParameter(Strict):
    """What `accuracy-over-parameter` draws. `{value}` in the defense stands for each of `values`,
    which `parameter` is the name of. published: points beside the series of this name."""

    bind: Fields = {}
    defense: str
    parameter: str
    values: tuple[float, ...]
    series: tuple[Series, ...]
    published: Mapping[str, Points] = {}
    log2: bool = False
    label: str = "accuracy (%)"


class Asked(NamedTuple):
    """One point of a curve: where it is, and what it is measured by, or what was published."""

    panel: str
    series: str
    label: str
    at: At
    x: float
    fields: Fields = {}
    kind: Kind = "measured"
    y: float = float("nan")

    def row(self, value: float, low: float | str = "", high: float | str = "") -> dict[str, Any]:
        return {
            "panel": self.panel,
            "series": self.series,
            "label": self.label,
            "kind": self.kind,
            "at": self.at,
            "x": self.x,
            "y": value,
            "low": low,
            "high": high,
        }


def _over_eps(arguments: Fields) -> Iterator[Asked]:
    made = checked(OverEps, arguments)
    several = len(made.panels) > 1
    for number, panel in enumerate(made.panels):
        behind = f" {panel.name}" if several else ""
        for series in made.series:
            point = Asked(panel.name, series.name + behind, series.name, 0, 0)
            yield from _measured(point, panel.eps, {**made.bind, **panel.bind, **series.bind})
        if not number:
            for series in made.everywhere:
                point = Asked("", series.name, series.name, 0, 0)
                yield from _measured(point, panel.eps, {**made.bind, **panel.bind, **series.bind})
        for name, points in panel.published.items():
            point = Asked(panel.name, f"{name}{behind} (published)", name, 0, 0, kind="published")
            yield from _printed(point, points)
        for name, points in panel.quoted.items():
            yield from _printed(Asked(panel.name, name + behind, name, 0, 0, kind="quoted"), points)


def _measured(point: Asked, eps: Sequence[At], fields: Fields) -> Iterator[Asked]:
    """A curve over ε. The clean accuracy is that beside the smallest ε, so it costs nothing."""
    first = next(each for each in eps if _radius(each))
    for at in eps:
        bound = {**fields, "eps": at}
        if not _radius(at):
            bound |= {"eps": first, "measure": _clean(str(fields.get("measure", "accuracy")))}
        yield point._replace(at=at, x=_radius(at), fields=bound)


def _clean(measure: str) -> str:
    return "clean" if measure in ("accuracy", "conditional", "robust") else f"clean_{measure}"


def _printed(point: Asked, points: Points) -> Iterator[Asked]:
    for at, y in points.items():
        yield point._replace(at=at, x=_radius(at), y=y)


def _radius(at: At) -> float:
    """ε as a number; 0 is no attack."""
    return float(parse_eps(at)) if str(at) not in ("0", "0.0") else 0.0


def _over_parameter(arguments: Fields) -> Iterator[Asked]:
    made = checked(OverParameter, arguments)
    for series in made.series:
        for value in made.values:
            defense = made.defense.replace("{value}", f"{value:g}")
            fields = {**made.bind, **series.bind, "defense": defense}
            yield Asked("", series.name, series.name, f"{value:g}", value, fields)
        for at, y in made.published.get(series.name, {}).items():
            name = f"{series.name} (published)"
            yield Asked("", name, series.name, at, float(at), kind="published", y=y)


def _drawing(
    asked: Callable[[Fields], Iterator[Asked]], plot: Callable[[Rows, Fields], Canvas]
) -> Drawing:
    """A drawing of such points."""

    def bindings(arguments: Fields) -> list[Fields]:
        return [point.fields for point in asked(arguments) if point.kind == "measured"]

    def data(sources: Sources, arguments: Fields) -> Rows:
        rows = []
        for point in asked(arguments):
            if point.kind != "measured":
                rows.append(point.row(point.y))
                continue
            rows.append(point.row(*sources.percent(point.fields)))
        return rows

    return Drawing(data, plot, bindings)


def _plot_over_eps(rows: Rows, arguments: Fields) -> Canvas:
    made = checked(OverEps, arguments)
    panels = [panel.name for panel in made.panels]
    figure, axes = stacked(len(panels))
    styles = Styles(rows, ASIDE)
    for axis, panel in zip(axes, made.panels, strict=True):
        here = [row for row in rows if row["panel"] in ("", panel.name)]
        for points in curves_of(here):
            styles.draw(axis, points)
        bound = {**made.bind, **panel.bind, **made.series[0].bind}
        _epsilons(axis, here, NORMS[bound.get("norm") or "linf"], panel.log2)
        axis.set_ylabel(made.label, fontsize=TEXT)
        axis.set_ylim(-4, 104)
        if len(panels) > 1:
            axis.set_title(panel.title or panel.name, fontsize=TEXT)
    styles.legend(figure, axes)
    return figure


def _epsilons(axis: Any, rows: Rows, norm: str, log2: bool) -> None:
    """Ticks where something is measured, in 1/255 if all ε are written so."""
    places = {float(row["x"]): str(row["at"]) for row in rows if row["kind"] == "measured"}
    whole = all(text == "0" or text.endswith("/255") for text in places.values())
    labels = {x: text.removesuffix("/255") if whole else text for x, text in places.items()}
    ticks(axis, labels, log2)
    unit = "in 1/255" if whole else "pixels in [0, 1]"
    span(axis, floats(rows, "x"), log2)
    axis.set_xlabel(f"ε ({norm}, {unit}{', log scale' if log2 else ''})", fontsize=TEXT)


def _plot_over_parameter(rows: Rows, arguments: Fields) -> Canvas:
    made = checked(OverParameter, arguments)
    figure, axes = stacked(1, 2.0)
    styles = Styles(rows, ASIDE)
    for points in curves_of(rows):
        styles.draw(axes[0], points)
    ticks(axes[0], {value: f"{value:g}" for value in made.values}, made.log2)
    span(axes[0], floats(rows, "x"), made.log2)
    axes[0].set_xlabel(made.parameter, fontsize=TEXT)
    axes[0].set_ylabel(made.label, fontsize=TEXT)
    axes[0].set_ylim(-4, 104)
    styles.legend(figure, axes)
    return figure


drawings.add("accuracy-over-eps", _drawing(_over_eps, _plot_over_eps))
drawings.add("accuracy-over-parameter", _drawing(_over_parameter, _plot_over_parameter))
