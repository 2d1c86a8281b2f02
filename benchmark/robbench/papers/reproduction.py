"""The measured side of a paper at one scale: which cells it needs, and what their records say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from robbench.audit import Audited, audit, badge, is_diagnostic
from robbench.audit.case import parts_of
from robbench.cell import Cell
from robbench.datasets import Dataset
from robbench.defense import Defense
from robbench.errors import InputError
from robbench.metrics import Measure
from robbench.papers.cells import UNBOUNDED, cell_of, shrunk, strongest_of
from robbench.papers.costs import cost_key, deployed
from robbench.papers.derived import bindings_of, measured, size_of, value_of
from robbench.papers.paper import Binding, Number, Paper, Scale
from robbench.records import Record
from robbench.runner import Training
from robbench.siblings import network_of
from robbench.tables import with_interval

SHARES = ("percent", "AUC x 1e-2")  # units whose numbers are printed a hundred times as large
Ground = tuple[str, str, str]  # dataset, defense and n of what was measured; no n: not by images


class Line(NamedTuple):
    """A printed number beside what was measured for it."""

    number: Number
    unit: str | None
    cells: tuple[Cell, ...]
    measure: Measure | None
    why: str  # where there is no measure
    records: tuple[Record, ...] = ()
    strongest: Record | None = None
    audited: Audited | None = None
    deployed: tuple[Training, ...] = ()  # behind a cost

    @property
    def behind(self) -> list[Ground]:
        """All that the number was measured on."""
        cells = [(cell.dataset, cell.defense, str(cell.n)) for cell in self.cells]
        return cells + [(each.dataset, each.defense, "") for each in self.deployed]

    @property
    def seconds(self) -> float:
        """What the attacks on these cells took."""
        return sum(record.cost["seconds"] for record in self.records)


@dataclass
class Reproduction:
    """A paper at a scale. load: a dataset by its name; costs: what was measured, by `cost_key`."""

    paper: Paper
    scale: str
    load: Callable[[str], Dataset]
    costs: dict[str, Measure] = field(default_factory=dict)
    _cells: dict[str, list[Cell]] = field(default_factory=dict)  # by binding: specs take a while
    _suites: dict[str, Cell | None] = field(default_factory=dict)

    @property
    def overlay(self) -> Scale:
        if self.scale not in self.paper.scales:
            known = ", ".join(self.paper.scales)
            raise InputError(f"{self.paper.key} has no scale {self.scale}; write {known}")
        return self.paper.scales[self.scale]  # type: ignore[index]

    def cells_of(self, binding: Binding) -> list[Cell]:
        """The cells behind a binding; none for what is not measured by attacks."""
        key = binding.model_dump_json(exclude={"measure", "source"})
        if key not in self._cells:
            size = 1
            if binding.kind == "derived":
                assert binding.defense and binding.dataset
                size = size_of(shrunk(binding.defense, binding.dataset, self.overlay))
            found = bindings_of(binding, size)
            self._cells[key] = [cell_of(each, self.overlay, self.load) for each in found]
        return self._cells[key]

    def plan(self, numbers: Sequence[Number], tables: Sequence[str]) -> list[Cell]:
        """All cells that these numbers need; last the strongest attacks beside those of these
        tables, as what stands alone is shown without a verdict."""
        cells: dict[str, Cell] = {}
        beside: dict[str, Cell] = {}
        for number in numbers:
            for cell in self.cells_of(number.binding):
                cells.setdefault(cell.id, cell)
                shown = number.path.partition("/")[0] in tables
                suite = self.strongest(number.binding, cell) if shown else None
                if suite:
                    beside.setdefault(suite.id, suite)
        return list({**cells, **beside}.values())

    def strongest(self, binding: Binding, cell: Cell) -> Cell | None:
        """The suite beside one cell of a number, where the number is an accuracy under attack."""
        if not comparable(binding, cell):
            return None
        key = repr((threat_of(cell), min(cell.n, self.overlay.strongest_n or cell.n)))
        if key not in self._suites:
            self._suites[key] = strongest_of(cell, self.overlay, self.load)
        return self._suites[key]

    def line(self, number: Number, unit: str | None, known: Known) -> Line:
        """One number beside what the records say."""
        binding = number.binding
        if binding.kind == "cost":
            measure = self.costs.get(cost_key(binding, self.overlay))
            made = Line(number, unit, (), measure, "" if measure else "not measured")
            return made._replace(deployed=tuple(deployed(binding, self.overlay)))
        if binding.kind in ("quoted", "text"):
            said = f"quoted: {binding.source}" if binding.kind == "quoted" else binding.source
            return Line(number, unit, (), None, str(said))
        cells = tuple(self.cells_of(binding))
        found = tuple(known.records[cell.id] for cell in cells if cell.id in known.records)
        if len(found) < len(cells):
            failed = [known.failed[cell.id] for cell in cells if cell.id in known.failed]
            why = f"failed: {failed[0]}" if failed else "not measured"
            return Line(number, unit, cells, None, why, found)
        try:
            measure = value_of(binding, found)
        except InputError as error:
            return Line(number, unit, cells, None, str(error), found)
        line = Line(number, unit, cells, measure, "", found)
        if binding.kind != "cell" or binding.measure.startswith("clean"):
            return line  # no attack on one defense, no verdict on it
        if comparable(binding, cells[0]):
            line = line._replace(strongest=known.weakest(cells[0], binding.measure))
        return line._replace(audited=known.audits.get(cells[0].id))


def comparable(binding: Binding, cell: Cell) -> bool:
    """Whether other attacks on the same defense may stand beside a number: it is an accuracy under
    an attack with an ε that the paper counts."""
    under_attack = binding.kind == "cell" and not binding.measure.startswith("clean")
    aimed = cell.threat.target != "none" and cell.setting.kind == "transfer"
    bound = cell.threat.eps is not None and binding.eps != UNBOUNDED
    return under_attack and bound and not aimed


class Known(NamedTuple):
    """What has been measured so far: finished records by cell id, why others failed, what the
    checks say of them, and the attacks on every defense and threat."""

    records: Mapping[str, Record]
    failed: Mapping[str, str]
    audits: Mapping[str, Audited]
    attacks: Mapping[tuple[object, ...], Sequence[Record]]

    @classmethod
    def of(
        cls, records: Sequence[Record], least: int, audits: Mapping[str, Audited] | None = None
    ) -> Known:
        """least: images of a record that may stand as the strongest attack. audits: what `audit`
        says of all these records, for a caller who has asked it already."""
        finished = {record.id: record for record in records if record.status == "ok"}
        if audits is None:
            audits = {}
            for dataset in dict.fromkeys(record.cell.dataset for record in records):
                audits |= audit([record for record in records if record.cell.dataset == dataset])
        failed = {record.id: record.reason or "" for record in records if record.status != "ok"}
        return cls(finished, failed, audits, by_threat(records, least))

    def weakest(self, cell: Cell, measure: str) -> Record | None:
        """The record with the least of a measure, of errors the most, among the attacks on the
        cell's defense and threat."""
        found = self.attacks.get(threat_of(cell), ())
        worst = max if measure == "incorrect" else min
        return worst(found, key=lambda record: measured(record, measure).value, default=None)


