"""What examples crafted on one network do to another: annotated matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robbench.errors import InputError
from robbench.figures import COLUMN, Drawing, Fields, Rows, Sources, canvas, drawings
from robbench.figures.styles import SMALL, TEXT
from robbench.papers.derived import measured
from robbench.papers.paper import Binding
from robbench.registry import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MEAN = "mean off the diagonal"


def _panels(arguments: Fields) -> dict[str, Fields]:
    """The panels with what is common to all of them. A panel has either `ensemble`, whose members
    attack each other, or `networks`, title -> fields; and fields of its own under `bind`."""
    return {
        title: {**panel, "bind": {**arguments["bind"], **panel.get("bind", {})}}
        for title, panel in arguments["panels"].items()
    }


def _across(panel: Fields) -> Fields:
    """The members of an ensemble attacked through the others."""
    bound = {**panel["bind"], "setting": "transfer", "defense": panel["ensemble"]}
    return {**bound, "kind": "derived", "function": "member-transfer"}


def _alone(panel: Fields) -> Fields:
    """Every member of an ensemble attacked itself; of the entropy only the cells are used."""
    bound = {"setting": "whitebox", **panel["bind"], "defense": panel["ensemble"]}
    return {**bound, "kind": "derived", "function": "entropy"}


def _pairs(panel: Fields) -> dict[tuple[str, str], Fields]:
    """(source, target) -> the fields of the cell, between networks. What is said of a network goes
    with the attack on it; an attack through another one is that on the other."""
    common = panel["bind"]
    found: dict[tuple[str, str], Fields] = {}
    for source, fields in panel["networks"].items():
        for target, attacked in panel["networks"].items():
            pair: dict[str, Any] = {"setting": "whitebox", **common, **fields}
            if source != target:
                pair |= {
                    "setting": "transfer",
                    "oracle": fields["defense"],
                    "defense": attacked["defense"],
                }
            found[source, target] = pair
    return found


def _bindings(arguments: Fields) -> list[Fields]:
    found: list[Fields] = []
    for panel in _panels(arguments).values():
        if "ensemble" in panel:
            found += [_across(panel), _alone(panel)]
        else:
            found += _pairs(panel).values()
    return found


def _data(sources: Sources, arguments: Fields) -> Rows:
    """A row per entry: accuracy in percent of the target on what was crafted on the source. The
    series is the source and x the target's place; last come the means off the diagonal."""
    rows: list[dict[str, Any]] = []
    for place, (title, panel) in enumerate(_panels(arguments).items()):
        own = _member_rows(sources, panel) if "ensemble" in panel else _network_rows(sources, panel)
        names = list(dict.fromkeys(row["target"] for row in own))
        own.sort(key=lambda row: (names.index(row["source"]), names.index(row["target"])))
        for row in own:
            series = f"{title}, crafted on {row['source']}"
            rows.append({"panel": title, "series": series, "x": names.index(row["target"]), **row})
        if "ensemble" in panel:
            measure = sources.line(_across(panel)).measure
            assert measure is not None
            mean = {"panel": title, "series": MEAN, "x": place, "source": "", "target": ""}
            rows.append({**mean, **_percent(measure)})
    return rows


def _percent(measure: Any) -> dict[str, float]:
    low, high = measure.interval
    return {
        name: round(100 * value, 3)
        for name, value in (("y", measure.value), ("low", low), ("high", high))
    }


def _member_rows(sources: Sources, panel: Fields) -> list[dict[str, Any]]:
    """The entries between the members of an ensemble, as many as it has at the scale."""
    rows = []
    for fields in (_alone(panel), _across(panel)):
        for cell in sources.reproduction.cells_of(Binding(**fields)):
            record = sources.known.records.get(cell.id)
            if record is None:
                raise InputError(f"{cell}: not measured")
            source, target = (
                f"member {1 + int(Spec.parse(spec).member or 0)}"
                for spec in (cell.source, cell.defense)
            )
            entry = {"source": source, "target": target, "setting": cell.setting.kind}
            made = {"attack": cell.attack, "threat": str(cell.threat), "n": cell.n}
            rows.append({**entry, **_percent(measured(record, "accuracy")), **made})
    return rows


def _network_rows(sources: Sources, panel: Fields) -> list[dict[str, Any]]:
    """The entries between networks."""
    rows = []
    for (source, target), fields in _pairs(panel).items():
        line = sources.line(fields)
        (cell,) = line.cells
        entry = {"source": source, "target": target, "setting": cell.setting.kind}
        made = {"attack": cell.attack, "threat": str(cell.threat), "n": cell.n}
        rows.append({**entry, **_percent(line.measure), **made})
    return rows


def _plot(rows: Rows, arguments: Fields) -> Canvas:
    """A matrix per panel: sources in lines, targets in columns, white boxes framed."""
    entries = [row for row in rows if row["series"] != MEAN]
    means = {row["panel"]: float(row["y"]) for row in rows if row["series"] == MEAN}
    panels = list(dict.fromkeys(row["panel"] for row in entries))
    of = {title: [row for row in entries if row["panel"] == title] for title in panels}
    sizes = [len({row["target"] for row in own}) for own in of.values()]
    short = all(row["target"].startswith("member ") for row in entries)
    per_line = len(panels) if short and sum(sizes) <= 10 else 1
    lines = -(-len(panels) // per_line)
    height = 1.75 if per_line > 1 else 0.33 * max(sizes) + 0.9
    made, axes = canvas(COLUMN, lines * height, nrows=lines, ncols=per_line, squeeze=False)
    for axis, (title, own) in zip(axes.flat, of.items(), strict=True):
        shade = _matrix(axis, own)
        mean = f"\ntransfer {means[title]:.1f}" if title in means else ""
        axis.set_title(f"{title}{mean}", fontsize=TEXT)
        if axis is axes.flat[0] or per_line == 1:
            axis.set_ylabel("crafted on", fontsize=TEXT)
        if per_line == 1 or axis is axes[-1, per_line // 2]:
            axis.set_xlabel("tested on (framed: white box)", fontsize=TEXT)
    bar = made.colorbar(shade, ax=list(axes.flat), pad=0.02, aspect=30 if per_line == 1 else 12)
    bar.set_label("accuracy (percent)", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return made


def _matrix(axis: Any, own: Rows) -> Any:
    """The entries of a panel in shades that also grey keeps apart, each with its number."""
    names = list(dict.fromkeys(row["target"] for row in own))
    values = [[float("nan")] * len(names) for _ in names]
    for row in own:
        values[names.index(row["source"])][names.index(row["target"])] = float(row["y"])
    shade = axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for row in own:
        line, column = names.index(row["source"]), names.index(row["target"])
        number = float(row["y"])
        color = "k" if number > 55 else "w"
        axis.text(
            column, line, f"{number:.1f}", ha="center", va="center", color=color, fontsize=SMALL
        )
        if row["setting"] != "transfer":
            _frame(axis, column, line)
    labels = [name.removeprefix("member ") for name in names]
    axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in labels], fontsize=SMALL)
    axis.set_yticks(range(len(names)), labels, fontsize=SMALL)
    return shade


def _frame(axis: Any, column: int, line: int) -> None:
    from matplotlib.patches import Rectangle

    for color, width in (("w", 2.4), ("k", 1.0)):  # one of them is seen on any shade
        corner = (column - 0.45, line - 0.45)
        axis.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=color, linewidth=width))


drawings.add("transfer-matrix", Drawing(_data, _plot, _bindings))
