"""Paired comparison of two defenses from their records: same images, same attack, same ε."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from robbench import statistics
from robbench.defense import canonical, with_preset
from robbench.errors import InputError
from robbench.grid import KINDS, Cell
from robbench.metrics import outcomes
from robbench.records import Record, Store, read
from robbench.threat import NORM_NAMES, format_eps


class Pair(NamedTuple):
    """Two records on the same images."""

    a: Record
    b: Record


def compare(a: str, b: str, dataset: str, out: Path) -> str:
    """The table of differences A - B with intervals and p-values, as text."""
    if a.endswith(".json") and b.endswith(".json"):
        pairs = [Pair(_record(Path(a)), _record(Path(b)))]
    else:
        records = [record for record in Store(out).all(dataset) if record.status == "ok"]
        pairs = _pairs(_of(a, records, dataset), _of(b, records, dataset))
        if not pairs:
            raise InputError(
                f"no cell below {out} was run on both {a} and {b} (dataset {dataset});"
                " run both with the same attack, norm, ε, n and seeds"
            )
    for pair in pairs:
        _check_images(pair)
    p_values = [_p(pair) for pair in pairs]
    adjusted = statistics.holm(p_values)
    lines = [_line(pair, p, holm) for pair, p, holm in zip(pairs, p_values, adjusted, strict=True)]
    headers = ["attack", "norm", "ε", "n", "setting", "A %", "B %", "A - B (95 %)", "p", "Holm"]
    names = f"A = {pairs[0].a.cell.defense}\nB = {pairs[0].b.cell.defense}\n"
    return names + tabulate(lines, headers, disable_numparse=True)


def _line(pair: Pair, p: float, holm: float) -> list[str]:
    a, b = outcomes(pair.a), outcomes(pair.b)
    difference, interval = statistics.paired(a, b)

    def both(what: Callable[[Cell], object]) -> str:
        first, second = str(what(pair.a.cell)), str(what(pair.b.cell))
        return first if first == second else f"{first} / {second}"

    return [
        both(lambda cell: cell.attack),
        both(lambda cell: cell.threat.norm),
        both(lambda cell: format_eps(cell.threat.eps)),
        both(lambda cell: cell.n),
        both(lambda cell: cell.setting),
        f"{100 * a.mean():.1f}",
        f"{100 * b.mean():.1f}",
        f"{_points(difference)} ({_points(interval.low)}..{_points(interval.high)})",
        f"{p:.2g}",
        f"{holm:.2g}",
    ]


def _points(share: float) -> str:
    """A signed number of percentage points, never -0.0."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def _record(path: Path) -> Record:
    record = read(path)
    if record is None or record.status != "ok":
        raise InputError(f"the record {path} is of another schema version or of a failed cell")
    return record


def _of(text: str, records: Iterable[Record], dataset: str) -> list[Record]:
    """Records of `SPEC` or `SPEC@SETTING`; without a setting all of them."""
    name, at, kind = text.rpartition("@")
    if not at:
        name, kind = text, ""
    if at and kind not in KINDS:
        raise InputError(f"{kind!r} in {text!r} is not a setting; write one of {', '.join(KINDS)}")
    named = [record for record in records if not kind or record.cell.setting.kind == kind]
    found = [record for record in named if record.cell.defense == name]  # a model of the caller
    for spec in () if found else (_quick(name, dataset), str(canonical(name))):
        found = found or [record for record in named if record.cell.defense == spec]
    return found


def _quick(name: str, dataset: str) -> str:
    """The spec as `run` records it by default."""
    try:
        return str(with_preset(name, "quick", dataset))
    except InputError:  # of a plugin without that preset
        return str(canonical(name))


def _pairs(first: list[Record], second: list[Record]) -> list[Pair]:
    """Cells that agree in all but defense and setting, each with its strongest setting."""
    left, right = _strongest(first), _strongest(second)
    pairs = [Pair(left[key], right[key]) for key in left if key in right]
    return sorted(pairs, key=_order)


def _order(pair: Pair) -> tuple[object, ...]:
    cell = pair.a.cell
    norm = NORM_NAMES.index(cell.threat.norm)
    return norm, cell.attack, str(cell.setting), cell.n, cell.threat.eps or 0, cell.id


def _strongest(records: list[Record]) -> dict[tuple[object, ...], Record]:
    kinds = ("blackbox", "transfer", "whitebox", "adaptive")

    def strength(record: Record) -> tuple[int, int]:
        return kinds.index(record.cell.setting.kind), record.cell.setting.eot

    chosen: dict[tuple[object, ...], Record] = {}
    for record in records:
        cell = record.cell
        family = cell.setting.oracle or ("queries" if cell.setting.kind == "blackbox" else "own")
        key = (cell.attack, str(cell.threat), cell.n, cell.train_seed, cell.seed, family)
        if key not in chosen or strength(record) > strength(chosen[key]):
            chosen[key] = record
    return chosen


def _check_images(pair: Pair) -> None:
    same = pair.a.provenance.get("subset_hash") == pair.b.provenance.get("subset_hash")
    if not same or pair.a.cell.data != pair.b.cell.data or pair.a.cell.n != pair.b.cell.n:
        raise InputError("the two records are of different images, so they cannot be paired")


def _p(pair: Pair) -> float:
    a, b = outcomes(pair.a), outcomes(pair.b)
    if pair.a.draws == pair.b.draws == 1:
        return statistics.mcnemar(a == 1, b == 1)
    return statistics.permutation(a - b)
