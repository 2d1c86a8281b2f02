"""Where cells run: in this process, or in several processes side by side.

A task waits for the checkpoints it is built on. Each process computes on one thread: on a small
machine that is faster than sharing a network between cores, and results repeat bit for bit.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from robbench.attacks import Configured
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.grid import Cell
from robbench.records import Record, Store
from robbench.runner import (
    Part,
    Shared,
    base_keys,
    merge,
    missing_training,
    needed_keys,
    run_shard,
    shards,
)
from robbench.training import Diverged

RETRIES = 2  # of a task whose process died
Report = Callable[["Task", int, int], None]


@dataclass(frozen=True)
class Task:
    """A training, or one shard of the cells that share an x'."""

    id: str
    kind: Literal["train", "attack"]
    label: str
    weight: float
    needs: frozenset[str] = frozenset()  # ids of trainings
    cells: tuple[Cell, ...] = ()
    shard: int = 0
    job: tuple[str, str, int] | None = None  # dataset, spec, train seed


@dataclass
class Outcome:
    """What became of a task: parts of cells, or why there are none."""

    task: Task
    parts: list[Part] = field(default_factory=list)
    reason: str | None = None
    mistake: str | None = None  # an InputError, to be shown as such


def plan(cells: Sequence[Cell], shared: Shared) -> list[Task]:
    """Trainings first, bases before what is built on them; then the attacks, costly ones first,
    so that no long one is left over for a single worker."""
    jobs = missing_training(cells, shared)
    tasks = []
    for key, (name, spec, seed) in jobs.items():
        needs = frozenset(base_keys(spec, shared.dataset(name), seed)) & jobs.keys()
        weight = _training_weight(spec, len(shared.dataset(name).train.y))
        label = f"train {spec}"
        tasks.append(Task(key, "train", label, weight, needs, job=(name, spec, seed)))
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.attack_key(), []).append(cell)
    attacks = []
    for key, group in groups.items():
        dataset = shared.dataset(group[0].dataset)
        needs = frozenset(
            need for cell in group if not shared.models for need in needed_keys(cell, dataset)
        )
        for shard, images in enumerate(shards(group[0].n, dataset.shape)):
            weight = _attack_weight(group[0], len(images), shared)
            attacks.append(
                Task(
                    f"{key}/{shard}",
                    "attack",
                    str(group[0]),
                    weight,
                    needs & jobs.keys(),
                    tuple(group),
                    shard,
                )
            )
    return tasks + sorted(attacks, key=lambda task: -task.weight)


def _training_weight(spec: str, images: int) -> float:
    """Passes of one image through one network, for the estimate of the time that is left."""
    defense = resolve(spec)[-1]
    inner = defense.adversarial.steps if defense.adversarial else 0
    return 3.0 * defense.epochs * images * defense.members * (1 + inner)


def _attack_weight(cell: Cell, images: int, shared: Shared) -> float:
    settings = Configured.of(cell.attack).settings
    steps = settings.get("steps") or settings.get("max_iter") or settings.get("n_queries") or 20
    members = 1 if shared.models else sum(part.members for part in resolve(cell.source))
    rounds = float(steps) if isinstance(steps, (int, float)) else 20.0
    return 3.0 * images * members * cell.setting.eot * rounds


def measure(
    cells: Sequence[Cell],
    store: Store | None,
    shared: Shared,
    workers: int = 1,
    report: Report = lambda task, done, total: None,
    finished: Callable[[Task], None] = lambda task: None,
) -> Iterator[Record]:
    """Run the cells and yield a record as soon as all of its shards are there; it is written
    first. A cell that cannot be measured yields a failed record. An InputError of a task is
    raised after the others have finished, so that nothing is lost."""
    parts: dict[str, list[Part]] = {cell.id: [] for cell in cells}
    mistakes: list[str] = []
    sizes = {cell.id: len(shards(cell.n, shared.dataset(cell.dataset).shape)) for cell in cells}
    for outcome in execute(plan(cells, shared), shared, workers, report):
        task = outcome.task
        finished(task)
        if outcome.mistake:
            mistakes.append(outcome.mistake)
            continue
        made = outcome.parts or [Part(cell, task.shard, outcome.reason) for cell in task.cells]
        for part in made:
            collected = parts[part.cell.id]
            collected.append(part)
            if len(collected) == sizes[part.cell.id]:
                record = merge(parts.pop(part.cell.id), shared)
                if store:
                    store.put(record)
                yield record
    if mistakes:
        raise InputError("; ".join(dict.fromkeys(mistakes)))


