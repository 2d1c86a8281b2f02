"""Tables of what an accuracy alone does not say: draws, seeds, refusals, detectors, regimes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from robbench.audit.case import parts_of, unseeded
from robbench.defense import resolve, shown
from robbench.errors import InputError
from robbench.metrics import Measure, detected
from robbench.metrics.abstention import abstention, costs, detection, operating, risk_coverage
from robbench.metrics.uncertainty import looks, variability
from robbench.records import Record
from robbench.registry import Spec
from robbench.siblings import siblings
from robbench.tables import Row, setting_text, tabulated, with_interval
from robbench.threat import format_eps

EQUAL = 0.95  # of the clean images answered, where defenses are compared at equal coverage


def _named(row: Row) -> list[object]:
    defense = f"`{shown(row.cell.defense, row.cell.dataset)}`"
    return [defense, setting_text(row.cell, False), format_eps(row.cell.threat.eps)]


def _points(share: float) -> str:
    return f"{100 * share:.1f}" if share == share else "n.a."


def _measured(measure: Measure) -> str:
    return with_interval(measure) if measure.value == measure.value else "n.a."


def _refuses(record: Record) -> bool:
    right, wrong = record.clean_ok, record.clean_err
    assert right is not None and wrong is not None and record.ok is not None
    assert record.err is not None
    answered = right.astype(int) + wrong, record.ok.astype(int) + record.err
    return any(bool((each < record.draws).any()) for each in answered)


def draws(group: Sequence[Row]) -> str:
    """Of random defenses: both errors, and what one look or any of the attack's own would say."""
    lines = []
    for row in group:
        if row.record is None or row.record.draws == 1:
            continue
        seen = looks(row.record)
        lines.append(
            [
                *_named(row),
                _measured(seen.expected),
                _points(seen.image_error),
                _points(seen.draw_error),
                _points(seen.single_sd),
                _measured(seen.any_iteration),
            ]
        )
    headers = [
        "defense", "setting", "ε", "expected accuracy %", "± images", "± draws",
        "sd of a single look", "unbroken in any look of the attack %",
    ]  # fmt: skip
    return tabulated(lines, headers) if lines else ""


def refusals(group: Sequence[Row]) -> str:
    """Where something refuses: shares among what is answered, what a refusal costs, and everybody
    at the same clean coverage."""
    if not any(row.record is not None and _refuses(row.record) for row in group):
        return ""
    lines = []
    for row in group:
        assert row.record is not None
        found, price = abstention(row.record), costs(row.record)
        equal, curve = operating(row.record, EQUAL), risk_coverage(row.record)
        lines.append(
            [
                *_named(row),
                _points(found.clean_coverage.value),
                _points(found.coverage.value),
                _measured(found.selective),
                _measured(found.evasion),
                " / ".join(_points(price[each]) for each in sorted(price)),
                _points(equal.coverage.value) if equal else "",
                _points(equal.risk.value) if equal else "",
                _points(curve.area) if curve else "",
            ]
        )
    headers = [
        "defense", "setting", "ε", "clean coverage %", "coverage %", "right among answers %",
        "evasion %", "cost at " + " / ".join(f"{each:g}" for each in sorted(price)),
        f"coverage at {EQUAL:.0%} clean", "wrong among these %",
        "area below risk–coverage %",
    ]  # fmt: skip
    return tabulated(lines, headers)


def detections(group: Sequence[Row]) -> str:
    """Detectors against what succeeded, the AUC last."""
    lines = []
    for row in group:
        found = detection(row.record) if row.record and _detects(row.cell.defense) else None
        if found is not None:
            lines.append(
                [
                    *_named(row),
                    found.successes,
                    _measured(found.fpr),
                    _measured(found.tpr),
                    _points(found.tpr_at_5.value),
                    _points(found.tpr_at_1.value),
                    f"{found.auc:.3f}" if found.auc == found.auc else "n.a.",
                ]
            )
    headers = [
        "defense", "setting", "ε", "successes", "clean refused %", "successes refused %",
        "at 5 % false alarms", "at 1 %", "AUC",
    ]  # fmt: skip
    return tabulated(lines, headers) if lines else ""


def _detects(defense: str) -> bool:
    return any(part.detector for part in parts_of(defense))


def seeds(made: Iterable[Row]) -> str:
    """Cells that were run with several seeds or trained models: mean, spread, both errors."""
    alike: dict[str, list[Row]] = defaultdict(list)
    for row in made:
        if row.record is not None and row.metrics is not None:
            alike[unseeded(row.cell)].append(row)
    lines = []
    for rows in alike.values():
        if len(rows) < 2 or rows[0].cell.n < 2:  # one image shows no spread
            continue
        found = variability([row.record for row in rows if row.record], detected)
        lines.append(
            [
                *_named(rows[0]),
                f"`{rows[0].cell.attack}`",
                f"{found.trainings} × {found.records / found.trainings:.3g}",
                rows[0].cell.n,
                with_interval(Measure(found.mean, found.interval)),
                _points(found.training_sd),
                _points(found.seed_sd),
                _points(found.image_error),
                _points(found.seed_error),
            ]
        )
    headers = [
        "defense", "setting", "ε", "attack", "models × seeds", "n", "robust with detection %",
        "sd of models", "sd of seeds", "± images", "± models or seeds",
    ]  # fmt: skip
    return tabulated(lines, headers) if lines else ""


def regimes(made: Iterable[Row]) -> str:
    """Random defenses with fresh draws, with draws that the attacker knows, and with none."""
    by_cell: dict[tuple[object, ...], dict[str, Row]] = defaultdict(dict)
    for row in made:
        cell = row.cell
        if row.metrics is None or cell.setting.kind not in ("whitebox", "adaptive") or cell.seed:
            continue
        key = cell.dataset, cell.attack, cell.threat, cell.n, cell.train_seed
        known = by_cell[key].get(cell.defense)
        if known is None or known.cell.setting.kind == "whitebox":
            by_cell[key][cell.defense] = row
    lines = []
    for rows in by_cell.values():
        for defense, row in rows.items():
            fixed = next((each for each in rows if _fixed(each, defense)), None)
            quiet = _quiet(row, rows)
            if fixed and quiet:
                three = (row, rows[fixed], quiet)
                shares = [with_interval(each.metrics.accuracy) for each in three if each.metrics]
                lines.append([*_named(row), f"`{row.cell.attack}`", row.cell.n, *shares])
    headers = [
        "defense", "setting", "ε", "attack", "n", "fresh draws %", "known seed %", "noise off %"
    ]  # fmt: skip
    return tabulated(lines, headers) if lines else ""


def _fixed(candidate: str, defense: str) -> bool:
    """Whether the candidate is the defense with a known seed."""
    if "known_seed" not in candidate or "known_seed" in defense:
        return False
    spec = Spec.parse(candidate)
    try:
        parts = [
            part.model_copy(update={"known_seed": None}).spec.model_copy(
                update={"member": one.member}
            )
            for one, part in zip(spec.parts or (spec,), resolve(spec), strict=True)
        ]
    except InputError:
        return False
    return " & ".join(map(str, parts)) == defense


def _quiet(row: Row, rows: dict[str, Row]) -> Row | None:
    known = parts_of(row.cell.defense)
    found = siblings(row.cell.defense, row.cell.dataset, "noise-off") if known else []
    return next((rows[each] for each in found if each in rows), None)
