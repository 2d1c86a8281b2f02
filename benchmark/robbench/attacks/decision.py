"""Attacks that walk along the decision boundary towards the image: HopSkipJump, Brendel-Bethge.

Both were made for labels that never change. On a stochastic defense the answer here is that of the
majority over `average` calls, and what is kept has been asked once more. Images that are lost as
they are, and those without a starting point, come back as they are.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, column, picked
from robbench.attacks.losses import choose
from robbench.errors import InputError
from robbench.randomness import sandboxed
from robbench.rules import Draw
from robbench.threat import Norm, Threat, ascend, distance, project

AVERAGE = 20  # calls of a stochastic defense behind an answer
HALVINGS = 20  # of a step that does not reach the other side
RESOLUTION = 1e-5  # per pixel: probes nearer than that drown in the rounding of float32
MORE = (0, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the way back out, until an answer is confirmed
NOISE = 2**22  # values of random directions that are held at once
Count = Annotated[int, Field(ge=1)]
Blend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (from, to, share (N,)) -> between them


@attack("hopskipjump", norms=("l2", "linf"), needs="labels", minimal=True)
def hopskipjump(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Count = 50,
    evaluations: Count = 100,
    most: Count = 10_000,
    starts: Count = 100,
    average: Count | None = None,
) -> Tensor:
    """From labels alone to the nearest point of the boundary, by estimated gradients.

    Chen et al. 2020, arXiv:1904.02144, algorithm 2: step t asks min(evaluations √t, most) probes.
    starts: random images tried as a starting point, before the other images of the batch.
    Differences: the smallest point is returned, not the last; a probe is never nearer than float32
    tells apart; probes are uniform on the sphere for linf too (the authors' code: on a cube).
    """
    target = choose_targets(access, x, y, threat, rng)
    answers = _Answers(access, y, target, average or AVERAGE)
    start, active = _starts(answers, x, rng, starts)
    best = x.clone()
    if not len(active):
        return best
    walk = _Walk(answers, x, active, threat.norm, rng)
    point, sure = walk.to_boundary(start[active])
    point = torch.where(column(sure, point), point, start[active])
    best[active], shortest = point, distance(point, x[active], threat.norm)
    for step in range(1, steps + 1):
        probes = min(int(evaluations * math.sqrt(step)), most)
        point = walk.step(point, step, probes)
        length = distance(point, x[active], threat.norm)
        nearer = length < shortest
        shortest = torch.where(nearer, length, shortest)
        best[active[nearer]] = point[nearer]
        access.report(step, steps)
    return best


@attack(
    "brendel-bethge",
    norms=("linf", "l2", "l1", "l0"),
    minimal=True,
    faults="ART's class, image by image; compiles for half a minute first",
)
def brendel_bethge(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Count = 200,
    lr: Annotated[float, Field(gt=0)] = 1e-3,
    starts: Count = 100,
    average: Count | None = None,
) -> Tensor:
    """Along the boundary by its gradient, from points that PGD finds in growing balls.

    Brendel et al. 2019, arXiv:1907.01003, as ART has it; lr is its first trust region. Scores and
    gradients are means over `average` calls. Where PGD finds nothing it starts like hopskipjump.
    InputError where numba is missing, which ART compiles it with.
    """
    if importlib.util.find_spec("numba") is None:
        raise InputError(
            "the attack brendel-bethge needs the package numba; pip install 'robbench[attacks]'"
        )
    target = choose_targets(access, x, y, threat, rng)
    answers = _Answers(access, y, target, average or AVERAGE)
    start, active = _climbs(answers, x, threat.norm)
    others, found = _starts(answers, x, rng, starts, active)
    start[found] = others[found]
    active = (start != x).flatten(1).any(dim=1).nonzero()[:, 0]
    point = start.clone()
    seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
    with sandboxed(access.deployed, seed):
        for done, index in enumerate(active.tolist(), start=1):
            one = slice(index, index + 1)
            labels = y[one] if target is None else target[one]
            point[one] = _walked(answers, x[one], start[one], labels, threat, steps, lr)
            access.report(done, len(active))
    return _confirmed(answers, x, start, point, active, threat.norm)


@dataclass(frozen=True)
class _Answers:
    """Whether the attacker has his goal, by the majority of the defense's calls."""

    access: Access
    y: Tensor
    target: Tensor | None
    average: int

    @property
    def draws(self) -> int:
        """Behind an answer; a deterministic defense is asked once."""
        deployed = self.access.deployed
        return self.average * deployed.draws if deployed.stochastic else 1

    def lost(self, x: Tensor, index: Tensor) -> Tensor:
        """(M,) bool for points (M, C, H, W) that belong to these images (M,)."""
        aim = picked(self.target, index)
        return self.access.judge(x, self.y[index], _no_loss, aim, self.draws).lost > 0.5


def _no_loss(draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
    return torch.zeros(y.shape, device=y.device)


def _starts(
    answers: _Answers, x: Tensor, rng: Generator, tries: int, missing: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A lost point for each image, and (M,) the images that got one: random images first, then the
    other images of the batch. missing: who needs one; None: all that are not lost as they are."""
    point, everybody = x.clone(), torch.arange(len(x), device=x.device)
    if missing is None:
        missing = everybody[~answers.lost(x, everybody)]
    wanted = missing
    for attempt in range(1 - tries, len(x)):
        if not len(missing):
            break
        if attempt > 0:
            new = x.roll(attempt, 0)[missing]
        else:
            new = torch.rand(x[missing].shape, generator=rng).to(x)
        hit = answers.lost(new, missing)
        point[missing[hit]], missing = new[hit], missing[~hit]
    return point, wanted[~torch.isin(wanted, missing)]


def _bisect(
    answers: _Answers, kept: Tensor, lost: Tensor, index: Tensor, blend: Blend, times: int
) -> tuple[Tensor, Tensor]:
    """The point between one that is kept and one that is lost where the answer changes, and (M,)
    whether asking again confirms it; under noise that may take a little more of the way."""
    low, high = torch.zeros(2, len(kept), device=kept.device)
    high = high + 1
    for _ in range(times):
        middle = (low + high) / 2
        hit = answers.lost(blend(kept, lost, middle), index)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    point, sure = blend(kept, lost, high), torch.zeros_like(high, dtype=torch.bool)
    for more in MORE:
        left = (~sure).nonzero()[:, 0]
        if not len(left):
            break
        point[left] = blend(kept, lost, high + more * (1 - high))[left]
        sure[left] = answers.lost(point[left], index[left])
    return point, sure


def _straight(kept: Tensor, lost: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(kept, lost, column(share, kept))


def _clipped(kept: Tensor, lost: Tensor, share: Tensor) -> Tensor:
    radius = column(share * (lost - kept).abs().amax(dim=(1, 2, 3)), kept)
    return lost.clamp(kept - radius, kept + radius)


BALLS: dict[Norm, tuple[Norm, ...]] = {"l1": ("l1", "l2"), "l0": ("l1", "l2")}  # else the own one
BLENDS: dict[Norm, Blend] = {"l2": _straight, "linf": _clipped}


@dataclass(frozen=True)
class _Walk:
    """HopSkipJump's moves for the active images (M of the N in x)."""

    answers: _Answers
    x: Tensor
    active: Tensor
    norm: Norm
    rng: Generator

    def to_boundary(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Bisection down to d^-3/2 of the way under l2, d^-2 under linf; and what is confirmed."""
        values = self.x[0].numel()
        halvings = min(24, math.ceil((1.5 if self.norm == "l2" else 2) * math.log2(values)))
        inside = self.x[self.active]
        return _bisect(self.answers, inside, point, self.active, BLENDS[self.norm], halvings)

    def step(self, point: Tensor, step: int, probes: int) -> Tensor:
        """Away from the boundary along its estimated normal, and back to it."""
        values = self.x[0].numel()
        length = distance(point, self.x[self.active], self.norm).to(point)
        radius = length / values if step > 1 else torch.full_like(length, 0.1)
        normal = self._normal(point, radius.clamp_min(RESOLUTION * math.sqrt(values)), probes)
        direction = ascend(normal, point, self.norm)
        stride, reached = length / math.sqrt(step), torch.zeros_like(length, dtype=torch.bool)
        outside = point.clone()
        for _ in range(HALVINGS):
            left = (~reached).nonzero()[:, 0]
            if not len(left):
                break
            far = (point + column(stride, point) * direction)[left].clamp(0, 1)
            hit = self.answers.lost(far, self.active[left])
            outside[left[hit]], reached[left[hit]] = far[hit], True
            stride = torch.where(reached, stride, stride / 2)
        near, sure = self.to_boundary(outside)
        return torch.where(column(sure, near), near, point)

    def _normal(self, point: Tensor, radius: Tensor, probes: int) -> Tensor:
        """The mean probe, weighted by its answer (±1) less the mean answer, equation 16."""
        weighted, total = torch.zeros(2, *point.shape, device=point.device)
        answer = torch.zeros_like(radius)
        size = max(1, NOISE // point.numel())
        for first in range(0, probes, size):
            count = min(size, probes - first)
            probe = torch.randn(count, *point.shape, generator=self.rng).to(point)
            probe /= probe.flatten(2).norm(dim=2).clamp_min(1e-30).view(count, -1, 1, 1, 1)
            moved = (point + column(radius, point) * probe).clamp(0, 1)
            probe = (moved - point) / column(radius, point)
            hit = self.answers.lost(moved.flatten(0, 1), self.active.repeat(count))
            sign = hit.view(count, -1).to(point) * 2 - 1
            weighted += (probe * sign[..., None, None, None]).sum(dim=0)
            total += probe.sum(dim=0)
            answer += sign.sum(dim=0)
        mean = (answer / probes).masked_fill(answer.abs() == probes, 0)  # all agree: no baseline
        return (weighted - column(mean, point) * total) / probes


def _climbs(answers: _Answers, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Lost points by PGD on the margin in balls that double up to the box, and who is without."""
    access, point = answers.access, x.clone()
    everybody = torch.arange(len(x), device=x.device)
    missing = everybody[~answers.lost(x, everybody)]
    values, loss = x[0].numel(), choose(access, "margin")
    boxes: dict[Norm, float] = {"linf": 1, "l2": math.sqrt(values), "l1": values}
    for ball, halvings in product(BALLS.get(norm, (norm,)), range(6, -1, -1)):
        if not len(missing):
            break
        eps, start, now = boxes[ball] / 2**halvings, x[missing], x[missing]
        aim = picked(answers.target, missing)
        for _ in range(20):
            step = access.gradient(now, answers.y[missing], loss, aim)
            now = project(now + eps / 8 * ascend(step.gradient, now, ball), start, ball, eps)
        hit = answers.lost(now, missing)
        point[missing[hit]], missing = now[hit], missing[~hit]
    return point, missing


def _walked(
    answers: _Answers,
    x: Tensor,
    start: Tensor,
    labels: Tensor,
    threat: Threat,
    steps: int,
    lr: float,
) -> Tensor:
    """ART's class on one image; the point nearest to x that it found, the start at worst."""
    from art.attacks.evasion import BrendelBethgeAttack  # a second, and numba

    from robbench.estimator import Estimator

    averaged = Access(answers.access.deployed, draws=answers.draws)
    averaged.cost = answers.access.cost
    order = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}[threat.norm]
    one_hot = F.one_hot(labels, averaged.deployed.labels).float().cpu().numpy()
    # it refuses scores that look like probabilities, and its bar cannot be turned off
    names = BrendelBethgeAttack.__init__.__globals__
    with patch.dict(names, is_probability=lambda _: False), patch("tqdm.auto.trange", range):
        made = BrendelBethgeAttack(
            Estimator(averaged), norm=order, targeted=threat.targeted, steps=steps, lr=lr
        )
        try:
            found = made.generate(x.cpu().numpy(), one_hot, starting_points=start.cpu().numpy())
        except AssertionError:  # by its scores the start is not lost, by the answers it is
            return start
    return torch.from_numpy(np.ascontiguousarray(found)).to(x)


def _confirmed(
    answers: _Answers, x: Tensor, start: Tensor, point: Tensor, active: Tensor, norm: Norm
) -> Tensor:
    """The walk followed scores; the nearest point that the answers confirm is on a line: from x to
    its end where that is lost, else from there to the start."""
    best = x.clone()
    if not len(active):
        return best
    shortest = torch.full((len(active),), math.inf, device=x.device, dtype=torch.float64)
    end, sound = point[active].clamp(0, 1), answers.lost(point[active].clamp(0, 1), active)
    wide = column(sound, end)
    inner, outer = torch.where(wide, x[active], end), torch.where(wide, end, start[active])
    between, sure = _bisect(answers, inner, outer, active, _straight, 10)
    confirmed = answers.lost(start[active], active), answers.lost(end, active), sure
    for candidate, good in zip((start[active], end, between), confirmed, strict=True):
        length = distance(candidate, x[active], norm)
        nearer = (length < shortest) & good
        best[active[nearer]] = candidate[nearer]
        shortest = torch.where(nearer, length, shortest)
    return best
