"""DeepFool, Moosavi-Dezfooli et al. 2016 (https://arxiv.org/abs/1511.04599), Algorithm 2 and
section 3.3; and the linearised decision boundary that FAB and ARC are built on as well.

Differences to the paper: boundaries are those of the true label and not of the predicted one; the
images stay in the box [0, 1]; of the overshoot only what is needed is kept, since the result is
read at every ε; a target is reached along the margin of its score. The attack is meant for
deterministic defenses or a frozen average: a stochastic one is linearised in the mean of its scores
over the access's draws, the same ones for all labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, picked
from robbench.attacks.gradient import Steps, Trace
from robbench.attacks.losses import margin
from robbench.attacks.success import broken
from robbench.randomness import random_state, set_random_state
from robbench.rules import Loss
from robbench.threat import Norm, Threat, ascend

TRIMS = 6  # halvings of the overshoot
DUALS: dict[Norm, float] = {"linf": 1, "l2": 2, "l1": math.inf}  # orders of the dual norms


@attack("deepfool", norms=("linf", "l2"), minimal=True)
def deepfool(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 50,
    overshoot: Annotated[float, Field(ge=0)] = 0.02,
    classes: Annotated[int, Field(ge=2)] = 10,
) -> Tensor:
    """Step to the nearest linearised boundary of the `classes` likeliest labels until it is passed.

    The sum of the steps, lengthened once by what it needs of the overshoot, is the perturbation.
    """
    target = choose_targets(access, x, y, threat, rng)
    loss, rivals = boundaries(access, x, y, target, classes - 1)
    total, found, trace = torch.zeros_like(x), x.clone(), Trace(len(x), steps)
    active = torch.nonzero(~broken(access, x, y, target))[:, 0]
    for step in range(steps):
        if not len(active):
            break
        start, label = x[active], y[active]
        aim = picked(target, active)
        here = (start + total[active]).clamp(0, 1)
        plane = nearest(access, here, label, [r[active] for r in rivals], loss, threat.norm)
        trace.note(step, active, plane.gap, plane.slope)
        length = plane.distance.view(-1, 1, 1, 1)
        total[active] += length * ascend(plane.slope, here, threat.norm)
        beyond = (start + (1 + overshoot) * total[active]).clamp(0, 1)
        done = broken(access, beyond, label, aim)
        found[active[done]] = beyond[done]
        active = active[~done]
        access.report(step + 1, steps)
    access.trace = trace.arrays
    return _trimmed(access, x, y, target, total, found, overshoot)


def _trimmed(
    access: Access,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    total: Tensor,
    found: Tensor,
    overshoot: float,
) -> Tensor:
    """The points found, with as little of the overshoot as is needed, by bisection."""
    images = torch.nonzero((found != x).flatten(1).any(dim=1))[:, 0]
    aim = picked(target, images)
    needed = torch.full((len(images), 1, 1, 1), overshoot).to(x)
    step = overshoot
    for _ in range(TRIMS if len(images) else 0):
        step /= 2
        shorter = (x[images] + (1 + needed - step) * total[images]).clamp(0, 1)
        lost = broken(access, shorter, y[images], aim)
        found[images[lost]] = shorter[lost]
        needed[lost] -= step
    return found


class Boundary(NamedTuple):
    """The hyperplane on which a linearised loss is zero, per image."""

    gap: Tensor  # (N,) the loss: below zero on the label's side, above on the other
    slope: Tensor  # its gradient, the shape of x
    steepness: Tensor  # (N,) length of the slope in the dual norm

    @property
    def distance(self) -> Tensor:
        """(N,) how far away it is, whatever the side; without a slope far beyond any box."""
        return (self.gap.abs() / self.steepness.clamp_min(1e-30)).clamp_max(1e6)


def difference(scores: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """(..., L) scores -> (...,) score of the target minus that of y: zero where they meet."""
    assert target is not None
    pair = torch.stack([target, y], dim=-1).expand(*scores.shape[:-1], 2)
    chosen = scores.gather(-1, pair)
    return chosen[..., 0] - chosen[..., 1]


def boundaries(
    access: Access, x: Tensor, y: Tensor, target: Tensor | None, count: int
) -> tuple[Loss, list[Tensor]]:
    """A loss that is zero on a decision boundary, and the labels (N,) behind the boundaries.

    Those are the target alone, or the wrong labels of the `count` largest scores, best first.
    """
    if target is not None:
        return access.score_loss(margin), [target]
    with torch.no_grad():
        wrong = access.scores(x).scatter(1, y[:, None], float("-inf"))
    ranked = wrong.topk(min(count, wrong.shape[1] - 1)).indices
    return access.score_loss(difference), list(ranked.unbind(dim=1))


def nearest(
    access: Access,
    x: Tensor,
    y: Tensor,
    rivals: Sequence[Tensor | None],
    loss: Loss,
    norm: Norm,
) -> Boundary:
    """Of the boundaries to each rival label, linearised at x, the nearest one of each image."""
    state = random_state(access.device)
    best: Boundary | None = None
    for rival in rivals:
        set_random_state(access.device, state)
        gap, slope, _ = access.gradient(x, y, loss, rival)
        length = torch.linalg.vector_norm(slope.flatten(1), ord=DUALS[norm], dim=1)
        plane = Boundary(gap, slope, length)
        if best is not None:
            # what is not a number stays, so that whoever notes it for the trace stops
            nearer = (plane.distance < best.distance) | plane.distance.isnan()
            plane = Boundary(
                torch.where(nearer, gap, best.gap),
                torch.where(nearer.view(-1, 1, 1, 1), slope, best.slope),
                torch.where(nearer, length, best.steepness),
            )
        best = plane
    assert best is not None
    return best
