"""Scores that tell normal from adversarial inputs, and how well one of them does it.

Every score is larger for what looks normal, and differentiable in logits or features, so that an
attack can go for the detector too. A detector flags what scores below its threshold; nan lies
below nothing and is never flagged. Symbols: N images, R references, L labels, D features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from robbench.errors import InputError


def confidence(logits: Tensor) -> Tensor:
    """(N,) in (1/L, 1]: the largest softmax probability. logits (N, L)."""
    return log_odds(logits).sigmoid()


def log_odds(logits: Tensor) -> Tensor:
    """(N,) log of the odds of the predicted label: the order of the confidence, never saturated.

    A float32 confidence is exactly 1 from log-odds of about 17 on: ties for the detector, zero
    gradient for the attack. logits (N, L).
    """
    first, others = _ranked(logits)
    return first - others.logsumexp(dim=-1)


def non_me(logits: Tensor) -> Tensor:
    """(N,) nats in [0, log(L - 1)]: entropy of the softmax over all labels but the predicted one.

    Non-maximal entropy, Pang et al. 2018 (RCE), arXiv:1706.00633. Of a network that RCE trained,
    pass the reversed logits. logits (N, L).
    """
    _, others = _ranked(logits)
    log = others.log_softmax(dim=-1)
    return -(log.exp() * log).sum(dim=-1)


def _ranked(logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[-1] < 2:
        raise InputError("with one label nothing can be detected; give logits of two or more")
    ranked = logits.sort(dim=-1, descending=True).values
    return ranked[..., 0], ranked[..., 1:]


def k_density(
    features: Tensor, predicted: Tensor, references: Tensor, labels: Tensor, variance: float
) -> Tensor:
    """(N,) <= 0: log kernel density among the references of the predicted label.

    Feinman et al. 2017, arXiv:1703.00410, as Pang et al. 2018 (RCE) use it: the logarithm of the
    mean of exp(-|f - r|^2 / variance), which unlike the mean itself cannot underflow. references:
    features of training images with their true labels.
    features (N, D), predicted (N,), references (R, D), labels (R,).
    """
    if not variance > 0:
        raise InputError(f"variance is {variance}; a kernel needs a positive one, such as 1/0.26")
    same = predicted[:, None] == labels
    count = same.sum(dim=1)
    if not bool((count > 0).all()):
        absent = sorted(set(predicted[count == 0].tolist()))
        raise InputError(f"no reference has the label {absent[0]}; give some of every label")
    exponents = -_distances(features, references).square() / variance
    exponents = exponents.masked_fill(~same, -math.inf)
    # far from all references the exponents differ by less than the rounding of their logsumexp
    nearest = exponents.detach().amax(dim=1)
    return nearest + (exponents - nearest[:, None]).logsumexp(dim=1) - count.to(nearest).log()


def lid(features: Tensor, references: Tensor, k: int = 20) -> Tensor:
    """(N,) < 0: minus the local intrinsic dimension, estimated from the k nearest references.

    Ma et al. 2018, arXiv:1801.02613; adversarial examples have a higher dimension, hence
    the sign. references: features of normal images, of about a mini-batch (100). No reference may
    be the image itself: a distance of 0 says nothing of the dimension.
    features (N, D), references (R, D).
    """
    if not 2 <= k <= len(references):
        raise InputError(f"k is {k}; write 2 to {len(references)}, the number of references")
    nearest = _distances(features, references).topk(k, dim=1, largest=False).values
    tiny = torch.finfo(nearest.dtype).tiny
    logs = nearest.clamp_min(tiny).log()
    slope = (logs[:, -1:] - logs).mean(dim=1)
    return -1 / slope.clamp_min(torch.finfo(nearest.dtype).eps)  # all k at one distance


def _distances(features: Tensor, references: Tensor) -> Tensor:
    """(N, R); the expansion into inner products would cancel for near points."""
    return torch.cdist(features, references, compute_mode="donot_use_mm_for_euclid_dist")


def auc(normal: np.ndarray, adversarial: np.ndarray) -> float:
    """[0, 1]: probability that a normal input scores above an adversarial one, a tie being half.

    Mann-Whitney with mid-ranks; 0.5 for a useless detector. nan ranks as the most normal score,
    because it is never flagged. normal (N,), adversarial (M,): scores, larger = more normal.
    """
    above, below = _scores(normal, adversarial)
    ranks = rankdata(np.concatenate([above, below]))[: len(above)]
    n = len(above)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * len(below)))


def threshold(normal: np.ndarray, fpr: float) -> float:
    """The largest threshold that flags at most a share `fpr` in [0, 1] of the normal scores (N,).

    Flagged is what scores below it. inf when all may be flagged.
    """
    if not 0 <= fpr <= 1:
        raise InputError(f"fpr is {fpr}; write a share from 0 to 1, such as 0.05")
    scores, _ = _scores(normal, normal)
    allowed = math.floor(fpr * len(scores) + 1e-9)  # 0.29 * 100 is a little less than 29
    return float(np.append(np.sort(scores), np.inf)[allowed])


def tpr_at_fpr(normal: np.ndarray, adversarial: np.ndarray, fpr: float = 0.05) -> float:
    """[0, 1]: share of the adversarial inputs that are flagged when at most `fpr` normal ones are.

    nan is not flagged. normal (N,), adversarial (M,): scores, larger = more normal.
    """
    _, scores = _scores(normal, adversarial)
    return float((scores < threshold(normal, fpr)).mean())


def _scores(normal: np.ndarray, adversarial: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pair = [np.asarray(scores, dtype=np.float64).ravel() for scores in (normal, adversarial)]
    for name, scores in zip(("normal", "adversarial"), pair, strict=True):
        if not len(scores):
            raise InputError(f"there is no {name} score; a detector is measured on both kinds")
    above, below = (np.where(np.isnan(scores), np.inf, scores) for scores in pair)
    return above, below
