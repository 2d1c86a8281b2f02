"""DropConnect and dropout, the randomised baselines of paper 002 (section 4).

DropConnect (Wan et al. 2013, ICML) sets weights of fully-connected layers to zero at random,
dropout (Srivastava et al. 2014, JMLR 15) what these layers read. Both are regularisers whose
randomness ends with training; left on at test they are a randomised defense, by accident in the
evaluation of paper 002.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from robbench.attacks.suite import Budget, Stage, frozen
from robbench.defense import INFERENCE, Defense, defense
from robbench.errors import InputError
from robbench.networks.sampled import KINDS, Law, Masked, randomise
from robbench.rules import MeanProbabilities, Rule, Vote


class Dropping(Defense):
    """What both share: the probability to drop, and what is asked at test."""

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quick": {},
        "quick:mnist": {"epochs": 3, "lr": 0.003},
        # sections 6.1 and 6.2, MNIST
        "paper": {"network": "mlp", "epochs": 20, "lr": 0.001, "schedule": "constant"},
    }

    p: Annotated[float, Field(ge=0, lt=1)] = 0.2
    test: Annotated[Literal["mean", "sample", "vote"], INFERENCE] = "mean"

    @model_validator(mode="before")
    @classmethod
    def _fifty(cls, given: Any) -> Any:
        """A vote is one of 50 (section 6.1) unless draws says how many."""
        if isinstance(given, dict) and given.get("test") == "vote":
            return {"draws": 50, **given}
        return given

    @model_validator(mode="after")
    def _several(self) -> Dropping:
        if self.test == "vote" and self.draws < 2:
            raise ValueError("test = vote asks several draws; write draws=50, or test=sample")
        return self

    def own_attacks(self, budget: Budget) -> list[Stage]:
        """Fixed masks; that of the mean weights is tried in every suite."""
        return [frozen(budget)] if self.stochastic else []

    @property
    def random(self) -> bool:
        return self.test != "mean" and self.p > 0

    def rule(self) -> Rule:
        return Vote(majority=False) if self.test == "vote" else MeanProbabilities()


@defense("dropconnect")
class DropConnect(Dropping):
    """Each weight of a fully-connected layer is dropped with probability p, else scaled by
    1 / (1 - p); one mask per forward pass for the whole batch (Wan et al. draw one per image).

    readout: also the last layer (the text; the code leaves it out, where other fully-connected
    layers are needed). Biases and other kinds of layers stay as they are. Randomness only at test
    is base=standard with epochs=0.

    test: `mean` weights, deterministic; `sample`: masks stay on, the mean softmax of `draws`
    networks (what paper 002 scored, with 1); `vote`: the label of most of 50 draws, ties abstain.
    p=0 is the plain network.
    """

    quiet: ClassVar[Mapping[str, object]] = {"test": "mean"}
    source: ClassVar[str] = "paper 002, section 4; Wan et al. 2013, DropConnect"

    readout: bool = True

    def prepare(self, network: nn.Module) -> nn.Module:
        def law(name: str, mean: Tensor, inputs: int) -> Law | None:
            return Masked(self.p, self.test != "mean") if name == "weight" else None

        layers = [
            layer
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear) and (self.readout or name != "readout")
        ]
        if not layers:
            raise InputError(
                f"{self.network} has no fully-connected layer but its last; write readout=true"
            )
        for layer in layers:
            randomise(layer, law)
        return network


@defense("dropout")
class Dropout(Dropping):
    """What a fully-connected layer reads is dropped with probability p, else scaled by
    1 / (1 - p), anew for every image; pixels are not dropped.

    Paper 002 has no p for it: the default is that of its DropConnect. Randomness only at test is
    base=standard with epochs=0.

    test: `mean`: off, deterministic; `sample`: kept on, the mean softmax of `draws` passes (Gal &
    Ghahramani 2016, arXiv:1506.02142, section 4); `vote`: the label of most of 50 draws, ties
    abstain. p=0 is the plain network.
    """

    quiet: ClassVar[Mapping[str, object]] = {"test": "mean"}
    source: ClassVar[str] = "paper 002, section 4; Srivastava et al. 2014, Dropout"

    def prepare(self, network: nn.Module) -> nn.Module:
        _, *hidden = (layer for layer in network.modules() if isinstance(layer, tuple(KINDS)))
        for layer in hidden:  # the first reads pixels
            if isinstance(layer, nn.Linear):
                hook = partial(_dropped, p=self.p, at_test=self.test != "mean")
                layer.register_forward_pre_hook(hook)
        return network


def _dropped(layer: nn.Module, read: tuple[Tensor], p: float, at_test: bool) -> Tensor:
    return F.dropout(read[0], p, layer.training or at_test)
