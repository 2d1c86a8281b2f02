"""FAB and its projections against AutoAttack's, SciPy's optimisers and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack import fab_projections
from pyautoattack.fab_pt import FABAttack_PT
from scipy.optimize import linprog, minimize
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.fab import to_hyperplane
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import ABSTAIN, MeanLogits, Vote
from robbench.threat import Threat, distance

SHAPE = (1, 8, 8)
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}  # as AutoAttack calls them
LENGTHS = {"linf": np.inf, "l2": 2, "l1": 1}


def access_to(*members, rule=None, labels=10, **options):
    deployed = Deployed(nn.ModuleList(members), rule or MeanLogits(), SHAPE, labels)
    return Access(deployed, **options)


def craft(spec, access, x, y, threat, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


class Noise(nn.Module):
    """Gaussian noise, fresh for every image and pass."""

    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(32)
    return subset.x, subset.y


def problems(seed, n, d):
    """Points with pixels at the ends of the box, normals with zeros, gains that mostly exist."""
    rng = torch.Generator().manual_seed(seed)
    x = (1.4 * torch.rand(n, d, generator=rng) - 0.2).clamp(0, 1)
    normal = torch.randn(n, d, generator=rng)
    normal[torch.rand(n, d, generator=rng) < 0.1] = 0
    gain = torch.randn(n, generator=rng) * normal.abs().sum(dim=1) / 4
    return x, normal, gain


def smallest(x, normal, gain, norm):
    """The length of the smallest move by SciPy; None where the box does not reach the plane."""
    d = len(x)
    if norm == "l2":
        rest = {"type": "eq", "fun": lambda move: normal @ move - gain, "jac": lambda _: normal}
        bounds = list(zip(-x, 1 - x, strict=True))
        start = np.clip(normal * gain / (normal @ normal), -x, 1 - x)
        found = minimize(
            lambda move: move @ move,
            start,
            jac=lambda move: 2 * move,
            bounds=bounds,
            constraints=[rest],
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 300},
        )
        return np.sqrt(found.fun) if found.success else None
    # move = up - down; the length is their sum (l1), or a bound of all of them (linf)
    parts = np.concatenate([normal, -normal, [0]])
    cost = np.concatenate([np.full(2 * d, norm == "l1"), [norm == "linf"]]).astype(float)
    below = np.hstack([np.eye(d), np.eye(d), -np.ones((d, 1))]) if norm == "linf" else None
    found = linprog(
        cost,
        A_ub=below,
        b_ub=None if below is None else np.zeros(d),
        A_eq=parts[None],
        b_eq=[gain],
        bounds=[(0, room) for room in (*(1 - x), *x, None)],
    )
    return found.fun if found.success else None


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_is_the_smallest_move_that_scipy_finds(norm):
    x, normal, gain = problems(0, 30, 7)
    move = to_hyperplane(x, normal, gain, norm)
    assert (x + move >= -1e-6).all() and (x + move <= 1 + 1e-6).all()
    solved = 0
    for row in range(len(x)):
        expected = smallest(*(part[row].double().numpy() for part in (x, normal, gain)), norm)
        if expected is None:
            continue
        solved += 1
        assert float(normal[row] @ move[row]) == pytest.approx(float(gain[row]), abs=1e-5)
        length = np.linalg.norm(move[row].numpy(), ord=LENGTHS[norm])
        assert length == pytest.approx(expected, abs=2e-5)
    assert 15 < solved < 30  # some are out of reach


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_agrees_with_that_of_autoattack(norm):
    x, normal, gain = problems(1, 200, 64)
    theirs = getattr(fab_projections, f"projection_{norm}")
    expected = theirs(x, normal, (normal * x).sum(dim=1) + gain)
    assert (to_hyperplane(x, normal, gain, norm) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("norm", NORMS)
def test_a_plane_out_of_reach_is_approached_to_the_corner(norm):
    x, normal, _ = problems(2, 20, 9)
    corner = torch.where(normal > 0, 1.0, torch.where(normal < 0, 0.0, x))
    move = to_hyperplane(x, normal, torch.full((20,), 100.0), norm)
    torch.testing.assert_close(x + move, corner)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.sampled_from(list(NORMS)),
    st.floats(-30, 30, allow_subnormal=False, width=32),
    st.floats(-1, 1, width=32),
    st.integers(0, 2**31),
)
def test_the_scale_of_the_normal_does_not_matter(norm, exponent, gain, seed):
    x, normal, _ = problems(seed, 1, 12)
    # what is asked is beyond float32 at the ends, and has to stay finite there
    scale = torch.tensor(10.0).pow(exponent)
    asked = torch.tensor([gain])
    move = to_hyperplane(x, scale * normal, scale * asked, norm)
    assert move.isfinite().all()
    if -25 < exponent < 25 and (gain == 0 or abs(gain) > 1e-6):
        expected = to_hyperplane(x, normal, asked, norm)
        torch.testing.assert_close(move, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_normal_nothing_moves(norm):
    x = problems(3, 4, 5)[0]
    assert not to_hyperplane(x, torch.zeros(4, 5), torch.full((4,), 2.0), norm).any()


def theirs(network, norm, steps):
    return FABAttack_PT(network, norm=NORMS[norm], n_iter=steps, device=torch.device("cpu"))


@pytest.mark.parametrize("norm", NORMS)
def test_it_agrees_with_autoattack_image_by_image(norm, network, digits):
    x, y = digits
    ours = craft("fab(steps=12, search=0)", access_to(network), x, y, Threat(norm=norm))
    expected = theirs(network, norm, 12).attack_single_run(x, y)
    assert (expected != x).flatten(1).any(dim=1).float().mean() > 0.9
    assert_alike(distance(ours, x, norm), distance(expected, x, norm))
    same = (ours - expected).abs().amax(dim=(1, 2, 3)) < 2e-5
    assert same.float().mean() > 0.9


def assert_alike(ours, theirs):
    """Up to float32, but for iterates on a boundary: there rounding says whether they err."""
    np.testing.assert_allclose(ours, theirs, rtol=0.02)
    assert np.isclose(ours, theirs, rtol=1e-4).mean() > 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_towards_targets_it_agrees_with_autoattack_image_by_image(norm, network, digits):
    x, y = digits
    spec = "fab(steps=8, targets=4, search=0)"
    ours = craft(spec, access_to(network), x, y, Threat(norm=norm))
    attack, runs = theirs(network, norm, 8), []
    for rank in range(2, 6):
        attack.target_class = rank
        runs.append(attack.attack_single_run(x, y, is_targeted=True))
    failed = torch.stack([network(run).argmax(1) == y for run in runs])
    lengths = torch.stack([distance(run, x, norm) for run in runs]).masked_fill(failed, np.inf)
    least = lengths.amin(dim=0)
    right = network(x).argmax(1) == y
    assert_alike(distance(ours, x, norm)[right], least[right])


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_classifier_is_left_at_the_distance_of_the_box(norm):
    torch.manual_seed(5)
    layer = nn.Linear(64, 2)
    x, y = torch.rand(12, *SHAPE).mul(1.6).sub(0.3).clamp(0, 1), torch.zeros(12, dtype=torch.int64)
    layer.bias.data = torch.tensor([1.5, 0.0])
    network = nn.Sequential(nn.Flatten(), layer).requires_grad_(False)
    normal = (layer.weight[1] - layer.weight[0]).double().numpy()
    gaps = (network(x)[:, 0] - network(x)[:, 1]).double().numpy()
    assert (gaps > 0).all()
    answer = craft("fab(steps=10)", access_to(network, labels=2), x, y, Threat(norm=norm))
    points = x.flatten(1).double().numpy()
    expected = [
        smallest(*problem, norm) for problem in zip(points, [normal] * 12, gaps, strict=True)
    ]
    ratio = distance(answer, x, norm).numpy() / np.array(expected)
    assert ratio.min() > 1 - 1e-4 and ratio.max() < 1.01


@pytest.mark.parametrize("norm", NORMS)
def test_the_final_search_shortens_and_still_errs(norm, network, digits):
    x, y = digits
    access = access_to(network)
    without = craft("fab(steps=5, search=0)", access, x, y, Threat(norm=norm))
    answer = craft("fab(steps=5)", access, x, y, Threat(norm=norm))
    before, after = (distance(points, x, norm) for points in (without, answer))
    assert (after <= before).all() and after.mean() < 0.999 * before.mean()
    assert (network(answer).argmax(1) != y).all()


@pytest.mark.parametrize(("norm", "steps"), [("linf", 8), ("l2", 8), ("l1", 20)])
def test_restarts_begin_elsewhere_and_keep_the_nearest(norm, steps, network, digits):
    x, y = digits
    access, threat = access_to(network), Threat(norm=norm)
    one = craft(f"fab(steps={steps}, search=0)", access, x, y, threat)
    three = craft(f"fab(steps={steps}, restarts=3, search=0)", access, x, y, threat)
    shorter = distance(three, x, norm) - distance(one, x, norm)
    assert (shorter <= 0).all() and (shorter < 0).any()


def test_starts_come_from_the_seed(network, digits):
    access, threat = access_to(network), Threat(norm="l2")
    spec = "fab(steps=3, restarts=2)"
    one, again, other = (craft(spec, access, *digits, threat, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_not_farther_than_deepfool(norm, network, digits):
    x, y = digits
    if norm == "l1":
        nearer = craft("fab(steps=15)", access_to(network), x, y, Threat(norm="l2"))
    else:
        nearer = craft("deepfool", access_to(network), x, y, Threat(norm=norm))
    answer = craft("fab(steps=15)", access_to(network), x, y, Threat(norm=norm))
    assert distance(answer, x, norm).mean() < distance(nearer, x, norm).mean()


def test_a_target_is_reached(network, digits):
    x, y = digits
    answer = craft("fab(steps=20)", access_to(network), x, y, Threat(norm="l2", target=3))
    reached = network(answer).argmax(1) == torch.where(y == 3, 4, 3)
    assert reached.float().mean() > 0.9
    assert torch.equal(answer[~reached], x[~reached])


def test_two_ways_to_say_the_target_are_refused(network, digits):
    with pytest.raises(InputError, match=r"^fab\(targets=…\) chooses its targets itself"):
        craft("fab(targets=9)", access_to(network), *digits, Threat(target=3))


def test_a_vote_is_led_to_an_error_and_not_to_silence(classifier, digits):
    x, y = digits
    members = [classifier(nn.Tanh()), classifier(nn.ReLU()), classifier(nn.Sigmoid())]
    access = access_to(*members, rule=Vote())
    answer = craft("fab(steps=10)", access, x, y, Threat(norm="l2"))
    changed = (answer != x).flatten(1).any(dim=1)
    labels = access.deployed.decide(answer, 1)[0]
    assert changed.float().mean() > 0.8
    assert ((labels != y) & (labels != ABSTAIN))[changed].all()


def test_what_is_found_on_a_stochastic_defense_holds_in_fresh_draws(network, digits):
    x, y = digits
    noisy = nn.Sequential(Noise(), network)
    torch.manual_seed(0)
    answer = craft("fab(steps=10)", access_to(noisy, draws=20), x, y, Threat(norm="l2"))
    with torch.no_grad():
        lost = torch.stack([noisy(answer).argmax(1) != y for _ in range(100)]).float().mean(dim=0)
    assert (answer != x).flatten(1).any(dim=1).float().mean() > 0.9
    assert lost.mean() > 0.5 and (lost > 0.35).float().mean() > 0.9


def test_passes_are_counted_by_hand(network, digits):
    x, y = digits
    access = access_to(network)
    active = int((network(x).argmax(1) == y).sum())
    craft("fab(steps=3, targets=2, search=0)", access, x, y, Threat())
    # ranking and the clean image; per step and target a boundary and its question
    assert access.cost.forwards == 2 * len(x) + 2 * 3 * 2 * active
    assert access.cost.backwards == 2 * 3 * active
