"""The probe against networks of which everything that it measures is known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from robbench.access import Access
from robbench.attacks import Configured
from robbench.deployed import Deployed
from robbench.networks.bpda import BPDA
from robbench.rules import ABSTAIN, Answer, MeanLogits
from robbench.threat import Threat

SHAPE, LABELS, IMAGES = (1, 4, 4), 5, 12
WEIGHT = torch.randn(16, LABELS, generator=torch.Generator().manual_seed(0))


class Of(nn.Module):
    """Logits by a function of the images (N, 16) and the linear map behind it."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("weight", WEIGHT.clone())

    def forward(self, x):
        return self.function(x.flatten(1), lambda flat: flat @ self.weight)


def plain(x, linear):
    return linear(x)


def noisy(x, linear):
    return linear(x + 0.5 * torch.randn_like(x))


def reseeding(x, linear):
    torch.manual_seed(3)
    return noisy(x, linear)


def coupled(x, linear):
    return linear(x / x.std())


def purifying(x, linear):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return linear(x + torch.autograd.grad(linear(leaf).sum(), leaf)[0])


def probed(network, rule=None, **settings):
    """What the probe says of a network on fixed images, whose labels are what it answers to them
    without its randomness."""
    network = network if isinstance(network, nn.Module) else Of(network)
    x = torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(1))
    y = (x.flatten(1) @ WEIGHT).argmax(dim=1)
    access = Access(Deployed(nn.ModuleList([network]), rule or MeanLogits(), SHAPE, LABELS))
    rng = torch.Generator().manual_seed(2)
    attack = Configured.of("probe" if not settings else f"probe(draws={settings['draws']})")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        assert attack(access, x, y, Threat(norm="none"), rng) is x
    return access.notes["probe"]


def test_a_linear_network_has_nothing_to_report():
    seen = probed(plain)
    assert seen["repeatability"] | {"batch": 0} == {
        "kinds": ["none"], "calls": 0, "seeded": 0, "labels": 0, "batch": 0,
    }  # fmt: skip
    assert seen["repeatability"]["batch"] < 1e-6
    assert seen["paths"] == {"judge": 1, "attack": 1, "error": 0}
    assert (seen["agreement"], seen["optimises"], seen["changed"]) == (1, False, [])
    assert seen["derivative"]["error"] < 1e-7
    assert not seen["reseeds"]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_the_derivative_that_is_cut_off_is_the_error_found(share):
    seen = probed(lambda x, linear: linear((1 - share) * x + share * x.detach()))
    assert seen["derivative"]["error"] == pytest.approx(share, rel=1e-6)


def test_a_declared_backward_is_named_and_not_measured():
    network = nn.Sequential(BPDA(nn.Threshold(0.5, 0.0)), Of(plain))
    assert probed(network)["derivative"] == {"declared": ["Threshold as Identity"]}


def test_the_derivative_of_images_that_have_a_part_in_each_others_answers_is_right():
    seen = probed(coupled)
    assert seen["repeatability"]["batch"] > 1e-4
    assert (seen["derivative"]["images"], seen["derivative"]["error"] < 1e-6) == (4, True)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_gradients_of_independent_draws_agree_as_their_noise_lets_them(sigma):
    """Where scores are so close that the softmax stands still, a pixel's gradient in one draw is
    g (1 + σ n), and means of K draws have the cosine 1 / (1 + σ² / K), up to the luck of images."""
    draws = 8

    def random_slope(x, linear):
        return linear(1e-3 * x * (1 + sigma * torch.randn_like(x)))

    seen = probed(random_slope, draws=draws)
    assert seen["agreement"] == pytest.approx(1 / (1 + sigma**2 / draws), abs=0.06)


def test_the_roughness_of_a_linear_network_does_not_depend_on_its_scale():
    soft, loud = probed(plain)["noise"], probed(lambda x, linear: 1e3 * linear(x))["noise"]
    assert 0 < soft < 0.1
    assert loud == pytest.approx(soft, rel=1e-4)


