"""Images at a random size and place on the canvas (Xie et al. 2018, arXiv:1711.01991), attacked as
if they stood still: one draw per step."""

import random

from torch import nn
from torch.nn import functional as F


class Resized(nn.Module):
    def __init__(self, network, smallest):
        super().__init__()
        self.network, self.smallest = network, smallest

    def forward(self, x):
        side = x.shape[-1]
        size = random.randint(self.smallest, side)
        left, top = random.randint(0, side - size), random.randint(0, side - size)
        small = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        return self.network(F.pad(small, (left, side - size - left, top, side - size - top)))


def defend(network):
    return Resized(network, 6)
