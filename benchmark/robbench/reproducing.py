"""Measures what a part of a paper needs, keeps it, and gives it back in the format asked for."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from robbench import figures, registry
from robbench.audit.planning import probes
from robbench.checkpoints import Shelf, key_of
from robbench.datasets import Dataset, kind
from robbench.datasets.described import FACTS, described
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.grid import Cell
from robbench.metrics import Measure
from robbench.papers import claims as spoken
from robbench.papers import pages
from robbench.papers.costs import cost_key, measure_cost, read_costs, write_costs
from robbench.papers.derived import UNKNOWN
from robbench.papers.paper import SCALES, Binding, Figure, Number, Paper, keys, select
from robbench.papers.reproduction import Known, Line, Reproduction
from robbench.records import Store
from robbench.runner import Shared
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
        self.costs = read_costs(self.costs_file)
        self.reproduction = Reproduction(self.paper, self.scale, self.load, self.costs)

    @property
    def costs_file(self) -> Path:
        return self.out / "papers" / f"{self.paper.key}.{self.scale}.costs.json"

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

    def measure_costs(self, shared: Shared) -> None:
        """The costs that nobody has measured yet, kept one by one."""
        overlay = self.reproduction.overlay
        for number in self.numbers():
            binding = number.binding
            if binding.kind != "cost" or cost_key(binding, overlay) in self.costs:
                continue
            value = measure_cost(binding, overlay, self.load, shared)
            self.costs[cost_key(binding, overlay)] = Measure(value, UNKNOWN)
            write_costs(self.costs_file, self.costs)

    def draw(self, shared: Shared, known: Known) -> list[str]:
        """The figures of the part as CSV, SVG and PNG; why one could not be drawn. What is computed
        for a figure alone is kept: its CSV is the measurement, not made again while it is there."""
        failed = []
        for name, figure in self.figures.items():
            drawing, file = figures.drawings.get(str(figure.draw)), self.data_of(name)
            try:
                if drawing.bindings(figure.arguments) or not file.exists():
                    sources = figures.Sources(self.reproduction, known, shared)
                    figures.write(file, drawing.data(sources, figure.arguments))
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

    def figure_data(self, known: Known) -> dict[Path, str]:
        """The CSVs that records alone decide, of the figures that are drawn already."""
        shared = Shared(self.out, None, torch.device("cpu"))  # nothing is deployed by it
        found = {}
        for name, figure in self.figures.items():
            drawing, file = figures.drawings.get(str(figure.draw)), self.data_of(name)
            if file.exists() and drawing.bindings(figure.arguments):
                sources = figures.Sources(self.reproduction, known, shared)
                found[file] = as_csv(drawing.data(sources, figure.arguments))
        return found

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

        return [spoken.judge(claim, line_of, self.series) for claim in self.paper.claims]

    def series(self, figure: str) -> dict[str, tuple[list[float], list[float]]]:
        """The curves of a figure from the data beside it."""
        return figures.read_series(self.data_of(figure))

    @property
    def folder(self) -> Path:
        return self.out / "papers" / self.paper.key

    def trained(self) -> float:
        """Seconds of all trainings behind the numbers of the part, each once, as the checkpoints
        beside the records tell."""
        shelf = Shelf([self.out / "checkpoints"])
        cells = [c for n in self.numbers() for c in self.reproduction.cells_of(n.binding)]
        trainings = dict.fromkeys((c.defense, c.dataset, c.train_seed) for c in cells)
        made = {
            key_of(each, self.load(dataset), seed)
            for defense, dataset, seed in trainings
            for part in resolve(defense)
            for each in (part, *part.bases())
        }
        seconds = 0.0
        for path in filter(None, map(shelf.find, sorted(made))):
            curve = json.loads(path.with_suffix(".json").read_text())["curve"]
            seconds += sum(point.get("seconds", 0.0) for point in curve)
        return seconds


def loader(out: Path, data_dir: Path | None) -> Callable[[str], Dataset]:
    """Datasets by name; where the images are not, what the records below a folder say of them."""

    @cache
    def load(name: str) -> Dataset:
        try:
            return registry.dataset(name, data_dir)
        except InputError:
            record = next(Store(out).all(name), None)
            if record is None or kind(name) not in FACTS:
                raise
            return described(name, str(record.provenance["dataset_hash"]))

    return load


def part_of(what: str, scale: str, out: Path, load: Callable[[str], Dataset]) -> Part:
    """The part that `enresnet:table1` names; InputError for what there is not."""
    paper, part = select(what)
    return Part(paper, scale, out, load, part)


def rendered(part: Part, known: Known, form: str) -> str:
    """The part in a format: text, markdown, latex, csv or json."""
    tables, judged = part.lines(known), part.judged(known)
    if form in ("csv", "json"):
        flat = _flat(part, tables)
        if part.part == CLAIMS:
            flat = [pages.flat_claim(part.paper, part.scale, each) for each in judged]
        return as_csv(flat) if form == "csv" else json.dumps(flat, indent=1, ensure_ascii=False)
    if form == "latex":
        made = [pages.latex_table(part.paper, name, tables[name], part.scale) for name in tables]
        return "\n\n".join(made or [pages.latex_claims(part.paper, judged, part.scale)])
    if part.part in part.paper.figures:
        return _drawn(part)
    table = pages.text_table if form == "text" else pages.markdown_table
    parts = [table(part.paper.tables[name], lines) for name, lines in tables.items()]
    if judged:
        listed = pages.claims_text if form == "text" else pages.claims_table
        parts += [textwrap.fill(pages.summary(judged), 80), listed(judged)]
    return "\n\n".join(parts)


def _flat(part: Part, tables: Mapping[str, Sequence[Line]]) -> list[dict[str, Any]]:
    return [pages.flat(part.paper, part.scale, line) for lines in tables.values() for line in lines]


def _drawn(part: Part) -> str:
    """Where a figure lies, or why it is none."""
    figure = part.paper.figures[str(part.part)]
    if figure.reason:
        return f"{figure.shows}: not drawn, {figure.reason}"
    stem = part.folder / f"{part.part}.{part.scale}"
    kinds = ", ".join(f"{stem}.{kind}" for kind in ("svg", "png", "csv"))
    return "\n".join([f"{figure.shows}: {kinds}", *(f"note: {note}" for note in figure.notes)])


def page_files(part: Part, known: Known) -> dict[Path, str]:
    """The page and the CSVs of a whole paper at a scale, as they must be for these records."""
    stem = part.out / "papers" / f"{part.paper.key}.{part.scale}"
    tables, judged = part.lines(known), part.judged(known)
    trained = part.trained()
    text = pages.page(part.paper, part.scale, tables, judged, part.paper.figures, trained)
    return {
        stem.with_name(f"{stem.name}.md"): text,
        stem.with_name(f"{stem.name}.csv"): as_csv(_flat(part, tables)),
        **part.figure_data(known),
    }


def committed(out: Path) -> list[tuple[str, str]]:
    """(paper, scale) of the pages that a folder has."""
    return [
        (key, scale)
        for key in keys()
        for scale in SCALES
        if (out / "papers" / f"{key}.{scale}.md").exists()
    ]


def known_of(part: Part, cells: Sequence[Cell]) -> Known:
    """What the records below the part's folder say of the datasets of these cells."""
    names = sorted({cell.dataset for cell in cells})
    return Known.of([each for name in names for each in Store(part.out).all(name)], part.least)
