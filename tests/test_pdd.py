"""PDD by hand and against NumPy's histograms; DEG against closed forms and finite differences."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance
from torch import nn
from torch.func import functional_call

from robbench import datasets, registry
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.errors import InputError
from robbench.recipes import Batch
from robbench.training import train

CPU = torch.device("cpu")
TINY = "epochs=1, batch_size=16, network=mlp(hidden=[8])"
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)
FGSM = "adversarial=fgsm(eps=0.05, clean=1)"
PGD = "adversarial=pgd(eps=0.02, steps=2, reach=1, clean=1)"


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:64] for tensor in digits.train)))


def keep_rates(hidden, alpha=0.9, beta=0.1, intervals=4):
    """The function of the module that registers `pdd`."""
    module = inspect.getmodule(registry.defenses.get("pdd"))
    return module.keep_rates(hidden, alpha, beta, intervals)


def test_keep_rates_of_a_row_by_hand():
    # range [0, 8], four intervals of 2; in all 3, 2, 1 and 2 units: the first two are preferred
    hidden = torch.tensor([[[0.0, 1.0, 2.0, 7.0]], [[0.5, 3.0, 4.0, 8.0]]])
    expected = [[0.9, 0.9, 0.1 * 3 / 4, 0.1 * 3 / 4], [0.1 * 3 / 4, 0.9, 0.1 * 3 / 4, 0.1 * 3 / 4]]
    torch.testing.assert_close(keep_rates(hidden)[:, 0], torch.tensor(expected))


def test_of_equally_populated_intervals_the_lower_is_preferred_first():
    hidden = torch.tensor([[[0.0, 2.0]], [[4.0, 8.0]]])  # one unit in each of four intervals
    expected = torch.tensor([[0.9, 0.05], [0.05, 0.05]])
    torch.testing.assert_close(keep_rates(hidden)[:, 0], expected)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30])
def test_a_row_of_equal_activations_is_one_interval(value):
    rates = keep_rates(torch.full((3, 1, 6), value))
    assert rates[0].eq(0.9).all()  # the first member prefers it
    assert rates[1:].eq(0).all()  # to the others it is a crowded one: 1 - N / D = 0


def test_fewer_occupied_intervals_than_members_are_enough():
    hidden = torch.tensor([[[0.0, 0.0]], [[0.0, 8.0]], [[8.0, 8.0]]])
    expected = torch.tensor([[0.9, 0.9], [0.05, 0.9], [0.0, 0.0]])
    torch.testing.assert_close(keep_rates(hidden)[:, 0], expected)


def by_histogram(row, alpha, beta, intervals):
    """Keep rates (K, D) of one image, from NumPy's histograms of all members and of each."""
    members, units = row.shape
    edges = np.histogram_bin_edges(row, intervals)
    interval = np.clip(np.searchsorted(edges, row, side="right") - 1, 0, intervals - 1)
    total = np.histogram(row, edges)[0]
    order = sorted(range(intervals), key=lambda m: (-total[m], m))
    rates = np.zeros(row.shape)
    for k in range(members):
        own = np.histogram(row[k], edges)[0]
        for d in range(units):
            m = interval[k, d]
            rates[k, d] = alpha if m == order[k] else beta * (1 - own[m] / units)
    return rates


@given(seed=SEEDS, members=st.integers(1, 3), intervals=st.sampled_from([4, 8, 16]))
@PROPERTY
def test_keep_rates_agree_with_histograms_of_every_image(seed, members, intervals):
    values = np.random.default_rng(seed).integers(0, 17, size=(members, 5, 12))
    values[0, :, :2] = 0, 16  # whole numbers and edges: no rounding moves a unit
    hidden = torch.from_numpy(values / 1.0)
    found = keep_rates(hidden, 0.8, 0.2, intervals).numpy()
    for image in range(5):
        expected = by_histogram(values[:, image], 0.8, 0.2, intervals)
        np.testing.assert_allclose(found[:, image], expected)


@given(seed=SEEDS, scale=st.integers(-30, 30))
@PROPERTY
def test_images_have_intervals_of_their_own_whatever_their_scale(seed, scale):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.rand(3, 2, 20, generator=rng)
    scaled = torch.cat([hidden[:, :1], hidden[:, 1:] * 2.0**scale], dim=1)
    assert torch.equal(keep_rates(scaled, intervals=10), keep_rates(hidden, intervals=10))


class Bare(nn.Module):
    """A network whose features are the pixels, and whose readout leaves them alone."""

    def __init__(self, readout=None):
        super().__init__()
        self.readout = readout or nn.Identity()

    def features(self, x):
        return x.flatten(1)

    def forward(self, x):
        return self.readout(self.features(x))


def bare(*readouts):
    return nn.ModuleList(Bare(readout) for readout in readouts).train()


