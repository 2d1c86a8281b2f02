"""LocSearchAdv, a greedy search over pixels with queries alone, and its random baseline.

Narodytska & Kasiviswanathan 2017 (CVPR workshops, arXiv 1612.06299), algorithms 1 to 3. Images
are centred: a pixel's value is between -1/2 and 1/2 in what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, picked
from robbench.attacks.losses import log_odds
from robbench.attacks.success import broken
from robbench.threat import Threat

Count = Annotated[int, Field(ge=1)]
FIRST = 0.1  # share of the pixels that the first round looks at


@dataclass(frozen=True)
class Plan:
    """The settings of the search, as local_search has them."""

    r: float
    p: float | None = None
    d: int = 5
    t: int = 5
    rounds: int = 150
    probes: int = 128
    rest: int = 30


@attack("local-search", norms=("l0",), needs="scores", minimal=True)
def local_search(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    r: Annotated[float, Field(ge=0, le=2)] = 1.5,
    p: Annotated[float, Field(gt=0)] | None = None,
    d: Count = 5,
    t: Count = 5,
    rounds: Count = 150,
    probes: Count = 128,
    rest: Annotated[int, Field(ge=0)] = 30,
    undo: bool = True,
) -> Tensor:
    """Each round multiplies the t pixels that matter most by r, cyclically, and goes on near them.

    At most `probes` pixels within d of the last ones are asked about (foolbox: 128); a changed one
    rests for `rest` rounds. p: None asks what the change itself would do to the label; a number is
    the paper's way (p=10): push the pixel to ±p in a query beyond the box, and take those that
    leave the label surest, since a cyclic change mostly goes the other way. undo: put back what the
    success does not need.
    """
    target = choose_targets(access, x, y, threat, rng)
    found, won = _walk(access, x, y, target, Plan(r, p, d, t, rounds, probes, rest), rng)
    best = x.clone()
    best[won] = found[won]
    if undo and bool(won.any()):
        aim = picked(target, won)
        best[won] = _undone(access, best[won], x[won], y[won], aim)
    return best


@attack("single-pixel", norms=("l0",), needs="labels", minimal=True)
def single_pixel(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    tries: Count = 100,
) -> Tensor:
    """RandAdv: random pixels, one at a time, at both ends of the box, until the label is lost.

    The paper's p pushes a pixel out of the box, and towards one end alone.
    """
    target = choose_targets(access, x, y, threat, rng)
    best, flat = x.clone(), x.flatten(2)
    pixels = flat.shape[2]
    order = torch.rand(len(x), pixels, generator=rng).argsort(dim=1).to(x.device)
    active = torch.nonzero(~broken(access, x, y, target))[:, 0]
    for turn in range(min(tries, pixels)):
        for value in (0.0, 1.0):
            if not len(active):
                return best
            place = order[active, turn][:, None, None].expand(-1, flat.shape[1], 1)
            here = flat[active].scatter(2, place, value).view(-1, *x.shape[1:])
            lost = broken(access, here, y[active], picked(target, active))
            best[active[lost]] = here[lost]
            active = active[~lost]
        access.report(turn + 1, min(tries, pixels))
    return best


def cyclic(x: Tensor, r: float) -> Tensor:
    """Centred values times r; what leaves the box comes in at its other end (algorithm 2)."""
    centred = r * (x - 0.5)
    return (centred - (centred > 0.5).float() + (centred < -0.5).float() + 0.5).clamp(0, 1)


def _walk(
    access: Access, x: Tensor, y: Tensor, target: Tensor | None, plan: Plan, rng: Generator
) -> tuple[Tensor, Tensor]:
    """The images after their last round, and (N,) bool whether they reached the goal by it."""
    current, won = x.clone(), torch.zeros_like(y, dtype=torch.bool)
    near = torch.ones(len(x), x[0, 0].numel(), dtype=torch.bool, device=x.device)
    rests_until = torch.zeros_like(near, dtype=torch.int64)
    active = torch.nonzero(~broken(access, x, y, target))[:, 0]
    for turn in range(plan.rounds):
        if not len(active):
            break
        label, aim = y[active], picked(target, active)
        awake = near[active] & (rests_until[active] <= turn)
        awake = torch.where(awake.any(dim=1, keepdim=True), awake, near[active])
        most = plan.probes if turn else min(plan.probes, max(1, int(FIRST * near.shape[1])))
        chosen = pick(access, plan, current[active], label, aim, _draw(awake, most, rng))
        area = chosen.view(-1, 1, *x.shape[2:])
        current[active] = torch.where(area, cyclic(current[active], plan.r), current[active])
        rests_until[active] = rests_until[active].masked_fill(chosen, turn + 1 + plan.rest)
        near[active] = F.max_pool2d(area.float(), 2 * plan.d + 1, 1, plan.d).flatten(1) > 0
        lost = broken(access, current[active], label, aim)
        won[active[lost]] = True
        active = active[~lost]
        access.report(turn + 1, plan.rounds)
    return current, won


def _draw(awake: Tensor, most: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """(A, K) random pixels of those awake (A, H·W), at most so many, and (A, K) which are real."""
    keys = torch.rand(awake.shape, generator=rng).to(awake.device).masked_fill(~awake, -1)
    drawn = keys.topk(min(most, int(awake.sum(dim=1).max())), dim=1)
    return drawn.indices, drawn.values >= 0


def pick(
    access: Access,
    plan: Plan,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    drawn: tuple[Tensor, Tensor],
) -> Tensor:
    """(A, H·W) bool: the t of the drawn pixels whose change promises most.

    By the log-odds of the label, which order as its probability and do not saturate with it.
    """
    places, real = drawn
    count, pixels = places.shape[1], x[0, 0].numel()
    loss, values = access.score_loss(log_odds), []
    for part in torch.arange(len(x), device=x.device).split(max(1, access.deployed.chunk // count)):
        here = x[part].flatten(2)[:, None]
        probe = cyclic(here, plan.r) if plan.p is None else 0.5 + plan.p * (here - 0.5).sign()
        chosen = F.one_hot(places[part], pixels).bool()[:, :, None]
        points = torch.where(chosen, probe, here).view(-1, *x.shape[1:])
        label = y[part].repeat_interleave(count)
        aim = None if target is None else target[part].repeat_interleave(count)
        values.append(access.judge(points, label, loss, aim, access.draws).loss)
    gain = torch.cat(values).view(-1, count)
    if bool(gain.isnan().any()):
        raise FloatingPointError("the scores of the defense are not numbers")
    gain = (gain if plan.p is None else -gain).masked_fill(~real, -torch.inf)
    top = gain.topk(min(plan.t, count), dim=1)
    marks = torch.zeros(len(x), pixels, dtype=torch.bool, device=x.device)
    return marks.scatter_(1, places.gather(1, top.indices), real.gather(1, top.indices))


def _undone(access: Access, changed: Tensor, x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """The changed images with each pixel put back, one after the other, that can be spared."""
    current, differs = changed.clone(), (changed != x).any(dim=1).flatten(1)
    counts = differs.sum(dim=1)
    order = differs.byte().argsort(dim=1, descending=True, stable=True)
    for turn in range(int(counts.max())):
        rows = torch.nonzero(counts > turn)[:, 0]
        place = order[rows, turn][:, None, None].expand(-1, x.shape[1], 1)
        original = x[rows].flatten(2).gather(2, place)
        trial = current[rows].flatten(2).scatter(2, place, original).view(-1, *x.shape[1:])
        lost = broken(access, trial, y[rows], picked(target, rows))
        current[rows[lost]] = trial[lost]
    return current
