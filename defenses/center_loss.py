"""Learned class centres, what paper 003 compares Max-Mahalanobis training with: center loss (Wen
et al. 2016, ECCV, "A Discriminative Feature Learning Approach for Deep Face Recognition") and the
large-margin Gaussian mixture (Wan et al. 2018, CVPR, arXiv:1803.02988).

Features z (N, D) are the last hidden activations of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robbench.attacks.losses import Scored, log_odds
from robbench.attacks.suite import Budget, Stage
from robbench.defense import Defense, defense
from robbench.recipes import CENTRES_RECIPE
from robbench.rules import Draw, Loss, MeanProbabilities

# Paper 003 trains all that it compares alike; the two papers themselves are about faces and other
# networks.
PRESETS: Mapping[str, Mapping[str, object]] = {
    "quick": {},
    "quick:mnist": {"epochs": 3},
    "paper": CENTRES_RECIPE,
}


class Centres(nn.Module):
    """The centre c_y of every label, a buffer (L, D) that follows the features of training.

    It starts at 0. In training mode a call first measures and then moves every centre by
    rate · sum(z - c) / (1 + n) over its n images of the batch (Wen et al., eq. 4).
    """

    centres: Tensor

    def __init__(self, labels: int, dimension: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("centres", torch.zeros(labels, dimension))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """(N, D) features and (N,) labels -> (N,) ½‖z - c_y‖²."""
        offsets = z - self.centres[y]
        if self.training:
            with torch.no_grad():
                images = torch.bincount(y, minlength=len(self.centres))[:, None]
                sums = torch.zeros_like(self.centres).index_add_(0, y, offsets.to(self.centres))
                self.centres += self.rate * sums / (1 + images)
        return offsets.square().sum(dim=1) / 2


@defense("center-loss")
class CenterLoss(Defense):
    """Cross-entropy + λ/2 ‖z - c_y‖² (Wen et al. 2016, eq. 5), summed over members; the network
    deployed is a plain one.

    lam: λ; 0 is `standard` bit for bit. rate: the share α of the way that centres go per batch,
    in [0, 1] (Algorithm 1, which has α = 0.5 and λ = 0.003 on faces). In adversarial training
    centres follow the features of x', and of the clean images where both are trained on.
    """

    source: ClassVar[str] = "Wen et al. 2016, ECCV, doi:10.1007/978-3-319-46478-7_31"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = PRESETS
    features: ClassVar[bool] = True

    lam: Annotated[float, Field(ge=0)] = 0.003
    rate: Annotated[float, Field(ge=0, le=1)] = 0.5

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Into the features of another label, whose centre is near them."""
        return [Stage("feature-matching")]

    def prepare(self, network: nn.Module) -> nn.Module:
        readout = network.readout
        assert isinstance(readout, nn.Linear)
        network.centres = Centres(readout.out_features, readout.in_features, self.rate)
        return network

    def loss_on(self, members: nn.ModuleList, x: Tensor, y: Tensor) -> Tensor:
        draw = self.forward(members, x)
        loss = self.criterion(draw, y, x)
        if not self.lam:
            return loss
        assert draw.features is not None
        apart = [member.centres(z, y) for member, z in zip(members, draw.features[0], strict=True)]  # type: ignore[operator]
        return loss + self.lam * torch.stack(apart).sum(dim=0)


class MixtureReadout(nn.Module):
    """Features (..., D) -> log-densities but for a constant, (..., L), of Gaussians of equal
    weight: -d_l - ½ log|Λ_l|, where d_l = ½ (z - μ_l)ᵀ Λ_l⁻¹ (z - μ_l), Λ_l diagonal.

    Means start standard normal, variances at about 1. variance: learned per label and dimension
    (`diagonal`, at least `floor`: the likelihood of features that collapse onto their mean has no
    bound), or fixed to 1.
    """

    floor: ClassVar[float] = 1e-4  # the authors' code

    def __init__(self, dimension: int, labels: int, diagonal: bool) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(labels, dimension))
        self.log_excess = nn.Parameter(torch.zeros(labels, dimension)) if diagonal else None

    def variances(self) -> Tensor:
        """(L, D), all positive."""
        if self.log_excess is None:
            return torch.ones_like(self.means)
        return self.floor + self.log_excess.exp()

    def half_log_determinant(self) -> Tensor:
        """(L,) ½ log|Λ|."""
        return self.variances().log().sum(dim=-1) / 2

    def forward(self, z: Tensor) -> Tensor:
        offsets = z.unsqueeze(-2) - self.means
        distances = (offsets.square() / self.variances()).sum(dim=-1) / 2
        return -distances - self.half_log_determinant()


LOG_ODDS = Scored(MeanProbabilities(), log_odds)  # of the posterior


@defense("l-gm")
class LargeMarginGaussianMixture(Defense):
    """Cross-entropy of a learned Gaussian mixture whose distance d_y to the label counts 1 + α
    times (the large margin), + λ times the negative log-likelihood d_y + ½ log|Λ_y|; per member,
    summed.

    alpha: the margin α. lam: λ. The defaults are those of the authors' code on CIFAR-100, which
    elsewhere raises α in steps from 0.1 to 0.3. variance: `diagonal`, learned as in the text, or
    `unit`, fixed to 1 as in configurations of that code. Without margin and likelihood, unit
    variances make it softmax regression up to a shift that is alike for all labels. Adversarial
    training ascends the log-odds, as an attacker does: cross-entropy fades where densities are far
    apart.
    """

    source: ClassVar[str] = "Wan et al. 2018, arXiv:1803.02988"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = PRESETS
    losses: ClassVar[Mapping[str, Loss]] = {"log-odds": LOG_ODDS}

    alpha: Annotated[float, Field(ge=0)] = 0.1
    lam: Annotated[float, Field(ge=0)] = 0.01
    variance: Literal["diagonal", "unit"] = "diagonal"

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Into the features of another label, whose centre is near them."""
        return [Stage("feature-matching")]

    def prepare(self, network: nn.Module) -> nn.Module:
        readout = network.readout
        assert isinstance(readout, nn.Linear)
        diagonal = self.variance == "diagonal"
        network.readout = MixtureReadout(readout.in_features, readout.out_features, diagonal)
        return network

    def loss_on(self, members: nn.ModuleList, x: Tensor, y: Tensor) -> Tensor:
        logits = self.forward(members, x).logits[0]
        losses = [
            self.mixture_loss(scores, member.readout.half_log_determinant(), y)  # type: ignore[operator,union-attr]
            for member, scores in zip(members, logits, strict=True)
        ]
        return torch.stack(losses).sum(dim=0)

    def mixture_loss(self, scores: Tensor, half_log_determinant: Tensor, y: Tensor) -> Tensor:
        """(N,) of one member, from its log-densities (N, L) and ½ log|Λ| (L,)."""
        surprise = -scores.gather(1, y[:, None])  # (N, 1) d_y + ½ log|Λ_y|
        margins = self.alpha * (surprise - half_log_determinant[y, None])  # (N, 1) α d_y
        kept = scores.scatter_add(1, y[:, None], -margins)
        return F.cross_entropy(kept, y, reduction="none") + self.lam * surprise[:, 0]

    def objective(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        return LOG_ODDS(draw, y, target)
