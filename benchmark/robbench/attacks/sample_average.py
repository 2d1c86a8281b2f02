"""Sample average: attack fixed draws of a stochastic defense as if they were all there is."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, wrapped, wrapped_specs
from robbench.attacks.losses import choose
from robbench.attacks.suite import Ready, one_stage
from robbench.frozen import Frozen
from robbench.threat import Threat


@attack(
    "saa",
    norms=("linf", "l2", "l1"),
    targeted=False,
    inner=wrapped_specs,
)
def saa(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    draws: Annotated[int, Field(ge=1)] = 32,
    attack: str = "autoattack",
) -> Tensor:
    """Any attack on a fixed sample of draws, whose mean is deterministic: FAB, Square and stopping
    rules work again. A small sample is overfitted: the trace has both shares lost.

    Trace: surrogate_lost (N,) of the fixed draws, fresh_lost (N,) of as many fresh calls.
    """
    inner = wrapped("saa", attack, threat.norm, such="autoattack")
    if not access.deployed.stochastic:
        return one_stage(Ready("", inner, access), x, y, x, threat, rng)
    if access.deployed.rule.abstains:  # fewer may never be enough for an answer
        draws = max(draws, access.deployed.draws)
    seeds = torch.randint(2**31 - 1, (draws,), generator=rng).tolist()
    surrogate = Access(
        Frozen(access.deployed, seeds),
        losses=access.losses,
        knows=access.knows,
        own=access.own,
        goal=access.goal,
    )
    surrogate.cost, surrogate.report, surrogate.guides = access.cost, access.report, access.guides
    start = x if access.start is None else access.start
    found = one_stage(Ready("", inner, surrogate), x, y, start, threat, rng)
    loss = choose(access, "auto")
    fixed = surrogate.judge(found, y, loss, None, 1).lost
    fresh = access.judge(found, y, loss, None, draws * access.deployed.draws).lost
    access.trace = surrogate.trace | {
        "surrogate_lost": fixed.cpu().numpy().astype(np.float16),
        "fresh_lost": fresh.cpu().numpy().astype(np.float16),
    }
    access.notes |= surrogate.notes
    return found
