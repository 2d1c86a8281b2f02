"""Where cells run: in this process, or in several processes side by side.

A task waits for the checkpoints it is built on. Each process computes on one thread: on a small
machine that is faster than sharing a network between cores, and results repeat bit for bit.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
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
        needs = frozenset(need for cell in group for need in needed_keys(cell, shared))
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
    if cell.source in shared.models:
        members = len(shared.models[cell.source].deployed.members)
    else:
        members = sum(part.members for part in resolve(cell.source))
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
        if not (outcome.mistake or outcome.reason):
            finished(task)
        if outcome.mistake:
            mistakes.append(outcome.mistake)
            continue
        made = outcome.parts or [Part(cell, task.shard, outcome.reason) for cell in task.cells]
        for part in made:
            collected = parts[part.cell.id]
            collected.append(part)
            if len(collected) == sizes[part.cell.id]:
                record = _merged(parts.pop(part.cell.id), shared)
                if store:
                    store.put(record)
                yield record
    if mistakes:
        raise InputError("; ".join(dict.fromkeys(mistakes)))


def _merged(parts: Sequence[Part], shared: Shared) -> Record:
    """The record of all shards; what does not fit together fails its cell and no other."""
    try:
        return merge(parts, shared)
    except Exception as error:
        return merge([replace(part, reason=_reason(error)) for part in parts], shared)


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
    except (Exception, SystemExit) as error:  # somebody else's code may also call sys.exit
        return Outcome(task, reason=_reason(error))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def execute(
    tasks: Sequence[Task], shared: Shared, workers: int, report: Report
) -> Iterator[Outcome]:
    """Outcomes as they come. Tasks that need a failed training share its outcome."""
    if workers == 1 or len(tasks) <= 1 or shared.device.type != "cpu" or shared.models:
        yield from _serial(tasks, shared, report)
    else:
        yield from _parallel(tasks, shared, workers, report)


def _serial(tasks: Sequence[Task], shared: Shared, report: Report) -> Iterator[Outcome]:
    threads = torch.get_num_threads()
    if shared.device.type == "cpu":
        torch.set_num_threads(1)
    broken: dict[str, Outcome] = {}
    try:
        for task in tasks:  # trainings come first and bases before what is built on them
            outcome = _doomed(task, broken) or perform(task, shared, partial(report, task))
            if outcome.reason or outcome.mistake:
                broken[task.id] = outcome
            yield outcome
    finally:
        torch.set_num_threads(threads)


def _doomed(task: Task, broken: Mapping[str, Outcome]) -> Outcome | None:
    for need in sorted(task.needs):
        if need in broken:
            return Outcome(task, reason=broken[need].reason, mistake=broken[need].mistake)
    return None


_shared: Shared | None = None
_reports: Any = None


def _start_worker(
    out: Path, data_dir: Path | None, device: str, given: dict[str, Any], reports: Any
) -> None:
    global _shared, _reports
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _shared = Shared(out, data_dir, torch.device(device), given)
    _reports = reports


def _leave_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Task) -> Outcome:
    assert _shared is not None
    return perform(task, _shared, lambda done, total: _reports.put((task.id, done, total)))


class _Pool:
    """Worker processes and the queue they report on; both are replaced when a worker dies, since
    it may have died holding the queue's lock."""

    def __init__(self, workers: int, shared: Shared) -> None:
        context = multiprocessing.get_context("spawn")
        self.reports = context.Queue()
        device = str(shared.device)
        arguments = (shared.out, shared.data_dir, device, shared.given, self.reports)
        self.executor = ProcessPoolExecutor(workers, context, _start_worker, arguments)

    def drain(self, by_id: Mapping[str, Task], report: Report) -> None:
        while True:
            try:
                task_id, done, total = self.reports.get_nowait()
            except queue.Empty:
                return
            report(by_id[task_id], done, total)

    def release(self) -> None:
        """Let idle workers end by themselves, so that what libraries hold in them is released."""
        self.executor.shutdown(wait=True)

    def close(self) -> None:
        """End workers that may be busy or stuck."""
        for process in list((getattr(self.executor, "_processes", None) or {}).values()):
            process.terminate()
        self.executor.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Queue:
    """Which task may start next. After the death of a worker all that was running is suspect and
    runs again, one task at a time, so that only the task that kills its worker fails."""

    workers: int
    waiting: list[Task]
    settled: set[str]
    broken: dict[str, Outcome] = field(default_factory=dict)
    deaths: dict[str, int] = field(default_factory=dict)  # of suspects, by task id

    def startable(self, running: int) -> list[Task]:
        """Tasks for idle workers, out of the queue."""
        ready = [task for task in self.waiting if task.needs <= self.settled]
        # suspects lie in front
        free = max(0, (1 if self.deaths else self.workers) - running)
        chosen = {task.id: task for task in ready[:free]}
        self.waiting = [task for task in self.waiting if task.id not in chosen]
        return list(chosen.values())

    def doomed(self) -> Iterator[Outcome]:
        """Outcomes of waiting tasks whose trainings went wrong."""
        for task in list(self.waiting):
            outcome = _doomed(task, self.broken)
            if outcome:
                self.waiting.remove(task)
                self.settle(outcome)
                yield outcome

    def settle(self, outcome: Outcome) -> None:
        self.settled.add(outcome.task.id)
        self.deaths.pop(outcome.task.id, None)
        if outcome.reason or outcome.mistake:
            self.broken[outcome.task.id] = outcome

    def died(self, lost: Sequence[Task]) -> Iterator[Outcome]:
        """Queue what was running when a worker died; the outcomes of what has died too often."""
        for task in lost:
            self.deaths[task.id] = self.deaths.get(task.id, 0) + 1
            if self.deaths[task.id] <= RETRIES:
                self.waiting.insert(0, task)
                continue
            outcome = Outcome(task, reason=f"the worker process died {RETRIES + 1} times")
            self.settle(outcome)
            yield outcome


def _parallel(
    tasks: Sequence[Task], shared: Shared, workers: int, report: Report
) -> Iterator[Outcome]:
    """Several processes; the pool is rebuilt when one of them dies."""
    by_id = {task.id: task for task in tasks}
    there = {need for task in tasks for need in task.needs if need not in by_id}
    todo = _Queue(workers, list(tasks), there)
    running: dict[Future[Outcome], Task] = {}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by a worker before torch is imported
    pool = _Pool(workers, shared)
    try:
        while todo.waiting or running:
            yield from todo.doomed()
            lost: list[Task] = []
            dead = False
            for task in todo.startable(len(running)):
                try:
                    running[pool.executor.submit(_work, task)] = task
                except BrokenExecutor:  # while it was idle: the task is not to blame
                    todo.waiting.insert(0, task)
                    dead = True
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            pool.drain(by_id, report)
            for future in finished:
                task = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenExecutor:
                    dead = True
                    lost.append(task)
                    continue
                except Exception as error:  # an outcome that cannot be sent between processes
                    outcome = Outcome(task, reason=_reason(error))
                todo.settle(outcome)
                yield outcome
            if dead:
                lost += running.values()
                running.clear()
                pool.close()
                pool = _Pool(workers, shared)
                yield from todo.died(lost)
        pool.release()
    finally:
        pool.close()
