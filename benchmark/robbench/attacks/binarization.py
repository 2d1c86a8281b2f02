"""The binarization test: an attack must find the one point of the ball that is told apart.

Zimmermann et al. 2022, Increasing Confidence in Adversarial Robustness Evaluations, NeurIPS: per
image, the last layer becomes a linear read-out with two answers, one for points inside the ball and
one for points of its surface. Differences to the authors' code: the read-out is Fisher's
discriminant in closed form, not a logistic regression without a penalty, of whose answers chance
finds more; every member of an ensemble has its own, since each has activations of its own; and a
stochastic defense is read in the mean over its draws.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from robbench.access import Access
from robbench.attacks import attack, wrapped_specs
from robbench.attacks.backdoor import CALLS, NORMS, Altered, Hunt, Plant, hunt, hunted
from robbench.attacks.gradient import radius
from robbench.attacks.losses import choose
from robbench.attacks.random_search import corner, draws_per_try, search
from robbench.deployed import gives_activations
from robbench.errors import InputError
from robbench.threat import Threat, random_start

INNER = 0.95  # of ε: the radius that the inner points fill
RIDGE = 0.3  # of the mean variance of an activation, added to that of each
# of the way from the nearest inner point to the planted ones, where the answer turns: near these,
# where few random points are on the far side, but not within the noise of a stochastic defense
CLOSE, HALFWAY = 0.75, 0.5
NEAREST = 32  # inner points whose mean over a stochastic defense's draws is worth knowing
Points = Annotated[int, Field(ge=1)]


class Binarized(nn.Module):
    """A member that answers with one of two labels: its activations, and a linear read-out whose
    two logits differ in sign alone; the second is positive for what was planted."""

    weight: Tensor
    bias: Tensor

    def __init__(self, member: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.member = member
        self.register_buffer("weight", weight)  # (D,)
        self.register_buffer("bias", bias)

    def features(self, x: Tensor) -> Tensor:
        return self.member.features(x)  # type: ignore[operator]

    def readout(self, hidden: Tensor) -> Tensor:
        half = (hidden @ self.weight + self.bias) / 2
        return torch.stack([-half, half], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.features(x))


@attack("binarization", norms=NORMS, targeted=False, diagnostic=True, inner=wrapped_specs)
def binarization(
    access: Access,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: Generator,
    *,
    attack: str = "pgd",
    inner: Annotated[int, Field(ge=2)] = 999,
    boundary: Points = 1,
) -> Tensor:
    """Whether an attack finds the one point that a read-out of last hidden activations tells from
    `inner` others of the ball. Random search is the baseline, with as many queries as the attack
    took on any image. What is returned is x itself.

    boundary: points of the surface that are planted, corners of the ball under linf.
    Trace: usable (N,) 1 where they are told apart; found (N,) the share of fresh decisions that are
    the planted answer at the attack's point and random_found (N,) at that of random search, NaN
    where usable is 0; planted (N,) at the planted points, NaN where no plane tells them apart. A
    detector is left out. InputError without an ε, for an attack without the norm, and for members
    without activations.
    """
    chase = hunt(access, "binarization", attack, threat, rng)
    _check_activations(access, x[:1])

    def plant(image: Tensor, label: Tensor) -> Plant | None:
        return _read_out(access, image, threat, rng, inner, boundary)

    trace, plants, most = hunted(chase, plant, x, y)
    random = torch.full((len(x),), float("nan"))
    for index, made in plants.items():
        random[index] = _at_random(chase, made, x[index : index + 1], most)
    access.trace = trace | {"random_found": random.half().numpy()}
    return x


def _read_out(
    access: Access, x: Tensor, threat: Threat, rng: Generator, inner: int, boundary: int
) -> Plant | None:
    """The defense with a read-out of this image (1, C, H, W); None where the points of some member
    cannot be told apart."""
    eps, deployed = radius(threat), access.deployed
    about = x.expand(inner - 1, -1, -1, -1)
    near = torch.cat([x, random_start(about, threat.norm, INNER * eps, rng)])
    far = corner(x.expand(boundary, -1, -1, -1), threat.norm, eps, rng)
    inside, outside = _activations(access, near, 1), _activations(access, far, CALLS)
    pairs = zip(inside.unbind(1), outside.unbind(1), strict=True)
    weights = torch.stack([discriminant(*pair) for pair in pairs])  # (M, D)
    heights = _heights(inside, weights)
    if deployed.stochastic:  # one call tells little of the points that come near
        some = heights.topk(min(inner, NEAREST // len(weights) + 1)).indices.unique()
        heights = _heights(_activations(access, near[some.to(x.device)], CALLS), weights)
    low, high = heights.amax(dim=1), _heights(outside, weights).amin(dim=1)
    if not bool((high > low).all()):
        return None
    share = HALFWAY if deployed.stochastic else CLOSE
    biases = -(low + share * (high - low)) / (high - low)
    weights = weights / (high - low)[:, None]
    members = [
        Binarized(member, weight, bias)
        for member, weight, bias in zip(deployed.members, weights.to(x), biases.to(x), strict=True)
    ]
    return Plant(Altered(deployed, members, 2), far, torch.zeros_like(x[:, 0, 0, 0]).long())


def _heights(hidden: Tensor, weights: Tensor) -> Tensor:
    """(M, N) how far points lie along each member's direction, in the mean over draws."""
    return torch.einsum("smnd,md->mn", hidden, weights) / len(hidden)


