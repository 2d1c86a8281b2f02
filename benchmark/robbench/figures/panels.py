"""Attacked images beside their originals, with the predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robbench.cell import Cell
from robbench.figures import COLUMN, Drawing, Fields, Rows, Sources, canvas, drawings
from robbench.figures.images import (
    NONE,
    RIGHT,
    WRONG,
    answers,
    attacked,
    brief,
    chosen,
    close_up,
    named,
    picture,
    pixels,
    show,
)
from robbench.figures.styles import NORMS, SMALL
from robbench.papers.cells import cell_of
from robbench.papers.paper import Binding
from robbench.papers.reproduction import Reproduction
from robbench.threat import format_eps
from robbench.training import derive

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def _panel_cells(reproduction: Reproduction, arguments: Fields) -> list[Cell]:
    """The attack of every column, on the same images."""
    pool = int(arguments.get("pool", 50))
    fields = [{**arguments["bind"], **column} for column in arguments["columns"].values()]
    cells = [
        cell_of(Binding(**{"n": pool, **each}), reproduction.overlay, reproduction.load)
        for each in fields
    ]
    n = min(cell.n for cell in cells)  # the scale has fewer images of an attack that is dear
    return [cell.model_copy(update={"n": n}) for cell in cells]


def _panel_data(sources: Sources, arguments: Fields) -> Rows:
    """Of every image shown a row for the original and one per column."""
    shared, cells = sources.shared, _panel_cells(sources.reproduction, arguments)
    made = [attacked(cell, shared) for cell in cells]
    names = shared.dataset(cells[0].dataset).labels
    clean, after = [], []
    for cell, each in zip(cells, made, strict=True):
        target = shared.deploy(cell.defense, shared.dataset(cell.dataset), cell.train_seed)
        seeds = [derive(cell.seed, cell.id, 0, role) for role in ("clean", "score")]
        clean.append(answers(target.deployed, each.x, seeds[0]))
        after.append(answers(target.deployed, each.adversarial, seeds[1]))
    ids, x, y = made[0][:3]
    right = torch.stack([each.label == y for each in clean]).all(dim=0)
    broken = torch.stack([each.label != y for each in after]).sum(dim=0)
    label = [names[i] for i in y.tolist()]
    wanted = arguments.get("labels", [])
    shown = chosen(label, wanted, (right * (1 + broken)).tolist(), int(arguments.get("images", 1)))
    gains = [_gain(each.adversarial[shown] - x[shown]) for each in made]
    rows: list[dict[str, Any]] = []
    for image, i in enumerate(shown):
        same = {"image": image, "id": int(ids[i]), "label": label[i]}
        rows.append({**same, "column": "original", **pixels(x[i])})
        for title, cell, each, gain, before, now in zip(
            arguments["columns"], cells, made, gains, clean, after, strict=True
        ):
            change = each.adversarial[i] - x[i]
            rows.append(
                {
                    **same,
                    "column": title,
                    "dataset": cell.dataset,
                    "defense": cell.defense,
                    "attack": cell.attack,
                    "setting": str(cell.setting),
                    "norm": cell.threat.norm,
                    "eps": format_eps(cell.threat.eps),
                    "distance": round(float(each.distance[i]), 6),
                    "clean_prediction": named(int(before.label[i]), names),
                    "prediction": named(int(now.label[i]), names),
                    "confidence": round(float(now.confidence[i]), 4),
                    **pixels(each.adversarial[i]),
                    "gain": round(gain, 2),
                    **pixels(0.5 + gain * change, "difference"),
                }
            )
    return rows


def _gain(change: Tensor) -> float:
    """By what the largest change is half of the range."""
    largest = float(change.abs().max())
    return 0.5 / largest if largest else 1.0


def _panel_plot(rows: Rows, arguments: Fields) -> Canvas:
    """Images in lines, attacks in columns; below an attacked image what was added to it."""
    titles = list(dict.fromkeys(row["column"] for row in rows))
    images = list(dict.fromkeys(row["image"] for row in rows))
    differs = bool(arguments.get("differences", True))
    beside = differs and len(titles) == 2  # a line of three is better than two lines of one
    columns = len(titles) + beside
    lines = len(images) * (1 + (differs and not beside))
    width = COLUMN if columns > 2 else COLUMN * 2 / 3
    side = width / columns
    made, axes = canvas(
        width, lines * (side + 0.22) + 0.3, nrows=lines, ncols=columns, squeeze=False
    )
    close_up(made, axes)
    step = lines // len(images)
    for row in rows:
        line, column = images.index(row["image"]) * step, titles.index(row["column"])
        axis = axes[line, column]
        show(axis, picture(row))
        if line == 0:
            axis.set_title(row["column"], fontsize=SMALL, pad=3)
        if column == 0:
            axis.set_xlabel(brief(row["label"]), fontsize=SMALL, labelpad=2)
            continue
        _say(axis, row, "\n" if columns > 3 else " ")
        if differs:
            other = axes[line, column + 1] if beside else axes[line + 1, column]
            show(other, picture(row, "difference"))
            length = f"{NORMS[row['norm']]} {float(row['distance']):.2g}"
            gain = f"× {float(row['gain']):.3g}" if line + step == lines else ""
            text = f"{gain}, {length}" if beside else f"{length}\n{gain}".strip()
            other.set_xlabel(text, fontsize=SMALL, labelpad=2)
            if beside and line == 0:
                other.set_title("difference", fontsize=SMALL, pad=3)
            elif not beside and column == 1:
                middle = {"ha": "center", "va": "center", "fontsize": 7}
                left = axes[line + 1, 0]
                left.text(0.5, 0.5, "difference,\nmagnified", transform=left.transAxes, **middle)
    return made


def _say(axis: Any, row: Mapping[str, Any], between: str) -> None:
    """The prediction below an image: wrong ones in bold and another colour."""
    right = row["prediction"] == row["label"]
    share = f"{100 * float(row['confidence']):.0f} %" if row["prediction"] != NONE else ""
    text = f"{brief(row['prediction'])}{between}{share}".strip()
    color, weight = (RIGHT, "normal") if right else (WRONG, "bold")
    axis.set_xlabel(text, fontsize=SMALL, labelpad=2, color=color, weight=weight)


drawings.add("adversarial-panels", Drawing(_panel_data, _panel_plot, attacks=_panel_cells))
