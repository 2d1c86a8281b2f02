"""Reproduced tables and claims as text and markdown; a page per paper and scale."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from tabulate import tabulate

from robbench.defense import shown
from robbench.papers.claims import Judged
from robbench.papers.paper import Figure, Paper, Table
from robbench.papers.reproduction import Line
from robbench.papers.wording import (
    HEADS,
    MADE,
    SCALED,
    behind,
    brief,
    described,
    footnotes,
    label,
    notes_of,
    published,
    rule,
    stated,
    summary,
    unit,
    values,
)
from robbench.tables import tabulated

SHOWN = ["published", "measured (95 %)", "strongest (95 %)", "verdict"]
WIDTHS = [14, 9, 17, 19, 13]  # of a table for 80 columns: no badge is broken inside a word


def text_table(table: Table, lines: Sequence[Line], notes: Sequence[str]) -> str:
    """A table for 80 columns: a block for each printed row, a line for each of its numbers. Attacks
    and reasons stand below it, under their marks."""
    marks: dict[str, str] = {}
    parts = [textwrap.fill(f"{table.title} ({unit(table)}, 95 % intervals)", 80)]
    if not table.columns:
        parts += [textwrap.fill(" · ".join(map(str, row.labels)), 80) for row in table.rows]
    rows = [brief(line, marks) for line in lines]
    widths = _widths([HEADS, *rows])
    for title, group in groupby(zip(lines, rows, strict=True), lambda pair: label(pair[0])):
        row, body = zip(*group, strict=True)
        parts += [textwrap.fill(title, 80), *(_indented(each) for each in described(behind(row)))]
        parts.append(tabulate(body, HEADS, "plain", disable_numparse=True, maxcolwidths=widths))
    parts += [_note(text, mark) for text, mark in marks.items()]
    return "\n".join([*parts, *map(_note, notes)])


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Of the columns: what the others leave is the first one's."""
    longest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    others = [min(pair) for pair in zip(WIDTHS, longest, strict=True)][1:]
    return [80 - sum(width + 2 for width in others), *others]


def _indented(text: str) -> str:
    return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="    ")


def _note(text: str, mark: str = "note:") -> str:
    return textwrap.fill(f"{mark} {text}", 80, subsequent_indent="  ")


def markdown_table(name: str, table: Table, lines: Sequence[Line], notes: Sequence[str]) -> str:
    """A table under its heading: a line for each number, with what it was measured on, and below
    them the footnotes."""
    if table.columns:
        body = [
            [label(line), line.number.column, *values(line), *stated(line.behind), _attacked(line)]
            for line in lines
        ]
        heads = [", ".join(table.heads), "column", *SHOWN, *MADE, "attack"]
        grid = tabulated(body, heads)
    else:  # nothing but words
        grid = tabulated([list(row.labels) for row in table.rows], list(table.heads))
    taken = f" Attacks took {_attacks(lines)} of one core." if table.columns else ""
    parts = [f"## {name}: {table.title}", f"{_capital(unit(table))}.{taken}", grid]
    return "\n\n".join([*parts, *_listed(notes)])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(notes: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {note}" for note in notes)] if notes else []


def _attacked(line: Line) -> str:
    if not line.cells or line.number.binding.measure.startswith("clean"):
        return ""
    cell = line.cells[0]
    setting = cell.setting.model_copy(update={"suite": ""})
    if setting.oracle:
        setting = setting.model_copy(update={"oracle": shown(setting.oracle, cell.dataset)})
    return f"`{cell.attack}`, {cell.threat}, {setting}"


def claims_table(judged: Sequence[Judged]) -> str:
    """The claims under their heading: each with its measured counterpart, the rule it is held
    against and whether it holds at this scale, and below them the numbered footnotes."""
    marks, notes = footnotes(judged)
    body = [
        [
            each.claim.where,
            each.claim.what + mark,
            published(each.claim),
            each.measured,
            rule(each.claim),
            each.holds,
            *stated(each.grounds),
        ]
        for each, mark in zip(judged, marks, strict=True)
    ]
    heads = ["where", "claim", "published", "measured", "holds if", "holds here", *MADE]
    parts = ["## Claims of the text", summary(judged), tabulated(body, heads)]
    return "\n\n".join([*parts, *_listed([f"[{k}] {note}" for k, note in enumerate(notes, 1)])])


def claims_text(judged: Sequence[Judged]) -> str:
    """The same for the terminal, a paragraph for each claim."""
    parts = [f"{textwrap.fill(summary(judged), 80)}\n"]
    for each in judged:
        parts.append(textwrap.fill(_said(each), 80, initial_indent="- ", subsequent_indent="  "))
        parts += map(_indented, described(each.grounds))
        parts += [_indented(f"note: {each.claim.note}")] if each.claim.note else []
    return "\n".join(parts)


def _said(each: Judged) -> str:
    printed = f", published {published(each.claim)}" if published(each.claim) else ""
    measured = f", measured {each.measured}" if each.measured else ""
    condition = f"; holds if {rule(each.claim)}" if rule(each.claim) else ""
    return f"{each.claim.where}: {each.claim.what}{printed}{measured}{condition}: {each.holds}"


def page(
    paper: Paper,
    scale: str,
    tables: Mapping[str, Sequence[Line]],
    judged: Sequence[Judged],
    figures: Mapping[str, Figure],
    attacked: float,
    trained: float,
    took: Mapping[str, float],
) -> str:
    """The page of a paper at one scale, as markdown. attacked, trained: seconds of all its attacks
    and trainings; took: of the data of a figure that was computed."""
    taken = {line.number.path: line for lines in tables.values() for line in lines}
    missing = sum(line.measure is None and bool(line.cells) for line in taken.values())
    parts = [
        f"# {paper.title}",
        f"{', '.join(paper.authors)}. {paper.venue}. Scale `{scale}`: {SCALED[scale]}.",
        f"{len(taken)} published numbers in {len(tables)} tables; {missing} are not measured yet."
        f" All attacks took {_hours(attacked)} of one core, trainings {_hours(trained)}.",
    ]
    notes = notes_of(paper, tables)
    for name, lines in tables.items():
        parts.append(markdown_table(name, paper.tables[name], lines, notes[name]))
    if judged:
        parts.append(claims_table(judged))
    if figures:
        parts += ["## Figures", *_figures(paper, scale, figures, took)]
    return "\n\n".join(parts) + "\n"


def _figures(
    paper: Paper, scale: str, figures: Mapping[str, Figure], took: Mapping[str, float]
) -> Iterator[str]:
    for name, figure in figures.items():
        if figure.reason:
            yield f"**{name}**: {figure.shows}. Not drawn: {figure.reason}."
            continue
        file = f"{paper.key}/{name}.{scale}"
        taken = f", computed in {_hours(took[name])}" if took.get(name, 0) >= 1 else ""
        yield f"**{name}**: {figure.shows}. [Data]({file}.csv){taken}, [SVG]({file}.svg)."
        yield f"![{figure.shows}]({file}.png)"
        yield "\n".join(f"- {note}" for note in figure.notes)


def _attacks(lines: Sequence[Line]) -> str:
    """How long the attacks behind these numbers took, each once."""
    seconds = {
        record.id: record.cost["seconds"]
        for line in lines
        for record in (*line.records, *([line.strongest] if line.strongest else []))
    }
    return _hours(sum(seconds.values()))


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
