"""Units of work: trainings and shards of attacked cells, what each needs, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

from robbench.attacks import Configured
from robbench.attacks.published import in_effect
from robbench.cell import Cell
from robbench.checkpoints import Trained
from robbench.datasets import Dataset
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.grid import EOT
from robbench.judge import SCORING_DRAWS
from robbench.registry import Spec
from robbench.runner import (
    Part,
    Shared,
    Training,
    base_keys,
    missing_training,
    needed_keys,
    reason_of,
    run_shard,
    shards,
)
from robbench.training import LOOKED_AT

# settings that say how often an attack asks, and those that multiply it
ROUNDS = (
    "steps", "rounds", "tries", "radii", "max_iter", "max_iterations", "n_queries", "n_iters",
    "queries",
)  # fmt: skip
REPEATS = ("restarts", "search", "samples", "evaluations", "targets")
UNSAID = 20.0  # rounds of an attack that finds out itself how many it makes
Models = Mapping[str, Trained]  # of the caller, by their names
NO_MODELS: Models = MappingProxyType({})
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


def plan(cells: Sequence[Cell], shared: Shared, trainings: Iterable[Training] = ()) -> list[Task]:
    """Trainings first, those of the cells and others, bases before what is built on them; then the
    attacks, costly ones first, so that no long one is left over for a single worker."""
    jobs = missing_training(cells, shared, trainings)
    tasks = []
    for key, (name, spec, seed) in jobs.items():
        needs = frozenset(base_keys(spec, shared.dataset(name), seed)).intersection(jobs)
        weight = training_passes(spec, shared.dataset(name)).weight
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
        weight = attack_passes(group[0], shared.models).weight
        weight += sum(scoring_passes(cell.defense, shared.models).weight for cell in group)
        for shard, images in enumerate(shards(group[0].n, dataset.shape)):
            attacks.append(
                Task(
                    f"{key}/{shard}",
                    "attack",
                    str(group[0]),
                    weight * len(images),
                    needs,
                    tuple(group),
                    shard,
                    targets=targets,
                )
            )
    return tasks + sorted(attacks, key=lambda task: -task.weight)


def _needs(spec: str, cell: Cell, shared: Shared, jobs: Iterable[str]) -> frozenset[str]:
    return frozenset(needed_keys(spec, cell, shared)).intersection(jobs)


class Passes(NamedTuple):
    """Passes of single images through single networks; a backward one is as long as two."""

    forwards: float
    backwards: float = 0.0

    @property
    def weight(self) -> float:
        return self.forwards + 2 * self.backwards

    def times(self, factor: float) -> Passes:
        return Passes(factor * self.forwards, factor * self.backwards)


def looked_at(dataset: Dataset) -> int:
    """Images that a training looks at after each epoch."""
    return sum(min(LOOKED_AT, len(part.y)) for part in (dataset.train, dataset.validation))


def training_passes(spec: str, dataset: Dataset) -> Passes:
    """Of all epochs of a training, with the looks at the end of each."""
    (defense,) = resolve(spec)
    steps = 1
    if inner := defense.adversarial:
        steps += 1 if inner.kind == "fgsm" else inner.steps
        steps += inner.clean > 0 or inner.kind == "trades"
    looks = looked_at(dataset)
    gradients = steps * len(dataset.train.y)
    return Passes(gradients + looks, gradients).times(defense.epochs * defense.size)


class Answering(NamedTuple):
    """What stands behind one answer of a defense."""

    networks: int
    draws: int
    stochastic: bool

    @classmethod
    def of(cls, spec: str, models: Models = NO_MODELS) -> Answering:
        if spec in models:
            found = models[spec].deployed
            return cls(len(found.members), found.draws, found.stochastic)
        parsed = Spec.parse(spec)
        parts = list(zip(parsed.parts or (parsed,), resolve(parsed), strict=True))
        networks = sum(1 if one.member is not None else part.size for one, part in parts)
        random = any(part.random for _, part in parts)
        draws = max(part.draws for _, part in parts) if random else 1
        return cls(networks, draws, any(part.stochastic for _, part in parts))


def behind(cell: Cell, models: Models = NO_MODELS) -> int:
    """Passes of single networks behind each answer that the attack asks for."""
    source = Answering.of(cell.source, models)
    if cell.setting.kind == "blackbox":
        return source.networks * source.draws
    return source.networks * (EOT if cell.setting.eot == "auto" else cell.setting.eot)


def attack_passes(cell: Cell, models: Models = NO_MODELS) -> Passes:
    """Of one image under the attack, as its settings say: each stage of a suite goes its whole
    way, and nothing ends early."""
    source = Answering.of(cell.source, models)
    draws = behind(cell, models) / source.networks
    stages = [Configured.of(stage.attack) for stage in cell.stages(models)]
    found = [
        _iterations(stage, draws if stage.entry.needs == "gradients" else source.draws)
        for stage in stages
    ] or [_iterations(Configured.of(cell.attack), draws)]
    return Passes(*map(sum, zip(*found, strict=True))).times(source.networks)


def scoring_passes(spec: str, models: Models = NO_MODELS) -> Passes:
    """Of one image that the judge scores."""
    target = Answering.of(spec, models)
    answers = SCORING_DRAWS if target.stochastic else 1
    return Passes(answers * target.draws * target.networks)


def _iterations(attack: Configured, draws: float) -> Passes:
    """Of one image through one network, with so many draws behind each answer."""
    given = in_effect(attack)

    def number(name: str, default: float = 1) -> float:
        value = given.get(name)
        return float(value) if isinstance(value, (int, float)) and value else default

    if isinstance(inner := given.get("attack"), str):  # it may hold draws of its own
        return _iterations(Configured.of(inner), number("draws", draws))
    rounds = next((number(name, UNSAID) for name in ROUNDS if name in given), 1)
    for name in REPEATS:
        rounds *= number(name)
    if attack.entry.needs != "gradients":
        return Passes(draws * rounds * (2 if "samples" in given else 1))
    return Passes(draws * (rounds + number("queries", 0)), draws * rounds)


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
