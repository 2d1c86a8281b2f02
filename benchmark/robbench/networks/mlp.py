"""Multi-layer perceptron."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import Tensor, nn

from robbench.networks.network import Network, Shape


class MLP(Network):
    """Linear layers and ReLUs on all pixels (N, C*H*W); paper 002's 784-100-100-100-10 by default.

    Hidden weights start Xavier normal and the readout as torch does, as in that paper's code.
    """

    def __init__(
        self, shape: Shape, labels: int, *, hidden: tuple[int, ...] = (100, 100, 100)
    ) -> None:
        super().__init__(shape[0])
        sizes = (prod(shape), *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            linear = nn.Linear(inputs, outputs)
            nn.init.xavier_normal_(linear.weight)
            layers += [linear, nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.readout = nn.Linear(sizes[-1], labels)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(self.normalize(x))
