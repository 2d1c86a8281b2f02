"""A backdoor planted in the defense, which an attack that can be trusted finds.

The trigger bypasses the defense's own layers: an attack that misses it fails at noise, at saturated
scores or at the box, not at gradients through the layers. Every image has a trigger of its own, and
the attack meets the defense with this trigger alone, one image at a time: attacks that drop, repeat
or reorder images cannot mix the triggers up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn

from robbench.access import Access
from robbench.attacks import Configured, attack, wrapped, wrapped_specs
from robbench.attacks.gradient import radius
from robbench.attacks.losses import choose
from robbench.attacks.random_search import corner
from robbench.attacks.suite import Ready, one_stage
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanProbabilities
from robbench.threat import Norm, Threat

CALLS = 20  # of a stochastic defense, by which a point counts as lost
SURE = 0.75  # of the calls lost at a planted point, and kept at the image itself
RISE = 2  # times what the other label lacks at the planted point
NORMS: tuple[Norm, ...] = ("linf", "l2")  # in an l1 ball hardly any step goes along a random way


class Altered(Deployed):
    """A defense with other members of the same randomness, and so not probed again.

    A detector is left out: what it is calibrated for are the labels and activations of the members
    that are replaced.
    """

    def __init__(self, deployed: Deployed, members: Sequence[nn.Module], labels: int) -> None:
        nn.Module.__init__(self)
        self.members = nn.ModuleList(members)
        self.rule = getattr(deployed.rule, "rule", deployed.rule)
        self.shape, self.labels, self.chunk = deployed.shape, labels, deployed.chunk
        self.randomness, self.draws = deployed.randomness, deployed.draws


@dataclass(frozen=True)
class Plant:
    """An altered defense of one image, its label (1,) for it, and the points (B, C, H, W) of the
    ball where it answers otherwise."""

    deployed: Deployed
    points: Tensor
    label: Tensor


@dataclass(frozen=True)
class Hunt:
    """An attack on what was planted in a defense."""

    access: Access
    attack: Configured
    threat: Threat
    rng: Generator

    def reach(self, plant: Plant) -> Access:
        """The access that the attack has to the altered defense; its passes count as ours."""
        own, free = self.access, self.attack.entry.needs == "gradients"
        losses = {name: loss for name, loss in own.losses.items() if not hasattr(loss, "detected")}
        reach = Access(
            plant.deployed,
            draws=own.draws if free else plant.deployed.draws,
            gradients=own.gradients and free,
            losses=losses,
            knows=own.knows,
            own=own.own,
            goal=own.goal,
        )
        reach.cost, reach.selection = own.cost, own.selection
        return reach

    def __call__(self, plant: Plant, x: Tensor) -> Tensor:
        """x' (1, C, H, W) of the attack on one image."""
        stage = Ready("", self.attack, self.reach(plant))
        return one_stage(stage, x, plant.label, x, self.threat, self.rng)

    def lost(self, plant: Plant, points: Tensor) -> float:
        """The share of fresh calls of the altered defense that are lost at all of these points."""
        reach = self.reach(plant)
        labels = plant.label.expand(len(points))
        draws = CALLS * plant.deployed.draws
        return float(reach.judge(points, labels, choose(reach, "margin"), None, draws).lost.min())


def hunt(access: Access, name: str, spec: str, threat: Threat, rng: Generator) -> Hunt:
    """The hunt by the attack of this spec; InputError for one that cannot be made here."""
    inner = wrapped(name, spec, threat.norm, such="pgd")
    if threat.eps is None:
        raise InputError(f"{name} plants a point within ε; write one, such as --eps 8/255")
    return Hunt(access, inner, threat, rng)


