"""Square attack: random search by square-shaped steps, without gradients.

Source: Andriushchenko et al. 2020, arXiv:1912.00049, algorithms 1 to 3; l1: Croce & Hein 2021,
arXiv:2103.01208. As in the authors' code all images of a batch share the place of a step.
Differences: a square may lie anywhere (section 3 of the paper; the code leaves out the last row and
column, `edges=false`), and the start under l2 and l1 covers images whose side 5 does not divide.

On a stochastic defense a loss is the mean over `average` calls of it. The kept point is compared
with a proposal on the same draws, and every REFRESH steps both get new ones: no lucky draw lasts
longer than that, so none freezes the search, and no image is given up for one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from types import EllipsisType
from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, picked
from robbench.attacks.gradient import worst_of
from robbench.attacks.losses import choose
from robbench.errors import InputError
from robbench.randomness import random_state, set_random_state
from robbench.rules import Loss
from robbench.threat import Norm, Threat, project_l1

REFRESH = 10  # steps that share their draws
AVERAGE = 20  # calls of a stochastic defense behind a loss
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in steps out of 10,000
ORDER = {"l2": 2, "l1": 1}
DECAY = {"l2": 2, "l1": 4}  # how fast a bump falls off; for l1 only the authors' code tells
Count = Annotated[int, Field(ge=1)]


@attack("square", norms=("linf", "l2", "l1"), needs="scores")
def square(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    queries: Count = 5000,
    p: Annotated[float, Field(gt=0, le=1)] = 0.8,
    restarts: Count = 1,
    loss: str = "margin",
    average: Count | None = None,
    rescale: bool = True,
    edges: bool = True,
) -> Tensor:
    """Random search by squares; queries are calls of the defense per image and restart.

    The start, and on a deterministic defense the clean image, are asked besides. p is the share of
    the image in the first square; it shrinks with the share of queries spent (rescale=False: with
    their number, as in AutoAttack). average: calls behind a loss, 20 where the defense is
    stochastic; a deterministic one is asked once. InputError without an ε.
    """
    if threat.eps is None:
        raise InputError("the attack square needs an ε; write one, such as --eps 8/255")
    chosen = choose(access, loss)
    target = choose_targets(access, x, y, threat, rng)
    calls = (average or AVERAGE) if access.deployed.stochastic else 1
    moves = _Moves(threat.norm, float(threat.eps), rng, edges)
    search = _Search(access, moves, chosen, calls, queries, restarts, p, rescale)
    active, point = torch.arange(len(x), device=x.device), x
    if access.exact:
        active = active[access.judge(x, y, chosen, target, 1).lost < 1]
    candidates = []
    for restart in range(restarts):
        aim = picked(target, active)
        point = point.clone()
        point[active], lost = search.run(x[active], y[active], aim, restart)
        candidates.append(point)
        if access.exact:
            active = active[lost < 1]
    return worst_of(access, candidates, y, target, chosen)[0]


@dataclass(frozen=True)
class _Search:
    """One run of the search; calls: of the defense behind a loss."""

    access: Access
    moves: _Moves
    loss: Loss
    calls: int
    queries: int
    restarts: int
    p: float
    rescale: bool

    @property
    def steps(self) -> int:
        """What the queries allow; a refresh costs a stochastic defense one step in REFRESH."""
        if not self.access.deployed.stochastic:
            return self.queries
        return max(1, self.queries * REFRESH // (self.calls * (REFRESH + 1)))

    def run(
        self, x: Tensor, y: Tensor, target: Tensor | None, restart: int
    ) -> tuple[Tensor, Tensor]:
        """The best point of each image, and (N,) how far it was lost there when last asked."""
        access, steps = self.access, self.steps
        noisy = access.deployed.stochastic
        state = random_state(access.device)
        best = self.moves.start(x)
        lost, value = torch.zeros(2, len(x), device=x.device)
        going = torch.arange(len(x), device=x.device)
        for step in range(steps):
            if step == 0 or (noisy and step % REFRESH == 0):
                state = random_state(access.device)
                lost, value = self._ask(best, y, target)
            if access.exact:
                going = (lost < 1).nonzero()[:, 0]
            if not len(going):
                break
            new = self.moves.step(x[going], best[going], self._share(step))
            if noisy:
                set_random_state(access.device, state)
            aim = picked(target, going)
            now, gain = self._ask(new, y[going], aim)
            better = gain > value[going]
            if not noisy:  # an answer nearer to the goal counts more than any loss
                better = (now > lost[going]) | (better & (now == lost[going]))
            kept = going[better]
            best[kept], lost[kept], value[kept] = new[better], now[better], gain[better]
            access.report(restart * steps + step + 1, self.restarts * steps)
        return best, lost

    def _ask(self, x: Tensor, y: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        draws = self.calls * self.access.deployed.draws
        verdict = self.access.judge(x, y, self.loss, target, draws)
        return verdict.lost, verdict.loss

    def _share(self, step: int) -> float:
        """Of the image that a square takes: p, halved at each mark that is passed."""
        if self.rescale:
            step = int(step / self.steps * 10000)
        return self.p / 2 ** bisect_left(HALVINGS, step)


@dataclass(frozen=True)
class _Moves:
    """Random starts and steps inside ball and box; images are (N, C, H, W)."""

    norm: Norm
    eps: float
    rng: Generator
    edges: bool

    def start(self, x: Tensor) -> Tensor:
        """Stripes of one column under linf; a tiling of bumps under l2 and l1."""
        n, channels, height, width = x.shape
        if self.norm == "linf":
            return (x + self.eps * self._signs(x, n, channels, 1, width)).clamp(0, 1)
        delta = torch.zeros_like(x)
        size = max(1, min(height, width) // 5)
        for row in range(height % size // 2, height - size + 1, size):
            for column in range(width % size // 2, width - size + 1, size):
                tile = delta[..., row : row + size, column : column + size]
                tile += self._bump(x, size) * self._signs(x, n, channels, 1, 1)
        return self._inside(x, delta)

    def step(self, x: Tensor, best: Tensor, share: float) -> Tensor:
        """A proposal for each image: a square of this share of it is changed."""
        height, width = x.shape[2:]
        size = round(math.sqrt(share * height * width))
        if self.norm == "linf":
            window = self._window(x, max(1, size))
            delta = torch.zeros_like(x[0])
            delta[window] = 2 * self.eps * self._signs(x, x.shape[1], 1, 1)
            return (best + delta).clamp(x - self.eps, x + self.eps).clamp(0, 1)
        return self._moved(x, best - x, max(3, size + 1 - size % 2))

    def _moved(self, x: Tensor, delta: Tensor, size: int) -> Tensor:
        """Mass of the perturbation from a second window, and what is free, goes to a first one."""
        order, channels = ORDER[self.norm], x.shape[1]
        first, second = self._window(x, size), self._window(x, size)
        both = torch.zeros_like(x[:1])
        both[first], both[second] = 1, 1
        whole = torch.linalg.vector_norm(delta, order, dim=(1, 2, 3), keepdim=True)
        free = (self.eps**order - whole**order).clamp_min(0) / channels
        mass = (free + self._length(delta * both) ** order) ** (1 / order)
        if self.norm == "l1":
            mass = mass * channels  # too much, as the authors have it; the projection cuts it
        old = delta[first] / (1e-12 + self._length(delta[first]))
        side = old.shape[-1]
        bump = self._bump(x, side) * self._signs(x, len(x), channels, 1, 1) + old
        delta[second] = 0
        delta[first] = bump / (1e-12 + self._length(bump)) * mass
        return self._inside(x, delta)

    def _inside(self, x: Tensor, delta: Tensor) -> Tensor:
        """On the sphere, as far as the box lets it."""
        if self.norm == "l1":
            return project_l1(x + delta, x, self.eps)
        length = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        return (x + self.eps * delta / length.clamp_min(1e-12)).clamp(0, 1)

    def _bump(self, x: Tensor, size: int) -> Tensor:
        """(size, size) of length 1: two pyramids of opposite signs, side by side or stacked."""
        halves = [self._pyramid(rows, size) for rows in (size // 2, size - size // 2)]
        bump = torch.cat([halves[0], -halves[1]]).to(x)
        bump = bump / self._length(bump)
        return bump.T if torch.rand(1, generator=self.rng) > 0.5 else bump

    def _pyramid(self, height: int, width: int) -> Tensor:
        """Of length 1, with rings of equal height around the centre."""
        rows = (torch.arange(height) - height // 2).abs()
        columns = (torch.arange(width) - width // 2).abs()
        rings = max(height, width) // 2 + 1
        layers = torch.arange(1, rings + 1.0) ** -DECAY[self.norm]
        layers = layers.flip(0).cumsum(0).flip(0)
        pyramid = layers[torch.maximum(rows[:, None], columns)]
        return pyramid / self._length(pyramid)

    def _length(self, delta: Tensor) -> Tensor:
        """Per image and channel; the last two dimensions stay with size 1."""
        order = ORDER[self.norm]
        return torch.linalg.vector_norm(delta, order, dim=(-2, -1), keepdim=True)

    def _window(self, x: Tensor, size: int) -> tuple[EllipsisType, slice, slice]:
        """A random square, the same in every image and channel; cut to the shorter side."""
        height, width = x.shape[2:]
        size = min(size, height, width)
        row, column = (
            int((side - size + self.edges) * torch.rand(1, generator=self.rng))
            for side in (height, width)
        )
        return ..., slice(row, row + size), slice(column, column + size)

    def _signs(self, x: Tensor, *shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=self.rng) - 1).sign().to(x)
