"""Measures what a part of a paper needs, and keeps it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

from robbench import registry
from robbench.audit.planning import probes
from robbench.cell import Cell
from robbench.checkpoints import Shelf, recipe_of
from robbench.datasets import Dataset, kind
from robbench.datasets.described import FACTS, blank, described
from robbench.errors import InputError
from robbench.figures.gallery import Gallery
from robbench.papers import claims as spoken
from robbench.papers.ledger import Ledger
from robbench.papers.paper import CLAIMS, SCALES, Number, Paper, keys, select
from robbench.papers.reproduction import Known, Line, Reproduction
from robbench.records import Store
from robbench.runner import Shared, Training, chain, trainings


@dataclass
class Part:
    """A paper at a scale, or a part of it, over a folder of records."""

    paper: Paper
    scale: str
    out: Path
    load: Callable[[str], Dataset]
    part: str | None = None

    def __post_init__(self) -> None:
        self.reproduction = Reproduction(self.paper, self.scale, self.load)
        costs = self.out / "papers" / f"{self.paper.key}.{self.scale}.costs.json"
        self.costs = Ledger(self.reproduction, costs, self._shelf)
        self.figures = Gallery(self.reproduction, self._drawable(), self.out, self._shelf)
        self._judged: tuple[Known, list[spoken.Judged]] | None = None

    @property
    def _shelf(self) -> Shelf:
        return Shelf([self.out / "checkpoints"])

    def _drawable(self) -> list[str]:
        """The figures that are asked for and can be drawn; claims are about curves of theirs."""
        needed = {claim.curve.figure for claim in self.paper.claims if claim.curve}
        return [
            name
            for name, figure in self.paper.figures.items()
            if figure.draw
            and (self.part in (None, name) or (self.part == CLAIMS and name in needed))
        ]

    @property
    def tables(self) -> list[str]:
        """The tables that are asked for."""
        if self.part is None:
            return list(self.paper.tables)
        return [self.part] if self.part in self.paper.tables else []

    @property
    def claimed(self) -> bool:
        return self.part in (None, CLAIMS)

    def numbers(self) -> list[Number]:
        """All numbers that the part needs: those of its tables, and those that claims refer to."""
        found = {number.path: number for number in self.paper.numbers(self.tables)}
        if self.claimed:
            referred = set(spoken.paths(self.paper))
            for path, number in self._every.items():
                if path in referred or not number.in_table:
                    found.setdefault(path, number)
        return list(found.values())

    @cached_property
    def _every(self) -> dict[str, Number]:
        """The numbers of all tables, and those that only claims have, by path."""
        numbers = (*self.paper.numbers(), *spoken.counterparts(self.paper))
        return {number.path: number for number in numbers}

    @property
    def least(self) -> int:
        """Images of a record that may stand as the strongest attack."""
        return self.reproduction.overlay.strongest_n or 1

    def cells(self) -> list[Cell]:
        """The cells of the part with the probes that verdicts need."""
        cells = self.reproduction.plan(self.numbers(), self.tables)
        cells += self.figures.cells()
        shown = cells if self.tables else []  # nothing else has verdicts
        looked = probes(shown, lambda name: len(self.load(name).test.y))
        return list({cell.id: cell for cell in (*cells, *looked)}.values())

    def trainings(self, shelf: Shelf | None = None) -> list[Training]:
        """What costs and figures that are to be measured need trained."""
        costs = self.costs.trainings(self.costs.of(self.numbers()))
        return list(dict.fromkeys((*costs, *self.figures.trainings(shelf))))

    def measure_costs(self, shared: Shared) -> list[str]:
        """The costs of the part that nobody has measured yet as things are here; why one could not
        be measured."""
        return self.costs.measure(self.costs.of(self.numbers()), shared)

    def doubts(self, known: Known) -> list[str]:
        """A line for every cost and every drawn figure of the part that is not what would be
        measured now."""
        costs = self.costs.doubts(self.costs.of(self.numbers()), self.part is None)
        again = f"run 'robbench reproduce {self.paper.key} --scale {self.scale}'"
        return [*(f"{line}; {again}" for line in costs), *self.figures.doubts(known)]

    def lines(self, known: Known) -> dict[str, list[Line]]:
        """The tables of the part."""
        return {
            name: [
                self.reproduction.line(number, self.paper.tables[name].unit, known)
                for number in self.paper.tables[name].numbers(name)
            ]
            for name in self.tables
        }

    def judged(self, known: Known) -> list[spoken.Judged]:
        """The claims, if the part has them; those without a measured counterpart last. A page and
        what is printed beside it want the same ones, and their tests take a while."""
        if self._judged is None or self._judged[0] is not known:
            self._judged = known, self._judge(known) if self.claimed else []
        return self._judged[1]

    def _judge(self, known: Known) -> list[spoken.Judged]:
        units = {
            number.path: table.unit
            for name, table in self.paper.tables.items()
            for number in table.numbers(name)
        }

        def line_of(path: str) -> Line:
            number = self._every[path]
            unit = None if number.binding.kind == "cost" else units.get(path, "percent")
            return self.reproduction.line(number, unit, known)

        series_of: Callable[[str], spoken.Series] = cache(partial(self.figures.series, known))
        claims = sorted(self.paper.claims, key=lambda claim: bool(claim.text))
        judged = [spoken.judge(claim, line_of, series_of) for claim in claims]
        return [
            each._replace(behind=tuple(self.figures.grounds(each.claim.curve.figure)))
            if each.claim.curve and each.measured
            else each
            for each in judged
        ]

    def attacked(self, known: Known) -> float:
        """Seconds of all attacks behind the part: for tables, claims, figures and verdicts."""
        records = (known.records.get(cell.id) for cell in self.cells())
        return sum(record.cost["seconds"] for record in records if record)

    def trained(self) -> float:
        """Seconds of all trainings behind the cells of the part, oracles and bases among them, each
        once, as the checkpoints beside the records tell."""
        made = {
            key
            for dataset, spec, seed, _ in trainings(self.cells())
            for key, _ in chain(spec, self.load(dataset), seed)
        }
        seconds = 0.0
        for path in filter(None, map(self._shelf.find, sorted(made))):
            seconds += sum(point["seconds"] for point in recipe_of(path)["curve"])
        return seconds


def loader(out: Path, data_dir: Path | None, estimate: bool = False) -> Callable[[str], Dataset]:
    """Datasets by name; where the images are not, what the records below a folder say of them, and
    for an estimate black ones."""

    @cache
    def load(name: str) -> Dataset:
        try:
            return registry.dataset(name, data_dir)
        except InputError as error:
            if kind(name) not in FACTS:
                raise
            if estimate:
                return blank(name)
            said = (record.provenance.get("dataset_hash") for record in Store(out).all(name))
            digest = next(filter(None, said), None)  # a cell that failed early has none
            if digest is None:
                raise InputError(f"{error} (and {out} has no record of it)") from None
            return described(name, str(digest))

    return load


def part_of(what: str, scale: str, out: Path, load: Callable[[str], Dataset]) -> Part:
    """The part that `enresnet:table1` names; InputError for what there is not."""
    paper, part = select(what)
    return Part(paper, scale, out, load, part)


def begun(out: Path) -> list[tuple[str, str]]:
    """(paper, scale) of what a folder has any file of."""
    folder = out / "papers"
    return [
        (key, scale)
        for key in keys()
        for scale in SCALES
        if any(folder.glob(f"{key}.{scale}.*")) or any((folder / key).glob(f"*.{scale}.*"))
    ]


def known_of(part: Part, cells: Sequence[Cell]) -> Known:
    """What the records below the part's folder say of the datasets of these cells."""
    names = sorted({cell.dataset for cell in cells})
    return Known.of([each for name in names for each in Store(part.out).all(name)], part.least)
