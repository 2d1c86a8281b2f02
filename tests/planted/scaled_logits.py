"""Logits of 10,000 times their size: the softmax of a right answer is exactly 1 in float32, and
cross-entropy has no gradient (gradient masking; Carlini & Wagner 2016, arXiv:1607.04311)."""

from torch import nn


class Scaled(nn.Module):
    def __init__(self, network, by):
        super().__init__()
        self.network, self.by = network, by

    def forward(self, x):
        return self.by * self.network(x)


def defend(network):
    return Scaled(network, 1e4)
