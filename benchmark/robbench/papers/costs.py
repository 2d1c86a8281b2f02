"""What papers say their defenses cost: seconds, memory, parameters; as numbers and as ratios."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, FiniteFloat, TypeAdapter, model_validator

from robbench.checkpoints import key_of
from robbench.datasets import Dataset
from robbench.datasets.dataset import shortened
from robbench.defense import Defense, resolve
from robbench.errors import InputError, problem_of, unknown
from robbench.metrics import Measure
from robbench.metrics.costs import cost
from robbench.papers.cells import Load, training_of
from robbench.papers.derived import UNKNOWN
from robbench.papers.inputs import Inputs, Noting
from robbench.papers.paper import Binding, Scale, Strict
from robbench.randomness import preserved_random_state
from robbench.records import write_text
from robbench.runner import Shared, Training
from robbench.statistics import Interval
from robbench.training import train

BATCHES = 10  # of an epoch that is timed
Take = Callable[[], float]  # one measurement


class Function(NamedTuple):
    """prepare: what measures the cost of a defense, once a call. rounds: in which two defenses take
    turns, so that a busy machine slows both; 1 for what is counted."""

    prepare: Callable[[str, Dataset, Noting, Mapping[str, Any]], Take]
    rounds: int = 1


def _pass(
    spec: str, dataset: Dataset, shared: Noting, arguments: Mapping[str, Any]
) -> Callable[[], object]:
    """A forward pass over one batch."""
    defense = shared.deploy(spec, dataset, 0).deployed
    count = min(int(arguments.get("batch", 1000)), len(dataset.test.y))
    x = dataset.subset(count).x.to(shared.device)

    def once() -> object:
        with torch.no_grad():
            return defense.sample(x, 1)

    return once


def _seconds(spec: str, dataset: Dataset, shared: Noting, arguments: Mapping[str, Any]) -> Take:
    once, device = _pass(spec, dataset, shared, arguments), str(shared.device)
    repeats = max(1, int(arguments.get("repeats", 100)) // FUNCTIONS["inference-seconds"].rounds)
    return lambda: cost(once, device, repeats=repeats).seconds


def _memory(spec: str, dataset: Dataset, shared: Noting, arguments: Mapping[str, Any]) -> Take:
    """MB at the peak: on a CUDA device all that torch held, on a CPU what the pass added."""
    once, device = _pass(spec, dataset, shared, arguments), str(shared.device)
    return lambda: cost(once, device, repeats=1).peak / 2**20


def _epoch(spec: str, dataset: Dataset, shared: Noting, arguments: Mapping[str, Any]) -> Take:
    """Seconds of an epoch of all members, from its first batches."""
    trained = [part for part in resolve(spec) if part.epochs]
    if not trained:
        raise InputError(f"{spec} has no training of its own to be timed")
    takes = [_batches(part, dataset, shared) for part in trained]

    def once() -> float:
        return sum(each() for each in takes)

    once()  # the first one warms up
    return once


def _batches(defense: Defense, dataset: Dataset, shared: Noting) -> Take:
    """Begun as its training begins and given up after a few batches, time and again."""
    (whole,) = resolve(defense.training_spec)
    brief = whole.model_copy(update={"epochs": 1})
    count = min(BATCHES * whole.batch_size, len(dataset.train.y))
    few = shortened(dataset, count, 1)
    steps, all_steps = (-(-size // whole.batch_size) for size in (count, len(dataset.train.y)))
    with preserved_random_state():
        key = key_of(whole, dataset, 0)
        members = shared.shelf.beginning(whole, key, dataset, 0, shared.device)

    def once() -> float:
        with preserved_random_state():
            curve = train(brief, copy.deepcopy(members), few, 0, shared.device)
        return sum(point["seconds"] for point in curve) * all_steps / steps

    return once


def _parameters(spec: str, dataset: Dataset, shared: Noting, arguments: Mapping[str, Any]) -> Take:
    return lambda: float(parameters(spec, dataset))


def parameters(spec: str, dataset: Dataset) -> int:
    """How many parameters all members of a defense have."""
    with preserved_random_state():
        built = [part.build(dataset.shape, len(dataset.labels)) for part in resolve(spec)]
    return sum(value.numel() for members in built for value in members.parameters())


FUNCTIONS: Mapping[str, Function] = {
    "inference-seconds": Function(_seconds, 5),
    "inference-memory": Function(_memory, 3),
    "epoch-seconds": Function(_epoch, 3),
    "parameters": Function(_parameters),
}


DEPLOYED = ("inference-seconds", "inference-memory")  # costs of trained weights


class Kept(Strict):
    """A cost as it is kept. interval: from the least to the most of the rounds; none of what is
    counted."""

    value: Annotated[FiniteFloat, Field(ge=0)]
    interval: tuple[FiniteFloat, FiniteFloat] | None = None
    inputs: Inputs

    @model_validator(mode="after")
    def _inside(self) -> Kept:
        if self.interval and not 0 <= self.interval[0] <= self.value <= self.interval[1]:
            raise ValueError("the value does not lie in its interval")
        return self

    @property
    def measure(self) -> Measure:
        return Measure(self.value, Interval(*self.interval) if self.interval else UNKNOWN)


def timed(binding: Binding) -> bool:
    """Whether the cost depends on the machine."""
    return _look_up(binding).rounds > 1


def _look_up(binding: Binding) -> Function:
    name = str(binding.function)
    if name not in FUNCTIONS:
        raise unknown("cost", name, FUNCTIONS)
    return FUNCTIONS[name]


def _sides(binding: Binding, scale: Scale) -> list[tuple[Binding, Training]]:
    """What a cost is of and, where it is a ratio, the same with the fields of arguments.over."""
    arguments = dict(binding.arguments)
    over = arguments.pop("over", None)
    own = binding.model_copy(update={"arguments": arguments})
    made = []
    for side in [own, own.model_copy(update=over)] if over else [own]:
        assert side.defense and side.dataset
        made.append((side, training_of(side.defense, side.dataset, scale)))
    return made


def cost_key(binding: Binding, scale: Scale) -> str:
    """What a cost is kept under: the function, its arguments and the defense as it is here."""
    parts = []
    for side, made in _sides(binding, scale):
        given = [f"{key}={value}" for key, value in sorted(side.arguments.items())]
        parts.append(" · ".join([str(side.function), made.defense, made.dataset, *given]))
    return " · over ".join(parts)


def deployed(binding: Binding, scale: Scale) -> list[Training]:
    """What a cost is of, and what it is over."""
    return [made for _, made in _sides(binding, scale)]


def counted(binding: Binding, scale: Scale, load: Load) -> float:
    """The parameters, or their ratio."""
    made_of = deployed(binding, scale)
    first, *second = [parameters(each.defense, load(each.dataset)) for each in made_of]
    return first / second[0] if second else float(first)


def measure_cost(binding: Binding, scale: Scale, load: Load, shared: Shared) -> Kept:
    """The cost, or its ratio to that of arguments.over: the median of the rounds. InputError where
    there is none to be had."""
    function, noting = _look_up(binding), Noting.over(shared)
    takes = []
    for side, made in _sides(binding, scale):
        dataset = load(made.dataset)
        noting.note(dataset, made.defense)
        takes.append(_look_up(side).prepare(made.defense, dataset, noting, side.arguments))
    rounds = np.array([[take() for take in takes] for _ in range(function.rounds)])
    if not np.isfinite(rounds).all() or (rounds[:, 1:] == 0).any():
        raise InputError(f"{binding.function} cannot be measured on {shared.device} here")
    found = rounds[:, 0] / rounds[:, 1] if len(takes) > 1 else rounds[:, 0]
    return Kept(
        value=float(np.median(found)),
        interval=(float(found.min()), float(found.max())) if function.rounds > 1 else None,
        inputs=noting.inputs(),
    )


_FILE = TypeAdapter(dict[str, Kept])


def read_costs(path: Path) -> dict[str, Kept]:
    """Costs that were measured once, by their key; none without the file, InputError for another
    one."""
    if not path.exists():
        return {}
    try:
        return _FILE.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"the costs {path} are broken ({problem_of(error)}); delete the file and run"
            " 'robbench reproduce' again"
        ) from None


def write_costs(path: Path, costs: Mapping[str, Kept]) -> None:
    """The file of these costs, all or nothing of it."""
    values = {key: kept.model_dump(mode="json") for key, kept in sorted(costs.items())}
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
