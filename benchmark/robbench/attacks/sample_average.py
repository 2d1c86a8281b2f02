"""Sample average: attack fixed draws of a stochastic defense as if they were all there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from robbench.access import Access
from robbench.attacks import Configured, attack
from robbench.attacks.losses import choose
from robbench.attacks.suite import Ready, one_stage
from robbench.deployed import Deployed, Randomness
from robbench.errors import InputError
from robbench.randomness import preserved_random_state, seed_everything
from robbench.rules import Draw
from robbench.threat import Threat


class Frozen(Deployed):
    """Some draws of a stochastic defense, always the same, whatever the batch: deterministic.

    They make as many calls of the defense as they are enough for: an image is lost for certain
    once every one of them is, and losses are means over them.
    Noise that images have each for themselves is made the same for all of them, so that an image
    meets the same draws alone and in any batch.
    """

    def __init__(self, deployed: Deployed, seeds: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.members, self.rule = deployed.members, deployed.rule
        self.shape, self.labels = deployed.shape, deployed.labels
        self.chunk = max(1, deployed.chunk // len(seeds))
        self.kinds, self.seeds = deployed.randomness, list(seeds)
        self.randomness: list[Randomness] = ["none"] * len(self.members)
        self.draws = deployed.draws

    def sample(self, x: Tensor, draws: int, features: bool = False) -> Draw:
        features = features or getattr(self.rule, "features", False)
        made: list[tuple[Tensor, Tensor | None]] = []
        with preserved_random_state():
            for seed in self.seeds:
                for member, kind in zip(self.members, self.kinds, strict=True):
                    seed_everything(seed)
                    made.append(_fixed(member, kind, x, features))
        s, m = len(self.seeds), len(self.members)
        logits = torch.stack([logits for logits, _ in made])
        hidden = torch.stack([h for _, h in made if h is not None]) if features else None
        return Draw(
            logits.view(s, m, *logits.shape[1:]),
            None if hidden is None else hidden.view(s, m, *hidden.shape[1:]),
        )


def _fixed(
    member: nn.Module, kind: Randomness, x: Tensor, features: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits (N, L) of one pass, and features (N, D), from the random streams as they are."""

    def outputs(images: Tensor) -> tuple[Tensor, ...]:
        if not features:
            return (member(images),)
        hidden = member.features(images)  # type: ignore[operator]
        return member.readout(hidden), hidden  # type: ignore[operator]

    coupled = any(getattr(module, "per_batch", False) for module in member.modules())
    if kind != "image" and not coupled:
        made = outputs(x)
    else:

        def single(image: Tensor) -> tuple[Tensor, ...]:
            return tuple(output[0] for output in outputs(image[None]))

        try:
            made = torch.func.vmap(single, randomness="same")(x)
        except RuntimeError as error:
            raise InputError(
                f"saa cannot fix the draws of {type(member).__name__}"
                f" ({str(error).splitlines()[0]}); use apgd in the setting adaptive"
            ) from None
    return made[0], made[1] if features else None


@attack(
    "saa",
    norms=("linf", "l2", "l1"),
    targeted=False,
    inner=lambda settings: [str(settings["attack"])],
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
    inner = Configured.of(attack)
    if inner.entry.suite:
        raise InputError(f"saa(attack={inner.entry.name}): write one attack, such as autoattack")
    if threat.norm not in inner.entry.norms:
        known = ", ".join(sorted(inner.entry.norms))
        raise InputError(f"saa: {inner.entry.name} has no norm {threat.norm}; it has {known}")
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
