"""Randomized smoothing against ART, scipy and the classifier whose smoothing is known exactly."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from robbench import datasets, registry
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.networks import Normalize
from robbench.rules import ABSTAIN, Draw, MeanLogits
from robbench.training import train

SHAPE, LABELS = (1, 8, 8), 10
TINY = "network=resnet8(width=2), epochs=2, batch_size=16"
smoothing = inspect.getmodule(registry.defenses.get("smoothing"))
COUNTS = st.lists(st.integers(0, 300), min_size=4, max_size=4).filter(any)


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:33] for tensor in digits.train)))


def trained(spec, dataset):
    defense = resolve(spec)[0]
    torch.manual_seed(0)
    members = defense.build(SHAPE, LABELS)
    train(defense, members, dataset, 0, torch.device("cpu"))
    return members


def test_without_noise_training_and_logits_are_those_of_standard(dataset):
    plain = trained(f"standard({TINY})", dataset)
    quiet = trained(f"smoothing({TINY}, sigma=0)", dataset)
    state = quiet.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert torch.equal(plain[0](dataset.test.x[:50]), quiet[0](dataset.test.x[:50]))


def test_it_goes_around_the_networks_of_a_base_with_their_weights(dataset):
    base = trained(f"standard({TINY})", dataset)
    defense = resolve(f"smoothing(base=standard({TINY}), epochs=0, noise=false)")[0]
    members = defense.build(SHAPE, LABELS)
    defense.start(members, base)
    x = dataset.test.x[:50]
    assert torch.equal(members.eval()[0](x), base[0](x))


def test_without_noise_it_answers_like_its_network(dataset):
    quiet = resolve(f"smoothing({TINY}, noise=false)")[0]
    members = trained(f"smoothing({TINY}, noise=false)", dataset)
    x = dataset.test.x[:50]
    with torch.no_grad():
        answers = Deployed(members, quiet.rule(), SHAPE, LABELS).decide(x, 1)[0]
        assert torch.equal(answers, members[0](x).argmax(dim=1))


def test_a_noisy_base_keeps_its_own_noise():
    spec = "smoothing(base=ito(members=2, network=resnet8(width=2)), epochs=0, noise=false)"
    members = resolve(spec)[0].build(SHAPE, LABELS).eval()
    deployed = Deployed(members, MeanLogits(), SHAPE, LABELS)
    assert (len(members), deployed.randomness) == (2, ["image", "image"])


def test_a_base_that_takes_its_images_elsewhere_is_refused_in_one_line():
    with pytest.raises(InputError, match="smoothing adds its noise where"):
        resolve("smoothing(base=random-resize-pad)")[0].build(SHAPE, LABELS)


def test_the_noise_is_normal_with_deviation_sigma_in_units_of_pixels():
    layer = smoothing.NoisyNormalize(Normalize((0.3,), (0.5,)), 0.25)
    x = torch.rand(100, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    noise = (layer(x) - Normalize((0.3,), (0.5,))(x)) * 0.5 / 0.25
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01


def test_the_gradient_passes_the_noise_unchanged():
    layer = smoothing.NoisyNormalize(Normalize((0.3, 0.1), (0.5, 2.0)), 0.25).double()

    def repeated(x):
        torch.manual_seed(0)
        return layer(x)

    x = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(repeated, x)


def ballots(counts):
    """A draw of one image with so many votes for every label."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Draw(torch.eye(len(counts))[labels][:, None, None])


def smoothed_by_art(counts, alpha, sigma=0.5):
    """ART's smoothing of a classifier that gives these votes, one list after the other."""

    queue = [np.array(votes) for votes in counts]

    class Counted(PyTorchRandomizedSmoothing):
        def _prediction_counts(self, x, n=None, batch_size=128):
            return queue.pop(0)

        def _lower_confidence_bound(self, k, n):  # ART's needs a package that it does not install
            return stats.binomtest(int(k), int(n)).proportion_ci(1 - 2 * alpha, "exact").low

    return Counted(
        nn.Flatten(), nn.CrossEntropyLoss(), (1, 2, 2), 4, scale=sigma, alpha=alpha, sample_size=1
    )


