"""ARC against gradient ascent on the expected loss, closed forms and linear programming."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.arc import Member
from robbench.attacks.losses import margin
from robbench.deployed import Deployed
from robbench.rules import MeanProbabilities
from robbench.threat import Threat, distance, within

SHAPE = (1, 8, 8)
DUALS = {"linf": 1, "l2": 2}


def access_to(*members, labels=10, shape=SHAPE, **options):
    deployed = Deployed(nn.ModuleList(members), MeanProbabilities(), shape, labels)
    return Access(deployed, **options)


def craft(spec, access, x, y, threat, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


def fooled(access, points, y):
    """(N,) share of the members that err."""
    with torch.no_grad():
        labels = torch.stack([member(points).argmax(1) for member in access.deployed.members])
    return (labels != y).float().mean(dim=0)


def expected_loss(draw, y, target):
    """Mean cross-entropy of the members: what an attack on the expectation climbs."""
    losses = [F.cross_entropy(scores, y, reduction="none") for scores in draw.logits.flatten(0, 1)]
    return torch.stack(losses).mean(dim=0)


class Half(nn.Module):
    """Two labels: 0 on the side of the origin on which weight · (x - 0.5) + bias > 0."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x):
        value = (x - 0.5).flatten(1) @ self.weight + self.bias
        return torch.stack([value, 0 * value], dim=1)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


@pytest.fixture(scope="module")
def networks():
    """Three networks of one recipe from different starts."""
    train = datasets.load("digits").train
    trained = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(network(train.x), train.y).backward()
            optimizer.step()
        trained.append(network.requires_grad_(False))
    return trained


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(48)
    return subset.x, subset.y


@pytest.mark.parametrize("norm", DUALS)
def test_two_opposite_members_escape_the_expected_loss_and_not_arc(norm):
    # the steeper member is out of reach, and its gradient leads away from the other's boundary
    direction = torch.tensor([1.0, 0.0])
    members = [Half(2 * direction, 0.6), Half(-0.1 * direction, 0.015)]
    access = access_to(*members, labels=2, shape=(1, 1, 2), losses={"expected": expected_loss})
    x, y, threat = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0]), Threat(norm=norm, eps="0.2")
    access.deployed.chunk = 1000
    starts = x.expand(200, 1, 1, 2), y.expand(200)  # each starts somewhere else in the ball
    ascents = craft("pgd(loss=expected, steps=20)", access, *starts, threat)
    assert not fooled(access, ascents, y.expand(200)).any()
    assert fooled(access, craft("arc", access, x, y, threat), y).item() == 0.5


