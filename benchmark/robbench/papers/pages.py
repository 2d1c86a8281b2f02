"""Reproduced tables as text, markdown, LaTeX, CSV and JSON; a page per paper and scale."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from tabulate import tabulate

from robbench.audit import badge
from robbench.defense import shown
from robbench.papers.claims import Judged
from robbench.papers.derived import measured
from robbench.papers.paper import Figure, Paper, Table
from robbench.papers.reproduction import (
    SHARES,
    Line,
    made_of,
    shown_strongest,
    shown_value,
    verdict,
)
from robbench.tables import tabulated
from robbench.threat import format_eps

SCALED = {
    "smoke": "digits, tiny networks, one epoch: shows that everything runs, and nothing else",
    "cpu": "small networks on subsets, for hours of a CPU: numbers are those of other networks and"
    " other images than the paper's, which every row names",
    "paper": "the paper's own data sets, networks and epochs",
}
GREEK = (("ε", "$\\varepsilon$"), ("σ", "$\\sigma$"), ("ω", "$\\omega$"), ("λ", "$\\lambda$"))
HEADS = ["", "published", "measured (95 %)", "strongest (95 %)", "verdict"]
MADE = ["dataset", "networks", "n", "epochs"]


def stated(line: Line) -> list[str]:
    """Dataset, networks, n and epochs of a number; of what is derived, of its first cell."""
    if not line.cells:
        return ["", "", "", ""]
    cell = line.cells[0]
    networks, epochs = made_of(cell)
    return [cell.dataset, networks, str(cell.n), epochs]


def _parts(line: Line) -> list[str]:
    printed = "" if line.number.printed is None else str(line.number.printed)
    value = shown_value(line.measure, line.unit) if line.measure else ""
    return [printed, value, shown_strongest(line), verdict(line)]


def _label(line: Line) -> str:
    return ", ".join(str(label) for label in line.number.labels if label is not None)


def text_table(table: Table, lines: Sequence[Line]) -> str:
    """A table for the terminal: a block for each printed row, a line for each of its numbers."""
    parts = [textwrap.fill(f"{table.title} ({_unit(table)})", 80)]
    if not table.columns:
        parts += [textwrap.fill(" · ".join(map(str, row.labels)), 80) for row in table.rows]
    for label, group in groupby(lines, _label):
        row = list(group)
        said = list(dict.fromkeys(" · ".join(_described(line)) for line in row if line.cells))
        parts += [textwrap.fill(label, 80), *(_indented(each) for each in said)]
        body = [[f"  {line.number.column}", *_parts(line)] for line in row]
        widths = [None, None, None, 18, 14]
        parts.append(tabulate(body, HEADS, "plain", disable_numparse=True, maxcolwidths=widths))
    notes = (textwrap.fill(f"note: {note}", 80, subsequent_indent="  ") for note in table.notes)
    return "\n".join([*parts, *notes])


def _indented(text: str) -> str:
    return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="    ")


def _unit(table: Table) -> str:
    return f"in {table.unit}" if table.unit else "without a unit"


def _described(line: Line) -> list[str]:
    dataset, networks, n, epochs = stated(line)
    return [dataset, networks, f"n = {n}", f"{epochs} epochs" if epochs else "not trained"]


def markdown_table(table: Table, lines: Sequence[Line]) -> str:
    """A table for the page: a line for each number, with what it was measured on."""
    if not table.columns:  # nothing but words
        return tabulated([list(row.labels) for row in table.rows], list(table.heads))
    body = [
        [_label(line), line.number.column, *_parts(line), *stated(line), _attacked(line)]
        for line in lines
    ]
    heads = [", ".join(table.heads), "column", *HEADS[1:], *MADE, "attack"]
    return tabulated(body, heads)


def _attacked(line: Line) -> str:
    if not line.cells:
        return ""
    cell = line.cells[0]
    setting = cell.setting.model_copy(update={"suite": ""})
    if setting.oracle:
        setting = setting.model_copy(update={"oracle": shown(setting.oracle, cell.dataset)})
    return f"`{cell.attack}`, {cell.threat}, {setting}"


def latex_table(paper: Paper, name: str, lines: Sequence[Line], scale: str) -> str:
    """The table as a LaTeX float in the paper's own shape: under every column what was published
    and what was measured. Needs the package booktabs."""
    table = paper.tables[name]
    columns = list(table.columns)
    heads = [*table.heads]
    for column in columns:
        heads += [f"{column} (paper)", f"{column} (here)"]
    heads += ["dataset", "networks", "n", "epochs"]
    body = []
    for label, group in groupby(lines, lambda line: line.number.labels):
        row = list(group)
        cells = ["" if part is None else str(part) for part in label]
        for line in row:
            cells += _parts(line)[:2]
        cells += [", ".join(dict.fromkeys(filter(None, part))) for part in
                  zip(*(stated(line) for line in row), strict=True)]  # fmt: skip
        body.append(cells)
    grid = tabulate(body, heads, "latex_booktabs", disable_numparse=True)
    return _float(
        paper,
        name,
        grid,
        f"{table.title} ({_unit(table)}); published by {paper.authors[0]} et al. and"
        f" measured with robbench at the scale {scale}: {SCALED[scale]}",
    )


def bibtex(paper: Paper) -> str:
    """The BibTeX entry of the paper, under its key."""
    fields = dict(paper.bibtex)
    kind = fields.pop("ENTRYTYPE")
    fields = {"title": f"{{{paper.title}}}", "author": " and ".join(paper.authors), **fields}
    if paper.year:
        fields["year"] = str(paper.year)
    body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"@{kind}{{{paper.key},\n{body}\n}}"


def flat(paper: Paper, scale: str, line: Line) -> dict[str, Any]:
    """A number as plain values, for CSV and JSON."""
    dataset, networks, n, epochs = stated(line)
    cell = line.cells[0] if line.cells else None
    measure, strongest = line.measure, line.strongest
    return {
        "paper": paper.key,
        "number": line.number.path,
        "kind": line.number.binding.kind,
        "published": line.number.printed,
        "unit": line.unit or "",
        "scale": scale,
        "measured": _rounded(measure.value, line.unit) if measure else None,
        "low": _rounded(measure.interval.low, line.unit) if measure else None,
        "high": _rounded(measure.interval.high, line.unit) if measure else None,
        "strongest": _rounded(measured(strongest, "accuracy").value, line.unit)
        if strongest
        else None,
        "strongest_attack": strongest.cell.attack if strongest else "",
        "badge": badge(line.audited) if line.audited and measure else "",
        "reason": line.why,
        "dataset": dataset,
        "networks": networks,
        "n": n,
        "epochs": epochs,
        "defense": cell.defense if cell else "",
        "attack": cell.attack if cell else "",
        "norm": cell.threat.norm if cell else "",
        "eps": format_eps(cell.threat.eps) if cell else "",
        "setting": str(cell.setting) if cell else "",
        "cells": " ".join(each.id[:16] for each in line.cells),
        "seconds": round(line.seconds, 1),
    }


def _rounded(value: float, unit: str | None) -> float | None:
    return None if value != value else round(value * (100 if unit in SHARES else 1), 4)


def claims_table(judged: Sequence[Judged]) -> str:
    """Each claim with its measured counterpart and whether it holds at this scale."""
    body = [
        [each.claim.where, each.claim.what, _printed(each), each.measured, each.holds]
        for each in judged
    ]
    return tabulated(body, ["where", "claim", "published", "measured", "holds here"])


def claims_text(judged: Sequence[Judged]) -> str:
    """The same for the terminal, a paragraph for each claim."""
    return "\n".join(
        textwrap.fill(_said(each), 80, initial_indent="- ", subsequent_indent="  ")
        for each in judged
    )


def _said(each: Judged) -> str:
    published = f", published {_printed(each)}" if _printed(each) else ""
    measured = f", measured {each.measured}" if each.measured else ""
    return f"{each.claim.where}: {each.claim.what}{published}{measured}: {each.holds}"


def flat_claim(paper: Paper, scale: str, each: Judged) -> dict[str, Any]:
    """A claim as plain values, for CSV and JSON."""
    return {
        "paper": paper.key,
        "where": each.claim.where,
        "claim": each.claim.what,
        "published": each.claim.value,
        "unit": each.claim.unit or "",
        "scale": scale,
        "measured": each.measured,
        "holds": each.holds,
    }


def latex_claims(paper: Paper, judged: Sequence[Judged], scale: str) -> str:
    """The claims as a LaTeX float."""
    body = [
        [each.claim.what, _printed(each), each.measured, each.holds]
        for each in judged
        if not each.claim.text
    ]
    heads = ["claim", "published", "measured", "holds here"]
    caption = f"What the text claims, measured with robbench at the scale {scale}"
    return _float(paper, "claims", tabulate(body, heads, "latex_booktabs", disable_numparse=True),
                  f"{caption}: {SCALED[scale]}")  # fmt: skip


def _float(paper: Paper, name: str, grid: str, caption: str) -> str:
    for sign, command in (("–", "--"), ("×", "$\\times$"), *GREEK):
        grid = grid.replace(sign, command)
    for sign in "&%$#_{}":
        caption = caption.replace(sign, f"\\{sign}")
    for sign, command in GREEK:
        caption = caption.replace(sign, command)
    return "\n".join(
        [
            "\\begin{table}",
            f"\\caption{{{caption}~\\cite{{{paper.key}}}.}}",
            f"\\label{{tab:{paper.key}-{name}}}",
            grid,
            "\\end{table}",
        ]
    )


def _printed(each: Judged) -> str:
    value, unit = each.claim.value, each.claim.unit
    if value is None:
        return ""
    return f"{value} {unit or ''}".strip()


def summary(judged: Sequence[Judged]) -> str:
    """How many claims hold, in one line."""
    counted = {word: sum(each.holds == word for each in judged) for word in ("yes", "no")}
    open_ones = sum(each.holds in ("undecided", "not defined here") for each in judged)
    left = len(judged) - sum(counted.values()) - open_ones
    return (
        f"{len(judged)} claims: {counted['yes']} hold at this scale, {counted['no']} do not,"
        f" {open_ones} are not decided by so few images, {left} have no measured counterpart."
    )


def page(
    paper: Paper,
    scale: str,
    tables: Mapping[str, Sequence[Line]],
    judged: Sequence[Judged],
    figures: Mapping[str, Figure],
    trained: float,
) -> str:
    """The page of a paper at one scale, as markdown. trained: seconds that its trainings took."""
    taken = {line.number.path: line for lines in tables.values() for line in lines}
    records = {
        record.id: record.cost.get("seconds", 0.0)
        for line in taken.values()
        for record in (*line.records, *([line.strongest] if line.strongest else []))
    }
    missing = sum(line.measure is None and bool(line.cells) for line in taken.values())
    parts = [
        f"# {paper.title}",
        f"{', '.join(paper.authors)}. {paper.venue}. Scale `{scale}`: {SCALED[scale]}.",
        f"{len(taken)} published numbers in {len(tables)} tables; {missing} are not measured yet."
        f" Attacks took {_hours(sum(records.values()))} of one core, trainings {_hours(trained)}.",
    ]
    for name, lines in tables.items():
        table = paper.tables[name]
        parts += [f"## {name}: {table.title}", f"{_unit(table).capitalize()}."]
        if table.notes:
            parts.append("\n".join(f"- {note}" for note in table.notes))
        parts.append(markdown_table(table, lines))
    if judged:
        parts += ["## Claims of the text", summary(judged), claims_table(judged)]
    if figures:
        parts += ["## Figures", *_figures(paper, scale, figures)]
    return "\n\n".join(parts) + "\n"


def _figures(paper: Paper, scale: str, figures: Mapping[str, Figure]) -> Iterator[str]:
    for name, figure in figures.items():
        if figure.reason:
            yield f"**{name}**: {figure.shows}. Not drawn: {figure.reason}."
            continue
        file = f"{paper.key}/{name}.{scale}"
        yield f"**{name}**: {figure.shows}. [Data]({file}.csv), [SVG]({file}.svg)."
        yield f"![{figure.shows}]({file}.png)"
        yield "\n".join(f"- {note}" for note in figure.notes)


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
