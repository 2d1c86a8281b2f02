"""What numbers and claims were measured on, and what must be true of them, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from robbench.audit import CHECKS
from robbench.papers.claims import MARGIN, TREND, Judged
from robbench.papers.paper import Claim, Paper, Table
from robbench.papers.reproduction import (
    Ground,
    Line,
    made_of,
    shown_strongest,
    shown_value,
    verdict,
)

SCALED = {
    "smoke": "digits, tiny networks, one epoch: shows that everything runs, and nothing else",
    "cpu": "small networks (quick: ResNet-8 of width 8) on subsets, for hours of a CPU: numbers are"
    " those of other networks and other images than the paper's",
    "paper": "the paper's own data sets, networks and epochs",
}
HEADS = ["", "published", "measured", "strongest", "verdict"]
MADE = ["dataset", "networks", "n", "epochs"]
RULES = {
    "near": "the published value lies in the interval, which is no longer than it or than"
    f" {2 * MARGIN}",
    "zero": "within ±{}",
    "positive": "more than 0",
    "negative": "less than 0",
    "above": "more than {}",
    "below": "less than {}",
    "rises": f"its end clearly above its beginning, rank correlation {TREND} or more",
    "falls": f"its end clearly below its beginning, rank correlation -{TREND} or less",
    "widens": f"the gap clearly larger at its end, rank correlation {TREND} or more",
    "rises-then-falls": "its highest point clearly above both ends",
}


def grounds(behind: Iterable[Ground]) -> list[tuple[str, str, str, str]]:
    """Dataset, networks, n and epochs of all this, each combination once; n is empty for what is
    not measured by images."""
    found = []
    for dataset, defense, n in dict.fromkeys(behind):
        networks, epochs = made_of(defense)
        found.append((dataset, networks, n, epochs))
    return list(dict.fromkeys(found))


def stated(behind: Iterable[Ground]) -> list[str]:
    """The same as four columns: one value where all agree, else all that occur."""
    columns = zip(*grounds(behind), strict=True)
    return ["; ".join(dict.fromkeys(filter(None, each))) for each in columns] or [""] * len(MADE)


def described(behind: Iterable[Ground]) -> list[str]:
    """The same as `digits · resnet8 · n = 200 · 20 epochs`."""
    return [
        " · ".join([dataset, networks, *([f"n = {n}"] if n else []), _epochs(epochs)])
        for dataset, networks, n, epochs in grounds(behind)
    ]


def behind(lines: Sequence[Line]) -> list[Ground]:
    """What these numbers were measured on."""
    return [each for line in lines for each in line.behind]


def _epochs(count: str) -> str:
    if not count:
        return "not trained"
    return f"{count} epoch" if count == "1" else f"{count} epochs"


def values(line: Line) -> list[str]:
    """Published, measured, strongest and verdict."""
    printed = "" if line.number.printed is None else str(line.number.printed)
    value = shown_value(line.measure, line.unit) if line.measure else ""
    return [printed, value, " ".join(filter(None, shown_strongest(line))), verdict(line)]


def brief(line: Line, marks: dict[str, str]) -> list[str]:
    """Column, published, measured, strongest and verdict; what is too long for them goes into
    marks."""
    printed, value, _, said = values(line)
    left, attack = shown_strongest(line)
    if attack:
        left += marks.setdefault(attack, f"[{len(marks) + 1}]")
    if line.measure is None:
        said = marks.setdefault(said, f"[{len(marks) + 1}]")
    return [line.number.column.replace("_", " "), printed, value, left, said]


def label(line: Line) -> str:
    """What the row of a number is called."""
    return ", ".join(str(label) for label in line.number.labels if label is not None)


def unit(table: Table) -> str:
    return f"in {table.unit}" if table.unit else "without a unit"


def notes_of(paper: Paper, tables: Mapping[str, Sequence[Line]]) -> dict[str, list[str]]:
    """The footnotes of each table: those of the print, one where a smaller scale has made cells of
    it cells of a table before it, and one that says what the flags in it are."""
    first: dict[str, str] = {}  # the table in which a cell stands first, by its id
    notes = {}
    for name, lines in tables.items():
        measured = [[cell.id for cell in line.cells] for line in lines if line.cells]
        shared = Counter(first[ids[0]] for ids in measured if first.keys() >= set(ids))
        notes[name] = [
            *paper.tables[name].notes,
            *_shared(shared, len(measured)),
            *_bare(lines),
            *_other_settings(lines),
            *_flags(lines),
        ]
        for ids in measured:
            for each in ids:
                first.setdefault(each, name)
    return notes


def _shared(shared: Mapping[str, int], total: int) -> list[str]:
    if not shared:
        return []
    parts = [f"{count} with {name}" for name, count in shared.items()]
    return [
        f"At this scale {sum(shared.values())} of {total} numbers share their cells with another"
        f" table: {', '.join(parts)}."
    ]


def _bare(lines: Sequence[Line]) -> list[str]:
    """Why numbers that are derived from attacks have no verdict."""
    derived = [line for line in lines if line.number.binding.kind == "derived" and line.measure]
    said = (
        "Numbers made of several cells, or of more than right and wrong answers, have no strongest"
        " attack and no verdict."
    )
    return [said] if derived else []


def _other_settings(lines: Sequence[Line]) -> list[str]:
    """That what stands beside attacks from afar may be stronger by knowing more."""
    afar, said = ("transfer", "blackbox"), "Beside a transfer or black-box attack"
    nearer = any(
        line.cells[0].setting.kind in afar and line.strongest.cell.setting.kind not in afar
        for line in lines
        if line.strongest
    )
    return (
        [f"{said} the strongest one may be of an attacker who has the defense."] if nearer else []
    )


def _flags(lines: Sequence[Line]) -> list[str]:
    """What the flags of the verdicts in a table are called."""
    audited = [line.audited for line in lines if line.measure is not None and line.audited]
    raised = {name for each in audited for name in each.accused}
    ordered = sorted(raised, key=lambda name: int(name[1:]))
    said = [f"{name} {CHECKS[name].title}" for name in ordered]
    return [f"Flags: {'; '.join(said)}."] if said else []


def rule(claim: Claim) -> str:
    """What must be true of the counterpart of a claim; empty where nothing measures it."""
    if claim.text:
        return ""
    if len(claim.order) > 1:
        return f"each of {len(claim.order)} pairs in this order, clearly"
    name, _, limit = claim.holds.partition(":")
    if claim.order:
        name = "positive"
    words = RULES.get(name, claim.holds).format(limit or MARGIN)
    if claim.most or claim.least:
        which = "largest" if claim.most else "smallest"
        return f"of the {which} of {len(claim.most or claim.least)} differences: {words}"
    if claim.count:
        return f"of how many are below {claim.count.below:g}: {words}"
    if claim.curve and claim.curve.left is not None:
        left = f"the first x where {claim.curve.left:g} or less is left"
        words = f"{left}, of the first curve over that of the second: {words}"
    return f"{claim.curve.figure}: {words}" if claim.curve else words


def published(claim: Claim) -> str:
    """What the paper printed, with its unit."""
    return "" if claim.value is None else f"{claim.value} {claim.unit or ''}".strip()


def footnotes(judged: Sequence[Judged]) -> tuple[list[str], list[str]]:
    """The marks of the claims, such as ` [2]`, and the notes in the order of their numbers."""
    notes = list(dict.fromkeys(each.claim.note for each in judged if each.claim.note))
    marks = [f" [{notes.index(each.claim.note) + 1}]" if each.claim.note else "" for each in judged]
    return marks, notes


def _unmeasurable(judged: Judged) -> bool:
    """Whether a claim is a setting, a theorem or somebody else's number."""
    kinds = {line.number.binding.kind for line in judged.lines}
    return bool(judged.claim.text) or not kinds.isdisjoint(("quoted", "text"))


def summary(judged: Sequence[Judged]) -> str:
    """How many claims hold, in one line."""
    counted = {word: [each for each in judged if each.holds == word] for word in ("yes", "no")}
    levels = {
        word: sum(each.claim.value is not None and each.claim.holds == "near" for each in found)
        for word, found in counted.items()
    }
    open_ones = sum(each.holds in ("undecided", "not defined here") for each in judged)
    bare = sum(map(_unmeasurable, judged))
    missing = sum(not each.measured and not _unmeasurable(each) for each in judged)
    apart = len(judged) - sum(map(len, counted.values())) - open_ones - bare - missing
    said = [
        f"{len(counted['yes'])} hold at this scale ({levels['yes']} of them printed levels)",
        f"{len(counted['no'])} do not ({levels['no']} of them levels)",
        f"{open_ones} are not decided by so few images",
        *([f"{apart} are costs of other networks or machines"] if apart else []),
        *([f"{missing} are not measured"] if missing else []),
        f"{bare} have no measured counterpart",
    ]
    return f"{len(judged)} claims: {', '.join(said)}."
