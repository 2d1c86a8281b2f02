"""Attacks on defenses that refuse: what they look for is an error that is accepted.

A detector refuses a score below its threshold, a majority vote one without a majority; how much an
answer has left to that is its room, negative where it is refused. A defense that never refuses is
attacked by the margin alone, and the record says so. All gradients are means over calls of the
defense; candidates are compared on selection draws that they were not made on.

N is the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, column, picked
from robbench.attacks.apgd import likeliest, remaining
from robbench.attacks.gradient import Steps, Trace, radius, select
from robbench.attacks.losses import Towards, choose, margin
from robbench.rules import Draw, Rule, Vote
from robbench.threat import Eps, Norm, Threat, ascend, project, random_start

NORMS: tuple[Norm, ...] = ("linf", "l2")
Mode = Literal["conflicting", "orthogonal", "selective"]
SLACK = 0.05  # an error by less of the margin is not yet one to hide: the authors' value
PARALLEL = 1e-4  # what a projection leaves of a gradient that is rounding, not a direction
WON = 2.0  # the rank of an accepted error; an error that is refused is 1


@runtime_checkable
class Refusing(Protocol):
    """A rule around another one that refuses where its excess is negative."""

    @property
    def rule(self) -> Rule: ...

    def excess(self, draw: Draw) -> Tensor:
        """(N,), differentiable."""
        ...


def room(rule: Rule, draw: Draw) -> Tensor | None:
    """(N,) how far the answer is from being refused, the least over all that may refuse it; None
    for a rule that never does. Of a majority vote it is the logarithm of twice the largest share
    of the mean softmax: the vote itself has no gradient."""
    rooms = []
    if isinstance(rule, Refusing):
        rooms.append(rule.excess(draw))
        rule = rule.rule
    if isinstance(rule, Vote) and rule.majority:
        shares = rule.scores(draw).log_softmax(dim=-1)
        rooms.append(shares.amax(dim=-1) + math.log(2))
    return torch.stack(rooms).amin(dim=0) if rooms else None


def refuses(rule: Rule) -> bool:
    """Whether there is a room: a vote of the most only refuses ties, which nothing leads to."""
    inner = rule.rule if isinstance(rule, Refusing) else rule
    return isinstance(rule, Refusing) or (isinstance(inner, Vote) and inner.majority)


@dataclass(frozen=True)
class Room:
    """The mean over calls of the room, each up to `cap`: at 0 an accepted call stops to count."""

    access: Access
    cap: float = math.inf

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        rooms = [room(self.access.deployed.rule, call) for call in self.access.calls(draw)]
        return torch.stack([each for each in rooms if each is not None]).clamp_max(self.cap).mean(0)


@dataclass(frozen=True)
class Accepted:
    """The smaller of margin and room, mean over calls: of one call positive for an accepted error,
    and for nothing else."""

    access: Access

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        rule, values = self.access.deployed.rule, []
        for call in self.access.calls(draw):
            value, left = margin(rule.scores(call), y, target), room(rule, call)
            values.append(value if left is None else torch.minimum(value, left))
        return torch.stack(values).mean(dim=0)


class Look(NamedTuple):
    """Where an attack would go from a point, and what the point is worth; N images."""

    gradient: Tensor
    rank: Tensor  # (N,) WON for an accepted error; outweighs the value
    value: Tensor  # (N,)


Push = Callable[[Tensor, Tensor], Look]  # (points, their indices in the batch)


@attack("opgd", norms=NORMS)
def opgd(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 100,
    step: Eps | None = None,
    mode: Mode = "conflicting",
    targets: Annotated[int, Field(ge=0)] = 3,
    loss: Literal["margin", "vote"] = "margin",
) -> Tensor:
    """Up the classifier's gradient until it errs, then up the detector's: Orthogonal PGD.

    Bryniarski et al. 2021, arXiv:2106.15023. mode: `orthogonal` takes from each its component
    along the other, `selective` nothing; `conflicting` takes from the detector's gradient what
    would undo the error, where there is such a component (Yu et al. 2020, arXiv:2001.06782).
    Orthogonal steps seldom leave a right answer whose detector looks at the classifier's own
    scores: the gradients are nearly parallel. targets: after the climb to any error, one towards
    each of so many of the likeliest wrong labels, any error counting. step: the length of all
    steps; none (default) lets it fall from 5 ε / steps to 0. The first climb starts at x, others
    at random points.
    """
    goal = choose_targets(access, x, y, threat, rng)
    fitted = choose(access, loss)
    aims: list[Tensor | None] = [goal]
    if goal is None:
        fitted = Towards(fitted)
        aims += likeliest(access, x, y, targets)

    def towards(aim: Tensor | None) -> Push:
        def push(here: Tensor, ids: Tensor) -> Look:
            value, up, lost = access.gradient(here, y[ids], fitted, picked(aim, ids))
            if not refuses(access.deployed.rule):
                return Look(up, _rank(value, lost), value)
            left, out, lost = access.gradient(here, y[ids], Room(access), picked(goal, ids))
            wrong = value > SLACK
            up, out = separated(up, out, mode)
            gradient = torch.where(column(wrong, here), out, up)
            return Look(gradient, _rank(value, lost), left.where(value > 0, value))

        return push

    rounds = [towards(aim) for aim in aims]
    return pursue(access, x, y, goal, threat, rng, rounds, steps, step)


@attack("joint", norms=NORMS)
def joint(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 100,
    step: Eps | None = None,
    search: Steps = 6,
    weight: Annotated[float, Field(ge=0)] = 1.0,
    loss: Literal["margin", "vote"] = "margin",
) -> Tensor:
    """PGD on the hinges of the margin and, times a searched λ, of the detector.

    Carlini & Wagner 2017, arXiv:1705.07263. Each of `search` climbs has its own λ per image,
    `weight` at first: ten times larger after one that ended in an error, which was refused, and
    ten times smaller after one that did not; between bounds of both kinds their geometric mean.
    weight=0 stays 0: PGD on the margin. step, starts: as in opgd. The paper has no ball and no
    search per image.
    """
    goal = choose_targets(access, x, y, threat, rng)
    fitted, hinge = choose(access, loss), Room(access, cap=0)
    balance = _Balance(torch.full((len(x),), weight, device=x.device))

    def push(here: Tensor, ids: Tensor) -> Look:
        value, up, lost = access.gradient(here, y[ids], fitted, picked(goal, ids))
        balance.wrong[ids] = value > 0
        up = up * column(value <= SLACK, here)
        if not refuses(access.deployed.rule):
            return Look(up, _rank(value, lost), value)
        left, out, lost = access.gradient(here, y[ids], hinge, picked(goal, ids))
        gradient = up + column(balance.weight[ids], here) * out
        return Look(gradient, _rank(value, lost), left.where(value > 0, value))

    def rounds() -> Iterator[Push]:
        for _ in range(search):
            yield push
            balance.bisect()

    return pursue(access, x, y, goal, threat, rng, rounds(), steps, step)


def separated(up: Tensor, out: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """The gradients of classifier and detector, (N, C, H, W), without what of one is in the way of
    the other."""
    if mode == "orthogonal":
        return across(up, out), across(out, up)
    against = (up * out).flatten(1).sum(dim=1) < 0
    taken = column(against, out) & (mode == "conflicting")
    return up, torch.where(taken, across(out, up), out)


def across(gradient: Tensor, other: Tensor) -> Tensor:
    """The gradient without its component along the other, image by image; itself where the two
    are parallel. Shapes (N, C, H, W)."""
    own, along = gradient.flatten(1), other.flatten(1)
    along = along / along.norm(dim=1, keepdim=True).clamp_min(1e-30)
    rest = own - (own * along).sum(dim=1, keepdim=True) * along
    nothing = rest.norm(dim=1, keepdim=True) <= PARALLEL * own.norm(dim=1, keepdim=True)
    return torch.where(nothing, own, rest).view_as(gradient)


class _Balance:
    """λ of each image, and what the climbs so far say of it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.wrong = torch.zeros_like(weight, dtype=torch.bool)  # where the last climb ended
        self.low, self.high = torch.zeros_like(weight), torch.full_like(weight, math.inf)

    def bisect(self) -> None:
        self.low = torch.where(self.wrong, self.weight, self.low)
        self.high = torch.where(self.wrong, self.high, self.weight)
        between = self.low.sqrt() * self.high.sqrt()
        between = torch.where(self.high.isinf(), 10 * self.low, between)
        self.weight = torch.where(
            self.low > 0, between, self.high.where(self.high.isfinite(), 0) / 10
        )


