"""JSMA: the pixels that push most towards a target label, changed a few at a time.

Papernot et al. 2016 (EuroS&P, arXiv 1511.07528), algorithms 1 to 3. Differences to the text: the
derivatives are those of the scores before the softmax, as the authors' own experiments take them;
a network of any number of labels; untargeted is a search towards several wrong labels at once, of
which the one with the fewest changed pixels counts; where no pair of features passes the test of
the saliency map, the search goes on with those that raise the target most above the mean of the
others (the test depends on what is added to all scores, and no softmax does).
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets
from robbench.attacks.success import broken
from robbench.errors import InputError
from robbench.threat import Threat, distance

PAIRS_AT_ONCE = 2**22  # entries of a block of the pair matrix
NEVER = torch.iinfo(torch.int64).max


def _nonzero(theta: float) -> float:
    if theta == 0:
        raise ValueError("a step of 0 changes nothing; write theta=1 or theta=-1")
    return theta


@attack("jsma", norms=("l0",), minimal=True)
def jsma(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    theta: Annotated[float, Field(ge=-1, le=1), AfterValidator(_nonzero)] = 1.0,
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.3,
    pairs: bool = True,
    targets: Annotated[int, Field(ge=1)] = 9,
    steps: Annotated[int, Field(ge=1)] | None = None,
) -> Tensor:
    """Steps of theta on the most salient pair of features, at most a share gamma of all of them.

    pairs: two features a step, else one. targets: how many wrong labels, by score, an untargeted
    search tries. steps: at most so many. gamma (the paper's: 0.145) bounds what can be found, so a
    number at an ε of more pixels than that says nothing.
    """
    per_step, features = 1 + pairs, x[0].numel()
    limit = int(gamma * features + 1e-9)
    if limit < per_step:
        raise InputError(
            f"gamma = {gamma} lets {limit} of {features} features change, fewer than a step does;"
            f" write gamma={per_step / features:.2g} or more"
        )
    turns = limit * math.ceil(1 / abs(theta))
    turns = turns if steps is None else min(steps, turns)
    search = _Search(access, x, y, choose_targets(access, x, y, threat, rng), targets)
    for turn in range(turns):
        if not len(search.active):
            break
        search.step(theta, limit, per_step)
        access.report(turn + 1, turns)
    return search.best


class _Search:
    """Every image towards every label that it is to take; a search ends as soon as another of its
    image has been as short. Symbols: M searches, A active ones, D features."""

    def __init__(
        self, access: Access, x: Tensor, y: Tensor, target: Tensor | None, count: int
    ) -> None:
        self.access, self.x, self.y, self.targeted = access, x, y, target is not None
        with torch.no_grad():
            scores = access.scores(x)
        wrong = scores.scatter(1, y[:, None], float("-inf"))
        aims = wrong.topk(min(count, scores.shape[1] - 1)).indices
        aims = aims if target is None else target[:, None]
        self.image = torch.arange(len(x), device=x.device).repeat_interleave(aims.shape[1])
        self.aim = aims.flatten()
        self.current = x[self.image]
        self.touched = torch.zeros_like(self.current, dtype=torch.bool).flatten(1)
        self.best = x.clone()
        # fewest pixels of a success so far and its search, as one number: ties have one winner
        self.record = torch.full((len(x),), NEVER, device=x.device)
        start = broken(access, x, y, target)
        self.active = torch.nonzero(~start[self.image])[:, 0]

    def step(self, theta: float, limit: int, per_step: int) -> None:
        """One change of all active searches; those that end are no longer active."""
        towards, against = self._saliency(theta)
        flat = self.current[self.active].flatten(1)
        touched = self.touched[self.active]
        free = touched | (touched.sum(dim=1, keepdim=True) + per_step <= limit)
        free &= flat < 1 if theta > 0 else flat > 0
        towards = towards.masked_fill(~free, float("-inf"))
        against = against.masked_fill(~free, float("-inf"))
        others = self.access.deployed.labels - 1
        chosen, useful = most_salient(towards, against, others, per_step)
        chosen, self.active = chosen[useful], self.active[useful]
        if not len(self.active):
            return
        flat, touched = flat[useful], touched[useful]
        flat.scatter_(1, chosen, (flat.gather(1, chosen) + theta).clamp(0, 1))
        self.current[self.active] = flat.view(-1, *self.x.shape[1:])
        self.touched[self.active] = touched.scatter(1, chosen, True)
        self._settle()

    def _saliency(self, theta: float) -> tuple[Tensor, Tensor]:
        """(A, D) what a step of each feature adds to the target's score, and takes off the sum of
        the others, to first order and in units of |theta|."""
        here, aim = self.current[self.active], self.aim[self.active]
        towards, total = (
            self.access.gradient(here, aim, self.access.score_loss(part)).gradient.flatten(1)
            for part in (_of_label, _of_all)
        )
        if not bool(towards.isfinite().all() and total.isfinite().all()):
            raise FloatingPointError("the gradient of the scores is not finite")
        sign = math.copysign(1, theta)
        return sign * towards, sign * (towards - total)

    def _settle(self) -> None:
        """Keep the successes with the fewest pixels; end them, and what can no longer be better."""
        image = self.image[self.active]
        target = self.aim[self.active] if self.targeted else None
        current = self.current[self.active]
        lost = broken(self.access, current, self.y[image], target)
        pixels = distance(current, self.x[image], "l0").long()
        key = pixels * len(self.image) + self.active
        self.record.scatter_reduce_(0, image[lost], key[lost], "amin")
        won = lost & (self.record[image] == key)
        self.best[image[won]] = current[won]
        hopeful = pixels < self.record[image] // len(self.image)
        self.active = self.active[~lost & hopeful]


def _of_label(scores: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    return scores.gather(1, y[:, None])[:, 0]


def _of_all(scores: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    return scores.sum(dim=1)


def most_salient(
    towards: Tensor, against: Tensor, others: int, count: int
) -> tuple[Tensor, Tensor]:
    """(A, count) the features of the largest saliency, and (A,) whether they help at all.

    The saliency of features is the product of their sums of `towards` and of `against` (A, D),
    both positive (eq. 8 for one, algorithm 3 for two). Without such features: those by which the
    target gains most on the mean of the `others`. -inf marks a feature that cannot move.
    """
    fallback = (towards + against / others).topk(count, dim=1)
    if count == 1:
        product = torch.where((towards > 0) & (against > 0), towards * against, float("-inf"))
        value, chosen = product.max(dim=1, keepdim=True)
        value = value[:, 0]
    else:
        value, chosen = _best_pair(towards, against)
    found = value > 0
    useful = found | (fallback.values.sum(dim=1) > 0)
    return torch.where(found[:, None], chosen, fallback.indices), useful


def _best_pair(towards: Tensor, against: Tensor) -> tuple[Tensor, Tensor]:
    """(A,) the largest saliency of a pair, -inf for none, and (A, 2) the pair; exact.

    A feature with two others at least as good in both respects need not be looked at: one of them
    can take its place in any pair. Few are left, and their pair matrix is walked in blocks.
    """
    order = towards.argsort(dim=1, descending=True)
    second = _second_largest_before(against.gather(1, order))
    kept = against.gather(1, order) > second
    size = max(1, int(kept.sum(dim=1).max()))
    first = (~kept).byte().argsort(dim=1, stable=True)[:, :size]
    candidates, kept = order.gather(1, first), kept.gather(1, first)
    a, b = (
        part.gather(1, candidates).masked_fill(~kept, -torch.inf) for part in (towards, against)
    )
    best = torch.full_like(a[:, 0], -torch.inf)
    pair = torch.zeros_like(candidates[:, :1]).expand(-1, 2)
    column = torch.arange(size, device=a.device)
    for rows in column.split(max(1, PAIRS_AT_ONCE // a.numel())):
        u, v = (part[:, rows, None] + part[:, None, :] for part in (a, b))
        allowed = (u > 0) & (v > 0) & (column > rows[:, None])
        value, index = torch.where(allowed, u * v, -torch.inf).flatten(1).max(dim=1)
        places = torch.stack([rows[index // size], index % size], dim=1)
        pair = torch.where((value > best)[:, None], candidates.gather(1, places), pair)
        best = torch.maximum(best, value)
    return best, pair


def _second_largest_before(values: Tensor) -> Tensor:
    """(A, D) at each place the second largest value on its left, -inf where there is none."""
    largest = _before(values.cummax(dim=1).values)
    return _before(torch.minimum(values, largest).cummax(dim=1).values)


def _before(values: Tensor) -> Tensor:
    return torch.cat([torch.full_like(values[:, :1], -torch.inf), values[:, :-1]], dim=1)
