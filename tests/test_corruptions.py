"""Noise, rotations and shifts against torchvision, scipy and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, corruptions
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanLogits
from robbench.threat import Threat

SHAPE = (1, 8, 8)
NONE = Threat(norm="none")
SPECS = ["gaussian-noise(sigma=0.3, {})", "rotation(degrees=60, {})", "translation({})"]


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(48)
    return subset.x, subset.y


@pytest.fixture(scope="module")
def network(classifier):
    return classifier(nn.ReLU())


def access_to(*members, **options):
    deployed = Deployed(nn.ModuleList(members), MeanLogits(), SHAPE, 10)
    return Access(deployed, gradients=False, **options)


def craft(spec, access, x, y, seed=0):
    return Configured.of(spec)(access, x, y, NONE, torch.Generator().manual_seed(seed))


def lost(access, points, y):
    return access.deployed.decide(points, 1)[0] != y


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 9), (3, 12, 7), (1, 5, 16)], ids=str)
@pytest.mark.parametrize("angle", [-30.0, 0.0, 17.3, 90.0, 145.0])
def test_a_rotation_is_torchvisions(shape, angle):
    torch.manual_seed(0)
    x = torch.rand(3, *shape)
    theirs = TF.rotate(x, angle, InterpolationMode.BILINEAR)
    torch.testing.assert_close(corruptions.rotated(x, torch.full((3,), angle)), theirs)


def test_every_image_is_turned_by_its_own_angle():
    torch.manual_seed(0)
    x, angles = torch.rand(3, *SHAPE), torch.tensor([-20.0, 5.0, 70.0])
    alone = [corruptions.rotated(x[i : i + 1], angles[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(corruptions.rotated(x, angles), torch.cat(alone))


def test_a_translation_is_scipys():
    torch.manual_seed(0)
    x = torch.rand(4, 3, 6, 9)
    shift = torch.tensor([[0, 0], [2, -1], [-3, 3], [1, 2]])
    ours = corruptions.shifted(x, shift, 3)
    for image, by, answer in zip(x, shift.tolist(), ours, strict=True):
        expected = ndimage.shift(image.numpy(), (0, *by), order=0, mode="constant")
        np.testing.assert_array_equal(answer.numpy(), expected)


def test_a_shift_beyond_the_image_leaves_it_black(digits):
    shift = torch.tensor([[9, 0]]).expand(len(digits[0]), 2)
    assert (corruptions.shifted(digits[0], shift, 9) == 0).all()


def test_noise_is_normal_where_the_box_is_far(network):
    x, y = torch.full((200, *SHAPE), 0.5), torch.zeros(200, dtype=torch.int64)
    noise = (craft("gaussian-noise(sigma=0.05)", access_to(network), x, y) - x).flatten()
    assert stats.kstest(noise.numpy(), "norm", args=(0, 0.05)).pvalue > 0.01


def test_angles_are_uniform(monkeypatch, network):
    angles = []
    monkeypatch.setattr(corruptions, "rotated", lambda x, angle: angles.append(angle) or x)
    x, y = torch.zeros(3000, *SHAPE), torch.zeros(3000, dtype=torch.int64)
    craft("rotation(degrees=40)", access_to(network), x, y)
    assert stats.kstest(angles[0].numpy(), "uniform", args=(-40, 80)).pvalue > 0.01


def test_shifts_are_uniform_both_ways(monkeypatch, network):
    shifts = []
    monkeypatch.setattr(corruptions, "shifted", lambda x, by, reach: shifts.append(by) or x)
    x, y = torch.zeros(5000, *SHAPE), torch.zeros(5000, dtype=torch.int64)
    craft("translation(pixels=2)", access_to(network), x, y)
    counts = torch.bincount((shifts[0] + 2) @ torch.tensor([5, 1]), minlength=25)
    assert len(counts) == 25 and stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize("spec", SPECS)
def test_results_are_in_the_box_and_differ_from_the_image(spec, network, digits):
    x, y = digits
    answer = craft(spec.format("tries=2"), access_to(network), x, y)
    assert answer.min() >= 0 and answer.max() <= 1
    assert (answer != x).flatten(1).any(dim=1).float().mean() > 0.9


@pytest.mark.parametrize("spec", SPECS)
def test_one_draw_asks_nothing(spec, network, digits):
    access = access_to(network)
    craft(spec.format("tries=1"), access, *digits)
    assert access.cost.queries == 0


@pytest.mark.parametrize("spec", SPECS)
def test_each_of_several_draws_is_asked_about_once(spec, network, digits):
    access = access_to(network)
    craft(spec.format("tries=4"), access, *digits)
    assert access.cost.queries == 4 * len(digits[0])


@pytest.mark.parametrize("spec", SPECS)
def test_more_draws_are_never_better_for_the_defense(spec, network, digits):
    x, y = digits
    access = access_to(network)
    outcomes = [lost(access, craft(spec.format(f"tries={n}"), access, x, y), y) for n in (1, 3, 9)]
    for fewer, more in itertools.pairwise(outcomes):
        assert more[fewer].all()
    assert outcomes[2].sum() > outcomes[0].sum()


def test_the_grid_of_rotations_is_a_brute_force_over_torchvisions(network, digits):
    x, y = digits
    access = access_to(network)
    answer = craft("rotation(degrees=45, grid=7)", access, x, y)
    angles = np.linspace(-45, 45, 7)
    turned = [TF.rotate(x, angle, InterpolationMode.BILINEAR) for angle in angles]
    expected = torch.stack([lost(access, points, y) for points in turned]).any(dim=0)
    assert torch.equal(lost(access, answer, y), expected)
    assert lost(access, x, y).sum() < expected.sum() < len(x)


def test_the_grid_of_shifts_is_a_brute_force_over_scipys(network, digits):
    x, y = digits
    access = access_to(network)
    answer = craft("translation(pixels=1, grid=true)", access, x, y)
    assert access.cost.queries == 9 * len(x)
    expected = torch.zeros_like(y, dtype=torch.bool)
    for by in itertools.product((-1, 0, 1), repeat=2):
        moved = ndimage.shift(x.numpy(), (0, 0, *by), order=0, mode="constant")
        expected |= lost(access, torch.from_numpy(moved), y)
    assert torch.equal(lost(access, answer, y), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_stream_gives_the_same_answer(spec, network, digits):
    first, again, other = (
        craft(spec.format("tries=2"), access_to(network), *digits, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_stochastic_defense_is_shown_what_it_loses_most_often():
    """Errs in 90 % of the passes where the bright pixel stands up and left, else in 10 %."""

    class Corner(nn.Module):
        def forward(self, x):
            share = 0.1 + 0.8 * x[:, 0, 3, 3]
            wrong = (torch.rand(len(x)) < share).float()
            return torch.stack([1 - wrong, wrong, *torch.zeros(8, len(x))], dim=1)

    x, y = torch.zeros(20, *SHAPE), torch.zeros(20, dtype=torch.int64)
    x[:, :, 4, 4] = 1
    torch.manual_seed(0)
    answer = craft("translation(pixels=1, grid=true)", access_to(Corner(), draws=5), x, y)
    assert (answer[:, 0, 3, 3] == 1).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rotation(tries=5, grid=31)", "write tries=5 or grid=31"),
        ("translation(tries=5, grid=true)", "write tries=5 or grid=true"),
        ("gaussian-noise(sigma=0)", "greater than 0"),
        ("rotation(grid=1)", "greater than or equal to 2"),
    ],
)
def test_settings_that_cannot_work(spec, message, network, digits):
    with pytest.raises(InputError, match=message):
        craft(spec, access_to(network), *digits)
