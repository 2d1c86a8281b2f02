"""Runs cells and yields records: in this process, or in several processes side by side.

A time-out ends the process of a task. Models of the caller cannot leave this process: there an
alarm interrupts the task as soon as it is back in Python.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from robbench.audit import is_diagnostic
from robbench.cell import Cell
from robbench.errors import InputError, check_timeout
from robbench.records import Record, Store
from robbench.runner import Part, Shared, Training, images_of, merge, reason_of, shards
from robbench.tasks import (
    Outcome,
    Report,
    Task,
    doomed,
    overdue,
    perform,
    plan,
    remaining,
)
from robbench.workers import parallel


def measure(
    cells: Sequence[Cell],
    store: Store | None,
    shared: Shared,
    workers: int = 1,
    report: Report = lambda task, done, total: None,
    finished: Callable[[Task], None] = lambda task: None,
    *,
    timeout: float | None = None,
    strict: bool = True,
    trainings: Iterable[Training] = (),
) -> Iterator[Record]:
    """Run the cells and yield a record as soon as all of its shards are there; it is written
    first. A cell that cannot be measured yields a failed record.

    timeout: seconds that a training, or the work on one shard of images, may take. strict: an
    InputError where bad input let nothing run but diagnostics, and no record of them; otherwise,
    and wherever another cell did run, what was refused is failed records, after the others.
    trainings: what else is to be trained. Why a training failed stands in `shared.untrained`, and
    whoever needs it is told.
    """
    check_timeout(timeout)
    parts: dict[str, list[Part]] = {cell.id: [] for cell in cells}
    refused: list[Record] = []
    sizes = {cell.id: len(shards(cell.n, shared.dataset(cell.dataset).shape)) for cell in cells}
    shared.untrained.clear()
    for outcome in execute(plan(cells, shared, trainings), shared, workers, report, timeout):
        if not outcome.reason:
            finished(outcome.task)
        elif outcome.task.kind == "train":
            shared.untrained[outcome.task.id] = outcome.reason
        for part in _parts(outcome):
            collected = parts[part.cell.id]
            collected.append(part)
            if len(collected) < sizes[part.cell.id]:
                continue
            record = _merged(parts.pop(part.cell.id), shared)
            if any(part.mistake for part in collected):
                refused.append(record)
                continue
            if store:
                store.put(record, images_of(collected) if record.status == "ok" else None)
            yield record
    asked_for = {cell.id for cell in cells if not is_diagnostic(cell)}
    if strict and refused and asked_for <= {record.id for record in refused}:
        raise InputError("; ".join(dict.fromkeys(str(record.reason) for record in refused)))
    for record in refused:
        if store:
            store.put(record)
        yield record


def _parts(outcome: Outcome) -> list[Part]:
    """One part for each cell of a task, also where the task came to nothing."""
    task, reason, mistake = outcome.task, outcome.reason, outcome.mistake
    return outcome.parts or [Part(cell, task.shard, reason, mistake) for cell in task.cells]


def _merged(parts: Sequence[Part], shared: Shared) -> Record:
    """The record of all shards; what does not fit together fails its cell and no other."""
    try:
        return merge(parts, shared)
    except Exception as error:
        return merge([replace(part, reason=reason_of(error)) for part in parts], shared)


def execute(
    tasks: Sequence[Task],
    shared: Shared,
    workers: int,
    report: Report,
    timeout: float | None = None,
) -> Iterator[Outcome]:
    """Outcomes as they come. Tasks that need a failed training share its outcome."""
    if shared.device.type != "cpu":
        workers = 1  # several would only take turns
    if shared.models or (timeout is None and (workers == 1 or len(tasks) <= 1)):
        yield from _serial(tasks, shared, report, timeout)
    else:
        yield from parallel(tasks, shared, workers, report, timeout)


def _serial(
    tasks: Sequence[Task], shared: Shared, report: Report, timeout: float | None
) -> Iterator[Outcome]:
    threads = torch.get_num_threads()
    if shared.device.type == "cpu":
        torch.set_num_threads(1)
    broken: dict[str, Outcome] = {}
    try:
        for task in tasks:  # trainings come first and bases before what is built on them
            outcome = doomed(task, broken)
            if outcome is None:
                outcome = _timed(remaining(task, broken), shared, partial(report, task), timeout)
            if outcome.reason:
                broken[task.id] = outcome
            yield outcome
    finally:
        torch.set_num_threads(threads)


class _Overdue(BaseException):
    """No Exception: code that goes on after any error of its own would go on after this, too."""


def _timed(
    task: Task, shared: Shared, report: Callable[[int, int], None], timeout: float | None
) -> Outcome:
    """perform(), interrupted by an alarm."""
    if timeout is None:
        return perform(task, shared, report)
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        raise InputError(
            "timeout: models of yours can be interrupted only in the main thread, and not on"
            " Windows; leave it out, or register the model as a defense"
        )

    def ring(number: int, frame: object) -> None:
        raise _Overdue

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        outcome = perform(task, shared, report)
        signal.setitimer(signal.ITIMER_REAL, 0)  # here, where an alarm is still caught
        return outcome
    except _Overdue:
        return overdue(task, timeout)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
