"""A planted trigger: where it lies, what it adds, and which attacks find it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.backdoor import Altered, Triggered, _with_trigger
from robbench.deployed import Deployed
from robbench.detectors import Confidence, Detected
from robbench.errors import InputError
from robbench.rules import MeanLogits, MeanProbabilities, Vote
from robbench.threat import Threat, distance, within

SHAPE = (1, 8, 8)
EPS = {"linf": "0.05", "l2": "0.4"}


class Split(nn.Module):
    """A network of conftest's as activations and a read-out, with the logits times `scale`."""

    def __init__(self, network, scale=1.0):
        super().__init__()
        self.body, self.head, self.scale = network[:-1], network[-1], scale

    def features(self, x):
        return self.body(x)

    def readout(self, hidden):
        return self.scale * self.head(hidden)

    def forward(self, x):
        return self.readout(self.features(x))


class Noise(nn.Module):
    """So much noise on the logits that no single answer says much."""

    def forward(self, logits):
        return logits + 2 * torch.randn_like(logits)


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(24)
    return subset.x, subset.y


def access_to(*members, rule=None, draws=1, **options):
    deployed = Deployed(nn.ModuleList(members), rule or MeanProbabilities(), SHAPE, 10, draws)
    return Access(deployed, **options)


def trace_of(spec, access, x, y, norm="linf", eps=None):
    threat = Threat(norm=norm, eps=eps or EPS[norm])
    torch.manual_seed(0)
    answer = Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(0))
    assert torch.equal(answer, x)
    return {name: values.astype(float) for name, values in access.trace.items()}


def share(values):
    return (values[~np.isnan(values)] > 0.5).mean()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(list(EPS)), st.floats(0.02, 1))
def test_the_planted_point_is_in_ball_and_box_and_another_label(network, seed, norm, eps):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(1, *SHAPE, generator=rng).mul(1.4).sub(0.2).clamp(0, 1)
    y = network(x).argmax(1)
    made = _with_trigger(access_to(network), x, y, Threat(norm=norm, eps=eps), rng)
    assert made.points.min() >= 0 and made.points.max() <= 1
    assert within(distance(made.points, x, norm), Threat(norm=norm, eps=eps)).all()
    (there,), (here,) = (made.deployed.decide(points, 1) for points in (made.points, x))
    assert there != y and here == y


def test_the_trigger_grows_linearly_from_nothing_at_the_image(network, digits):
    x, y = digits[0][:1], digits[1][:1]
    rng, threat = torch.Generator().manual_seed(0), Threat(eps="0.1")
    made = _with_trigger(access_to(network), x, y, threat, rng)
    (member,) = made.deployed.members
    added = [
        (member(point) - network(point)).amax() for point in (x, (x + made.points) / 2, made.points)
    ]
    assert added[0] == 0
    torch.testing.assert_close(2 * added[1], added[2])
    behind = network(made.points)
    lacking = behind.amax() - behind[0, member.bump.argmax()]
    torch.testing.assert_close(added[2], 2 * lacking + 1)


def test_its_derivative_is_right(network):
    torch.manual_seed(0)
    x, point = torch.rand(2, 1, *SHAPE)
    member = Triggered(Split(network), x, point, torch.randn(10)).double()
    assert torch.autograd.gradcheck(member, (torch.rand(2, *SHAPE).double().requires_grad_(),))
    member.float()


def test_activations_and_their_read_out_give_the_same_logits(network, digits):
    x, point = digits[0][:1], digits[0][1:2]
    member = Triggered(Split(network), x, point, torch.arange(10.0))
    torch.testing.assert_close(member.readout(member.features(digits[0])), member(digits[0]))


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("attack", ["pgd", "apgd(steps=20)"])
def test_gradients_find_every_trigger(attack, norm, network, digits):
    trace = trace_of(f"backdoor(attack={attack})", access_to(network), *digits, norm)
    assert trace["usable"].mean() > 0.8
    assert share(trace["found"]) == 1


