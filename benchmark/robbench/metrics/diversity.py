"""How differently the members of an ensemble answer, look and can be attacked.

Symbols: K members, N images, L labels, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.errors import InputError

RIDGE = 1e-6  # what the authors of ADP add to the Gram matrix before its logarithm


def ensemble_diversity(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) in [0, 1]: squared volume that the members' predictions of wrong labels span.

    Pang et al. 2019 (ADP), arXiv:1901.08846: the determinant of the Gram matrix of
    the predictions without the true label, each of length 1. 1: no wrong label is shared;
    0: two members agree on the ratios of all wrong labels, or K >= L. logits (K, N, L), y (N,).
    """
    return torch.linalg.det(_gram(logits, y)).clamp(0, 1).to(logits.dtype)


def log_diversity(logits: Tensor, y: Tensor, ridge: float = RIDGE) -> Tensor:
    """(N,) log ED, differentiable, and finite also where members agree: the term of ADP's loss.

    `ridge` is added to the diagonal of the Gram matrix, so values lie in
    [log(K + ridge) + (K - 1) log ridge, K log(1 + ridge)]. logits (K, N, L), y (N,).
    """
    if not ridge > 0:
        raise InputError(f"ridge is {ridge}; duplicates need a positive one, such as {RIDGE}")
    gram = _gram(logits, y)
    return torch.logdet(gram + ridge * torch.eye(len(logits)).to(gram)).to(logits.dtype)


def _gram(logits: Tensor, y: Tensor) -> Tensor:
    """(N, K, K) float64, because a ridge of 1e-6 is lost in the rounding of float32."""
    if logits.ndim != 3 or y.shape != logits.shape[1:2]:
        raise InputError(
            f"logits are {tuple(logits.shape)} and y is {tuple(y.shape)}; diversity takes the"
            " logits of all members (K, N, L) and one label per image (N,)"
        )
    true = F.one_hot(y, logits.shape[-1]).bool()
    others = logits.double().masked_fill(true, -math.inf)
    # lengths of predictions as a logsumexp: no wrong label is too improbable to have a direction
    unit = (others - (2 * others).logsumexp(dim=-1, keepdim=True) / 2).exp()
    return torch.einsum("knl,jnl->nkj", unit, unit)


def entropy_measure(correct: Tensor) -> float:
    """Disagreement on what is right, in [0, 1]; 1: half of the members (rounded down) always err.

    Huang et al. 2021 (PDD), eq. 5, after Kuncheva & Whitaker 2003. correct (K, N), bool.
    """
    members = len(correct)
    if members < 2:
        raise InputError("one member cannot disagree; the entropy measure needs two or more")
    right = correct.bool().sum(dim=0)
    least = torch.minimum(right, members - right)
    return float(least.double().mean() / (members - math.ceil(members / 2)))


def discrimination(features: Tensor) -> Tensor:
    """(N,) >= 0: between-member over within-member scatter of activations, summed over pairs.

    Huang et al. 2021 (PDD), eq. 6, a Fisher score; variances are those of the population. Only
    active units (> 0) count; nan where a member has none, or where two constant members agree.
    features (K, N, D) after the last ReLU.
    """
    active = features.double() > 0
    count = active.sum(dim=-1)
    mean = features.double().where(active, 0).sum(dim=-1) / count
    deviations = (features - mean[..., None]).where(active, 0)
    variance = deviations.square().sum(dim=-1) / count
    i, j = _pairs(len(features))
    return ((mean[i] - mean[j]).square() / (variance[i] + variance[j])).sum(dim=0)


def gradient_cosines(gradients: Tensor) -> Tensor:
    """(K (K - 1) / 2, N) in [-1, 1]: cosines between members' input gradients, differentiable.

    The terms of DEG's penalty, Huang et al. 2021, eq. 3; 0 where one of the two vanishes.
    gradients (K, N, ...), each with respect to the same images.
    """
    flat = gradients.flatten(2)
    # saturated members have gradients whose squares underflow; a cosine has no scale
    largest = flat.detach().abs().amax(dim=-1, keepdim=True)
    vanished = largest == 0
    scaled = torch.where(vanished, 1, flat / torch.where(vanished, 1, largest))
    unit = F.normalize(scaled, dim=-1).masked_fill(vanished, 0)
    i, j = _pairs(len(unit))
    return (unit[i] * unit[j]).sum(dim=-1)


def gradient_angles(gradients: Tensor) -> Tensor:
    """(K (K - 1) / 2, N) degrees in [0, 180] between members' input gradients.

    Huang et al. 2021, figure 3; 90 where one of the two vanishes. gradients (K, N, ...).
    """
    return gradient_cosines(gradients.double()).clamp(-1, 1).acos().rad2deg()


def _pairs(members: int) -> tuple[Tensor, Tensor]:
    if members < 2:
        raise InputError("one member makes no pair; pairs need two members or more")
    i, j = torch.triu_indices(members, members, offset=1)
    return i, j


def cumulative_variance(deviations: Iterable[Tensor]) -> float:
    """>= 0: the sum of the variances of all stochastic weights.

    Liu & Sha (SDR as a defense), section 6.3, figure 9. deviations: one tensor
    of standard deviations per weight tensor; their sign is ignored, as in the authors' networks.
    """
    return float(sum(deviation.double().square().sum() for deviation in deviations))


def transfer_matrix(
    examples: Sequence[Tensor], members: Callable[[Tensor], Tensor], y: Tensor
) -> Tensor:
    """(K, K) in [0, 1]: share of images on which the attack on member i (row) fools member j.

    Pang et al. 2019 (ADP), arXiv:1901.08846. Fooled means other than the true label, and all
    images count, also those that a member gets wrong without an attack. examples: one (N, ...)
    tensor per member; members: images (N, ...) -> logits (K, N, L); y (N,).
    """
    with torch.no_grad():
        rows = [(members(x).argmax(dim=-1) != y).double().mean(dim=-1) for x in examples]
    matrix = torch.stack(rows)
    if len(matrix) != matrix.shape[1]:
        raise InputError(
            f"{len(matrix)} sets of examples for {matrix.shape[1]} members; give one per member"
        )
    return matrix
