"""A record beside the records that speak for or against it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np

from robbench.attacks import Attack, Configured
from robbench.attacks.published import in_effect
from robbench.audit.flags import enough
from robbench.cell import MODEL, Cell
from robbench.defense import Defense, resolve
from robbench.errors import InputError
from robbench.records import Record
from robbench.siblings import siblings

POINTS = 0.02
TURNED = 0.5  # of an image's decisions more under one attack than under another: no luck of draws
ONE_STEP = (
    "fgsm",
    "step-target",
    "torchattacks:FGSM",
    "torchattacks:FFGSM",
    "art:FastGradientMethod",
)
AVERAGED = 10  # draws
Key = tuple[object, ...]


def estimator_of(cell: Cell) -> Key:
    """What cells of the same trained defense have in common."""
    return cell.dataset, cell.data, cell.defense, cell.defense_version, cell.train_seed


def attack_key(cell: Cell) -> Key:
    """What cells of different defenses have in common in one table."""
    return cell.dataset, cell.attack, cell.threat, cell.n, cell.setting.kind


def unseeded(cell: Cell) -> str:
    """What cells have in common that differ in their seeds alone."""
    return cell.model_copy(update={"seed": 0, "train_seed": 0}).id


@dataclass
class Board:
    """Records by estimator, by defense whatever its version, those of all defenses under the same
    attack, and those of one cell whatever its seeds."""

    by_estimator: dict[Key, list[Record]] = field(default_factory=lambda: defaultdict(list))
    by_defense: dict[Key, list[Record]] = field(default_factory=lambda: defaultdict(list))
    by_attack: dict[Key, list[Record]] = field(default_factory=lambda: defaultdict(list))
    by_cell: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))

    def add(self, record: Record) -> None:
        cell = record.cell
        self.by_estimator[estimator_of(cell)].append(record)
        self.by_defense[cell.dataset, cell.defense, cell.train_seed].append(record)
        self.by_attack[attack_key(cell)].append(record)
        self.by_cell[unseeded(cell)].append(record)


@dataclass
class Case:
    """One record, the finished records of the same estimator, and all of the board."""

    record: Record
    board: Board

    @property
    def cell(self) -> Cell:
        return self.record.cell

    @cached_property
    def peers(self) -> list[Record]:
        """Finished records of the same estimator, without this one."""
        own = self.board.by_estimator[estimator_of(self.cell)]
        return [peer for peer in own if peer.status == "ok" and peer.id != self.record.id]

    @cached_property
    def attack(self) -> Attack | None:
        """The attack; None for one of a plugin that is not installed."""
        configured = attack_of(self.cell.attack)
        return configured.entry if configured else None

    @property
    def settings(self) -> Mapping[str, Any]:
        return settings_of(self.record)

    @property
    def parts(self) -> tuple[Defense, ...]:
        """The defense's parts; none for a model of the caller, or of a plugin not installed."""
        return parts_of(self.cell.defense)

    @property
    def stochastic(self) -> bool:
        return self.record.draws > 1

    @property
    def eot(self) -> int:
        """Draws behind a gradient; those that auto has chosen are in the record."""
        eot = self.cell.setting.eot
        return int(self.record.provenance.get("eot", {}).get("chosen", 1)) if eot == "auto" else eot

    @property
    def averaged(self) -> bool:
        """What the attack saw of one step is more than the luck of a draw."""
        return not self.stochastic or self.eot >= AVERAGED

    @property
    def decided(self) -> bool:
        """What the attack saw of one step is more than the luck of one decision."""
        per_call = max((part.draws for part in self.parts), default=1)
        return not self.stochastic or self.eot >= AVERAGED * per_call

    @property
    def climbs(self) -> bool:
        """An iterative search with gradients on the defense itself, for any error."""
        direct = self.cell.setting.kind in ("whitebox", "adaptive")
        return (
            self.record.status == "ok"
            and direct
            and self.attack is not None
            and self.attack.needs == "gradients"
            and not self.attack.diagnostic
            and not self.cell.threat.targeted
            and kind(self.record) not in ONE_STEP
        )

    @property
    def challenged(self) -> bool:
        """Whether another kind of attack, of more than one step, was tried under this threat."""
        return any(
            self.same_threat(peer)
            and kind(peer) not in (kind(self.record), *ONE_STEP)
            and not is_diagnostic(peer.cell)
            for peer in self.peers
        )

    @cached_property
    def harm(self) -> np.ndarray:
        return harm(self.record)

    @cached_property
    def lost(self) -> np.ndarray:
        """(N,) the share lost as attacks count it: no answer is half of an error."""
        record = self.record
        assert record.ok is not None
        missed = 1 - record.ok.astype(np.float64) / record.draws
        return missed if self.cell.threat.goal == "denial" else (missed + self.harm) / 2

    def same_threat(self, other: Record, weaker: bool = True) -> bool:
        """Whether what the other attack did lies within this one's threat."""
        mine, theirs = self.cell.threat, other.cell.threat
        if (mine.norm, mine.goal) != (theirs.norm, theirs.goal) or mine.targeted:
            return False
        if theirs.targeted:
            return False
        if mine.eps is None or theirs.eps is None:
            return mine.eps == theirs.eps
        return theirs.eps <= mine.eps if weaker else theirs.eps == mine.eps

    def only(self, other: Record) -> np.ndarray:
        """Images that are right when clean, and of whose decisions the other attack turned half
        more than this one did."""
        n = min(self.cell.n, other.cell.n)
        assert self.record.clean_ok is not None
        right = self.record.clean_ok[:n] > self.record.draws / 2
        return np.flatnonzero(right & (harm(other)[:n] - self.harm[:n] >= TURNED))

    def better(self, other: Record) -> tuple[np.ndarray, float]:
        """The images of `only`, if they are more than luck, and the mean share lost more, if it
        is more than noise, 2 points and 2 standard errors; nothing and 0 otherwise."""
        n = min(self.cell.n, other.cell.n)
        images = self.only(other)
        gaps = harm(other)[:n] - self.harm[:n]
        gain = float(gaps.mean())
        error = float(gaps.std(ddof=1)) / np.sqrt(n) if n > 1 else np.inf
        if gain <= max(POINTS, 2 * error) or not enough(round(gain * n), n):
            gain = 0.0
        return images if enough(len(images), n) else images[:0], gain

    def alike(self, other: Record, *but: str) -> bool:
        """The same attack in the same setting, whatever these settings of it are."""
        mine, theirs = self.cell, other.cell
        if kind(self.record) != kind(other):
            return False
        kinds = (
            (mine.setting.kind, mine.setting.oracle),
            (theirs.setting.kind, theirs.setting.oracle),
        )
        if kinds[0] != kinds[1] or ("eot" not in but and mine.setting.eot != theirs.setting.eot):
            return False
        if (mine.seed, mine.threat.goal, mine.threat.target) != (
            theirs.seed,
            theirs.threat.goal,
            theirs.threat.target,
        ):
            return False
        return self.same_settings(other, *but)

    def same_settings(self, other: Record, *but: str) -> bool:
        """Whether both attacks ran with the same settings, leaving these aside."""
        first, second = self.settings, settings_of(other)
        return all(first.get(key) == second.get(key) for key in {*first, *second} - set(but))

    def probe(self) -> dict[str, Any] | None:
        """What was seen of the estimator before it was attacked, on most images."""
        records = [self.record, *self.peers]
        looked = [each for each in records if kind(each) == "probe" and "probe" in each.provenance]
        if not looked:
            return None
        seen: dict[str, Any] = max(looked, key=lambda each: (each.cell.n, each.id)).provenance[
            "probe"
        ]
        return seen

    def relatives(self, relation: str) -> list[Record]:
        """Finished records of the defenses in this relation to this one."""
        if not self.parts:
            return []
        cell = self.cell
        return [
            record
            for sibling in _siblings(cell.defense, cell.dataset, relation)
            for record in self.board.by_defense[cell.dataset, sibling, cell.train_seed]
            if record.status == "ok" and record.cell.data == cell.data
        ]


