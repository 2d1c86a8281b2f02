"""How many EOT draws a gradient needs, found out on a few images instead of assumed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks.gradient import Plan, radius, run, select
from robbench.attacks.losses import choose
from robbench.threat import Threat

DRAWS = (1, 5, 10, 20, 40, 80)
COSINE, SIGNS = 0.5, 0.7  # of two gradients of so many draws each: enough alike to climb by
PROBES = 32  # images that decide, the first of the evaluated ones


def enough_draws(
    access: Access, x: Tensor, y: Tensor, threat: Threat, rng: Generator
) -> tuple[int, dict[str, Any]]:
    """The fewest draws whose gradients agree, and with which twice as many break no more.

    Two independent gradients of K draws each are compared at x and at a late iterate: their mean
    cosine, or the share of pixels whose sign agrees, must reach the limit. Then K is doubled for as
    long as ten steps of it break more than half an interval fewer images than ten of 2 K do.
    Returns K and what was seen: {"draws": …, "cosine": …, "signs": …, "lost": {K: share}}.
    """
    seen: dict[str, Any] = {"draws": [], "cosine": [], "signs": [], "lost": {}}
    late = _climbed(access.like(DRAWS[1]), x, y, threat, rng)
    chosen = DRAWS[-1]
    for draws in DRAWS:
        alike = [_agreement(access.like(draws), point, y) for point in (x, late)]
        cosine, signs = (min(values) for values in zip(*alike, strict=True))
        seen["draws"].append(draws)
        seen["cosine"].append(round(cosine, 3))
        seen["signs"].append(round(signs, 3))
        if cosine >= COSINE or signs >= SIGNS:
            chosen = draws
            break
    while 2 * chosen <= DRAWS[-1]:
        few, many = (
            seen["lost"].setdefault(draws, _lost(access.like(draws), x, y, threat, rng))
            for draws in (chosen, 2 * chosen)
        )
        half = 1.96 * math.sqrt(max(many * (1 - many), 0.25 / len(x)) / len(x)) / 2
        if many - few <= half:
            break
        chosen *= 2
    seen["lost"] = {str(draws): round(share, 3) for draws, share in seen["lost"].items()}
    return chosen, seen


def _agreement(access: Access, x: Tensor, y: Tensor) -> tuple[float, float]:
    loss = choose(access, "auto")
    first, second = (access.gradient(x, y, loss).gradient.flatten(1) for _ in range(2))
    alive = (first != 0).any(dim=1) | (second != 0).any(dim=1)
    if not bool(alive.any()):  # nothing left to climb, with any number of draws
        return 1.0, 1.0
    first, second = first[alive], second[alive]
    moving = (first != 0) | (second != 0)
    signs = ((first.sign() == second.sign()) & moving).sum() / moving.sum().clamp_min(1)
    return float(F.cosine_similarity(first, second, dim=1).mean()), float(signs)


def _climbed(access: Access, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
    plan = Plan(10, radius(threat) / 4, keep="last")
    return run(access, x, y, threat, rng, plan, "auto")


def _lost(access: Access, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> float:
    """The share of decisions that ten steps turn, on fresh draws."""
    found = _climbed(access, x, y, threat, rng)
    with torch.no_grad():
        return float(select(access, [found], y, None, choose(access, "auto"))[2].lost.mean())