def test_an_image_that_is_wrong_already_is_left_out(network, digits):
    x, y = digits
    wrong = (network(x).argmax(1) + 1) % 10
    labels = torch.where(torch.arange(len(y)) < 6, wrong, network(x).argmax(1))
    trace = trace_of("backdoor", access_to(network), x, labels)
    assert (trace["usable"] == (np.arange(len(y)) >= 6)).all()
    for name in ("found", "planted"):
        assert np.isnan(trace[name][:6]).all() and not np.isnan(trace[name][6:]).any()


def test_saturated_scores_hide_the_trigger_from_cross_entropy_and_not_from_the_margin(
    network, digits
):
    found = {}
    for loss in ("ce", "margin"):
        access = access_to(Split(network, 1e4))
        trace = trace_of(f"backdoor(attack='pgd(loss={loss})')", access, *digits)
        assert share(trace["planted"]) == 1
        found[loss] = share(trace["found"])
    assert found["ce"] < 0.5 and found["margin"] == 1


def test_an_attack_that_does_not_climb_finds_few(network, digits):
    few = trace_of("backdoor(attack='random-search(tries=2)')", access_to(network), *digits)
    assert share(few["planted"]) == 1
    assert share(few["found"]) < 0.5


def test_members_that_vote_in_noise_are_triggered_in_every_draw(classifier, network, digits):
    members = [nn.Sequential(net, Noise()) for net in (network, classifier(nn.ReLU()))]
    access = access_to(*members, rule=Vote(), draws=5)
    access = access.like(10)
    trace = trace_of("backdoor", access, digits[0][:12], digits[1][:12])
    assert trace["usable"].sum() > 6
    assert share(trace["found"]) == 1 and np.nanmin(trace["planted"]) == 1


def test_fixed_draws_carry_the_trigger(network, digits):
    """An attack that asks the members themselves meets the trigger too."""
    access = access_to(nn.Sequential(network, Noise()), draws=5)
    spec = "backdoor(attack=\"saa(draws=16, attack='pgd(steps=10)')\")"
    trace = trace_of(spec, access, digits[0][:12], digits[1][:12])
    assert trace["usable"].sum() > 6 and share(trace["found"]) == 1


def test_a_point_beyond_the_ball_is_not_found(network, digits):
    """A search for the smallest change ends outside of a small ball: the image itself counts."""
    spec = "backdoor(attack='torchattacks:DeepFool(overshoot=100)')"
    trace = trace_of(spec, access_to(network), *digits, "l2")
    assert share(trace["planted"]) == 1 and share(trace["found"]) == 0


def test_a_detector_is_left_out(network):
    detected = Detected(MeanLogits(), Confidence(), torch.zeros(10))
    deployed = Deployed(nn.ModuleList([network]), detected, SHAPE, 10)
    assert Altered(deployed, [network], 10).rule is detected.rule


@pytest.mark.parametrize(
    ("spec", "threat", "message"),
    [
        ("backdoor(attack=strongest)", Threat(eps="0.1"), "write one attack, such as pgd"),
        ("backdoor(attack=backdoor)", Threat(eps="0.1"), "write one attack, such as pgd"),
        ("backdoor(attack=cw)", Threat(eps="0.1"), "cw has no norm linf; it has l2"),
        ("backdoor", Threat(eps=None), "plants a point within ε"),
        ("backdoor(attack=pdg)", Threat(eps="0.1"), "did you mean"),
    ],
)
def test_what_cannot_be_planted_or_hunted(spec, threat, message, network, digits):
    with pytest.raises(InputError, match=message):
        Configured.of(spec)(access_to(network), *digits, threat, torch.Generator())


def test_a_newer_attack_inside_makes_a_newer_diagnostic():
    assert Configured.of("backdoor(attack=pgd)").version == Configured.of("pgd").version