def test_a_network_that_turns_within_a_grey_level_is_rough():
    assert probed(lambda x, linear: linear((2000 * x).sin()))["noise"] > 0.1


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (plain, "logits"),
        (lambda x, linear: linear(x).softmax(dim=1), "probabilities"),
        (lambda x, linear: linear(x).log_softmax(dim=1), "log-probabilities"),
        (lambda x, linear: linear(x) - 100, "all-negative"),
    ],
)
def test_what_the_members_answer_with_is_named(function, kind):
    assert probed(function)["outputs"]["kind"] == kind


def test_the_range_is_that_of_the_widest_image():
    x = torch.rand(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(1)).flatten(1)
    logits = x @ WEIGHT
    widest = float((logits.amax(dim=1) - logits.amin(dim=1)).max())
    assert probed(plain)["outputs"]["range"] == pytest.approx(widest, rel=1e-6)


def test_noise_is_repeated_under_the_same_seed_and_differs_from_call_to_call():
    seen = probed(noisy)["repeatability"]
    assert (seen["kinds"], seen["seeded"], seen["batch"]) == (["image"], 0, 0)
    assert seen["calls"] > 0.1


def test_a_stream_of_its_own_is_not_repeated_under_the_same_seed():
    stream = torch.Generator().manual_seed(0)
    seen = probed(lambda x, linear: linear(x + torch.randn(x.shape, generator=stream)))
    assert seen["repeatability"]["seeded"] > 0.1


@pytest.mark.parametrize(("function", "expected"), [(noisy, False), (reseeding, True)])
def test_an_answer_that_sets_the_global_stream_is_noticed(function, expected):
    assert probed(function)["reseeds"] is expected


@pytest.mark.parametrize("function", [plain, noisy])
def test_attacks_and_judge_see_the_same_defense_within_the_luck_of_draws(function):
    seen = probed(function)["paths"]
    assert abs(seen["judge"] - seen["attack"]) <= max(0.005, 4 * seen["error"])


def test_a_rule_that_decides_otherwise_than_its_scores_say_is_seen():
    class Last(MeanLogits):
        def decide(self, draw):
            return self.scores(draw).argmin(dim=1)

        def answer(self, draw):
            label = self.decide(draw)
            return Answer(label, label, label.float())

    seen = probed(plain, Last())["paths"]
    assert (seen["judge"], seen["attack"]) == (0, 1)


def test_derivatives_inside_an_answer_are_noticed():
    assert probed(purifying)["optimises"]


def test_a_buffer_that_an_answer_changes_is_named():
    class Counting(Of):
        def __init__(self):
            super().__init__(plain)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    assert probed(Counting())["changed"] == ["members.0.calls"]


@dataclass(frozen=True)
class Bright(MeanLogits):
    """No answer where the first label scores above a threshold."""

    threshold: float
    abstains: ClassVar[bool] = True

    def decide(self, draw):
        scores = self.scores(draw)
        return scores.argmax(dim=1).masked_fill(scores[:, 0] > self.threshold, ABSTAIN)


@pytest.mark.parametrize(("threshold", "share"), [(math.inf, 0), (-math.inf, 1)])
def test_what_is_refused_is_counted_on_images_and_on_noise(threshold, share):
    assert probed(plain, Bright(threshold))["abstained"] == {"clean": share, "noise": share}


def test_images_without_a_gradient_are_listed_for_the_losses_that_have_none():
    seen = probed(lambda x, linear: 1e4 * linear(x))["gradients"]
    assert len(seen["ce"]["dead"]) > IMAGES / 2
    assert seen["margin"]["dead"] == seen["dlr"]["dead"] == []


def test_a_loss_without_a_way_back_to_the_image_says_so():
    seen = probed(lambda x, linear: linear(x.detach()))["gradients"]
    assert [entry["path"] for entry in seen.values()] == [False] * 3
