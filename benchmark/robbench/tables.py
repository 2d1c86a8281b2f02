"""Tables from records: rows, terminal-ready text, markdown and CSV. Nothing here runs anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from robbench.audit import Audited, badge, is_diagnostic
from robbench.cell import KINDS, MODEL, Cell
from robbench.defense import known_attack, resolve, shown
from robbench.errors import InputError
from robbench.metrics import Measure, Metrics, contributions, metrics, persistent
from robbench.metrics.uncertainty import precise_enough
from robbench.records import Record
from robbench.threat import NORM_NAMES, format_eps

FOOTNOTE = (
    "Each share has its 95 % interval over images in brackets: Wilson or Clopper-Pearson for"
    " deterministic defenses; for stochastic ones Wilson at the effective sample size of the"
    " per-image means, BCa bootstrap below 200 images. The interval covers the sampling of images"
    " only: an accuracy under attack is an upper bound on the true robustness. RA@10 is the share"
    " of images that survive ten tries of the same x'. *passes / image* is forward + backward"
    " passes of single networks."
)
MOST = 3  # stages of a suite that a line names
TRIES = 10  # of a persistent attacker
SHARES = (
    "accuracy", "incorrect", "abstained", "correct_or_abstained", "robust", "robust_with_detection"
)  # fmt: skip


class Row(NamedTuple):
    """One record, or a setting that equals another one, as a line of a table."""

    cell: Cell
    metrics: Metrics | None
    record: Record | None
    note: str = ""
    audited: Audited | None = None  # None where nobody looked


def rows(
    records: Iterable[Record], audits: Mapping[str, Audited] = MappingProxyType({})
) -> list[Row]:
    """Finished and failed records as rows, in the order of the tables; no diagnostics.

    audits: what the checks say of each record, by its id.
    """
    made = [
        Row(record.cell, metrics(record), record, "", audits.get(record.id))
        if record.status == "ok"
        else Row(record.cell, None, record, f"failed: {record.reason}", audits.get(record.id))
        for record in records
        if not is_diagnostic(record.cell)
    ]
    return sorted(made, key=_order)


def _order(row: Row) -> tuple[object, ...]:
    cell = row.cell
    return (
        NORM_NAMES.index(cell.threat.norm),
        cell.attack,
        cell.threat.goal,
        cell.threat.target != "none",
        str(cell.threat.target),
        cell.n,
        cell.train_seed,
        cell.seed,
        cell.defense,
        KINDS.index(cell.setting.kind),
        cell.setting.oracle or "",
        str(cell.setting.eot).rjust(4),  # numbers in their order, auto last
        cell.threat.eps or 0,
        cell.id,
    )


def percent(measure: Measure) -> str:
    return f"{100 * measure.value:.1f}" if measure.value == measure.value else "n.a."


def interval(measure: Measure) -> str:
    low, high = measure.interval
    return f"{100 * low:.1f}–{100 * high:.1f}" if low == low else ""


def cost(record: Record) -> str:
    """Passes per image with a unit, and seconds."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if record.passes >= size:
            return f"{record.passes / size:.1f}{unit} {record.cost['seconds']:.0f}s"
    return f"{record.passes:.0f} {record.cost['seconds']:.0f}s"


def setting_text(cell: Cell, deterministic: bool) -> str:
    """The setting as tables print it; a deterministic defense's white box is its adaptive one."""
    setting = cell.setting
    text: str = setting.kind
    if setting.oracle:
        text += f" from {shown(setting.oracle, cell.dataset)}"
    if setting.eot != 1:
        text += f" EOT {setting.eot}"
    if setting.queries:
        text += f" {setting.queries} queries"
    if setting.kind == "whitebox" and deterministic:
        text += " = adaptive"
    return text


def deterministic(row: Row) -> bool:
    """Every pass answers alike, and no loss of its own makes another attack the adaptive one."""
    return row.record is not None and row.record.draws == 1 and not _own_loss(row.cell.defense)


def _own_loss(defense: str) -> bool:
    try:
        return known_attack(resolve(defense))
    except InputError:  # a plugin that is not installed; a model of the caller may have one
        return defense.startswith(MODEL)