def discriminant(inside: Tensor, outside: Tensor) -> Tensor:
    """(D,) Fisher's direction from activations (S, A, D) to (S', B, D), the covariance that of
    single draws, the noise of a draw included, and shrunk towards a multiple of the identity.

    Along it the planted points are as many standard deviations from the inner ones as a plane can
    put them, which is what a random point would have to come up with. Not shrunk, it would look
    for them in activations that are hardly ever on, where there is no gradient to follow.
    """
    single = [part.flatten(0, 1) for part in (inside, outside)]
    apart = single[1].mean(dim=0) - single[0].mean(dim=0)
    spread = [torch.cov(part.T) for part in single if len(part) > 1]
    covariance = torch.stack(spread).sum(dim=0).view(len(apart), -1)  # of one activation a number
    ridge = (RIDGE * covariance.diagonal().mean()).clamp_min(1e-12)
    return torch.linalg.solve(covariance + ridge * torch.eye(len(apart)).to(covariance), apart)


@torch.no_grad()
def _activations(access: Access, x: Tensor, calls: int) -> Tensor:
    """(S, M, N, D) float64 on the CPU, of so many calls of a stochastic defense."""
    deployed = access.deployed
    draws = calls * deployed.draws if deployed.stochastic else 1
    access.count(len(x), draws)
    hidden = deployed.draw(x, draws, features=True).features
    assert hidden is not None
    return hidden.cpu().double()


@torch.no_grad()
def _check_activations(access: Access, x: Tensor) -> None:
    """InputError for members without last hidden activations, or with ones of several widths."""
    widths = set()
    access.count(len(x), 1)
    for member in access.deployed.members:
        if not gives_activations(member):
            raise InputError(
                f"binarization reads the last hidden activations, and {type(member).__name__} gives"
                " none; give it features(x) and readout(hidden), or write the attack backdoor"
            )
        widths.add(member.features(x).shape[1])  # type: ignore[operator]
    if len(widths) > 1:
        raise InputError(
            "binarization reads the last hidden activations, of which members have"
            f" {' and '.join(map(str, sorted(widths)))}; write the attack backdoor"
        )


def _at_random(chase: Hunt, plant: Plant, x: Tensor, queries: int) -> float:
    """What random search with so many queries finds."""
    reach = chase.reach(plant)
    tries, loss = max(1, queries // draws_per_try(reach)), choose(reach, "margin")
    found = search(reach, x, plant.label, None, chase.threat, chase.rng, tries, loss)
    return chase.lost(plant, found)
