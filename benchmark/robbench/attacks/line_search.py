"""FGSM with a line search: foolbox 1.x's reading of Goodfellow et al. 2015, as Frazier-Logue &
Hanson's evaluation uses it (https://arxiv.org/abs/1808.03578).

Differences to foolbox: images and radii are batched, the refinement is in the last interval of the
coarse search whatever its place, there is an l1 form, and on a stochastic defense a radius counts
if most of enough draws are lost at it, so that a thousand questions are no thousand lucky chances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, picked
from robbench.attacks.gradient import Trace
from robbench.attacks.losses import choose
from robbench.attacks.success import broken
from robbench.threat import Norm, Threat

FINE = 20  # radii between the first coarse one that breaks and the one before it


@attack("fgsm-line-search", norms=("linf", "l2", "l1"), minimal=True)
def line_search(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    radii: Annotated[int, Field(ge=1)] = 1000,
    loss: str = "auto",
) -> Tensor:
    """FGSM at the first of `radii` radii up to the whole range that breaks, then refined.

    A radius is the mean size of the perturbation of a pixel before it is clipped to the box: of
    its absolute value along the sign (linf) and the gradient (l1), quadratic mean along the
    gradient for l2.
    """
    objective = choose(access, loss)
    target = choose_targets(access, x, y, threat, rng)
    found = x.clone()
    active = torch.nonzero(~broken(access, x, y, target))[:, 0]
    if not len(active):
        return found
    start, label, aim = x[active], y[active], picked(target, active)
    value, gradient, _ = access.gradient(start, label, objective, aim)
    trace = Trace(len(x), 1)
    trace.note(0, active, value, gradient)
    access.trace = trace.arrays
    line = _Line(access, start, label, aim, _direction(gradient, threat.norm))
    step = 1 / radii
    first = line.first(step * torch.arange(1, radii + 1, device=x.device).expand(len(start), -1))
    hit = torch.nonzero(first < radii)[:, 0]
    line = line.of(hit)
    fine = step * (first[hit, None] + torch.arange(1, FINE + 1, device=x.device) / FINE)
    # the last of them is the coarse radius, which has had its answer
    last = line.first(fine[:, :-1])
    found[active[hit]] = line.at(fine.gather(1, last[:, None]))[0]
    return found


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The gradient, each pixel by its sign (linf) or all by their mean size (l1) or the quadratic
    mean of it (l2), so that radius 1 is the range of the box."""
    if norm == "linf":
        return gradient.sign()
    order = 2 if norm == "l2" else 1
    length = torch.linalg.vector_norm(gradient, ord=order, dim=(1, 2, 3), keepdim=True)
    return gradient * (gradient[0].numel() ** (1 / order) / length.clamp_min(1e-30))


@dataclass(frozen=True)
class _Line:
    """Points along a direction from x, per image, and where the first one is broken."""

    access: Access
    x: Tensor
    y: Tensor
    target: Tensor | None
    direction: Tensor

    def of(self, images: Tensor) -> _Line:
        target = picked(self.target, images)
        parts = self.x[images], self.y[images], target, self.direction[images]
        return _Line(self.access, *parts)

    def at(self, radii: Tensor) -> Tensor:
        """(N, R) radii -> (R, N, C, H, W) images in the box."""
        return (self.x + radii.T[:, :, None, None, None] * self.direction).clamp(0, 1)

    def first(self, radii: Tensor) -> Tensor:
        """(N, R) rising radii -> (N,) the place of the first that breaks, R where none does.

        As many radii at once as the remaining images leave room for in a pass; one by one, each
        with draws of its own, where one draw that errs is enough.
        """
        number = radii.shape[1]
        places = torch.full_like(self.y, number)
        active, start = torch.arange(len(places), device=places.device), 0
        while start < number and len(active):
            room = 1 if self.access.lucky else max(1, self.access.deployed.chunk // len(active))
            part = radii[active, start : start + room]
            line, count = self.of(active), part.shape[1]
            aim = None if line.target is None else line.target.repeat(count)
            points = line.at(part).flatten(0, 1)
            lost = broken(self.access, points, line.y.repeat(count), aim)
            lost = lost.view(count, len(active))
            hit = lost.any(dim=0)
            places[active[hit]] = start + lost[:, hit].float().argmax(dim=0)
            active, start = active[~hit], start + count
            self.access.report(min(start, number), number)
        return places
