"""FGSM with a line search against foolbox, closed forms and hand counts."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanLogits
from robbench.threat import Threat, distance

with warnings.catch_warnings():  # it imports from a namespace that SciPy deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    import foolbox

SHAPE = (1, 8, 8)
RADII = 60
# foolbox measures the length of the perturbation, ours is the mean size of a pixel's
ONE_STEP = {
    "linf": (foolbox.attacks.LinfFastGradientAttack, 1),
    "l2": (foolbox.attacks.L2FastGradientAttack, math.sqrt(64)),
    "l1": (foolbox.attacks.L1FastGradientAttack, 64),
}


def access_to(*members, labels=10, **options):
    return Access(Deployed(nn.ModuleList(members), MeanLogits(), SHAPE, labels), **options)


def craft(spec, access, x, y, threat):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(0))


class Noise(nn.Module):
    """Gaussian noise, fresh for every image and pass."""

    def forward(self, x):
        return x + 0.3 * torch.randn_like(x)


class Constant(nn.Module):
    """Always the first label, by a margin that the image cannot change."""

    def forward(self, x):
        return torch.stack([x.sum(dim=(1, 2, 3)) + 99, 0 * x.sum(dim=(1, 2, 3))], dim=1)


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(40)
    return subset.x, subset.y


def by_foolbox(network, x, y, norm):
    """(RADII + 1, N) whether foolbox breaks an image at a radius; (RADII + 1, N, …) its images."""
    attack, scale = ONE_STEP[norm]
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    lengths = [scale * place / RADII for place in range(RADII + 1)]
    _, images, success = attack()(model, x, y, epsilons=lengths)
    return success, torch.stack(images)


@pytest.mark.parametrize("norm", ONE_STEP)
def test_the_radius_is_in_the_first_interval_that_foolbox_breaks(norm, network, digits):
    x, y = digits
    answer = craft(
        f"fgsm-line-search(radii={RADII}, loss=ce)", access_to(network), x, y, Threat(norm=norm)
    )
    success, images = by_foolbox(network, x, y, norm)
    broken = success.any(dim=0) & ~success[0]
    assert broken.sum() > 20
    first = success.float().argmax(dim=0)
    rows = torch.arange(len(x))
    high = distance(images[first, rows], x, norm)[broken]
    low = distance(images[first - 1, rows], x, norm)[broken]
    found = distance(answer, x, norm)[broken]
    assert ((found > low - 1e-6) & (found < high + 1e-6)).all()
    assert (found < high - 1e-3 * high).any()  # some are refined
    assert torch.equal(answer[~broken], x[~broken])


@pytest.mark.parametrize("norm", ONE_STEP)
def test_the_images_found_err_and_are_in_the_box(norm, network, digits):
    x, y = digits
    answer = craft(f"fgsm-line-search(radii={RADII})", access_to(network), x, y, Threat(norm=norm))
    changed = (answer != x).flatten(1).any(dim=1)
    assert (network(answer).argmax(1) != y)[changed].all() and changed.any()
    assert answer.min() >= 0 and answer.max() <= 1


@pytest.mark.parametrize("norm", ONE_STEP)
def test_a_linear_classifier_breaks_at_its_distance_along_the_gradient(norm):
    torch.manual_seed(3)
    layer = nn.Linear(64, 2)
    weight = (layer.weight[1] - layer.weight[0]).detach()
    x = 0.5 + 0.02 * torch.randn(30, *SHAPE)
    network = nn.Sequential(nn.Flatten(), layer)
    gap = (network(x)[:, 1] - network(x)[:, 0]).detach()
    y = (gap > 0).long()
    size = {"linf": weight.sign(), "l2": weight / weight.square().mean().sqrt()}
    along = size.get(norm, weight / weight.abs().mean())
    answer = craft(
        "fgsm-line-search(radii=500)", access_to(network, labels=2), x, y, Threat(norm=norm)
    )
    radius = (answer - x).flatten(1).norm(dim=1) / along.norm()
    excess = radius - gap.abs() / (weight @ along).abs()
    assert (excess > -1e-5).all() and (excess < 1 / 500 / 20 + 1e-5).all()


@pytest.mark.parametrize("chunk", [1, 7, 100000])
def test_how_many_radii_go_at_once_changes_nothing(chunk, network, digits):
    x, y = digits[0][:8], digits[1][:8]
    access = access_to(network)
    expected = craft("fgsm-line-search(radii=30)", access, x, y, Threat())
    access.deployed.chunk = chunk
    assert torch.equal(craft("fgsm-line-search(radii=30)", access, x, y, Threat()), expected)


def test_an_error_on_the_clean_image_is_the_clean_image(network, digits):
    x = digits[0]
    wrong = (network(x).argmax(1) + 1) % 10
    access = access_to(network)
    assert torch.equal(craft("fgsm-line-search", access, x, wrong, Threat()), x)
    assert access.cost.forwards == len(x)


def test_every_radius_is_asked_where_none_breaks(digits):
    x, y = digits[0], torch.zeros_like(digits[1])
    access = access_to(Constant(), labels=2)
    assert torch.equal(craft("fgsm-line-search(radii=25)", access, x, y, Threat()), x)
    # the clean image, the gradient, the radii
    assert (access.cost.forwards, access.cost.backwards) == (27 * len(x), len(x))


def test_a_target_is_reached_where_the_line_meets_it(network, digits):
    x, y = digits
    answer = craft(
        "fgsm-line-search(radii=50)", access_to(network), x, y, Threat(target="least-likely")
    )
    with torch.no_grad():
        target = network(x).scatter(1, y[:, None], math.inf).argmin(dim=1)
        reached = network(answer).argmax(1) == target
    changed = (answer != x).flatten(1).any(dim=1)
    assert changed.any() and reached[changed].all()


def test_no_lucky_draw_ends_the_search(network, digits):
    x, y = digits
    torch.manual_seed(0)
    access = access_to(nn.Sequential(Noise(), network), draws=20)
    answer = craft("fgsm-line-search(radii=100)", access, x, y, Threat())
    with torch.no_grad():
        noisy = nn.Sequential(Noise(), network)
        lost = torch.stack([noisy(answer).argmax(1) != y for _ in range(100)]).float().mean(dim=0)
        clean = torch.stack([noisy(x).argmax(1) != y for _ in range(100)]).float().mean(dim=0)
    changed = (answer != x).flatten(1).any(dim=1)
    assert changed.sum() > 20 and clean[changed].mean() < 0.3
    assert lost[changed].mean() > 0.5


def test_no_radius_is_no_search():
    with pytest.raises(InputError, match="radii = 0: Input should be greater than or equal to 1"):
        Configured.of("fgsm-line-search(radii=0)")
