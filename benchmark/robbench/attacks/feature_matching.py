"""Feature matching: an image that looks like a clean one of another label to all that sees it.

Symbols: S draws, M members, N images, G guides, L labels, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from robbench.access import Access
from robbench.attacks import attack, choose_targets, picked
from robbench.attacks.evasion import NORMS, WON, Look, Push, pursue
from robbench.attacks.gradient import Steps
from robbench.attacks.losses import Towards, margin
from robbench.errors import InputError
from robbench.rules import Draw, Loss, Rule
from robbench.threat import Eps, Threat


@dataclass(frozen=True)
class Matching:
    """Minus the squared distance of the hidden activations to the nearest guide of another label,
    or of the target; mean over draws and members, each in units of its mean square distance
    between clean images. An image without such a guide has its margin instead."""

    rule: Rule
    guides: Tensor  # (M, G, D)
    labels: Tensor  # (G,), -1 for an image that is none
    features: bool = True  # False: the logits stand in for the activations

    def distances(self, draw: Draw) -> Tensor:
        """(N, G)."""
        hidden = draw.features if self.features else draw.logits  # (S, M, N, D)
        assert hidden is not None
        s, m, n, _ = hidden.shape
        each = hidden.transpose(0, 1).flatten(1, 2)
        apart = torch.cdist(each, self.guides, compute_mode="donot_use_mm_for_euclid_dist")
        unit = 2 * self.guides.var(dim=1, correction=0).sum(dim=-1).clamp_min(1e-12)
        return (apart.square() / unit[:, None, None]).view(m, s, n, -1).mean(dim=(0, 1))

    def allowed(self, y: Tensor, target: Tensor | None) -> Tensor:
        """(N, G) bool: which guides an image may be led to."""
        if target is not None:
            return self.labels == target[:, None]
        return (self.labels != y[:, None]) & (self.labels >= 0)

    def __call__(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        allowed = self.allowed(y, target)
        alone = ~allowed.any(dim=1)
        nearest = self.distances(draw).masked_fill(~allowed, math.inf).amin(dim=1)
        instead = margin(self.rule.scores(draw), y, target)
        return torch.where(alone, instead, -nearest.masked_fill(alone, 0))


@attack("feature-matching", norms=NORMS)
def feature_matching(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    steps: Steps = 100,
    step: Eps | None = None,
    guides: Steps = 3,
) -> Tensor:
    """Towards the last hidden activations of clean images of other labels.

    Sabour et al. 2016, arXiv:1511.05122; against detectors Tramer et al. 2020, arXiv:2002.08347:
    what is like such an image inside is answered like it, by detectors and votes too. Guides are
    images of the same batch (in a suite: also those already broken) that the defense answers
    rightly, the nearest of each of the `guides` nearest labels, chosen anew at every step; of the
    target only, where there is one. Networks without activations are matched in their logits. An
    image without a guide is attacked by its margin. step, starts: as in opgd. The papers match one
    fixed guide. Trace: guided (N,) whether there was a guide.
    """
    goal = choose_targets(access, x, y, threat, rng)
    matching, near = _guides(access, x, y)
    access.notes["matched"] = "features" if matching.features else "logits"
    guided = matching.allowed(y, goal).any(dim=1)
    aims: list[Tensor | None] = [goal]
    if goal is None:
        aims += near.argsort(dim=1)[:, 1 : min(guides, near.shape[1] - 1)].unbind(1)
    objective: Loss = matching if goal is not None else Towards(matching)

    def towards(aim: Tensor | None) -> Push:
        def push(here: Tensor, ids: Tensor) -> Look:
            value, gradient, lost = access.gradient(here, y[ids], objective, picked(aim, ids))
            return Look(gradient, WON * (lost > 0.5), value)

        return push

    rounds = [towards(aim) for aim in aims]
    found = pursue(access, x, y, goal, threat, rng, rounds, steps, step)
    access.trace["guided"] = guided.cpu().numpy()
    return found


def _guides(access: Access, x: Tensor, y: Tensor) -> tuple[Matching, Tensor]:
    """The loss that leads to the clean images, and (N, L) how near each label's nearest is: those
    without any come late, the image's own label last."""
    deployed = access.deployed
    features = _has_activations(access, x)
    known, theirs = access.guides or (x, y)
    access.count(len(known), access.draws)
    seen = draw = deployed.draw(known, access.draws, features)
    answers = torch.stack([deployed.rule.decide(call) for call in access.calls(seen)])
    labels = theirs.masked_fill((answers == theirs).float().mean(dim=0) <= 0.5, -1)
    hidden = seen.features if features else seen.logits
    assert hidden is not None
    matching = Matching(deployed.rule, hidden.mean(dim=0), labels, features)
    if access.guides:
        access.count(len(x), access.draws)
        draw = deployed.draw(x, access.draws, features)
    far = matching.distances(draw).masked_fill(~matching.allowed(y, None), math.inf)
    near = torch.full((len(x), deployed.labels), torch.finfo(far.dtype).max, device=x.device)
    near = near.scatter_reduce(1, labels.clamp_min(0).expand_as(far), far, "amin")
    return matching, near.scatter(1, y[:, None], math.inf)


def _has_activations(access: Access, x: Tensor) -> bool:
    """Whether all members have hidden activations, of one width."""
    try:
        access.deployed.draw(x[:1], 1, features=True)
    except (AttributeError, InputError, RuntimeError):
        return False
    access.count(1, 1)
    return True
