"""Randomized smoothing, Cohen et al. 2019, arXiv:1902.02918.

The smoothed classifier answers what the network says most often under Gaussian noise on the
image, g(x) = argmax_c P(f(x + η) = c), η ~ N(0, σ² I) (eq. 1). The network is trained on noisy
images (section 3.3). The label is decided by a test of n votes, or not at all (PREDICT), and is
certain within an l2 radius that `certify` bounds (CERTIFY, theorem 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from robbench.attacks.losses import Votes
from robbench.attacks.suite import Budget, Stage, frozen
from robbench.defense import INFERENCE, Defense, defense
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.networks import Normalize
from robbench.recipes import CIFAR_RECIPE
from robbench.rules import ABSTAIN, Draw, Loss, MeanProbabilities, Rule

AT_ONCE = 500  # draws whose logits are held while votes are counted


class NoisyNormalize(Normalize):
    """Adds N(0, σ²) to every pixel, then normalises; σ in units of pixels, which are not clipped.
    State and keys are those of the layer that it replaces."""

    def __init__(self, plain: Normalize, sigma: float) -> None:
        super().__init__((), ())
        self.mean, self.std, self.sigma = plain.mean, plain.std, sigma

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.sigma * torch.randn_like(x) if self.sigma else x)


@dataclass(frozen=True)
class BinomialTest(MeanProbabilities):
    """The label of most votes, if a two-sided test at level alpha says that it beats the second.

    Votes are counted over draws and members (appendix C, after Hung & Fithian 2019). They have no
    gradient: scores are those of the mean softmax.
    """

    alpha: float = 0.001
    abstains: ClassVar[bool] = True

    def __str__(self) -> str:
        return "binomial test"

    def decide(self, draw: Draw) -> Tensor:
        from scipy.stats import binom

        counts, labels = _votes(draw).topk(2, dim=1)
        first, both = counts[:, 0].cpu().numpy(), counts.sum(dim=1).cpu().numpy()
        p = torch.from_numpy(2 * binom.sf(first - 1, both, 0.5))  # above 1 in a tie
        return labels[:, 0].masked_fill((p > self.alpha).to(labels.device), ABSTAIN)


@defense("smoothing")
class Smoothing(Defense):
    """Gaussian noise on every image while training and at test; n votes decide, or abstain.

    sigma: σ ≥ 0 in units of pixels in [0, 1] (the paper's 0.12, 0.25, 0.5, 1). draws: n votes
    behind a decision. alpha: α in (0, 1), the chance of answering another label than the smoothed
    classifier's; with n votes no p-value is below 2^(1-n), so that α = 0.001 needs n ≥ 11. base:
    none trains from scratch, as the paper does; another defense gives its networks and weights,
    and `smoothing(base=pgd-at, epochs=0)` smooths it as it is. Adversarial training is that of
    Salman et al. 2019, arXiv:1906.04584, with one draw of the noise per step: adversarial=pgd(
    norm=l2, eps=1). noise=false is the trained network without noise.

    `paper` is the recipe for CIFAR-10; n = 100 there, and 100,000 for certificates.
    """

    source: ClassVar[str] = "Cohen et al. 2019, arXiv:1902.02918"
    losses: ClassVar[Mapping[str, Loss]] = {"vote": Votes()}  # of a vote
    quiet: ClassVar[Mapping[str, object]] = {"noise": False}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},
        "paper": {
            **CIFAR_RECIPE,
            "network": "resnet110",
            "epochs": 90,
            "batch_size": 400,
            "decay_at": [0.334, 0.667],
            "weight_decay": 1e-4,
            "draws": 100,
        },
    }

    sigma: Annotated[float, Field(ge=0)] = 0.25
    draws: Annotated[int, Field(ge=1), INFERENCE] = 50
    alpha: Annotated[float, Field(gt=0, lt=1), INFERENCE] = 0.001
    noise: Annotated[bool, INFERENCE] = True

    def build(self, shape: tuple[int, int, int], labels: int) -> nn.ModuleList:
        built = [base.build(shape, labels) for base in self.bases()]
        if not built:
            return super().build(shape, labels)
        return nn.ModuleList(self.prepare(network) for group in built for network in group)

    def prepare(self, network: nn.Module) -> nn.Module:
        plain = getattr(network, "normalize", None)
        if not isinstance(plain, Normalize):
            raise InputError(
                "smoothing adds its noise where a network normalises its images, and"
                f" {self.base or self.network} does it elsewhere; write base=standard"
            )
        network.normalize = NoisyNormalize(plain, self.sigma if self.noise else 0.0)
        return network

    @model_validator(mode="after")
    def _of_the_base(self) -> Smoothing:
        if self.base is not None and self.members > 1:
            raise ValueError("members are those of the base; write base=ensemble(members=3)")
        return self

    @property
    def size(self) -> int:
        return sum(base.size for base in self.bases()) or self.members

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Votes for one label under fixed noise."""
        return [frozen(budget)] if self.stochastic else []

    @property
    def random(self) -> bool:
        return (self.noise and self.sigma > 0) or any(base.random for base in self.bases())

    def rule(self) -> Rule:
        # one answer is no sample: a test of it could only abstain
        return BinomialTest(self.alpha) if self.random else MeanProbabilities()


class Certificates(NamedTuple):
    """What holds for every image within its radius, with probability 1 - α each."""

    labels: Tensor  # (N,) int64, ABSTAIN where nothing is certain
    radius: Tensor  # (N,) float64, in l2; 0 where nothing is certain


def certify(
    deployed: Deployed,
    x: Tensor,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
) -> Certificates:
    """CERTIFY of section 3.2.2: n0 draws choose a label, n fresh ones bound its probability from
    below by Clopper-Pearson at level α; its radius is σ Φ⁻¹(bound) where that is positive.

    deployed: a smoothed defense; its rule does not matter here. x: (N, C, H, W) in [0, 1]. sigma:
    the σ of its noise. Votes of several members count together: the sum of draws with different
    chances spreads less than a binomial (Hoeffding 1956). InputError for σ ≤ 0, n0 < 1, n < 1 and
    α outside of (0, 1).
    """
    from scipy.stats import beta, norm

    if not (sigma > 0 and n0 >= 1 and n >= 1 and 0 < alpha < 1):
        raise InputError(
            f"certify with sigma={sigma}, n0={n0}, n={n}, alpha={alpha}: write sigma > 0, n0 >= 1,"
            " n >= 1 and alpha between 0 and 1"
        )
    for member in deployed.members:
        noise = [m.sigma for m in member.modules() if isinstance(m, NoisyNormalize)]
        if noise != [sigma]:
            raise InputError(
                f"certify with sigma={sigma}: a member has noise of {noise}, and a radius holds for"
                " the noise under which votes are counted; write its sigma"
            )
    chosen = _counts(deployed, x, n0).argmax(dim=1)
    counts = _counts(deployed, x, n)
    votes = counts.sum(dim=1).cpu().numpy()
    k = counts.gather(1, chosen[:, None])[:, 0].cpu().numpy()
    bound = beta.ppf(alpha, k.clip(1), votes - k.clip(1) + 1) * (k > 0)
    radius = torch.from_numpy(sigma * norm.ppf(bound).clip(0))
    return Certificates(chosen.cpu().masked_fill(radius <= 0, ABSTAIN), radius)


def _counts(deployed: Deployed, x: Tensor, draws: int) -> Tensor:
    """(N, L) votes of so many draws."""
    counts = torch.zeros(len(x), deployed.labels, dtype=torch.int64, device=x.device)
    for start in range(0, draws, AT_ONCE):
        counts += _votes(deployed.draw(x, min(AT_ONCE, draws - start)))
    return counts


def _votes(draw: Draw) -> Tensor:
    """(N, L) votes, one per draw and member."""
    return F.one_hot(draw.logits.argmax(dim=-1), draw.logits.shape[-1]).sum(dim=(0, 1))
