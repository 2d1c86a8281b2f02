"""SPSA: gradient descent on gradients estimated from answers to queries.

Uesato et al. 2018 (ICML, arXiv 1802.05666), algorithm 1: simultaneous perturbation (Spall 1992)
along random signs, Adam, projection. Differences to the text: the worst iterate is kept, and a
stochastic defense answers both ends of a direction with the same draws, averaged over them.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access, Verdict
from robbench.attacks import attack, choose_targets, picked
from robbench.attacks.gradient import radius, worst_of
from robbench.attacks.losses import choose
from robbench.randomness import random_state, set_random_state
from robbench.rules import Loss
from robbench.threat import Threat, project

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
BETAS = (0.9, 0.999)


@attack("spsa", norms=("linf", "l2"), needs="scores")
def spsa(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Count = 100,
    samples: Count = 128,
    delta: Positive = 0.01,
    lr: Positive = 0.01,
    loss: str = "margin",
) -> Tensor:
    """Adam from x itself along `samples` random directions a step, two queries for each.

    delta: how far along a direction the defense is asked (a query, never an answer, may leave the
    box by as much). lr: Adam's step in units of pixels.
    """
    eps, objective = radius(threat), choose(access, loss)
    target = choose_targets(access, x, y, threat, rng)
    current, best = x.clone(), x.clone()
    adam = _Adam(x, lr)
    verdict = Verdict(*torch.full((3, len(x)), -torch.inf, device=x.device))
    active = torch.arange(len(x), device=x.device)
    for step in range(steps + 1):
        aim = picked(target, active)
        here, label = current[active], y[active]
        new = access.judge(here, label, objective, aim, access.draws)
        better = new.worse_than(Verdict(*(old[active] for old in verdict)))
        best[active[better]] = here[better]
        for old, value in zip(verdict, new, strict=True):
            old[active[better]] = value[better]
        if access.exact:
            going = new.lost < 1
            active, here, label = active[going], here[going], label[going]
            aim = picked(aim, going)
        if step == steps or not len(active):
            break
        gradient = estimate(access, here, label, aim, objective, samples, delta, rng)
        moved = here + adam.step(gradient, active)
        current[active] = project(moved, x[active], threat.norm, eps)
        access.report(step + 1, steps)
    if access.exact:
        return best
    return worst_of(access, [best, current], y, target, objective)[0]


class _Adam:
    """Adam (Kingma & Ba 2015) on images of which some have left: these keep their moments."""

    def __init__(self, x: Tensor, lr: float) -> None:
        self.lr, self.steps = lr, 0
        self.first, self.second = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, gradient: Tensor, active: Tensor) -> Tensor:
        """The move of the images `active` uphill."""
        self.steps += 1
        mean = self.first[active].lerp(gradient, 1 - BETAS[0])
        square = self.second[active].lerp(gradient**2, 1 - BETAS[1])
        self.first[active], self.second[active] = mean, square
        mean, square = (
            moment / (1 - beta**self.steps)
            for moment, beta in zip((mean, square), BETAS, strict=True)
        )
        return self.lr * mean / (square.sqrt() + 1e-8)


def estimate(
    access: Access,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    loss: Loss,
    samples: int,
    delta: float,
    rng: Generator,
) -> Tensor:
    """The gradient of the loss by x, estimated from 2 · samples queries of each image."""
    total = torch.zeros_like(x)
    at_once = max(1, access.deployed.chunk // len(x))
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        signs = torch.randint(0, 2, (count, *x.shape), generator=rng, dtype=torch.int8)
        direction = (2 * signs - 1).to(x)
        labels, aims = y.repeat(count), None if target is None else target.repeat(count)
        state = random_state(access.device)
        ends = []
        for side in (delta, -delta):  # on common draws, so that their noise cancels
            set_random_state(access.device, state)
            points = (x + side * direction).flatten(0, 1)
            ends.append(access.judge(points, labels, loss, aims, access.draws).loss)
        slope = (ends[0] - ends[1]).view(count, len(x), 1, 1, 1) / (2 * delta)
        total += (slope * direction).sum(dim=0)
    return total / samples
