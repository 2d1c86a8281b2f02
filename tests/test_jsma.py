"""JSMA against brute force over pairs, torchattacks and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench import datasets
from robbench.access import Access
from robbench.attacks import Configured, choose_targets, jsma
from robbench.deployed import Deployed
from robbench.errors import InputError
from robbench.rules import MeanLogits, Vote
from robbench.threat import Threat, distance

SHAPE = (1, 8, 8)
L0 = Threat(norm="l0")


@pytest.fixture(scope="module")
def digits():
    subset = datasets.load("digits").subset(32)
    return subset.x, subset.y


def access_to(*members, rule=None, shape=SHAPE, labels=10, **options):
    deployed = Deployed(nn.ModuleList(members), rule or MeanLogits(), shape, labels)
    return Access(deployed, **options)


def craft(spec, access, x, y, threat=L0, seed=0):
    return Configured.of(spec)(access, x, y, threat, torch.Generator().manual_seed(seed))


def best_pair(towards, against):
    """The largest product of sums, both positive, over all pairs of two lists; -inf for none."""
    values = [
        (towards[i] + towards[j]) * (against[i] + against[j])
        for i, j in itertools.combinations(range(len(towards)), 2)
        if towards[i] + towards[j] > 0 and against[i] + against[j] > 0
    ]
    return max(values, default=float("-inf"))


VALUES = st.one_of(st.integers(-3, 3), st.just(float("-inf")))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=9), st.sampled_from([1, 7, 2**22]))
def test_the_pair_is_that_of_a_brute_force(features, at_once):
    """Small whole numbers: many ties, many features that others beat."""
    features = [(float("-inf"),) * 2 if float("-inf") in pair else pair for pair in features]
    towards, against = (list(map(float, part)) for part in zip(*features, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsma, "PAIRS_AT_ONCE", at_once)
        chosen, useful = jsma.most_salient(torch.tensor([towards]), torch.tensor([against]), 1, 2)
    expected = best_pair(towards, against)
    i, j = chosen[0].tolist()
    assert i != j
    if expected > 0:
        assert useful and (towards[i] + towards[j]) * (against[i] + against[j]) == expected
    else:
        sums = sorted((a + b for a, b in features), reverse=True)
        assert bool(useful) == (sums[0] + sums[1] > 0)
        if useful:
            assert sorted([sum(features[i]), sum(features[j])], reverse=True) == sums[:2]


def test_the_pair_is_exact_among_the_features_of_a_cifar_image():
    torch.manual_seed(0)
    towards, against = torch.randn(2, 3072)
    chosen, useful = jsma.most_salient(towards[None], against[None], 9, 2)
    u, v = (part[:, None] + part for part in (towards, against))
    product = torch.where((u > 0) & (v > 0), u * v, 0).fill_diagonal_(0)
    assert useful and product[tuple(chosen[0])] == product.max()


class Recorder(nn.Module):
    """Keeps every image that it was asked about."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.inner(x)


def unbreakable(labels=10, seed=0):
    """A linear model that is sure of the label 0 everywhere in the box, and its weights."""
    torch.manual_seed(seed)
    linear = nn.Linear(64, labels)
    linear.bias.data[0] = 1e4
    return Recorder(nn.Sequential(nn.Flatten(), linear)), linear.weight.detach()


@pytest.mark.parametrize("theta", [0.25, -0.25])
@pytest.mark.parametrize("labels", [2, 10, 12])
def test_a_step_on_a_linear_model_moves_the_pair_of_a_brute_force(theta, labels, digits):
    x = 0.3 + 0.4 * digits[0][:1]
    network, weight = unbreakable(labels)
    up = weight * (1 if theta > 0 else -1)
    towards, against = up[1], up[1] - up.sum(dim=0)

    def salience(pair):
        u, v = (float(part[list(pair)].sum()) for part in (towards, against))
        return u * v if u > 0 and v > 0 else float("-inf")

    expected = x.flatten(1).clone()
    expected[0, list(max(itertools.combinations(range(64), 2), key=salience))] += theta
    threat = Threat(norm="l0", target=1)
    access = access_to(network, labels=labels)
    craft(f"jsma(theta={theta}, steps=1)", access, x, torch.tensor([0]), threat)
    torch.testing.assert_close(network.seen[-1].flatten(1), expected)


@pytest.mark.parametrize("theta", [0.25, -0.25])
def test_single_features_follow_the_saliency_of_equation_8(theta, digits):
    x = 0.3 + 0.4 * digits[0][:1]
    network, weight = unbreakable()
    up = weight * (1 if theta > 0 else -1)
    salience = up[3] * (up[3] - up.sum(dim=0)) * (up[3] > 0) * (up[3] > up.sum(dim=0))
    expected = x.flatten(1).clone()
    expected[0, salience.argmax()] += theta
    threat = Threat(norm="l0", target=3)
    spec = f"jsma(theta={theta}, pairs=false, steps=1)"
    craft(spec, access_to(network), x, torch.tensor([0]), threat)
    torch.testing.assert_close(network.seen[-1].flatten(1), expected)


