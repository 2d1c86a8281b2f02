"""APGD against its authors' code (pyautoattack), closed forms, and where theirs goes wrong."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.losses import Votes
from robbench.deployed import Deployed
from robbench.metrics import LOST
from robbench.rules import MeanLogits, Vote
from robbench.threat import Threat, distance, project_l1, within

SHAPE = (1, 8, 8)
EPS = {"linf": 0.06, "l2": 0.4, "l1": 1.2}
THEIRS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits").subset(48)


def access_to(*members, rule=None, per_call=1, **options):
    deployed = Deployed(nn.ModuleList(members), rule or MeanLogits(), SHAPE, 10, per_call)
    return Access(deployed, **options)


def craft(spec, access, digits, norm="linf", eps=None, seed=0):
    threat = Threat(norm=norm, eps=str(eps or EPS[norm]))
    rng = torch.Generator().manual_seed(seed)
    return Configured.of(spec)(access, digits.x, digits.y, threat, rng)


def theirs(kind, network, norm, **options):
    large = norm == "l1"
    return kind(
        network, norm=THEIRS[norm], eps=EPS[norm], seed=0, device="cpu", n_restarts=1,
        use_largereps=large, **options,
    )  # fmt: skip


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_the_same_images_break_as_with_the_authors_code(network, digits, norm, loss):
    with warnings.catch_warnings(action="ignore"):  # of zero gradients, theirs
        other = theirs(APGDAttack, network, norm, n_iter=50, loss=loss).perturb(digits.x, digits.y)
    ours = craft(f"apgd(loss={loss}, steps=50)", access_to(network), digits, norm)
    right = [network(x).argmax(1) == digits.y for x in (ours, other)]
    assert torch.equal(*right)
    assert not right[0].all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_best_points_are_those_of_the_authors_code(network, digits, norm):
    attack = theirs(APGDAttack, network, norm, n_iter=50, loss="ce")
    attack.init_hyperparam(digits.x)
    torch.manual_seed(0)
    other = attack.attack_single_run(digits.x, digits.y)[0]
    # an oracle's images all climb on: nothing leaves the batch
    ours = craft("apgd(loss=ce, steps=50)", access_to(network, own=False), digits, norm)
    losses = [nn.functional.cross_entropy(network(x), digits.y, reduction="none")
              for x in (ours, other)]  # fmt: skip
    apart = (losses[0] - losses[1]).abs()
    assert (apart < 1e-4).float().mean() > 0.9  # rounding, the processor's, sends a few elsewhere
    assert apart.max() < 0.05


@pytest.mark.parametrize("norm", EPS)
def test_towards_nine_targets_the_same_images_break_as_with_the_authors_code(network, digits, norm):
    attack = theirs(APGDAttack_targeted, network, norm, n_iter=20, n_target_classes=9)
    with warnings.catch_warnings(action="ignore"):
        other = attack.perturb(digits.x, digits.y)
    ours = craft("apgd(loss=dlr, targets=9, steps=20)", access_to(network), digits, norm)
    assert torch.equal(*(network(x).argmax(1) == digits.y for x in (ours, other)))


@pytest.mark.parametrize("norm", EPS)
def test_it_stays_in_ball_and_box(network, digits, norm):
    found = craft("apgd(steps=10)", access_to(network), digits, norm)
    threat = Threat(norm=norm, eps=str(EPS[norm]))
    assert within(distance(found, digits.x, norm), threat).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_passes_are_those_counted_by_hand(network, digits):
    access = access_to(network, own=False)  # whose images never leave the batch
    craft("apgd(steps=7, restarts=2)", access, digits)
    n = len(digits.y)
    assert access.cost.backwards == n * 2 * (7 + 1)
    # a forward pass with every gradient; of each restart two candidates beside the best so far
    assert access.cost.forwards == n * 2 * (7 + 1) + n * 2 * 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 3))
def test_the_l1_projection_is_the_nearest_point_of_ball_and_box(seed, eps):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 1, 2, 3, generator=generator).double()
    y = x + torch.randn(1, 1, 2, 3, generator=generator)
    ours = (project_l1(y, x, eps) - x).flatten()  # but for the rounding that it leaves room for
    away = (y - x).flatten()
    # split into what is above and below x, the problem is quadratic with linear bounds
    flat = x.flatten().numpy()
    bounds = [(0, 1 - v) for v in flat] + [(0, v) for v in flat]
    answer = scipy.optimize.minimize(
        lambda z: ((z[:6] - z[6:] - away.numpy()) ** 2).sum(),
        [0.01] * 12,
        bounds=bounds,
        constraints={"type": "ineq", "fun": lambda z: eps - z.sum()},
        options={"ftol": 1e-12},
    )
    best = ((torch.from_numpy(answer.x[:6] - answer.x[6:]) - away) ** 2).sum()
    assert ((ours - away) ** 2).sum() <= best + 1e-5
    assert ours.abs().sum() <= eps * (1 + 1e-6)


class Coin(nn.Module):
    """Adds its noise to a network's logits, one draw for each image."""

    def __init__(self, network, scale):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x):
        logits = self.network(x)
        return logits + self.scale * torch.randn_like(logits)


