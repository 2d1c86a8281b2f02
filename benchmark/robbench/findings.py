"""The published evaluations on trial: each paper's claim beside its own attack and the strongest
one at this benchmark's scale, with the flags that the first raises. From records alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict

from robbench.attacks import Configured
from robbench.attacks.suite import BUDGETS
from robbench.audit import Audited, audit, badge
from robbench.cell import Kind
from robbench.defense import shown, with_preset
from robbench.errors import InputError
from robbench.records import Record
from robbench.tables import Row, broken_by, rows, setting_text, tabulated, with_interval
from robbench.threat import Norm, Threat, parse_eps

BEGIN = "<!-- written by `robbench leaderboard --findings` from here -->"
END = "<!-- to here -->"


class Finding(BaseModel):
    """A published claim, and the paper's own attack as it is run here."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    defense: str
    paper: str
    claim: str
    attack: str
    measured: str | None = None
    setting: Kind | None = None
    norm: Norm = "linf"
    eps: Annotated[Fraction, BeforeValidator(parse_eps)] = Fraction(1, 10)
    foreseen: Mapping[str, str] = {}

    @property
    def threat(self) -> Threat:
        return Threat(norm=self.norm, eps=self.eps)


@cache
def on_trial() -> list[Finding]:
    """All that is on trial."""
    text = resources.files("robbench").joinpath("findings.yaml").read_text(encoding="utf-8")
    return [Finding(**each) for each in yaml.safe_load(text)]


def findings(
    records: Sequence[Record], dataset: str, audits: Mapping[str, Audited] | None = None
) -> str:
    """The tables of the page, as markdown: published evaluations, then every defense.

    audits: what `audit` says of all records of the dataset, for who has asked it already.
    """
    own = [record for record in records if record.cell.dataset == dataset]
    audits = audit(own) if audits is None else audits
    made = [row for row in rows(own, audits) if row.metrics is not None and row.audited]
    plain = [row for row in made if row.cell.threat.goal == "error" and not row.cell.seed]
    tried = [_tried(finding, plain, dataset) for finding in on_trial()]
    headers = [
        "paper", "defense", "published claim", "its paper's attack, here", "n", "accuracy %",
        "verdict", "raised", "foreseen",
    ]  # fmt: skip
    reasons = [
        f"- {finding.defense}, `{finding.attack}`: "
        + "; ".join(f"{name}: {reason}" for name, reason in finding.foreseen.items())
        for finding in on_trial()
        if finding.foreseen
    ]
    return "\n".join(
        [
            f"### The published evaluations ({dataset}, {on_trial()[0].threat})",
            "",
            tabulated(tried, headers),
            "",
            "✓ foreseen and raised, ✗ looked for and not raised, ? no evidence for or against; in"
            " brackets what is information only. Why they were foreseen, from the texts and the"
            " released code:",
            "",
            *reasons,
            "",
            f"### Every defense ({dataset}, {on_trial()[0].threat})",
            "",
            tabulated(list(_every(plain, dataset)), EVERY),
        ]
    )


EVERY = [
    "defense",
    "published claim",
    "under its paper's attack %",
    "under the strongest %",
    "strongest attack",
    "n",
    "badge",
    "broken most by",
]


def _of(text: str, dataset: str) -> str:
    try:
        return str(with_preset(text, "quick", dataset))
    except InputError:
        return text


def _published(finding: Finding, made: Sequence[Row], dataset: str) -> Row | None:
    """The row of the paper's own attack, on most images and with the fewest draws."""
    attack = str(Configured.of(finding.attack).spec)
    names = (finding.measured, finding.defense)
    for name in filter(None, names):
        found = [
            row
            for row in made
            if row.cell.defense == _of(name, dataset)
            and row.cell.attack == attack
            and row.cell.threat == finding.threat
            and finding.setting in (None, row.cell.setting.kind)
            and row.cell.train_seed == 0
        ]
        if found:
            # of the draws that an audit tries, those that the paper is nearest to
            return max(found, key=lambda row: (row.cell.n, -_draws(row), row.cell.id))
    return None


def _draws(row: Row) -> int:
    return row.cell.setting.eot if isinstance(row.cell.setting.eot, int) else 0


def _tried(finding: Finding, made: Sequence[Row], dataset: str) -> list[object]:
    row = _published(finding, made, dataset)
    start = [finding.paper, f"`{finding.defense}`", finding.claim]
    if row is None or row.metrics is None or row.audited is None:
        return [
            *start,
            f"`{finding.attack}`",
            "",
            "not measured",
            "",
            "",
            ", ".join(finding.foreseen),
        ]
    raised = dict.fromkeys(flag.id for flag in row.audited.flags if flag.verdict != "INFO")
    said = dict.fromkeys(flag.id for flag in row.audited.flags if flag.verdict == "INFO")
    return [
        *start,
        f"`{row.cell.attack}`, {setting_text(row.cell, False)}",
        row.cell.n,
        with_interval(row.metrics.accuracy),
        badge(row.audited),
        ", ".join([*raised, *(f"({name})" for name in said)]),
        ", ".join(_came(name, {*raised, *said}, row.audited) for name in finding.foreseen),
    ]


def _came(name: str, raised: set[str], audited: Audited) -> str:
    """A foreseen flag with what became of it: ✓ raised, ✗ looked for in vain, ? no evidence."""
    return f"{name} {'✓' if name in raised else '✗' if name in audited.assessed else '?'}"


def _every(made: Sequence[Row], dataset: str) -> Iterable[list[object]]:
    """A line for each defense: what was claimed, its paper's attack, the strongest one."""
    at = [row for row in made if row.cell.threat == on_trial()[0].threat]
    by_defense: dict[str, list[Row]] = {}
    for row in at:
        if row.cell.setting.kind in ("whitebox", "adaptive") and not row.cell.train_seed:
            by_defense.setdefault(row.cell.defense, []).append(row)
    for defense in sorted(by_defense, key=lambda text: shown(text, dataset)):
        suites = [row for row in by_defense[defense] if row.cell.attack.startswith("strongest")]
        if not suites:
            continue
        best = min(suites, key=_depth)
        finding = next((f for f in on_trial() if _of(f.defense, dataset) == defense), None)
        published = _published(finding, made, dataset) if finding else None
        assert best.metrics and best.record and best.audited
        yield [
            f"`{shown(defense, dataset)}`",
            finding.claim if finding else "",
            with_interval(published.metrics.accuracy) if published and published.metrics else "",
            with_interval(best.metrics.accuracy),
            f"`{best.cell.attack}`",
            best.cell.n,
            badge(best.audited),
            broken_by(best.record),
        ]


def _depth(row: Row) -> tuple[int, int]:
    """The suite of the largest budget, then of most images, first."""
    budget: Any = Configured.of(row.cell.attack).settings["budget"]
    return -BUDGETS.index(budget), -row.cell.n


def page(
    old: str,
    records: Sequence[Record],
    audits: Mapping[str, Audited] | None = None,
    dataset: str = "digits",
) -> str:
    """The page with its tables written anew, between the two marks; InputError without them."""
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise InputError(
            f"the page has no place for the tables; write {BEGIN!r} and {END!r} into it"
        )
    return f"{head}{BEGIN}\n\n{findings(records, dataset, audits)}\n\n{END}{tail}"
