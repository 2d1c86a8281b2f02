"""PGD adversarial training, Madry et al. 2018, arXiv:1706.06083, eq. 2.1.

`adversarial=fgsm` is the fast variant of Wong et al. 2020, arXiv:2001.03994: one step of 1.25 ε
from a random start.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import Field

from robbench.attacks.suite import Budget, Stage
from robbench.defense import Defense, defense
from robbench.recipes import CIFAR_RECIPE, Adversarial, AdversarialSpec


@defense("pgd-at")
class PGDAdversarialTraining(Defense):
    """min over weights of the cross-entropy at the worst point that PGD finds in the ball."""

    source: ClassVar[str] = "Madry et al. 2018, arXiv:1706.06083"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},
        "quick:cifar10": {"epochs": 3, "adversarial": "pgd(eps=8/255, steps=5)"},
        "quick:folder": {"adversarial": "pgd(eps=8/255, steps=5)"},
        # paper 000, section 3.1: 10 steps of 2/255 in the ball of 8/255
        "paper": {**CIFAR_RECIPE, "adversarial": "pgd(eps=8/255, step=2/255, steps=10)"},
    }

    epochs: Annotated[int, Field(ge=1)] = 20
    adversarial: AdversarialSpec = Adversarial(eps=Fraction(1, 5), steps=5)

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """AutoAttack, the measure of what is adversarially trained."""
        return [] if budget == "smoke" else [Stage("autoattack")]
