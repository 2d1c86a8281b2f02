"""Runs in one process and in several: equal records, and nothing lost when a process dies."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from robbench import datasets, registry, workers
from robbench.cli import cli
from robbench.errors import InputError
from robbench.executors import Outcome, Task, execute, measure, plan
from robbench.grid import Block
from robbench.records import Store, read
from robbench.runner import Shared

TINY = "standard(epochs=1)"
NOISY = "ito(base=standard(epochs=1), epochs=1, members=1)"
DYING = '''
import os, signal
from pathlib import Path
from robbench.attacks import attack


@attack("dying", norms=("linf",))
def dying(access, x, y, threat, rng):
    """Kills its process the first time that it is called."""
    note = Path(os.environ["DYING_NOTE"])
    if not note.exists():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x
'''
STUCK = '''
import time
from robbench.attacks import attack


@attack("stuck", norms=("linf",))
def stuck(access, x, y, threat, rng, *, steps: int = 10_000):
    """Takes no notice of anything."""
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
'''


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    """Both checkpoints in the cache of the test run, so that every other test finds them."""
    shared = Shared(Path("nowhere"), None, torch.device("cpu"))
    for spec in (TINY, NOISY):
        shared.deploy(spec, digits, 0)


@pytest.fixture
def shared(tmp_path):
    return Shared(tmp_path / "out", None, torch.device("cpu"))


def cells(digits, **fields):
    given = {"defense": TINY, "attack": "fgsm", "eps": "0.1", "setting": "whitebox", "n": 20}
    return list(Block(**(given | fields)).cells(digits))


def content(record):
    """All that is written but the seconds it took."""
    data = json.loads(record.text())
    data["cost"].pop("seconds", None)
    return data


def arguments(out, *, eps, attack="fgsm", workers=1):
    options = f"--baseline none --setting whitebox -n 20 --workers {workers} --quiet --device cpu"
    given = ["--defense", TINY, "--attack", attack, "--eps", eps, "--out", str(out)]
    return ["run", *given, *options.split()]


def start(out, cache, **options):
    """`robbench run` as a process of its own, in its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "robbench", *arguments(out, **options)],
        env={**os.environ, "ROBBENCH_CACHE": str(cache)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@contextlib.contextmanager
def ended(*processes):
    """Whatever happens, nothing of these process groups is left."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def pages(out):
    return {path.name: path.read_bytes() for path in out.glob("digits.*")}


def test_trainings_come_first_and_bases_before_what_is_built_on_them(
    digits, shared, tmp_path, monkeypatch
):
    monkeypatch.setenv("ROBBENCH_CACHE", str(tmp_path))
    tasks = plan(cells(digits, defense=f"{NOISY},{TINY}", attack="fgsm,pgd"), shared)
    assert [task.kind for task in tasks] == ["train"] * 2 + ["attack"] * 4
    base, built = tasks[:2]
    assert (base.job[1], base.needs) == (TINY, frozenset())
    assert built.needs == {base.id}
    weights = [task.weight for task in tasks[2:]]
    assert weights == sorted(weights, reverse=True)
    needs = {task.cells[0].defense: task.needs for task in tasks[2:]}
    assert needs == {TINY: {base.id}, cells(digits, defense=NOISY)[0].defense: {base.id, built.id}}


def test_what_has_a_checkpoint_is_not_trained_again(digits, shared, trained):
    tasks = plan(cells(digits, defense=f"{NOISY},{TINY}"), shared)
    assert [task.kind for task in tasks] == ["attack"] * 2


def test_cells_that_share_their_adversarial_examples_are_one_task(digits, shared, trained):
    (task,) = plan(
        cells(digits, defense=f"{TINY},{NOISY}", oracle="standard", setting="transfer"), shared
    )[1:]
    assert len(task.cells) == 2


@contextlib.contextmanager
def installed(folder, name, code):
    """An attack as a package of its own, so that a fresh process finds it by its entry point."""
    (folder / f"{name}_plugin.py").write_text(code)
    metadata = folder / f"{name}_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        f"[robbench.attacks]\n{name} = {name}_plugin:{name}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        list(registry.attacks)  # the native ones are registered first
        patch.setattr(registry.attacks, "_entries", dict(registry.attacks._entries))
        importlib.import_module(f"{name}_plugin")
        yield patch


@pytest.fixture(scope="module")
def both_ways(digits, trained, tmp_path_factory):
    """The same cells in two processes, one of which dies on the way, and in this one."""
    folder = tmp_path_factory.mktemp("plugin")
    shared = Shared(folder, None, torch.device("cpu"))
    threads = torch.get_num_threads()
    with installed(folder, "dying", DYING) as patch:
        patch.setenv("DYING_NOTE", str(folder / "note"))
        attacks = "dying,fgsm,pgd(steps=3)"
        grid = cells(digits, defense=f"{TINY},{NOISY}", attack=attacks, eps="0.1,0.2")
        torch.set_num_threads(2)  # the record tells what the workers have
        try:
            parallel = list(measure(grid, None, shared, 2))
            assert (folder / "note").exists(), "a process was killed"
            serial = list(measure(grid, None, shared, 1))
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)
    return parallel, serial


def test_a_process_that_dies_costs_no_cell(both_ways):
    parallel, _ = both_ways
    assert [record.status for record in parallel] == ["ok"] * 12
    assert {record.cell.attack for record in parallel} == {"dying", "fgsm", "pgd(steps=3)"}


def test_several_processes_and_one_make_the_same_records(both_ways):
    parallel, serial = ([content(record) for record in records] for records in both_ways)
    assert sorted(parallel, key=str) == sorted(serial, key=str)
    assert {record["provenance"]["threads"] for record in parallel} == {1}


def test_a_stuck_attack_is_ended_with_its_process(digits, trained, tmp_path):
    shared = Shared(tmp_path, None, torch.device("cpu"))
    with installed(tmp_path, "stuck", STUCK):
        (record,) = measure(cells(digits, attack="stuck"), None, shared, timeout=0.5)
    assert (record.status, record.reason) == ("failed", "TimeoutError: not done after 0.5 s")


def test_a_killed_run_goes_on_where_it_was(trained, tmp_path):
    """SIGKILL of the parent alone: its workers leave by themselves, no record is half written."""
    options = {"eps": "0.001,0.002,0.003,0.004,0.005,0.006", "attack": "pgd(steps=60)"}
    out, whole = tmp_path / "killed", tmp_path / "whole"
    cache = os.environ["ROBBENCH_CACHE"]
    process = start(out, cache, workers=2, **options)
    with ended(process):
        wait_for(lambda: list(out.glob("records/*/*/*.json")) or process.poll() is not None)
        process.kill()
        process.communicate(timeout=60)  # returns when nobody holds its standard output
    kept = {path: path.stat().st_mtime_ns for path in out.glob("records/*/*/*.json")}
    assert 1 <= len(kept) < 7, process.returncode
    assert all(read(path).status == "ok" for path in kept)
    assert CliRunner().invoke(cli, arguments(out, **options)).exit_code == 0
    assert len(list(Store(out).all())) == 7  # with the probe
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert CliRunner().invoke(cli, arguments(whole, **options)).exit_code == 0
    assert pages(out) == pages(whole) != {}


def test_two_runs_in_one_folder_both_finish(tmp_path):
    """They train the same checkpoint, run the same cells and write the same pages."""
    out = tmp_path / "out"
    options = {"eps": "0.1,0.2"}
    both = [start(out, tmp_path / "cache", **options) for _ in range(2)]
    with ended(*both):
        outputs = [process.communicate(timeout=120)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    records = list(Store(out).all())
    assert [record.status for record in records] == ["ok"] * 3  # with the probe
    assert set(pages(out)) == {f"digits.{end}" for end in ("md", "cells.md", "csv", "flags.json")}
    assert not list(out.rglob("*.tmp"))


class Broken(BrokenProcessPool):
    """What futures of a pool raise after a worker died."""


class FakePool:
    """A pool whose tasks end one after the other, oldest first; those called `killer…` break it as
    often as their label says, and with it all that is running; those called `slow…` are ended."""

    started: list[str] = []
    beside: list[int] = []  # how many were running at each start

    def __init__(self, workers, shared):
        self.executor, self.running, self.broken = self, {}, False

    def submit(self, work, task, timeout):
        if self.broken:
            raise Broken
        FakePool.started.append(task.id)
        FakePool.beside.append(len(self.running))
        future = Future()
        future.pool = self
        self.running[future] = task
        return future

    @staticmethod
    def wait(futures, timeout, return_when):
        """In place of concurrent.futures.wait."""
        for future in futures:
            future.pool.finish(future)
            break
        return [future for future in futures if future.done()], []

    def finish(self, future):
        task = self.running.pop(future)
        self.late = task.id.startswith("slow")
        kills = task.id.startswith("killer")
        if self.late or (kills and FakePool.started.count(task.id) <= int(task.label)):
            self.broken = True
            for each in (future, *self.running):
                each.set_exception(Broken())
        elif task.id.startswith("odd"):
            future.set_exception(TypeError("cannot pickle"))
        else:
            reason = "diverged" if task.id.startswith("bad") else None
            mistake = task.id.startswith("mistake")
            reason = "no such folder" if mistake else reason
            future.set_result(Outcome(task, reason=reason, mistake=mistake))

    def overdue(self, task):
        return self.late and task.id.startswith("slow")

    def drain(self, by_id, report):
        pass

    def release(self):
        assert not self.running and not self.broken

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Runs tasks in a fake pool of two and returns id -> outcome."""
    monkeypatch.setattr(workers, "_Pool", FakePool)
    monkeypatch.setattr(workers, "wait", FakePool.wait)
    monkeypatch.setattr(FakePool, "started", [])
    monkeypatch.setattr(FakePool, "beside", [])
    shared = Shared(tmp_path, None, torch.device("cpu"))

    def run(*tasks):
        outcomes = list(execute(tasks, shared, 2, lambda task, done, total: None, 3.0))
        assert len(outcomes) == len(tasks)
        return {outcome.task.id: outcome for outcome in outcomes}

    return run


def task(name, *needs, label=""):
    return Task(name, "train", label, 1.0, frozenset(needs))


def test_a_task_that_kills_its_worker_three_times_fails_alone(fake):
    found = fake(task("killer", label="9"), *(task(f"innocent {k}") for k in range(5)))
    assert found["killer"].reason == "the worker process died 3 times"
    assert all(found[f"innocent {k}"].reason is None for k in range(5))
    assert FakePool.started.count("killer") == 3
    assert max(FakePool.started.count(f"innocent {k}") for k in range(5)) <= 2


def test_a_task_that_kills_its_worker_twice_is_done_in_the_end(fake):
    found = fake(task("killer", label="2"), task("innocent"))
    assert [outcome.reason for outcome in found.values()] == [None, None]


def test_suspects_run_alone_and_then_all_run_side_by_side_again(fake):
    fake(task("killer", label="1"), *(task(f"innocent {k}") for k in range(3)))
    assert list(zip(FakePool.started, FakePool.beside, strict=True)) == [
        ("killer", 0),
        ("innocent 0", 1),
        ("killer", 0),
        ("innocent 0", 0),
        ("innocent 1", 0),
        ("innocent 2", 1),
    ]


def test_what_ran_beside_an_overdue_task_runs_again_and_is_not_suspect(fake):
    found = fake(task("slow"), task("innocent 0"), task("innocent 1"))
    assert found["slow"].reason == "TimeoutError: not done after 3 s"
    assert [found[f"innocent {k}"].reason for k in range(2)] == [None, None]
    assert list(zip(FakePool.started, FakePool.beside, strict=True)) == [
        ("slow", 0),
        ("innocent 0", 1),
        ("innocent 0", 0),
        ("innocent 1", 1),
    ]


def test_two_killers_are_told_from_the_innocent(fake):
    found = fake(task("killer a", label="9"), task("innocent"), task("killer b", label="9"))
    assert {name for name, outcome in found.items() if outcome.reason} == {"killer a", "killer b"}


def test_a_worker_that_dies_while_it_is_idle_is_nobodys_fault(fake, monkeypatch):
    pools = []

    def broken_at_first(workers, shared):
        pools.append(FakePool(workers, shared))
        pools[-1].broken = len(pools) == 1
        return pools[-1]

    monkeypatch.setattr(workers, "_Pool", broken_at_first)
    found = fake(task("a"), task("b"))
    assert [outcome.reason for outcome in found.values()] == [None, None]
    assert len(pools) == 2


def test_an_outcome_that_cannot_be_sent_fails_its_task(fake):
    assert fake(task("odd"), task("innocent"))["odd"].reason == "TypeError: cannot pickle"


@pytest.mark.parametrize("first", ["bad", "mistake", "killer"])
def test_what_is_built_on_a_failed_training_shares_its_outcome(fake, first):
    chain = [task(first, label="9"), task("next", first), task("last", "next")]
    found = fake(*chain, task("other"))
    cause = found[first]
    for name in ("next", "last"):
        assert (found[name].reason, found[name].mistake) == (cause.reason, cause.mistake)
        assert name not in FakePool.started
    assert found["other"] == Outcome(found["other"].task)


def test_a_training_of_a_target_is_waited_for_but_its_failure_is_not_shared(fake):
    crafted = Task("crafted", "attack", "", 1.0, targets={"cell": frozenset(["bad target"])})
    found = fake(crafted, task("bad target"))
    assert FakePool.started == ["bad target", "crafted"]
    assert found["crafted"].reason is None


def test_tasks_wait_for_what_they_need(fake):
    fake(task("last", "first", "second"), task("second", "first"), task("first"))
    assert FakePool.started == ["first", "second", "last"]


def failing_deploy(monkeypatch, error):
    """Every training of `standard` raises; returns the list of what was asked for."""
    asked, deploy = [], Shared.deploy

    def failing(self, spec, dataset, train_seed, progress=lambda done, total: None):
        asked.append(spec)
        if spec == "standard":
            raise error
        return deploy(self, spec, dataset, train_seed, progress)

    monkeypatch.setattr(Shared, "deploy", failing)
    return asked


@pytest.mark.parametrize("error", [RuntimeError("loss nan"), TypeError("no"), SystemExit(3)])
def test_a_failed_training_fails_its_cells_only(digits, shared, trained, monkeypatch, error):
    failing_deploy(monkeypatch, error)
    found = list(measure(cells(digits, defense=f"standard,{TINY}"), None, shared))
    reasons = {record.cell.defense: record.reason for record in found}
    assert reasons == {"standard": f"{type(error).__name__}: {error}", TINY: None}


def test_a_mistake_of_the_user_fails_its_cells_after_the_others_finished(
    digits, shared, trained, monkeypatch
):
    asked = failing_deploy(monkeypatch, InputError("no room for the checkpoint"))
    store = Store(shared.out)
    grid = cells(digits, defense=f"standard,{TINY}", attack="fgsm,pgd")
    found = list(measure(grid, store, shared))
    assert [record.reason for record in found] == [None] * 2 + ["no room for the checkpoint"] * 2
    assert {record.id for record in store.all()} == {cell.id for cell in grid}
    assert asked.count("standard") == 1, "it is not trained once more for each attack"


def test_a_mistake_that_lets_nothing_run_is_raised_and_leaves_no_record(
    digits, shared, monkeypatch
):
    failing_deploy(monkeypatch, InputError("no room for the checkpoint"))
    store, grid = Store(shared.out), cells(digits, defense="standard", attack="fgsm,pgd")
    with pytest.raises(InputError, match="^no room for the checkpoint$"):
        list(measure(grid, store, shared))
    assert list(store.all()) == []
    found = list(measure(grid, store, shared, strict=False))  # others finished at another time
    assert {record.reason for record in found} == {"no room for the checkpoint"}


@pytest.mark.parametrize("error", [RuntimeError("loss nan"), InputError("no room")])
def test_a_target_that_cannot_be_trained_fails_its_own_cells_only(
    digits, shared, trained, monkeypatch, error
):
    asked = failing_deploy(monkeypatch, error)
    grid = cells(digits, defense=["standard", NOISY], setting="transfer", oracle=TINY)
    assert len({cell.attack_key() for cell in grid}) == 1
    found = {record.cell.defense: record for record in measure(grid, None, shared)}
    failed = found.pop("standard")
    assert failed.reason.removeprefix("RuntimeError: ") == str(error)
    assert [record.status for record in found.values()] == ["ok"]
    assert asked.count("standard") == 1


def test_without_its_oracle_no_target_is_attacked(digits, shared, trained, monkeypatch):
    failing_deploy(monkeypatch, RuntimeError("loss nan"))
    grid = cells(digits, defense=[TINY, NOISY], setting="transfer", oracle="standard")
    found = list(measure(grid, None, shared))
    assert [record.reason for record in found] == ["RuntimeError: loss nan"] * 2


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_no_time_is_refused(digits, shared, timeout):
    with pytest.raises(InputError, match="timeout = .*: write a positive number of seconds"):
        list(measure(cells(digits), None, shared, timeout=timeout))


def test_a_record_is_written_before_it_is_reported(digits, shared, trained):
    store = Store(shared.out)
    for record in measure(cells(digits, eps="0.1,0.2"), store, shared):
        assert content(store.get(record.cell)) == content(record)


def test_progress_is_reported_for_every_task(digits, shared, trained):
    steps, ended = [], []
    grid = cells(digits, attack="pgd(steps=4)", eps="0.001")
    list(measure(grid, None, shared, 1, lambda *step: steps.append(step[1:]), ended.append))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [task.kind for task in ended] == ["attack"]