def linear_members(seed, count):
    """Members that are right at the middle of the box, and their distances to it (count,)."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, 6, generator=rng) * torch.rand(count, 1, generator=rng) * 3
    bias = torch.rand(count, generator=rng) * weight.abs().sum(dim=1) * 0.2
    return weight, bias


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.sampled_from(list(DUALS)), st.integers(1, 4), st.integers(0, 2**31))
def test_linear_members_are_fooled_if_and_only_if_one_can_be(norm, count, seed):
    weight, bias = linear_members(seed, count)
    nearest = (bias / torch.linalg.vector_norm(weight, ord=DUALS[norm], dim=1)).min().item()
    access = access_to(*map(Half, weight, bias), labels=2, shape=(1, 1, 6))
    x, y = torch.full((1, 1, 1, 6), 0.5), torch.tensor([0])
    for share in (0.98, 1.02):
        eps = round(nearest * share, 6)
        if not 1e-3 < eps < 0.5:
            continue
        answer = craft("arc(steps=1)", access, x, y, Threat(norm=norm, eps=str(eps)))
        assert bool(fooled(access, answer, y) > 0) == (share > 1)


def most_fooled(weight, bias, eps):
    """How many members a point of the l∞ ball around the middle fools, by linear programming."""
    for size in range(len(weight), 0, -1):
        for chosen in itertools.combinations(range(len(weight)), size):
            rows = list(chosen)
            rest = linprog(
                np.zeros(weight.shape[1]), weight[rows], -bias[rows] - 1e-3, bounds=(-eps, eps)
            )
            if rest.success:
                return size
    return 0


def test_nearly_as_many_of_two_linear_members_are_fooled_as_can_be():
    found, possible = 0.0, 0
    x, y = torch.full((1, 1, 1, 6), 0.5), torch.tensor([0])
    for seed in range(30):
        weight, bias = linear_members(seed, 2)
        access = access_to(*map(Half, weight, bias), labels=2, shape=(1, 1, 6))
        answer = craft("arc(steps=3)", access, x, y, Threat(eps="0.15"))
        found += 2 * fooled(access, answer, y).item()
        possible += most_fooled(weight.double().numpy(), bias.double().numpy(), 0.15)
    assert possible > 30 and found >= 0.9 * possible


@pytest.mark.parametrize("norm", DUALS)
@pytest.mark.parametrize("light", ["true", "false"])
def test_trained_members_lose_more_than_to_pgd_on_any_expected_loss(norm, light, networks, digits):
    x, y = digits
    threat = Threat(norm=norm, eps="0.1" if norm == "linf" else "0.5")
    access = access_to(*networks, losses={"expected": expected_loss})
    ours = fooled(access, craft(f"arc(steps=6, light={light})", access, x, y, threat), y).mean()
    for loss in ("expected", "vote", "ce"):
        theirs = craft(f"pgd(steps=40, loss={loss})", access, x, y, threat)
        assert ours > fooled(access, theirs, y).mean() + 0.1


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    st.sampled_from(list(DUALS)),
    st.sampled_from(["arc(steps=3)", "arc(steps=2, restarts=2)", "arc(steps=3, step=0.9)"]),
    st.fractions("1/255", 1, max_denominator=255),
    st.integers(0, 2**31),
)
def test_results_are_in_ball_and_box(norm, spec, eps, seed):
    torch.manual_seed(seed)
    x, y = torch.rand(2, *SHAPE).round(decimals=1), torch.tensor([seed % 10, 0])
    members = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
    threat = Threat(norm=norm, eps=eps)
    answer = craft(spec, access_to(*members), x, y, threat, seed)
    assert answer.min() >= 0 and answer.max() <= 1
    assert within(distance(answer, x, norm), threat).all()


@pytest.mark.parametrize("norm", DUALS)
def test_no_member_that_errs_is_won_back(norm, networks, digits):
    x, y = digits
    access = access_to(*networks)
    y = y.clone()
    y[::2] = networks[0](x[::2]).argmax(1).add(1) % 10  # the members err on these already
    answer = craft("arc(steps=2)", access, x, y, Threat(norm=norm, eps="0.02"))
    before, after = fooled(access, x, y), fooled(access, answer, y)
    assert before.any() and (after >= before).all()


def test_restarts_do_not_lose_what_was_found(networks, digits):
    x, y = digits
    access, threat = access_to(*networks), Threat(eps="0.08")

    one, four = (
        craft(spec, access, x, y, threat) for spec in ("arc(steps=2)", "arc(steps=2, restarts=4)")
    )
    lost = [access.deployed.decide(points, 1)[0] != y for points in (one, four)]
    assert (lost[1] >= lost[0]).all()
    share = [fooled(access, points, y) for points in (one, four)]
    same = lost[0] == lost[1]
    assert (share[1] >= share[0])[same].all() and share[1].mean() > share[0].mean()


def test_a_target_is_reached_by_more_members_than_chance(networks, digits):
    x, y = digits
    access = access_to(*networks)
    answer = craft("arc", access, x, y, Threat(eps="0.3", target=5))
    aim = torch.where(y == 5, 6, 5)
    labels = torch.stack([network(answer).argmax(1) for network in networks])
    assert (labels == aim).float().mean() > 0.9


def test_stochastic_members_lose_in_fresh_draws(networks, digits):
    x, y = digits
    members = [nn.Sequential(Noise(), network) for network in networks[:2]]
    torch.manual_seed(0)
    access = access_to(*members, draws=10)
    answer = craft("arc(steps=5)", access, x, y, Threat(eps="0.1"))
    before = torch.stack([fooled(access, x, y) for _ in range(30)]).mean()
    after = torch.stack([fooled(access, answer, y) for _ in range(30)]).mean()
    assert after > before + 0.3


def test_the_loss_of_a_member_has_the_gradient_of_that_member_alone(networks, digits):
    x, y = digits
    step = access_to(*networks).gradient(x, y, Member(1, margin))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(margin(networks[1](leaf), y).sum(), leaf)
    torch.testing.assert_close(step.gradient, expected)


def test_an_image_that_all_members_lose_costs_no_more(networks, digits):
    x = digits[0]
    wrong = (networks[0](x).argmax(1) + 5) % 10
    access = access_to(networks[0], networks[0])
    craft("arc(steps=9)", access, x, wrong, Threat(eps="0.1"))
    # one round: the start, and of each of two members a gradient and a question; two passes each
    assert access.cost.forwards == 5 * 2 * len(x)
