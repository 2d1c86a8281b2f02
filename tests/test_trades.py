"""TRADES as a recipe of its own; its loss and its search are tested with the training loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from robbench import datasets
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.recipes import Batch
from robbench.training import train

TINY = "network=resnet8(width=2), epochs=1, batch_size=16"


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:32] for tensor in digits.train)))


def fresh(spec):
    defense = resolve(spec)[0]
    torch.manual_seed(0)
    return defense, defense.build((1, 8, 8), 10)


def test_it_is_the_standard_recipe_with_trades(dataset):
    recipes = [f"trades({TINY})", f"standard({TINY}, adversarial=trades(eps=0.2, steps=5))"]
    own, part = (fresh(recipe) for recipe in recipes)
    for defense, members in (own, part):
        train(defense, members, dataset, 0, torch.device("cpu"))
    weights = zip(own[1].parameters(), part[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_without_the_divergence_it_is_cross_entropy_on_clean_images():
    defense, members = fresh("trades(adversarial=trades(beta=0, eps=0.2, steps=2))")
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    batch = defense.batch(members, Batch(x, y, x, 10), torch.Generator().manual_seed(0))
    assert not torch.equal(batch.x, x)
    expected = F.cross_entropy(members[0](x), y, reduction="none")
    torch.testing.assert_close(defense.loss(members, batch), expected)
