"""Numbers, claims and tables as plain values, for CSV and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from robbench.audit import badge
from robbench.papers.claims import Judged
from robbench.papers.derived import measured
from robbench.papers.paper import Paper, Table
from robbench.papers.reproduction import SHARES, Line
from robbench.papers.wording import MADE, rule, stated
from robbench.threat import format_eps


def flat_table(
    paper: Paper, table: Table, lines: Sequence[Line], scale: str
) -> list[dict[str, Any]]:
    """The rows of a table: its numbers, or its words where it has no numbers."""
    if not table.columns:
        return [dict(zip(table.heads, row.labels, strict=True)) for row in table.rows]
    return [flat(paper, scale, line) for line in lines]


def flat(paper: Paper, scale: str, line: Line) -> dict[str, Any]:
    """A number with all that is known of it."""
    cell = line.cells[0] if line.cells else None
    attacked = cell if cell and not line.number.binding.measure.startswith("clean") else None
    measure, strongest = line.measure, line.strongest
    least = measured(strongest, line.number.binding.measure) if strongest else None
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
        "strongest": _rounded(least.value, line.unit) if least else None,
        "strongest_low": _rounded(least.interval.low, line.unit) if least else None,
        "strongest_high": _rounded(least.interval.high, line.unit) if least else None,
        "strongest_n": strongest.cell.n if strongest else None,
        "strongest_attack": strongest.cell.attack if strongest else "",
        "badge": badge(line.audited) if line.audited and measure else "",
        "reason": line.why,
        **dict(zip(MADE, stated(line.behind), strict=True)),
        "defense": cell.defense if cell else "",
        "attack": attacked.attack if attacked else "",
        "norm": attacked.threat.norm if attacked else "",
        "eps": format_eps(attacked.threat.eps) if attacked else "",
        "target": str(attacked.threat.target) if attacked else "",
        "setting": str(attacked.setting) if attacked else "",
        "cells": _ids([line]),
        "seconds": round(line.seconds, 1),
    }


def flat_claim(paper: Paper, scale: str, each: Judged) -> dict[str, Any]:
    """A claim with its counterpart, its rule and its footnote."""
    return {
        "paper": paper.key,
        "where": each.claim.where,
        "claim": each.claim.what,
        "published": each.claim.value,
        "unit": each.claim.unit or "",
        "scale": scale,
        "measured": each.measured,
        "rule": rule(each.claim),
        "holds": each.holds,
        "note": each.claim.note or "",
        **dict(zip(MADE, stated(each.grounds), strict=True)),
        "cells": _ids(each.lines),
    }


def _ids(lines: Sequence[Line]) -> str:
    return " ".join(dict.fromkeys(cell.id[:16] for line in lines for cell in line.cells))


def _rounded(value: float, unit: str | None) -> float | None:
    return None if value != value else round(value * (100 if unit in SHARES else 1), 4)
