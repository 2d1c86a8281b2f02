"""Attacks on defenses that refuse, against linear programs, closed forms, scikit-learn and PGD."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.special import softmax
from sklearn.neighbors import NearestNeighbors
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.evasion import Accepted, across, refuses, room, separated
from robbench.attacks.feature_matching import Matching
from robbench.attacks.losses import Spread, margin
from robbench.checkpoints import Shelf
from robbench.deployed import Deployed
from robbench.detectors import Detected, Detector, configure
from robbench.rules import ABSTAIN, Draw, MeanLogits, MeanProbabilities, Vote
from robbench.threat import Threat, distance, within

ATTACKS = ["opgd(steps=50)", "joint(steps=50)", "feature-matching(steps=50)"]
QUICK = ["opgd(steps=8)", "joint(steps=8, search=2)", "feature-matching(steps=8)"]
PIXELS = 12
SPEC = "network=mlp(hidden=[32]), epochs=15"
NOISY = "ito(network=quick(width=2), epochs=1, base=standard(epochs=2), members=2, draws=2"


class Plane(Detector):
    """The first hidden activation, however likely the answer is."""

    name: ClassVar[str] = "plane"

    @property
    def features(self):
        return True

    def score(self, draw, scores):
        return draw.features[..., 0].mean(dim=(0, 1))


class Linear(nn.Module):
    """Two linear functions of the pixels: what a Plane looks at, and the margin of label 1."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.weight = torch.randn(2, PIXELS, generator=rng)
        self.weight[0] -= self.weight[1]  # what errs looks less normal
        self.offset = -self.weight.sum(dim=1) / 2  # both are 0 for a grey image

    def features(self, x):
        return x.flatten(1) @ self.weight.T + self.offset

    def readout(self, hidden):
        return torch.stack([torch.zeros_like(hidden[:, 1]), hidden[:, 1]], dim=1)

    def forward(self, x):
        return self.readout(self.features(x))


