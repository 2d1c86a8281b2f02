"""The stochastic delta rule, paper 002 (Randomized Deep Learning Models against Adversarial
Attacks), section 5.

Every weight of a linear, convolution or LSTM layer, biases included, is a random variable
w ~ N(μ, Σ) with independent entries, drawn once per forward pass for the whole batch. `sdr-decay`
(section 5.1) lets Σ grow with the gradient and shrink on a schedule, `sdr-learnable` (section 5.2)
learns it by reparametrisation. What to do with a distribution of networks at test is an option of
both: take the means, one sample, or a vote of several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from robbench.attacks.suite import Budget, Stage, frozen
from robbench.defense import INFERENCE, Defense, defense
from robbench.networks.sampled import Law, Masked, laws, randomise
from robbench.rules import MeanLogits, Rule, Vote

# Section 6.1; `paper:cifar10` is its ResNet-18. Its LSTM reads 784 pixels with 130 units:
# network=lstm(hidden=130, sequence=pixels).
PAPER: Mapping[str, object] = {
    "network": "mlp",
    "epochs": 20,
    "batch_size": 64,
    "lr": 0.001,
    "schedule": "constant",
}


class Decaying(Law):
    """Normal weights whose spread follows the size of the gradient and decays (Algorithm 2).

    spread: Σ where it is a variance, else the standard deviation; no parameter, so that only
    `update` changes it.
    """

    spread: Tensor

    def __init__(self, spread: Tensor, is_variance: bool, at_test: bool) -> None:
        super().__init__(at_test)
        self.register_buffer("spread", spread)
        self.is_variance = is_variance
        self.period, self.rate, self.batch = 1, 1.0, 0

    def deviation(self, mean: Tensor) -> Tensor:
        return self.spread.sqrt() if self.is_variance else self.spread

    @torch.no_grad()
    def update(self, gradient: Tensor, beta: float, every_step: bool) -> None:
        """Eq. 3, second line, after a batch; and the decay where `period` divides its number."""
        self.batch += 1
        due = self.batch % self.period == 0
        if every_step or due:
            self.spread += beta * gradient.abs()
        if due:
            self.spread *= self.rate


class Learnable(Law):
    """Normal weights whose standard deviation is trained: softplus(raw), or raw itself if signed,
    as in the authors' code, where half of the deviations are negative (the law is the same)."""

    def __init__(self, deviation: Tensor, signed: bool, at_test: bool) -> None:
        super().__init__(at_test)
        self.signed = signed
        raw = deviation if signed else deviation + torch.log(-torch.expm1(-deviation))
        self.raw = nn.Parameter(raw)

    def deviation(self, mean: Tensor) -> Tensor:
        return self.raw if self.signed else F.softplus(self.raw)


