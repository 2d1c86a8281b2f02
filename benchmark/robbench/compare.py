"""Paired comparison of two defenses from their records: same images, same attack, same ε."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from robbench import statistics
from robbench.defense import canonical
from robbench.errors import InputError
from robbench.grid import KINDS
from robbench.metrics import outcomes
from robbench.records import Record, Store, read
from robbench.threat import format_eps


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
        pairs = _pairs(list(_of(a, records)), list(_of(b, records)))
        if not pairs:
            raise InputError(
                f"no cell below {out} was run on both {a} and {b} (dataset {dataset});"
                " run both with the same attack, norm, ε, n and seeds"
            )
    for pair in pairs:
        _check_images(pair)
    p_values = [_p(pair) for pair in pairs]
    adjusted = statistics.holm(p_values)
    lines = []
    for pair, p, holm in zip(pairs, p_values, adjusted, strict=True):
        difference, interval = statistics.paired(outcomes(pair.a), outcomes(pair.b))
        cell = pair.a.cell
        lines.append(
            [
                cell.attack,
                cell.threat.norm,
                format_eps(cell.threat.eps),
                cell.n,
                f"{100 * outcomes(pair.a).mean():.1f}",
                f"{100 * outcomes(pair.b).mean():.1f}",
                f"{100 * difference:+.1f} ({100 * interval.low:+.1f}..{100 * interval.high:+.1f})",
                f"{p:.2g}",
                f"{holm:.2g}",
            ]
        )
    headers = ["attack", "norm", "ε", "n", "A %", "B %", "A - B (95 %)", "p", "Holm"]
    names = f"A = {_name(pairs[0].a)}\nB = {_name(pairs[0].b)}\n"
    return names + tabulate(lines, headers, disable_numparse=True)


def _name(record: Record) -> str:
    return f"{record.cell.defense}, {record.cell.setting}"


def _record(path: Path) -> Record:
    record = read(path)
    if record is None or record.status != "ok":
        raise InputError(f"the record {path} is of another schema version or of a failed cell")
    return record


def _of(text: str, records: Iterable[Record]) -> Iterable[Record]:
    """Records of `SPEC` or `SPEC@SETTING`; without a setting the strongest that was run."""
    name, at, kind = text.rpartition("@")
    if not at:
        name, kind = text, ""
    if at and kind not in KINDS:
        raise InputError(f"{kind!r} in {text!r} is not a setting; write one of {', '.join(KINDS)}")
    spec = str(canonical(name))
    found = [record for record in records if record.cell.defense == spec]
    return [record for record in found if not kind or record.cell.setting.kind == kind]


def _pairs(first: list[Record], second: list[Record]) -> list[Pair]:
    """Cells that agree in all but defense and setting, each with its strongest setting."""
    left, right = _strongest(first), _strongest(second)
    return [Pair(left[key], right[key]) for key in left if key in right]


def _strongest(records: list[Record]) -> dict[tuple[object, ...], Record]:
    rank = {"blackbox": 0, "transfer": 0, "whitebox": 1, "adaptive": 2}
    chosen: dict[tuple[object, ...], Record] = {}
    for record in records:
        cell = record.cell
        family = cell.setting.oracle or ("queries" if cell.setting.kind == "blackbox" else "own")
        key = (cell.attack, str(cell.threat), cell.n, cell.train_seed, cell.seed, family)
        if key not in chosen or rank[cell.setting.kind] > rank[chosen[key].cell.setting.kind]:
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
