"""ARC, Dbouk & Shanbhag 2022 (https://arxiv.org/abs/2206.06737), Algorithm 2: an attack on the
expected accuracy of a finite set of members, of which one answers at random.

Differences to the paper: margins are those of the true label, so that a member that errs is left
alone; each member is linearised at the point in ball and box that its turn starts from; a random
start may follow the one at x. Members weigh the same here and take their turns in their order. A
stochastic member counts with its mean over the access's draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, column, picked
from robbench.attacks.deepfool import difference, nearest
from robbench.attacks.gradient import Steps, Trace, worst_of
from robbench.attacks.losses import ScoreLoss, choose, margin
from robbench.randomness import random_state, set_random_state
from robbench.rules import Draw
from robbench.threat import Eps, Norm, Threat, ascend, project, random_start

BEYOND = 0.05  # how far past a boundary a move goes, as a share of ε: ρ of the authors' code


@dataclass(frozen=True)
class Member:
    """A loss of the logits of one member alone, the mean over its draws."""

    index: int
    of: ScoreLoss
    per_draw: ClassVar[bool] = True

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        logits = draw.logits[:, self.index]  # (S, N, L)
        shape = logits.shape[:-1]
        aim = None if target is None else target.expand(shape)
        return self.of(logits, y.expand(shape), aim).mean(dim=0)


@attack("arc", norms=("linf", "l2"))
def arc(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 20,
    step: Eps | None = None,
    restarts: Steps = 1,
    light: bool = True,
) -> Tensor:
    """Fool the members one after the other, each by a move that loses none of those before.

    step: length of the moves of a round; ε, the default, is what members that are linear need.
    light: look at the boundary to the best wrong label only; else at those to all labels, a
    gradient for each.
    """
    if threat.eps is None:
        raise ValueError("arc needs an ε")
    target = choose_targets(access, x, y, threat, rng)
    eps = float(threat.eps)
    walk = _Walk(access, x, y, target, threat.norm, eps, float(step or eps), steps * restarts)
    ends = []
    for restart in range(restarts):
        start = random_start(x, threat.norm, eps, rng) if restart else x
        ends.append(walk.run(start, steps, light))
    access.trace = walk.trace.arrays
    return worst_of(access, ends, y, target, choose(access, "auto"))[0]


class _Walk:
    """Rounds over all members, from one start after the other."""

    def __init__(
        self,
        access: Access,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        norm: Norm,
        eps: float,
        step: float,
        rounds: int,
    ) -> None:
        self.access, self.x, self.y, self.target = access, x, y, target
        self.norm, self.eps, self.step = norm, eps, step
        self.members, self.done = len(access.deployed.members), 0
        self.rounds, self.trace = rounds, Trace(len(x), rounds * self.members)

    def run(self, start: Tensor, steps: int, light: bool) -> Tensor:
        """The point at which the last round ends; an image whose members all err needs no more."""
        point = start.clone()
        active = torch.arange(len(start), device=start.device)
        for _ in range(steps):
            if len(active):
                point[active], fooled = self._round(point[active], active, light)
                if self.access.exact:
                    active = active[fooled < 1]
            self.done += 1
            self.access.report(self.done, self.rounds)
        return point

    def _round(self, center: Tensor, images: Tensor, light: bool) -> tuple[Tensor, Tensor]:
        """A turn of each member; the new points and the share of members that they fool.

        Shares are compared on the same draws.
        """
        state = random_state(self.access.device)
        fooled = self._fooled(center, images)
        point, local = center, torch.zeros_like(center)
        for index in range(self.members):
            move = self._move(index, center, point, local, images, light)
            there = project(center + move, self.x[images], self.norm, self.eps)
            set_random_state(self.access.device, state)
            share = self._fooled(there, images)
            kept = column(share >= fooled, point)
            point, local = torch.where(kept, there, point), torch.where(kept, move, local)
            fooled = torch.maximum(fooled, share)
        return point, fooled

    def _fooled(self, points: Tensor, images: Tensor) -> Tensor:
        """(N,) share of members, and of their draws, that the points fool: 1 - accuracy."""
        aim = picked(self.target, images)
        loss = Member(0, margin)  # any will do: only the votes count
        return self.access.judge(points, self.y[images], loss, aim, self.access.draws).votes

    def _move(
        self,
        index: int,
        center: Tensor,
        point: Tensor,
        local: Tensor,
        images: Tensor,
        light: bool,
    ) -> Tensor:
        """The moves so far and one over this member's boundary, together as long as the step."""
        loss, rivals = self._sought(index, images, light)
        plane = nearest(self.access, point, self.y[images], rivals, loss, self.norm)
        self.trace.note(self.done * self.members + index, images, plane.gap, plane.slope)
        unit = plane.slope / plane.steepness.clamp_min(1e-30).view(-1, 1, 1, 1)

        def along(delta: Tensor) -> Tensor:  # the part of a move that counts for this boundary
            return (unit * delta).sum(dim=(1, 2, 3))

        whole = -plane.gap / plane.steepness.clamp_min(1e-30) + along(point - center)
        missing = whole - along(local)
        # after the sum is cut to the step, it still crosses: the paper's β
        reachable = (self.step - whole).clamp_min(1e-12)
        push = (self.step / reachable * missing).clamp_min(0) + BEYOND * self.eps
        push = torch.where(whole < self.step, push, self.step)
        moved = local + column(push, local) * ascend(plane.slope, point, self.norm)
        order = math.inf if self.norm == "linf" else 2
        length = torch.linalg.vector_norm(moved, ord=order, dim=(1, 2, 3), keepdim=True)
        moved = moved * (self.step / length.clamp_min(1e-30))
        return torch.where(column(plane.gap > 0, local), local, moved)

    def _sought(
        self, index: int, images: Tensor, light: bool
    ) -> tuple[Member, Sequence[Tensor | None]]:
        """A loss that is zero on boundaries of the member, and the labels behind them."""
        if self.target is not None:
            return Member(index, margin), [self.target[images]]
        if light:
            return Member(index, margin), [None]
        labels = self.access.deployed.labels
        others = [(self.y[images] + shift) % labels for shift in range(1, labels)]
        return Member(index, difference), others