def _rank(value: Tensor, lost: Tensor) -> Tensor:
    return torch.maximum((value > 0).float(), WON * (lost > 0.5))


def pursue(
    access: Access,
    x: Tensor,
    y: Tensor,
    goal: Tensor | None,
    threat: Threat,
    rng: Generator,
    rounds: Iterable[Push],
    steps: int,
    step: object,
) -> Tensor:
    """The best point of several climbs, the first from x, the others from random points; an image
    takes part until it is broken. goal: labels to be reached, None for any error."""
    if not refuses(access.deployed.rule):
        access.notes["refuses"] = "never"
    if step is None:  # one length would jump to and fro over where both gradients are content
        sizes = 5 * radius(threat) / steps * torch.linspace(1, 0, steps + 1)
    else:
        sizes = torch.full((steps,), float(step))  # type: ignore[arg-type]
    climb = _Climb(access, x, threat, sizes[:steps].tolist())
    judged, best, winner = Accepted(access), x.clone(), torch.zeros_like(y)
    going = remaining(access, x, y, goal, judged)
    for index, push in enumerate(rounds):
        if not len(going):
            break
        start = x[going]
        if index:
            start = random_start(start, threat.norm, radius(threat), rng)
        pool, aim = [best[going], *climb(start, going, push)], picked(goal, going)
        best[going], which, _ = select(access, pool, y[going], aim, judged)
        winner[going[which > 0]] = index
        going = going[remaining(access, best[going], y[going], aim, judged)]
    access.trace = {**climb.trace.arrays, "restart": winner.cpu().numpy().astype("uint8")}
    return best


