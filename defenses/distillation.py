"""Defensive distillation, Papernot et al. 2016, arXiv:1511.04508; reviewed in paper 002, section 3.

A network is trained with softmax(Z / T) at a high temperature T; a second one of the same
architecture learns its probabilities, also at T; the second is deployed at T = 1 (section IV-A).
Its logits are then about T times larger than usual, and the softmax has no gradient left in
float32: the attack stands still, the network is no more robust (Carlini & Wagner 2016,
arXiv:1607.04311).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, field_validator
from torch import Generator, Tensor, nn

from robbench.attacks.losses import Scored, dlr
from robbench.defense import Defense, canonical, defense
from robbench.recipes import CIFAR_RECIPE, Batch
from robbench.registry import Spec
from robbench.rules import Draw, Loss, MeanProbabilities


@defense("distillation")
class Distillation(Defense):
    """A student of the probabilities of `base`, both at temperature T; the answer is at T = 1.

    temperature: T > 0 (the paper: 1 to 100, 20 in the main results). base: the teacher. The
    default is what base=none trains: this defense's network at its temperature, from labels. Any
    other defense teaches by its logits / T, averaged over its members. The student starts fresh.
    Augmented images get the teacher's answer to what they have become. Adversarial training looks
    for x' at temperature T, where the cross-entropy still has a gradient, by the true label; the
    student's soft label is the teacher's for the clean image.

    `paper`: T = 20; network and rates are those of `standard`, since the nets of 2016, with
    dropout, are not among ours.
    """

    source: ClassVar[str] = "Papernot et al. 2016, arXiv:1511.04508"
    losses: ClassVar[Mapping[str, Loss]] = {
        # both free of the scale, with which the gradient of cross-entropy fades
        "margin": Scored(MeanProbabilities()),
        "dlr": Scored(MeanProbabilities(), dlr),
    }
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3, "base": "distillation(base=none, epochs=3)"},
        "paper": {
            **CIFAR_RECIPE,
            "base": "distillation(base=none, batch_size=128, crop=4, epochs=200, flip=true, lr=0.1,"
            " optimizer=sgd, schedule=steps, weight_decay=0.0005)",
        },
    }

    base: str | None = "distillation(base=none)"
    epochs: Annotated[int, Field(ge=1)] = 30
    temperature: Annotated[float, Field(gt=0)] = 20.0
    _teachers: list[nn.Module] = PrivateAttr(default_factory=list)

    @field_validator("base")
    @classmethod
    def _trained_here(cls, base: str | None) -> str | None:
        if base is not None and base.startswith("torchvision:"):
            raise ValueError(f"{base} are weights of other labels, no teacher; write base=standard")
        return base

    def base_spec(self) -> Spec | None:
        """The teacher; another distillation is at this temperature unless it names one."""
        spec = super().base_spec()
        if spec is None or spec.name != self.name or "temperature" in dict(spec.settings):
            return spec
        return canonical(spec.with_settings({"temperature": self.temperature}))

    def start(self, members: nn.ModuleList, sources: nn.ModuleList) -> None:
        """Keep the base as the teacher; the student's weights stay fresh."""
        self._teachers[:] = sources

    def batch(self, members: nn.ModuleList, batch: Batch, rng: Generator) -> Batch:
        batch = super().batch(members, batch, rng)
        if not self._teachers:  # base=none: a teacher itself, of labels
            return batch
        with torch.no_grad():
            logits = torch.stack([teacher(batch.clean) for teacher in self._teachers])
        return batch._replace(y=(logits / self.temperature).softmax(dim=-1).mean(dim=0))

    def criterion(self, draw: Draw, y: Tensor, x: Tensor) -> Tensor:
        return self._cross_entropy(draw, y)

    def objective(self, draw: Draw, y: Tensor, target: Tensor | None) -> Tensor:
        """At temperature T: the scores of T = 1 saturate, and with them the search for x'."""
        if target is None:
            return self._cross_entropy(draw, y)
        return -self._cross_entropy(draw, target)

    def scores(self, members: nn.ModuleList, x: Tensor) -> Tensor:
        """While training at temperature T, for the divergence of TRADES."""
        return super().scores(members, x) / self.temperature

    def _cross_entropy(self, draw: Draw, y: Tensor) -> Tensor:
        """(N,) cross-entropy of softmax(Z / T), mean over draws and members; y are labels (N,) or
        shares of labels (N, L)."""
        losses = [
            F.cross_entropy(logits / self.temperature, y, reduction="none")
            for logits in draw.logits.flatten(0, 1)
        ]
        return torch.stack(losses).mean(dim=0)