def tried(record: Record) -> Measure:
    """RA@10; one answer of a deterministic defense stands for ten."""
    return persistent(record, min(TRIES, record.draws))


def groups(made: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows under a heading each: attack, norm, n, and seeds that are not 0."""

    def heading(row: Row) -> str:
        cell = row.cell
        target = "" if cell.threat.target == "none" else f", target {cell.threat.target}"
        target += "" if cell.threat.goal == "error" else f", goal {cell.threat.goal}"
        seeds = f", train seed {cell.train_seed}" if cell.train_seed else ""
        seeds += f", seed {cell.seed}" if cell.seed else ""
        return f"{cell.attack}, {cell.threat.norm}{target}, n = {cell.n}{seeds}"

    return [(title, list(group)) for title, group in groupby(made, heading)]


def left_out(superseded: int) -> str:
    """The line below a table that leaves out records of older versions."""
    return (
        f"Left out: {superseded} {'record' if superseded == 1 else 'records'} of older versions of"
        " a defense or an attack."
    )


def with_interval(measure: Measure) -> str:
    """`51.3 (47.1–55.5)`, in per cent."""
    return f"{percent(measure)} ({interval(measure)})"


def group_table(group: Sequence[Row], style: str = "github") -> str:
    """The rows of a group, every share with its interval."""
    lines = []
    for row in group:
        assert row.metrics is not None and row.record is not None
        lines.append(
            [
                f"`{shown(row.cell.defense, row.cell.dataset)}`",
                setting_text(row.cell, deterministic(row)),
                format_eps(row.cell.threat.eps),
                *(with_interval(getattr(row.metrics, name)) for name in SHARES),
                with_interval(tried(row.record)),
                f"{row.record.passes:.0f}",
                *([badge(row.audited)] if row.audited else []),
            ]
        )
    headers = [
        "defense",
        "setting",
        "ε",
        "accuracy %",
        "incorrect %",
        "abstained %",
        "correct + abstained %",
        "robust %",
        "with detection %",
        f"RA@{TRIES} %",
        "passes / image",
        *(["badge"] if any(row.audited for row in group) else []),
    ]
    return tabulated(lines, headers, style)


def broken_by(record: Record) -> str:
    """The stages of a suite that broke most, in one line; empty for any other attack."""
    parts = [part for part in contributions(record) if part.broken]
    parts.sort(key=lambda part: -part.broken)
    said = [f"{part.stage} {part.broken}" for part in parts[:MOST]]
    more = sum(part.broken for part in parts[MOST:])
    return ", ".join([*said, f"others {more}"] if more else said)


def remarks(record: Record) -> list[str]:
    """What a reader of a number should know about how it came about, a line each."""
    eps = format_eps(record.cell.threat.eps)
    said = []
    if stages := broken_by(record):
        said.append(f"at {eps} broken by {stages}")
    if chosen := record.provenance.get("eot", {}).get("chosen"):
        said.append(f"at {eps} EOT auto took {chosen} draw{'s' * (chosen > 1)}")
    unchanged = record.trace.get("unchanged")
    right = record.clean_ok is not None and record.clean_ok > 0
    if unchanged is not None and np.any(right) and bool(unchanged[right].all()):
        said.append(f"at {eps} the attack changed no image that is right when clean")
    return said


def verdicts(group: Sequence[Row], precision: float | None = None) -> list[str]:
    """What the checks say of these rows, rows of one badge together, and why, in the words of the
    first flag; nothing of rows that nobody looked at.

    precision: half the interval that is wanted; what has a longer one is not called sound.
    """
    by_word: dict[str, list[Row]] = {}
    for row in group:
        if row.audited:
            by_word.setdefault(_word(row, precision), []).append(row)
    said = []
    for word, rows_of in by_word.items():
        budgets = ", ".join(format_eps(row.cell.threat.eps) for row in rows_of)
        least = min(len(row.audited.assessed) for row in rows_of if row.audited)
        clear = f"not audited (no flag by {least} checks; see 'robbench audit')"
        counted = f"{word} by {least} checks" if word == "sound" else word
        counted = counted.replace("not audited", clear)
        said.append(f"at {budgets} {counted}" if len(by_word) > 1 else counted)
    return said


def _word(row: Row, precision: float | None) -> str:
    """The badge and what is behind it."""
    assert row.audited is not None
    word = badge(row.audited)
    flag = next(iter(row.audited.flags), None)
    if flag and flag.verdict in ("INVALID", "OVERESTIMATE"):
        return f"{word} ({flag.line})"
    if needed := _needed(row, precision):
        few = f"too few images to be sure: n = {needed} for ± {100 * (precision or 0):g} %"
        return few if word == "sound" else f"{word}; {few}"
    return word


def _needed(row: Row, precision: float | None) -> int | None:
    """Images that the precision takes; None where there are enough."""
    if precision is None or row.record is None or row.metrics is None:
        return None
    return precise_enough(row.record, precision)


def tabulated(
    lines: Sequence[Sequence[object]], headers: Sequence[str], style: str = "github"
) -> str:
    """Lines as a table; a bar or a line break inside a cell would end it."""
    if style == "github":
        lines = [
            [" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines
        ]
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True)


def text(made: Sequence[Row]) -> str:
    """The tables as plain text, for a Python prompt."""
    finished = [row for row in made if row.metrics is not None]
    parts = []
    for title, group in groups(finished):
        said = [
            f"{shown(row.cell.defense, row.cell.dataset)}: {remark}"
            for row in group
            for remark in (remarks(row.record) if row.record else ())
        ]
        parts.append("\n".join([title, group_table(group, "simple"), *said]))
    parts += [f"failed: {row.cell}: {row.note}" for row in made if row.metrics is None]
    return "\n\n".join(parts)


def flat(row: Row, precision: float | None = None) -> dict[str, object]:
    """A row as plain values, for CSV and JSON; with the images that a precision takes."""
    cell = row.cell
    values: dict[str, object] = {
        "dataset": cell.dataset,
        "n": cell.n,
        "defense": cell.defense,
        "attack": cell.attack,
        "norm": cell.threat.norm,
        "eps": format_eps(cell.threat.eps),
        "target": str(cell.threat.target),
        "goal": cell.threat.goal,
        "setting": cell.setting.kind,
        "oracle": cell.setting.oracle or "",
        "eot": cell.setting.eot,
        "max_queries": cell.setting.queries or "",
        "train_seed": cell.train_seed,
        "seed": cell.seed,
        "id": cell.id,
        "status": "ok" if row.metrics else "failed",
        "reason": "" if row.metrics else row.note,
        "badge": badge(row.audited) if row.audited else "",
        "flags": " ".join(dict.fromkeys(flag.id for flag in row.audited.flags))
        if row.audited
        else "",
    }
    if row.metrics and row.record:
        names = (*SHARES, "conditional", "clean", "clean_abstained")
        measures: dict[str, Measure] = {name: getattr(row.metrics, name) for name in names}
        measures[f"ra_at_{TRIES}"] = tried(row.record)
        for name, measure in measures.items():
            values[name] = _rounded(measure.value)
            values[f"{name}_low"] = _rounded(measure.interval.low)
            values[f"{name}_high"] = _rounded(measure.interval.high)
        if precision is not None:
            values["n_needed"] = _needed(row, precision) or cell.n
            if values["badge"] == "sound" and values["n_needed"] != cell.n:  # no number is sure
                values["badge"] = "too few images"
        values["draw_error"] = _rounded(row.metrics.draw_error)
        values["draws"] = row.record.draws
        values |= {key: row.record.cost[key] for key in ("forwards", "backwards", "queries")}
    return values


def _rounded(value: float) -> float | None:
    """Six digits; None for nan, which JSON has no word for."""
    return round(value, 6) if value == value else None


def comma_separated(made: Sequence[Row]) -> str:
    """All rows as CSV, one header line."""
    return as_csv([flat(row) for row in made])


def as_csv(lines: Sequence[Mapping[str, object]]) -> str:
    """Plain values as CSV, one header line with all keys in the order of their first use."""
    keys = list(dict.fromkeys(key for values in lines for key in values))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def page_name(dataset: str) -> str:
    """The file name of a dataset's pages, without the ending."""
    return "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in dataset)
