"""Accuracies as curves over ε or over a parameter of a defense, and over members × draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from robbench.defense import resolve
from robbench.errors import InputError
from robbench.figures import COLUMN, MARKERS, PALETTE, Drawing, Rows, Sources, canvas, drawings
from robbench.papers.derived import size_of
from robbench.papers.paper import Binding, Strict
from robbench.threat import NORM_NAMES, parse_eps

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Fields = Mapping[str, Any]
At = str | int | float  # an ε or another parameter, as written
Points = Mapping[At, float]  # percent
Kind = Literal["measured", "published", "quoted"]
S = TypeVar("S", bound=Strict)
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))
NORMS = dict(zip(NORM_NAMES, ("ℓ∞", "ℓ2", "ℓ1", "ℓ0", "none"), strict=True))
SMALL, TEXT = 7, 8  # points in print
PANEL = 1.7  # inches: how high a panel is
GREY = "#555555"
MARGIN = 0.05  # of an axis, beside what it shows
NEAR = 0.05  # of an axis: labels of ticks closer than that would run into each other
ASIDE = 1.8  # points by which curves are drawn side by side
PUBLISHED = "published"


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


class Grid(Strict):
    """What `members-by-draws` draws. `{members}` and `{draws}` in the defense stand for each of
    them, at the paper's scale; the map has what they are at its own, each once."""

    bind: Fields
    defense: str
    members: tuple[int, ...]
    draws: tuple[int, ...]
    label: str = "correct or abstained (%)"


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


def checked(model: type[S], arguments: Fields) -> S:
    """The arguments of a drawing; InputError names what is wrong."""
    try:
        return model.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise InputError(f"figure: {place}: {problem['msg']}") from None


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
            rows.append(point.row(*percent(sources, point.fields)))
        return rows

    return Drawing(bindings, data, plot)


def percent(sources: Sources, fields: Fields) -> tuple[float, float | str, float | str]:
    """What the records say of a binding, with its interval; none: empty."""
    measure = sources.line(fields).measure
    assert measure is not None
    low, high = measure.interval
    if low != low:
        return 100 * measure.value, "", ""
    return 100 * measure.value, 100 * low, 100 * high


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
            style |= {"markerfacecolor": "white", "label": f"{label} ({PUBLISHED})"}
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


drawings.add("accuracy-over-eps", _drawing(_over_eps, _plot_over_eps))
drawings.add("accuracy-over-parameter", _drawing(_over_parameter, _plot_over_parameter))


def _cells(arguments: Fields) -> Iterator[Fields]:
    made = checked(Grid, arguments)
    for members, draws in itertools.product(made.members, made.draws):
        defense = made.defense.replace("{members}", str(members)).replace("{draws}", str(draws))
        yield {**made.bind, "defense": defense}


def _grid_data(sources: Sources, arguments: Fields) -> Rows:
    """By members and draws as they are at the scale: a curve over draws for each number of members;
    the means over draws as `models`, over members as `inferences`."""
    found: dict[tuple[int, int], tuple[float, float | str, float | str]] = {}
    for fields in _cells(arguments):
        (cell,) = sources.reproduction.cells_of(Binding.model_validate(fields))
        draws = max(part.draws for part in resolve(cell.defense))
        key = size_of(cell.defense), draws
        if key not in found:
            found[key] = percent(sources, fields)
    members, draws_of = (sorted({key[side] for key in found}) for side in (0, 1))
    rows: list[dict[str, Any]] = []
    for (m, s), (y, low, high) in sorted(found.items()):
        row = {"series": f"{m} models", "x": s, "y": y, "low": low, "high": high}
        rows.append({**row, "members": m, "draws": s})
    for name, side, values in (("models", 0, members), ("inferences", 1, draws_of)):
        for value in values:
            each = [y for key, (y, *_) in sorted(found.items()) if key[side] == value]
            rows.append({"series": name, "x": value, "y": sum(each) / len(each), "low": "",
                         "high": "", "members": "", "draws": ""})  # fmt: skip
    return rows


def _plot_grid(rows: Rows, arguments: Fields) -> Canvas:
    made = checked(Grid, arguments)
    cells = {
        (int(row["members"]), int(row["draws"])): float(row["y"])
        for row in rows
        if row["members"] != ""
    }
    members, draws = (sorted({key[side] for key in cells}) for side in (0, 1))
    values = [[cells.get((m, s), float("nan")) for s in draws] for m in members]
    figure, axis = canvas(COLUMN, 0.9 + 0.4 * len(members))
    mesh = axis.pcolormesh(values, cmap="cividis", edgecolors="white", linewidth=1)
    low, high = mesh.get_clim()
    for (i, m), (j, s) in itertools.product(enumerate(members), enumerate(draws)):
        if (m, s) in cells:
            dark = cells[m, s] < (low + high) / 2 or low == high
            axis.text(
                j + 0.5, i + 0.5, f"{cells[m, s]:.1f}", ha="center", va="center",
                fontsize=TEXT, color="white" if dark else "black",
            )  # fmt: skip
    axis.set_xticks([j + 0.5 for j in range(len(draws))], draws)
    axis.set_yticks([i + 0.5 for i in range(len(members))], members)
    axis.tick_params(labelsize=SMALL, length=0)
    axis.set_xlabel("inferences of each model", fontsize=TEXT)
    axis.set_ylabel("models", fontsize=TEXT)
    bar = figure.colorbar(mesh, ax=axis)
    bar.set_label(made.label, fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    return figure


drawings.add(
    "members-by-draws",
    Drawing(lambda arguments: list(_cells(arguments)), _grid_data, _plot_grid),
)
