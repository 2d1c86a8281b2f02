"""TRADES, Zhang et al. 2019, arXiv:1901.08573: accuracy traded against the boundary's distance.

min over weights of CE(f(x), y) + β max over the ball of KL(f(x) ‖ f(x')) (eq. 5 with β = 1/λ):
clean images are learned from their labels, x' only has to be answered like x. Both parts are
`adversarial=trades`, which any other defense takes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import Field

from robbench.attacks.suite import Budget, Stage
from robbench.defense import Defense, defense
from robbench.recipes import CIFAR_RECIPE, Adversarial, AdversarialSpec


@defense("trades")
class Trades(Defense):
    """`standard` trained with adversarial=trades: β ≥ 0 (default 6) weighs the divergence.

    `trades(adversarial=trades(beta=1, eps=0.1, steps=5))` is another trade-off; β = 0 learns from
    clean images alone. `paper`: WideResNet-34-10 as in section 5.2, with Nesterov momentum where
    the authors' code has the plain one.
    """

    source: ClassVar[str] = "Zhang et al. 2019, arXiv:1901.08573"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 1},
        "quick:cifar10": {"epochs": 1, "adversarial": "trades(eps=8/255, steps=5)"},
        "quick:folder": {"adversarial": "trades(eps=8/255, steps=5)"},
        "paper": {
            **CIFAR_RECIPE,
            "network": "wideresnet34-10",
            "epochs": 76,
            "decay_at": [0.987],  # epoch 75
            "weight_decay": 2e-4,
            "adversarial": "trades(eps=0.031, step=0.007, steps=10)",
        },
    }

    epochs: Annotated[int, Field(ge=1)] = 30
    adversarial: AdversarialSpec = Adversarial(kind="trades", eps=Fraction(1, 5), steps=5)

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """AutoAttack, the measure of what is adversarially trained."""
        return [] if budget == "smoke" else [Stage("autoattack")]
