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
from robbench.attacks.suite import MEANS, Budget, Stage
from robbench.defense import INFERENCE, Defense, defense
from robbench.errors import InputError
from robbench.rules import Loss, Rule, Vote


class Diffusion(nn.Module):
    """x + σ ξ, ξ standard normal, independent per image and pass.

    full: Σ is the matrix whose every entry is σ, as the paper's derivation has it. Its noise is
    one number for all n elements of an image, of standard deviation sqrt(n) σ; else Σ is diagonal
    and ξ independent per element.
    """

    def __init__(self, sigma: float, full: bool = False) -> None:
        super().__init__()
        self.sigma, self.full = sigma, full

    def forward(self, x: Tensor) -> Tensor:
        if not self.sigma:
            return x
        if not self.full:
            return x + self.sigma * torch.randn_like(x)
        shared = torch.randn(len(x), *[1] * (x.dim() - 1), device=x.device, dtype=x.dtype)
        return x + math.sqrt(x[0].numel()) * self.sigma * shared


@defense("ito")
class ItoEnsemble(Defense):
    """M fine-tuned members × S draws, noise ω/(1+t) in every residual block, majority or abstain.

    omega: ω, in units of the activations. clock: what t is - the block's `index` 0, 1, 2, …;
    `one-based` 1, 2, 3, …; `fraction` i/N of N blocks; `epoch`, the time of training, which stays
    at the last epoch when deployed. step: Δt - `unit`, or `fraction` 1/N with Euler-Maruyama's
    sqrt(1/N) on the noise. matrix: Σ is `diagonal`, or `full` with all entries alike. where: the
    noise enters before the block's last ReLU (`sum`), after it (`out`), or the residual branch
    (`branch`). downsampling: also in blocks that change the shape. ballot: `flat` over all M × S,
    or `nested`: a label per member first. quorum: `majority` (more than half), `half` (at least
    half) or `plurality`; ties always abstain.

    The paper gives neither batch size nor augmentation nor the epochs on ImageNet: those of the
    presets `paper` are the usual ones.
    """

    source: ClassVar[str] = "paper 001: anonymous, Robust Ensembles using Itô Processes"
    losses: ClassVar[Mapping[str, Loss]] = {"vote": Votes()}  # towards an error
    quiet: ClassVar[Mapping[str, object]] = {"noise": False}
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
    clock: Literal["index", "one-based", "fraction", "epoch"] = "index"
    step: Literal["unit", "fraction"] = "unit"
    matrix: Literal["diagonal", "full"] = "diagonal"
    where: Literal["sum", "out", "branch"] = "sum"
    downsampling: bool = True
    ballot: Annotated[Literal["flat", "nested"], INFERENCE] = "flat"
    quorum: Annotated[Literal["majority", "half", "plurality"], INFERENCE] = "majority"
    noise: Annotated[bool, INFERENCE] = True

    @property
    def joint(self) -> bool:
        return False

    def prepare(self, network: nn.Module) -> nn.Module:
        blocks = getattr(network, "blocks", None)
        if not blocks:
            raise InputError(f"ito needs a residual network, not {self.network}; try resnet8")
        for index, block in enumerate(blocks):
            if self.downsampling or not block.downsamples:
                sigma = self.sigma(index, len(blocks), self.epochs - 1)
                setattr(block, self.where, Diffusion(sigma, self.matrix == "full"))
        return network

    def start_epoch(self, members: nn.ModuleList, epoch: int) -> None:
        for member in members:
            for index, block in enumerate(member.blocks):  # type: ignore[arg-type]
                noise = getattr(block, self.where)
                if isinstance(noise, Diffusion):
                    noise.sigma = self.sigma(index, len(member.blocks), epoch)  # type: ignore[arg-type]

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Votes for one label: an error must have the majority of them."""
        return [Stage(f"apgd(loss=vote, targets=9, steps={MEANS[budget].steps})")]

    @property
    def random(self) -> bool:
        return self.noise and self.omega > 0

    def sigma(self, index: int, blocks: int, epoch: int) -> float:
        """The standard deviation in block `index` of `blocks`, in this epoch of training."""
        if not self.noise:
            return 0.0
        times = {
            "index": index,
            "one-based": index + 1,
            "fraction": index / blocks,
            "epoch": epoch,
        }
        return self.omega / (1 + times[self.clock]) * (blocks**-0.5 if self.step != "unit" else 1)

    def rule(self) -> Rule:
        return Vote(
            nested=self.ballot == "nested",
            majority=self.quorum != "plurality",
            strict=self.quorum == "majority",
        )