@pytest.fixture(scope="module")
def planted():
    """A linear classifier, a linear detector, and images that they answer rightly."""
    rule = Detected(MeanLogits(), Plane(), torch.zeros(2))
    deployed = Deployed(nn.ModuleList([Linear()]), rule, (1, 3, 4), 2)
    x = torch.rand(300, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    answers = deployed.decide(x, 1)[0]
    x, y = x[answers >= 0][:30], answers[answers >= 0][:30]
    assert sorted(set(y.tolist())) == [0, 1]
    return deployed, x, y


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def deploy(tmp_path_factory, digits):
    shelf = Shelf([tmp_path_factory.mktemp("shelf")])
    return lambda text: shelf.deploy(text, digits, 0, torch.device("cpu"))


def craft(spec, access, x, y, threat, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


def images(digits, n):
    subset = digits.subset(n)
    return subset.x, subset.y


def accepted_errors(deployed, x, y):
    answers = deployed.decide(x, 1)[0]
    return (answers != y) & (answers != ABSTAIN)


def slack(network, x, y, eps):
    """(N,) by a linear program: the most by which an image of the ball is both wrong and above
    the threshold; negative where there is none."""
    found = []
    weight, offset = network.weight.double().numpy(), network.offset.double().numpy()
    for image, label in zip(x.flatten(1).double().numpy(), y.tolist(), strict=True):
        signs = np.array([1.0, -1.0 if label else 1.0])  # the detector's, the other label's
        rows = np.hstack([-signs[:, None] * weight, np.ones((2, 1))])  # s <= sign (w x + b)
        ends = np.stack([(image - eps).clip(0, 1), (image + eps).clip(0, 1)], axis=1)
        goal = np.append(np.zeros(PIXELS), -1.0)
        made = linprog(goal, rows, signs * offset, bounds=[*ends, (None, None)])
        found.append(-made.fun)
    return torch.tensor(found)


@pytest.mark.parametrize("spec", ATTACKS)
@pytest.mark.parametrize("eps", ["0.1", "0.2"])
def test_linear_defenses_are_evaded_where_a_linear_program_says_they_can_be(spec, eps, planted):
    deployed, x, y = planted
    possible = slack(deployed.members[0], x, y, float(eps))
    found = accepted_errors(deployed, craft(spec, Access(deployed), x, y, Threat(eps=eps)), y)
    assert (possible < 0).any() and (possible > 0.3).any()
    assert not found[possible < 0].any()
    assert found[possible > 0.3].all()  # steps stop short of the last corner


@pytest.mark.parametrize("spec", ATTACKS)
def test_without_a_bound_every_linear_defense_is_evaded(spec, planted):
    deployed, x, y = planted
    x_adv = craft(spec, Access(deployed), x, y, Threat(eps="1"))
    assert accepted_errors(deployed, x_adv, y).all()


@pytest.mark.parametrize("spec", QUICK)
def test_l2_points_stay_in_the_ball_and_in_the_box(spec, planted):
    deployed, x, y = planted
    threat = Threat(norm="l2", eps="0.5")
    x_adv = craft(spec, Access(deployed), x, y, threat)
    assert bool(within(distance(x_adv, x, "l2"), threat).all())
    assert torch.equal(x_adv, x_adv.clamp(0, 1))
    assert accepted_errors(deployed, x_adv, y).any()


def vectors(seed, n=5):
    rng = torch.Generator().manual_seed(seed)
    scale = 10 ** (8 * torch.rand(2, n, 1, 1, 1, generator=rng) - 4)
    return torch.randn(2, n, 1, 3, 4, generator=rng) * scale


@given(seed=st.integers(0, 10_000))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_what_is_taken_from_a_gradient_lies_along_the_other_and_what_is_left_across_it(seed):
    own, other = vectors(seed)
    rest = across(own, other)
    a, b, o = (t.flatten(1).double() for t in (rest, own - rest, other))
    lengths = b.norm(dim=1) + a.norm(dim=1)
    assert ((a * o).sum(1).abs() <= 1e-5 * lengths * o.norm(dim=1)).all()
    along = (b * o).sum(1).abs()
    assert (along >= (b.norm(dim=1) - 1e-5 * lengths) * o.norm(dim=1)).all()


@pytest.mark.parametrize("factor", [3.0, -0.01, 0.0])
def test_of_parallel_gradients_and_of_one_that_is_zero_nothing_is_taken(factor):
    own, _ = vectors(0)
    assert torch.equal(across(own, factor * own), own)


@given(seed=st.integers(0, 10_000))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_conflicting_steps_after_an_error_never_undo_it_to_first_order(seed):
    up, out = vectors(seed)
    kept, taken = separated(up, out, "conflicting")
    assert torch.equal(kept, up)
    lengths = (up.flatten(1).norm(dim=1) * out.flatten(1).norm(dim=1)).double()
    assert ((kept.double() * taken.double()).flatten(1).sum(1) >= -1e-5 * lengths).all()


@pytest.mark.parametrize(
    "spec",
    ["joint(weight=0, search=1, steps=10, step=0.0125)", "opgd(targets=0, steps=10, step=0.0125)"],
)
def test_on_what_never_refuses_they_are_pgd_on_the_margin(spec, classifier, digits):
    deployed = Deployed(nn.ModuleList([classifier(nn.ReLU())]), MeanLogits(), digits.shape, 10)
    x, y = digits.test.x[:60], digits.test.y[:60]
    access = Access(deployed)
    ours = craft(spec, access, x, y, Threat(eps="0.05"))
    theirs = craft("bim(steps=10, loss=margin)", Access(deployed), x, y, Threat(eps="0.05"))
    assert torch.equal(ours, theirs)
    assert access.notes == {"refuses": "never"}


@pytest.fixture(scope="module")
def union(deploy):
    return deploy(f"standard({SPEC}, detector=union)")


@pytest.mark.parametrize("spec", ["opgd(steps=20)", "joint(steps=20, search=4)"])
def test_more_than_the_attacker_who_knows_the_detector_finds_by_pgd(spec, union, digits):
    (x, y), counts = images(digits, 40), []
    for text in (spec, "pgd(steps=20)"):
        access = Access(union.deployed, losses=union.losses)
        x_adv = craft(text, access, x, y, Threat(eps="0.1"))
        counts.append(int(accepted_errors(union.deployed, x_adv, y).sum()))
    assert counts[0] > counts[1]


@pytest.mark.parametrize("spec", QUICK)
def test_label_0_is_a_target_like_any_other(spec, union, digits):
    x, y = images(digits, 20)
    x_adv = craft(spec, Access(union.deployed), x, y, Threat(eps="0.5", target=0))
    answers = union.deployed.decide(x_adv, 1)[0]
    assert (answers[y != 0] == 0).float().mean() > 0.9


@pytest.mark.parametrize("spec", QUICK)
@pytest.mark.parametrize("detector", ["", ", detector=confidence"])
def test_votes_of_noisy_members_are_evaded(spec, detector, deploy, digits):
    trained = deploy(f"{NOISY}{detector})")
    x, y = images(digits, 12)
    torch.manual_seed(0)
    x_adv = craft(spec, Access(trained.deployed, draws=4), x, y, Threat(eps="0.4"))
    answers = trained.deployed.decide(x_adv, 10)
    assert ((answers != y) & (answers != ABSTAIN)).float().mean() > 0.7
    assert (x_adv - x).abs().max() <= 0.4 + 1e-6


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("opgd(steps=3, targets=1)", 16), ("joint(steps=4, search=3)", 30)]
    + [("feature-matching(steps=5, guides=3)", 6)],  # of two labels one is wrong
)
def test_backward_passes_are_what_a_hand_count_says(spec, expected, planted):
    deployed, x, y = planted
    access = Access(deployed, own=False)  # an oracle: no image is given up
    craft(spec, access, x, y, Threat(eps="0.001"))
    assert access.cost.backwards == expected * len(x)


def randoms(n=50, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, n, 4, generator=rng, dtype=torch.float64)
    return Draw(logits, torch.randn(2, 3, n, 5, generator=rng, dtype=torch.float64))