class StochasticDelta(Defense):
    """What both rules share: where weights are random, and what is asked at test."""

    quiet: ClassVar[Mapping[str, object]] = {"test": "mean"}
    source: ClassVar[str] = "paper 002: Liu & Sha, Randomized Models against Adversarial Attacks"

    biases: bool = True
    test: Annotated[Literal["mean", "sample", "vote"], INFERENCE] = "mean"

    @model_validator(mode="before")
    @classmethod
    def _fifty(cls, given: Any) -> Any:
        """A vote is one of 50 (section 6.1) unless draws says how many."""
        if isinstance(given, dict) and given.get("test") == "vote":
            return {"draws": 50, **given}
        return given

    @model_validator(mode="after")
    def _several(self) -> StochasticDelta:
        if self.test == "vote" and self.draws < 2:
            raise ValueError("test = vote asks several draws; write draws=50, or test=sample")
        return self

    def law(self, mean: Tensor, inputs: int) -> Law | None:
        """The law of a tensor of weights with this mean, whose units have so many inputs."""
        raise NotImplementedError

    def prepare(self, network: nn.Module) -> nn.Module:
        def law(name: str, mean: Tensor, inputs: int) -> Law | None:
            fixed = name.startswith("bias") and not self.biases
            return None if fixed else self.law(mean.detach(), inputs)

        for layer in list(network.modules()):
            randomise(layer, law)
        return network

    def start(self, members: nn.ModuleList, sources: nn.ModuleList) -> None:
        """The base gives the means; how wide the weights spread stays as built."""
        for index, member in enumerate(members):
            spreads = {k: v for k, v in member.state_dict().items() if ".laws." in k}
            member.load_state_dict({**spreads, **sources[index % len(sources)].state_dict()})

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Fixed samples of the weights; that of the mean weights is tried in every suite."""
        return [frozen(budget)] if self.stochastic else []

    @property
    def random(self) -> bool:
        return self.test != "mean"

    def rule(self) -> Rule:
        if self.test == "vote":
            return Vote(majority=False)
        return MeanLogits() if self.test == "sample" else super().rule()


@defense("sdr-decay")
class SDRDecay(StochasticDelta):
    """Σ <- Σ + β |∇L| (eq. 3) and Σ <- ζ Σ on a schedule τ (Algorithm 2). Means at test.

    beta: β. zeta: ζ. tau: τ in epochs (0.5: the twice per epoch of section 6.1). spread: Σ is the
    `variance` (the text) or the standard `deviation` (the code). grows: only in the batches
    `with-decay`, just before it (the code), or in `every-step` (the text), where larger spreads
    make larger gradients make larger spreads: with the text's β, ζ and τ its MLP diverges in the
    first epoch on MNIST under either reading of Σ, hence not the default; tau=0.1 with
    spread=deviation holds. anneal: ζ of epoch e = 0, 1, 2, … is ζ exp(-anneal (e - 1)), and ζ in
    epoch 0; 0 (the text) or 0.1 (the code), which leaves a deterministic network.
    initial: the text gives no first Σ; deviations start uniform in [0, initial · sqrt(2 / weights
    of the tensor)], which is the code's range. distribution: `normal`, or `binomial` (section 5):
    every weight is zero with probability p, else scaled by 1 / (1 - p), and β, ζ, τ, initial have
    no part in it; with biases=false this is DropConnect on every layer. biases: whether they are
    random too. base: its weights are the first means.

    test: `mean` (section 5.1: deterministic), `sample` (the mean logits of `draws` networks; the
    code's way) or `vote` (the label of most of 50 draws, ties abstain; section 5.3.2). beta=0 with
    initial=0 is the plain network.
    """

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},
        "paper": PAPER,
        "paper:cifar10": {**PAPER, "network": "resnet18"},
    }

    beta: Annotated[float, Field(ge=0)] = 0.05
    zeta: Annotated[float, Field(gt=0, le=1)] = 0.7
    tau: Annotated[float, Field(gt=0)] = 0.5
    spread: Literal["variance", "deviation"] = "variance"
    grows: Literal["with-decay", "every-step"] = "with-decay"
    anneal: Annotated[float, Field(ge=0)] = 0.0
    initial: Annotated[float, Field(ge=0)] = 0.5
    distribution: Literal["normal", "binomial"] = "normal"
    p: Annotated[float, Field(ge=0, lt=1)] = 0.2

    def law(self, mean: Tensor, inputs: int) -> Law:
        at_test, is_variance = self.test != "mean", self.spread == "variance"
        if self.distribution == "binomial":
            return Masked(self.p, at_test)
        deviation = self.initial * math.sqrt(2 / mean.numel()) * torch.rand_like(mean)
        return Decaying(deviation.square() if is_variance else deviation, is_variance, at_test)

    def start_training(self, members: nn.ModuleList, steps: int) -> None:
        for _, law in laws(members):
            if isinstance(law, Decaying):
                law.period = max(1, round(self.tau * steps))

    def start_epoch(self, members: nn.ModuleList, epoch: int) -> None:
        for _, law in laws(members):
            if isinstance(law, Decaying):
                law.batch = 0
                law.rate = self.zeta * math.exp(-self.anneal * max(0, epoch - 1))

    def after_step(self, members: nn.ModuleList, step: int) -> None:
        for mean, law in laws(members):
            if isinstance(law, Decaying) and mean.grad is not None:
                law.update(mean.grad, self.beta, self.grows == "every-step")


@defense("sdr-learnable")
class SDRLearnable(StochasticDelta):
    """w = μ + σ ξ with trained μ and σ (section 5.2), cross-entropy only. One sample at test.

    initial: the text gives no first σ; it starts at initial / sqrt(inputs of a unit), about the
    code's at 1, which short trainings do not unlearn: one sample of the ResNet-8 on digits is then
    right on 93 %, and on 97 % at 0.5. 0: no weight is random and σ is not there, the plain
    network. scale: σ is `softplus` of what is trained, or `signed`, the trained number itself (the
    code), started normal with that deviation. weight_decay reaches what is trained: it pulls a
    signed σ to 0 (the code, 1e-4) but softplus to log 2, so keep it 0 there. biases: whether they
    are random too. base: its weights are the first means.

    test: `sample` (the mean logits of `draws` networks: 1 in the text's table 2, 10 in the code),
    `vote` (the label of most draws, ties abstain; 50 as in section 6.1) or `mean`, the
    deterministic sibling to transfer from. A sample is attacked by the mean cross-entropy over EOT
    draws, a vote by the margins of its draws.
    """

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3},
        "paper": PAPER,
        "paper:cifar10": {**PAPER, "network": "resnet18"},
    }

    test: Annotated[Literal["mean", "sample", "vote"], INFERENCE] = "sample"
    initial: Annotated[float, Field(ge=0)] = 0.5
    scale: Literal["softplus", "signed"] = "softplus"

    def law(self, mean: Tensor, inputs: int) -> Law | None:
        if not self.initial:
            return None
        deviation = torch.full_like(mean, self.initial / math.sqrt(inputs))
        if self.scale == "signed":
            deviation = deviation * torch.randn_like(mean)
        return Learnable(deviation, self.scale == "signed", self.test != "mean")

    @property
    def random(self) -> bool:
        return super().random and self.initial > 0
