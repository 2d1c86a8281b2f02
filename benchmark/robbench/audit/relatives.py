"""Flags that a record gets from the records of other defenses: its relatives, and the board."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from robbench.audit.case import Case, attack_key, harm, kind, unseeded
from robbench.audit.flags import Raised, check, enough
from robbench.metrics import outcomes
from robbench.records import Record
from robbench.threat import format_eps

GREY = Fraction(1, 2)  # ε under linf: every image can become grey
POINTS = 0.02
KNOWN = {  # the best accuracy under AutoAttack that RobustBench listed: dataset, norm, ε
    ("cifar10", "linf", Fraction(8, 255)): 0.737,
    ("cifar10", "l2", Fraction(1, 2)): 0.85,
    ("cifar100", "linf", Fraction(8, 255)): 0.427,
}
UNTRAINED = 0.8  # of those, without adversarial training
COMPARED = 100  # images of a record that others are held against
TWIN = 0.01  # accuracy of an undefended network where any image can become any other
FLOOR = 0.05  # of the images lost, or kept: nothing can be compared there


@check("F6", "better than anything known")
def incredible(case: Case) -> list[Raised] | None:
    """Against the best accuracy under AutoAttack of the dataset and threat."""
    name = case.cell.dataset.partition("-")[0]
    known = KNOWN.get((name, case.cell.threat.norm, case.cell.threat.eps or Fraction(0)))
    if known is None or not case.climbs:
        return None
    trained = any(part.adversarial for part in case.parts)
    limit, share = known * (1 if trained else UNTRAINED), float(outcomes(case.record).mean())
    if share <= limit:
        return []
    text = f"the best known is {100 * known:.1f} %"
    text += "" if trained else f"; without adversarial training {100 * limit:.1f} % is the limit"
    return [Raised("OVERESTIMATE", share, limit, text)]


@check("F23", "without its randomness it still does not fall")
def quiet(case: Case) -> list[Raised] | None:
    """A defense around another network, with its randomness off, against that network; where it was
    trained on, that may be why."""
    if not case.stochastic or not case.climbs or not all(part.base for part in case.parts):
        return None
    still = _matching(case, case.relatives("noise-off"))
    bare = _matching(case, case.relatives("base"))
    if not case.parts or not still or not bare:
        return None
    left = min(float(outcomes(record).mean()) for record in still)
    floor = min(float(outcomes(record).mean()) for record in bare)
    if left <= floor + POINTS:
        return []
    text = (
        f"without randomness {100 * left:.1f} % survive, of what it is built on {100 * floor:.1f} %"
    )
    own = not any(part.epochs for part in case.parts)
    return [Raised("OVERESTIMATE" if own else "WARN", left - floor, POINTS, text)]


def _matching(case: Case, records: Iterable[Record]) -> list[Record]:
    """Those of direct gradient attacks within the same threat, on as many images."""
    return [
        record
        for record in records
        if case.same_threat(record, weaker=False)
        and record.cell.setting.kind in ("whitebox", "adaptive")
        and kind(record) == kind(case.record)
        and record.cell.n == case.cell.n
    ]


@check("F27", "the mechanism changes nothing")
def ablation(case: Case) -> list[Raised] | None:
    """The same attack on the defense without its noise, its detector or its other members, where
    it neither breaks everything nor nothing."""
    if not case.climbs or not FLOOR < float(case.harm.mean()) < 1 - FLOOR:
        return None
    assessed = False
    for relation in ("noise-off", "undetected", "member"):
        for record in _matching(case, case.relatives(relation)):
            assessed = True
            gaps = harm(record) - case.harm
            gain, error = float(gaps.mean()), float(gaps.std(ddof=1)) / np.sqrt(len(gaps))
            if abs(gain) < min(POINTS, max(2 * error, 1e-9)):
                text = f"without it ({relation}) {100 * harm(record).mean():.1f} % are lost as well"
                return [Raised("WARN", gain, POINTS, text)]
    return [] if assessed else None


@check("F30", "the attack does not break an undefended network")
def control(case: Case) -> list[Raised] | None:
    """The same attack on the undefended twin where any image can become any other."""
    if not case.climbs or not case.parts:
        return None
    undefended = case.relatives("twin")
    if case.parts[0].name == "standard":
        undefended = [case.record, *case.peers]
    far = [
        record
        for record in undefended
        if record.cell.threat.norm == "linf"
        and (record.cell.threat.eps or 0) >= _control_eps(case)
        and kind(record) == kind(case.record)
        and case.same_settings(record, "step")  # whose length is another at another ε
        and record.cell.setting.kind in ("whitebox", "adaptive")
    ]
    if not far:
        return None
    best = min(far, key=lambda record: float(outcomes(record).mean()))
    share = float(outcomes(best).mean())
    if share <= TWIN or not enough(round(share * best.cell.n), best.cell.n):
        return []
    text = f"{100 * share:.1f} % of the undefended network's images survive it"
    return [Raised("INVALID", share, TWIN, text)]


def _control_eps(case: Case) -> Fraction:
    return (
        Fraction(32, 255) if case.cell.dataset.startswith(("cifar", "tiny", "imagenet")) else GREY
    )


@check("F34", "a detector does what no classifier does at half of ε")
def reduction(case: Case) -> list[Raised] | None:
    """Tramer 2022 (arXiv:2107.11630): robust accuracy with detection at ε implies a classifier
    that is as robust at ε / 2; against the best of the board there, and the best known."""
    eps = case.cell.threat.eps
    if not any(part.detector for part in case.parts) or not case.climbs or eps is None:
        return None
    assert case.record.clean_ok is not None
    name = case.cell.dataset.partition("-")[0]
    known = [KNOWN[key] for key in [(name, case.cell.threat.norm, eps / 2)] if key in KNOWN]
    for record in _answering(case, eps / 2):
        known.append(float(outcomes(record).mean()))
    if not known:
        return None
    shares = case.record.clean_ok / case.record.draws * (1 - case.harm)
    claim, error = float(shares.mean()), float(shares.std(ddof=1)) / np.sqrt(len(shares))
    if claim <= max(known) + 2 * error:
        return []
    text = (
        f"{100 * claim:.1f} % with detection would make a classifier of {100 * claim:.1f} % at"
        f" ε = {format_eps(eps / 2)}, where the best is {100 * max(known):.1f} %"
    )
    return [Raised("OVERESTIMATE", claim, max(known), text)]


def _answering(case: Case, eps: Fraction) -> list[Record]:
    """Strong attacks at this ε on what always answers, on the same data."""
    found = []
    for (dataset, *_), records in case.board.by_defense.items():
        if dataset != case.cell.dataset:
            continue
        best = [
            record
            for record in records
            if record.status == "ok"
            and record.cell.threat.norm == case.cell.threat.norm
            and record.cell.threat.eps == eps
            and record.cell.data == case.cell.data
            and record.cell.n >= COMPARED
            and Case(record, case.board).climbs
            and not any(part.detector for part in Case(record, case.board).parts)
        ]
        if best:
            found.append(min(best, key=lambda record: float(outcomes(record).mean())))
    return found


@check("F36", "compared attacks did not cost the same")
def parity(case: Case) -> list[Raised] | None:
    """Queries per image against the median over the defenses of the same table."""
    if case.record.status != "ok" or not case.climbs:
        return None
    compared = [
        record.cost["queries"]
        for record in case.board.by_attack[attack_key(case.cell)]
        if record.status == "ok"
        and (record.id == case.record.id or record.cell.defense != case.cell.defense)
    ]
    if len(compared) < 2:
        return None
    middle, own = float(np.median(compared)), case.record.cost["queries"]
    ratio = max(own, 1) / max(middle, 1)
    if 0.5 <= ratio <= 2:
        return []
    text = f"{own:.0f} queries an image, the median of {len(compared)} defenses is {middle:.0f}"
    return [Raised("INFO", ratio, 2, text)]


@check("F38", "other seeds give another number")
def stable(case: Case) -> list[Raised] | None:
    """The same cell with other attack or training seeds, against its own interval."""
    if not case.climbs:
        return None
    others = [
        record
        for record in case.board.by_cell[unseeded(case.cell)]
        if record.status == "ok" and record.id != case.record.id
    ]
    if not others:
        return None
    values = [float(outcomes(record).mean()) for record in (case.record, *others)]
    own = outcomes(case.record)
    width = 2 * 1.96 * float(own.std(ddof=1)) / np.sqrt(len(own))
    spread = max(values) - min(values)
    if spread <= width:
        return []
    text = f"{len(values)} seeds differ by {100 * spread:.1f} points, more than the interval has"
    return [Raised("WARN", spread, width, text)]
