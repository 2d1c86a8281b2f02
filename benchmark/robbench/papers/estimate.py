"""What a reproduction will take before it starts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean, median
from typing import Literal, NamedTuple

import torch
from torch import nn

from robbench import networks
from robbench.cell import Cell
from robbench.datasets import Dataset
from robbench.datasets.dataset import shortened
from robbench.defense import Defense, resolve
from robbench.environment import environment
from robbench.errors import InputError
from robbench.randomness import preserved_random_state
from robbench.recipes import Optimisation
from robbench.records import Store
from robbench.registry import Spec
from robbench.runner import Shared, Training, shards
from robbench.siblings import network_of
from robbench.tasks import (
    Passes,
    Task,
    attack_passes,
    behind,
    looked_at,
    plan,
    scoring_passes,
)
from robbench.training import train

BATCH = 256  # images of a pass that is timed, at most
BATCHES = 10  # of a training that is timed, at most
FEW = 2  # images that are begun with: batch normalisation wants two
ENOUGH = 0.1  # seconds that can be measured well: no more images then
SLOW = 1.0  # seconds that are not spent a second time
LONG = 5.0  # seconds that no batch is measured for
# fields of a recipe that no step is longer for
SCHEDULE = ("lr", "schedule", "decay_at", "lr_end", "weight_decay", "select")
Kind = Literal["attack", "answer"]


class Seconds(NamedTuple):
    """Of the trainings and attacks of a plan, and of what runs alone after it; least: of the
    longest chain of tasks that wait for each other."""

    train: float
    attack: float
    alone: float
    least: float

    def until(self, workers: int) -> float:
        """The end, with so many processes."""
        return max((self.train + self.attack) / workers, self.least) + self.alone


def estimate(
    cells: Sequence[Cell],
    shared: Shared,
    workers: int,
    trainings: Sequence[Training] = (),
    shown: Sequence[Cell] = (),
) -> str:
    """How many trainings and attacks there are, and the hours that they will take here.

    trainings: what figures and costs need beside the cells; shown: cells that figures attack for
    their images. Passes are those of records of the same attack, else what its settings say; the
    time of a pass is measured, once for every network on every dataset.
    """
    tasks = plan(cells, shared, trainings)
    watched = [training for training in trainings if training.watched]
    if not (tasks or watched or shown):
        return "No training and no attack is missing."
    if shared.device.type != "cpu":
        workers = 1  # as they are run
    found = seconds(tasks, watched, shown, shared)
    trained = sum(task.kind == "train" for task in tasks)
    lines = [
        f"{trained} trainings, about {_text(found.train)}; {len(tasks) - trained} shards of"
        f" attacks on {len(cells)} cells, about {_text(found.attack)}."
    ]
    if watched or shown:
        lines.append(
            f"For figures alone {len(watched)} trainings and {len(shown)} attacks more, one after"
            f" the other, about {_text(found.alone)}."
        )
    lines.append(
        f"With {workers} {'worker' if workers == 1 else 'workers'} on {shared.device}: about"
        f" {_text(found.until(workers))}. It can be interrupted and goes on where it was."
    )
    return "\n".join(lines)


def _text(seconds: float) -> str:
    if seconds < 60:
        return "a minute or less"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    hours = float(f"{seconds / 3600:.2g}")  # it is no better than that
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:g} h"


def seconds(
    tasks: Sequence[Task], watched: Sequence[Training], shown: Sequence[Cell], shared: Shared
) -> Seconds:
    """What a plan takes, and what follows it."""
    sums: dict[str, float] = defaultdict(float)
    ends: dict[str, float] = {}
    clock = _Clock(shared)
    with _one_thread(shared.device):
        for task in tasks:  # what they wait for stands before them
            took = clock.task(task)
            sums[task.kind] += took
            ends[task.id] = took + max((ends[need] for need in task.awaits), default=0.0)
        alone = sum(clock.training(each.defense, each.dataset) for each in watched)
        alone += sum(clock.attack([cell], clock.shard(cell)) for cell in shown)
    return Seconds(sums["train"], sums["attack"], alone, max(ends.values(), default=0.0))


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """As many threads as a worker has: several share the cores."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Run(NamedTuple):
    """A recorded attack, of one image. behind: networks times draws behind each answer."""

    cell: Cell
    passes: Passes
    behind: int
    seconds: float | None  # None: on another device


