"""Random search: independent points of the ball's surface, the worst of each image.

It learns nothing from its answers, so no attack may lose to it: Athalye et al. 2018,
arXiv:1802.00420, section 3.1, take points that it alone finds for a sign of masked gradients.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access, Verdict
from robbench.attacks import attack, choose_targets, picked
from robbench.attacks.gradient import radius, select
from robbench.attacks.losses import choose
from robbench.errors import InputError
from robbench.randomness import random_state, set_random_state
from robbench.rules import Loss
from robbench.threat import Norm, Threat, surface_start

REFRESH = 10  # tries that share their draws
TOGETHER = 512  # points that are asked about at once where nothing is random
Tries = Annotated[int, Field(ge=1)]


@attack("random-search", norms=("linf", "l2", "l1"), needs="scores")
def random_search(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    tries: Tries = 1000,
    loss: str = "margin",
) -> Tensor:
    """The worst of `tries` random points of the surface: corners of the linf ball, uniform
    directions under l2, AutoAttack's starting points under l1.

    A point on which more decisions are lost is the worse one, then the larger loss. On a stochastic
    defense points are compared on common draws, new ones every few tries, and what is left at the
    end once more with x itself. InputError without an ε.
    """
    if threat.eps is None:
        raise InputError("the attack random-search needs an ε; write one, such as --eps 8/255")
    target = choose_targets(access, x, y, threat, rng)
    return search(access, x, y, target, threat, rng, tries, choose(access, loss))


def corner(x: Tensor, norm: Norm, eps: float, rng: Generator) -> Tensor:
    """Uniform on the corners of the linf ball around each image, else as surface_start; clipped to
    the box. Drawn on the CPU."""
    if norm != "linf":
        return surface_start(x, norm, eps, rng)
    signs = 2 * torch.randint(0, 2, x.shape, generator=rng) - 1
    return (x + eps * signs.to(x)).clamp(0, 1)


def draws_per_try(access: Access) -> int:
    """Draws behind one comparison: whole calls of the defense, as many as select takes."""
    if not access.deployed.stochastic:
        return 1
    calls = access.deployed.draws
    return calls * math.ceil(access.selection / calls)


def search(
    access: Access,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    threat: Threat,
    rng: Generator,
    tries: int,
    loss: Loss,
) -> Tensor:
    """Of x (N, C, H, W) and `tries` random points of each image the one that costs most."""
    draws, noisy = draws_per_try(access), access.deployed.stochastic
    together = 1 if noisy else max(1, TOGETHER // len(x))
    best, state = x.clone(), random_state(access.device)
    verdict = access.judge(best, y, loss, target, draws)
    going = torch.arange(len(x), device=x.device)
    for done in range(0, tries, together):
        if access.exact:
            going = (verdict.lost < 1).nonzero()[:, 0]
        if not len(going):
            break
        if noisy and done % REFRESH == 0:
            state = random_state(access.device)
            verdict = access.judge(best, y, loss, target, draws)
        ids = going.repeat(min(together, tries - done))
        points = corner(x[ids], threat.norm, radius(threat), rng)
        if noisy:
            set_random_state(access.device, state)
        found = access.judge(points, y[ids], loss, picked(target, ids), draws)
        for part in torch.arange(len(ids), device=x.device).split(len(going)):
            new, old = (
                Verdict(*(v[at] for v in of)) for of, at in ((found, part), (verdict, going))
            )
            better = new.worse_than(old)
            kept = going[better]
            best[kept] = points[part[better]]
            for value, now in zip(verdict, new, strict=True):
                value[kept] = now[better]
        access.report(min(done + together, tries), tries)
    return select(access, [x, best], y, target, loss)[0] if noisy else best
