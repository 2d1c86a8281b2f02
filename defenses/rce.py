"""Reverse cross-entropy, paper 003 part III (Towards Robust Detection of Adversarial Examples).

Training drives the softmax of the logits Z towards the reverse label R_y, which is 0 for the true
label and 1 / (L - 1) for every other one; the prediction is the softmax of -Z. The loss makes the
wrong labels of a prediction alike (the largest non-maximal entropy), which is what the detectors
look at: `rce(detector=k-density)`, `rce(detector=non-me)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robbench.attacks.losses import Votes
from robbench.attacks.suite import Budget, Stage
from robbench.defense import Defense, defense
from robbench.rules import Draw, Loss


def reverse_labels(y: Tensor, labels: int) -> Tensor:
    """(N, L) R_y = (1 - 1_y) / (L - 1); of labels (N,), or of shares of labels (N, L)."""
    shares = F.one_hot(y, labels) if y.dim() == 1 else y
    return (1 - shares) / (labels - 1)


def reverse_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """(...) -R_y · log softmax(Z), at least log(L - 1), of logits Z (..., N, L) that predict by -Z.

    Its gradient by Z is softmax(Z) - R_y. The authors' code adds the term of the true label and
    subtracts it again, which is NaN once that probability underflows; here its weight is 0.
    """
    log = F.log_softmax(logits, dim=-1)
    return -(reverse_labels(y, logits.shape[-1]).to(log) * log).sum(dim=-1)


@defense("rce")
class ReverseCrossEntropy(Defense):
    """Reverse training, and the reversed logits as scores.

    The networks answer -Z, which costs the last layer nothing but its sign: every rule, attack and
    detector then sees the logits that decide, and weights can be taken over from any `base`. With
    two labels the loss is the cross-entropy. Several members are trained on the sum of their
    losses, and decide by the mean softmax.

    `paper` is the recipe of the authors' code, on which the text is silent: 90,000 steps of 128
    (`paper:mnist` 20,000), lr / 10 at steps 40,000, 60,000 and 80,000, no standardisation. Its
    leaky ReLUs, average-pooled shortcuts and momentum without Nesterov have no field here.
    """

    source: ClassVar[str] = "paper 003: Pang et al. 2018, arXiv:1706.00633"
    losses: ClassVar[Mapping[str, Loss]] = {"vote": Votes()}  # on -Z
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},
        "paper": {
            "network": "resnet32(pre_activation=true)",
            "epochs": 230,
            "batch_size": 128,
            "optimizer": "sgd",
            "lr": 0.1,
            "schedule": "steps",
            "decay_at": (4 / 9, 6 / 9, 8 / 9),
            "weight_decay": 2e-4,
            "crop": 2,
            "flip": True,
        },
        "paper:mnist": {
            "network": "resnet32(pre_activation=true)",
            "epochs": 47,
            "batch_size": 128,
            "optimizer": "sgd",
            "lr": 0.1,
            "schedule": "steps",
            "decay_at": (0.5, 0.75),
            "weight_decay": 2e-4,
        },
    }

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Into the features of another label: what its detectors look at follows the label."""
        return [Stage("feature-matching")]

    def criterion(self, draw: Draw, y: Tensor, x: Tensor) -> Tensor:
        return reverse_cross_entropy(-draw.logits, y).sum(dim=(0, 1))