def kept(spec, n=4000):
    """(3, n, 12) of what training sees of n copies of an image, the image, and its keep rates."""
    image = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    torch.manual_seed(1)
    seen = resolve(spec)[0].forward(bare(None, None, None), image.expand(n, -1, -1, -1)).logits[0]
    rates = keep_rates(image.flatten(1).expand(3, 1, -1), intervals=10)
    return seen, image.flatten(), rates[:, 0]


def test_units_are_kept_as_often_as_their_rates_say_and_otherwise_unchanged():
    seen, image, rates = kept("pdd")
    share = (seen != 0).float().mean(dim=1)
    assert ((share - rates).abs() < 4.5 * (rates * (1 - rates) / 4000).sqrt()).all()
    assert torch.equal(seen, (seen != 0) * image)


def test_rescaled_activations_have_the_expectation_of_test_time():
    seen, image, rates = kept("pdd(rescale=true)")
    error = image * ((1 - rates) / rates / 4000).sqrt()
    assert ((seen.mean(dim=1) - image).abs() < 4.5 * error).all()


@pytest.mark.parametrize("rescale", [True, False])
def test_gradients_pass_where_units_are_kept_and_nowhere_else(rescale):
    x = (torch.rand(6, 1, 3, 4, generator=torch.Generator().manual_seed(2)) + 0.1).requires_grad_()
    defense = resolve(f"pdd(rescale={str(rescale).lower()})")[0]
    logits = defense.forward(bare(None, None, None), x).logits[0]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    gradient = torch.autograd.grad((logits * weight).sum(), x)[0].flatten(1)
    mask = (logits / x.flatten(1)).detach()
    torch.testing.assert_close(gradient, (mask * weight).sum(0))


@pytest.mark.parametrize("name", ["pdd", "pdd+deg"])
def test_everything_is_kept_at_test(name):
    defense = resolve(f"{name}({TINY})")[0]
    members = defense.build((1, 8, 8), 10).eval()
    x = torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        expected = torch.stack([member(x) for member in members])
        assert torch.equal(defense.forward(members, x).logits[0], expected)


@pytest.mark.parametrize("wrong", ["intervals=3", "members=10", "alpha=1.1", "beta=-0.1"])
def test_settings_that_leave_no_choice_are_refused(wrong):
    with pytest.raises(InputError, match=wrong.partition("=")[0]):
        resolve(f"pdd({wrong})")


def linear(*weights):
    members = bare(*(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights))
    for member, weight in zip(members, weights, strict=True):
        member.readout.weight.data = weight
    return members


class Sure(nn.Module):
    """A linear readout with something added to its logits (N, L)."""

    def __init__(self, weight, added):
        super().__init__()
        self.weight, self.added = weight, added

    def forward(self, hidden):
        return hidden @ self.weight.T + self.added


def losses(defense, members, x, y):
    """(N,) what training minimises on clean images."""
    return defense.loss(members, Batch(x, y, x, 10))


def random_linear(seed, members=3, labels=5):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(members, labels, 12, generator=rng, dtype=torch.float64)
    x = torch.rand(6, 1, 3, 4, generator=rng, dtype=torch.float64)
    return weights, x, torch.randint(labels, (6,), generator=rng)


def cosines(weights, masks, x, y):
    """(N,) sums over pairs, of gradients W^T (p - 1_y) of linear members by hand and SciPy."""
    gradients = []
    for weight, mask in zip(weights, masks, strict=True):
        p = ((mask * x.flatten(1)) @ weight.T).softmax(1)
        gradients.append(mask * ((p - F.one_hot(y, p.shape[1])) @ weight))
    return [
        sum(1 - distance.cosine(a, b) for i, a in enumerate(g) for b in g[i + 1 :])
        for g in torch.stack(gradients, dim=1).numpy()
    ]


@given(seed=SEEDS, members=st.integers(2, 5))
@PROPERTY
def test_the_penalty_is_the_sum_of_cosines_of_the_closed_form_gradients(seed, members):
    weights, x, y = random_linear(seed, members)
    one = losses(resolve("deg(lam=1)")[0], linear(*weights), x, y)
    none = losses(resolve("deg(lam=0)")[0], linear(*weights), x, y)
    expected = cosines(weights, torch.ones(members, 6, 12), x, y)
    np.testing.assert_allclose((one - none).detach(), expected, atol=1e-9)


def test_with_pdd_gradients_are_those_of_the_masked_members():
    weights, x, y = random_linear(0)
    values, members = [], linear(*weights)
    for lam in (1, 0):
        torch.manual_seed(5)  # the same masks
        values.append(losses(resolve(f"pdd+deg(lam={lam})")[0], members, x, y).detach())
    torch.manual_seed(5)
    masks = torch.bernoulli(keep_rates(x.flatten(1).expand(3, -1, -1).float(), intervals=10))
    expected = np.nan_to_num(cosines(weights, masks, x, y))
    np.testing.assert_allclose(values[0] - values[1], expected, atol=1e-9)


