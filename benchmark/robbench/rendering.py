"""A part of a paper, measured or not, in the format asked for; the files of a whole paper."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robbench import figures
from robbench.errors import InputError
from robbench.papers import pages, plain
from robbench.papers.claims import Judged
from robbench.papers.latex import latex_claims, latex_figure, latex_table
from robbench.papers.paper import CLAIMS
from robbench.papers.reproduction import Known, Line
from robbench.papers.wording import notes_of
from robbench.reproducing import Part
from robbench.tables import as_csv

KINDS = ("svg", "png", "csv")


def rendered(part: Part, known: Known, form: str) -> str:
    """The part in a format: text, markdown, latex, csv or json. CSV has the numbers of tables, or
    the claims alone; InputError for a figure that csv, json or latex cannot give."""
    if part.part in part.paper.figures:
        return _figure(part, form)
    tables, judged = part.lines(known), part.judged(known)
    if form == "csv":
        flat = _flat_claims(part, judged) if part.part == CLAIMS else _flat(part, tables)
        return as_csv(flat).rstrip("\n")
    if form == "json":
        return _json(_tree(part, tables, judged))
    made = [_table(part, form, name, *both) for name, both in _with_notes(part, tables).items()]
    if judged:
        made.append(_claims(part, form, judged))
    return "\n\n".join(made)


def _with_notes(
    part: Part, tables: Mapping[str, Sequence[Line]]
) -> dict[str, tuple[Sequence[Line], list[str]]]:
    notes = notes_of(part.paper, tables)
    return {name: (lines, notes[name]) for name, lines in tables.items()}


def _table(part: Part, form: str, name: str, lines: Sequence[Line], notes: Sequence[str]) -> str:
    table = part.paper.tables[name]
    if form == "latex":
        return latex_table(part.paper, name, lines, part.scale, notes)
    if form == "markdown":
        return pages.markdown_table(name, table, lines, notes)
    return pages.text_table(table, lines, notes)


def _claims(part: Part, form: str, judged: Sequence[Judged]) -> str:
    if form == "latex":
        return latex_claims(part.paper, judged, part.scale)
    return pages.claims_table(judged) if form == "markdown" else pages.claims_text(judged)


def _flat(part: Part, tables: Mapping[str, Sequence[Line]]) -> list[dict[str, Any]]:
    """The numbers of all tables; of a table of words that is asked for, its words."""
    return [
        values
        for name, lines in tables.items()
        if lines or part.part == name
        for values in plain.flat_table(part.paper, part.paper.tables[name], lines, part.scale)
    ]


def _flat_claims(part: Part, judged: Sequence[Judged]) -> list[dict[str, Any]]:
    return [plain.flat_claim(part.paper, part.scale, each) for each in judged]


def _tree(
    part: Part, tables: Mapping[str, Sequence[Line]], judged: Sequence[Judged]
) -> dict[str, Any]:
    """The tables with their notes, and the claims, for JSON."""
    found = {}
    for name, (lines, notes) in _with_notes(part, tables).items():
        table = part.paper.tables[name]
        rows = plain.flat_table(part.paper, table, lines, part.scale)
        found[name] = {"title": table.title, "unit": table.unit, "notes": notes, "rows": rows}
    claims = {CLAIMS: _flat_claims(part, judged)} if judged else {}
    return {"paper": part.paper.key, "scale": part.scale, "tables": found, **claims}


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False)


def _figure(part: Part, form: str) -> str:
    """The data of a figure, its float, or where it lies; or why there is none."""
    name = str(part.part)
    figure, data = part.paper.figures[name], part.figures.data_of(name)
    files = {kind: data.with_suffix(f".{kind}") for kind in KINDS}
    why = ""
    if figure.reason:
        why = f"not drawn, {figure.reason}"
    elif not all(file.exists() for file in files.values()):
        draw = f"robbench reproduce {part.paper.key}:{name} --scale {part.scale} --out {part.out}"
        why = f"not drawn yet; write {draw}"
    if form in ("text", "markdown"):
        where = [why] if why else [str(file) for file in files.values()]  # one piece to be copied
        notes = [f"note: {note}" for note in figure.notes]
        if form == "markdown":
            return "\n".join([f"{figure.shows}: {', '.join(where)}", *notes])
        return "\n".join([_wrapped(f"{figure.shows}:"), *where, *map(_wrapped, notes)])
    if why:
        raise InputError(f"{part.paper.key}:{name} is {why}")
    if form == "latex":
        return latex_figure(part.paper, name, files["png"], part.scale)
    if form == "csv":
        return data.read_text(encoding="utf-8").rstrip("\n")
    said = {"shows": figure.shows, "notes": figure.notes, "rows": figures.read(data)}
    return _json({"paper": part.paper.key, "scale": part.scale, "figures": {name: said}})


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ")


def page_files(part: Part, known: Known) -> dict[Path, str]:
    """The page and the CSVs of a whole paper at a scale, as they must be for these records."""
    stem = part.out / "papers" / f"{part.paper.key}.{part.scale}"
    tables, judged = part.lines(known), part.judged(known)
    shown, seconds = part.figures.shown(), part.figures.seconds()
    took = (part.attacked(known), part.trained(), seconds)
    text = pages.page(part.paper, part.scale, tables, judged, shown, *took)
    return {
        stem.with_name(f"{stem.name}.md"): text,
        stem.with_name(f"{stem.name}.csv"): as_csv(_flat(part, tables)),
        stem.with_name(f"{stem.name}.claims.csv"): as_csv(_flat_claims(part, judged)),
    }
