"""The figures of a paper at a scale as they are kept: drawn, looked up, doubted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from robbench import figures
from robbench.cell import Cell
from robbench.checkpoints import Shelf
from robbench.errors import InputError
from robbench.figures import Drawing, Rows
from robbench.figures.kept import keep, kept_of, outdated, plan_of
from robbench.papers.claims import Series
from robbench.papers.inputs import Noting
from robbench.papers.paper import Binding, Figure
from robbench.papers.reproduction import Known, Reproduction
from robbench.runner import Shared, Training
from robbench.tables import as_csv


class Gallery:
    """asked: the figures that are looked after, all of which can be drawn. out: the folder of the
    records. shelf: of the weights that lie beside them."""

    def __init__(
        self, reproduction: Reproduction, asked: Iterable[str], out: Path, shelf: Shelf
    ) -> None:
        self.reproduction, self.out, self.shelf = reproduction, out, shelf
        self.every = reproduction.paper.figures
        self.asked = {name: self.every[name] for name in asked}

    def data_of(self, name: str) -> Path:
        """The CSV of a figure."""
        return data_of(self.out, self.reproduction.paper.key, self.reproduction.scale, name)

    def cells(self) -> list[Cell]:
        """Those that decide the data of figures."""
        bindings = [
            Binding.model_validate(fields)
            for figure in self.asked.values()
            for fields in _drawing(figure).bindings(figure.arguments)
        ]
        return [cell for each in bindings for cell in self.reproduction.cells_of(each)]

    def trainings(self, shelf: Shelf | None = None) -> list[Training]:
        """What data that is to be computed needs trained."""
        found = []
        for drawing, arguments in self._to_compute(shelf):
            found += drawing.trainings(self.reproduction, arguments)
        for cell in self.attacked(shelf):
            found += [
                Training(cell.dataset, spec, cell.train_seed)
                for spec in (*cell.sources(), cell.defense)
            ]
        return found

    def attacked(self, shelf: Shelf | None = None) -> list[Cell]:
        """The cells that data to be computed needs attacked once more, for their images."""
        return [
            cell
            for drawing, arguments in self._to_compute(shelf)
            for cell in drawing.attacks(self.reproduction, arguments)
        ]

    def _to_compute(self, shelf: Shelf | None) -> Iterator[tuple[Drawing, Mapping[str, Any]]]:
        for name, figure in self.asked.items():
            if is_computed(figure) and self._outdated(name, shelf):
                yield _drawing(figure), figure.arguments

    def draw(self, shared: Shared, known: Known) -> list[str]:
        """The figures as CSV, SVG and PNG; why one could not be drawn. What is computed for a
        figure alone is kept, and computed again where it was made of something else."""
        failed = []
        for name, figure in self.asked.items():
            file = self.data_of(name)
            try:
                if not is_computed(figure):
                    figures.write(file, self._from_records(figure, known))
                elif self._outdated(name, shared.shelf):
                    self._compute(figure, file, shared, known)
                plot = _drawing(figure).plot(figures.read(file), figure.arguments)
            except InputError as error:
                failed.append(f"{name} is not drawn: {error}")
                continue
            figures.caption(plot, self._stands_for(figure))
            figures.save(plot, file.with_suffix(""))
        return failed

    def _from_records(self, figure: Figure, known: Known) -> Rows:
        shared = Shared(self.out, None, torch.device("cpu"))  # nothing is deployed by it
        sources = figures.Sources(self.reproduction, known, shared)
        return _drawing(figure).data(sources, figure.arguments)

    def _compute(self, figure: Figure, file: Path, shared: Shared, known: Known) -> None:
        noting, drawing = Noting.over(shared), _drawing(figure)
        for each in drawing.trainings(self.reproduction, figure.arguments):
            noting.note(noting.dataset(each.dataset), each.defense)
        sources = figures.Sources(self.reproduction, known, noting)
        begin = perf_counter()
        rows = drawing.data(sources, figure.arguments)
        took = perf_counter() - begin
        keep(file, rows, plan_of(figure, self.reproduction), noting.inputs(), took)

    def _outdated(self, name: str, shelf: Shelf | None = None) -> str | None:
        """Why computed data is not what would be computed now."""
        file, figure = self.data_of(name), self.every[name]
        return outdated(file, figure, self.reproduction, shelf or self.shelf)

    def _stands_for(self, figure: Figure) -> str:
        """What the figure was measured on, where that is not what the paper names."""
        overlay, named = self.reproduction.overlay, str(figure.arguments)
        stands: dict[str, list[str]] = {}
        for published, there in (*overlay.datasets.items(), *overlay.networks.items()):
            if published in named:
                stands.setdefault(there, []).append(published)
        said = [f"{there} for {' and '.join(names)}" for there, names in stands.items()]
        return f"scale {self.reproduction.scale}: {', '.join(said)}" if said else ""

    def drawn(self) -> list[str]:
        """The figures of which there is a file."""
        return [
            name
            for name, figure in self.asked.items()
            if any(map(Path.exists, files_of(figure, self.data_of(name))))
        ]

    def texts(self, known: Known) -> dict[Path, str]:
        """The CSVs that records alone decide, of the figures that are drawn already; without those
        whose records are missing."""
        found = {}
        for name in self.drawn():
            if not is_computed(self.asked[name]):
                with contextlib.suppress(InputError):  # `doubts` says it
                    found[self.data_of(name)] = as_csv(self._from_records(self.asked[name], known))
        return found

    def seconds(self) -> dict[str, float]:
        """What computing the data of figures took."""
        found = {}
        for name in self.drawn():
            if is_computed(self.asked[name]):
                with contextlib.suppress(InputError):  # `doubts` says it
                    found[name] = kept_of(self.data_of(name)).seconds
        return found

    def doubts(self, known: Known) -> list[str]:
        """A line for every drawn figure that is not what would be drawn now."""
        return [
            f"{self.data_of(name)} is stale, {why}"
            for name in self.drawn()
            if (why := self._doubt(name, known))
        ]

    def _doubt(self, name: str, known: Known) -> str | None:
        if is_computed(self.asked[name]):
            return self._outdated(name)
        try:
            self._from_records(self.asked[name], known)
        except InputError as error:
            return str(error)
        return None

    def shown(self) -> dict[str, Figure]:
        """All figures of the paper; those that nobody has drawn yet with that for a reason."""
        later = {"draw": None, "reason": "nobody has run it at this scale yet"}
        return {
            name: figure.model_copy(update=later)
            if figure.draw and not self.data_of(name).exists()
            else figure
            for name, figure in self.every.items()
        }

    def series(self, known: Known, name: str) -> Series:
        """The curves of any figure of the paper: of the records, or of what was computed and is
        kept. InputError where neither has them."""
        figure, file = self.every[name], self.data_of(name)
        if not is_computed(figure):
            rows = figures.plain(as_csv(self._from_records(figure, known)))
            return figures.series_of(rows, file.name)
        if file.exists() and (why := self._outdated(name)):
            raise InputError(f"{file.name} is stale, {why}")
        return figures.read_series(file)


def data_of(out: Path, key: str, scale: str, figure: str) -> Path:
    """The CSV of a figure of a paper at a scale."""
    return out / "papers" / key / f"{figure}.{scale}.csv"


def files_of(figure: Figure, data: Path) -> list[Path]:
    """All files of a figure: its CSV, its plots, and what computed data was made of."""
    kinds = ["csv", "svg", "png", *(["json"] if is_computed(figure) else [])]
    return [data.with_suffix(f".{kind}") for kind in kinds]


def is_computed(figure: Figure) -> bool:
    """Whether no record decides the data of the figure."""
    return not _drawing(figure).bindings(figure.arguments)


def _drawing(figure: Figure) -> Drawing:
    return figures.drawings.get(str(figure.draw))
