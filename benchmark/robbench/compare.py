"""Paired comparison of two defenses from their records: same images, same attack, same ε."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from robbench import statistics
from robbench.audit import is_diagnostic
from robbench.cell import KINDS, Cell
from robbench.defense import canonical, with_preset
from robbench.errors import InputError
from robbench.metrics import outcomes, share
from robbench.records import Record, Store, newest, read
from robbench.tables import Row, deterministic, interval, left_out, percent
from robbench.threat import NORM_NAMES, format_eps

PARITY = 2  # times the passes of the other side are still the same effort
HEADERS = [
    "attack", "norm", "ε", "n", "setting", "A %\n(95 %)", "B %\n(95 %)", "A - B\n(95 %)", "p\nHolm",
    "passes\nA, B",
]  # fmt: skip


class Pair(NamedTuple):
    """Two records on the same images."""

    a: Record
    b: Record


def compare(a: str, b: str, dataset: str, out: Path) -> str:
    """The table of differences A - B with intervals and p-values, as text.

    a, b: two record files, or two sides `SPEC` or `SPEC@SETTING`. Without settings, each side of a
    cell stands at the lowest accuracy of the settings that both allow.
    """
    superseded = 0
    if a.endswith(".json") and b.endswith(".json"):
        pairs = [Pair(_record(Path(a)), _record(Path(b)))]
    else:
        records = list(Store(out).all(dataset))
        both = [_of(side, records, dataset) for side in (a, b)]
        first, second = map(_current, both)
        finished = {record.id for side in both for record in side if record.status == "ok"}
        superseded = len(finished - {record.id for record in (*first, *second)})
        pairs = _pairs(first, second, named="@" in a + b)
        if not pairs:
            raise InputError(
                f"no cell below {out} was run on both {a} and {b} (dataset {dataset});"
                " run both with the same attack, norm, ε, setting, n and seeds"
            )
    for pair in pairs:
        _check_images(pair)
    found = [statistics.paired(outcomes(pair.a), outcomes(pair.b)) for pair in pairs]
    adjusted = statistics.holm([each.p for each in found])
    lines = [_line(*each) for each in zip(pairs, found, adjusted, strict=True)]
    sides = zip("AB", (a, b), (pairs[0].a, pairs[0].b), strict=True)
    names = "".join(
        f"{letter} = {record.cell.defense}{' @ ' * ('@' in given)}{given.partition('@')[2]}\n"
        for letter, given, record in sides
    )
    below = [_unequal(pairs), left_out(superseded) if superseded else ""]
    table = names + tabulate(lines, HEADERS, disable_numparse=True)
    return "\n".join([table, *filter(None, below)])


def _line(pair: Pair, found: statistics.Paired, holm: float) -> list[str]:
    """Two lines of text: a figure above its interval, A above B where they differ."""

    def both(what: Callable[[Cell], object]) -> str:
        first, second = str(what(pair.a.cell)), str(what(pair.b.cell))
        return first if first == second else f"{first}\n{second}"

    def accuracy(record: Record) -> str:
        measure = share(outcomes(record), record.draws)
        return f"{percent(measure)}\n{interval(measure)}"

    low, high = found.interval
    return [
        both(lambda cell: cell.attack + _goal(cell)),
        both(lambda cell: cell.threat.norm),
        both(lambda cell: format_eps(cell.threat.eps)),
        both(lambda cell: cell.n),
        both(lambda cell: cell.setting),
        accuracy(pair.a),
        accuracy(pair.b),
        f"{_points(found.difference)}\n{_points(low)}..{_points(high)}",
        f"{found.p:.2g}\n{holm:.2g}",
        f"{pair.a.passes:.0f}\n{pair.b.passes:.0f}",
    ]


def _unequal(pairs: Sequence[Pair]) -> str:
    """Where one side met more than twice the effort of the other; empty where none did."""
    efforts = [sorted(record.passes for record in pair) for pair in pairs]
    count = sum(more > PARITY * less for less, more in efforts)
    if not count:
        return ""
    return (
        f"Budget: in {count} of {len(pairs)} rows one side met more than {PARITY} times the passes"
        " of the other; an attack also stops early where it wins."
    )


def _goal(cell: Cell) -> str:
    """What tells two cells of one attack apart: the goal, and seeds that are not 0."""
    goal = "" if cell.threat.goal == "error" else f" goal={cell.threat.goal}"
    seeds = f" seed={cell.seed}" * bool(cell.seed)
    return goal + seeds + f" train_seed={cell.train_seed}" * bool(cell.train_seed)


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
    named = [
        record
        for record in records
        if (not kind or record.cell.setting.kind == kind) and not is_diagnostic(record.cell)
    ]
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


def _family(cell: Cell) -> tuple[object, ...]:
    """What two cells of a defense have in common that differ in nothing but versions and in how
    much the attacker knows of the defense."""
    run = cell.n, cell.train_seed, cell.seed
    return cell.data, cell.attack, cell.threat, *run, _access(cell)


def _access(cell: Cell) -> str:
    """What the attacker may ask: the defense itself, its answers, or an oracle."""
    return cell.setting.oracle or ("queries" if cell.setting.kind == "blackbox" else "own")


def _current(records: Iterable[Record]) -> list[Record]:
    """Finished records, of one version in each family."""
    return [record for record in newest(records, _family) if record.status == "ok"]


def _pairs(first: Sequence[Record], second: Sequence[Record], named: bool) -> list[Pair]:
    """The lowest outcomes of both sides in cells that agree in all but defense and setting.

    named: a side's setting was chosen, so that settings are not held against each other.
    """
    left, right = _by_cell(first), _by_cell(second)
    pairs = []
    for key in left.keys() & right.keys():
        mine, theirs = left[key], right[key]
        if not named:
            mine, theirs = _allowed(mine, theirs), _allowed(theirs, mine)
        if mine and theirs:
            pairs.append(Pair(min(mine, key=_rank), min(theirs, key=_rank)))
    return sorted(pairs, key=_order)


def _by_cell(records: Iterable[Record]) -> dict[tuple[object, ...], list[Record]]:
    """Only what the same version of an attack did is comparable."""
    cells: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        versions = record.cell.attack_version, record.cell.setting.oracle_version
        cells.setdefault((*_family(record.cell), *versions), []).append(record)
    return cells


def _allowed(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """Records in settings that the other side was attacked in, or could not be."""
    settings = {other.cell.setting for other in others}
    whole = any(map(_whole, others))
    return [
        record for record in records if whole or _whole(record) or record.cell.setting in settings
    ]


def _whole(record: Record) -> bool:
    """Whether it stands for every setting of its own: the white box of a deterministic defense, and
    a suite, which has them all."""
    cell = record.cell
    if cell.setting.suite:
        return True
    return cell.setting.kind == "whitebox" and deterministic(Row(cell, None, record))


def _rank(record: Record) -> tuple[object, ...]:
    """The lowest outcome first, of equal ones that of the attacker who had more."""
    setting = record.cell.setting
    draws = math.inf if setting.eot == "auto" else setting.eot
    return outcomes(record).mean(), setting.kind != "adaptive", -draws, record.id


def _order(pair: Pair) -> tuple[object, ...]:
    cell = pair.a.cell
    norm = NORM_NAMES.index(cell.threat.norm)
    return norm, cell.attack, _access(cell), cell.n, cell.threat.eps or 0, cell.id


def _check_images(pair: Pair) -> None:
    same = pair.a.provenance.get("subset_hash") == pair.b.provenance.get("subset_hash")
    if not same or pair.a.cell.data != pair.b.cell.data or pair.a.cell.n != pair.b.cell.n:
        raise InputError("the two records are of different images, so they cannot be paired")
