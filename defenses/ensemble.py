"""Ensembles: K networks trained on the sum of their cross-entropies, and other rules for `A & B`.

Eq. 1 of paper 004 (Huang et al. 2021), the baseline of papers 003 (part II) and 004: the members
answer by the mean of their softmaxes, and nothing ties them together while they are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from robbench.attacks.losses import Scored
from robbench.defense import INFERENCE, Defense, defense, summed_cross_entropy
from robbench.recipes import ADP_MNIST_RECIPE, ADP_RECIPE
from robbench.rules import Draw, Loss, MeanLogits, MeanProbabilities, Rule, Vote

Decision = Annotated[Literal["probabilities", "logits", "majority", "plurality"], INFERENCE]
RULES: Mapping[str, Rule] = {
    "probabilities": MeanProbabilities(),
    "logits": MeanLogits(),
    "majority": Vote(),
    "plurality": Vote(majority=False),
}


@defense("ensemble")
class Ensemble(Defense):
    """K members (`members`) of one network, sum of cross-entropies, mean of softmaxes.

    training: `joint`, all members on the same batches and, with adversarial training, on the x'
    that fools the mean of their softmaxes; or `separate`, one after the other, each with an order
    of batches and an x' of its own. Without adversarial training nothing but that order differs,
    because the sum has no term of two members. decision: the mean of `probabilities` (default) or
    of `logits`, or one vote per member: `majority` (more than half, else the ensemble abstains) or
    `plurality` (the most votes, a tie abstains); it changes no weight, and x' of adversarial
    training fools the mean softmax whatever it is. members=1 is `standard`.

    `paper` is the baseline of paper 003's tables, ADP without its regulariser: epochs and rates of
    its code, and the last weights, where the code keeps the best on test images (select=best does
    it on the validation split). The baseline of paper 004 is the preset `paper` of deg(lam=0).
    """

    source: ClassVar[str] = "paper 004: Huang et al. 2021, eq. 1; paper 003: Pang et al. 2019"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 1},
        "paper": ADP_RECIPE,
        "paper:mnist": ADP_MNIST_RECIPE,
    }

    members: Annotated[int, Field(ge=1)] = 3
    epochs: Annotated[int, Field(ge=0)] = 20
    training: Literal["joint", "separate"] = "joint"
    decision: Decision = "probabilities"

    @property
    def joint(self) -> bool:
        return self.training == "joint"

    def criterion(self, draw: Draw, y: Tensor, x: Tensor) -> Tensor:
        return summed_cross_entropy(draw, y)

    def rule(self) -> Rule:
        return RULES[self.decision]


@defense("joined")
class Joined(Defense):
    """Separately trained defenses as one ensemble, by a rule of choice.

    `A & B` alone averages softmaxes unless its parts share a rule; joined(base='A & B',
    decision=majority) lets their members vote. base: what is joined; its parts keep their weights
    and noise but not their rules, so give `draws`, the passes per member, where one of them takes
    more than one. decision: as of `ensemble`; every member, and every draw of it, counts alike.
    epochs: above 0 the members are trained on, together, on the cross-entropy of the mean.
    """

    source: ClassVar[str] = "paper 000: Wang et al. 2019, section 3.2"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"quick": {}, "paper": {}}
    wraps: ClassVar[bool] = True

    base: str | None = "standard & pgd-at"
    epochs: Annotated[int, Field(ge=0)] = 0
    decision: Decision = "probabilities"

    def start(self, members: nn.ModuleList, sources: nn.ModuleList) -> None:
        members.load_state_dict(sources.state_dict())

    def rule(self) -> Rule:
        return RULES[self.decision]

    @property
    def losses(self) -> Mapping[str, Loss]:
        fades = any(base.losses for base in self.bases())  # a part's cross-entropy may be flat
        return super().losses or ({"margin": Scored(self.rule())} if fades else {})
