"""What people see: progress and tables, by rich; plain lines where the output is not a terminal."""

from __future__ import annotations

import contextlib
import itertools
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from robbench import tables
from robbench.defense import shown
from robbench.tables import Row
from robbench.threat import format_eps

if TYPE_CHECKING:
    from robbench.cell import Cell
    from robbench.records import Record
    from robbench.runner import Shared, Training
    from robbench.tasks import Task

COLUMNS = (
    ("accuracy", "accuracy"),
    ("incorrect", "incorrect"),
    ("abstained", "abstained"),
    ("correct_or_abstained", "correct+abstained"),
)


class Console:
    """Progress goes to stderr, tables to stdout."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.out = rich.console.Console(highlight=False)
        self.err = rich.console.Console(stderr=True, highlight=False)

    @contextlib.contextmanager
    def progress(
        self, cells: Sequence[Cell], shared: Shared, trainings: Sequence[Training] = ()
    ) -> Iterator[Silent]:
        if self.quiet or not (cells or trainings):
            yield Silent()
        elif not self.err.is_terminal:
            yield Lines(self.err, len(cells))
        else:
            from robbench.tasks import plan

            bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=self.err,
                transient=True,
            )
            with bars:
                total = sum(task.weight for task in plan(cells, shared, trainings))
                yield Bars(bars, total, len(cells))

    @contextlib.contextmanager
    def training(self, label: str) -> Iterator[Any]:
        if self.quiet or not self.err.is_terminal:
            yield lambda done, total: None
            return
        with Progress(console=self.err, transient=True) as bars:
            bar = bars.add_task(f"train {label}")
            yield lambda done, total: bars.update(bar, completed=done, total=total)

    def table(self, made: Sequence[Row], out: Path, precision: float | None = None) -> None:
        """One table per dataset, norm and attack, 80 columns wide, a line for each ε.

        precision: half the interval that is wanted; what has a longer one is not called sound.
        """
        finished = [row for row in made if row.metrics is not None]
        for dataset in dict.fromkeys(row.cell.dataset for row in finished):
            own = [row for row in finished if row.cell.dataset == dataset]
            for title, group in tables.groups(own):
                self.out.print(f"{dataset}: {title}", style="bold", markup=False)
                self._group(group, precision)
                self.out.print()
        for row in made:
            if row.metrics is None:
                text = _safe(f"{row.cell}: {row.note.removeprefix('failed: ')}")
                self.out.print(f"[red]failed[/red] {text}", soft_wrap=True)
        self.out.print(
            "Shares in %, each with its 95 % interval over images; an accuracy under attack is"
            " an upper bound on the true robustness. clean: accuracy on the images themselves."
            " Passes: forward + backward, of one network. More: docs/reading.md.",
            style="dim",
        )
        boards = ", ".join(
            str(out / f"{tables.page_name(name)}.md")
            for name in dict.fromkeys(row.cell.dataset for row in made)
        )
        self.out.print(f"records and tables: {boards}", style="dim", soft_wrap=True, markup=False)

    def _group(self, group: Sequence[Row], precision: float | None) -> None:
        """The lines of a table, those of one defense and setting under a heading."""
        self.out.print(_lines([], header=True))
        for heading, lines in itertools.groupby(group, _heading):
            same = list(lines)
            clean = f"clean {100 * same[0].metrics.clean.value:.1f}" if same[0].metrics else ""
            text = f"{heading} · {clean} · {_cost([row.record for row in same if row.record])}"
            self.out.print(text, style="cyan", markup=False)
            self.out.print(_lines(same))
            for remark in tables.verdicts(same, precision):
                self._remark(remark, "yellow")
            for row in same:
                for remark in tables.remarks(row.record) if row.record else ():
                    self._remark(remark, "dim")

    def _remark(self, text: str, style: str) -> None:
        filled = textwrap.fill(text, 78, initial_indent="  ", subsequent_indent="    ")
        self.out.print(filled, style=style, markup=False)


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _heading(row: Row) -> str:
    cell = row.cell
    seeds = [("train seed", cell.train_seed), ("seed", cell.seed)]
    parts = [
        shown(cell.defense, cell.dataset),
        tables.setting_text(cell, tables.deterministic(row)),
    ]
    return " · ".join(parts + [f"{name} {seed}" for name, seed in seeds if seed])


def _cost(records: Sequence[Record]) -> str:
    """'17–33 passes an image, 1s–2s': the least and the most that an ε took."""
    parts = []
    for index, key in enumerate(("forwards", "seconds")):
        ordered = sorted(records, key=lambda record: record.cost[key])
        ends = (tables.cost(record).split()[index] for record in (ordered[0], ordered[-1]))
        parts.append("–".join(dict.fromkeys(ends)))
    return f"{parts[0]} passes an image, {parts[1]}"


def _lines(group: Sequence[Row], header: bool = False) -> Table:
    table = Table(show_header=header, box=None, padding=(0, 2, 0, 0), width=80, pad_edge=False)
    table.add_column("ε", justify="right", width=7, overflow="fold")
    for _, heading in COLUMNS:
        table.add_column(heading, justify="right", width=max(16, len(heading)))
    for row in group:
        assert row.metrics is not None
        shares = [getattr(row.metrics, name) for name, _ in COLUMNS]
        table.add_row(
            format_eps(row.cell.threat.eps),
            *(f"{tables.percent(share)} {tables.interval(share):>10}" for share in shares),
        )
    return table


class Silent:
    """Nothing is shown."""

    def report(self, task: Task, done: int, total: int) -> None:
        """A task is at `done` of `total` steps."""

    def finished(self, task: Task) -> None:
        """A task is done; of one that failed nothing more is heard."""

    def record(self, record: Record) -> None:
        """A cell has its record."""


class Lines(Silent):
    """A line for each training and each cell, for pipes and logs."""

    def __init__(self, console: rich.console.Console, cells: int) -> None:
        self.console, self.cells, self.done = console, cells, 0
        self.started = time.monotonic()

    def finished(self, task: Task) -> None:
        if task.kind == "train":
            self._print(f"trained {task.label.removeprefix('train ')}")

    def record(self, record: Record) -> None:
        self.done += 1
        self._print(f"[{self.done}/{self.cells}] {_summary(record)}")

    def _print(self, text: str) -> None:
        self.console.print(
            f"{time.monotonic() - self.started:6.1f} s  {text}", soft_wrap=True, markup=False
        )


class Bars(Silent):
    """A bar for the whole run with the time left, and one for each task that is running."""

    def __init__(self, bars: Progress, total: float, cells: int) -> None:
        self.bars, self.cells, self.done = bars, cells, 0
        self.whole = bars.add_task(f"0 of {cells} cells", total=total)
        self.tasks: dict[str, TaskID] = {}
        self.shares: dict[str, float] = {}

    def report(self, task: Task, done: int, total: int) -> None:
        if task.id not in self.tasks:
            self.tasks[task.id] = self.bars.add_task(f"  {task.label}"[:44], total=total)
        self.bars.update(self.tasks[task.id], completed=done, total=total)
        self._advance(task, done / max(total, 1))

    def finished(self, task: Task) -> None:
        if task.id in self.tasks:
            self.bars.remove_task(self.tasks.pop(task.id))
        self._advance(task, 1.0)

    def record(self, record: Record) -> None:
        self.done += 1
        self.bars.update(self.whole, description=f"{self.done} of {self.cells} cells")

    def _advance(self, task: Task, share: float) -> None:
        self.bars.advance(self.whole, (share - self.shares.get(task.id, 0.0)) * task.weight)
        self.shares[task.id] = share


def _summary(record: Record) -> str:
    if record.status != "ok":
        return f"{record.cell}: failed: {record.reason}"
    from robbench.audit import is_diagnostic
    from robbench.metrics import metrics

    if is_diagnostic(record.cell):
        return f"{record.cell}: done"
    accuracy = metrics(record).accuracy
    return f"{record.cell}: accuracy {tables.percent(accuracy)} % ({tables.interval(accuracy)})"
