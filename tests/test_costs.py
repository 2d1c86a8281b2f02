"""Costs of every native attack, counted a second time by hooks inside the attacked network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robbench import datasets, registry
from robbench.access import Access
from robbench.attacks import Configured, find
from robbench.deployed import Deployed
from robbench.rules import MeanProbabilities
from robbench.threat import NORM_NAMES, Threat

SHAPE = (1, 8, 8)
FEWER = {  # the same code at a price that a test can pay
    "cw": "steps=5, search=2", "ead": "steps=5, search=2", "fab": "steps=4", "arc": "steps=2",
    "spsa": "steps=2, samples=8", "square": "queries=40", "hopskipjump": "steps=2, evaluations=10",
    "brendel-bethge": "steps=4, starts=5", "autoattack": "steps=5, queries=20", "apgd": "steps=6",
    "fgsm-line-search": "radii=20", "opgd": "steps=5", "joint": "steps=5, search=2",
    "feature-matching": "steps=5", "jsma": "gamma=0.1", "local-search": "rounds=5",
    "deepfool": "steps=5", "saa": "draws=2, attack='apgd(steps=3)'",
}  # fmt: skip


class Counted(nn.Module):
    """A network that counts the images that pass through it, forwards and backwards."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
        self.readout = nn.Linear(16, 10)
        self.forwards = self.backwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.features(x))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += len(x)
        hidden = self.hidden(x)
        if hidden.requires_grad:
            hidden.register_hook(self._back(len(x)))
        return hidden

    def _back(self, n: int):
        def count(gradient: torch.Tensor) -> None:
            self.backwards += n

        return count


def names():
    """All but the papers' variants, and suites, whose stages come from a runner (test_suite)."""
    plain = [name for name in registry.attacks if not name.endswith(":as-published")]
    return [name for name in plain if not find(name).suite]


@pytest.mark.parametrize("name", names())
def test_every_pass_is_counted_and_none_that_was_not_made(name):
    entry = find(name)
    members = nn.ModuleList([Counted(seed) for seed in range(2)])
    access = Access(
        Deployed(members, MeanProbabilities(), SHAPE, 10), gradients=entry.needs == "gradients"
    )
    for member in members:
        member.forwards = member.backwards = 0
    part = datasets.load("digits").subset(6)
    norm = next(norm for norm in NORM_NAMES if norm in entry.norms)
    eps = None if entry.minimal or norm == "none" else "0.05"
    spec = f"{name}({FEWER[entry.name]})" if entry.name in FEWER else name
    rng = torch.Generator().manual_seed(0)
    Configured.of(spec)(access, part.x, part.y, Threat(norm=norm, eps=eps), rng)
    assert access.cost.forwards == sum(member.forwards for member in members)
    assert access.cost.backwards == sum(member.backwards for member in members)
    assert access.cost.queries * len(members) == access.cost.forwards
