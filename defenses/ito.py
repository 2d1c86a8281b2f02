"""Itô ensembles, paper 001 (Robust Ensembles of Neural Networks using Itô Processes).

The SDE dx = G dt + Σ(t) dB (section 3) discretised on the residual blocks: block i adds noise of
standard deviation σ(t) = ω / (1 + t) while training and at test. Members are fine-tuned from the
trained standard network with Adam (section 4); every member is asked several times, the majority
label is the answer, and without one the ensemble abstains. The paper leaves open what t is, where
the noise enters, and how votes are counted: each reading is an option here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.attacks.losses import Votes
from robbench.defense import INFERENCE, Defense, defense
from robbench.errors import InputError
from robbench.estimator import Loss, Rule, Vote


class Diffusion(nn.Module):
    """x + σ ξ, ξ standard normal, independent per element, image and pass."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn_like(x) if self.sigma else x


@defense("ito")
class ItoEnsemble(Defense):
    """M fine-tuned members × S draws, noise ω/(1+t) in every residual block, majority or abstain.

    omega: ω, in units of the activations. clock: what t is - `index` 0, 1, 2, …; `one-based`
    1, 2, 3, …; `fraction` i/N with Euler-Maruyama's sqrt(1/N). where: the noise enters before the
    block's last ReLU (`sum`), after it (`out`), or the residual branch (`branch`). downsampling:
    also in blocks that change the shape. ballot: `flat` over all M × S, or `nested`: a label per
    member first. quorum: `majority` (more than half) or `plurality`; ties always abstain.
    """

    source: ClassVar[str] = "paper 001: anonymous, Robust Ensembles using Itô Processes"
    joint: ClassVar[bool] = False
    losses: ClassVar[Mapping[str, Loss]] = {"vote": Votes()}  # adaptive.md, A.2: err goal
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 1, "base": "standard(epochs=3)"},
        "paper": {
            "network": "resnet50",
            "omega": 0.2,
            "members": 20,
            "draws": 20,
            "epochs": 40,
            "batch_size": 128,
            "lr": 1e-4,
            "schedule": "constant",
            "crop": 4,
            "flip": True,
            "base": "standard(batch_size=128, crop=4, epochs=200, flip=true, lr=0.1,"
            " optimizer=sgd, schedule=steps, weight_decay=0.0005)",
        },
        "paper:imagenet": {
            "network": "resnet50(form=imagenet)",
            "omega": 0.2,
            "members": 5,
            "draws": 20,
            "epochs": 40,
            "batch_size": 128,
            "lr": 1e-4,
            "schedule": "constant",
            "flip": True,
            "base": "torchvision:IMAGENET1K_V1",
        },
    }

    members: Annotated[int, Field(ge=1)] = 3
    draws: Annotated[int, Field(ge=1), INFERENCE] = 5
    base: str | None = "standard"
    epochs: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 0.005
    omega: Annotated[float, Field(ge=0)] = 0.4
    clock: Literal["index", "one-based", "fraction"] = "index"
    where: Literal["sum", "out", "branch"] = "sum"
    downsampling: bool = True
    ballot: Annotated[Literal["flat", "nested"], INFERENCE] = "flat"
    quorum: Annotated[Literal["majority", "plurality"], INFERENCE] = "majority"
    noise: Annotated[bool, INFERENCE] = True

    def prepare(self, network: nn.Module) -> nn.Module:
        blocks = getattr(network, "blocks", None)
        if not blocks:
            raise InputError(f"ito needs a residual network, not {self.network}; try resnet8")
        for index, block in enumerate(blocks):
            if self.downsampling or not block.downsamples:
                setattr(block, self.where, Diffusion(self.sigma(index, len(blocks))))
        return network

    @property
    def stochastic(self) -> bool:
        return self.noise and self.omega > 0

    def sigma(self, index: int, blocks: int) -> float:
        """The standard deviation in block `index` of `blocks`."""
        if not self.noise:
            return 0.0
        if self.clock == "fraction":
            return self.omega / (1 + index / blocks) * math.sqrt(1 / blocks)
        return self.omega / (1 + index + (self.clock == "one-based"))

    def rule(self) -> Rule:
        return Vote(nested=self.ballot == "nested", majority=self.quorum == "majority")