def threat_of(cell: Cell) -> tuple[object, ...]:
    """What two cells share whose accuracies bound the same robustness."""
    plain = cell.threat.model_copy(update={"target": "none"})
    return cell.dataset, cell.data, cell.defense, cell.defense_version, plain, cell.train_seed


def by_threat(records: Sequence[Record], least: int) -> dict[tuple[object, ...], list[Record]]:
    """Of every defense and threat the attacks for an error, on `least` images or more."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        cell = record.cell
        if record.status != "ok" or cell.n < least or is_diagnostic(cell):
            continue
        if cell.threat.goal == "error":
            found.setdefault(threat_of(cell), []).append(record)
    return found


def shown_value(measure: Measure, unit: str | None) -> str:
    """A number with its interval in the unit of its table."""
    if unit in SHARES:
        return with_interval(measure).replace(" ()", "")
    low, high = measure.interval
    value = f"{measure.value:.4g}" if measure.value == measure.value else "n.a."
    return f"{value} ({low:.4g}–{high:.4g})" if low == low else value


def shown_strongest(line: Line) -> tuple[str, str]:
    """The least that any attack left of what the number counts, and the attack with the number of
    its images, or why nothing stands there."""
    if line.strongest is None:
        binding = line.number.binding
        attacked = binding.kind == "cell" and not binding.measure.startswith("clean")
        unbound = line.measure is not None and attacked and binding.eps == UNBOUNDED
        return "", "no ε to compare at" if unbound else ""
    record = line.strongest
    value = with_interval(measured(record, line.number.binding.measure))
    return value, f"{record.cell.attack}, n = {record.cell.n}"


def verdict(line: Line) -> str:
    """The badge of the attack that the paper used, or why there is no number."""
    if line.measure is None:
        return line.why
    return badge(line.audited) if line.audited else ""


def made_of(defense: str) -> tuple[str, str]:
    """Networks with the number of their members, and the epochs, of a defense."""
    parts = parts_of(defense)
    networks = ", ".join(
        f"{part.size} × {network_of(part)}" if part.size > 1 else network_of(part) for part in parts
    )
    return networks, ", ".join(map(_epochs, parts))


def _epochs(part: Defense) -> str:
    own = [str(part.epochs)] if part.epochs else []
    return " + ".join([*map(_epochs, part.bases()), *own])
