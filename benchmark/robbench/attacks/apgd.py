"""APGD: a step size that halves itself, Croce & Hein 2020, arXiv:2003.01690 (l1: 2103.01208).

Differences to the authors' code: any loss, also a defense's own; an image leaves the batch once it
is broken. On a stochastic defense no image is given up for one lucky draw: points are compared on
the same draws, new ones every few steps, and candidates on selection draws of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, column, picked
from robbench.attacks.gradient import Steps, Trace, radius, select
from robbench.attacks.losses import Towards, choose
from robbench.errors import InputError
from robbench.metrics import LOST
from robbench.randomness import random_state, set_random_state
from robbench.rules import Loss
from robbench.threat import Norm, Threat, ascend, project_l1, shrink, surface_start

MOMENTUM = 0.25  # the share of the last move in the next
CALLS = 10  # of the defense, by which an image counts as lost: one or two may be luck
RENEWED = 5  # steps that are compared on the same draws
RADII = ((3, 0.3), (2, 0.3), (1, 0.4))  # under l1: in ε, and the share of the steps spent there


@attack("apgd", norms=("linf", "l2", "l1"))
def apgd(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 100,
    restarts: Steps = 1,
    loss: str = "auto",
    targets: Annotated[int, Field(ge=0)] = 0,
    rho: Annotated[float, Field(gt=0, le=1)] = 0.75,
    balanced: bool = False,
    start: Literal["random", "warm"] = "random",
) -> Tensor:
    """Momentum steps from 2 ε on, halved where the loss stops to grow.

    targets: towards each of so many of the likeliest wrong labels in turn, any error counting
    (APGD-T has 9 and loss=dlr). balanced: every member's gradient counts alike. start: `warm` is
    the worst point that earlier stages of a suite have found, for the first climb. Under l1 the
    radius shrinks from 3 ε to ε while it climbs, as in AutoAttack.
    """
    aim = choose_targets(access, x, y, threat, rng)
    objective, judged = choose(access, loss), choose(access, loss)
    rounds: list[Tensor | None] = [aim] * restarts
    if targets and aim is None:
        # losses towards different labels do not say which of two points is the worse one
        objective, judged = Towards(objective), choose(access, "margin")
        rounds = [label for label in likeliest(access, x, y, targets) for _ in range(restarts)]
    climb = _Climb(access, threat.norm, radius(threat), steps, rho, balanced, objective)
    trace, winner = Trace(len(x), steps + 1), torch.zeros_like(y)
    if start == "warm" and access.start is None:
        raise InputError(
            "apgd(start=warm) starts where earlier stages of a suite ended; there are none"
        )
    warm = access.start if start == "warm" else None
    best = x.clone() if warm is None else warm.clone()
    selected = torch.full_like(x[:, 0, 0, 0], math.nan)
    going = remaining(access, best, y, aim, judged)
    for index, label in enumerate(rounds):
        access.report(index, len(rounds))
        if not len(going):
            break
        images, labels = x[going], y[going]
        if warm is not None and not index:
            here = warm[going]
        else:
            outer = RADII[0][0] if threat.norm == "l1" else 1
            here = surface_start(images, threat.norm, outer * radius(threat), rng)
        found = climb(images, labels, picked(label, going), here, trace, going)
        goal = picked(aim, going)
        pool = [best[going], *found]
        chosen, which, verdict = select(access, pool, labels, goal, judged, CALLS)
        best[going], selected[going] = chosen, verdict.lost
        winner[going[which > 0]] = index
        going = going[verdict.lost < enough(access)]
    access.report(len(rounds), len(rounds))
    access.trace = {
        **trace.arrays,
        "selected_lost": selected.half().cpu().numpy(),
        "restart": winner.cpu().numpy().astype("uint8"),
    }
    return best


def likeliest(access: Access, x: Tensor, y: Tensor, count: int) -> list[Tensor]:
    """(N,) the likeliest wrong label of each image, the second likeliest, …"""
    with torch.no_grad():
        wrong = access.scores(x).scatter(1, y[:, None], float("-inf"))
    return list(wrong.topk(min(count, wrong.shape[1] - 1), dim=1).indices.unbind(1))


def remaining(access: Access, x: Tensor, y: Tensor, target: Tensor | None, loss: Loss) -> Tensor:
    """Indices of the images that are still to be attacked: of an oracle's all."""
    everything = torch.arange(len(x), device=x.device)
    if not access.own:
        return everything
    _, _, verdict = select(access, [x], y, target, loss, CALLS)
    return everything[verdict.lost < enough(access)]