def test_targeted_agrees_with_torchattacks(network, digits):
    x, y = digits
    threat = Threat(norm="l0", target="least-likely")
    access = access_to(network)
    ours = craft("jsma(gamma=0.25)", access, x, y, threat)
    theirs = torchattacks.JSMA(network, theta=1.0, gamma=0.25)
    theirs.set_mode_targeted_least_likely(quiet=True)
    answer = theirs(x, y)
    target = choose_targets(access, x, y, threat, torch.Generator())
    reached = access.scores(answer).argmax(dim=1) == target
    assert reached.sum() > 8
    assert torch.equal(ours[reached], answer[reached])


def succeeded(access, x, y, target=None):
    with torch.no_grad():
        answer = access.scores(x).argmax(dim=1)
    return answer != y if target is None else answer == target


def test_untargeted_changes_no_more_pixels_than_any_target_needs(network, digits):
    x, y = digits
    access = access_to(network)
    least = torch.full((len(x),), float("inf"), dtype=torch.float64)
    for label in range(10):
        threat = Threat(norm="l0", target=label)
        target = choose_targets(access, x, y, threat, torch.Generator())
        points = craft("jsma(gamma=0.25)", access, x, y, threat)
        length = distance(points, x, "l0")
        least = torch.where(succeeded(access, points, y, target), least.minimum(length), least)
    answer = craft("jsma(gamma=0.25)", access, x, y)
    lost = succeeded(access, answer, y)
    assert lost[least.isfinite()].all() and least.isfinite().any()
    assert (distance(answer, x, "l0") <= least)[lost].all()


def test_more_targets_never_need_more_pixels(network, digits):
    x, y = digits
    access = access_to(network)
    one, all_of_them = (
        craft(f"jsma(gamma=0.25, targets={count})", access, x, y) for count in (1, 9)
    )
    lost = succeeded(access, one, y)
    assert succeeded(access, all_of_them, y)[lost].all()
    fewer = distance(one, x, "l0") - distance(all_of_them, x, "l0")
    assert (fewer[lost] >= 0).all() and (fewer[lost] > 0).any()


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.sampled_from([1.0, 0.4, 0.1, -0.1, -0.4, -1.0]),
    st.sampled_from([0.05, 0.2, 0.5]),
    st.booleans(),
    st.sampled_from(["none", 3]),
    st.integers(0, 2**31),
)
def test_what_is_asked_keeps_to_theta_gamma_and_the_box(theta, gamma, pairs, target, seed):
    torch.manual_seed(seed)
    x, y = torch.rand(1, *SHAPE), torch.tensor([seed % 3])
    recorder = Recorder(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    access = access_to(recorder)
    recorder.seen.clear()  # the probe's
    threat = Threat(norm="l0", target=target)
    spec = f"jsma(theta={theta}, gamma={gamma}, pairs={str(pairs).lower()})"
    points = torch.cat([craft(spec, access, x, y, threat), *recorder.seen])
    moved = points - x
    assert points.min() >= 0 and points.max() <= 1
    assert (moved * theta >= 0).all()
    assert (moved != 0).flatten(1).sum(dim=1).max() <= gamma * 64


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 6, 10)], ids=str)
def test_channels_of_one_pixel_count_once(shape):
    """All of the weight lies on one pixel: its channels are changed together at the price of 1."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 2))
    nn.init.zeros_(network[1].weight)
    weight = network[1].weight.data.view(2, *shape)
    weight[1, :, 2, 3], weight[0, :, 2, 3] = 1, -1
    network[1].bias.data = torch.tensor([3.0, 0.0])
    access = access_to(network, shape=shape, labels=2)
    x, y = torch.full((1, *shape), 0.1), torch.tensor([0])
    answer = craft("jsma", access, x, y)
    assert succeeded(access, answer, y)
    assert distance(answer, x, "l0") == 1
    assert (answer != x).sum() == 2


def three_labels(shape, one, two):
    """Label 0, lost to 1 and to 2 by the features that each of them reads; 2 is the nearer one."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    nn.init.zeros_(network[1].weight)
    weight = network[1].weight.data.view(3, *shape)
    for label, features in ((1, one), (2, two)):
        for feature in features:
            weight[(label, *feature)], weight[(0, *feature)] = 2, -1
    network[1].bias.data = torch.tensor([4.0, 0.0, 0.1])
    return network


def test_of_two_targets_reached_at_once_the_one_of_fewer_pixels_counts():
    shape = (2, 4, 4)
    network = three_labels(shape, one=[(0, 1, 1), (1, 1, 1)], two=[(0, 2, 2), (1, 3, 3)])
    x, y = torch.zeros(1, *shape), torch.tensor([0])
    answer = craft("jsma", access_to(network, shape=shape, labels=3), x, y)
    assert (answer != x).nonzero().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


