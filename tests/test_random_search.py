"""Random search against brute force, a binomial law and the largest value on a ball."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, random_search
from robbench.attacks.random_search import corner
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanLogits
from robbench.threat import Threat, distance, within

EPS = {"linf": "0.1", "l2": "0.8", "l1": "3"}


class Linear(nn.Module):
    """Two labels; the second one's logit is the dot product with w, the first one's `bar`."""

    def __init__(self, w, bar):
        super().__init__()
        self.w, self.bar = torch.as_tensor(w), bar

    def forward(self, x):
        height = x.flatten(1) @ self.w
        return torch.stack([torch.full_like(height, self.bar), height], dim=1)


def access_to(member, shape=(1, 8, 8), labels=10, **options):
    deployed = Deployed(nn.ModuleList([member]), MeanLogits(), shape, labels)
    return Access(deployed, gradients=False, **options)


def craft(access, x, y, tries, norm="linf", eps=None, seed=0):
    threat = Threat(norm=norm, eps=eps or EPS[norm])
    rng = torch.Generator().manual_seed(seed)
    return Configured.of(f"random-search(tries={tries})")(access, x, y, threat, rng)


def lost(access, points, y):
    return access.deployed.decide(points, 1)[0] != y


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(24)
    return subset.x, subset.y


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["linf", "l2", "l1"]), st.floats(0.01, 1))
def test_points_are_in_ball_and_box(seed, norm, eps):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 2, 3, 3, generator=rng).round(decimals=1)
    points = corner(x, norm, eps, rng)
    assert points.min() >= 0 and points.max() <= 1
    assert within(distance(points, x, norm), Threat(norm=norm, eps=eps)).all()


def test_points_of_the_linf_ball_are_its_corners_each_as_often():
    x = torch.full((8000, 1, 1, 3), 0.5)
    moved = corner(x, "linf", 0.25, torch.Generator().manual_seed(0)) - x
    assert (moved.abs() == 0.25).all()
    counts = torch.bincount(((moved > 0).flatten(1) * torch.tensor([1, 2, 4])).sum(1))
    assert len(counts) == 8 and stats.chisquare(counts.numpy()).pvalue > 0.01


def test_what_is_found_is_the_maximum_of_a_brute_force(network, digits):
    x, y = digits
    access = access_to(network, own=False)  # of an oracle no image leaves before the end
    found = craft(access, x, y, 25)
    rng = torch.Generator().manual_seed(0)
    points = torch.stack([x, *(corner(x, "linf", 0.1, rng) for _ in range(25))])
    logits = network(points.flatten(0, 1)).view(26, 24, 10)
    truth = logits.gather(2, y.expand(26, -1)[..., None])[..., 0]
    margins = logits.scatter(2, y.expand(26, -1)[..., None], -torch.inf).amax(2) - truth
    assert torch.equal(found, points[margins.argmax(0), torch.arange(24)])


def test_few_dimensions_give_the_largest_value_on_the_ball():
    """max <w, δ> over ‖δ‖∞ <= ε is ε ‖w‖₁."""
    w = torch.tensor([0.3, -1.0, 0.5])
    access = access_to(Linear(w, 9.0), (1, 1, 3), 2)
    x, y = torch.full((10, 1, 1, 3), 0.5), torch.zeros(10, dtype=torch.int64)
    found = craft(access, x, y, 100)
    torch.testing.assert_close((found - x).flatten(1) @ w, torch.full((10,), 0.18))


def test_the_share_found_is_binomial():
    """With p the share of the corners that cross, t tries cross with 1 - (1 - p)^t."""
    w, n, tries = torch.tensor([1.0, 0.8, 0.7, 0.6, 0.5]), 3000, 4
    signs = torch.tensor(list(itertools.product((-0.1, 0.1), repeat=5)))
    p = float((signs @ w > 0.21).double().mean())
    access = access_to(Linear(w, float(w.sum()) / 2 + 0.21), (1, 1, 5), 2)
    x, y = torch.full((n, 1, 1, 5), 0.5), torch.zeros(n, dtype=torch.int64)
    crossed = int(lost(access, craft(access, x, y, tries), y).sum())
    assert stats.binomtest(crossed, n, 1 - (1 - p) ** tries).pvalue > 0.01


@pytest.mark.parametrize("norm", EPS)
def test_more_tries_are_never_better_for_the_defense(norm, network, digits):
    x, y = digits
    access = access_to(network)
    outcomes = [lost(access, craft(access, x, y, n, norm), y) for n in (1, 10, 100)]
    for fewer, more in itertools.pairwise([lost(access, x, y), *outcomes]):
        assert more[fewer].all()


def test_an_image_that_is_lost_is_asked_about_no_more(network, digits, monkeypatch):
    monkeypatch.setattr(random_search, "TOGETHER", 1)
    x, y = digits
    access = access_to(network)
    wrong = (y + 1) % 10
    mixed = torch.where(torch.arange(len(y)) < 10, network(x).argmax(1), wrong)
    craft(access, x, mixed, 30, eps="1e-6")
    assert access.cost.queries == len(y) + 10 * 30


def test_points_asked_about_together_change_nothing(network, digits, monkeypatch):
    found = []
    for together in (1, 100, 512):
        monkeypatch.setattr(random_search, "TOGETHER", together)
        found.append(craft(access_to(network, own=False), *digits, 30))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_stochastic_defense_is_shown_what_it_loses_most_often():
    """Errs the more often the brighter the one pixel is: one of two corners is the right one."""

    class Coin(nn.Module):
        def forward(self, x):
            share = 0.5 + 4 * (x.flatten(1)[:, 0] - 0.5)
            wrong = (torch.rand(len(x)) < share).float()
            return torch.stack([1 - wrong, wrong], dim=1)

    x, y = torch.full((30, 1, 1, 1), 0.5), torch.zeros(30, dtype=torch.int64)
    torch.manual_seed(0)
    found = craft(access_to(Coin(), (1, 1, 1), 2, draws=20), x, y, 20)
    assert (found > 0.5).all()


def test_a_point_that_was_lucky_is_compared_once_more():
    """x is lost in half of the calls and corners in three tenths, but in others than x is: on one
    set of 20 draws a corner looks worse for an eighth of the images, on two for a sixtieth."""

    class Calm(nn.Module):
        def forward(self, x):
            side, u = (x - 0.5).flatten(1)[:, 0].sign(), torch.rand(len(x))
            wrong = torch.where(side == 0, u < 0.5, u > 0.7).float()
            return torch.stack([1 - wrong, wrong], dim=1)

    x, y = torch.full((500, 1, 1, 1), 0.5), torch.zeros(500, dtype=torch.int64)
    torch.manual_seed(0)
    found = craft(access_to(Calm(), (1, 1, 1), 2, draws=20), x, y, 5)
    assert (found != x).float().mean() < 0.06


def test_the_same_stream_gives_the_same_points(network, digits):
    first, again, other = (craft(access_to(network), *digits, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_target_is_what_counts(network, digits):
    x, y = digits
    threat = Threat(eps="0.5", target=3)
    rng = torch.Generator().manual_seed(0)
    found = Configured.of("random-search(tries=300)")(access_to(network), x, y, threat, rng)
    before, after = (int((network(points).argmax(1) == 3).sum()) for points in (x, found))
    assert after > before + 3


def test_without_a_radius_there_is_no_ball(network, digits):
    rng = torch.Generator()
    with pytest.raises(InputError, match="random-search needs an ε"):
        Configured.of("random-search")(access_to(network), *digits, Threat(eps=None), rng)
