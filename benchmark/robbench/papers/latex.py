"""Tables, claims and figures as LaTeX floats, and papers as BibTeX.

Floats need the packages array, booktabs and graphicx. What is longer than a page comes as several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from robbench.papers.claims import Judged
from robbench.papers.paper import CLAIMS, Paper
from robbench.papers.reproduction import Line
from robbench.papers.wording import (
    HEADS,
    SCALED,
    behind,
    brief,
    described,
    footnotes,
    label,
    published,
    rule,
    unit,
)

LINES = 44  # of a table that fits a page
SIGNS_OF_LINE = 85  # of \footnotesize, over the whole width
MATH = {
    "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "ε": r"\varepsilon", "ζ": r"\zeta",
    "θ": r"\theta", "κ": r"\kappa", "λ": r"\lambda", "μ": r"\mu", "σ": r"\sigma", "χ": r"\chi",
    "ω": r"\omega", "Δ": r"\Delta", "ℓ": r"\ell", "∞": r"\infty", "×": r"\times", "·": r"\cdot",
    "±": r"\pm", "°": r"^\circ", "²": "^2", "≤": r"\leq", "≥": r"\geq", "<": "<", ">": ">",
    "|": "|", "‖": r"\|", "½": r"\frac12",
}  # fmt: skip
SIGNS = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {sign: f"${command}$" for sign, command in MATH.items()}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
)
Rows = Sequence[Sequence[str]]
Group = tuple[str, Rows]  # a line over the whole width, and the rows below it


def latex_table(
    paper: Paper, name: str, lines: Sequence[Line], scale: str, notes: Sequence[str]
) -> str:
    """A table as in the terminal: a block for each printed row, a line for each of its numbers."""
    table = paper.tables[name]
    if not table.columns:  # nothing but words
        words = [("", [[str(label) for label in row.labels]]) for row in table.rows]
        widths = [0.96 / len(table.heads)] * len(table.heads)
        return _floats(paper, name, table.heads, widths, words, f"{table.title}, by", notes)
    marks: dict[str, str] = {}
    groups: list[Group] = []
    for title, group in groupby(lines, label):
        row = list(group)
        said = "; ".join(described(behind(row)))
        above = f"{title}: {said}" if said else title
        groups.append((above, [brief(line, marks) for line in row]))
    caption = (
        f"{table.title} ({unit(table)}, 95 % intervals), measured with robbench at the scale"
        f" {scale}: {SCALED[scale]}; published by"
    )
    below = [*(f"{mark} {text}" for text, mark in marks.items()), *notes]
    return _floats(paper, name, HEADS, (0.21, 0.11, 0.2, 0.18, 0.24), groups, caption, below)


def latex_claims(paper: Paper, judged: Sequence[Judged], scale: str) -> str:
    """The claims with their rules and footnotes."""
    marks, notes = footnotes(judged)
    groups: list[Group] = []
    for each, mark in zip(judged, marks, strict=True):
        said = "; ".join(described(each.grounds))
        above = f"{each.claim.where}: {each.claim.what}{mark}" + (f". {said}" if said else "")
        below = [published(each.claim), each.measured, rule(each.claim), each.holds]
        groups.append((above, [below]))
    heads = ["published", "measured", "holds if", "holds here"]
    caption = f"Claims, measured with robbench at the scale {scale}: {SCALED[scale]}; made by"
    numbered = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    return _floats(paper, CLAIMS, heads, (0.2, 0.26, 0.26, 0.24), groups, caption, numbered)


def latex_figure(paper: Paper, name: str, file: Path, scale: str) -> str:
    """A drawn figure. file: its PNG, since LaTeX does not read SVG."""
    figure = paper.figures[name]
    said = f"{figure.shows}, drawn with robbench at the scale {scale}: {SCALED[scale]}; after"
    notes = "".join(f" {escaped(note)}" for note in figure.notes)
    return "\n".join(
        [
            "\\begin{figure}",
            "\\centering",
            "\\includegraphics[width=\\linewidth,height=.8\\textheight,keepaspectratio]"
            f"{{{file.as_posix()}}}",
            f"\\caption{{{escaped(said)}~\\cite{{{paper.key}}}.{notes}}}",
            f"\\label{{fig:{paper.key}-{name}}}",
            "\\end{figure}",
        ]
    )


def escaped(text: str) -> str:
    """A text as LaTeX prints it."""
    return text.replace("<=", "≤").replace(">=", "≥").translate(SIGNS)


def _floats(
    paper: Paper,
    name: str,
    heads: Sequence[str],
    widths: Sequence[float],
    groups: Sequence[Group],
    caption: str,
    notes: Sequence[str],
) -> str:
    """widths: of the columns, as shares of a line. The notes stand below all rows; the caption is
    that of the first float."""
    pages = list(_pages([*groups, *((note, []) for note in notes)], widths))
    columns = "".join(f">{{\\raggedright\\arraybackslash}}p{{{w:.2f}\\linewidth}}" for w in widths)
    made = []
    for index, page in enumerate(pages, 1):
        first = f"tab:{paper.key}-{name}"
        said = (
            f"{escaped(caption)}~\\cite{{{paper.key}}}."
            if index == 1
            else (f"Goes on from table~\\ref{{{first}}}.")
        )
        part = f" Part {index} of {len(pages)}." if len(pages) > 1 else ""
        made += [
            "\\begin{table*}",
            "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}",
            f"\\caption{{{said}{part}}}",
            f"\\label{{{first}{f'-{index}' if index > 1 else ''}}}",
            f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}",
            "\\toprule",
            _row(heads),
            "\\midrule",
            *(line for group in page for line in _block(group, len(heads))),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table*}",
        ]
    return "\n".join(made)


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_broken, cells)) + " \\\\"


def _broken(cell: str) -> str:
    """A cell whose long names may go on in a new line."""
    return re.sub(r"(\\_|[(=:/])(?=[A-Za-z])", r"\1\\allowbreak{}", escaped(cell))


def _block(group: Group, columns: int) -> list[str]:
    title, rows = group
    whole = f"\\multicolumn{{{columns}}}{{@{{}}p{{\\linewidth}}@{{}}}}{{{escaped(title)}}} \\\\"
    return [*(["\\addlinespace", whole] if title else []), *map(_row, rows)]


def _pages(groups: Sequence[Group], widths: Sequence[float]) -> Iterator[list[Group]]:
    """The groups by page."""
    page: list[Group] = []
    left = LINES
    for group in groups:
        title, rows = group
        needed = 1 + _height([title], [1]) + sum(_height(row, widths) for row in rows)
        if page and needed > left:
            yield page
            page, left = [], LINES
        page.append(group)
        left -= needed
    yield page


def _height(cells: Sequence[str], widths: Sequence[float]) -> int:
    """Lines that a row takes."""
    signs = [SIGNS_OF_LINE * width for width in widths]
    return max(math.ceil(len(cell) / most) for cell, most in zip(cells, signs, strict=True))


def bibtex(paper: Paper) -> str:
    """The BibTeX entry of the paper, under its key."""
    fields = dict(paper.bibtex)
    kind = fields.pop("ENTRYTYPE")
    fields = {"title": f"{{{paper.title}}}", "author": " and ".join(paper.authors), **fields}
    if paper.year:
        fields["year"] = str(paper.year)
    body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"@{kind}{{{paper.key},\n{body}\n}}"
