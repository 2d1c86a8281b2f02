"""Reverse cross-entropy: the loss, the two bounds of paper 003, and training with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special

from robbench import datasets, registry
from robbench.checkpoints import Shelf
from robbench.datasets import Dataset, Split
from robbench.defense import resolve
from robbench.metrics.detection import non_me
from robbench.recipes import Batch
from robbench.rules import Draw
from robbench.training import train

SMALL = "network=mlp(hidden=[32]), epochs=15"
LOGITS = st.lists(st.floats(-30, 30), min_size=3, max_size=8)
PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)


def losses(logits, y, spec="rce"):
    """(N,) the training loss of networks that answer these logits, (N, L) or (M, N, L)."""
    stacked = logits[None, None] if logits.dim() == 2 else logits[None]
    return resolve(spec)[0].criterion(Draw(stacked), y, torch.empty(0))


def randoms(n=6, labels=5, seed=0, scale=3.0):
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, labels, generator=rng, dtype=torch.float64)
    return logits, torch.randint(labels, (n,), generator=rng)


def reverse(y, labels):
    """R_y written out."""
    rows = np.full((len(y), labels), 1 / (labels - 1))
    rows[np.arange(len(y)), y] = 0
    return torch.from_numpy(rows)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    shelf = Shelf([tmp_path_factory.mktemp("shelf")])
    return shelf.deploy(f"rce({SMALL})", digits, 0, torch.device("cpu")).deployed


def test_the_loss_is_the_cross_entropy_with_the_reverse_label_of_what_is_not_reversed():
    logits, y = randoms()
    expected = -(reverse(y, 5).numpy() * special.log_softmax(-logits.numpy(), 1)).sum(1)
    np.testing.assert_allclose(losses(logits, y).numpy(), expected, rtol=1e-12)


def test_the_gradient_by_the_logits_before_reversal_is_p_minus_the_reverse_label():
    z, y = randoms()
    z.requires_grad_()
    gradient = torch.autograd.grad(losses(-z, y).sum(), z)[0]
    torch.testing.assert_close(gradient, z.detach().softmax(1) - reverse(y, 5))


def test_the_loss_passes_gradcheck():
    logits, y = randoms()
    assert torch.autograd.gradcheck(lambda z: losses(z, y), logits.requires_grad_())


@given(values=LOGITS, y=st.integers(0, 2))
@PROPERTY
def test_the_loss_is_never_below_the_logarithm_of_the_wrong_labels(values, y):
    loss = losses(torch.tensor([values], dtype=torch.float64), torch.tensor([y]))
    assert float(loss) >= math.log(len(values) - 1) - 1e-9


@pytest.mark.parametrize("labels", [2, 3, 10])
def test_it_reaches_that_bound_where_all_wrong_labels_are_alike(labels):
    logits = torch.full((1, labels), -60.0, dtype=torch.float64)
    logits[0, 1] = 60.0
    assert losses(logits, torch.tensor([1])).item() == pytest.approx(math.log(labels - 1))


def test_a_true_label_whose_probability_underflows_costs_no_nan():
    logits = torch.tensor([[1e4, 0.0, 0.0], [-1e4, 0.0, 0.0]], requires_grad=True)
    loss = losses(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(loss.detach(), torch.tensor([math.log(2), 1e4]))
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_of_two_labels_it_is_the_cross_entropy():
    logits, y = randoms(labels=2)
    torch.testing.assert_close(losses(logits, y), F.cross_entropy(logits, y, reduction="none"))


def test_training_on_two_labels_is_that_of_the_undefended_network(digits):
    def picked(split):
        two = split.y < 2
        return Split(split.x[two], split.y[two])

    splits = (picked(split) for split in (digits.train, digits.validation, digits.test))
    two = Dataset("two", *splits, ("0", "1"), digits.eps, digits.control)
    weights = []
    for name in ("rce", "standard"):
        defense = resolve(f"{name}(network=mlp(hidden=[8]), epochs=2)")[0]
        torch.manual_seed(0)
        members = defense.build(two.shape, 2)
        train(defense, members, two, 0, torch.device("cpu"))
        weights.append(torch.cat([p.flatten() for p in members.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_mixed_labels_cost_the_mix_of_the_losses():
    logits, y = randoms()
    other = (y + 1) % 5
    shares = 0.3 * F.one_hot(y, 5) + 0.7 * F.one_hot(other, 5)
    expected = 0.3 * losses(logits, y) + 0.7 * losses(logits, other)
    torch.testing.assert_close(losses(logits, shares.double()), expected)


def test_members_are_trained_on_the_sum_of_their_losses():
    (first, y), (second, _) = randoms(seed=1), randoms(seed=2)
    joint = losses(torch.stack([first, second]), y, "rce(members=2)")
    torch.testing.assert_close(joint, losses(first, y) + losses(second, y))


def near_the_reverse_label(values, first, scale):
    """(Z, alpha): logits whose softmax is the reverse label of 0, but for alpha at the most."""
    z = np.concatenate([[first], scale * np.array(values[1:])])
    target = np.full(len(z), 1 / (len(z) - 1))
    target[0] = 0
    return z, np.abs(special.softmax(z) - target).max()


@given(values=LOGITS, first=st.floats(-20, -4), scale=st.floats(1e-4, 0.02))
@PROPERTY
def test_theorem_2_a_small_training_error_makes_the_prediction_one_hot(values, first, scale):
    z, alpha = near_the_reverse_label(values, first, scale)
    labels = len(z)
    assume(alpha < 0.1 / labels)
    missing = special.softmax(-z)[1:].sum()  # 1 minus the largest would cancel
    assert missing <= alpha * (labels - 1) ** 2 * (1 + 1e-9)


@given(values=LOGITS, first=st.floats(-20, -4), scale=st.floats(1e-4, 0.02))
@PROPERTY
def test_theorem_2_wrong_labels_differ_by_the_square_of_the_training_error(values, first, scale):
    z, alpha = near_the_reverse_label(values, first, scale)
    labels = len(z)
    assume(alpha < 0.1 / labels)
    wrong = special.softmax(-z)[1:]
    assert wrong.max() - wrong.min() <= 2 * alpha**2 * (labels - 1) ** 2


@given(values=LOGITS)
@PROPERTY
def test_the_prediction_is_the_label_that_training_made_least_likely(values):
    logits = torch.tensor([values], dtype=torch.float64)
    label = resolve("rce")[0].rule().decide(Draw(logits[None, None])).item()
    assert special.softmax(-logits.numpy())[0, label] == special.softmax(-logits.numpy()).min()


def test_a_small_network_learns_the_digits(trained, digits):
    answers = trained.decide(digits.test.x, 1)[0]
    assert float((answers == digits.test.y).float().mean()) > 0.9


def test_training_makes_the_wrong_labels_more_alike_than_cross_entropy(trained, digits, tmp_path):
    device = torch.device("cpu")
    plain = Shelf([tmp_path]).deploy(f"standard({SMALL})", digits, 0, device).deployed
    entropies = [
        float(non_me(model.rule.scores(model.draw(digits.test.x, 1))).mean())
        for model in (trained, plain)
    ]
    assert entropies[0] > entropies[1] + 0.2


@pytest.mark.parametrize(
    "adversarial", ["fgsm(eps=0.2)", "pgd(eps=0.2, steps=3, targeted=true)", "trades(eps=0.2)"]
)
def test_adversarial_training_finds_images_that_cost_it_more(adversarial, trained, digits):
    defense = resolve(f"rce({SMALL}, adversarial={adversarial})")[0]
    x, y = digits.train.x[:50], digits.train.y[:50]
    batch = defense.batch(trained.members, Batch(x, y, x, 10), torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert defense.loss(trained.members, batch).mean() > losses(trained.members[0](x), y).mean()


def test_its_paper_preset_takes_the_steps_of_the_authors():
    presets = registry.defenses.get("rce").presets
    for preset, images, steps in (("paper", 50_000, 90_000), ("paper:mnist", 55_000, 20_000)):
        per_epoch = math.ceil(images / presets[preset]["batch_size"])
        assert presets[preset]["epochs"] * per_epoch == pytest.approx(steps, rel=0.02)
