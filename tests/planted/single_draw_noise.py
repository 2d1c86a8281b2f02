"""Gaussian noise on every image, attacked along the gradient of one draw at a time: what
breaks that draw is taken for broken, and the next one says otherwise (Athalye et al. 2018,
arXiv:1802.00420)."""

import torch
from torch import nn


class Noisy(nn.Module):
    def __init__(self, network, sigma):
        super().__init__()
        self.network, self.sigma = network, sigma

    def forward(self, x):
        return self.network(x + self.sigma * torch.randn_like(x))


def defend(network):
    return Noisy(network, 0.3)
