"""EAD: elastic-net attacks, Chen et al. 2018 (https://arxiv.org/abs/1709.04114)."""

from __future__ import annotations

from typing import Literal

from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, attacked_label, choose_targets, column
from robbench.attacks.carlini_wagner import (
    Found,
    Margin,
    Patience,
    Positive,
    Problem,
    find_smallest,
    squared,
)
from robbench.attacks.gradient import Label, Steps
from robbench.attacks.losses import choose
from robbench.threat import Threat


@attack("ead", norms=("l1", "none"), minimal=True)
def ead(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 200,
    search: Steps = 6,
    c: Positive = 0.01,
    lr: Positive = 0.01,
    beta: Margin = 0.01,
    rule: Literal["EN", "L1"] = "L1",
    fista: bool = True,
    confidence: Margin = 0.0,
    abort: bool = False,
    label: Label = "truth",
    loss: str = "margin",
) -> Tensor:
    """EAD: shrinkage on c max(κ - margin, 0) + ||x' - x||² + β ||x' - x||_1, c searched per image.

    rule: the smallest l1 distance, by which a table under l1 reads it, or the smallest elastic
    net. fista=false is ISTA, Algorithm 1 without momentum. The text has steps=1000, search=9 and
    starts at c=0.001; as in `cw` search=1 is a fixed c, the hinge ends at the decision and abort
    is per image. The momentum's point, where the gradient is taken, is clipped to the box too.
    Returns the smallest x' found that has the goal; x where none has it, or x itself does.
    """
    y = attacked_label(access, x, y, label)
    target = choose_targets(access, x, y, threat, rng)
    objective = choose(access, loss)
    problem = Problem(access, x, y, target, objective, confidence, search * steps)

    def size(delta: Tensor) -> Tensor:
        length = delta.flatten(1).abs().sum(dim=1)
        return length if rule == "L1" else squared(delta) + beta * length

    def descend(weight: Tensor, images: Tensor, found: Found) -> None:
        points, ahead = x.clone(), x.clone()
        patience = Patience(problem, steps, abort)
        for step in range(steps):
            here, origin = ahead[images], x[images]
            value, gradient, lost = problem.gradient(here, images)
            push = weight[images].masked_fill(problem.reached(lost, value), 0)
            downhill = 2 * (here - origin) - column(push, x) * gradient
            rate = lr * (1 - step / steps) ** 0.5
            moved = shrink(here - rate * downhill, origin, beta)
            found.offer(moved, images, problem.judge(moved, images, access.draws))
            momentum = step / (step + 3) if fista else 0.0
            ahead[images] = (moved + momentum * (moved - points[images])).clamp(0, 1)
            points[images] = moved
            total = squared(here - origin) + push * (confidence - value)
            images = images[patience.gains(step, images, total)]
            if not len(images):
                return

    return find_smallest(problem, size, descend, c, search)


def shrink(points: Tensor, x: Tensor, beta: float) -> Tensor:
    """eq. 5: each pixel moves back towards x by β, not beyond it, and into the box."""
    delta = points - x
    return (x + delta.sign() * (delta.abs() - beta).clamp_min(0)).clamp(0, 1)