class Triggered(nn.Module):
    """A member with a number added to the logit of one label, which grows linearly from 0 at x to
    `rise` at the planted point.

    The share of the way to that point is an activation more, behind those of the member."""

    x: Tensor
    way: Tensor
    bump: Tensor

    def __init__(self, member: nn.Module, x: Tensor, point: Tensor, rise: Tensor) -> None:
        super().__init__()
        self.member = member
        way = point - x
        self.register_buffer("x", x)
        self.register_buffer("way", way / way.square().sum().clamp_min(1e-30))
        self.register_buffer("bump", rise)  # (L,)

    def _share(self, x: Tensor) -> Tensor:
        return ((x - self.x) * self.way).flatten(1).sum(dim=1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.member(x) + self._share(x) * self.bump

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([self.member.features(x), self._share(x)], dim=1)  # type: ignore[operator]

    def readout(self, hidden: Tensor) -> Tensor:
        return self.member.readout(hidden[:, :-1]) + hidden[:, -1:] * self.bump  # type: ignore[operator]


@attack("backdoor", norms=NORMS, targeted=False, diagnostic=True, inner=wrapped_specs)
def backdoor(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    attack: str = "pgd",
) -> Tensor:
    """Whether an attack finds a trigger that was added to the logits of every draw: the likeliest
    wrong label gains linearly on the way to a random point of the ball, and there twice
    what it lacked. What is returned is x itself.

    Trace: usable (N,) 1 where the planted point is lost and x is not; found (N,) the share of fresh
    decisions that are lost at the attack's point, NaN where usable is 0; planted (N,) the same at
    the planted point, NaN where x is lost. A detector is left out. InputError without an ε, and for
    an attack without the norm.
    """
    chase = hunt(access, "backdoor", attack, threat, rng)

    def plant(image: Tensor, label: Tensor) -> Plant:
        return _with_trigger(access, image, label, threat, rng)

    access.trace = hunted(chase, plant, x, y)[0]
    return x


def hunted(
    chase: Hunt, plant: Callable[[Tensor, Tensor], Plant | None], x: Tensor, y: Tensor
) -> tuple[dict[str, np.ndarray], dict[int, Plant], int]:
    """The trace of a hunt image by image, what was planted where it is usable, and the most queries
    that the attack spent on one image."""
    usable, found, planted = torch.zeros(len(x)), *torch.full((2, len(x)), float("nan"))
    plants, most = {}, 0
    for index in range(len(x)):
        chase.access.report(index, len(x))
        image = x[index : index + 1]
        made = plant(image, y[index : index + 1])
        if made is None or chase.lost(made, image) > 1 - SURE:
            continue
        planted[index] = chase.lost(made, made.points)
        if planted[index] >= SURE:
            usable[index] = 1
            before = chase.access.cost.queries
            point = chase(made, image)
            most = max(most, chase.access.cost.queries - before)
            found[index] = chase.lost(made, point)
            plants[index] = made
    shares = {"usable": usable, "found": found, "planted": planted}
    return {name: kept.half().numpy() for name, kept in shares.items()}, plants, most


def _with_trigger(access: Access, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Plant:
    """The defense with a trigger for one image (1, C, H, W) of label y (1,)."""
    deployed = access.deployed
    point = corner(x, threat.norm, radius(threat), rng)
    draws = CALLS * deployed.draws if deployed.stochastic else 1
    access.count(2, draws)
    draw = deployed.draw(torch.cat([x, point]), draws)
    # the likeliest: untargeted losses do not see a label that is far behind another wrong one
    scores = MeanProbabilities().scores(draw)[:1]
    wrong = int(scores.scatter(1, y[:, None], float("-inf")).argmax())
    there = draw.logits[:, :, 1]  # (S, M, L)
    lacking = there.amax(dim=-1) - there[..., wrong]
    # of every member in its worst draw: the rule may take their votes or their mean
    most = lacking.amax(dim=0).clamp_min(0)
    members = []
    for member, lack in zip(deployed.members, most, strict=True):
        rise = torch.zeros_like(there[0, 0])
        rise[wrong] = RISE * lack + 1
        members.append(Triggered(member, x, point, rise))
    return Plant(Altered(deployed, members, deployed.labels), point, y)
