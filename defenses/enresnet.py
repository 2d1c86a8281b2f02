"""EnResNet, paper 000 (ResNets Ensemble via the Feynman-Kac Formalism).

Every residual mapping becomes x + F(x) + a sqrt(Var(x + F(x))) N(0, I) (section 2.2), while
training and at test; an ensemble of such networks, trained jointly by PGD adversarial training
(section 2.3), approximates the expectation of eq. 10. Separately trained ensembles are joined by
name, `enresnet & enresnet(members=5)` (section 3.2); shared weights (n × En₁) are
`enresnet(members=1, draws=n)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.attacks.suite import Budget, Stage, frozen
from robbench.defense import INFERENCE, Defense, defense
from robbench.errors import InputError
from robbench.recipes import CIFAR_RECIPE, Adversarial, AdversarialSpec
from robbench.rules import MeanLogits, MeanProbabilities, Rule


class VarianceNoise(nn.Module):
    """x + a · std(x) · ξ; the standard deviation is unbiased and differentiated through.

    per image: over (C, H, W) of each image. per batch: one number over the whole tensor, as the
    authors' code has it, so that a prediction depends on its batch mates.
    """

    def __init__(self, a: float, per: Literal["image", "batch"]) -> None:
        super().__init__()
        self.a, self.per_batch = a, per == "batch"

    def forward(self, x: Tensor) -> Tensor:
        if not self.a:
            return x
        # the root has no finite slope at zero variance (a dead block), hence the clamp
        variance = x.var() if self.per_batch else x.flatten(1).var(dim=1)
        deviation = variance.clamp_min(1e-12).sqrt().view(-1, 1, 1, 1)
        return x + self.a * deviation * torch.randn_like(x)


@defense("enresnet")
class EnResNet(Defense):
    """n jointly trained noisy ResNets, mean of softmax (eq. 10) or of logits (the authors' code).

    a: the noise's share of the standard deviation (the paper's σ = 0.1). variance: `image`
    (default; a prediction must not depend on its batch mates) or `batch` (the code). average:
    `probabilities` (the text) or `logits` (the code), while training too. adversarial: none, pgd
    or trades. `paper` keeps the last weights, where the paper picks the best of 200 epochs on
    5,000 held-out images; `network=resnet20(pre_activation=true)` is the backbone of the code.
    """

    source: ClassVar[str] = "paper 000: Wang et al. 2019, arXiv:1811.10745"
    quiet: ClassVar[Mapping[str, object]] = {"noise": False}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},
        "quick:cifar10": {"epochs": 3, "adversarial": "pgd(eps=8/255, steps=5)"},
        "quick:folder": {"adversarial": "pgd(eps=8/255, steps=5)"},
        "paper": {**CIFAR_RECIPE, "adversarial": "pgd(eps=8/255, step=2/255, steps=10)"},
    }

    members: Annotated[int, Field(ge=1)] = 2
    epochs: Annotated[int, Field(ge=1)] = 20
    adversarial: AdversarialSpec = Adversarial(eps=Fraction(1, 5), steps=5)
    a: Annotated[float, Field(ge=0)] = 0.1
    variance: Literal["image", "batch"] = "image"
    average: Literal["probabilities", "logits"] = "probabilities"
    noise: Annotated[bool, INFERENCE] = True

    def prepare(self, network: nn.Module) -> nn.Module:
        blocks = getattr(network, "blocks", None)
        if not blocks:
            raise InputError(f"enresnet needs a residual network, not {self.network}; try resnet8")
        for block in blocks:
            block.sum = VarianceNoise(self.a if self.noise else 0.0, self.variance)
        return network

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """A sample of draws, attacked as if it were the network: the noise hides nothing then."""
        return [frozen(budget)] if self.stochastic else []

    @property
    def random(self) -> bool:
        return self.noise and self.a > 0

    def rule(self) -> Rule:
        return MeanProbabilities() if self.average == "probabilities" else MeanLogits()
