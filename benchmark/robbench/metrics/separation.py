"""How far apart and how dense classes lie in feature space.

Symbols: N images, L labels, D features. Distances are Mahalanobis distances: lengths after the
shared covariance of the classes has become the identity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robbench.errors import InputError


class Gaussians(NamedTuple):
    """One Gaussian per class, with one covariance for all."""

    means: Tensor  # (L, D)
    covariance: Tensor  # (D, D)


def class_gaussians(features: Tensor, y: Tensor) -> Gaussians:
    """Maximum likelihood fit of a mixture with a shared covariance, as linear discriminant
    analysis makes it. features (N, D), y (N,) with every label from 0 to the largest."""
    count = y.bincount()
    if not bool((count > 0).all()):
        raise InputError(f"no image has the label {int(count.argmin())}; give some of every label")
    features = features.double()
    sums = features.new_zeros(len(count), features.shape[1]).index_add(0, y, features)
    means = sums / count[:, None]
    deviations = features - means[y]
    return Gaussians(means, deviations.T @ deviations / len(y))


def mahalanobis(means: Tensor, covariance: Tensor | None = None) -> Tensor:
    """(L, L) distances between class means (L, D); covariance (D, D), the identity by default.

    Directions without variance are left out: those are units that are always off.
    """
    if covariance is not None:
        values, vectors = torch.linalg.eigh(covariance)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        means = means @ (vectors[:, kept] / values[kept].sqrt())
    return torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")


def expected_distance(delta: Tensor) -> Tensor:
    """E(d_ij): mean distance of a point of class i to the boundary with class j.

    Pang et al. 2018 (MMLDA), arXiv:1802.09308, theorem 1, for two Gaussians with a shared
    covariance at the Mahalanobis distance `delta` >= 0, any shape, and the linear boundary halfway.
    Points already beyond the boundary count with their distance too, so it is never below delta/2.
    """
    half = delta / 2
    spread = math.sqrt(2 / math.pi) * (-half.square() / 2).exp()
    return spread + half * torch.erf(half / math.sqrt(2))  # erf(x/√2) = 1 - 2 Φ(-x)


def measured_distance(distances: Tensor, y: Tensor, reached: Tensor, labels: int) -> Tensor:
    """(L, L) mean distance from images of label i to adversarial examples of label j.

    What expected_distance predicts, measured by a minimum-norm attack; nan for pairs that no
    attack reached. distances (N,), y (N,), reached (N,): the labels that the attack arrived at.
    """
    pair = y * labels + reached
    total = distances.new_zeros(labels**2).index_add(0, pair, distances)
    return (total / pair.bincount(minlength=labels**2)).reshape(labels, labels)


def robustness(distances: Tensor) -> float:
    """RB, the least of the distances (L, L) between different labels, nan left out.

    Pang et al. 2018 (MMLDA): RB when given expected_distance. Given mahalanobis it is twice the
    paper's approximation of RB, and at most r sqrt(2 L / (L - 1)) for centres of length r.
    """
    pairs = ~torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    known = pairs & ~distances.isnan()
    if not bool(known.any()):
        raise InputError("no distance between two different labels is known; RB needs one")
    return float(distances[known].min())


def log_sample_density(distances: Tensor, radii: Tensor, dimension: int) -> Tensor:
    """(B,) log of the number of features per unit of volume in each shell around one point.

    Pang et al. 2020 (MMC), arXiv:1905.10626, eq. 2; -inf for an empty shell. Around a feature,
    radii (0, r) make its neighbourhood a ball; around a class centre the shells are the
    neighbourhoods that the MMC loss has, of the losses r²/2. distances (N,) from that point;
    radii (B + 1,), ascending, >= 0; dimension D.
    """
    radii = radii.double()
    inner, outer = radii[:-1], radii[1:]
    if len(radii) < 2 or bool((inner < 0).any()) or bool((outer <= inner).any()):
        raise InputError(f"radii are {radii.tolist()}; write two or more, ascending from >= 0")
    count = ((distances[:, None] >= inner) & (distances[:, None] < outer)).sum(dim=0)
    unit_ball = dimension / 2 * math.log(math.pi) - math.lgamma(dimension / 2 + 1)
    # both ends in logarithms: radii to the power of D leave the range of floats
    hollow = torch.log(-torch.expm1(dimension * (inner.log() - outer.log())))
    return count.log() - (unit_ball + dimension * outer.log() + hollow)
