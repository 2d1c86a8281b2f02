"""The generated pages of a leaderboard folder: a pure function of its records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain

from robbench import accounting
from robbench.audit import Audited, audit, badge
from robbench.defense import shown
from robbench.metrics import Measure, contributions
from robbench.ranking import RANKED, Standing, newest_of_each, ranking_lines, standings
from robbench.records import Record, newest, without_versions
from robbench.tables import (
    FOOTNOTE,
    Row,
    comma_separated,
    group_table,
    groups,
    left_out,
    page_name,
    percent,
    remarks,
    rows,
    setting_text,
    tabulated,
    with_interval,
)
from robbench.threat import format_eps

WRITTEN = "Written by `robbench leaderboard` from records/; never edited."
LEGEND = (
    "*badge*: the worst flag of a number decides (docs/flags.md). *sound*: audited, adaptive, no"
    " flag beyond a warning. *overestimate*, *invalid*: shown and not ranked. *not adaptive*: not"
    " by the attacker who knows the defense. *not audited*: too little is known about it."
    " *robust with detection*: right on x, and on x' right or refused. *all records*: what is left"
    " when every recorded attack on these images counts, for deterministic defenses. Every row is"
    " one trained model: training again moves a number by points (*Several seeds*). Where only weak"
    " attacks were recorded, what is robust is accused of them first: `strongest` ranks it."
)


def board(dataset: str, made: Sequence[Row], superseded: int = 0) -> str:
    """Who stands where, and what the defenses are worth when nobody attacks.

    superseded: how many records of older versions are left out.
    """
    finished = [row for row in made if row.metrics is not None]
    every = f"{page_name(dataset)}.cells.md"
    lines = [f"# {dataset}", "", f"Every cell: [{every}]({every}).", ""]
    for threat, placed in standings(finished):
        lines += [f"## Ranking, {threat}", "", _ranking(placed), ""]
    for title, text in (
        ("Several seeds and trained models", accounting.seeds(finished)),
        ("Fresh draws, known draws, none", accounting.regimes(finished)),
        ("Clean", _clean_table(finished)),
    ):
        lines += [f"## {title}", "", text, ""] if text else []
    return "\n".join([*lines, *_foot(superseded), LEGEND, "", WRITTEN, ""])


def cells(dataset: str, made: Sequence[Row], superseded: int = 0) -> str:
    """Every cell, by attack, norm and n."""
    lines = [f"# {dataset}, every cell", ""]
    for title, group in groups([row for row in made if row.metrics is not None]):
        lines += [f"## {title}", "", group_table(group), ""]
        said = "\n".join(
            f"- `{shown(row.cell.defense, row.cell.dataset)}`, {setting_text(row.cell, False)}:"
            f" {remark}"
            for row in group
            for remark in (remarks(row.record) if row.record else ())
            if "broken by" not in remark
        )
        for heading_of, text in (
            ("Accuracy % by oracle:", _matrix(group)),
            ("", said),
            ("Random defenses, draw by draw:", accounting.draws(group)),
            ("Where something refuses:", accounting.refusals(group)),
            ("Detectors against what succeeded:", accounting.detections(group)),
            ("What each stage of the suites did:", _stages_table(group)),
        ):
            lines += [*([heading_of, ""] if heading_of else []), text, ""] if text else []
    text = "\n".join([*lines, *_foot(superseded), WRITTEN, ""])
    # columns that are padded to one width would double a page of this length
    return re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", text))


def _foot(superseded: int) -> list[str]:
    left = [left_out(superseded), ""] if superseded else []
    return [*left, FOOTNOTE, ""]


def _ranking(placed: Sequence[Standing]) -> str:
    lines = [
        [with_interval(cell) if isinstance(cell, Measure) else "" if cell is None else cell
         for cell in line]
        for line in ranking_lines(placed)
    ]  # fmt: skip
    return tabulated(lines, RANKED)


def _clean_table(made: Sequence[Row]) -> str:
    """One line per defense, n and seed: every record carries the clean outcome. Of a defense whose
    version was raised, not every attack may have been run again."""
    seen: dict[tuple[object, ...], list[object]] = {}
    for row in chain.from_iterable(newest_of_each(made)):
        assert row.metrics is not None
        cell = row.cell
        key = (cell.defense, cell.n, cell.train_seed)  # attack seeds only draw again
        seen.setdefault(
            key,
            [
                f"`{shown(cell.defense, cell.dataset)}`",
                with_interval(row.metrics.clean),
                with_interval(row.metrics.clean_abstained),
                cell.n,
                cell.train_seed,
            ],
        )
    ordered = [seen[key] for key in sorted(seen, key=str)]
    headers = ["defense", "clean accuracy %", "abstained %", "n", "train seed"]
    return tabulated(ordered, headers)


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
    return tabulated(lines, headers, style) if found else ""


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
    return tabulated(lines, headers) if lines else ""


def pages(
    dataset: str, records: Sequence[Record], audits: Mapping[str, Audited] | None = None
) -> dict[str, str]:
    """File name -> text of the generated pages of a dataset: of every cell, whatever its versions,
    the newest record, if it is a finished one.

    audits: what `audit` says of all these records, for a caller who has asked it already.
    """
    finished = [record for record in records if record.status == "ok"]
    current = newest(records, without_versions)
    audits = audit(current) if audits is None else audits
    made = rows([record for record in current if record.status == "ok"], audits)
    left, name = len(finished) - sum(r.status == "ok" for r in current), page_name(dataset)
    return {
        f"{name}.md": board(dataset, made, left),
        f"{name}.cells.md": cells(dataset, made, left),
        f"{name}.csv": comma_separated(made),
        f"{name}.flags.json": flags_text(audits),
    }


def flags_text(audits: Mapping[str, Audited]) -> str:
    """What the checks say of each record, by its id, one line each."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(_plain(audits[name]), ensure_ascii=False)}"
        for name in sorted(audits)
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plain(found: Audited) -> dict[str, object]:
    flags = [{**flag._asdict(), "images": _ranges(flag.images)} for flag in found.flags]
    return {"badge": badge(found), "assessed": " ".join(found.assessed), "flags": flags}


def _ranges(images: Sequence[int]) -> str:
    """0-3,7: places in the evaluated order."""
    runs: list[list[int]] = []
    for image in sorted(images):
        if runs and runs[-1][1] == image - 1:
            runs[-1][1] = image
        else:
            runs.append([image, image])
    return ",".join(f"{low}-{high}" if low < high else f"{low}" for low, high in runs)