def kind(record: Record) -> str:
    """The name of the attack, as published or not."""
    return record.cell.attack.partition("(")[0].removesuffix(":as-published")


def harm(record: Record) -> np.ndarray:
    """(N,) the share of an image's decisions that the attacker wanted."""
    assert record.ok is not None and record.err is not None
    if record.cell.threat.goal == "denial":
        return 1 - record.ok.astype(np.float64) / record.draws
    return record.err.astype(np.float64) / record.draws


def settings_of(record: Record) -> Mapping[str, Any]:
    """All settings that the attack ran with; none where it is not installed."""
    return settings_in(record.cell.attack)


@cache
def settings_in(text: str) -> Mapping[str, Any]:
    """The same of the spec of an attack."""
    configured = attack_of(text)
    return in_effect(configured) if configured else {}


@cache
def attack_of(text: str) -> Configured | None:
    """The attack of a spec; None for one of a plugin that is not installed."""
    try:
        return Configured.of(text)
    except InputError:
        return None


@cache
def _siblings(defense: str, dataset: str, relation: str) -> list[str]:
    return siblings(defense, dataset, relation)


@cache
def parts_of(defense: str) -> tuple[Defense, ...]:
    if defense.startswith(MODEL):
        return ()
    try:
        return resolve(defense)
    except InputError:
        return ()


def cases(records: Iterable[Record]) -> list[Case]:
    """Every record beside all of them."""
    board, listed = Board(), sorted(records, key=lambda record: record.id)
    for record in listed:
        board.add(record)
    return [Case(record, board) for record in listed]


def is_diagnostic(cell: Cell) -> bool:
    """Whether the cell is of no attack: it stands in no table of accuracies."""
    configured = attack_of(cell.attack)
    return configured is not None and configured.entry.diagnostic
