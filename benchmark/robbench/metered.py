"""Access by a limited number of queries, for any attack that only asks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from robbench.access import Access, Verdict
from robbench.attacks.losses import margin
from robbench.rules import Loss
from robbench.threat import Threat, distance, within


class OutOfQueries(Exception):
    """The attack wanted more answers than the setting gives."""


class Metered(Access):
    """Access for one image that ends after `limit` queries, and knows the best point asked.

    Within ε the point of the largest margin; of a search for the smallest change the nearest
    point that was wrong. best (1, C, H, W) is x itself until there is one.
    """

    def __init__(self, access: Access, x: Tensor, y: Tensor, threat: Threat, limit: int) -> None:
        options: dict[str, Any] = {"draws": access.draws, "goal": access.goal}
        super().__init__(access.deployed, gradients=False, **options)
        self.cost, self.x, self.y, self.threat = access.cost, x, y, threat
        self.best, self.value = x, -math.inf
        self.left = limit

    def count(self, n: int, draws: int, backwards: bool = False) -> None:
        if not backwards:
            if n * draws > self.left:
                raise OutOfQueries
            self.left -= n * draws
        super().count(n, draws, backwards)

    def scores(self, x: Tensor) -> Tensor:
        scores = super().scores(x)
        self._remember(x, margin(scores.detach(), self.y.expand(len(x))))
        return scores

    def judge(self, x: Tensor, y: Tensor, loss: Loss, target: Tensor | None, draws: int) -> Verdict:
        verdict = super().judge(x, y, loss, target, draws)
        self._remember(x, verdict.lost - 0.5)
        return verdict

    def _remember(self, x: Tensor, margins: Tensor) -> None:
        """The best of the points (B, C, H, W) that were just asked, if it is a better one."""
        if not len(x):
            return
        lengths = distance(x, self.x.expand_as(x), self.threat.norm).to(margins)
        inside = within(lengths, self.threat) & ((x >= 0) & (x <= 1)).flatten(1).all(dim=1)
        value = margins
        if self.threat.eps is None and self.threat.norm != "none":
            value = -lengths
            inside &= margins > 0
        value = value.masked_fill(~inside, -math.inf)
        index = int(value.argmax())
        if value[index] > self.value:
            self.best, self.value = x[index : index + 1].detach().clone(), float(value[index])


def within_limit(
    attack: Any, access: Access, x: Tensor, y: Tensor, threat: Threat, rng: Any, limit: int
) -> Tensor:
    """x' of an attack that is stopped, image by image, when its queries are used up."""
    found = []
    for index in range(len(x)):
        one = slice(index, index + 1)
        metered = Metered(access, x[one], y[one], threat, limit)
        try:
            found.append(attack(metered, x[one].clone(), y[one].clone(), threat, rng))
        except OutOfQueries:
            found.append(metered.best)
        access.report(index + 1, len(x))
    return torch.cat(found)
