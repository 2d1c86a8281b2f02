"""ADP against SciPy, QR and NumPy, finite differences, and the theorems of its paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from robbench import datasets
from robbench.attacks.losses import ce
from robbench.datasets import Split
from robbench.defense import resolve
from robbench.rules import Draw, MeanProbabilities
from robbench.training import train

CPU = torch.device("cpu")
TINY = "epochs=3, batch_size=16, network=mlp(hidden=[8])"
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)
PUBLISHED = [
    "adversarial=pgd(eps=0.05, low=0.01, reach=1, clean=1)",
    "adversarial=fgsm(eps=0.05, low=0.01, random=false, clean=1)",
]


@pytest.fixture(scope="module")
def dataset():
    digits = datasets.load("digits")
    return replace(digits, train=Split(*(tensor[:64] for tensor in digits.train)))


def adp(alpha=2.0, beta=0.5, **fields):
    return resolve("adp")[0].model_copy(update={"alpha": alpha, "beta": beta, **fields})


def loss(logits, y, alpha=2.0, beta=0.5):
    """(N,) of logits (K, N, L)."""
    return adp(alpha, beta).criterion(Draw(logits[None]), y, torch.zeros(len(y), 1, 8, 8))


def random_logits(seed, members=3, images=4, labels=7):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(members, images, labels, generator=rng, dtype=torch.float64)
    return logits, torch.randint(labels, (images,), generator=rng)


def by_hand(logits, y, alpha, beta):
    """The loss of every image: entropies by SciPy, log ED by QR with the ridge as extra rows."""
    values = []
    for z, label in zip(logits.numpy().transpose(1, 0, 2), y.tolist(), strict=True):
        p = special.softmax(z, axis=1)
        wrong = np.delete(p, label, axis=1)
        wrong /= np.linalg.norm(wrong, axis=1, keepdims=True)
        columns = np.vstack([wrong.T, np.sqrt(1e-6) * np.eye(len(z))])
        log_volume = np.log(np.abs(np.diag(np.linalg.qr(columns).R))).sum()
        entropy = stats.entropy(p.mean(0))
        values.append(-np.log(p[:, label]).sum() - alpha * entropy - 2 * beta * log_volume)
    return values


@given(seed=SEEDS, members=st.integers(1, 5), alpha=st.floats(0, 5), beta=st.floats(0, 2))
@PROPERTY
def test_the_loss_is_cross_entropies_entropy_and_twice_the_log_volume(seed, members, alpha, beta):
    logits, y = random_logits(seed, members)
    expected = by_hand(logits, y, alpha, beta)
    np.testing.assert_allclose(loss(logits, y, alpha, beta), expected, rtol=1e-9, atol=1e-9)


@given(seed=SEEDS, order=st.permutations(range(3)))
@PROPERTY
def test_the_order_of_members_does_not_matter(seed, order):
    logits, y = random_logits(seed)
    torch.testing.assert_close(loss(logits[list(order)], y), loss(logits, y))


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.5), (2.0, 0.0), (0.0, 0.5)])
def test_gradients_are_right(alpha, beta):
    logits, y = random_logits(3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, y, alpha, beta), logits)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_members_that_agree_have_a_finite_loss_and_gradient(scale):
    y = torch.tensor([0, 1])
    logits = (scale * torch.eye(5)[:2]).expand(3, 2, 5).clone().requires_grad_()
    value = loss(logits, y)
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


def optimum(alpha, beta, start):
    """(K, L) probabilities and the loss where descent from logits (K, 1, L) ends, label 0."""
    logits = start.clone().requires_grad_()
    descent = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe",
                                tolerance_grad=1e-10, tolerance_change=1e-14)  # fmt: skip
    y = torch.zeros(1, dtype=torch.long)

    def step():
        descent.zero_grad()
        value = loss(logits, y, alpha, beta).sum()
        value.backward()
        return value

    descent.step(step)
    logits = logits.detach()
    return logits.softmax(-1)[:, 0], float(loss(logits, y, alpha, beta))


def root_of_equation_7(alpha, members, labels):
    def gap(p):
        return 1 / p - alpha / members * np.log(p * (labels - 1) / (1 - p))

    return optimize.brentq(gap, 1 / labels + 1e-9, 1 - 1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_theorem_1_without_entropy_all_members_tend_to_the_one_hot_label(beta):
    p, value = optimum(0.0, beta, random_logits(0, 3, 1, 10)[0])
    assert float(p[:, 0].min()) > 0.999
    # the infimum is 0 at the label; the ridge adds K log(1 + 1e-6) to log ED
    assert value == pytest.approx(0, abs=5e-3)


@pytest.mark.parametrize(("members", "labels", "alpha"), [(3, 10, 2.0), (2, 5, 3.0), (5, 6, 9.0)])
def test_theorem_2_with_entropy_alone_the_optimum_solves_equation_7(members, labels, alpha):
    p, _ = optimum(alpha, 0.0, random_logits(1, members, 1, labels)[0])
    f_y = root_of_equation_7(alpha, members, labels)
    np.testing.assert_allclose(p[:, 0], f_y, atol=1e-4)
    np.testing.assert_allclose(p.mean(0)[1:], (1 - f_y) / (labels - 1), atol=1e-4)


def partition(alpha, members, labels, rest=1e-30):
    """(K, 1, L) probabilities of eq. 8: every member spreads its doubt over labels of its own."""
    f_y = root_of_equation_7(alpha, members, labels)
    p = torch.full((members, 1, labels), rest, dtype=torch.float64)
    p[..., 0] = f_y
    for own, chunk in zip(p, torch.arange(1, labels).chunk(members), strict=True):
        own[0, chunk] = (1 - f_y) * members / (labels - 1)
    return p


def at_the_partition(alpha, beta, members, labels):
    y = torch.zeros(1, dtype=torch.long)
    return float(loss(partition(alpha, members, labels).log(), y, alpha, beta))


def test_corollary_1_descent_ends_at_the_partition():
    start = partition(2.0, 3, 10, rest=0.02).log()
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).double()
    p, value = optimum(2.0, 0.5, start + 0.3 * noise)
    assert value == pytest.approx(at_the_partition(2.0, 0.5, 3, 10), abs=2e-3)
    np.testing.assert_allclose(p, partition(2.0, 3, 10)[:, 0], atol=2e-2)


@given(seed=SEEDS, alpha=st.floats(0.1, 4), beta=st.floats(0.01, 2))
@PROPERTY
def test_corollary_1_no_predictions_are_better_than_the_partition(seed, alpha, beta):
    logits, _ = random_logits(seed, members=3, images=8, labels=7)
    y = torch.zeros(8, dtype=torch.long)
    least = at_the_partition(alpha, beta, members=3, labels=7)
    assert float(loss(logits, y, alpha, beta).min()) >= least - 1e-9


@pytest.mark.parametrize("adversarial", ["adversarial=none", *PUBLISHED])
def test_without_its_terms_it_is_the_ensemble_bit_for_bit(adversarial, dataset):
    weights = []
    for name in ("adp(alpha=0, beta=0, ", "ensemble("):
        defense = resolve(f"{name}{TINY}, {adversarial})")[0].model_copy(update={"epochs": 1})
        torch.manual_seed(0)
        members = defense.build((1, 8, 8), 10)
        train(defense, members, dataset, 0, CPU)
        weights.append(members.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.parametrize("adversarial", [*PUBLISHED, "adversarial=trades(eps=0.05, steps=2)"])
def test_it_combines_with_adversarial_training(adversarial, dataset):
    defense = resolve(f"adp({TINY}, {adversarial})")[0]
    torch.manual_seed(0)
    members = defense.build((1, 8, 8), 10)
    curve = train(defense, members, dataset, 0, CPU)
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_the_attackers_margin_has_a_gradient_where_the_cross_entropy_has_none():
    sure = (200 * torch.eye(4)[:1]).expand(1, 3, 1, 4)
    y, gradients = torch.tensor([0]), []
    own = next(iter(resolve("adp")[0].losses.values()))
    for attacked in (lambda d: ce(MeanProbabilities().scores(d), y), lambda d: own(d, y, None)):
        leaf = sure.clone().requires_grad_()
        gradients.append(torch.autograd.grad(attacked(Draw(leaf)).sum(), leaf)[0])
    assert not gradients[0].any()
    assert float(gradients[1].abs().max()) > 0.1