def test_the_loss_of_candidates_is_positive_for_accepted_errors_and_for_nothing_else(union, digits):
    x, y = digits.test.x, digits.test.y.roll(1)
    value = Accepted(Access(union.deployed))(union.deployed.draw(x, 1), y, None)
    expected = accepted_errors(union.deployed, x, y)
    assert torch.equal(value > 0, expected)
    assert 0 < int(expected.sum()) < len(y)


def test_the_room_of_a_majority_is_open_where_votes_that_are_sure_have_one():
    sure = Draw(1e3 * randoms().logits)
    expected = Vote().decide(sure) != ABSTAIN
    assert torch.equal(room(Vote(), sure) > 1e-9, expected)
    assert bool(expected.any()) and not bool(expected.all())


def test_a_rule_has_a_room_where_it_refuses():
    _, references = randoms(), [torch.randn(3, 5, 5, dtype=torch.float64) for _ in range(4)]
    detector = configure("k-density").fit(references)
    rules = [MeanLogits(), Vote(majority=False), Vote()]
    rules += [Detected(rule, detector, torch.zeros(4)) for rule in rules]
    assert [refuses(rule) for rule in rules] == [False, False, True, True, True, True]
    assert [room(rule, randoms()) is not None for rule in rules] == list(map(refuses, rules))


def test_spread_is_minus_the_log_of_the_largest_mean_softmax():
    draw = randoms()
    shares = softmax(draw.logits.numpy(), axis=-1).mean(axis=(0, 1))
    y = torch.zeros(50, dtype=torch.int64)
    np.testing.assert_allclose(Spread()(draw, y, None), -np.log(shares.max(axis=-1)))
    np.testing.assert_allclose(Spread()(draw, y, y + 2), np.log(shares[:, 2]))


def test_spread_leaves_more_votes_without_a_majority_than_the_loss_of_errors(deploy, digits):
    trained, unanswered = deploy(f"{NOISY})"), []
    x, y = images(digits, 30)
    for losses in ({"own": Spread()}, trained.losses):
        torch.manual_seed(0)
        access = Access(trained.deployed, draws=4, losses=losses, goal="denial")
        x_adv = craft("pgd(steps=10)", access, x, y, Threat(eps="0.05"))
        unanswered.append(float((trained.deployed.decide(x_adv, 20) == ABSTAIN).float().mean()))
    assert unanswered[0] > 1.2 * unanswered[1]


def matching(draw, labels, seed=1):
    guides = randoms(n=len(labels), seed=seed).features.mean(dim=0)
    return Matching(MeanProbabilities(), guides, labels)


def test_matching_is_the_distance_to_the_nearest_neighbour_of_another_label():
    draw, labels = randoms(), torch.arange(30) % 4
    y = torch.randint(4, (50,), generator=torch.Generator().manual_seed(2))
    loss = matching(draw, labels)
    one = Draw(draw.logits[:1, :1], draw.features[:1, :1])
    loss = Matching(loss.rule, loss.guides[:1], labels)
    unit = 2 * loss.guides[0].var(dim=0, correction=0).sum()
    for image, value in enumerate(loss(one, y, None)):
        others = loss.guides[0][labels != y[image]]
        nearest = NearestNeighbors(n_neighbors=1).fit(others)
        apart, _ = nearest.kneighbors(one.features[0, 0, image : image + 1])
        assert float(-value * unit) == pytest.approx(float(apart[0, 0]) ** 2)


def test_matching_has_the_gradient_of_finite_differences_with_and_without_guides():
    draw, y = randoms(n=4), torch.tensor([0, 0, 1, 1])
    loss = matching(draw, torch.tensor([0, 0, -1]))  # images of label 0 have no guide
    inputs = [tensor.requires_grad_() for tensor in draw]
    assert torch.autograd.gradcheck(lambda *parts: loss(Draw(*parts), y, None), inputs)


def test_an_image_without_a_guide_has_its_margin():
    draw, y = randoms(n=4), torch.tensor([0, 0, 1, 1])
    value = matching(draw, torch.tensor([0, 0, -1]))(draw, y, None)
    expected = margin(MeanProbabilities().scores(draw), y, None)
    assert torch.equal(value[:2], expected[:2])
    assert (value[2:] < 0).all()


def test_in_a_batch_of_one_label_matching_is_pgd_on_the_margin(classifier, digits):
    deployed = Deployed(nn.ModuleList([classifier(nn.ReLU())]), MeanLogits(), digits.shape, 10)
    three = digits.test.y == 3
    x, y = digits.test.x[three], digits.test.y[three]
    access = Access(deployed)
    ours = craft(
        "feature-matching(guides=1, steps=10, step=0.0125)", access, x, y, Threat(eps="0.05")
    )
    theirs = craft("bim(steps=10, loss=margin)", Access(deployed), x, y, Threat(eps="0.05"))
    assert torch.equal(ours, theirs)
    assert access.notes == {"matched": "logits", "refuses": "never"}
    assert not access.trace["guided"].any()