@pytest.mark.parametrize("members", [2, 3, 5])
def test_identical_members_pay_for_every_pair(members):
    weights, x, y = random_linear(1, 1)
    alike = linear(*weights.expand(members, -1, -1))
    penalty = losses(resolve("deg(lam=1)")[0], alike, x, y) - members * losses(
        resolve("deg")[0], linear(*weights), x, y
    )
    torch.testing.assert_close(penalty, torch.full_like(penalty, members * (members - 1) / 2))


def test_opposed_members_are_paid_for():
    weights, x, y = random_linear(2, 1, labels=2)
    pair = linear(weights[0], -weights[0])  # of two labels: one gradient is minus the other's
    paid = losses(resolve("deg(lam=1)")[0], pair, x, y) - losses(
        resolve("deg(lam=0)")[0], pair, x, y
    )
    torch.testing.assert_close(paid, -torch.ones_like(paid))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 100.0, 1e4])
def test_members_that_are_sure_or_dead_leave_loss_and_gradients_finite(scale):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.eye(4, 12).view(4, 1, 3, 4), torch.arange(4)
    noise = torch.randn(2, 4, 12, generator=rng)
    members = linear(scale * (torch.eye(4, 12) + 0.1 * noise[0]), noise[1])
    value = losses(resolve("deg")[0], members, x, y).sum()
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in members.parameters())


def test_sure_members_pay_what_the_same_members_pay_in_doubt():
    weights, x, y = random_linear(5, members=2)
    paid = []
    for confidence in (0.0, 800.0):  # exp(-800) is 0: the cross-entropy has no gradient left
        members = bare(*(Sure(weight, confidence * F.one_hot(y, 5)) for weight in weights))
        one, none = (losses(resolve(f"deg(lam={lam})")[0], members, x, y) for lam in (1, 0))
        paid.append((one - none).detach())
    torch.testing.assert_close(paid[0], paid[1])


@pytest.mark.parametrize("name", ["deg(lam=0.5)", "pdd+deg(lam=0.5)"])
def test_second_derivatives_agree_with_finite_differences(name):
    torch.manual_seed(0)
    defense, (_, x, y) = resolve(name)[0], random_linear(3, labels=3)
    x, y = x[:2], y[:2]
    readouts = (nn.Sequential(nn.Linear(12, 2), nn.Tanh(), nn.Linear(2, 3)) for _ in range(3))
    members = bare(*readouts).double()
    names, parameters = zip(*members.named_parameters(), strict=True)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = members

        def forward(self):
            torch.manual_seed(5)  # the masks of every evaluation
            return losses(defense, self.members, x, y).sum()

    def value(*weights):
        given = {f"members.{key}": weight for key, weight in zip(names, weights, strict=True)}
        return functional_call(Loss(), given, ())

    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("adversarial", ["adversarial=none", FGSM, PGD])
@pytest.mark.parametrize(
    ("off", "plain"), [("deg(lam=0, ", "ensemble("), ("pdd+deg(lam=0, ", "pdd(")]
)
def test_without_its_penalty_deg_is_what_is_left_bit_for_bit(off, plain, adversarial, dataset):
    weights = []
    for name in (off, plain):
        defense = resolve(f"{name}{TINY}, {adversarial})")[0]
        torch.manual_seed(0)
        members = defense.build((1, 8, 8), 10)
        train(defense, members, dataset, 0, CPU)
        weights.append(members.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.parametrize("adversarial", [FGSM, PGD, "adversarial=trades(eps=0.05, steps=2)"])
@pytest.mark.parametrize("name", ["pdd", "deg", "pdd+deg"])
def test_they_combine_with_adversarial_training(name, adversarial, dataset):
    defense = resolve(f"{name}({TINY}, {adversarial})")[0].model_copy(update={"epochs": 3})
    torch.manual_seed(0)
    curve = train(defense, defense.build((1, 8, 8), 10), dataset, 0, CPU)
    assert curve[-1]["loss"] < curve[0]["loss"]


@pytest.mark.parametrize(
    ("adversarial", "clean"), [("trades(eps=0.1, beta=0)", True), ("fgsm(eps=0.1)", False)]
)
def test_gradients_are_taken_at_the_images_that_are_trained_on(adversarial, clean):
    weights, x, y = random_linear(4)
    moved = (x + 0.1 * torch.rand_like(x)).clamp(0, 1)
    one, none = (
        resolve(f"deg(lam={lam}, adversarial={adversarial})")[0].loss(
            linear(*weights), Batch(moved, y, x, 5)
        )
        for lam in (1, 0)
    )
    expected = cosines(weights, torch.ones(3, 6, 12), x if clean else moved, y)
    np.testing.assert_allclose((one - none).detach(), expected, atol=1e-9)
