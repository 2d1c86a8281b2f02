"""The worst flag of a record decides: badge, and whether it is ranked."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from robbench.audit.case import Case, cases
from robbench.audit.flags import CHECKS, VERDICTS, Flag, Verdict
from robbench.cell import MODEL
from robbench.records import Record, newest, without_versions

ESTIMATOR = ("F17", "F18", "F20", "F31")  # without these no number is called sound
ATTACK = ("F1", "F2", "F7", "F8", "F28", "F29")  # one of these at least, or a suite's own stages
LEAST_DRAWS = 5  # behind a gradient of a random defense, for an attack to be adaptive


class Audited(NamedTuple):
    """What the checks say of one record: the flags, and which checks could be made."""

    flags: tuple[Flag, ...]
    assessed: tuple[str, ...]
    adaptive: bool
    staged: bool = False  # several attacks in turn, a search without gradients among them
    challenged: bool = False  # another kind of attack was held against it

    @property
    def worst(self) -> Verdict | None:
        raised = {flag.verdict for flag in self.flags}
        return next((verdict for verdict in VERDICTS if verdict in raised), None)

    @property
    def accused(self) -> tuple[str, ...]:
        """The flags for which a number does not count; those of the worst verdict alone."""
        if self.worst not in ("INVALID", "OVERESTIMATE"):
            return ()
        return tuple(dict.fromkeys(flag.id for flag in self.flags if flag.verdict == self.worst))

    @property
    def audited(self) -> bool:
        """Enough was looked at to call a number sound."""
        made = set(self.assessed)
        seen = not made.isdisjoint(ATTACK) and self.challenged
        return made.issuperset(ESTIMATOR) and (self.staged or seen)

    @property
    def sound(self) -> bool:
        return not self.accused and self.adaptive and self.audited


def audit(records: Iterable[Record], wanted: Collection[str] | None = None) -> dict[str, Audited]:
    """Record id -> what the checks say of it, beside all of these records; of the newest versions
    alone.

    wanted: ids of those that are asked for, by default all.
    """
    return {
        case.record.id: _audited(case)
        for case in cases(newest(records, without_versions))
        if wanted is None or case.record.id in wanted
    }


def _audited(case: Case) -> Audited:
    flags: list[Flag] = []
    assessed = []
    for name, check in CHECKS.items():
        found = check(case)
        if found is not None:
            assessed.append(name)
            flags += found
    flags.sort(key=lambda flag: (VERDICTS.index(flag.verdict), number(flag.id)))
    staged = "suite_lost" in case.record.trace
    made = tuple(sorted(assessed, key=number))
    return Audited(tuple(flags), made, is_adaptive(case), staged, case.challenged)


def number(name: str) -> tuple[int, str]:
    """F5b stands after F5 and before F6."""
    digits = "".join(sign for sign in name if sign.isdigit())
    return int(digits), name


def is_adaptive(case: Case) -> bool:
    """A gradient attack by one who knows the defense: its draws and its own losses, or there is
    nothing to know. A model of the caller has a loss of its own where there is an adaptive cell."""
    if not case.climbs:
        return False
    own = {name for part in case.parts for name in part.losses}
    own |= {"evasion"} if any(part.detector for part in case.parts) else set()
    loss = case.settings.get("loss")
    if case.cell.setting.kind == "adaptive":
        few = case.stochastic and case.cell.setting.eot != "auto" and case.eot < LEAST_DRAWS
        blind = "evasion" in own and loss not in (None, "auto", *own)
        return not few and not blind
    if not case.cell.defense.startswith(MODEL):
        return not case.stochastic and not own and bool(case.parts)
    return not case.stochastic and not any(
        peer.cell.setting.kind == "adaptive" and not peer.cell.setting.suite for peer in case.peers
    )


def badge(found: Audited) -> str:
    """`sound`, `invalid: F8`, `overestimate: F3, F11`, `not adaptive` or `not audited`."""
    if found.accused:
        return f"{str(found.worst).lower()}: {', '.join(found.accused)}"
    if not found.adaptive:
        return "not adaptive"
    return "sound" if found.audited else "not audited"