@dataclass
class _Clock:
    """Passes times seconds."""

    shared: Shared
    timed: dict[tuple[object, ...], float] = field(default_factory=dict)

    @cached_property
    def runs(self) -> dict[str, list[Run]]:
        """What is recorded, by attack."""
        found: dict[str, list[Run]] = defaultdict(list)
        device = environment(self.shared.device)["device"]
        for record in Store(self.shared.out).all():
            if record.status != "ok":
                continue
            cell, here = record.cell, record.provenance.get("device") == device
            passes = Passes(record.cost["forwards"], record.cost["backwards"])
            took = record.cost["seconds"] / cell.n if here else None
            with suppress(InputError):  # of a defense that only its author has
                found[cell.attack].append(Run(cell, passes, behind(cell), took))
        return found

    def task(self, task: Task) -> float:
        if task.job is not None:
            name, spec, _ = task.job
            return self.training(spec, name)
        size = self.shard(task.cells[0])
        return self.attack(task.cells, min(size, task.cells[0].n - size * task.shard))

    def shard(self, cell: Cell) -> int:
        """Images of the first shard, which is the largest."""
        return len(shards(cell.n, self.shared.dataset(cell.dataset).shape)[0])

    def training(self, spec: str, name: str) -> float:
        """Of all epochs, with the looks after each."""
        dataset, (defense,) = self.shared.dataset(name), resolve(spec)
        if not defense.epochs:
            return 0.0
        (defense,) = resolve(defense.training_spec)
        groups = 1
        if not defense.joint:  # one after the other, each as long
            defense, groups = defense.model_copy(update={"members": 1}), defense.members
        same = {each: Optimisation.model_fields[each].default for each in SCHEDULE}
        brief = defense.model_copy(update={**same, "epochs": 1})
        key = (str(brief.spec), name)
        answer = self._pass("answer", brief, dataset, BATCH) * brief.size
        if key not in self.timed:
            self.timed[key] = _trained(brief, dataset, self.shared.device, answer)
        epoch = len(dataset.train.y) * self.timed[key] + looked_at(dataset) * answer
        return groups * defense.epochs * epoch

    def attack(self, cells: Sequence[Cell], images: int) -> float:
        """Of the cells that share an x': crafted once, and judged for each."""
        first = cells[0]
        key = ("attack", first.attack_key(), images)
        if key not in self.timed:
            self.timed[key] = self._crafted(first, images)
        found = self.timed[key]
        for cell in cells:
            judged = scoring_passes(cell.defense, self.shared.models).forwards
            target, dataset = resolve(cell.defense)[0], self.shared.dataset(cell.dataset)
            found += judged * self._pass("answer", target, dataset, round(images * judged))
        return images * found

    def _crafted(self, cell: Cell, images: int) -> float:
        """Seconds of one image: what the records that are most alike took, carried over to this
        network and as many networks and draws; without records what the settings say."""
        own, runs = behind(cell, self.shared.models), self.runs.get(cell.attack)
        if not runs:
            return self._passed(cell, attack_passes(cell, self.shared.models), images)

        def alike(run: Run) -> tuple[bool, ...]:
            other = run.cell
            return (
                other.setting.kind == cell.setting.kind,
                other.setting.queries == cell.setting.queries,
                run.behind == own,
                other.dataset == cell.dataset,
                other.threat == cell.threat,
                other.defense == cell.defense,
            )

        best = max(map(alike, runs))
        found = [run for run in runs if alike(run) == best]
        passes = [run.passes.times(own / run.behind) for run in found]
        took = self._passed(cell, Passes(*map(mean, zip(*passes, strict=True))), images)
        beside = [  # what the attack does between its passes, and passes of few images
            run.seconds / self._passed(run.cell, run.passes, self.shard(run.cell))
            for run in found
            if run.seconds is not None and run.cell.dataset == cell.dataset and run.passes.weight
        ]
        return took * max(1.0, median(beside) if beside else 1.0)

    def _passed(self, cell: Cell, passes: Passes, images: int) -> float:
        """Seconds of these passes of one image through the network that is attacked."""
        dataset, source = self.shared.dataset(cell.dataset), resolve(cell.source)[0]
        way = self._pass("attack", source, dataset, images)
        answer = self._pass("answer", source, dataset, images)
        alone = max(0.0, passes.forwards - passes.backwards)
        return passes.backwards * way + alone * answer

    def _pass(self, kind: Kind, defense: Defense, dataset: Dataset, images: int) -> float:
        """Seconds of one image in a pass of so many."""
        count = min(BATCH, 2 ** (max(1, images).bit_length() - 1))
        shape, labels = dataset.shape, len(dataset.labels)
        key = (kind, network_of(defense), shape, labels, count)
        if key not in self.timed:
            self.timed[key] = _timed(kind, network_of(defense), shape, labels, count,
                                     self.shared.device)  # fmt: skip
        return self.timed[key]


def _timed(
    kind: Kind,
    network: str,
    shape: tuple[int, int, int],
    labels: int,
    count: int,
    device: torch.device,
) -> float:
    """Seconds of one image: of a gradient by x, or of an answer."""
    spec = Spec.parse(network)
    built = networks.build(spec.name, dict(spec.settings), shape, labels).to(device)
    built.eval().requires_grad_(False)

    def once(count: int) -> float:
        x = torch.rand(count, *shape, device=device, requires_grad=kind == "attack")
        begin = time.perf_counter()
        scores = built(x)
        if kind == "attack":
            torch.autograd.grad(scores.logsumexp(dim=1).sum(), x)
        if x.is_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    return _clocked(once, count)


def _trained(defense: Defense, dataset: Dataset, device: torch.device, answer: float) -> float:
    """Seconds of one image in an epoch of a defense that starts from fresh weights, without the
    looks at its end; answer: seconds of one image in such a look."""

    def once(count: int) -> float:
        few = shortened(dataset, count, 1)
        brief = defense.model_copy(update={"batch_size": min(count, defense.batch_size)})
        with preserved_random_state():
            members = brief.build(dataset.shape, len(dataset.labels))
            if bases := brief.bases():
                built = [base.build(dataset.shape, len(dataset.labels)) for base in bases]
                brief.start(members, nn.ModuleList(each for group in built for each in group))
            brief.calibrate(members.to(device), few)
            curve = train(brief, members, few, 0, device)
        return max(0.0, sum(point["seconds"] for point in curve) - count * answer)

    size = len(dataset.train.y)
    return _clocked(once, min(BATCHES * defense.batch_size, size), min(defense.batch_size, size))


def _clocked(once: Callable[[int], float], most: int, batch: int = FEW) -> float:
    """Seconds of one image where `once` says those of so many: of `most`, or of as many as can be
    measured well, after a call that warms up. Fewer images than a batch take longer, each: they
    stand for it only where a whole one would take too long."""
    count = min(FEW, most)
    took = once(count)
    while took < SLOW:
        took = once(count)
        whole = batch if took / count * batch < LONG else count
        if took > ENOUGH and count >= whole:
            break
        took = min(took, once(count))
        if count == most:
            break
        count = min(most, max(8 * count, whole))
    return took / count
