"""Tables from records: rows, terminal-ready text, markdown and CSV. Nothing here runs anything."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from robbench.defense import known_attack, resolve, shown
from robbench.errors import InputError
from robbench.grid import MODEL, Cell
from robbench.metrics import Measure, Metrics, contributions, metrics, persistent
from robbench.records import Record, newest, without_versions
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
SHARES = ("accuracy", "incorrect", "abstained", "correct_or_abstained", "robust")


class Row(NamedTuple):
    """One record, or a setting that equals another one, as a line of a table."""

    cell: Cell
    metrics: Metrics | None
    record: Record | None
    note: str = ""


def rows(records: Iterable[Record]) -> list[Row]:
    """Finished and failed records as rows, in the order of the tables."""
    made = [
        Row(record.cell, metrics(record), record)
        if record.status == "ok"
        else Row(record.cell, None, record, f"failed: {record.reason}")
        for record in records
    ]
    return sorted(made, key=_order)


def _order(row: Row) -> tuple[object, ...]:
    cell = row.cell
    kinds = ("whitebox", "adaptive", "transfer", "blackbox")
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
        kinds.index(cell.setting.kind),
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
    passes = record.cost["forwards"] + record.cost["backwards"]
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if passes >= size:
            return f"{passes / size:.1f}{unit} {record.cost['seconds']:.0f}s"
    return f"{passes:.0f} {record.cost['seconds']:.0f}s"


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


def markdown(dataset: str, made: Sequence[Row], superseded: int = 0) -> str:
    """The leaderboard page of a dataset; a pure function of the records.

    superseded: how many records of older versions are left out.
    """
    lines = [f"# {dataset}", ""]
    finished = [row for row in made if row.metrics is not None]
    lines += ["## Clean", "", _clean_table(finished), ""]
    for title, group in groups(finished):
        lines += [f"## {title}", "", _group_table(group), ""]
        if crossed := _matrix(group):
            lines += ["Accuracy % by oracle:", "", crossed, ""]
        said = [
            f"- `{shown(row.cell.defense, row.cell.dataset)}`, {setting_text(row.cell, False)}:"
            f" {remark}"
            for row in group
            for remark in (remarks(row.record) if row.record else ())
            if "broken by" not in remark
        ]
        if said:
            lines += [*said, ""]
        if stages := _stages_table(group):
            lines += ["What each stage of the suites did:", "", stages, ""]
    if superseded:
        lines += [left_out(superseded), ""]
    lines += [FOOTNOTE, "", "Written by `robbench leaderboard` from records/; never edited.", ""]
    return "\n".join(lines)


def left_out(superseded: int) -> str:
    """The line below a table that leaves out records of older versions."""
    return (
        f"Left out: {superseded} {'record' if superseded == 1 else 'records'} of older versions of"
        " a defense or an attack."
    )


def _cells(measure: Measure) -> str:
    return f"{percent(measure)} ({interval(measure)})"


def _clean_table(made: Sequence[Row]) -> str:
    """One line per defense, n and seed: every record carries the clean outcome."""
    seen: dict[tuple[object, ...], list[object]] = {}
    for row in made:
        assert row.metrics is not None
        cell = row.cell
        key = (cell.defense, cell.n, cell.train_seed, cell.seed)
        seen.setdefault(
            key,
            [
                f"`{shown(cell.defense, cell.dataset)}`",
                _cells(row.metrics.clean),
                _cells(row.metrics.clean_abstained),
                cell.n,
                cell.train_seed,
            ],
        )
    ordered = [seen[key] for key in sorted(seen, key=str)]
    headers = ["defense", "clean accuracy %", "abstained %", "n", "train seed"]
    return _tabulated(ordered, headers)


def _group_table(group: Sequence[Row], style: str = "github") -> str:
    lines = []
    for row in group:
        assert row.metrics is not None and row.record is not None
        lines.append(
            [
                f"`{shown(row.cell.defense, row.cell.dataset)}`",
                setting_text(row.cell, deterministic(row)),
                format_eps(row.cell.threat.eps),
                *(_cells(getattr(row.metrics, name)) for name in SHARES),
                _cells(tried(row.record)),
                cost_passes(row.record),
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
        f"RA@{TRIES} %",
        "passes / image",
    ]
    return _tabulated(lines, headers, style)


def _matrix(group: Sequence[Row], style: str = "github") -> str:
    """Targets by oracles, ε by ε, where there are at least two of each."""
    made = [row for row in group if row.cell.setting.oracle]
    lines, found = [], False
    oracles = list(dict.fromkeys(_oracle(row) for row in made))
    for eps in dict.fromkeys(row.cell.threat.eps for row in made):
        at = [row for row in made if row.cell.threat.eps == eps]
        targets = dict.fromkeys(shown(row.cell.defense, row.cell.dataset) for row in at)
        found |= len(targets) > 1 and len({_oracle(row) for row in at}) > 1
        for target in targets:
            own = {
                _oracle(row): percent(row.metrics.accuracy)
                for row in at
                if row.metrics and shown(row.cell.defense, row.cell.dataset) == target
            }
            shares = [own.get(oracle, "") for oracle in oracles]
            lines.append([f"`{target}`", format_eps(eps), *shares])
    headers = ["target", "ε", *(f"from `{oracle}`" for oracle in oracles)]
    return _tabulated(lines, headers, style) if found else ""


def _oracle(row: Row) -> str:
    return shown(str(row.cell.setting.oracle), row.cell.dataset)


def _stages_table(group: Sequence[Row]) -> str:
    """The stages of suites that had anything to do, an ε after the other."""
    lines = []
    for row in group:
        assert row.record is not None
        for part in contributions(row.record):
            if part.attacked:
                lines.append(
                    [
                        f"`{shown(row.cell.defense, row.cell.dataset)}`",
                        format_eps(row.cell.threat.eps),
                        f"`{part.stage}`",
                        part.attacked,
                        part.broken,
                        part.worst,
                        f"{part.passes:.0f}",
                    ]
                )
    headers = [
        "defense", "ε", "stage", "attacked", "broken", "worst point", "passes / image"
    ]  # fmt: skip
    return _tabulated(lines, headers) if lines else ""


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


def _tabulated(
    lines: Sequence[Sequence[object]], headers: Sequence[str], style: str = "github"
) -> str:
    """A bar or a line break inside a cell would end it."""
    if style == "github":
        lines = [
            [" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines
        ]
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True)


def cost_passes(record: Record) -> str:
    return f"{record.cost['forwards'] + record.cost['backwards']:.0f}"


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
        parts.append("\n".join([title, _group_table(group, "simple"), *said]))
    parts += [f"failed: {row.cell}: {row.note}" for row in made if row.metrics is None]
    return "\n\n".join(parts)


def flat(row: Row) -> dict[str, object]:
    """A row as plain values, for CSV and JSON."""
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
    }
    if row.metrics and row.record:
        names = (*SHARES, "conditional", "clean", "clean_abstained")
        measures: dict[str, Measure] = {name: getattr(row.metrics, name) for name in names}
        measures[f"ra_at_{TRIES}"] = tried(row.record)
        for name, measure in measures.items():
            values[name] = _rounded(measure.value)
            values[f"{name}_low"] = _rounded(measure.interval.low)
            values[f"{name}_high"] = _rounded(measure.interval.high)
        values["draw_error"] = _rounded(row.metrics.draw_error)
        values["draws"] = row.record.draws
        values |= {key: row.record.cost[key] for key in ("forwards", "backwards", "queries")}
    return values


def _rounded(value: float) -> float | None:
    """Six digits; None for nan, which JSON has no word for."""
    return round(value, 6) if value == value else None


def comma_separated(made: Sequence[Row]) -> str:
    """All rows as CSV, one header line."""
    flattened = [flat(row) for row in made]
    keys = list(dict.fromkeys(key for values in flattened for key in values))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flattened)
    return text.getvalue()


def page_name(dataset: str) -> str:
    """The file name of a dataset's pages, without the ending."""
    return "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in dataset)


def pages(dataset: str, records: Sequence[Record]) -> dict[str, str]:
    """File name -> text of the generated pages of a dataset: of every cell, whatever its versions,
    the newest record, if it is a finished one."""
    finished = [record for record in records if record.status == "ok"]
    current = [record for record in newest(records, without_versions) if record.status == "ok"]
    made, name = rows(current), page_name(dataset)
    return {
        f"{name}.md": markdown(dataset, made, len(finished) - len(current)),
        f"{name}.csv": comma_separated(made),
    }
