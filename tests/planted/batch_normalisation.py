"""Pixels normalised by the statistics of whatever batch is asked about: the answer to an image
depends on the images beside it, and an attack on many at once moves them all."""

from torch import nn


class PerBatch(nn.Module):
    def __init__(self, network, mean, std):
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, x):
        return self.network((x - x.mean()) / x.std() * self.std + self.mean)


def defend(network):
    return PerBatch(network, 0.3, 0.38)
