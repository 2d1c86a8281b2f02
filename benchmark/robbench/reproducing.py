"""Measures what a part of a paper needs, and keeps it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from robbench import figures, registry
from robbench.audit.planning import probes
from robbench.checkpoints import Shelf, key_of, recipe_of
from robbench.datasets import Dataset, kind
from robbench.datasets.described import FACTS, blank, described
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.figures import Drawing, Rows
from robbench.figures.kept import keep, kept_of, outdated, plan_of
from robbench.grid import Cell
from robbench.papers import claims as spoken
from robbench.papers.inputs import Noting
from robbench.papers.ledger import Ledger
from robbench.papers.paper import SCALES, Binding, Figure, Number, Paper, keys, select
from robbench.papers.reproduction import Known, Line, Reproduction
from robbench.records import Store
from robbench.runner import Shared, Training
from robbench.tables import as_csv

CLAIMS = "claims"


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

    @property
    def figures(self) -> dict[str, Figure]:
        """The figures that are asked for and can be drawn; claims are about curves of theirs."""
        needed = {claim.curve.figure for claim in self.paper.claims if claim.curve}
        return {
            name: figure
            for name, figure in self.paper.figures.items()
            if figure.draw
            and (self.part in (None, name) or (self.part == CLAIMS and name in needed))
        }

    def cells(self) -> list[Cell]:
        """The cells of the part with the probes that verdicts need."""
        cells = self.reproduction.plan(self.numbers())
        for figure in self.figures.values():
            for fields in figures.drawings.get(str(figure.draw)).bindings(figure.arguments):
                cells += self.reproduction.cells_of(Binding.model_validate(fields))
        looked = probes(cells, lambda name: len(self.load(name).test.y))
        return list({cell.id: cell for cell in (*cells, *looked)}.values())

    def trainings(self, shelf: Shelf | None = None) -> list[Training]:
        """What costs and figures that are to be measured need trained."""
        found = self.costs.trainings(self.costs.of(self.numbers()))
        for drawing, arguments in self._computed(shelf):
            found += drawing.trainings(self.reproduction, arguments)
        for cell in self.shown(shelf):
            found += [
                Training(cell.dataset, spec, cell.train_seed)
                for spec in (*cell.sources(), cell.defense)
            ]
        return list(dict.fromkeys(found))

    def shown(self, shelf: Shelf | None = None) -> list[Cell]:
        """The cells that figures attack themselves, for their images."""
        return [
            cell
            for drawing, arguments in self._computed(shelf)
            for cell in drawing.attacks(self.reproduction, arguments)
        ]

    def _computed(self, shelf: Shelf | None) -> Iterator[tuple[Drawing, Mapping[str, Any]]]:
        """The drawings whose data is to be computed, with their arguments."""
        for name, figure in self.figures.items():
            if is_computed(figure) and self._outdated(name, shelf):
                yield figures.drawings.get(str(figure.draw)), figure.arguments

    @property
    def _shelf(self) -> Shelf:
        return Shelf([self.out / "checkpoints"])

    def measure_costs(self, shared: Shared) -> list[str]:
        """The costs of the part that nobody has measured yet as things are here; why one could not
        be measured."""
        return self.costs.measure(self.costs.of(self.numbers()), shared)

    def draw(self, shared: Shared, known: Known) -> list[str]:
        """The figures of the part as CSV, SVG and PNG; why one could not be drawn. What is computed
        for a figure alone is kept, and computed again where it was made of something else."""
        failed = []
        for name, figure in self.figures.items():
            drawing, file = figures.drawings.get(str(figure.draw)), self.data_of(name)
            try:
                if not is_computed(figure):
                    figures.write(file, self._from_records(figure, known))
                elif self._outdated(name, shared.shelf):
                    noting = Noting.over(shared)
                    for each in drawing.trainings(self.reproduction, figure.arguments):
                        noting.note(noting.dataset(each.dataset), each.defense)
                    sources = figures.Sources(self.reproduction, known, noting)
                    begin = perf_counter()
                    rows = drawing.data(sources, figure.arguments)
                    took = perf_counter() - begin
                    keep(file, rows, plan_of(figure, self.reproduction), noting.inputs(), took)
                plot = drawing.plot(figures.read(file), figure.arguments)
            except InputError as error:
                failed.append(f"{name} is not drawn: {error}")
                continue
            figures.caption(plot, self._stands_for(figure))
            figures.save(plot, file.with_suffix(""))
        return failed

    def data_of(self, figure: str) -> Path:
        """The CSV of a figure."""
        return self.folder / f"{figure}.{self.scale}.csv"

    def drawn(self) -> list[str]:
        """The figures of the part of which there is a file."""
        return [
            name
            for name, figure in self.figures.items()
            if any(map(Path.exists, files_of(figure, self.data_of(name))))
        ]

    def figure_data(self, known: Known) -> dict[Path, str]:
        """The CSVs that records alone decide, of the figures that are drawn already; without those
        whose records are missing."""
        found = {}
        for name in self.drawn():
            if not is_computed(self.figures[name]):
                with contextlib.suppress(InputError):  # `doubts` says it
                    found[self.data_of(name)] = as_csv(
                        self._from_records(self.figures[name], known)
                    )
        return found

    def _from_records(self, figure: Figure, known: Known) -> Rows:
        shared = Shared(self.out, None, torch.device("cpu"))  # nothing is deployed by it
        sources = figures.Sources(self.reproduction, known, shared)
        return figures.drawings.get(str(figure.draw)).data(sources, figure.arguments)

    def _outdated(self, name: str, shelf: Shelf | None = None) -> str | None:
        """Why computed data is not what would be computed now."""
        figure = self.paper.figures[name]
        return outdated(self.data_of(name), figure, self.reproduction, shelf or self._shelf)

    def doubts(self, known: Known) -> list[str]:
        """A line for every cost and every drawn figure of the part that is not what would be
        measured now."""
        found = self.costs.doubts(self.costs.of(self.numbers()), self.part is None)
        for name in self.drawn():
            if why := self._doubt(name, known):
                found.append(f"{self.data_of(name)} is stale, {why}")
        again = f"run 'robbench reproduce {self.paper.key} --scale {self.scale}'"
        return [f"{line}; {again}" for line in found]

    def _doubt(self, name: str, known: Known) -> str | None:
        if is_computed(self.figures[name]):
            return self._outdated(name)
        try:
            self._from_records(self.figures[name], known)
        except InputError as error:
            return str(error)
        return None

    def took(self) -> dict[str, float]:
        """Seconds behind the data of figures that was computed."""
        found = {}
        for name in self.drawn():
            if is_computed(self.figures[name]):
                with contextlib.suppress(InputError):  # `doubts` says it
                    found[name] = kept_of(self.data_of(name)).seconds
        return found

    def page_figures(self) -> dict[str, Figure]:
        """All figures of the paper; those that nobody has drawn yet with that for a reason."""
        later = {"draw": None, "reason": "nobody has run it at this scale yet"}
        return {
            name: figure.model_copy(update=later)
            if figure.draw and not self.data_of(name).exists()
            else figure
            for name, figure in self.paper.figures.items()
        }

    def _stands_for(self, figure: Figure) -> str:
        """What the figure was measured on, where that is not what the paper names."""
        overlay, named = self.reproduction.overlay, str(figure.arguments)
        stands: dict[str, list[str]] = {}
        for published, there in (*overlay.datasets.items(), *overlay.networks.items()):
            if published in named:
                stands.setdefault(there, []).append(published)
        said = [f"{there} for {' and '.join(names)}" for there, names in stands.items()]
        return f"scale {self.scale}: {', '.join(said)}" if said else ""

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
        """The claims, if the part has them."""
        if not self.claimed:
            return []
        units = {
            number.path: table.unit
            for name, table in self.paper.tables.items()
            for number in table.numbers(name)
        }

        def line_of(path: str) -> Line:
            number = self._every[path]
            unit = None if number.binding.kind == "cost" else units.get(path, "percent")
            return self.reproduction.line(number, unit, known)

        series_of: Callable[[str], spoken.Series] = cache(partial(self._series, known))
        return [spoken.judge(claim, line_of, series_of) for claim in self.paper.claims]

    def _series(self, known: Known, name: str) -> spoken.Series:
        """The curves of a figure: of the records, or of what was computed and is kept."""
        figure, file = self.paper.figures[name], self.data_of(name)
        if not is_computed(figure):
            rows = figures.plain(as_csv(self._from_records(figure, known)))
            return figures.series_of(rows, file.name)
        if file.exists() and (why := self._outdated(name)):
            raise InputError(f"{file.name} is stale, {why}")
        return figures.read_series(file)

    @property
    def folder(self) -> Path:
        return self.out / "papers" / self.paper.key

    def trained(self) -> float:
        """Seconds of all trainings behind the numbers of the part, each once, as the checkpoints
        beside the records tell."""
        cells = [c for n in self.numbers() for c in self.reproduction.cells_of(n.binding)]
        trainings = dict.fromkeys((c.defense, c.dataset, c.train_seed) for c in cells)
        made = {
            key_of(each, self.load(dataset), seed)
            for defense, dataset, seed in trainings
            for part in resolve(defense)
            for each in (part, *part.bases())
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
        except InputError:
            record = next(Store(out).all(name), None)
            if estimate and name in FACTS:
                return blank(name)
            if record is None or kind(name) not in FACTS:
                raise
            return described(name, str(record.provenance["dataset_hash"]))

    return load


def part_of(what: str, scale: str, out: Path, load: Callable[[str], Dataset]) -> Part:
    """The part that `enresnet:table1` names; InputError for what there is not."""
    paper, part = select(what)
    return Part(paper, scale, out, load, part)


def is_computed(figure: Figure) -> bool:
    """Whether no record decides the data of the figure."""
    return not figures.drawings.get(str(figure.draw)).bindings(figure.arguments)


def files_of(figure: Figure, data: Path) -> list[Path]:
    """All files of a figure: its CSV, its plots, and what computed data was made of."""
    kinds = ["csv", "svg", "png", *(["json"] if is_computed(figure) else [])]
    return [data.with_suffix(f".{kind}") for kind in kinds]


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
