"""Attack losses: larger is worse for the defense; targeted variants grow towards the target.

Score losses take (N, L) scores; draw losses take a whole Draw. y and target are (N,) int64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robbench.access import Access
from robbench.errors import InputError, unknown
from robbench.rules import Draw, Loss, MeanProbabilities, Rule

ScoreLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def ce(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy, Goodfellow et al. 2015; targeted: minus that of the target."""
    if target is None:
        return F.cross_entropy(scores, y, reduction="none")
    return -F.cross_entropy(scores, target, reduction="none")


def tempered(by: float) -> ScoreLoss:
    """Cross-entropy of the scores divided by a temperature, for scores so far apart that a softmax
    of them has no gradient left (Carlini & Wagner 2016, arXiv:1607.04311)."""

    def of_cooler(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
        return ce(scores / by, y, target)

    return of_cooler


def margin(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Best other score minus the label's, Carlini & Wagner 2017, f6 without the clip."""
    if target is None:
        return _best_other(scores, y) - _pick(scores, y)
    return _pick(scores, target) - _best_other(scores, target)


def dlr(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Difference of logits ratio, Croce & Hein 2020, eq. 6 (targeted: eq. 7); scale-free.

    Needs three labels, four when targeted; with fewer the missing ranks are the lowest one.
    """
    ranked = scores.sort(dim=-1, descending=True).values
    third = ranked[..., min(2, ranked.shape[-1] - 1)]
    if target is None:
        return margin(scores, y) / (ranked[..., 0] - third).clamp_min(1e-12)
    fourth = ranked[..., min(3, ranked.shape[-1] - 1)]
    scale = (ranked[..., 0] - (third + fourth) / 2).clamp_min(1e-12)
    return (_pick(scores, target) - _pick(scores, y)) / scale


def log_odds(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """log((1 - p) / p) of the label's probability p, targeted log(p / (1 - p)) of the target's: the
    direction of cross-entropy without its factor 1 - p, which fades where a network is sure."""
    label, sign = (y, 1) if target is None else (target, -1)
    others = scores.scatter(-1, label[..., None], float("-inf")).logsumexp(dim=-1)
    return sign * (others - _pick(scores, label))


@dataclass(frozen=True)
class Votes:
    """The mean over draws and members of the margin clipped at kappa: a draw that is already
    lost stops to count, so the attack gains more votes instead of a larger mean.

    per_draw: the loss is a mean over draws, so its gradient can be summed pass by pass.
    """

    kappa: float = 1.0
    per_draw: ClassVar[bool] = True

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        shape = draw.logits.shape[:-1]  # (S, M, N)
        aim = None if target is None else target.expand(shape)
        return margin(draw.logits, y.expand(shape), aim).clamp_max(self.kappa).mean(dim=(0, 1))


@dataclass(frozen=True)
class Spread:
    """Minus the logarithm of the largest smoothed vote share, the mean softmax over draws and
    members, in nats from 0 to log L: what leaves a vote without a majority. Targeted: the
    logarithm of the target's share."""

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        shares = MeanProbabilities().scores(draw).log_softmax(dim=-1)
        return -shares.amax(dim=-1) if target is None else _pick(shares, target)


@dataclass(frozen=True)
class Scored:
    """A loss on the scores of a rule, whatever rule the attacked defense has."""

    rule: Rule
    of: ScoreLoss = margin

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        return self.of(self.rule.scores(draw), y, target)


@dataclass(frozen=True)
class Towards:
    """A loss whose target only steers: any error is a success, not just the target."""

    loss: Loss
    any_error: ClassVar[bool] = True

    @property
    def per_draw(self) -> bool:
        return getattr(self.loss, "per_draw", False)

    @property
    def features(self) -> bool:
        return getattr(self.loss, "features", False)

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        return self.loss(draw, y, target)


SCORE_LOSSES: dict[str, ScoreLoss] = {"ce": ce, "margin": margin, "dlr": dlr}
TEMPERED: dict[str, ScoreLoss] = {f"ce-t{by}": tempered(by) for by in (10, 100)}
DRAW_LOSSES: dict[str, Loss] = {"vote": Votes()}


def choose(access: Access, name: str) -> Loss:
    """The loss of this name; 'auto' is the defense's first own in the setting adaptive, else CE.

    A name of the defense's own losses is that, before one of ours."""
    if name == "auto":
        own = next(iter(access.losses.values()), None) if access.knows else None
        return own or access.score_loss(ce)
    if name in access.losses:
        return access.losses[name]
    if name == "dlr" and access.deployed.labels < 3:
        raise InputError("the loss dlr is a constant with 2 labels; write loss=ce or loss=margin")
    known = SCORE_LOSSES | TEMPERED
    if name in known:
        return access.score_loss(known[name])
    if name in DRAW_LOSSES:
        return DRAW_LOSSES[name]
    raise unknown("loss", name, ["auto", *access.losses, *known, *DRAW_LOSSES])


def _pick(scores: Tensor, label: Tensor) -> Tensor:
    return scores.gather(-1, label[..., None])[..., 0]


def _best_other(scores: Tensor, label: Tensor) -> Tensor:
    return scores.scatter(-1, label[..., None], float("-inf")).amax(dim=-1)
