"""Mixup inference, Pang et al. 2020, arXiv:1909.11515 (paper 003, reference 5).

The image is not classified itself, but mixed with training images: λ x + (1 - λ) s, the softmax
averaged over partners s, so that an attack's perturbation is shrunk and moved. With ŷ the label
that the network gives to x, partners come from class ŷ (predicted label, MI-PL), or from another
class, uniformly (other labels, MI-OL). The combined rule takes MI-PL as a detector: where the
confidence falls by less than 0.2 from x to its MI-PL answer, that is the answer, else MI-OL's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from robbench.attacks.losses import Scored, Votes
from robbench.attacks.suite import MEANS, Budget, Stage
from robbench.datasets.dataset import take
from robbench.defense import INFERENCE, Defense, defense
from robbench.errors import InputError
from robbench.rules import Draw, Loss, MeanProbabilities

if TYPE_CHECKING:
    from robbench.datasets import Dataset

PL, OL = 5, 15  # mixtures that the combined rule averages


class MixupInference(nn.Module):
    """Images (N, C, H, W) -> logits (N, L) of one mixture each; combined: the logarithm of the
    chosen mean softmax. In training mode the network itself. The gradient by x is that of the
    mixture, λ times the network's there; for pl and combined the network's at x is added to it.

    pool: training images (L, K, C, H, W), K of each label; noise until calibrate() fills it.
    """

    pool: Tensor

    def __init__(self, network: nn.Module, pool: Tensor, settings: MixupInferenceDefense) -> None:
        super().__init__()
        self.network, self.settings = network, settings
        if settings.variant != "ol":
            self.declared_backward = "choice of partners as the logits of the image itself"
        self.register_buffer("pool", pool)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.network(x)
        if self.settings.variant == "ol":
            return self.network(self.mixture(x))
        direct = self.network(x)
        label = direct.detach().argmax(1)
        # Partners follow ŷ, in jumps that have no derivative; without this zero an attack would
        # not look for the x that turns ŷ, after which the partners are on its side.
        steer = direct - direct.detach()
        if self.settings.variant == "pl":
            return self.network(self.mixed(x, label, predicted=True)) + steer
        own = self.average(x, label, PL, predicted=True)
        other = self.average(x, label, OL, predicted=False)
        return switch(direct.detach().log_softmax(1), own, other, self.settings.gap) + steer

    def features(self, x: Tensor) -> Tensor:
        if self.settings.variant != "ol":  # pl: what steers its gradient is added to the logits
            raise InputError(
                f"mixup-inference(variant={self.settings.variant}) has no hidden activations of"
                " its own; write variant=ol, or detector=confidence or non-me"
            )
        return self.network.features(x if self.training else self.mixture(x))  # type: ignore[operator]

    @property
    def readout(self) -> nn.Module:
        return self.network.readout  # type: ignore[return-value]

    def mixture(self, x: Tensor) -> Tensor:
        """Every image with a partner by the label that the network gives it now; its gradient
        holds this label constant."""
        with torch.no_grad():
            label = self.network(x).argmax(1)
        return self.mixed(x, label, predicted=self.settings.variant == "pl")

    def mixed(self, x: Tensor, label: Tensor, predicted: bool) -> Tensor:
        """λ x + (1 - λ) s with s from the class `label` (N,), or from any other one."""
        labels, size = self.pool.shape[:2]
        share = self.settings.lam_pl if predicted else self.settings.lam_ol
        if not predicted:
            label = (label + torch.randint(1, labels, label.shape, device=x.device)) % labels
        partner = self.pool[label, torch.randint(size, label.shape, device=x.device)]
        return share * x + (1 - share) * partner

    def average(self, x: Tensor, label: Tensor, times: int, predicted: bool) -> Tensor:
        """(N, L) logarithm of the mean softmax over so many mixtures."""
        mixed = self.mixed(x.repeat(times, 1, 1, 1), label.repeat(times), predicted)
        logits = self.network(mixed).view(times, 1, len(x), -1)
        return MeanProbabilities().scores(Draw(logits))


def switch(direct: Tensor, own: Tensor, other: Tensor, gap: float) -> Tensor:
    """(N, L) log-probabilities: those of MI-PL (`own`) where their largest probability is less
    than `gap` below the largest of `direct`, else those of MI-OL (`other`)."""
    fall = direct.exp().amax(dim=1) - own.exp().amax(dim=1)
    return torch.where((fall < gap)[:, None], own, other)


@defense("mixup-inference")
class MixupInferenceDefense(Defense):
    """Mean softmax over mixtures of the image with training images, around any base.

    variant: `ol` (other labels), `pl` (predicted label) or `combined`. lam_pl, lam_ol: λ in [0, 1],
    the image's share; 1 is the base itself. Published: 0.5; for other labels 0.6 on interpolated
    adversarial training, the default here too (0.5 costs the quick network five points of clean
    accuracy), and 0.4 when combined, which is then the default. A λ is made for one base. draws:
    mixtures averaged (the code: 10 for pl, 30 for ol); combined makes its 5 + 15 in one draw, and
    draws=1 is then the default, but under `paper`. gap: in [0, 1], the
    fall of confidence from which on the combined rule turns to other labels. pool: training images
    kept per label. The pool of the authors' code holds the test images with their labels; here no
    evaluated image is in it. epochs: 0 keeps the base's weights; more go on training them, without
    mixing.

    The base gives ŷ and the logits, member by member; its own decision rule is not used. The
    published attacks do not see the mixing, or halve their own step; ours is EOT through it. Where
    partners follow ŷ (pl, combined), the gradient has the base's at x added to that of the mixture:
    without it MI-PL is a mask, which examples made for the base alone get past.
    """

    source: ClassVar[str] = "Pang et al. 2020, arXiv:1909.11515"
    wraps: ClassVar[bool] = True
    losses: ClassVar[Mapping[str, Loss]] = {"margin": Scored(MeanProbabilities()), "vote": Votes()}
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "paper": {
            "draws": 30,
            "lam_ol": 0.5,
            "pool": 100,
            "base": "mixup(crop=4, decay_at=[0.5, 0.75], epochs=200, flip=true, network=resnet50,"
            " optimizer=sgd, schedule=steps)",
        },
    }

    base: str | None = "mixup"
    epochs: Annotated[int, Field(ge=0)] = 0
    draws: Annotated[int, Field(ge=1), INFERENCE] = 10
    variant: Annotated[Literal["ol", "pl", "combined"], INFERENCE] = "ol"
    lam_pl: Annotated[float, Field(ge=0, le=1), INFERENCE] = 0.5
    lam_ol: Annotated[float, Field(ge=0, le=1), INFERENCE] = 0.6
    gap: Annotated[float, Field(ge=0, le=1), INFERENCE] = 0.2
    pool: Annotated[int, Field(ge=1)] = 50

    @model_validator(mode="before")
    @classmethod
    def _published(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("variant") == "combined":
            return {"draws": 1, "lam_ol": 0.4, **given}
        return given

    def build(self, shape: tuple[int, int, int], labels: int) -> nn.ModuleList:
        return nn.ModuleList(
            MixupInference(network, torch.rand(labels, self.pool, *shape), self)
            for base in self.bases()
            for network in base.build(shape, labels)
        )

    def calibrate(self, members: nn.ModuleList, dataset: Dataset) -> None:
        """The first training images of every label; fewer than `pool` are repeated."""
        for label, name in enumerate(dataset.labels):
            found = (dataset.train.y == label).nonzero()[:, 0]
            if not len(found):
                raise InputError(f"mixup-inference mixes with every label; {name} has no images")
            images = take(dataset.train, found[torch.arange(self.pool) % len(found)].tolist()).x
            for member in members:
                member.pool[label] = images  # type: ignore[operator]

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Towards one label: the partners of the predicted label are then on the attacker's
        side."""
        return [Stage(f"apgd(loss=vote, targets=9, steps={MEANS[budget].steps})")]

    @property
    def random(self) -> bool:
        shares = {
            "ol": (self.lam_ol,),
            "pl": (self.lam_pl,),
            "combined": (self.lam_pl, self.lam_ol),
        }
        return min(shares[self.variant]) < 1 or super().random