def test_a_lucky_draw_ends_no_attack(network, digits):
    access = access_to(Coin(network, 3.0), draws=20)
    noisy = craft("apgd(steps=15, loss=margin)", access, digits)
    plain = craft("apgd(steps=15, loss=margin)", access_to(network), digits)
    lost = [(network(x).argmax(1) != digits.y).float().mean() for x in (noisy, plain)]
    assert lost[0] >= lost[1] - 0.05


def test_points_are_compared_on_the_same_draws(network, digits):
    """Where only the draws differ, no step may look like progress."""

    class Flat(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :10] + torch.randn(len(x), 10)

    access = access_to(Flat(), draws=2)
    seen = []
    ask = access.gradient
    access.gradient = lambda *args: seen.append(ask(*args)) or seen[-1]
    craft("apgd(steps=4)", access, digits)
    assert all(torch.equal(step.loss, seen[0].loss) for step in seen)


def test_a_warm_start_is_kept_where_nothing_is_worse(network, digits):
    first = craft("apgd(steps=30)", access_to(network), digits)
    access = access_to(network)
    access.start = first
    again = craft("apgd(steps=1, start=warm, loss=dlr)", access, digits)
    lost = [(network(x).argmax(1) != digits.y) for x in (first, again)]
    assert (lost[1] >= lost[0]).all()
    assert torch.equal(again[lost[0]], first[lost[0]])


def test_balanced_gradients_count_every_member_alike(network, digits):
    class Steep(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * network(x)

    access = access_to(Steep(1.0), Steep(1000.0), losses={"vote": Votes(kappa=1e9)})
    loss = access.losses["vote"]
    step = access.gradient(digits.x, digits.y, loss, balanced=True)
    alone = access_to(Steep(1.0)).gradient(digits.x, digits.y, loss)
    unit = alone.gradient / alone.gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(step.gradient, 2 * unit, rtol=1e-3, atol=1e-4)


def test_denial_is_reached_by_no_answer(network, digits):
    members = [Coin(network, 4.0) for _ in range(3)]
    shares = []
    for goal in ("error", "denial"):
        torch.manual_seed(0)
        access = access_to(*members, rule=Vote(), draws=5, goal=goal)
        found = craft("apgd(steps=10, loss=vote)", access, digits, eps=0.1)
        answers = access.deployed.decide(found, 20)
        shares.append((answers == digits.y).float().mean())
    assert shares[1] <= shares[0] + 0.03


class Watched(Access):
    """Access that keeps what each gradient and each selection told."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.steps, self.verdicts = [], []

    def gradient(self, *args):
        self.steps.append(super().gradient(*args))
        return self.steps[-1]

    def judge(self, *args):
        self.verdicts.append(super().judge(*args))
        return self.verdicts[-1]


def test_the_trace_keeps_what_was_seen_lost_and_what_selection_said_of_the_choice(network, digits):
    y = torch.where(torch.arange(48) < 5, (digits.y + 1) % 10, digits.y)
    access = Watched(access_to(Coin(network, 1.0), per_call=3).deployed, draws=6)
    torch.manual_seed(0)
    craft("apgd(steps=6, loss=margin)", access, SimpleNamespace(x=digits.x, y=y))
    attacked = access.verdicts[0].lost < LOST  # what is lost on clean images is not
    assert 0 < attacked.sum() < len(attacked)
    seen = torch.stack([step.lost for step in access.steps])
    chosen = torch.stack([verdict.lost for verdict in access.verdicts[-3:]]).amax(dim=0)
    expected = torch.full((3, len(attacked)), math.nan)
    expected[:, attacked] = torch.stack([seen.amax(dim=0), seen[-1], chosen])
    found = [*access.trace["lost_seen"], access.trace["selected_lost"]]
    np.testing.assert_array_equal(np.stack(found), expected.half().numpy())


def test_of_a_deterministic_defense_the_trace_says_which_images_were_lost(network, digits):
    right = network(digits.x).argmax(1) == digits.y
    for spec in ("apgd(steps=10)", "apgd(steps=10, restarts=3)", "apgd(steps=10, targets=3)"):
        access = access_to(network)
        found = craft(spec, access, digits)
        lost = torch.where(right, (network(found).argmax(1) != digits.y).float(), math.nan)
        assert 0 < lost.nan_to_num().sum() < right.sum()
        np.testing.assert_array_equal(access.trace["selected_lost"], lost.half().numpy())
        worst = access.trace["lost_seen"][0]
        np.testing.assert_array_equal(worst, access.trace["selected_lost"])