def enough(access: Access) -> float:
    """From which share of lost decisions on an image needs no further attack."""
    return 1 if access.exact else LOST if access.own else math.inf


@dataclass
class _State:
    """Where the climb of each image is; tensors over the images that are still climbing."""

    ids: Tensor  # in the batch of the climb
    x: Tensor
    y: Tensor
    target: Tensor | None
    current: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor  # (N,) of the last step
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    best_lost: Tensor
    size: Tensor  # (N,) of the next step
    grown: Tensor  # (N,) steps since the last check on which the loss grew
    reduced: Tensor  # (N,) bool: halved at the last check
    checked: Tensor  # (N,) best_value at the last check
    share: Tensor  # (N,) of the pixels that an l1 step moves
    moved: Tensor  # (N,) pixels that the best point differed in at the last check

    def kept(self, mask: Tensor) -> _State:
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in parts.items():
            parts[name] = None if value is None else value[mask]
        return _State(**parts)


class _Climb:
    """One climb from given starting points; the candidates of each image come back."""

    def __init__(
        self,
        access: Access,
        norm: Norm,
        eps: float,
        steps: int,
        rho: float,
        balanced: bool,
        loss: Loss,
    ) -> None:
        self.access, self.norm, self.eps, self.steps = access, norm, eps, steps
        self.rho, self.balanced, self.loss = rho, balanced, loss
        self.draws_at: tuple[object, ...] | None = None  # the random state of the steps' draws

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        start: Tensor,
        trace: Trace,
        ids: Tensor,
    ) -> list[Tensor]:
        if self.norm != "l1":
            return self._climb(x, y, target, start, self.eps, self.steps, trace, ids, True)
        sizes = [math.ceil(share * self.steps) for _, share in RADII[:-1]]
        plan = zip(RADII, [*sizes, max(1, self.steps - sum(sizes))], strict=True)
        found = [start]
        for (outer, _), steps in plan:
            start = project_l1(found[0], x, outer * self.eps)
            last = outer == 1
            found = self._climb(x, y, target, start, outer * self.eps, steps, trace, ids, last)
        return found

    def _climb(
        self,
        x: Tensor,
        y: Tensor,
        target: Tensor | None,
        start: Tensor,
        eps: float,
        steps: int,
        trace: Trace,
        ids: Tensor,
        final: bool,
    ) -> list[Tensor]:
        """steps + 1 gradients; in the last radius an image stops when it is broken for certain."""
        stops = self.access.exact and final
        self.draws_at = None
        state = self._begin(x, y, target, start, eps)
        best, last = start.clone(), start.clone()
        window = since = max(int((0.04 if self.norm == "l1" else 0.22) * steps), 1)
        for step in range(steps + 1):
            if step:
                self._move(state, step, eps)
            self._evaluate(state, step, trace, ids)
            best[state.ids], last[state.ids] = state.best, state.current
            if stops:
                state = state.kept(state.best_lost < 1)
                if not len(state.ids):
                    break
            if step:
                since -= 1
            if not since:
                self._check(state, window, eps)
                if self.norm != "l1":
                    window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
                since = window
        return [best] if self.access.exact or not final else [best, last]

    def _begin(
        self, x: Tensor, y: Tensor, target: Tensor | None, start: Tensor, eps: float
    ) -> _State:
        def fill(value: float) -> Tensor:
            return torch.full((len(x),), value, device=x.device)

        moved = (start != x).flatten(1).sum(dim=1).float()
        return _State(
            ids=torch.arange(len(x), device=x.device),
            x=x,
            y=y,
            target=target,
            current=start,
            previous=start,
            gradient=torch.zeros_like(start),
            value=fill(0),  # which the authors' first comparison is with
            best=start,
            best_gradient=torch.zeros_like(start),
            best_value=fill(-math.inf),
            best_lost=fill(0),
            size=fill(eps if self.norm == "l1" else 2 * eps),
            grown=fill(0),
            reduced=fill(1).bool(),
            checked=fill(-math.inf),
            share=moved / x[0].numel() / 1.5,
            moved=moved,
        )

    def _move(self, state: _State, step: int, eps: float) -> None:
        size, here = column(state.size, state.x), state.current
        if self.norm == "l1":
            there = project_l1(here + size * self._sparse(state), state.x, eps)
        else:
            ahead = here + size * ascend(state.gradient, here, self.norm)
            there = shrink(ahead, state.x, self.norm, eps).clamp(0, 1)
            if step > 1:
                drift = here - state.previous
                there = here + (1 - MOMENTUM) * (there - here) + MOMENTUM * drift
                there = shrink(there, state.x, self.norm, eps).clamp(0, 1)
        state.previous, state.current = here, there

    @staticmethod
    def _sparse(state: _State) -> Tensor:
        """Signs of the largest `share` of the gradient's entries, of unit length in l1."""
        sizes = state.gradient.abs().flatten(1)
        rank = ((1 - state.share) * sizes.shape[1]).clamp(0, sizes.shape[1] - 1).long()
        least = sizes.sort(dim=1).values.gather(1, rank[:, None])
        signs = state.gradient.sign() * (sizes >= least).view_as(state.gradient)
        return signs / column(signs.abs().flatten(1).sum(dim=1).clamp_min(1e-10), signs)

    def _evaluate(self, state: _State, step: int, trace: Trace, ids: Tensor) -> None:
        """Loss and gradient at the current points, and whether they are the best so far."""
        self._renew(state, step)
        found = self.access.gradient(state.current, state.y, self.loss, state.target, self.balanced)
        trace.note(step, ids[state.ids], found.loss, found.gradient, found.lost)
        if step:
            state.grown = state.grown + (found.loss > state.value)
            state.value = found.loss
        better = found.loss > state.best_value
        if self.access.exact:  # no answer is nearer to an error than any loss of a right one
            nearer = found.lost > state.best_lost
            better = nearer | (better & (found.lost == state.best_lost))
        wide = column(better, state.x)
        state.gradient = found.gradient
        state.best = torch.where(wide, state.current, state.best)
        state.best_gradient = torch.where(wide, found.gradient, state.best_gradient)
        state.best_value = torch.where(better, found.loss, state.best_value)
        state.best_lost = torch.where(better, found.lost, state.best_lost)
        if not step:
            state.checked = state.best_value

    def _renew(self, state: _State, step: int) -> None:
        """The same draws for every point that is compared, new ones every few steps."""
        access = self.access
        if not access.deployed.stochastic:
            return
        if self.draws_at is None or step % RENEWED == 0:
            self.draws_at = random_state(access.device)
            if step:
                state.best_value = self._value(state, state.best)
                state.value = self._value(state, state.current)
        set_random_state(access.device, self.draws_at)

    def _value(self, state: _State, points: Tensor) -> Tensor:
        assert self.draws_at is not None
        set_random_state(self.access.device, self.draws_at)
        return self.access.judge(points, state.y, self.loss, state.target, self.access.draws).loss

    def _check(self, state: _State, window: int, eps: float) -> None:
        """Shorter steps, and back to the best point, where the loss does not grow any more."""
        if self.norm == "l1":
            back = self._check_l1(state, eps)
        else:
            stuck = ~state.reduced & (state.checked >= state.best_value)
            back = (state.grown <= window * self.rho) | stuck
            state.size = torch.where(back, state.size / 2, state.size)
            state.reduced, state.checked = back, state.best_value
        wide = column(back, state.x)
        state.current = torch.where(wide, state.best, state.current)
        state.gradient = torch.where(wide, state.best_gradient, state.gradient)
        state.grown = torch.zeros_like(state.grown)

    @staticmethod
    def _check_l1(state: _State, eps: float) -> Tensor:
        moved = (state.best != state.x).flatten(1).sum(dim=1).float()
        back = moved < 0.95 * state.moved
        state.share = moved / state.x[0].numel() / 1.5
        shorter = (state.size / 1.5).clamp(eps / 10, eps)
        state.size = torch.where(back, torch.full_like(shorter, eps), shorter)
        state.moved = moved
        return back