def test_a_search_that_can_no_longer_be_the_shortest_ends():
    network = three_labels(SHAPE, one=[(0, 1, 1), (0, 1, 2)], two=[(0, 5, 1), (0, 5, 2)])
    network[1].bias.data[2] = -20
    x, y = torch.zeros(1, *SHAPE), torch.tensor([0])
    access = access_to(network, labels=3)
    answer = craft("jsma", access, x, y)
    assert distance(answer, x, "l0") == 2
    # the scores and the answer to x; one step: two gradients of both, an answer to what moved
    assert access.cost.forwards == 2 + 2 * 2 + 2


def test_the_search_goes_on_where_no_pair_passes_the_test():
    """Whatever is brighter raises all labels, the target more than the mean of the others."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    network[1].weight.data = torch.tensor([[0.1], [1.0], [1.5]]).expand(3, 64).clone()
    network[1].bias.data = torch.tensor([1.0, 0.0, -200.0])
    x, y = torch.zeros(1, *SHAPE), torch.tensor([0])
    threat = Threat(norm="l0", target=1)
    answer = craft("jsma", access_to(network, labels=3), x, y, threat)
    assert distance(answer, x, "l0") == 2


def test_the_search_ends_where_no_change_helps():
    """Whatever is brighter raises the target less than the mean of the others."""
    network = Recorder(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    network.inner[1].weight.data = torch.tensor([[2.0], [1.0], [2.0]]).expand(3, 64).clone()
    access = access_to(network, labels=3)
    network.seen.clear()
    x, y = torch.zeros(1, *SHAPE), torch.tensor([0])
    with torch.no_grad():
        network.inner[1].bias.data = torch.tensor([9.0, 0.0, 0.0])
    answer = craft("jsma", access, x, y, Threat(norm="l0", target=1))
    assert all(torch.equal(seen, x) for seen in [answer, *network.seen])


def test_a_failed_search_gives_back_the_image(digits):
    x, y = digits[0], torch.zeros_like(digits[1])
    answer = craft("jsma(gamma=0.05)", access_to(unbreakable()[0]), x, y)
    assert torch.equal(answer, x)


def test_an_image_that_is_lost_already_is_left_alone(network, digits):
    x = digits[0]
    access = access_to(network)
    with torch.no_grad():
        y = (access.scores(x).argmax(dim=1) + 1) % 10
    access.cost.forwards = 0
    assert torch.equal(craft("jsma", access, x, y), x)
    assert access.cost.forwards == 2 * len(x)


def test_passes_by_hand(digits):
    x, y = digits[0][:4], torch.zeros(4, dtype=torch.int64)
    access = access_to(unbreakable()[0])
    craft("jsma(steps=3, targets=5, gamma=0.5)", access, x, y)
    # the scores and the answer to x; then per search and step two gradients and an answer
    assert access.cost.forwards == 4 * 2 + 3 * 4 * 5 * 3
    assert access.cost.backwards == 3 * 4 * 5 * 2


class Flips(nn.Module):
    """Answers the label 1 instead of 0 in a share of the passes, whatever the image."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        flip = (torch.rand(len(x), 1) < self.share).float()
        return torch.cat([1 - flip, flip, torch.zeros(len(x), 8)], dim=1) + 0 * x.sum()


@pytest.mark.parametrize("draws", [1, 20])
def test_a_lucky_draw_is_no_success(draws, digits):
    x, y = digits[0], torch.zeros_like(digits[1])
    torch.manual_seed(0)
    access = access_to(nn.Sequential(Flips(0.2)), draws=draws)
    assert torch.equal(craft("jsma(gamma=0.5)", access, x, y), x)


class Dark(nn.Module):
    """Label 1 below a mean grey, 0 above it."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x):
        grey = x.mean(dim=(1, 2, 3)) - self.level
        return torch.stack([grey, -grey], dim=1)


def test_no_answer_is_no_success_and_the_search_goes_on_to_an_error():
    x, y = torch.full((1, *SHAPE), 0.5), torch.tensor([0])
    access = access_to(Dark(0.47), Dark(0.40), rule=Vote(), labels=2)
    answer = craft("jsma(theta=-1, gamma=1)", access, x, y)
    assert access.deployed.decide(answer, 1).tolist() == [[1]]
    assert distance(answer, x, "l0") == 14  # 0.1 of the grey, in pairs of 2 * 0.5 / 64


def test_a_gradient_that_is_not_a_number_is_said(digits):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10] + 0 * (x.flatten(1)[:, :1] * 0).sqrt()

    with pytest.raises(FloatingPointError, match="^the gradient of the scores is not finite$"):
        craft("jsma", access_to(Broken()), digits[0], digits[0].flatten(1)[:, :10].argmax(dim=1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsma(theta=0)", "a step of 0 changes nothing; write theta=1 or theta=-1"),
        ("jsma(gamma=0.02)", r"gamma = 0.02 lets 1 of 64 features change.*write gamma=0.031"),
        ("jsma(gamma=2)", "less than or equal to 1"),
    ],
)
def test_settings_that_cannot_work(spec, message, network, digits):
    with pytest.raises(InputError, match=message):
        craft(spec, access_to(network), *digits)
