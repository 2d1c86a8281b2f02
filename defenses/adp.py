"""ADP, adaptive diversity promoting: Pang et al. 2019, arXiv:1901.08846; part II of paper 003.

K members are trained together to share the right label and no wrong one: the loss of an image is
sum_k CE(p_k, y) - α H(mean_k p_k) - β log ED (eq. 6), where ED is the determinant of the Gram
matrix of the members' predictions without the label, each of length 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from robbench.attacks.losses import Scored, Votes
from robbench.attacks.suite import MEANS, Budget, Stage
from robbench.defense import Defense, defense, summed_cross_entropy
from robbench.metrics.diversity import log_diversity
from robbench.recipes import ADP_MNIST_RECIPE, ADP_RECIPE
from robbench.rules import Draw, Loss, MeanProbabilities


@defense("adp")
class AdaptiveDiversityPromoting(Defense):
    """K members, sum of cross-entropies - α H - β log ED; they answer by their mean softmax.

    alpha: α >= 0, weight of the entropy H of the mean prediction, in nats, at most log L. beta:
    β >= 0, weight of log ED, in [-26.5, 0] for K = 3. ADP(2, 0) is beta=0, the papers' baseline
    alpha=0, beta=0, which is `ensemble` bit for bit. The ridge of 1e-6 on the Gram matrix is that
    of the code; predictions are normalised as logarithms, where the code divides by what may be 0.
    Labels must be whole: log ED has no meaning for shares of labels.

    Adversarial training as published, on clean images and x' alike, with ε drawn per batch:
    adversarial=pgd(eps=0.05, low=0.01, reach=1, clean=1) or
    adversarial=fgsm(eps=0.05, low=0.01, random=false, clean=1), 180 epochs, decay_at=[0.444,
    0.667, 0.889]. Paper 004 compares with another ADP: its code averages cross-entropies over
    members and keeps α and β, which is alpha=6, beta=1.5 for K = 3.

    `paper`: epochs, rates and weight decay of the code, on all weights, not on kernels alone; the
    last weights, where the code keeps the best on test images (select=best does it on the
    validation split).
    """

    source: ClassVar[str] = "paper 003: Pang et al. 2019, arXiv:1901.08846"
    # the margin of the mean does not fade where the members are sure, unlike its cross-entropy
    losses: ClassVar[Mapping[str, Loss]] = {"margin": Scored(MeanProbabilities()), "vote": Votes()}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 1},
        "paper": ADP_RECIPE,
        "paper:mnist": ADP_MNIST_RECIPE,
    }

    members: Annotated[int, Field(ge=1)] = 3
    epochs: Annotated[int, Field(ge=0)] = 20
    alpha: Annotated[float, Field(ge=0)] = 2.0
    beta: Annotated[float, Field(ge=0)] = 0.5

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """The margin of every member alone, and twice the steps, which Tramer et al. 2020,
        arXiv:2002.08347, needed; then, as theirs, the attack of Brendel & Bethge."""
        steps = MEANS[budget].steps
        stages = [
            Stage(f"mim(loss=margin, steps={steps})", "members"),
            Stage(f"apgd(loss=margin, steps={2 * steps}, start=warm)"),
        ]
        return [*stages, Stage("brendel-bethge")] if budget == "thorough" else stages

    def criterion(self, draw: Draw, y: Tensor, x: Tensor) -> Tensor:
        logits = draw.logits[0]  # (K, N, L)
        loss = summed_cross_entropy(draw, y)
        if self.alpha:
            log = F.log_softmax(self.rule().scores(draw), dim=1)
            loss = loss + self.alpha * (log.exp() * log).sum(dim=1)
        if self.beta:
            loss = loss - self.beta * log_diversity(logits, y)
        return loss