def perform(task: Task, shared: Shared, report: Callable[[int, int], None]) -> Outcome:
    """Run one task here; never raises for what a task can do wrong."""
    try:
        if task.job is not None:
            name, spec, train_seed = task.job
            shared.deploy(spec, shared.dataset(name), train_seed, report)
            return Outcome(task)
        return Outcome(task, run_shard(task.cells, task.shard, shared, report))
    except InputError as error:
        return Outcome(task, mistake=str(error))
    except (Diverged, RuntimeError, FloatingPointError) as error:
        return Outcome(task, reason=f"{type(error).__name__}: {error}")


def execute(
    tasks: Sequence[Task], shared: Shared, workers: int, report: Report
) -> Iterator[Outcome]:
    """Outcomes as they come. Tasks that need a failed training fail with its reason."""
    if workers == 1 or len(tasks) <= 1 or shared.device.type != "cpu" or shared.models:
        yield from _serial(tasks, shared, report)
    else:
        yield from _parallel(tasks, shared, workers, report)


def _serial(tasks: Sequence[Task], shared: Shared, report: Report) -> Iterator[Outcome]:
    threads = torch.get_num_threads()
    if shared.device.type == "cpu":
        torch.set_num_threads(1)
    broken: dict[str, str] = {}
    try:
        for task in tasks:  # trainings come first and bases before what is built on them
            outcome = _doomed(task, broken) or perform(
                task, shared, lambda done, total, task=task: report(task, done, total)
            )
            if outcome.reason:
                broken[task.id] = outcome.reason
            yield outcome
    finally:
        torch.set_num_threads(threads)


def _doomed(task: Task, broken: dict[str, str]) -> Outcome | None:
    for need in sorted(task.needs):
        if need in broken:
            return Outcome(task, reason=broken[need])
    return None


_shared: Shared | None = None
_reports: Any = None


def _start_worker(
    out: Path, data_dir: Path | None, device: str, given: dict[str, Any], reports: Any
) -> None:
    global _shared, _reports
    torch.set_num_threads(1)
    _shared = Shared(out, data_dir, torch.device(device), given)
    _reports = reports


def _work(task: Task) -> Outcome:
    assert _shared is not None
    return perform(task, _shared, lambda done, total: _reports.put((task.id, done, total)))


def _parallel(
    tasks: Sequence[Task], shared: Shared, workers: int, report: Report
) -> Iterator[Outcome]:
    """A pool that is rebuilt when a worker dies, and the tasks it was at are run again."""
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    by_id = {task.id: task for task in tasks}
    waiting = list(tasks)
    done: set[str] = {need for task in tasks for need in task.needs if need not in by_id}
    broken: dict[str, str] = {}
    attempts: dict[str, int] = dict.fromkeys(by_id, 0)
    running: dict[Future[Outcome], Task] = {}
    arguments = (shared.out, shared.data_dir, str(shared.device), shared.given, reports)

    def pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, context, _start_worker, arguments)

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by a worker before torch is imported
    executor = pool()
    try:
        while waiting or running:
            for task in [task for task in waiting if task.needs <= done | broken.keys()]:
                doomed = _doomed(task, broken)
                if doomed is None and len(running) >= workers:
                    continue
                waiting.remove(task)
                if doomed:
                    yield doomed
                else:
                    running[executor.submit(_work, task)] = task
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            _drain(reports, by_id, report)
            died = False
            for future in finished:
                task = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenExecutor:
                    died = True
                    attempts[task.id] += 1
                    if attempts[task.id] <= RETRIES:
                        waiting.insert(0, task)
                        continue
                    outcome = Outcome(task, reason="the worker process died three times")
                done.add(task.id)
                if outcome.reason:
                    broken[task.id] = outcome.reason
                yield outcome
            if died:
                waiting[:0] = running.values()
                running.clear()
                executor.shutdown(wait=False, cancel_futures=True)
                executor = pool()
    finally:
        for process in list(getattr(executor, "_processes", {}).values()):
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)


def _drain(reports: Any, by_id: dict[str, Task], report: Report) -> None:
    while True:
        try:
            task_id, done, total = reports.get_nowait()
        except queue.Empty:
            return
        report(by_id[task_id], done, total)
