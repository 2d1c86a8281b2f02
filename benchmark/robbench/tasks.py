"""Units of work: trainings and shards of attacked cells, what each needs, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from robbench.attacks import Configured
from robbench.attacks.published import in_effect
from robbench.attacks.suite import MEANS
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.grid import EOT, Cell
from robbench.runner import (
    Part,
    Shared,
    base_keys,
    missing_training,
    needed_keys,
    reason_of,
    run_shard,
    shards,
)

Report = Callable[["Task", int, int], None]


@dataclass(frozen=True)
class Task:
    """A training, or one shard of the cells that share an x'."""

    id: str
    kind: Literal["train", "attack"]
    label: str
    weight: float
    needs: frozenset[str] = frozenset()  # ids of trainings without which there is nothing to do
    cells: tuple[Cell, ...] = ()
    shard: int = 0
    job: tuple[str, str, int] | None = None  # dataset, spec, train seed
    targets: Mapping[str, frozenset[str]] = field(default_factory=dict)  # trainings by cell id
    lost: Mapping[str, Part] = field(default_factory=dict)  # of targets that could not be trained

    @property
    def awaits(self) -> frozenset[str]:
        """Ids of all trainings that must have ended, well or not."""
        return self.needs.union(*self.targets.values())


@dataclass
class Outcome:
    """What became of a task: parts of cells, or why there are none."""

    task: Task
    parts: list[Part] = field(default_factory=list)
    reason: str | None = None
    mistake: bool = False  # the reason is an InputError


def plan(cells: Sequence[Cell], shared: Shared) -> list[Task]:
    """Trainings first, bases before what is built on them; then the attacks, costly ones first,
    so that no long one is left over for a single worker."""
    jobs = missing_training(cells, shared)
    tasks = []
    for key, (name, spec, seed) in jobs.items():
        needs = frozenset(base_keys(spec, shared.dataset(name), seed)).intersection(jobs)
        weight = _training_weight(spec, len(shared.dataset(name).train.y))
        label = f"train {spec}"
        tasks.append(Task(key, "train", label, weight, needs, job=(name, spec, seed)))
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.attack_key(), []).append(cell)
    attacks = []
    for key, group in groups.items():
        dataset = shared.dataset(group[0].dataset)
        needs = frozenset[str]().union(
            *(_needs(source, group[0], shared, jobs) for source in group[0].sources(shared.models))
        )
        targets = {cell.id: _needs(cell.defense, cell, shared, jobs) for cell in group}
        for shard, images in enumerate(shards(group[0].n, dataset.shape)):
            weight = _attack_weight(group[0], len(images), shared)
            attacks.append(
                Task(
                    f"{key}/{shard}",
                    "attack",
                    str(group[0]),
                    weight,
                    needs,
                    tuple(group),
                    shard,
                    targets=targets,
                )
            )
    return tasks + sorted(attacks, key=lambda task: -task.weight)


def _needs(spec: str, cell: Cell, shared: Shared, jobs: Iterable[str]) -> frozenset[str]:
    return frozenset(needed_keys(spec, cell, shared)).intersection(jobs)


def _training_weight(spec: str, images: int) -> float:
    """Passes of one image through one network, for the estimate of the time that is left."""
    defense = resolve(spec)[-1]
    inner = 0
    if defense.adversarial:
        inner = 1 if defense.adversarial.kind == "fgsm" else defense.adversarial.steps
    return 3.0 * defense.epochs * images * defense.members * (1 + inner)


def _attack_weight(cell: Cell, images: int, shared: Shared) -> float:
    settings = in_effect(Configured.of(cell.attack))
    steps = settings.get("steps") or settings.get("max_iter") or settings.get("n_queries") or 20
    if cell.source in shared.models:
        members = len(shared.models[cell.source].deployed.members)
    else:
        members = sum(part.size for part in resolve(cell.source))
    rounds = float(steps) if isinstance(steps, (int, float)) else 20.0
    rounds *= settings.get("search", 1)  # of a constant, each as long
    if budget := settings.get("budget"):
        rounds = MEANS[budget].steps * len(cell.stages(shared.models))
    draws = EOT if cell.setting.eot == "auto" else cell.setting.eot
    return 3.0 * images * members * draws * rounds


def perform(task: Task, shared: Shared, report: Callable[[int, int], None]) -> Outcome:
    """Run one task here; never raises for what a task can do wrong."""
    try:
        if task.job is not None:
            name, spec, train_seed = task.job
            shared.deploy(spec, shared.dataset(name), train_seed, report)
            return Outcome(task)
        cells = [cell for cell in task.cells if cell.id not in task.lost]
        made = run_shard(cells, task.shard, shared, report) if cells else []
        return Outcome(task, [*made, *task.lost.values()])
    except InputError as error:
        return Outcome(task, reason=str(error), mistake=True)
    except (Exception, SystemExit) as error:  # somebody else's code may also call sys.exit
        return Outcome(task, reason=reason_of(error))


def overdue(task: Task, timeout: float | None) -> Outcome:
    return Outcome(task, reason=f"TimeoutError: not done after {timeout:g} s")


def doomed(task: Task, broken: Mapping[str, Outcome]) -> Outcome | None:
    for need in sorted(task.needs):
        if need in broken:
            return replace(broken[need], task=task)
    return None


def remaining(task: Task, broken: Mapping[str, Outcome]) -> Task:
    """The task, without the targets that could not be trained."""
    lost = {}
    for cell in task.cells:
        for need in sorted(task.targets.get(cell.id, ())):
            if need in broken:
                cause = broken[need]
                lost[cell.id] = Part(cell, task.shard, cause.reason, cause.mistake)
    return replace(task, lost=lost) if lost else task
