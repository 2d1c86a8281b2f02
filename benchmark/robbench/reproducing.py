"""Measures what a part of a paper needs, keeps it, and gives it back in the format asked for."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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
from robbench.papers.reproduction import CLAIMED, Known, Line, Reproduction
from robbench.records import Record, Store
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
            for number in (*self.paper.numbers(), *spoken.counterparts(self.paper)):
                if number.path in referred or number.path.startswith(CLAIMED):
                    found.setdefault(number.path, number)
        return list(found.values())

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

    def draw(self, shared: Shared) -> list[str]:
        """The figures of the part as CSV, SVG and PNG; why one could not be drawn. What is computed
        for a figure alone is kept: its CSV is the measurement, not made again while it is there."""
        failed = []
        known = known_of(self) if self.figures else None
        for name, figure in self.figures.items():
            drawing, file = figures.drawings.get(str(figure.draw)), self.data_of(name)
            assert known is not None
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
        numbers = {
            number.path: number
            for number in (*self.paper.numbers(), *spoken.counterparts(self.paper))
        }

        def line_of(path: str) -> spoken.Made:
            unit = units.get(path, "percent")
            if numbers[path].binding.kind == "cost":
                unit = None
            return spoken.Made(self.reproduction.line(numbers[path], unit, known), unit)

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
        seconds: dict[str, float] = {}
        for number in self.numbers():
            for cell in self.reproduction.cells_of(number.binding):
                for part in resolve(cell.defense):
                    for each in (part, *part.bases()):
                        key = key_of(each, self.load(cell.dataset), cell.train_seed)
                        if key not in seconds and (path := shelf.find(key)):
                            curve = json.loads(path.with_suffix(".json").read_text())["curve"]
                            seconds[key] = sum(point.get("seconds", 0.0) for point in curve)
        return sum(seconds.values())


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
    """The part in a format: text, markdown, latex, bibtex, csv or json."""
    if form == "bibtex":
        return pages.bibtex(part.paper)
    tables, judged = part.lines(known), part.judged(known)
    if form in ("csv", "json"):
        flat = [
            pages.flat(part.paper, part.scale, line) for lines in tables.values() for line in lines
        ]
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
    flat = [pages.flat(part.paper, part.scale, line) for lines in tables.values() for line in lines]
    trained = part.trained()
    text = pages.page(part.paper, part.scale, tables, judged, part.paper.figures, trained)
    return {
        stem.with_name(f"{stem.name}.md"): text,
        stem.with_name(f"{stem.name}.csv"): as_csv(flat),
        **part.figure_data(known),
    }


def write_pages(part: Part) -> None:
    """Page and CSV of a whole paper beside its figures."""
    for path, text in page_files(part, known_of(part)).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def committed(out: Path) -> list[tuple[str, str]]:
    """(paper, scale) of the pages that a folder has."""
    return [
        (key, scale)
        for key in keys()
        for scale in SCALES
        if (out / "papers" / f"{key}.{scale}.md").exists()
    ]


def known_of(part: Part, records: Sequence[Record] | None = None) -> Known:
    """What the records below the part's folder say."""
    found = list(Store(part.out).all()) if records is None else records
    names = {cell.dataset for cell in part.cells()}
    least = part.reproduction.overlay.strongest_n or 1
    return Known.of([record for record in found if record.cell.dataset in names], least)


def workers_of(options: Mapping[str, Any]) -> int:
    return options["workers"] or os.cpu_count() or 1
