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
from robbench.defense import resolve, version_of
from robbench.errors import InputError
from robbench.figures import Drawing, Rows
from robbench.figures.kept import defenses_of, keep, kept_of, outdated, plan_of
from robbench.papers.claims import Series
from robbench.papers.inputs import Noting
from robbench.papers.paper import Binding, Figure
from robbench.papers.reproduction import Ground, Known, Reproduction
from robbench.papers.wording import stated
from robbench.runner import FAILURES, Shared, Training, explained, trainings
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
        return [cell for figure in self.asked.values() for cell in self._behind(figure)]

    def _behind(self, figure: Figure) -> list[Cell]:
        """The cells that decide the data of a figure."""
        return [
            cell
            for fields in _drawing(figure).bindings(figure.arguments)
            for cell in self.reproduction.cells_of(Binding.model_validate(fields))
        ]

    def grounds(self, name: str) -> list[Ground]:
        """What any figure of the paper is made of: what was attacked, trained or looked at for it,
        each once; nothing for what is computed from its arguments alone."""
        figure, made = self.every[name], self.reproduction
        drawing = _drawing(figure)
        attacked = [*self._behind(figure), *drawing.attacks(made, figure.arguments)]
        found = [(cell.dataset, cell.defense, str(cell.n)) for cell in attacked]
        looked_at = drawing.trainings(made, figure.arguments)
        found += [(each.dataset, each.defense, "") for each in looked_at]
        return list(dict.fromkeys(found))

    def trainings(self, shelf: Shelf | None = None) -> list[Training]:
        """What data that is to be computed needs trained."""
        found = []
        for drawing, arguments in self._to_compute(shelf):
            found += drawing.trainings(self.reproduction, arguments)
        return found + trainings(self.attacked(shelf))

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
            data = self.data_of(name)
            try:
                if not is_computed(figure):
                    figures.write(data, self._from_records(figure, known))
                elif self._outdated(name, shared.shelf):
                    self._compute(figure, data, shared, known)
                plot = _drawing(figure).plot(figures.read(data), figure.arguments)
                figures.caption(plot, self._measured_on(name))
                figures.save(plot, data)
            except FAILURES as error:
                failed.append(f"{name} is not drawn: {explained(error)}")
        return failed

    def _from_records(self, figure: Figure, known: Known) -> Rows:
        shared = Shared(self.out, None, torch.device("cpu"))  # nothing is deployed by it
        sources = figures.Sources(self.reproduction, known, shared)
        return _drawing(figure).data(sources, figure.arguments)

    def _compute(self, figure: Figure, data: Path, shared: Shared, known: Known) -> None:
        noting = Noting.over(shared)
        defenses = defenses_of(figure, self.reproduction)
        noting.versions |= {spec: version_of(spec) for spec in defenses}
        sources = figures.Sources(self.reproduction, known, noting)
        begin = perf_counter()
        rows = _drawing(figure).data(sources, figure.arguments)
        took = perf_counter() - begin
        keep(data, rows, plan_of(figure, self.reproduction), noting.inputs(), took)

    def _outdated(self, name: str, shelf: Shelf | None = None) -> str | None:
        """Why computed data is not what would be computed now."""
        file, figure = self.data_of(name), self.every[name]
        return outdated(file, figure, self.reproduction, shelf or self.shelf)

    def _measured_on(self, name: str) -> str:
        """The grounds of a figure in a line; empty where it has none."""
        grounds = self.grounds(name)
        if not grounds:
            return ""
        datasets, networks, n, epochs = stated(grounds)
        parts = [part for _, defense, _ in grounds for part in resolve(defense)]
        draws = {part.draws for part in parts if part.random}
        said = [
            datasets,
            networks,
            f"draws: {'; '.join(map(str, sorted(draws)))}" if draws - {1} else "",
            f"n = {n}" if n else "",
            f"epochs: {epochs}" if epochs else "",
        ]
        return f"scale {self.reproduction.scale}: {' · '.join(filter(None, said))}"

    def drawn(self) -> list[str]:
        """The figures of which there is a file."""
        return [
            name
            for name, figure in self.asked.items()
            if any(map(Path.exists, files_of(figure, self.data_of(name))))
        ]

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
        key, scale = self.reproduction.paper.key, self.reproduction.scale
        return [
            f"{line}; run 'robbench reproduce {key}:{name} --scale {scale}'"
            for name in self.drawn()
            if (line := self._doubt(name, known))
        ]

    def _doubt(self, name: str, known: Known) -> str | None:
        data, figure = self.data_of(name), self.asked[name]
        computed = is_computed(figure)
        if why := self._outdated(name) if computed else self._contradicted(figure, data, known):
            return f"{data} is stale, {why}"
        found = ((plot, figures.plot_problem(plot, data)) for plot in figures.plots_of(data))
        return next((f"{plot}: {why}" for plot, why in found if why), None)

    def _contradicted(self, figure: Figure, data: Path, known: Known) -> str | None:
        """Why a CSV is not what records say."""
        try:
            said = as_csv(self._from_records(figure, known))
        except InputError as error:
            return str(error)
        if not data.exists():
            return "it is missing"
        return "the records say otherwise" if data.read_bytes() != said.encode() else None

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
    made_of = [data.with_suffix(".json")] if is_computed(figure) else []
    return [data, *figures.plots_of(data), *made_of]


def is_computed(figure: Figure) -> bool:
    """Whether no record decides the data of the figure."""
    return not _drawing(figure).bindings(figure.arguments)


def _drawing(figure: Figure) -> Drawing:
    return figures.drawings.get(str(figure.draw))
