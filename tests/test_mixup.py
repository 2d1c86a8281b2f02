"""mixup and interpolated adversarial training, against their formulas."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from robbench import datasets, registry
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.recipes import Batch
from robbench.training import train

SHAPE, LABELS = (1, 8, 8), 10
TINY = "network=resnet8(width=2), epochs=2, batch_size=16"
module = inspect.getmodule(registry.defenses.get("mixup"))


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:33] for tensor in digits.train)))


def fresh(spec):
    defense = resolve(spec)[0]
    torch.manual_seed(0)
    return defense, defense.build(SHAPE, LABELS)


def batch_of(n=16):
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Batch(x, torch.arange(n) % LABELS, x, LABELS)


def rng():
    return torch.Generator().manual_seed(0)


def test_nothing_mixed_is_standard_bit_for_bit(dataset):
    plain, unmixed = fresh(f"standard({TINY})"), fresh(f"mixup({TINY}, alpha=0)")
    for defense, members in (plain, unmixed):
        train(defense, members, dataset, 0, torch.device("cpu"))
    state = unmixed[1].state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain[1].state_dict().items())


def test_the_loss_is_the_mean_of_both_labels_losses_by_their_shares():
    batch, share = batch_of(), torch.linspace(0, 1, 16)
    partners = torch.randperm(16, generator=rng())
    mixed = module.mixup(batch, share, partners)
    defense, members = fresh(f"mixup({TINY})")
    logits = members.eval()[0](mixed.x)
    own, other = (
        F.cross_entropy(logits, y, reduction="none") for y in (batch.y, batch.y[partners])
    )
    found = defense.loss(members, mixed)
    torch.testing.assert_close(found, share * own + (1 - share) * other)


def test_images_are_mixed_with_the_shares_of_their_labels():
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    batch = Batch(x, torch.arange(4), x, 4)
    mixed = module.mixup(batch, torch.tensor([1, 0.75, 0.5, 0]), torch.tensor([1, 2, 3, 0]))
    values = (mixed.y * torch.arange(4.0)).sum(1)  # the image of label y is y everywhere
    assert torch.equal(mixed.x, values.view(4, 1, 1, 1).expand(4, 1, 2, 2))
    assert torch.equal(mixed.y.sum(1), torch.ones(4))


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_shares_follow_the_beta_distribution(alpha):
    n = 3000
    x = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1)
    defense, members = fresh(f"mixup({TINY}, alpha={alpha})")
    mixed = defense.batch(members, Batch(x, torch.arange(n), x, n), rng())
    picked = mixed.y[torch.arange(n), torch.arange(n)]
    lower = torch.minimum(picked, 1 - picked)  # either end may be the own one
    folded = stats.beta(alpha, alpha)
    result = stats.kstest(lower[lower > 0].numpy(), lambda v: 2 * folded.cdf(v))
    assert result.pvalue > 0.01


def test_interpolated_adversarial_training_mixes_after_the_search():
    spec = f"{TINY}, adversarial=pgd(eps=0.1, steps=2, clean=1)"
    batch = batch_of(LABELS)  # one image per label: the mixed labels are all shares there are
    defense, members = fresh(f"standard({spec})")
    unmixed = defense.batch(members, batch, rng())
    assert not torch.equal(unmixed.x, batch.x)
    defense, members = fresh(f"mixup({spec})")
    mixed = defense.batch(members, batch, rng())
    assert not torch.equal(mixed.y, torch.eye(LABELS))
    for before, after in ((unmixed.x, mixed.x), (unmixed.clean, mixed.clean)):
        torch.testing.assert_close(after, torch.einsum("nm,mchw->nchw", mixed.y, before))


def test_validation_sees_whole_images():
    defense, members = fresh(f"mixup({TINY})")
    batch = batch_of()
    assert defense.batch(members.eval(), batch, rng()) is batch
