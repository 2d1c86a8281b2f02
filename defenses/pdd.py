"""PDD and DEG, paper 004 (Huang et al. 2021, Adversarial Defence by Diversified Simultaneous
Training of Deep Ensembles): members that look at features of different strength, and whose loss
gradients point apart. Both act while training only; the members answer by their mean softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from robbench.attacks.losses import Votes
from robbench.attacks.suite import MEANS, Budget, Stage
from robbench.defense import Defense, defense, summed_cross_entropy
from robbench.metrics.diversity import gradient_cosines
from robbench.recipes import Batch
from robbench.rules import Draw, Loss


def keep_rates(hidden: Tensor, alpha: float, beta: float, intervals: int) -> Tensor:
    """(K, N, D) probabilities of keeping a unit: algorithm 1 and eq. 2, each image on its own.

    hidden: (K, N, D) activations of all members. The range of an image's K D activations is cut
    into equal intervals; member k prefers the k-th most populated one (of equals the lower), and
    keeps its units there at rate alpha, those of another interval m at beta (1 - N_m / D), with
    N_m of its own units in m. An image whose activations are all alike has one interval.
    """
    members, images, units = hidden.shape
    low, high = hidden.amin(dim=(0, 2)), hidden.amax(dim=(0, 2))  # (N,)
    span = (high - low).clamp_min(torch.finfo(hidden.dtype).tiny)
    place = (hidden - low[:, None]) / span[:, None] * intervals
    interval = place.long().clamp(0, intervals - 1)  # (K, N, D)
    counts = hidden.new_zeros(members, images, intervals)
    counts.scatter_add_(2, interval, torch.ones_like(hidden))
    order = counts.sum(dim=0).argsort(dim=1, descending=True, stable=True)  # (N, M)
    rates = beta * (1 - counts / units)
    rates.scatter_(2, order.T[:members, :, None], alpha)
    return rates.gather(2, interval)


# Rates and weight decay are the code's for the mean over K = 3 members, written for their sum.
PAPER: Mapping[str, object] = {
    "network": "resnet18",
    "optimizer": "sgd",
    "lr": 0.00667,
    "schedule": "cosine",
    "lr_end": 3.33e-5,
    "weight_decay": 1.5e-3,
}


class SimultaneousTraining(Defense):
    """K members on the same batches, sum of cross-entropies (eq. 1)."""

    source: ClassVar[str] = "paper 004: Huang et al. 2021, AAAI"
    # gradients that cancel in the mean do not cancel member by member
    losses: ClassVar[Mapping[str, Loss]] = {"vote": Votes()}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 2},
        "paper": {**PAPER, "epochs": 150, "crop": 4, "flip": True},
        "paper:tiny-imagenet": {**PAPER, "epochs": 100, "crop": 4, "flip": True},
        "paper:fashion-mnist": {**PAPER, "epochs": 40},
    }

    members: Annotated[int, Field(ge=1)] = 3
    epochs: Annotated[int, Field(ge=0)] = 20

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Every member alone: where gradients of members cancel in their sum, each of them is as
        easy as ever."""
        return [Stage(f"mim(loss=margin, steps={MEANS[budget].steps})", "members")]

    def criterion(self, draw: Draw, y: Tensor, x: Tensor) -> Tensor:
        return summed_cross_entropy(draw, y)


