"""Tasks in several processes side by side, which may die or get stuck.

Each process computes on one thread: on a small machine that is faster than sharing a network
between cores, and results repeat bit for bit. A time-out ends the process, whatever it is stuck in.
"""

from __future__ import annotations

import faulthandler
import hashlib
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robbench.environment import choose_device
from robbench.runner import Shared, reason_of
from robbench.tasks import Outcome, Report, Task, doomed, overdue, perform, remaining

RETRIES = 2  # of a task whose process died

_shared: Shared | None = None
_reports: Any = None


def _start_worker(
    out: Path,
    data_dir: Path | None,
    device: str,
    given: dict[str, Any],
    keep_images: bool,
    reports: Any,
    folder: str,
) -> None:
    global _shared, _reports
    tempfile.tempdir = folder  # what a process leaves that is ended goes with the pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _shared = Shared(out, data_dir, choose_device(device), given, keep_images=keep_images)
    _reports = reports


def _leave_with_parent() -> None:
    """A parent that is killed cannot end its workers, and they would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Task, timeout: float | None) -> Outcome:
    assert _shared is not None

    def report(done: int, total: int) -> None:
        _reports.put((task.id, done, total))

    if timeout is None:
        return perform(task, _shared, report)
    with _note(tempfile.gettempdir(), task).open("w") as note:
        # a watchdog in C: it also ends what does not return to Python
        faulthandler.dump_traceback_later(timeout, file=note, exit=True)
        try:
            return perform(task, _shared, report)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _note(folder: str, task: Task) -> Path:
    """Where the watchdog of a task writes what it saw."""
    return Path(folder) / f"{hashlib.sha256(task.id.encode()).hexdigest()}.overdue"


class _Pool:
    """Worker processes and the queue they report on; both are replaced when a worker dies, since
    it may have died holding the queue's lock."""

    def __init__(self, workers: int, shared: Shared) -> None:
        context = multiprocessing.get_context("spawn")
        self.reports = context.Queue()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        data = (shared.out, shared.data_dir, str(shared.device), shared.given, shared.keep_images)
        arguments = (*data, self.reports, self.folder.name)
        self.executor = ProcessPoolExecutor(workers, context, _start_worker, arguments)

    def drain(self, by_id: Mapping[str, Task], report: Report) -> None:
        while True:
            try:
                task_id, done, total = self.reports.get_nowait()
            except queue.Empty:
                return
            report(by_id[task_id], done, total)

    def overdue(self, task: Task) -> bool:
        """Whether a worker was ended because of this task."""
        note = _note(self.folder.name, task)
        return note.exists() and note.stat().st_size > 0

    def release(self) -> None:
        """Let idle workers end by themselves, so that what libraries hold in them is released."""
        self.executor.shutdown(wait=True)

    def close(self) -> None:
        """End workers that may be busy or stuck."""
        for process in list((getattr(self.executor, "_processes", None) or {}).values()):
            process.terminate()
        self.executor.shutdown(wait=True, cancel_futures=True)
        self.folder.cleanup()


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
        ready = [task for task in self.waiting if task.awaits <= self.settled]
        # suspects lie in front
        free = max(0, (1 if self.deaths else self.workers) - running)
        chosen = {task.id: remaining(task, self.broken) for task in ready[:free]}
        self.waiting = [task for task in self.waiting if task.id not in chosen]
        return list(chosen.values())

    def doomed(self) -> Iterator[Outcome]:
        """Outcomes of waiting tasks whose trainings went wrong."""
        for task in list(self.waiting):
            outcome = doomed(task, self.broken)
            if outcome:
                self.waiting.remove(task)
                self.settle(outcome)
                yield outcome

    def settle(self, outcome: Outcome) -> None:
        self.settled.add(outcome.task.id)
        self.deaths.pop(outcome.task.id, None)
        if outcome.reason:
            self.broken[outcome.task.id] = outcome

    def died(
        self, lost: Sequence[Task], late: Sequence[Task], timeout: float | None
    ) -> Iterator[Outcome]:
        """Queue what was running when a worker died; the outcomes of what has died too often.

        late: what a worker was ended for, if it was; then nothing else is suspect.
        """
        outcomes = [overdue(task, timeout) for task in late]
        for task in [] if late else lost:
            self.deaths[task.id] = self.deaths.get(task.id, 0) + 1
            if self.deaths[task.id] > RETRIES:
                reason = f"the worker process died {RETRIES + 1} times"
                outcomes.append(Outcome(task, reason=reason))
        for outcome in outcomes:
            self.settle(outcome)
        self.waiting[:0] = [task for task in lost if task.id not in self.settled]
        yield from outcomes


def parallel(
    tasks: Sequence[Task], shared: Shared, workers: int, report: Report, timeout: float | None
) -> Iterator[Outcome]:
    """Several processes; the pool is rebuilt when one of them dies."""
    by_id = {task.id: task for task in tasks}
    there = {need for task in tasks for need in task.awaits if need not in by_id}
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
                    running[pool.executor.submit(_work, task, timeout)] = task
                except BrokenExecutor:  # while it was idle: the task is not to blame
                    todo.waiting.insert(0, task)
                    dead = True
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            pool.drain(by_id, report)
            for future in finished:
                task = running.pop(future)
                outcome = _result(future, task)
                if outcome is None:
                    dead = True
                    lost.append(task)
                    continue
                todo.settle(outcome)
                yield outcome
            if dead:
                lost += running.values()
                running.clear()
                late = [task for task in lost if pool.overdue(task)]
                pool.close()
                pool = _Pool(workers, shared)
                yield from todo.died(lost, late, timeout)
        pool.release()
    finally:
        pool.close()


def _result(future: Future[Outcome], task: Task) -> Outcome | None:
    """None where the worker died."""
    try:
        return future.result()
    except BrokenExecutor:
        return None
    except Exception as error:  # an outcome that cannot be sent between processes
        return Outcome(task, reason=reason_of(error))
