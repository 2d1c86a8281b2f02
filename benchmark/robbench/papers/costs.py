"""What papers say their defenses cost: seconds, memory, parameters; as numbers and as ratios."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from robbench.checkpoints import key_of
from robbench.datasets import Dataset
from robbench.defense import resolve
from robbench.errors import InputError, unknown
from robbench.metrics import Measure
from robbench.metrics.costs import Cost, cost
from robbench.papers.cells import Load, shrunk
from robbench.papers.derived import UNKNOWN
from robbench.papers.paper import Binding, Scale
from robbench.runner import Shared

ROUNDS = 5  # in which two defenses are timed in turn, so that a busy machine slows both
Function = Callable[[str, Dataset, Shared, Mapping[str, Any]], float]


def _inference(spec: str, dataset: Dataset, shared: Shared, arguments: Mapping[str, Any]) -> Cost:
    deployed = shared.deploy(spec, dataset, 0).deployed
    count = min(int(arguments.get("batch", 1000)), len(dataset.test.y))
    x = dataset.subset(count).x.to(shared.device)
    repeats = int(arguments.get("repeats", 100))

    def pass_once() -> object:
        with torch.no_grad():
            return deployed.sample(x, 1)

    return cost(pass_once, str(shared.device), repeats=repeats)


def _seconds(spec: str, dataset: Dataset, shared: Shared, arguments: Mapping[str, Any]) -> float:
    return _inference(spec, dataset, shared, arguments).seconds


def _memory(spec: str, dataset: Dataset, shared: Shared, arguments: Mapping[str, Any]) -> float:
    """MB, as torch or the system held them at the peak."""
    return _inference(spec, dataset, shared, {**arguments, "repeats": 1}).peak / 2**20


def _epoch(spec: str, dataset: Dataset, shared: Shared, arguments: Mapping[str, Any]) -> float:
    """Mean seconds of an epoch, as the training noted them."""
    shared.deploy(spec, dataset, 0)
    path = shared.shelf.find(key_of(resolve(spec)[0], dataset, 0))
    if path is None:
        raise InputError(f"{spec} has no checkpoint of its own to read its seconds from")
    curve = json.loads(path.with_suffix(".json").read_text())["curve"]
    return float(sum(point["seconds"] for point in curve) / len(curve))


def _parameters(spec: str, dataset: Dataset, shared: Shared, arguments: Mapping[str, Any]) -> float:
    parts = resolve(spec)
    built = [part.build(dataset.shape, len(dataset.labels)) for part in parts]
    return float(sum(value.numel() for members in built for value in members.parameters()))


FUNCTIONS: Mapping[str, Function] = {
    "inference-seconds": _seconds,
    "inference-memory": _memory,
    "epoch-seconds": _epoch,
    "parameters": _parameters,
}
TIMED = ("inference-seconds",)


def cost_key(binding: Binding, scale: Scale) -> str:
    """What a cost is kept under: the function, its arguments and the defense as it is here."""
    assert binding.defense and binding.dataset
    arguments = {key: value for key, value in binding.arguments.items() if key != "over"}
    parts = [str(binding.function), shrunk(binding.defense, binding.dataset, scale)]
    parts.append(scale.datasets.get(binding.dataset, binding.dataset))
    parts += [f"{key}={value}" for key, value in sorted(arguments.items())]
    if over := binding.arguments.get("over"):
        other = binding.model_copy(update={"arguments": arguments, **over})
        parts.append(f"over {cost_key(other, scale)}")
    return " · ".join(parts)


def measure_cost(binding: Binding, scale: Scale, load: Load, shared: Shared) -> float:
    """The cost, or its ratio to that of arguments.over, timed in turn."""
    function = FUNCTIONS.get(str(binding.function))
    if function is None:
        raise unknown("cost", str(binding.function), FUNCTIONS)
    assert binding.defense and binding.dataset
    dataset = load(scale.datasets.get(binding.dataset, binding.dataset))
    own = shrunk(binding.defense, binding.dataset, scale)
    over = binding.arguments.get("over")
    if not over:
        return function(own, dataset, shared, binding.arguments)
    other = shrunk(over["defense"], binding.dataset, scale)
    rounds = ROUNDS if binding.function in TIMED else 1
    arguments = {**binding.arguments}
    if rounds > 1:
        arguments["repeats"] = max(1, int(arguments.get("repeats", 100)) // rounds)
    pairs = [
        (function(own, dataset, shared, arguments), function(other, dataset, shared, arguments))
        for _ in range(rounds)
    ]
    return sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)


def read_costs(path: Path) -> dict[str, Measure]:
    """Costs that were measured once, by their key; none without the file."""
    if not path.exists():
        return {}
    return {key: Measure(value, UNKNOWN) for key, value in json.loads(path.read_text()).items()}


def write_costs(path: Path, costs: Mapping[str, Measure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {key: measure.value for key, measure in sorted(costs.items())}
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