class _Climb:
    """Steps of these lengths in the ball around x, and the trace of each image's last climb."""

    def __init__(self, access: Access, x: Tensor, threat: Threat, sizes: list[float]) -> None:
        self.access, self.x, self.threat, self.sizes = access, x, threat, sizes
        self.trace = Trace(len(x), len(sizes) + 1)

    def __call__(self, start: Tensor, ids: Tensor, push: Push) -> list[Tensor]:
        """From these points of the images `ids` the best ones and, where one look does not tell
        the truth, the last ones."""
        best, last = start.clone(), start.clone()
        rank, value = torch.full((2, len(start)), -math.inf, device=start.device)
        active = torch.arange(len(start), device=start.device)
        for step, size in enumerate([*self.sizes, 0.0]):
            here = last[active]
            look = push(here, ids[active])
            self.trace.note(step, ids[active], look.value, look.gradient)
            self.access.report(step, len(self.sizes))
            level = look.rank == rank[active]
            better = (look.rank > rank[active]) | (level & (look.value > value[active]))
            kept = active[better]
            best[kept] = here[better]
            rank[kept], value[kept] = look.rank[better], look.value[better]
            on = look.rank < WON if self.access.exact else torch.ones_like(better)
            active, here, gradient = active[on], here[on], look.gradient[on]
            if not len(active) or step == len(self.sizes):
                break
            moved = here + size * ascend(gradient, here, self.threat.norm)
            images, eps = self.x[ids[active]], radius(self.threat)
            last[active] = project(moved, images, self.threat.norm, eps)
        return [best] if self.access.exact else [best, last]
