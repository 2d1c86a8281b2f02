"""What a reproduction will take before it starts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from robbench import networks
from robbench.defense import resolve
from robbench.grid import Cell
from robbench.registry import Spec
from robbench.runner import Shared
from robbench.siblings import network_of
from robbench.tasks import Task, plan

PASSES = 3.0  # a forward and a backward pass, in the units of a task's weight
IMAGES = 2**21  # values of a batch that is timed


def estimate(cells: Sequence[Cell], shared: Shared, workers: int) -> str:
    """Two lines: how many trainings and attacks there are, and the hours that they will take here,
    from one timed pass of every network that occurs."""
    tasks = plan(cells, shared)
    if not tasks:
        return "Nothing is missing."
    hours: dict[str, float] = defaultdict(float)
    for task in tasks:
        hours[task.kind] += task.weight / PASSES * _seconds_per_image(task, shared) / 3600
    counts = {kind: sum(task.kind == kind for task in tasks) for kind in ("train", "attack")}
    total = sum(hours.values())
    least = max(total / workers, 0.0)
    return (
        f"{counts['train']} trainings, about {_text(hours['train'])}; {counts['attack']} shards of"
        f" attacks on {len(cells)} cells, about {_text(hours['attack'])}.\n"
        f"With {workers} {'worker' if workers == 1 else 'workers'} on {shared.device}: about"
        f" {_text(least)}. It can be interrupted and goes on where it was."
    )


def _text(hours: float) -> str:
    if hours < 1 / 60:
        return "a minute or less"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _seconds_per_image(task: Task, shared: Shared) -> float:
    """Of one forward and backward pass of the task's network."""
    if task.job is not None:
        name, spec = task.job[0], task.job[1]
    else:
        name, spec = task.cells[0].dataset, task.cells[0].source
    dataset = shared.dataset(name)
    key = (network_of(resolve(spec)[0]), dataset.shape, len(dataset.labels))
    if key not in _TIMED:
        _TIMED[key] = _timed(*key, shared.device)
    return _TIMED[key]


_TIMED: dict[tuple[str, tuple[int, int, int], int], float] = {}


def _timed(network: str, shape: tuple[int, int, int], labels: int, device: torch.device) -> float:
    spec = Spec.parse(network)
    built = networks.build(spec.name, dict(spec.settings), shape, labels).to(device).eval()
    c, h, w = shape
    count = max(1, min(64, IMAGES // (c * h * w * 16)))
    x = torch.rand(count, c, h, w, device=device, requires_grad=True)
    best = float("inf")
    for _ in range(3):  # the first one warms up
        begin = time.perf_counter()
        torch.autograd.grad(built(x).sum(), x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best / count
