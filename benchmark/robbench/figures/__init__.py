"""Figures of the papers: data first, as CSV, and the plot from that data alone.

A drawing has two functions: the rows of its data, and the plot of such rows; and three more that
say what the rows take: the bindings of the cells behind them (none for what it computes itself),
the trainings and the attacks. A module per subject registers them; papers' YAML files name them
with their arguments.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from xml.etree import ElementTree

from PIL import Image
from pydantic import ValidationError

from robbench.cell import Cell
from robbench.checkpoints import sha256_of
from robbench.errors import InputError
from robbench.papers.cells import shrunk
from robbench.papers.claims import Point
from robbench.papers.paper import Number, Paper, Scale, Strict
from robbench.papers.reproduction import Known, Line, Reproduction
from robbench.records import write_text, write_whole
from robbench.registry import Registry
from robbench.runner import Shared, Training
from robbench.tables import as_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Rows = Sequence[Mapping[str, Any]]
Fields = Mapping[str, Any]
S = TypeVar("S", bound=Strict)
Series = dict[str, list[Point]]
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"  # where an SVG has its metadata
COLUMN = 3.4  # inches: the width of a column in print
# Okabe and Ito: told apart by the colour-blind, and in grey by their order of brightness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def no_cells(arguments: Fields) -> list[Fields]:
    """The bindings of a drawing whose data is computed."""
    return []


def nothing(reproduction: Reproduction, arguments: Fields) -> list[Any]:
    """The trainings or the attacks of a drawing that makes none."""
    return []


@dataclass
class Sources:
    """What a drawing may look at."""

    reproduction: Reproduction
    known: Known
    shared: Shared

    @property
    def paper(self) -> Paper:
        return self.reproduction.paper

    @property
    def scale(self) -> Scale:
        return self.reproduction.overlay

    def line(self, fields: Fields) -> Line:
        """What the records say of a binding; InputError where they do not say it yet."""
        number = Number.alone(fields)
        found = self.reproduction.line(number, "percent", self.known)
        if found.measure is None:
            binding = number.binding
            raise InputError(f"{binding.defense}, {binding.attack}: {found.why}")
        return found

    def percent(self, fields: Fields) -> tuple[float, float | str, float | str]:
        """What the records say of a binding, with its interval; none: empty."""
        measure = self.line(fields).measure
        assert measure is not None
        low, high = measure.interval
        if low != low:
            return 100 * measure.value, "", ""
        return 100 * measure.value, 100 * low, 100 * high

    def defense(self, text: str, dataset: str) -> str:
        """The canonical spec of a defense of the paper at this scale."""
        return shrunk(text, dataset, self.scale)

    def dataset(self, name: str) -> Any:
        """The dataset that stands for one of the paper's."""
        return self.shared.dataset(self.scale.dataset(name))


class Drawing(NamedTuple):
    """data: the rows; plot: of these rows alone; bindings: of the cells behind the data.

    Of data that is computed: trainings, the defenses that it deploys or watches in training;
    attacks, the cells whose first shard it attacks itself; defenses, what else it makes use of;
    version, raised when the same arguments give other rows.
    """

    data: Callable[[Sources, Fields], Rows]
    plot: Callable[[Rows, Fields], Canvas]
    bindings: Callable[[Fields], list[Fields]] = no_cells
    trainings: Callable[[Reproduction, Fields], list[Training]] = nothing
    attacks: Callable[[Reproduction, Fields], list[Cell]] = nothing
    defenses: tuple[str, ...] = ()
    version: int = 1


drawings: Registry[Drawing] = Registry("drawing", "robbench.figures")


def checked(model: type[S], arguments: Fields) -> S:
    """The arguments of a drawing; InputError names what is wrong."""
    try:
        return model.model_validate(arguments)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise InputError(f"figure: {place}: {problem['msg']}") from None


def write(path: Path, rows: Rows) -> None:
    """The data of a figure as CSV."""
    write_text(path, as_csv(rows))


def read(path: Path) -> list[dict[str, str]]:
    """The data of a figure as it is plotted: text in every cell."""
    if not path.exists():
        raise InputError(f"not drawn yet: {path.name} is missing")
    broken = InputError(
        f"the data {path} is broken; delete the file and run 'robbench reproduce' again"
    )
    try:
        text = path.read_bytes().decode()
        rows = plain(text)
    except (OSError, ValueError, csv.Error):
        raise broken from None
    if not text.endswith("\n") or any(None in (*row, *row.values()) for row in rows):
        raise broken
    return rows


def plain(text: str) -> list[dict[str, str]]:
    """The lines of a CSV."""
    return list(csv.DictReader(io.StringIO(text, newline="")))


def read_series(path: Path) -> Series:
    """The curves of a figure whose data has the columns series, x and y."""
    return series_of(read(path), path.name)


def series_of(rows: Sequence[Mapping[str, str]], name: str) -> Series:
    """The curves in the data of a figure; InputError where the columns series, x and y are not, or
    hold no numbers."""
    found: Series = {}
    for row in rows:
        if not {"series", "x", "y"} <= row.keys():
            raise InputError(f"{name} has no curves: its columns are {', '.join(row)}")
        try:
            point = Point(*(float(row.get(field) or "nan") for field in Point._fields))
        except ValueError:
            raise InputError(f"{name} has no number at {row['x']}, {row['y']}") from None
        found.setdefault(row["series"], []).append(point)
    return found


def caption(canvas: Canvas, text: str) -> None:
    """A line above a plot that says what it was measured on."""
    if text:
        width = int(canvas.get_figwidth() * 22)  # signs of this size
        filled = textwrap.fill(text, width)
        canvas.text(0.5, 1.01, filled, ha="center", va="bottom", fontsize=6, color="0.35")


def plots_of(data: Path) -> tuple[Path, Path]:
    """The SVG and the PNG beside the data of a figure."""
    return data.with_suffix(".svg"), data.with_suffix(".png")


def save(canvas: Canvas, data: Path) -> None:
    """A plot beside its data, the same bytes for the same data, with its SHA-256 in them."""
    import matplotlib

    svg, png = plots_of(data)
    source = {"Description": sha256_of(data)}
    kinds: Mapping[Path, dict[str, Any]] = {
        svg: {"format": "svg", "metadata": {**source, "Date": None}},
        png: {"format": "png", "metadata": {**source, "Software": None}, "dpi": 200},
    }
    with matplotlib.rc_context({"svg.hashsalt": "robbench", "svg.fonttype": "none"}):
        for file, settings in kinds.items():
            write_whole(file, partial(canvas.savefig, bbox_inches="tight", **settings))


def plot_problem(plot: Path, data: Path) -> str | None:
    """Why an SVG or PNG is not that of the data beside it; None where it is."""
    try:
        if plot.suffix == ".svg":
            found = ElementTree.parse(plot).getroot().findtext(f".//{DESCRIPTION}")
        else:
            with Image.open(plot, formats=["PNG"]) as image:
                image.verify()
                found = image.info.get("Description")
    except FileNotFoundError:
        return "it is missing"
    except (OSError, SyntaxError, ValueError):  # ParseError is a SyntaxError, as is Pillow's
        return f"it is no {plot.suffix[1:].upper()}"
    return None if found == sha256_of(data) else f"it was not drawn from {data.name}"


def canvas(width: float = COLUMN, height: float = 2.6, **subplots: Any) -> tuple[Canvas, Any]:
    """A figure with its axes, drawn without a display. Arguments of `subplots` of matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Made
    except ImportError:
        raise InputError("figures need matplotlib; write pip install 'robbench[figures]'") from None
    made = Made(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(**subplots)
