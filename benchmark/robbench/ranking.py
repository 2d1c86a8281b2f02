"""Who stands where: under each threat, defenses by their strongest sound number."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from robbench.audit import badge
from robbench.defense import shown
from robbench.metrics import Measure, detected, share
from robbench.records import version_numbers
from robbench.tables import Row, setting_text
from robbench.threat import NORM_NAMES, Threat

ENOUGH = 100  # images: numbers on fewer rank nobody who has others


class Standing(NamedTuple):
    """A defense under a threat: the row it is ranked by - its strongest sound one, or the lowest of
    those that are not - and what is left per image when every recorded attack on that many images
    counts (None where draws make the least of several numbers too low)."""

    place: int | None  # None: not ranked
    row: Row
    worst: Measure | None


def standings(made: Iterable[Row]) -> list[tuple[Threat, list[Standing]]]:
    """Every threat under which a defense has a sound number, and all defenses under it, each as it
    is now and trained once: the trained model that was attacked most stands for it."""
    by_threat: dict[Threat, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in chain.from_iterable(map(_of_one_model, newest_of_each(made))):
        threat = row.cell.threat
        ranked = threat.goal == "error" and not threat.targeted and threat.eps is not None
        if row.metrics is not None and row.audited is not None and ranked:
            by_threat[threat][row.cell.defense].append(row)
    ordered = sorted(by_threat, key=lambda threat: (NORM_NAMES.index(threat.norm), threat.eps))
    found = [(threat, _standings(list(by_threat[threat].values()))) for threat in ordered]
    return [(threat, placed) for threat, placed in found if placed[0].place is not None]


def newest_of_each(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of every defense in its newest version; of two data sets of one name those on the
    one that was attacked more."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.cell.defense, row.cell.defense_version, row.cell.data].append(row)
    newest: dict[str, tuple[tuple[int, ...], int, list[Row]]] = {}
    for (defense, version, _), group in groups.items():
        candidate = (version_numbers(version), len(group), group)
        if defense not in newest or candidate[:2] > newest[defense][:2]:
            newest[defense] = candidate
    return [group for _, _, group in newest.values()]


def _of_one_model(group: Sequence[Row]) -> list[Row]:
    """Those of the trained model that was attacked most."""
    counts = Counter(row.cell.train_seed for row in group)
    model = min(counts, key=lambda seed: (-counts[seed], seed))
    return [row for row in group if row.cell.train_seed == model]


def _standings(defenses: Sequence[Sequence[Row]]) -> list[Standing]:
    listed = []
    for rows in defenses:
        sound = [row for row in rows if row.audited and row.audited.sound]
        direct = [row for row in rows if row.cell.setting.kind in ("whitebox", "adaptive")]
        row = _lowest(sound or direct or rows)
        listed.append((bool(sound), row, _worst(row, rows)))

    def order(entry: tuple[bool, Row, Measure | None]) -> tuple[object, ...]:
        sound, row, _ = entry
        assert row.metrics is not None
        return not sound, -row.metrics.robust_with_detection.value, row.cell.defense

    listed.sort(key=order)
    values = [row.metrics.robust_with_detection.value for _, row, _ in listed if row.metrics]
    return [  # who has the same number has the same place
        Standing(values.index(values[index]) + 1 if sound else None, row, worst)
        for index, (sound, row, worst) in enumerate(listed)
    ]


def _lowest(rows: Sequence[Row]) -> Row:
    """The strongest attack on the images that all of them attacked, of those on enough images; of
    equals the deeper one."""
    enough = [row for row in rows if row.cell.n >= ENOUGH]
    if not enough:  # a few images are all there is, or all that anybody took
        most = max(row.cell.n for row in rows)
        enough = [row for row in rows if row.cell.n == most]
    common = min(row.cell.n for row in enough)

    def order(row: Row) -> tuple[object, ...]:
        assert row.record is not None
        suite = row.audited is not None and row.audited.staged
        lost = float(detected(row.record)[:common].mean())
        return lost, not suite, -row.cell.n, row.cell.id

    return min(enough, key=order)


def _worst(row: Row, rows: Sequence[Row]) -> Measure | None:
    assert row.record is not None
    if row.record.draws > 1:
        return None
    n = row.cell.n
    all_of_them = [detected(r.record)[:n] for r in rows if r.record and r.cell.n >= n]
    return share(np.min(all_of_them, axis=0), 1)


def ranking_lines(placed: Sequence[Standing]) -> list[list[object]]:
    """A line of cells for each standing, as `RANKED` heads them."""
    lines: list[list[object]] = []
    for standing in placed:
        row = standing.row
        assert row.metrics is not None and row.audited is not None
        lines.append(
            [
                standing.place or "–",
                f"`{shown(row.cell.defense, row.cell.dataset)}`"
                + (f" train seed {row.cell.train_seed}" if row.cell.train_seed else ""),
                row.metrics.robust_with_detection,
                row.metrics.accuracy,
                f"`{row.cell.attack}`, {setting_text(row.cell, False)}",
                row.cell.n,
                row.metrics.clean,
                standing.worst,
                badge(row.audited),
            ]
        )
    return lines


RANKED = [
    "",
    "defense",
    "robust with detection %",
    "accuracy %",
    "strongest sound attack",
    "n",
    "clean %",
    "all records %",
    "badge",
]
