"""When a search may stop: the attacker's goal is reached in most draws, not in a lucky one, unless
a lucky one is all that a publication asked for."""

from __future__ import annotations

import math

from torch import Tensor

from robbench.access import Access
from robbench.attacks import picked
from robbench.attacks.losses import margin

DRAWS = 20  # behind a success of a stochastic defense


def broken(access: Access, x: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """(N,) bool: the goal is reached in more than half of the calls; no answer is half of one.

    A search asks so often that a stochastic defense is sure to err once: what looks broken over
    the access's draws must be so again over fresh ones, at least 20 and whole calls.
    """
    loss = access.score_loss(margin)
    found = access.judge(x, y, loss, target, access.draws).lost > 0.5
    if access.deployed.stochastic and not access.lucky and bool(found.any()):
        per_call = access.deployed.draws
        draws = per_call * math.ceil(DRAWS / per_call)
        aim = picked(target, found)
        found[found.clone()] = access.judge(x[found], y[found], loss, aim, draws).lost > 0.5
    return found
