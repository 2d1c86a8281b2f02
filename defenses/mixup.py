"""mixup, Zhang et al. 2018, arXiv:1710.09412: training between examples; the base of mixup
inference (paper 003, reference 5).

x̃ = λ x_i + (1 - λ) x_j with labels mixed alike, λ ~ Beta(α, α) (eq. 1). With adversarial=pgd(
clean=1) it is interpolated adversarial training, Lamb et al. 2019, arXiv:1906.06784: x' is found
for unmixed images, and mixed batches of both kinds are learned from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor, nn

from robbench.defense import Defense, defense
from robbench.recipes import CIFAR_RECIPE, Batch


def mixup(batch: Batch, shares: Tensor, partners: Tensor) -> Batch:
    """The batch with every image i of x and of clean mixed with image partners[i]: shares (N,) in
    [0, 1] are the λ, y becomes shares of labels (N, L)."""
    labels = F.one_hot(batch.y, batch.labels).to(batch.x.dtype)

    def between(values: Tensor) -> Tensor:
        weight = shares.view(-1, *[1] * (values.dim() - 1))
        return weight * values + (1 - weight) * values[partners]

    return Batch(between(batch.x), between(labels), between(batch.clean), batch.labels)


@defense("mixup")
class Mixup(Defense):
    """Cross-entropy on convex combinations of pairs of training images and their labels.

    alpha: α ≥ 0 of the Beta distribution; 0 mixes nothing. λ is drawn per image and partners by a
    permutation of the batch, as in the code of mixup inference. Interpolated adversarial training:
    adversarial=pgd(clean=1); its two losses are added, where the authors take half of each.

    `paper`: the recipe of mixup inference's code, which has no weight decay; its network is called
    ResNet-50, but is one of three stages with 4.75 million weights. It sets lr=0.1 for interpolated
    adversarial training.
    """

    source: ClassVar[str] = "Zhang et al. 2018, arXiv:1710.09412"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},
        "paper": {
            **CIFAR_RECIPE,
            "network": "resnet50",
            "batch_size": 64,
            "lr": 0.01,
            "decay_at": [0.5, 0.75],
            "weight_decay": 0.0,
        },
    }

    epochs: Annotated[int, Field(ge=1)] = 30
    alpha: Annotated[float, Field(ge=0)] = 1.0

    def batch(self, members: nn.ModuleList, batch: Batch, rng: Generator) -> Batch:
        batch = super().batch(members, batch, rng)
        if not self.alpha or not members.training:  # validation looks at whole images
            return batch
        n = len(batch.y)
        shares = torch.distributions.Beta(self.alpha, self.alpha).sample((n,)).to(batch.x)
        return mixup(batch, shares, torch.randperm(n, generator=rng).to(batch.y.device))