@given(counts=COUNTS, alpha=st.sampled_from([0.001, 0.05, 0.3]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_vote_is_decided_or_refused_as_by_art(counts, alpha):
    answer = smoothed_by_art([counts], alpha).predict(np.zeros((1, 1, 2, 2), np.float32))[0]
    expected = int(answer.argmax()) if answer.any() else ABSTAIN
    rule = resolve(f"smoothing(alpha={alpha})")[0].rule()
    assert rule.decide(ballots(counts)).item() == expected


@given(first=COUNTS, second=COUNTS, alpha=st.sampled_from([0.001, 0.05, 0.3]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_certificates_are_those_of_art(first, second, alpha):
    queue = [ballots(first), ballots(second)]
    members = [smoothing.NoisyNormalize(Normalize((0.0,), (1.0,)), 0.5)]
    deployed = SimpleNamespace(members=members, labels=4, draw=lambda x, draws: queue.pop(0))
    sizes = {"n0": 1, "n": 1}  # one call each; how many votes it holds is up to the queue
    ours = smoothing.certify(deployed, torch.zeros(1, 1, 2, 2), 0.5, alpha=alpha, **sizes)
    art = smoothed_by_art([first, second], alpha)
    label, radius = art.certify(np.zeros((1, 1, 2, 2), np.float32), n=sum(second))
    assert ours.labels.item() == label[0]
    assert ours.radius.item() == pytest.approx(radius[0], rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module")
def half_spaces():
    """A linear classifier in two labels under noise of 0.25, and how far images are from its
    boundary: by theorem 1 the radius of its smoothing."""
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0] * 4, [3.0, -4.0, 0.0, 12.0]]))
        linear.bias.copy_(torch.tensor([0.0, -5.5]))
    noisy = smoothing.NoisyNormalize(Normalize((0.0,), (1.0,)), 0.25)
    members = nn.ModuleList([nn.Sequential(noisy, nn.Flatten(), linear)]).eval()
    deployed = Deployed(members, MeanLogits(), (1, 2, 2), 2)
    x = torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    score = linear(x.flatten(1)).detach()
    return deployed, x, score.argmax(1), (score[:, 1] - score[:, 0]).abs() / 13


def test_the_radius_of_half_spaces_is_at_most_their_distance_and_close_to_it(half_spaces):
    deployed, x, labels, distance = half_spaces
    torch.manual_seed(0)
    found = smoothing.certify(deployed, x, 0.25, n=20_000)
    certain = found.labels != ABSTAIN
    assert torch.equal(found.labels[certain], labels[certain])
    assert bool((found.radius <= distance).all())
    near = distance.clamp_max(0.6)  # no radius is above σ Φ⁻¹(α^(1/n)) = 0.85
    assert bool((found.radius >= near - 0.05).all())
    assert torch.equal(certain, found.radius > 0)


def test_more_draws_than_are_held_at_once_are_counted_once_each(half_spaces):
    deployed, x, _, _ = half_spaces
    sizes = []
    counted = SimpleNamespace(
        members=deployed.members,
        labels=2,
        draw=lambda x, draws: sizes.append(draws) or deployed.draw(x, draws),
    )
    smoothing.certify(counted, x, 0.25, n0=7, n=1203)
    assert (sizes[0], sum(sizes[1:]), max(sizes)) == (7, 1203, smoothing.AT_ONCE)


@pytest.mark.parametrize("wrong", [{"sigma": 0}, {"n0": 0}, {"n": 0}, {"alpha": 0}, {"alpha": 1}])
def test_certificates_that_mean_nothing_are_refused(half_spaces, wrong):
    given = {"sigma": 0.25, "n0": 1, "n": 1, "alpha": 0.1, **wrong}
    with pytest.raises(InputError, match="certify with .* write sigma > 0"):
        smoothing.certify(*half_spaces[:2], **given)


def test_members_vote_together():
    draw = ballots([9, 1, 0, 0])
    pair = Draw(draw.logits.view(5, 2, 1, 4))
    rule = resolve("smoothing(alpha=0.03)")[0].rule()
    assert rule.decide(pair).item() == rule.decide(draw).item() == 0


def test_copies_do_not_share_their_noise():
    network = resolve("smoothing(network=resnet8(width=2))")[0].build(SHAPE, LABELS)[0].eval()
    assert Deployed(
        nn.ModuleList([network, deepcopy(network)]), MeanLogits(), SHAPE, LABELS
    ).randomness == ["image", "image"]


@pytest.mark.parametrize("spec", ["smoothing(noise=false)", "smoothing(sigma=0.5)", "standard"])
def test_a_radius_needs_the_noise_that_it_holds_for(spec):
    defense = resolve(f"{spec.removesuffix(')')}{', ' if '(' in spec else '('}network=mlp)")[0]
    deployed = Deployed(defense.build((1, 8, 8), 10).eval(), defense.rule(), (1, 8, 8), 10)
    with pytest.raises(InputError, match=r"certify with sigma=0\.25: a member has noise of"):
        smoothing.certify(deployed, torch.rand(2, 1, 8, 8), 0.25, n0=5, n=5)


def test_members_of_a_smoothed_base_are_its_own():
    with pytest.raises(InputError, match="members are those of the base"):
        resolve("smoothing(base=standard, members=3)")