@defense("pdd")
class PriorityDiversifiedDropout(SimultaneousTraining):
    """Priority diversified dropout in the input of every member's readout (algorithm 1, eq. 2).

    alpha: keep rate in the interval that a member prefers; beta: highest keep rate elsewhere, both
    in [0, 1]. intervals: M > K; the paper has 10 for K = 3 and 20 for K = 5. rescale: divide what
    is kept by its keep rate, so that the expected activation while training is that at test. The
    paper and its code do not (the default), so that logits at test are several times those that
    were trained, and cross-entropies saturate; attack its members by clipped margins. The text
    does not say over what intervals are counted: here, as in the code, over the K D activations
    of one image.

    At test everything is kept. Adversarial training is mixed with clean images, as in
    adversarial=pgd(eps=0.02, reach=1, clean=1) or fgsm(eps=0.04, clean=1), of which the paper
    (table 6) gives no ε; every step of it draws masks of its own.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    beta: Annotated[float, Field(ge=0, le=1)] = 0.1
    intervals: Annotated[int, Field(ge=2)] = 10
    rescale: bool = False

    @model_validator(mode="after")
    def _enough(self) -> PriorityDiversifiedDropout:
        if self.intervals <= self.members:
            raise ValueError(
                f"intervals = {self.intervals} leaves no choice to {self.members} members;"
                f" write intervals={self.members + 1} or more"
            )
        return self

    def forward(self, members: nn.ModuleList, x: Tensor) -> Draw:
        if not members.training:
            return super().forward(members, x)
        hidden = torch.stack([member.features(x) for member in members])  # type: ignore[operator]
        rates = keep_rates(hidden.detach().float(), self.alpha, self.beta, self.intervals)
        weights = torch.bernoulli(rates)
        if self.rescale:
            weights = weights / rates.clamp_min(torch.finfo(rates.dtype).tiny)
        kept = zip(members, hidden * weights, strict=True)
        logits = [member.readout(h) for member, h in kept]  # type: ignore[operator]
        return Draw(torch.stack(logits)[None])


@defense("deg")
class DispersedEnsembleGradients(SimultaneousTraining):
    """Sum of cross-entropies + λ sum_{i<j} cos(g_i, g_j), g_k = d CE_k / d x (eq. 3 and 4).

    lam: λ >= 0; 0 is the paper's baseline, `ensemble` bit for bit. The code averages
    cross-entropies over members, which makes its λ of 0.01 one of 0.01 K here. Cosines have no
    scale, so they are taken of the gradient of log((1 - p_y) / p_y), which is g_k / (1 - p_y) and
    does not fade where a member is sure of an image; the code divides 0 by 0 there. A gradient of
    zero has the cosine 0 with any other. Batch normalisation couples the images of a batch, in
    their gradients too. Labels must be whole. Second order: a step takes about five times that
    of the baseline.
    """

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        **SimultaneousTraining.presets,
        # 55,000 second derivatives an epoch are too many for a convolutional network
        "quick:mnist": {"network": "mlp", "epochs": 3, "batch_size": 128},
    }

    epochs: Annotated[int, Field(ge=0)] = 12
    lam: Annotated[float, Field(ge=0)] = 0.01

    def loss(self, members: nn.ModuleList, batch: Batch) -> Tensor:
        if self.lam:
            x, clean = (images.detach().requires_grad_() for images in (batch.x, batch.clean))
            batch = batch._replace(x=x, clean=clean)
        return super().loss(members, batch)

    def criterion(self, draw: Draw, y: Tensor, x: Tensor) -> Tensor:
        loss = super().criterion(draw, y, x)
        logits = draw.logits[0]  # (K, N, L)
        if not self.lam or len(logits) == 1:
            return loss
        true = F.one_hot(y, logits.shape[-1]).bool()
        others = logits.masked_fill(true, float("-inf")).logsumexp(dim=-1)
        odds = others - logits[:, true]  # (K, N)
        gradients = [torch.autograd.grad(o.sum(), x, create_graph=True)[0] for o in odds]
        return loss + self.lam * gradient_cosines(torch.stack(gradients)).sum(dim=0)


@defense("pdd+deg")
class PDDAndDEG(PriorityDiversifiedDropout, DispersedEnsembleGradients):
    """Both: gradients are those of the members with the masks of the step (paper 004, eq. 4)."""

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = DispersedEnsembleGradients.presets

    epochs: Annotated[int, Field(ge=0)] = 12
