"""DeepFool against closed forms and foolbox."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured
from robbench.attacks.deepfool import boundaries, nearest
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import ABSTAIN, MeanLogits, Vote
from robbench.threat import Threat, distance

with warnings.catch_warnings():  # it imports from a namespace that SciPy deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    import foolbox

SHAPE = (1, 8, 8)
DUALS = {"linf": 1, "l2": 2}
FOOLBOX = {
    "linf": foolbox.attacks.LinfDeepFoolAttack,
    "l2": foolbox.attacks.L2DeepFoolAttack,
}


def access_to(*members, rule=None, labels=10, **options):
    deployed = Deployed(nn.ModuleList(members), rule or MeanLogits(), SHAPE, labels)
    return Access(deployed, **options)


def craft(spec, access, x, y, threat):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(0))


def affine(weight, bias):
    layer = nn.Linear(weight.shape[1], len(weight))
    layer.weight.data, layer.bias.data = weight, bias
    return nn.Sequential(nn.Flatten(), layer)


class Noise(nn.Module):
    """Gaussian noise, fresh for every image and pass."""

    def forward(self, x):
        return x + 0.2 * torch.randn_like(x)


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(48)
    return subset.x, subset.y


@pytest.fixture(scope="module")
def linear():
    """Five labels, images in the middle of the box, and (N, 4) distances to all boundaries."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 64, generator=generator)
    x = 0.5 + 0.02 * torch.randn(20, *SHAPE, generator=generator)
    network = affine(weight, 0.1 * torch.randn(5, generator=generator))
    with torch.no_grad():
        scores = network(x)
    y = scores.argmax(1)

    def distances(norm):
        others = torch.stack([(y + shift) % 5 for shift in range(1, 5)], dim=1)
        gaps = scores.gather(1, y[:, None]) - scores.gather(1, others)
        slopes = weight[others] - weight[y][:, None]
        return gaps / torch.linalg.vector_norm(slopes, ord=DUALS[norm], dim=2)

    return access_to(network, labels=5), x, y, distances


@pytest.mark.parametrize("norm", DUALS)
def test_a_linear_classifier_is_left_at_its_nearest_boundary(norm, linear):
    access, x, y, distances = linear
    answer = craft("deepfool", access, x, y, Threat(norm=norm))
    nearest = distances(norm).amin(dim=1)
    assert nearest.min() > 0
    ratio = distance(answer, x, norm) / nearest
    assert (ratio > 1 - 1e-5).all() and (ratio < 1.001).all()


def test_the_overshoot_is_there_to_be_used(linear):
    access, x, y, _ = linear
    calm = craft("deepfool(overshoot=0, steps=1)", access, x, y, Threat(norm="l2"))
    some = craft("deepfool(steps=1)", access, x, y, Threat(norm="l2"))
    with torch.no_grad():
        assert (access(calm).argmax(1) == y).any()
        assert (access(some).argmax(1) != y).all()


def test_only_the_likeliest_labels_are_approached():
    # label 2 scores least, but its boundary is the nearest
    weight = torch.zeros(3, 64)
    weight[1, 0], weight[2, 1] = 1, 100
    network = affine(weight, torch.tensor([0.0, -0.8, -60.0]))
    x, y = torch.full((1, *SHAPE), 0.5), torch.tensor([0])
    reached = [
        int(network(craft(spec, access_to(network, labels=3), x, y, Threat(norm="l2"))).argmax())
        for spec in ("deepfool(classes=2)", "deepfool(classes=3)")
    ]
    assert reached == [1, 2]


@pytest.mark.parametrize("norm", DUALS)
def test_it_agrees_with_foolbox_up_to_the_overshoot(norm, network, digits):
    x, y = digits
    answer = craft("deepfool", access_to(network), x, y, Threat(norm=norm))
    model = foolbox.PyTorchModel(network, bounds=(0, 1))
    _, theirs, success = FOOLBOX[norm]()(model, x, y, epsilons=None)
    assert success.all() and (network(answer).argmax(1) != y).all()
    known = distance(theirs, x, norm)
    ratio = (distance(answer, x, norm) / known)[known > 0]
    assert (ratio > 0.975).all() and (ratio < 1.003).all() and ratio.mean() < 1


def test_an_error_on_the_clean_image_needs_no_perturbation(network, digits):
    x = digits[0]
    wrong = (network(x).argmax(1) + 1) % 10
    assert torch.equal(craft("deepfool", access_to(network), x, wrong, Threat(norm="l2")), x)


