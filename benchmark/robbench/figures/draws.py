"""A map of accuracies over members × draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from robbench.defense import resolve
from robbench.figures import COLUMN, Drawing, Fields, Rows, Sources, canvas, checked, drawings
from robbench.figures.styles import SMALL, TEXT
from robbench.papers.derived import size_of
from robbench.papers.paper import Binding, Strict

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


class Grid(Strict):
    """What `members-by-draws` draws. `{members}` and `{draws}` in the defense stand for each of
    them, at the paper's scale; the map has what they are at its own, each once."""

    bind: Fields
    defense: str
    members: tuple[int, ...]
    draws: tuple[int, ...]
    label: str = "correct or abstained (%)"


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
            found[key] = sources.percent(fields)
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
    Drawing(_grid_data, _plot_grid, lambda arguments: list(_cells(arguments))),
)
