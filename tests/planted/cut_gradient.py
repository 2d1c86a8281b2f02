"""Half of what the network sees comes by a path that is detached: every gradient is there, finite
and dense, and is not the derivative of the function."""

from torch import nn
from torch.nn import functional as F


class Cut(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        blurred = F.avg_pool2d(x, 3, stride=1, padding=1)
        return self.network(blurred + (x - blurred).detach())


def defend(network):
    return Cut(network)