@pytest.mark.parametrize("norm", DUALS)
def test_without_a_gradient_the_images_come_back(norm, network, digits):
    class Masked(nn.Module):
        def forward(self, x):
            return (x > 0.5).float() + 0 * x

    x, y = digits
    access = access_to(nn.Sequential(Masked(), network))
    assert torch.equal(craft("deepfool(steps=3)", access, x, y, Threat(norm=norm)), x)
    assert (access.trace["dead"][network((x > 0.5).float()).argmax(1) == y] == 1).all()


@pytest.mark.parametrize("norm", DUALS)
def test_a_target_is_reached(norm, network, digits):
    x, y = digits
    answer = craft("deepfool", access_to(network), x, y, Threat(norm=norm, target=7))
    aim = torch.where(y == 7, 8, 7)
    reached = network(answer).argmax(1) == aim
    assert reached.float().mean() > 0.9
    assert torch.equal(answer[~reached], x[~reached])
    untargeted = craft("deepfool", access_to(network), x, y, Threat(norm=norm))
    longer = distance(answer, x, norm).mean() > distance(untargeted, x, norm).mean()
    assert longer and answer.min() >= 0 and answer.max() <= 1


def test_what_is_found_on_a_stochastic_defense_holds_in_fresh_draws(network, digits):
    x, y = digits
    noisy = nn.Sequential(Noise(), network)
    torch.manual_seed(0)
    answer = craft("deepfool", access_to(noisy, draws=20), x, y, Threat(norm="l2"))
    with torch.no_grad():
        lost = torch.stack([noisy(answer).argmax(1) != y for _ in range(100)]).float().mean(dim=0)
    assert (answer != x).flatten(1).any(dim=1).float().mean() > 0.9
    assert lost.mean() > 0.5 and (lost > 0.4).float().mean() > 0.9


def test_a_vote_is_led_to_an_error_and_not_to_silence(classifier, digits):
    x, y = digits
    networks = [classifier(nn.Tanh()), classifier(nn.ReLU()), classifier(nn.Sigmoid())]
    access = access_to(*networks, rule=Vote())
    answer = craft("deepfool", access, x, y, Threat(norm="l2"))
    changed = (answer != x).flatten(1).any(dim=1)
    labels = access.deployed.decide(answer, 1)[0]
    assert changed.float().mean() > 0.8
    assert ((labels != y) & (labels != ABSTAIN))[changed].all()


def test_scores_that_are_not_numbers_stop_the_attack(digits):
    class Root(nn.Module):
        def forward(self, x):  # the slope at 1 is infinite
            return torch.stack([x.mean(dim=(1, 2, 3)), (1 - x[:, 0, 0, 0]).sqrt()], dim=1)

    x, y = digits[0].clone(), torch.ones_like(digits[1])
    x[:3, 0, 0, 0], y[:3] = 1, 0
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 for 3 images"):
        craft("deepfool", access_to(Root(), labels=2), x, y, Threat(norm="l2"))


def test_a_boundary_is_linearised_as_autograd_does(network, digits):
    x, y = digits
    access = access_to(network)
    loss, rivals = boundaries(access, x, y, None, 9)
    plane = nearest(access, x, y, rivals, loss, "l2")
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: network(image[None])[0]))(x)
    scores = network(x)
    others = torch.stack([(y + shift) % 10 for shift in range(1, 10)], dim=1)
    rows = torch.arange(len(x))[:, None]
    gaps = scores.gather(1, others) - scores.gather(1, y[:, None])
    slopes = (jacobian[rows, others] - jacobian[rows, y[:, None]]).flatten(2)
    expected = (gaps.abs() / slopes.norm(dim=2)).amin(dim=1)
    torch.testing.assert_close(plane.distance, expected, rtol=1e-4, atol=1e-6)


def test_passes_are_counted_by_hand(linear):
    access, x, y, _ = linear
    access = Access(access.deployed)
    craft("deepfool", access, x, y, Threat(norm="l2"))
    # ranking, the clean image, four boundaries, the step, six halvings; a gradient per boundary
    assert (access.cost.forwards, access.cost.backwards) == (13 * len(x), 4 * len(x))


@pytest.mark.parametrize(
    ("setting", "message"),
    [("classes=1", "classes = 1: Input should be greater"), ("overshoot=-1", "overshoot = -1")],
)
def test_bad_settings(setting, message):
    with pytest.raises(InputError, match=message):
        Configured.of(f"deepfool({setting})")
