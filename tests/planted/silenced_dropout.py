"""Dropout that stays on when deployed, and an attack that puts the network into evaluation mode as
libraries do: it breaks a network that nobody deploys."""

from torch import nn

from robbench.attacks import Configured


class Dropping(nn.Module):
    def __init__(self, network, p):
        super().__init__()
        self.dropout, self.network = nn.Dropout(p), network
        self.dropout.train()

    def forward(self, x):
        return self.network(self.dropout(x))


def defend(network):
    return Dropping(network, 0.3)


def silencing(access, x, y, threat, rng):
    """PGD, after all that is random has been told that it is not."""
    for module in access.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return Configured.of("pgd")(access, x, y, threat, rng)
