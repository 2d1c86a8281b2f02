"""FAB, Croce & Hein 2020 (https://arxiv.org/abs/1907.02044), Algorithm 1, and FAB-T as AutoAttack
runs it (https://arxiv.org/abs/2003.01690).

Differences to the paper: all targets and restarts are run and the nearest point of each image is
kept, since the result is read at every ε; a target of the threat model is reached along the margin
of its score. The attack is meant for deterministic defenses or a frozen average: a stochastic one
is linearised in the mean of its scores over the access's draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, picked
from robbench.attacks.deepfool import boundaries, nearest
from robbench.attacks.gradient import Steps, Trace
from robbench.attacks.losses import margin
from robbench.attacks.success import broken
from robbench.errors import InputError
from robbench.rules import Loss
from robbench.threat import Eps, Norm, Threat, distance, random_start

STARTS: dict[Norm, Fraction] = {"linf": Fraction(3, 10), "l2": Fraction(1), "l1": Fraction(5)}
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Plan:
    """How an iterate moves: the largest weight of the way back to x, the factor by which steps go
    beyond the boundary, and the share of the perturbation that is left after a success."""

    alpha_max: float
    eta: float
    beta: float


@attack("fab", norms=("linf", "l2", "l1"), minimal=True)
def fab(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 100,
    restarts: Steps = 1,
    targets: Count = 0,
    eps: Eps | None = None,
    alpha_max: Annotated[float, Field(ge=0, le=1)] = 0.1,
    eta: Annotated[float, Field(ge=1)] = 1.05,
    beta: Annotated[float, Field(gt=0, le=1)] = 0.9,
    search: Count = 3,
) -> Tensor:
    """FAB: project on the nearest linearised boundary, with a bias towards x; keep the nearest.

    targets: 0 looks at the boundaries of all labels, k runs towards each of the k likeliest wrong
    ones. eps: twice the largest radius of the random starts, which all runs but the first of each
    target have; 0.3, 1 and 5 for linf, l2 and l1. search: steps of the final search towards x.
    """
    target = choose_targets(access, x, y, threat, rng)
    if targets and target is not None:
        raise InputError("fab(targets=…) chooses its targets itself; leave out targets or target")
    labels = targets or access.deployed.labels - 1
    loss, rivals = boundaries(access, x, y, target, labels)
    runs = [[rival] for rival in rivals] if targets else [rivals]
    hunt = _Hunt(access, x, y, target, threat.norm, len(runs) * restarts * steps)
    radius = float(eps or threat.eps or STARTS[threat.norm]) / 2
    plan = Plan(alpha_max, eta, beta)
    for group in runs:
        for restart in range(restarts):
            start = hunt.random_start(radius, rng) if restart else x
            hunt.descend(start, loss, group, plan, steps)
    hunt.approach(search)
    access.trace = hunt.trace.arrays
    return hunt.best


class _Hunt:
    """The nearest broken point of each image so far; x itself at an infinite length for none."""

    def __init__(
        self, access: Access, x: Tensor, y: Tensor, target: Tensor | None, norm: Norm, steps: int
    ) -> None:
        self.access, self.x, self.y, self.target, self.norm = access, x, y, target, norm
        self.trace, self.done, self.steps = Trace(len(x), steps), 0, steps
        self.best = x.clone()
        self.length = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
        # the others need no perturbation
        self.active = torch.nonzero(~broken(access, x, y, target))[:, 0]

    def _lost(self, points: Tensor, images: Tensor) -> Tensor:
        return broken(self.access, points, self.y[images], self._aim(images))

    @torch.no_grad()
    def _margin(self, points: Tensor, images: Tensor) -> Tensor:
        return margin(self.access.scores(points), self.y[images], self._aim(images))

    def _aim(self, images: Tensor) -> Tensor | None:
        return picked(self.target, images)

    def random_start(self, radius: float, rng: Generator) -> Tensor:
        """Uniform in half the ball of the best point, at most in the radius."""
        start = random_start(self.x, self.norm, radius, rng)
        share = (self.length / (2 * radius)).clamp_max(1).to(start)
        return self.x + share.view(-1, 1, 1, 1) * (start - self.x)

    def descend(
        self, start: Tensor, loss: Loss, rivals: list[Tensor], plan: Plan, steps: int
    ) -> None:
        """One run from a start; leaves what it finds in best and length."""
        images = self.active
        origin, point = self.x[images], start[images]
        rivals = [rival[images] for rival in rivals]
        for _ in range(steps if len(images) else 0):
            plane = nearest(self.access, point, self.y[images], rivals, loss, self.norm)
            self.trace.note(self.done, images, plane.gap, plane.slope)
            slope = plane.slope.flatten(1)
            # what the linearised loss has to gain from the iterate and from x to become zero
            back = -plane.gap + (slope * (point - origin).flatten(1)).sum(dim=1)
            ahead = to_hyperplane(point.flatten(1), slope, -plane.gap, self.norm).view_as(point)
            around = to_hyperplane(origin.flatten(1), slope, back, self.norm).view_as(point)
            near = distance(ahead, torch.zeros_like(ahead), self.norm).clamp_min(1e-8)
            far = distance(around, torch.zeros_like(ahead), self.norm).clamp_min(1e-8)
            alpha = (near / (near + far)).clamp_max(plan.alpha_max).to(point).view(-1, 1, 1, 1)
            point = (1 - alpha) * (point + plan.eta * ahead) + alpha * (origin + plan.eta * around)
            point = point.clamp(0, 1)
            lost = self._lost(point, images)
            self._keep(point[lost], images[lost])
            shorter = origin + plan.beta * (point - origin)
            point = torch.where(lost.view(-1, 1, 1, 1), shorter, point)
            self.done += 1
            self.access.report(self.done, self.steps)

    def _keep(self, points: Tensor, images: Tensor) -> None:
        lengths = distance(points, self.x[images], self.norm)
        shorter = lengths < self.length[images]
        self.best[images[shorter]] = points[shorter]
        self.length[images[shorter]] = lengths[shorter]

    def approach(self, steps: int) -> None:
        """Secant steps of the margin between x and the best point, for those that have one."""
        images = self.active[self.length[self.active].isfinite()]
        if not steps or not len(images):
            return
        low, high = self.x[images], self.best[images]
        low_margin, high_margin = self._margin(low, images), self._margin(high, images)
        for _ in range(steps):
            share = low_margin / (low_margin - high_margin)
            # a goal that is more than a margin (a vote, an answer) leaves only the middle
            share = torch.where((low_margin < 0) & (high_margin > 0), share, 0.5).view(-1, 1, 1, 1)
            point = low + share * (high - low)
            lost, value = self._lost(point, images), self._margin(point, images)
            self._keep(point[lost], images[lost])
            side = lost.view(-1, 1, 1, 1)
            low, high = torch.where(side, low, point), torch.where(side, point, high)
            low_margin = torch.where(lost, low_margin, value)
            high_margin = torch.where(lost, value, high_margin)


def to_hyperplane(x: Tensor, normal: Tensor, gain: Tensor, norm: Norm) -> Tensor:
    """The smallest moves (N, d) of points x (N, d) within the box [0, 1] by which their product
    with the normal (N, d) grows by gain (N,): the projection on a hyperplane of appendix A.

    Where the box does not reach the hyperplane: the moves to its nearest corner.
    """
    normal = normal * gain.sign()[:, None]
    weight = normal.abs()
    scale = weight.amax(dim=1).clamp_min(1e-30)
    weight, gain = weight / scale[:, None], gain.abs() / scale
    room = torch.where(normal > 0, 1 - x, x) * (normal != 0)
    if norm == "l1":
        size = _steepest_first(weight, room, gain)
    else:
        size = _all_at_rate(weight if norm == "l2" else torch.ones_like(weight), weight, room, gain)
    return size * normal.sign()


def _steepest_first(weight: Tensor, room: Tensor, gain: Tensor) -> Tensor:
    """l1: pixels are used up in the order of their weight, the last one in part."""
    weight, order = weight.sort(dim=1, descending=True)
    room = room.gather(1, order)
    gains = weight * room
    before = gains.cumsum(dim=1) - gains
    size = ((gain[:, None] - before) / weight.clamp_min(1e-30)).clamp_min(0)
    return torch.zeros_like(room).scatter(1, order, torch.minimum(size, room))


def _all_at_rate(rate: Tensor, weight: Tensor, room: Tensor, gain: Tensor) -> Tensor:
    """l2, l∞: every pixel moves by level * rate, until its room ends; the level gives the gain.

    The gain is concave and piecewise linear in the level, with a kink where a room ends: all are
    sorted, and the level lies in the first piece that ends beyond the gain.
    """
    kinks, order = (room / rate.clamp_min(1e-30)).sort(dim=1)
    full = (weight * room).gather(1, order)
    slope = (weight * rate).gather(1, order).flip(1).cumsum(dim=1).flip(1)  # of what still moves
    before = full.cumsum(dim=1) - full
    pieces = ((before + kinks * slope) < gain[:, None]).sum(dim=1, keepdim=True)
    piece = pieces.clamp_max(rate.shape[1] - 1)
    rest = gain[:, None] - before.gather(1, piece)
    level = (rest / slope.gather(1, piece).clamp_min(1e-30)).clamp(0, 1e30)
    return torch.minimum(level * rate, room)
