"""The binarization test against scikit-learn, a linear bound, and gradients that lead nowhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, binarization
from robbench.attacks.binarization import RIDGE, Binarized, _read_out, discriminant
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.networks.bpda import BPDA
from robbench.rules import MeanProbabilities, Vote
from robbench.threat import Threat, distance, within

SHAPE = (1, 8, 8)
EPS = {"linf": "0.1", "l2": "0.8"}


class Features(nn.Module):
    """Activations by `body` and a linear read-out, of fixed weights."""

    def __init__(self, *body, width=32, labels=10):
        super().__init__()
        self.features, self.readout = nn.Sequential(*body), nn.Linear(width, labels)

    def forward(self, x):
        return self.readout(self.features(x))


class Rounded(nn.Module):
    """Pixels in steps of 1/40, which have no derivative."""

    def forward(self, x):
        return (x * 40).round() / 40


class Noise(nn.Module):
    def forward(self, hidden):
        return hidden + 0.3 * torch.randn_like(hidden)


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(24)
    return subset.x, subset.y


@pytest.fixture(scope="module")
def body(network):
    """The hidden layer of a trained network, smooth."""
    return network[:-1]


def access_to(*members, rule=None, draws=1, **options):
    torch.manual_seed(0)
    deployed = Deployed(nn.ModuleList(members), rule or MeanProbabilities(), SHAPE, 10, draws)
    return Access(deployed, **options)


def trace_of(spec, access, x, y, norm="linf"):
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    answer = Configured.of(spec)(access, x, y, Threat(norm=norm, eps=EPS[norm]), rng)
    assert torch.equal(answer, x)
    return {name: values.astype(float) for name, values in access.trace.items()}


def share(values):
    return (values[~np.isnan(values)] > 0.5).mean()


def test_the_direction_is_scikit_learns_shrunk_discriminant():
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(6, 6, generator=rng).double()
    inside, outside = (
        (torch.randn(1, 50, 6, generator=rng).double() @ mix + shift) for shift in (0, 1)
    )
    theirs = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=RIDGE / (1 + RIDGE), priors=[0.5, 0.5]
    ).fit(torch.cat([inside[0], outside[0]]).numpy(), np.repeat([0, 1], 50))
    ours = discriminant(inside, outside).numpy()
    expected = theirs.coef_[0]
    np.testing.assert_allclose(
        ours / np.linalg.norm(ours), expected / np.linalg.norm(expected), rtol=1e-9
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(list(EPS)), st.integers(1, 3))
def test_planted_points_are_in_ball_and_box_and_alone_in_their_answer(body, seed, norm, boundary):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *SHAPE, generator=rng).mul(1.2).sub(0.1).clamp(0, 1)
    threat, drawn = Threat(norm=norm, eps=EPS[norm]), []
    with pytest.MonkeyPatch.context() as patch:
        start = binarization.random_start
        patch.setattr(
            binarization, "random_start", lambda *given: drawn.append(start(*given)) or drawn[0]
        )
        made = _read_out(access_to(Features(body)), x, threat, rng, 200, boundary)
    assert len(drawn[0]) == 199
    assert distance(drawn[0], x.expand(199, -1, -1, -1), norm).max() <= 0.95 * float(threat.eps)
    if made is None:  # of several points one lies within the others: nothing is claimed
        assert boundary > 1 or norm == "l2"
        return
    assert len(made.points) == boundary
    assert made.points.min() >= 0 and made.points.max() <= 1
    assert within(distance(made.points, x.expand_as(made.points), norm), threat).all()
    assert (made.deployed.decide(made.points, 1) == 1).all()
    assert (made.deployed.decide(torch.cat([x, drawn[0]]), 1) == 0).all()


def test_linear_activations_leave_no_planted_point_unfound(digits):
    """The climb of a linear read-out ends at its maximum, which no planted point exceeds."""
    torch.manual_seed(0)
    member = Features(nn.Flatten(), nn.Linear(64, 32)).requires_grad_(False)
    trace = trace_of("binarization", access_to(member), *digits)
    assert (trace["usable"] == 1).all() and (trace["planted"] == 1).all()
    assert (trace["found"] == 1).all()
    assert trace["random_found"].mean() < 0.3


@pytest.mark.parametrize("norm", EPS)
def test_gradients_of_a_trained_network_find_the_planted_points(norm, body, digits):
    trace = trace_of("binarization", access_to(Features(body)), *digits, norm)
    assert trace["usable"].mean() > 0.7
    assert share(trace["found"]) > 0.95
    assert share(trace["random_found"]) < 0.5


def test_a_gradient_that_is_cut_hides_what_is_there_and_a_stand_in_shows_it(body, digits):
    shares = {}
    for step in (Rounded(), BPDA(Rounded())):
        member = Features(step, *body)
        access = access_to(member, losses={})
        trace = trace_of("binarization", access, *digits)
        assert trace["usable"].mean() > 0.8 and share(trace["planted"]) == 1
        shares[type(step)] = share(trace["found"])
    assert shares[Rounded] < 0.2 and shares[BPDA] > 0.95


def test_an_attack_that_does_not_climb_finds_few(body, digits):
    spec = "binarization(attack='random-search(tries=3)')"
    trace = trace_of(spec, access_to(Features(body)), *digits)
    assert share(trace["planted"]) == 1 and share(trace["found"]) < 0.3


def test_random_search_has_the_queries_of_the_attack(body, digits):
    """A long random search as the attack is its own baseline, up to luck."""
    x, y = digits
    spec = "binarization(attack='random-search(tries=400)')"
    access = access_to(Features(body))
    trace = trace_of(spec, access, x, y)
    assert abs(share(trace["found"]) - share(trace["random_found"])) < 0.3
    # 999 inner points, the planted one, and x; each search asks about x too, and its point once
    most = 999 + 3 + 2 * 402
    assert access.cost.forwards <= len(x) * (most + 1) + 1


def test_every_member_of_a_vote_has_its_own_read_out(classifier, body, digits):
    other = classifier(nn.ReLU()).requires_grad_(False)[:-1]
    access = access_to(Features(body), Features(other), rule=Vote(majority=False))
    trace = trace_of("binarization", access, *digits)
    assert trace["usable"].mean() > 0.8
    assert share(trace["found"]) > 0.9 and (trace["planted"][trace["usable"] == 1] == 1).all()


def test_noise_is_read_in_the_mean_over_draws(body, digits):
    """Single draws of inner points reach as far as the planted one, for most images."""
    access = access_to(Features(*body, Noise()), draws=5).like(5)
    trace = trace_of("binarization(inner=200)", access, digits[0][:16], digits[1][:16])
    assert trace["usable"].mean() > 0.4
    assert share(trace["found"]) > 0.8


def test_points_that_no_plane_tells_apart_are_left_out(digits):
    """Of the one activation, the first pixel, one inner point or another is nearly at the end."""
    member = Features(nn.Flatten(), nn.Linear(64, 1), width=1)
    member.features[1].weight.data = torch.eye(64)[:1]
    member.features[1].bias.data.zero_()
    x = torch.full((12, *SHAPE), 0.5)
    access = access_to(member.requires_grad_(False))
    trace = trace_of("binarization(boundary=12)", access, x, digits[1][:12])
    assert (trace["usable"] == 0).all()
    for name in ("found", "random_found", "planted"):
        assert np.isnan(trace[name]).all()


def test_activations_that_say_nothing_tell_nothing_apart(digits):
    member = Features(nn.Flatten(), nn.Linear(64, 4), nn.Threshold(1e9, 0.25), width=4)
    trace = trace_of("binarization", access_to(member), *digits)
    assert (trace["usable"] == 0).all() and np.isnan(trace["planted"]).all()


def test_the_two_logits_are_a_plane_of_the_activations(body):
    torch.manual_seed(0)
    weight, x = torch.randn(32), torch.rand(4, *SHAPE)
    logits = Binarized(Features(body), weight, torch.tensor(0.3))(x)
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], body(x) @ weight + 0.3)
    torch.testing.assert_close(logits.sum(dim=1), torch.zeros(4))


class Bare(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :10]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([Bare()], "last hidden activations, and Bare gives none"),
        (
            [Features(nn.Flatten(), nn.Linear(64, w), width=w) for w in (5, 7)],
            "of which members have 5 and 7",
        ),
    ],
)
def test_members_without_activations_of_one_width_are_refused(members, message, digits):
    with pytest.raises(InputError, match=message):
        trace_of("binarization", access_to(*members), *digits)
